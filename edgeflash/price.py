"""What a student will cost, before anyone trains it: random weights, real export, real run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from edgeflash.blueprints import UNETS, UNIT, Blueprint, scheduler
from edgeflash.bundle import DENOISERS, EACH_STEP, Bundle
from edgeflash.devices import Device
from edgeflash.disk import check_writable
from edgeflash.embedded import located
from edgeflash.errors import EdgeflashError, Stopped
from edgeflash.export_options import ExportOptions
from edgeflash.floors import METRICS
from edgeflash.machine import Machine
from edgeflash.peaks import peaks, sums_of
from edgeflash.report import PRECISION, REPORT, Report, System, told
from edgeflash.report_html import write_html
from edgeflash.roles import Target
from edgeflash.schedule import lower_schedule
from edgeflash.shelf import make
from edgeflash.student import Student

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

WITH, MOVED, OF_ROOF = "with", "MiB moved", "share of roof"  # among extra; with: which options
SUMMED = "inference_precision"  # the option that OpenVINO has for it
NO_FLOORS = {name: -1e9 for metrics in METRICS.values() for name in metrics}
NOTES = (
    "Random weights: the pictures are noise; latency, memory and bytes are those of a trained one.",
    "GFLOP: two for every multiplication and addition of convolutions, products and attention, as "
    "torch counts them, for one picture.",
    "Share of roof: the time a picture takes at least, by this machine's best, of what it took: "
    "each network at its large products (float32, bfloat16 or int8, as its sums are), or as its "
    "memory feeds it, by a large copy. MiB moved: its weights, and every result written and read "
    "once. Above 100 %: more stayed in caches, or was fused.",
)


@dataclass(frozen=True)
class Way:
    """One way to run the student, on the runtime that a target of the same name is for.

    ``options``: of the runtime.
    """

    on: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def told(self) -> str:
        """What is not as usual on the runtime."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def asked_for(student: str, decoder: str | None) -> Student | Blueprint:
    """The blueprint of that name or config, or else what `Student.open` finds by that name.

    Raises:
        EdgeflashError: neither, or a folder and a decoder.
    """
    config = Path(student).suffix == ".json"
    if student in UNETS or config or not located(student).exists():
        return Blueprint.of(student, decoder)
    if decoder:
        raise EdgeflashError(f"--decoder {decoder}: {student} has its own; leave --decoder out")
    return Student.open(student)


def price(
    student: Student | Blueprint,
    ways: Sequence[Way],
    out: Path,
    *,
    steps: Sequence[int],
    size: tuple[int, int] | None = None,
    runs: int = 5,
    devices: Sequence[Device] = (),
    command: str | None = None,
    console: Console | None = None,
) -> Report:
    """Exports and benches every way, and writes `report.json` and `report.html`.

    Args:
        student: a blueprint, or a diffusers folder that is there already.
        ways: runtimes and precisions.
        out: folder of the report; the bundles are not kept.
        steps: step counts, a row each.
        size: (height, width) in px; None: what the UNet was made for.
        runs: counted runs of each.
        devices: to estimate the latency on.
        command: that makes this report again, for the record.
        console: where progress is told; None: the terminal's standard error.

    Raises:
        EdgeflashError: ``out`` is a file, a way is not on the shelf or takes no device's time, or
            options do not fit the student. A way that fails on the way is told at the end, when the
            others' report is written.
    """
    from edgeflash.work import gflops

    console = console or Console(stderr=True, highlight=False)
    check_writable(out)
    targets = [make(Target, way.on, {"precision": way.precision}) for way in ways]
    check_ways(ways)
    check_asked(student, steps, size)
    machine = Machine.here()
    top = peaks({"fp32", *(sums_of(w.precision, w.options.get(SUMMED)) for w in ways)})
    systems: list[System] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgeflash-price-") as scratch:
        folder, name = _folder(student, Path(scratch), console)
        opened = Student.open(folder)
        work = gflops(opened, size)
        if opened.guidance().doubles:
            work |= {name: 2 * work[name] for name in EACH_STEP if name in work}
        for way, target in zip(ways, targets, strict=True):
            try:
                bundle = _export(opened, target, Path(scratch) / "bundle", steps, size, console)
                for count in steps:
                    found = _bench(bundle, way, name, count, runs, console)
                    systems.append(_with_work(found, bundle, way, work, top, devices))
            except Stopped:
                raise
            except EdgeflashError as error:
                failed.append(f"{way.on} {way.precision}: {error}")
    if not systems:
        raise EdgeflashError("; ".join(failed))
    report = Report(
        title=f"the price of {name}",
        command=command,
        machine=machine,
        systems=tuple(systems),
        notes=(*NOTES, *(device.told() for device in devices)),
    )
    report.save(out / REPORT)
    write_html(report, out / "report.html")
    if failed:
        raise EdgeflashError(f"{out} has the others: {'; '.join(failed)}")
    return report


