"""Candidates of one target, exported and measured here: one of them earns its place, or none does.

`edgeflash export --precision auto` tries every precision of a target; `planning.py` tries plans.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from edgeflash import shelf
from edgeflash.bundle import Bundle, Figure, Part, describe_file
from edgeflash.devices import Device
from edgeflash.disk import check_replaceable, fresh_folder
from edgeflash.errors import EdgeflashError, Stopped, unknown
from edgeflash.floors import FLOORS
from edgeflash.machine import Machine
from edgeflash.report import told
from edgeflash.roles import Runtime, Target

if TYPE_CHECKING:
    from rich.table import Table

    from edgeflash.elsewhere import Elsewhere
    from edgeflash.runtimes.measure import Job, Measured

FILE = "choice.json"  # in the bundle: what was tried, and why it was not kept
ROUNDS = 2  # candidates are measured in turn, so that a busy spell does not fall on one alone
RUNS = 10  # counted ones, of each round
MARGIN = {"speed": 0.05, "size": 0.0}  # less faster than that, and medians may say the contrary
ROUNDED = {  # floors where a runtime's options may round sums, of precisions that do not
    f"{name}.{metric}": value
    for name in ("fp32", "fp16")
    for metric, value in FLOORS["bf16"].items()
}
UNIT = {"speed": "ms", "size": "MiB"}
NOTHING = {"speed": "nothing else is faster by 5 %", "size": "nothing else is smaller"}
Lower = Callable[[Target, Path], Bundle]
Options = Mapping[str, Any]
USUAL: Options = {}


class Candidate(Part):
    """What became of one. None: not measured, as it was refused."""

    name: str
    mib: float | None = None  # the whole bundle
    latency_ms: float | None = None  # median of a picture's, the lower one of the rounds
    image_db: float | None = None  # of the parity ladder, L4, the worst prompt
    kept: bool = False
    why: str = ""

    def value(self, prefer: str) -> float | None:
        """What is to be small."""
        return self.latency_ms if prefer == "speed" else self.mib


class Choice(Part):
    """All candidates, the float one first, and where they were measured."""

    prefer: str
    runtime: str
    steps: int
    machine: dict[str, Any]
    options: Mapping[str, Any] = {}  # of the runtime, where they are not the usual ones
    candidates: tuple[Candidate, ...]


@dataclass
class Tried:
    """A candidate: its bundle, or why there is none, and every round's measurements."""

    name: str
    bundle: Bundle | None
    why: str = ""
    measured: list[Measured] = field(default_factory=list)
    told_ms: float | None = None  # where a report of another device tells it
    again: tuple[Figure, ...] = ()  # of the ladder, on the runtime as it is timed

    def candidate(self) -> Candidate:
        if self.bundle is None:
            return Candidate(name=self.name, why=self.why)
        mib = round(self.bundle.bytes / 2**20, 3)
        found = figure(self.again or self.bundle.manifest.parity, "L4", "psnr_db")
        medians = [statistics.median(each.runs_ms) for each in self.measured]
        ms = min(medians, default=self.told_ms)
        if self.why or ms is None:
            return Candidate(name=self.name, mib=mib, image_db=found, why=self.why)
        return Candidate(name=self.name, mib=mib, latency_ms=round(ms, 3), image_db=found)


def figure(ladder: Sequence[Figure], rung: str, metric: str) -> float | None:
    """A figure of the whole pipeline, from a ladder that was climbed."""
    return next((f.value for f in ladder if (f.rung, f.metric) == (rung, metric)), None)


def try_out(name: str, target: Callable[[], Target], lower: Lower, folder: Path) -> Tried:
    """Exports a candidate; one that is refused, or below its floor, says why."""
    try:
        return Tried(name, lower(target(), folder))
    except Stopped:
        raise
    except EdgeflashError as error:
        return Tried(name, None, str(error).replace(f"{folder}: ", ""))


def climb_again(tried: Tried, options: Options, floors: Mapping[str, float]) -> None:
    """Proves a candidate on the runtime as it is timed: its options may round what is summed."""
    from edgeflash.verify import refuse_below, runtime_for, verify

    if tried.bundle is None or not options:
        return
    usual = runtime_for(tried.bundle)
    runtime = shelf.validated(type(usual), dict(options), "--timed-with")
    try:
        tried.again = verify(tried.bundle, runtime, floors, usual=ROUNDED)
        refuse_below(tried.again, ", ".join(f"{name}={value}" for name, value in options.items()))
    except EdgeflashError as error:
        tried.why = str(error)


