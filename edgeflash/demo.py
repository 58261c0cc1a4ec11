"""The whole line on the embedded models, offline: distil, export, verify, bench, and a page.

Knows all rooms, as the command line does.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from edgeflash.bundle import Bundle
from edgeflash.disk import check_replaceable, check_writable, fresh_folder
from edgeflash.embedded import embedded
from edgeflash.errors import EdgeflashError
from edgeflash.export_options import ExportOptions
from edgeflash.machine import Machine
from edgeflash.manifest import parse_manifest, read_manifest
from edgeflash.png import save_png
from edgeflash.recipe import find_recipe, read_recipe
from edgeflash.report import REPORT, Report, System, SystemsTable
from edgeflash.report_html import Cell, Grid, write_html
from edgeflash.roles import Method, Plugin, Runtime, Target
from edgeflash.sheet import contact_sheet
from edgeflash.shelf import find, make, require
from edgeflash.student import Student, StudentManifest

SHOWN = 8  # prompts in the picture grid
UNTRAINED = {"L3.psnr_db": 60.0, "L4.psnr_db": 60.0}  # steps of such a network amplify rounding
JUDGED = 500  # prompts that prompt accuracy and FD are measured on
PAGE = "report.html"
SHEET = "pictures.png"
MARK = "made-by-edgeflash-demo.txt"  # what is in a folder without it is nothing of the demo's


@dataclass(frozen=True)
class Entry:
    """One row of the report: a bundle at a number of steps."""

    name: str
    bundle: Path
    steps: int


def run_demo(out: Path, *, full: bool = False) -> Report:
    """Runs everything and writes `student/`, `bundle-*/`, `report.json` and `report.html`.

    Args:
        out: folder to write; what an earlier demo left there is replaced.
        full: rerun the shipped student's own recipe first (hours on two cores; resumable).

    Raises:
        EdgeflashError: a package is missing, ``out`` is not the demo's own, a step went wrong, or
            was interrupted.
    """
    console = Console(stderr=True, highlight=False)
    _check_packages()
    _claim(out, full=full)
    if full:
        from edgeflash.distill.run import distill

        recipe, work = read_recipe(find_recipe("shapes")), out / "student.run"
        if (work / f"{len(recipe.stage)}-{recipe.stage[-1].by}" / "outcome.json").exists():
            console.print(f"{work}: is finished, and not trained again; delete it to do that")
        with _told(console, "distil the full recipe"):
            distill(recipe, out / "student", console=console)
    else:
        with fresh_folder(out / "student") as draft:
            shutil.copytree(embedded("shapes-student"), draft, dirs_exist_ok=True)
    entries = _brief(out, console) + _shipped(out, console)
    systems: list[System] = []
    drawn: dict[str, list[Path]] = {}
    for entry in map(_counted, entries):
        with _told(console, f"bench and judge {entry.name}"):
            system, pictures = _measure(entry, out)
        systems.append(system)
        drawn[entry.name] = pictures
    report = Report(
        title="edgeflash demo: embedded teacher and students on ONNX Runtime",
        command=f"edgeflash demo --out {out}{' --full' * full}",
        machine=Machine.here(),
        prompts=_prompts(SHOWN),
        systems=tuple(systems),
        notes=_notes(out),
    )
    report.save(out / REPORT)
    cells = {name: [Cell(path) for path in paths] for name, paths in drawn.items()}
    write_html(report, out / PAGE, Grid(_prompts(SHOWN), cells))
    opened = {name: [Image.open(path) for path in paths] for name, paths in drawn.items()}
    contact_sheet(opened, _prompts(SHOWN), out / SHEET)
    Console(highlight=False).print(SystemsTable(report))
    console.print(f"look at {out / PAGE}, or at {out / SHEET}")
    return report


def _check_packages() -> None:
    """Asks for what every step needs before the first one begins."""
    target, runtime = find(Target, "onnx", check=False), find(Runtime, "onnx", check=False)
    plugins: tuple[type[Plugin], ...] = (Method, target, runtime)
    require("demo", [name for plugin in plugins for name in plugin.needs])


def _claim(out: Path, *, full: bool) -> None:
    """Makes ``out`` the demo's own folder, where it may replace what an earlier demo wrote.

    Raises:
        EdgeflashError: it holds what no demo has made, or a student that this one would not make.
    """
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARK).is_file():
        raise EdgeflashError(f"{out}: holds what edgeflash demo has not made; choose another --out")
    _check_student(out / "student-brief", recipe="demo")
    _check_student(out / "student", recipe="shapes" if full else None)
    (out / MARK).write_text("edgeflash demo made this folder, and replaces what it wrote here.\n")


def _check_student(folder: Path, *, recipe: str | None) -> None:
    """Whether a student, if there is one, comes from a recipe, or is the shipped one with None."""
    if not folder.exists():
        return
    check_replaceable(folder, kind="student")
    found = _manifest(folder)
    if recipe is None:
        same = found == _manifest(embedded("shapes-student"))
    else:
        same = found.lineage.recipe_sha256 == read_recipe(find_recipe(recipe)).sha256
    if not same:
        raise EdgeflashError(
            f"{folder}: is another student than this demo puts there: choose another --out, or "
            "move it away"
        )


def _manifest(folder: Path) -> StudentManifest:
    found: StudentManifest = parse_manifest(
        StudentManifest, read_manifest(folder, "student"), folder
    )
    return found


def _counted(entry: Entry) -> Entry:
    return replace(entry, name=f"{entry.name}, {entry.steps} step{'s' * (entry.steps > 1)}")


def _brief(out: Path, console: Console) -> list[Entry]:
    """Prunes the teacher and distils it for minutes: how it draws before and after."""
    from edgeflash.distill.run import distill

    recipe, folder = read_recipe(find_recipe("demo")), out / "student-brief"
    if folder.exists():  # of a finished demo; what an interrupted one left is gone on with
        shutil.rmtree(folder.with_name("student-brief.run"), ignore_errors=True)
        shutil.rmtree(folder)
    rule = next(stage.options["rule"] for stage in recipe.stage if stage.by == "blocks")
    with tempfile.TemporaryDirectory() as scratch:
        student = Path(scratch) / "student-pruned"
        _prune(embedded("shapes-teacher"), rule, student)
        pruned = _export(
            student, out / "bundle-pruned", "fp32", (4,), console, recorded=1, floors=UNTRAINED
        )
    with _told(console, "distil a student in this run"):
        distill(recipe, folder, console=console)
    bundle = _export(folder, out / "bundle-brief", "fp32", (4,), console, recorded=1)
    manifest = Student.open(folder).manifest
    assert manifest is not None
    minutes = (manifest.lineage.seconds or 0) / 60
    return [
        Entry("pruned teacher, before training", pruned, 4),
        Entry(f"trained in this run, {minutes:.2g} min", bundle, 4),
    ]


def _prune(teacher: Path, rule: Any, out: Path) -> None:
    """The student as block distillation finds it, with the teacher's sampler and guidance."""
    import torch
    from diffusers import UNet2DConditionModel

    from edgeflash.distill.by_blocks import prune

    shutil.copytree(teacher, out, ignore=shutil.ignore_patterns("unet"))
    unet = UNet2DConditionModel.from_pretrained(str(teacher / "unet"), torch_dtype=torch.float32)
    prune(unet, rule)[0].save_pretrained(str(out / "unet"))