def check_ways(ways: Sequence[Way]) -> None:
    """Raises where the times of a way would be those of no device, or nothing of it runs here."""
    from edgeflash.runtimes.bench import timed_on

    for way in ways:
        timed_on(way.on, dict(way.options))
        if why := make(Target, way.on, {"precision": way.precision}).prover().unproven:
            raise EdgeflashError(f"--on {way.on}: is not timed here, leave it out: {why}")


def check_asked(
    student: Student | Blueprint, steps: Sequence[int], size: tuple[int, int] | None
) -> None:
    """Raises, before any weights are written, what does not go with the student.

    Raises:
        EdgeflashError: its scheduler has not so many steps, or its networks no such size.
    """
    if isinstance(student, Student):
        if steps:
            student.schedules(steps)
        family = student.family
        family.signature(student, family.denoiser, size or family.size(student))
        return
    for count in steps:
        lower_schedule(scheduler(), count)
    if size and any(side < UNIT or side % UNIT for side in size):
        raise EdgeflashError(
            f"size {size[0]}x{size[1]}: both sides must be multiples of {UNIT} px, {UNIT} at least"
        )


def _folder(student: Student | Blueprint, scratch: Path, console: Console) -> tuple[Path, str]:
    """Where the student lies, and what to call it."""
    if isinstance(student, Student):
        return student.folder, student.folder.resolve().name
    name = f"{student.name} with {student.decoder} decoder"
    console.print(f"writing {name}, random weights")
    student.write(scratch / student.name)
    return scratch / student.name, name


def _export(
    student: Student,
    target: Target,
    out: Path,
    steps: Sequence[int],
    size: tuple[int, int] | None,
    console: Console,
) -> Bundle:
    from edgeflash.export.line import export_student
    from edgeflash.runtimes.bench import PROMPT

    own = student.manifest.prompts if student.manifest else ()
    options = ExportOptions(
        steps=tuple(steps),
        size=size,
        prompts=own[:1] or (PROMPT,),  # calibration need not be good, only done
        floors=NO_FLOORS,  # random weights amplify rounding; nobody will look at the pictures
    )
    return export_student(student, target, out, options, console=console, lasting=False)


def _bench(bundle: Bundle, way: Way, name: str, steps: int, runs: int, console: Console) -> System:
    from edgeflash.runtimes.bench import default_prompts, run_apart, system_of
    from edgeflash.runtimes.measure import Job

    job = Job(
        bundle=str(bundle.folder),
        runtime=way.on,
        options=dict(way.options),
        prompts=default_prompts(bundle)[:1],
        steps=steps,
        warmup_runs=1,
        runs=runs,
    )
    label = f"{name} {way.precision}, {steps} step{'s' * (steps != 1)} on {way.on}"
    label += f" with {way.told}" * bool(way.options)
    console.print(f"measuring {label}")
    return system_of(label, bundle, job, run_apart(job, lambda done, of: None))


