"""`edgeflash plan`: which layers of a student to give which word, under a budget; told as a report.

Sensitivities and the predicted front come from `export/sensitivity.py` and `export/front.py`. What
is chosen is exported and measured: bytes, the picture's error and latency in the report are real.
"""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from edgeflash.bundle import Bundle
from edgeflash.choice import Candidate, Tried, at_precision, measure_in_turn, try_out
from edgeflash.disk import check_writable, write_for_people
from edgeflash.errors import EdgeflashError
from edgeflash.export_options import AS_USUAL, ExportOptions
from edgeflash.machine import Machine
from edgeflash.planning_report import figures_of, notes_on, predicted, systems_of
from edgeflash.report import REPORT, Report, told
from edgeflash.report_html import write_html
from edgeflash.roles import Target
from edgeflash.shelf import find, make
from edgeflash.student import Student

if TYPE_CHECKING:
    from edgeflash.export.front import Point
    from edgeflash.export.plan import Plan, Quantizing
    from edgeflash.export.sensitivity import Sensitivity

MIB = 2**20
ATTEMPTS = 4  # exports until the bundle is within its budget; the first tells what else it holds
SPREAD = 4  # plans of a front of time that are exported and measured


@dataclass(frozen=True)
class Budget:
    """What a bundle may take; None: as much as it likes."""

    mib: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        if self.mib is None and self.ms is None:
            raise EdgeflashError("say a budget: --budget-mib 6, --budget-ms 20, or both")

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate that was measured is within it."""
        if candidate.why:
            return False
        mib, ms = candidate.mib, candidate.latency_ms
        small = self.mib is None or (mib is not None and mib <= self.mib)
        return small and (self.ms is None or (ms is not None and ms <= self.ms))


@dataclass
class Exported:
    """A candidate, and the point of the front that it is; None: it has no plan."""

    tried: Tried
    point: Point | None

    @property
    def candidate(self) -> Candidate:
        return self.tried.candidate()

    def plan(self) -> Plan:
        assert self.point is not None, self.tried.name
        return self.point.plan()


@dataclass(frozen=True)
class Wish:
    """What a plan is searched for.

    Attributes:
        to: the target.
        options: of it.
        budget: of the bundle.
        words: that the plan may hold; none named: those that the budget wants.
        asked: of the exports, and of the tape of one.
    """

    to: str
    options: Mapping[str, Any]
    budget: Budget
    words: tuple[str, ...] = ()
    asked: ExportOptions = AS_USUAL


@dataclass(frozen=True)
class _Search:
    """What every step of a search needs."""

    student: Student
    wish: Wish
    words: tuple[str, ...]
    scratch: Path
    console: Console

    @property
    def asked(self) -> ExportOptions:
        """Of every export: all go on from what the first one, in floats, records."""
        from edgeflash.export.plan import CALIBRATED

        every = not set(self.words).isdisjoint(CALIBRATED)
        return self.wish.asked.model_copy(update={"record_all": every})

    def lower(self, target: Target, folder: Path) -> Bundle:
        from edgeflash.export.line import export_student

        return export_student(
            self.student, target, folder, self.asked, console=self.console, lasting=False
        )

    def target(self, point: Point | None, precision: str) -> Quantizing:
        """With a point's plan, or none."""
        plan = {"plan": point.plan().model_dump()} if point else {}
        options = at_precision(self.wish.to, precision, self.wish.options)
        return quantizing(self.wish.to, options | plan)

    def export(self, name: str, point: Point | None, precision: str) -> Exported:
        folder = self.scratch / str(len(list(self.scratch.iterdir())))
        self.console.print(f"exporting {name}", highlight=False)
        target = partial(self.target, point, precision)
        return Exported(try_out(name, target, self.lower, folder), point)

    def whole(self) -> Exported:
        """The float one; where it is within the budget, there is nothing to search."""
        floats = self.target(None, self.words[0]).rest if self.wish.budget.ms is None else "fp32"
        done = self.export(floats, None, floats)
        _bytes(done)
        if self.wish.budget.ms is not None:
            measure_in_turn([done.tried], self.console)
        check_needed(done, self.wish.budget)
        done.tried.measured.clear()  # it is measured again with the plans, in turn
        return done

    def by_size(
        self, whole: Exported, points: Sequence[Point], found: Sensitivity
    ) -> list[Exported]:
        """The float one, and plans until one is within the budget, which is the last.

        Raises:
            EdgeflashError: the words cannot get that small, or the ladder refuses a plan.
        """
        from edgeflash.export.front import within

        assert self.wish.budget.mib is not None
        done, width = [whole], 4 if whole.tried.name == "fp32" else 2
        beside: float = _bytes(whole) - sum(found.numbers.values()) * width
        for _ in range(ATTEMPTS):
            point = within(points, self.wish.budget.mib * MIB - beside)
            name = f"plan {len(done)}, {told((point.bytes + beside) / MIB)} MiB"
            done.append(self.export(name, point, self.words[0]))
            if (taken := _bytes(done[-1])) <= self.wish.budget.mib * MIB:
                break
            beside = taken - point.bytes
        return done

    def by_time(self, whole: Exported, points: Sequence[Point]) -> list[Exported]:
        """The float one, and plans that are spread along the front."""
        from edgeflash.export.front import spread

        done = [whole]
        for point in spread(points, SPREAD):
            name = f"plan {point.products:.0%} {self.words[0]}"
            done.append(self.export(name, point, self.words[0]))
        return done