def measure_in_turn(
    candidates: Sequence[Tried], console: Console, runs: int = RUNS, options: Options = USUAL
) -> None:
    """Benches those that have a bundle, in processes of their own, one after the other."""
    from edgeflash.runtimes.bench import run_apart

    for _ in range(ROUNDS):
        for each in candidates:
            if each.bundle is None or each.why:
                continue
            job = job_of(each.bundle, runs, options)
            with console.status(f"measuring {each.name}"):
                try:
                    each.measured.append(run_apart(job, lambda *_: None))
                except EdgeflashError as error:
                    each.why = f"does not run here: {error}"


def job_of(bundle: Bundle, runs: int = RUNS, options: Options = USUAL) -> Job:
    """A picture at a time, in the bundle's default steps, on the runtime it is for."""
    from edgeflash.runtimes.bench import default_prompts
    from edgeflash.runtimes.measure import Job

    return Job(
        bundle=str(bundle.folder),
        runtime=shelf.opener(bundle.manifest.components[0].target),
        options=dict(options),
        prompts=default_prompts(bundle)[:1],
        runs=runs,
    )


def judged(candidates: Sequence[Candidate], prefer: str) -> tuple[Candidate, ...]:
    """The same, one of them kept: the best, if it beats the first, which is the float one.

    Raises:
        EdgeflashError: the float one itself was refused, or does not run here.
    """
    whole, *others = candidates
    limit = whole.value(prefer)
    if whole.why or limit is None:
        raise EdgeflashError(f"--precision auto: {whole.name}: {whole.why}")
    ran = [each for each in others if not each.why]
    values = {each.name: value for each in ran if (value := each.value(prefer)) is not None}
    best = min(values, key=lambda name: values[name], default=whole.name)
    if values.get(best, limit) >= limit * (1 - MARGIN[prefer]):
        best = whole.name
    found = []
    for each in candidates:
        value = each.value(prefer)
        if each.name == best:
            why = "" if each is not whole else NOTHING[prefer]
            found.append(each.model_copy(update={"kept": True, "why": why}))
        elif each.why or value is None:
            found.append(each)
        else:
            rival = values.get(best, limit)
            why = f"{told(value)} {UNIT[prefer]}, where {best} has {told(rival)}"
            why += ": not better by 5 %" if value < rival else ""
            found.append(each.model_copy(update={"why": why}))
    return tuple(found)


def export_best(
    to: str,
    options: dict[str, Any],
    lower: Lower,
    out: Path,
    prefer: str,
    console: Console,
    *sources: Path,
    timed_with: Options = USUAL,
    floors: Mapping[str, float] = USUAL,
    report: Elsewhere | None = None,
) -> Choice:
    """Exports every precision of a target, measures them, and puts the one that is kept to ``out``.

    Args:
        to: the target.
        options: of the target, besides the precision.
        lower: exports to a target into a folder.
        out: folder of the bundle; replaced when it exists. It holds `choice.json`.
        prefer: what the float one has to be beaten in.
        console: where progress is told.
        sources: folders that are read, which ``out`` must not replace.
        timed_with: options of the runtime; with any, the ladder is climbed once more on it.
        floors: of that ladder, by name, where they are not the usual ones.
        report: times of a device, instead of measuring here; what is not in it is not tried.

    Raises:
        EdgeflashError: ``options`` name a precision, the float one is refused or does not run
            here, or as fast as no device does, the report is of something else, or ``out`` cannot
            be made.
    """
    if prefer not in UNIT:
        raise unknown("--prefer", prefer, UNIT)
    if "precision" in options:
        raise EdgeflashError("--precision auto: tries every precision: leave --set precision out")
    untimed = shelf.make(Runtime, shelf.opener(to), dict(timed_with), check=False).untimed
    if untimed and prefer == "speed" and not report:
        raise EdgeflashError(f"--precision auto: {untimed}, give --report, or choose --prefer size")
    check_replaceable(out, *sources, kind="bundle")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.auto.", dir=out.parent) as scratch:
        tried: list[Tried] = []
        for name in precisions(to):
            tried.append(_exported(name, to, options, lower, Path(scratch), console, report))
            if (first := tried[0].bundle) is None:
                raise EdgeflashError(f"--precision auto: {name}: {tried[0].why}")
            if (why := first.manifest.unproven) and not report:
                raise EdgeflashError(f"--precision auto: nothing to measure it on here: {why}")
            climb_again(tried[-1], timed_with, floors)
        if not untimed and not report:
            measure_in_turn(tried, console, options=timed_with)
        candidates = judged([each.candidate() for each in tried], prefer)
        kept = next(t for t, c in zip(tried, candidates, strict=True) if c.kept).bundle
        assert kept is not None
        choice = _choice(kept, candidates, prefer, timed_with, report)
        _place(kept, choice, out)
    return choice