def _with_work(
    system: System,
    bundle: Bundle,
    way: Way,
    work: Mapping[str, float],
    top: Mapping[str, float],
    devices: Sequence[Device],
) -> System:
    """The system with its GFLOP, the MiB it moves, how near it is to the roof, and estimates.

    ``work``: GFLOP of a call; ``top``: see `edgeflash.peaks`.
    """
    from edgeflash.runtimes.moved import moved_mib

    calls = {name: system.steps if name in EACH_STEP else 1 for name in work}
    whole, moved = sum(work[name] * calls[name] for name in work), moved_mib(bundle)
    least_s = sum(
        calls[name] * _least_s(work[name], moved.get(name, 0), top, _sums(bundle, name, way))
        for name in work
    )
    extra: dict[str, float | str] = {f"GFLOP of {name}": round(work[name], 3) for name in work}
    extra["GFLOP"] = round(whole, 3)
    if moved.keys() >= work.keys():
        extra[MOVED] = round(sum(moved[name] * calls[name] for name in work), 3)
    extra[OF_ROOF] = round(least_s * 1000 / system.latency_ms_p50, 4)
    extra |= {PRECISION: way.precision} | ({WITH: way.told} if way.options else {})
    for device in devices:
        extra[_estimate(device.name)] = round(device.image_ms(work, system.steps), 1)
    return system.model_copy(update={"extra": extra})


def _sums(bundle: Bundle, component: str, way: Way) -> str:
    return sums_of(bundle.component(component).precision, way.options.get(SUMMED))


def _least_s(gflop: float, mib: float, top: Mapping[str, float], sums: str) -> float:
    """Seconds that a call takes under the roof: what limits it is its sums or its memory."""
    return max(gflop / top[sums], mib * 2**20 / 1e9 / top["GB/s"])


def _estimate(device: str) -> str:
    return f"{device}, estimated ms"


def price_tables(report: Report, devices: Sequence[Device] = ()) -> Group:
    """The report for the terminal, with estimates for devices and what those rest on."""
    from rich.console import Group

    estimates = [estimates_table(report, devices)] if devices else []
    return Group(price_table(report), *estimates, *(device.told() for device in devices))


def price_table(report: Report) -> Table:
    """Where the time, the work and the bytes go."""
    out = _table(report.title)
    headings = ("steps", "image ms", "text", "step", "decode", "GFLOP", "moved", "of roof")
    for heading in ("on", *headings, "MiB", "RSS MiB"):
        out.add_column(heading, justify="left" if heading == "on" else "right")
    for system in report.systems:
        spent = {name: stage.p50_ms for name, stage in system.stages.items()}
        text = sum(ms for name, ms in spent.items() if name.startswith("text_encoder"))
        step = sum(spent.get(name, 0) for name in DENOISERS)
        stages = (text, step, spent["vae_decoder"])
        out.add_row(
            f"{system.conditions.runtime} {system.extra[PRECISION]} {system.extra.get(WITH, '')}",
            str(system.steps),
            *map(told, (system.latency_ms_p50, *stages)),
            told(float(system.extra["GFLOP"])),
            told(float(system.extra[MOVED])) if MOVED in system.extra else "-",
            f"{told(float(system.extra[OF_ROOF]), '%')} %",
            *map(told, (system.size_mib, system.peak_rss_mib)),
        )
    return out


def estimates_table(report: Report, devices: Sequence[Device]) -> Table:
    """What an image would take elsewhere, in ms, by step count."""
    systems = {system.steps: system for system in report.systems}
    out = _table("estimates, not measured")
    for heading in ("device", *(f"{steps} steps, ms" for steps in systems)):
        out.add_column(heading, justify="left" if heading == "device" else "right")
    for device in devices:
        values = [float(system.extra[_estimate(device.name)]) for system in systems.values()]
        out.add_row(device.name, *map(told, values))
    return out


def _table(title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    return Table(title=escape(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