def _bytes(exported: Exported) -> int:
    if exported.tried.bundle is None:
        raise EdgeflashError(f"{exported.tried.name}: {exported.tried.why}")
    return exported.tried.bundle.bytes


def quantizing(to: str, options: dict[str, Any]) -> Quantizing:
    """A target that takes plans.

    Raises:
        EdgeflashError: it takes none.
    """
    from edgeflash.export.plan import Quantizing

    if not issubclass(find(Target, to), Quantizing):
        raise EdgeflashError(f"--to {to}: takes no plan; choose onnx, openvino or tensorrt")
    target = make(Target, to, options)
    assert isinstance(target, Quantizing)
    return target


def words_for(target: Quantizing, wish: Wish) -> tuple[str, ...]:
    """The words a plan may hold, finest first: those asked for, or those that the budget wants.

    Under a budget of time those that make products faster, else those of weights alone, which lose
    less.

    Raises:
        EdgeflashError: the target does not honour one, or there is no model of its error.
    """
    from edgeflash.export.fake import WORDS
    from edgeflash.export.front import FAST

    can = [word for word in WORDS if word in target.honours]
    for word in wish.words:
        if word not in can:
            have = ", ".join(can) or "none"
            raise EdgeflashError(f"--words {word}: a plan for {wish.to} is searched among {have}")
        if wish.budget.ms is not None and word not in FAST:
            raise EdgeflashError(f"--words {word}: makes no picture faster; leave --budget-ms out")
    light, fast = [w for w in can if w not in FAST], [w for w in can if w in FAST]
    usual = light if wish.budget.ms is None and light else fast
    return tuple(word for word in WORDS if word in (wish.words or usual))