def _shipped(out: Path, console: Console) -> list[Entry]:
    """Teacher at 25 steps; the shipped student at 1, 2 and 4, and its int8 bundle."""
    teacher = _export(
        embedded("shapes-teacher"), out / "bundle-teacher", "fp32", (25,), console, recorded=1
    )
    entries = [Entry("teacher", teacher, 25)]
    for precision in ("fp32", "int8"):
        bundle = out / f"bundle-onnx-{precision}"
        _export(out / "student", bundle, precision, (1, 2, 4), console)
        for steps in (1, 2, 4):
            entries.append(Entry(f"shipped student, {precision}", bundle, steps))
    return entries


def _export(
    student: Path,
    bundle: Path,
    precision: str,
    steps: tuple[int, ...],
    console: Console,
    *,
    recorded: int = 16,
    floors: Mapping[str, float] | None = None,
) -> Path:
    from edgeflash.export.line import export_student

    target = make(Target, "onnx", {"precision": precision})
    with _told(console, f"export {student.name} to ONNX {precision}, and verify"):
        options = ExportOptions(steps=steps, prompts=_prompts(recorded), floors=dict(floors or {}))
        export_student(Student.open(student), target, bundle, options, console=console)
    return bundle


def _measure(entry: Entry, out: Path) -> tuple[System, list[Path]]:
    """Latency and memory in a process of their own, then the judge's verdict."""
    from edgeflash.distill.judge import held_out_captions, verdict
    from edgeflash.runtimes.bench import run_apart, system_of
    from edgeflash.runtimes.measure import Job
    from edgeflash.score import draw

    bundle = Bundle.open(entry.bundle)
    job = Job(
        bundle=str(entry.bundle),
        runtime="onnx",
        prompts=_prompts(1),
        steps=entry.steps,
        warmup_runs=3,
        runs=10,
    )
    system = system_of(entry.name, bundle, job, run_apart(job, lambda done, of: None))
    captions = held_out_captions(JUDGED)
    prompts = tuple(caption.text for caption in captions)
    pictures = draw(bundle, make(Runtime, "onnx", {}), prompts, steps=entry.steps)
    found = verdict(pictures, captions)
    shares = {f"accuracy with {n} object{'s' * (n > 1)}": v for n, v in found.by_count.items()}
    shares |= {f"accuracy of {name}": v for name, v in found.by_attribute.items()}
    told = {
        "prompt_accuracy": found.prompt_accuracy,
        "fd": found.fd,
        "extra": {name: round(v, 4) for name, v in shares.items()},
    }
    return system.model_copy(update=told), _save(pictures[:SHOWN], entry, out)


def _save(pictures: NDArray[np.uint8], entry: Entry, out: Path) -> list[Path]:
    """PNGs at three times their size."""
    folder = out / "images" / f"{entry.bundle.name}-{entry.steps}"
    paths = [folder / f"{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        side = picture.shape[0] * 3
        save_png(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), path)
    return paths


def _prompts(count: int) -> tuple[str, ...]:
    from edgeflash.distill.judge import held_out_captions

    return tuple(caption.text for caption in held_out_captions(count))


def _notes(out: Path) -> tuple[str, ...]:
    manifest = Student.open(out / "student").manifest
    assert manifest is not None
    lineage = manifest.lineage
    steps = ", ".join(f"{stage['by']} {stage['steps']} steps" for stage in lineage.stages)
    return (
        f"Shipped student: recipe {(lineage.recipe_sha256 or '')[:12]}, {steps}, "
        f"{(lineage.seconds or 0) / 60:.0f} min of training.",
        f"Prompt accuracy and FD: {JUDGED} held-out prompts, seeds 0 to {JUDGED - 1}.",
        "Latency is one picture, prompt to pixels, all components loaded.",
    )


@contextmanager
def _told(console: Console, what: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"[bold]{what}[/bold]")
    yield
    console.print(f"  done in {time.monotonic() - started:.0f} s")