def at_precision(to: str, precision: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for one of several precisions, without those that do nothing there."""
    idle = shelf.find(Target, to).idle(precision)
    return {k: v for k, v in options.items() if k not in idle} | {"precision": precision}


def suited(to: str, device: str, options: Mapping[str, Any], *, auto: bool) -> dict[str, Any]:
    """Options with what suits a device, where it does something at their precision; theirs win."""
    found = Device.of(device).suited(to)
    if not auto:
        usual = shelf.find(Target, to).model_fields["precision"].default
        found = at_precision(to, options.get("precision", usual), found)
    return found | dict(options)


def plain(to: str, options: Mapping[str, Any]) -> Target:
    """The float candidate, once one of all is found to take every option.

    Raises:
        EdgeflashError: none does.
    """
    refused: list[EdgeflashError] = []
    for name in precisions(to):
        try:
            shelf.make(Target, to, dict(options) | {"precision": name})
            break
        except EdgeflashError as error:
            refused.append(error)
    else:
        raise refused[-1]
    return shelf.make(Target, to, at_precision(to, precisions(to)[0], options))


def _exported(
    name: str,
    to: str,
    options: dict[str, Any],
    lower: Lower,
    scratch: Path,
    console: Console,
    report: Elsewhere | None,
) -> Tried:
    """A candidate, with the time that a report tells of it."""
    if report and name not in report:
        return Tried(name, None, "the report has no time of it")
    console.print(f"trying {name}", highlight=False)
    target = partial(shelf.make, Target, to, at_precision(to, name, options))
    tried = try_out(name, target, lower, scratch / name)
    if report and tried.bundle:
        tried.told_ms = report.latency_ms(name, tried.bundle)
    return tried


def precisions(to: str) -> tuple[str, ...]:
    """Those that a target takes, the plain float one first."""
    target = shelf.find(Target, to)
    return tuple(map(str, get_args(target.model_fields["precision"].annotation)))


def _choice(
    kept: Bundle,
    candidates: tuple[Candidate, ...],
    prefer: str,
    options: Options,
    report: Elsewhere | None,
) -> Choice:
    machine = report.machine if report else Machine.here()
    own = shelf.opener(kept.manifest.components[0].target)
    return Choice(
        prefer=prefer,
        runtime=report.runtime if report else own,
        steps=kept.manifest.default_steps,
        machine={name: getattr(machine, name) for name in ("cpu", "cores", "gpu", "load_1min")},
        candidates=candidates,
        options=report.options if report else dict(options),
    )


def _place(bundle: Bundle, choice: Choice, out: Path) -> None:
    """Copies a bundle to its place, with what is told of the choice among its files."""
    from edgeflash.export.pack import write_manifest

    with fresh_folder(out) as draft:
        shutil.copytree(bundle.folder, draft, dirs_exist_ok=True)
        (draft / FILE).write_text(choice.model_dump_json(indent=1) + "\n", encoding="utf-8")
        files = (*bundle.manifest.files, describe_file(draft, FILE))
        write_manifest(bundle.manifest.model_copy(update={"files": files}), draft)


def choice_table(choice: Choice) -> Table:
    """For the terminal: every candidate, its figures, and why it was not kept."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for heading in ("candidate", "MiB", "ms", "image dB", "", ""):
        right = heading in ("MiB", "ms", "image dB")
        out.add_column(heading, justify="right" if right else "left", overflow="fold")
    for each in choice.candidates:
        figures = map(told, (each.mib, each.latency_ms, each.image_db))
        out.add_row(each.name, *figures, "kept" if each.kept else "rejected", escape(each.why))
    return out