def search(
    student: Student,
    wish: Wish,
    out: Path,
    folder: Path,
    console: Console,
    *,
    command: str | None = None,
) -> Report:
    """Writes the plan whose picture is best within the budget, and the report.

    Args:
        student: what to quantize.
        wish: for which target, and how small or fast.
        out: TOML file of the plan.
        folder: of `report.json` and `report.html`.
        console: where progress is told.
        command: that makes this again, for the record.

    Raises:
        EdgeflashError: no plan is within the budget, or none is needed; times are asked for that
            cannot be measured here; or options do not fit the student.
    """
    from edgeflash.export.front import front

    machine = Machine.here()  # before the work, so that the load is that of others
    target = quantizing(wish.to, {**wish.options, "precision": "int8"})
    _check_places(out, folder, wish)
    unproven = target.prover().unproven
    if unproven and wish.budget.ms is not None:
        raise EdgeflashError(f"--budget-ms: no time is measured here, leave it out: {unproven}")
    with tempfile.TemporaryDirectory(prefix=".edgeflash-plan.", dir=out.parent) as scratch:
        one = _Search(student, wish, words_for(target, wish), Path(scratch), console)
        whole = one.whole()
        found = _sensitivity(one)
        points = front(found, one.target(None, one.words[0]), one.words)
        by_time = wish.budget.ms is not None
        done = one.by_time(whole, points) if by_time else one.by_size(whole, points, found)
        if not unproven:
            measure_in_turn([each.tried for each in done], console)
        kept = best(done, wish.budget)
        report = Report(
            title=f"plans of {student.folder.resolve().name} for {wish.to}",
            command=command,
            machine=machine,
            systems=systems_of(done),
            front=predicted(points, done),
            notes=notes_on(kept, found, done, unproven),
        )
    write_for_people(out, _header(kept, one) + kept.plan().toml())
    report.save(folder / REPORT)
    write_html(report, folder / "report.html")
    return report


def _check_places(out: Path, folder: Path, wish: Wish) -> None:
    """Raises what would only show when the work is done."""
    from edgeflash.export.plan import read_plan

    if out.is_dir():
        raise EdgeflashError(f"{out}: is a folder; name a file for the plan")
    if out.exists():
        try:
            read_plan(out)
        except EdgeflashError:
            raise EdgeflashError(f"{out}: holds no plan, and would be lost: name another") from None
    check_writable(out, file=True)
    check_writable(folder, flag="--report")
    for name in ("plan", "precision"):
        if name in wish.options:
            raise EdgeflashError(f"--set {name}: is what is searched; leave it out")
    out.parent.mkdir(parents=True, exist_ok=True)


def _sensitivity(one: _Search) -> Sensitivity:
    from edgeflash.export import memory
    from edgeflash.export.line import rehearsal
    from edgeflash.export.sensitivity import sensitivity

    target = one.target(None, one.words[0])
    tape = rehearsal(one.student, target, one.wish.asked)
    components = one.student.family.components()
    memory.check_taught(one.student, components, tape.size, one.console)
    with one.console.status("measuring sensitivities") as status:
        return sensitivity(tape, target, components, one.words, tell=status.update)


def best(done: Sequence[Exported], budget: Budget) -> Exported:
    """The plan whose picture is nearest to the student's, of those within the budget.

    Raises:
        EdgeflashError: none is, or the first, which has no plan, is too.
    """
    check_needed(done[0], budget)
    fits = [each for each in done if each.point and budget.holds(each.candidate)]
    if not fits:
        found = (each.candidate for each in done)
        lines = "; ".join(f"{each.name}: {each.why or figures_of(each)}" for each in found)
        raise EdgeflashError(f"no plan is within the budget ({lines}): allow more")
    return max(fits, key=lambda each: each.candidate.image_db or -math.inf)


def check_needed(whole: Exported, budget: Budget) -> None:
    """Raises where the float one is within the budget: no plan's picture is as near."""
    if budget.holds(found := whole.candidate):
        figures = figures_of(found)
        raise EdgeflashError(f"{found.name}: {figures}: within the budget; nothing to quantize")


def _header(kept: Exported, one: _Search) -> str:
    """Remarks in front of the plan: what it gave here, and how to export by it."""
    to = one.wish.to
    return (
        f"# on {to}: {figures_of(kept.candidate)}, where it was searched\n"
        f"# edgeflash export STUDENT --to {to} --precision {one.words[0]} --set plan=FILE"
        f"{_asked(one.wish)}\n"
    )


def _asked(wish: Wish) -> str:
    """What else of the search an export has to repeat: other steps may fold other layers away."""
    words = [f"--set {shlex.quote(f'{name}={value}')}" for name, value in wish.options.items()]
    steps, size = wish.asked.steps, wish.asked.size
    words += [f"--steps {','.join(map(str, steps))}"] if steps else []
    words += [f"--size {size[0]}x{size[1]}"] if size else []
    return "".join(f" {word}" for word in words)
