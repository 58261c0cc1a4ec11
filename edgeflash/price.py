"""What a student will cost, before anyone trains it: random weights, real export, real run."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from edgeflash.blueprints import UNETS, UNIT, Blueprint, scheduler
from edgeflash.bundle import DENOISERS, EACH_STEP, Bundle
from edgeflash.devices import Device
from edgeflash.disk import check_writable
from edgeflash.embedded import located
from edgeflash.errors import EdgeflashError
from edgeflash.export_options import ExportOptions
from edgeflash.floors import METRICS
from edgeflash.machine import Machine
from edgeflash.report import REPORT, Report, System, told
from edgeflash.report_html import write_html
from edgeflash.roles import Target
from edgeflash.schedule import lower_schedule
from edgeflash.shelf import make
from edgeflash.student import Student

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

NO_FLOORS = {name: -1e9 for metrics in METRICS.values() for name in metrics}
NOTES = (
    "Random weights: the pictures are noise; latency, memory and bytes are those of a trained one.",
    "GFLOP: two for every multiplication and addition of convolutions, products and attention, as "
    "torch counts them, for one picture; peak: a large float32 matrix product on this machine.",
)


@dataclass(frozen=True)
class Way:
    """One way to run the student, on the runtime that a target of the same name is for."""

    on: str
    precision: str


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
        EdgeflashError: ``out`` is a file, a way is not on the shelf, or options do not fit the
            student.
    """
    console = console or Console(stderr=True, highlight=False)
    check_writable(out)
    targets = [make(Target, way.on, {"precision": way.precision}) for way in ways]
    check_asked(student, steps, size)
    machine = Machine.here()
    peak = peak_gflops()
    systems: list[System] = []
    with tempfile.TemporaryDirectory(prefix="edgeflash-price-") as scratch:
        folder, name = _folder(student, Path(scratch), console)
        opened = Student.open(folder)
        work = gflops(opened, size)
        if opened.guidance().doubles:
            work |= {name: 2 * work[name] for name in EACH_STEP if name in work}
        for way, target in zip(ways, targets, strict=True):
            bundle = _export(opened, target, Path(scratch) / "bundle", steps, size, console)
            for count in steps:
                found = _bench(bundle, way, name, count, runs, console)
                systems.append(_with_work(found, way, work, peak, devices))
    report = Report(
        title=f"the price of {name}",
        command=command,
        machine=machine,
        systems=tuple(systems),
        notes=(*NOTES, *(device.told() for device in devices)),
    )
    report.save(out / REPORT)
    write_html(report, out / "report.html")
    return report


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
        prompts=default_prompts(bundle)[:1],
        steps=steps,
        warmup_runs=1,
        runs=runs,
    )
    label = f"{name} {way.precision}, {steps} step{'s' * (steps != 1)} on {way.on}"
    console.print(f"measuring {label}")
    return system_of(label, bundle, job, run_apart(job, lambda done, of: None))


def gflops(
    student: Student, size: tuple[int, int] | None = None, components: Sequence[str] = ()
) -> dict[str, float]:
    """GFLOP of one call of each component, for one picture; no weights are read.

    Args:
        student: whose configs say how the networks are built.
        size: (height, width) in px; None: what the UNet was made for.
        components: which; none named: all.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from edgeflash.networks_sd import quiet, without_weights

    found, pixels = {}, size or student.family.size(student)
    for component in components or student.family.components():
        inputs, _ = student.family.signature(student, component, pixels)
        with torch.device("meta"), torch.no_grad(), quiet():
            network = student.family.wrap(without_weights(student, component), component).eval()
            given = [
                torch.zeros(
                    [1 if isinstance(side, str) else side for side in spec.shape],
                    dtype=getattr(torch, spec.dtype),
                )
                for spec in inputs
            ]
            with FlopCounterMode(display=False) as counter:
                network(*given)
        found[component] = counter.get_total_flops() / 1e9
    return found


def peak_gflops() -> float:
    """GFLOP/s of a large float32 matrix product on all cores of this machine, best of five."""
    side = 2048
    a = np.ones((side, side), np.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    del a
    gc.collect()
    return 2 * side**3 / best / 1e9


def _with_work(
    system: System, way: Way, work: dict[str, float], peak: float, devices: Sequence[Device]
) -> System:
    """The system with its GFLOP, the share of the machine's peak that it reached, and estimates."""
    whole = sum(work[name] * (system.steps if name in EACH_STEP else 1) for name in work)
    share = whole / (system.latency_ms_p50 / 1000) / peak
    extra: dict[str, float | str] = {f"GFLOP of {name}": round(work[name], 3) for name in work}
    extra |= {"GFLOP": round(whole, 3), "share of fp32 peak": round(share, 4)}
    extra["precision"] = way.precision
    for device in devices:
        extra[_estimate(device.name)] = round(device.image_ms(work, system.steps), 1)
    return system.model_copy(update={"extra": extra})


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
    headings = ("steps", "image ms", "text", "step", "decode", "GFLOP", "of peak", "MiB", "RSS MiB")
    for heading in ("on", *headings):
        out.add_column(heading, justify="left" if heading == "on" else "right")
    for system in report.systems:
        spent = {name: stage.p50_ms for name, stage in system.stages.items()}
        text = sum(ms for name, ms in spent.items() if name.startswith("text_encoder"))
        step = sum(spent.get(name, 0) for name in DENOISERS)
        stages = (text, step, spent["vae_decoder"])
        out.add_row(
            f"{system.conditions.runtime} {system.extra['precision']}",
            str(system.steps),
            *map(told, (system.latency_ms_p50, *stages)),
            told(float(system.extra["GFLOP"])),
            f"{told(float(system.extra['share of fp32 peak']), '%')} %",
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
