"""Every few-step method for an equal time: same teacher, same start, same judge.

Each method trains in a process of its own, as many steps as fit into the time, so that phases and
courses of the learning rate come to their end. What is finished is kept, one JSON file a method; a
later call goes on with the rest. Knows all rooms, as the command line does.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from edgeflash.bundle import Bundle
from edgeflash.disk import check_writable, read_json, write_atomic, write_for_people
from edgeflash.embedded import embedded
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.export_options import ExportOptions
from edgeflash.machine import Machine, peak_rss_mib
from edgeflash.png import save_png
from edgeflash.recipe import Recipe, Sampling, find_recipe, read_recipe, recipe_of
from edgeflash.roles import Runtime, Target
from edgeflash.score import draw
from edgeflash.sheet import contact_sheet
from edgeflash.shelf import make
from edgeflash.student import Student

JUDGED = 500  # prompts that prompt accuracy and FD are measured on
CAPTIONS, SEEDS = 25, 8  # pictures that diversity is measured on
COUNTS = (1, 2, 4)  # network calls a picture
TEACHER_STEPS = 25
PROBE_STEPS = 30  # that tell how fast a method trains
SHOWN = 8  # prompts in the picture
LOW_FLOORS = {"L3.psnr_db": 40.0, "L4.psnr_db": 40.0}  # a bad student amplifies rounding
RESULTS, SHEET = "RESULTS.md", "RESULTS.png"


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Drawn(_Figures):
    """How pictures of so many network calls are.

    ``diversity``: mean distance, in the judge's features, of pictures of one caption.
    """

    prompt_accuracy: float
    one_object: float
    two_objects: float
    fd: float
    diversity: float


class Entry(_Figures):
    """One row. What was not trained here has no recipe and no costs."""

    name: str
    drawn: dict[int, Drawn]  # by network calls a picture
    recipe_sha256: str | None = None
    options: dict[str, Any] = {}
    steps: int | None = None
    seconds: float | None = None
    samples_per_s: float | None = None
    peak_rss_mib: float | None = None
    machine: Machine


def benchmark(out: Path, names: Sequence[str] = (), *, minutes: float = 20) -> list[Entry]:
    """Trains and judges methods, and writes `RESULTS.md` and a picture of them all.

    Args:
        out: folder; each method's figures are `results/NAME.json` there, its student is below
            `students`.
        names: methods, or what `ablations.toml` has of them; none: all that `benchmark.toml` has
            options for.
        minutes: of training, each.

    Raises:
        EdgeflashError: a method that the benchmark has no options for, or an interruption.
    """
    console = Console(stderr=True, highlight=False)
    methods = _options()
    options = methods | _ablations()
    for name in names:
        if name not in options:
            raise unknown("method in the benchmark", name, options)
    check_writable(out)
    start = out / "students" / "start"
    _train(_start_recipe(), start, out)
    references = {
        "teacher": (embedded("shapes-teacher"), (*COUNTS, TEACHER_STEPS)),
        "start, not distilled": (start, COUNTS),
    }
    for name, (folder, counts) in references.items():
        if not _result(out, name).exists():
            console.print(f"[bold]{name}[/bold]")
            _keep(
                out,
                Entry(name=name, drawn=_judge(name, folder, out, counts), machine=Machine.here()),
            )
    failed = []
    for name in names or methods:
        if not _result(out, name).exists():
            console.print(f"[bold]{name}[/bold]")
            try:
                _keep(out, _entry(name, options[name], start, out, minutes))
            except EdgeflashError as error:  # the others do not wait for it
                failed.append(f"{name}: {error}")
                console.print(failed[-1])
    entries = write_results(out)
    if failed:
        raise EdgeflashError("; ".join(failed))
    return entries


def _options() -> dict[str, dict[str, Any]]:
    """Options of each method, those of ``[all]`` among them."""
    tables = _tables("benchmark.toml")
    common = tables.pop("all")
    return {name: common | own for name, own in tables.items()}


def _ablations() -> dict[str, dict[str, Any]]:
    """Options of each ablation: its method's, some changed; with "by", and where it begins."""
    methods, common = _options(), _tables("benchmark.toml")["all"]
    ablations = _tables("ablations.toml")
    return {name: methods.get(own["by"], common) | own for name, own in ablations.items()}


def _tables(name: str) -> dict[str, dict[str, Any]]:
    spec = find_spec("edgeflash.distill")
    assert spec is not None and spec.origin
    path = Path(spec.origin).with_name(name)
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _start_recipe() -> Recipe:
    """The shipped student's first stage: pruned, and distilled to draw as its teacher does."""
    shapes = read_recipe(find_recipe("shapes"))
    return shapes.model_copy(
        update={"name": "start", "stage": shapes.stage[:1], "sampling": _guided()}
    )


def _guided() -> Sampling:
    """By the teacher's sampler, guided as the teacher is."""
    guidance = Student.open(embedded("shapes-teacher")).guidance().scale
    return Sampling(steps=COUNTS, default_steps=4, guidance="cfg", guidance_scale=guidance)


def _recipe(name: str, options: dict[str, Any], start: Path, steps: int) -> Recipe:
    """The recipe of a method or an ablation; its teacher and base may be "teacher" and "start"."""
    places = {"teacher": "embedded", "start": str(start)}
    from_whom = {
        key: places[options.get(key, usual)]
        for key, usual in (("teacher", "teacher"), ("base", "start"))
    }
    plain = {"name": name, "licence": "apache-2.0"} | from_whom
    data = read_recipe(find_recipe("shapes")).data.model_dump(exclude_none=True)
    own = {key: value for key, value in options.items() if key not in from_whom}
    stage = {"by": name} | own | {"steps": steps}
    recipe = recipe_of(plain | {"data": data, "stage": [stage]}, "benchmark.toml")
    (method,) = recipe.methods()
    if method.step_counts() is None:  # it makes no sampler of its own
        recipe = recipe.model_copy(update={"sampling": _guided()})
    return recipe


def _entry(name: str, options: dict[str, Any], start: Path, out: Path, minutes: float) -> Entry:
    """Trains one method for so long, and judges it."""
    steps = _fitting(name, options, start, out, minutes)
    recipe, student = _recipe(name, options, start, steps), out / "students" / name
    peak_rss_mib = _train(recipe, student, out)
    manifest = Student.open(student).manifest
    assert manifest is not None and manifest.lineage.seconds
    (method,) = recipe.methods()
    counts = tuple(n for n in COUNTS if n in manifest.schedules)
    return Entry(
        name=name,
        drawn=_judge(name, student, out, counts),
        recipe_sha256=recipe.sha256,
        options=options,
        steps=steps,
        seconds=manifest.lineage.seconds,
        samples_per_s=round(steps * method.batch_size / manifest.lineage.seconds, 2),
        peak_rss_mib=peak_rss_mib,
        machine=Machine.here(),
    )


def _fitting(name: str, options: dict[str, Any], start: Path, out: Path, minutes: float) -> int:
    """How many steps of a method fit into the time; noted, so that an interrupted run goes on."""
    noted = out / "students" / f"{name}.steps"
    if not noted.exists():
        probe = out / "students" / f"{name}.probe"
        _train(_recipe(name, options, start, PROBE_STEPS), probe, out)
        manifest = Student.open(probe).manifest
        assert manifest is not None and manifest.lineage.seconds
        steps = minutes * 60 * PROBE_STEPS / manifest.lineage.seconds
        write_atomic(noted, str(max(1, round(steps))))
    return int(noted.read_text())


def _train(recipe: Recipe, student: Path, out: Path) -> float:
    """Runs a recipe in a fresh process, unless its student is there -> its peak memory in MiB."""
    noted = student.with_name(f"{student.name}.peak")
    if not student.exists():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peak = pool.submit(_train_here, recipe, student, out / "cache").result()
        write_atomic(noted, f"{peak or 0:.1f}")
    return float(noted.read_text())


def _train_here(recipe: Recipe, student: Path, cache: Path) -> float | None:
    from edgeflash.distill.run import distill

    distill(recipe, student, cache=cache)
    return peak_rss_mib()


def _judge(name: str, folder: Path, out: Path, counts: Sequence[int]) -> dict[int, Drawn]:
    """Exports a student to ONNX, and judges what it draws in so many steps."""
    from edgeflash.distill.judge import verdict
    from edgeflash.export.line import export_student

    bundle = out / "bundles" / _slug(name)
    target, student = make(Target, "onnx", {}), Student.open(folder)
    options = ExportOptions(steps=tuple(counts), prompts=_prompts()[:1], floors=LOW_FLOORS)
    export_student(student, target, bundle, options)
    found = {}
    for count in counts:
        pictures = _draw(bundle, _prompts(), count)
        said = verdict(pictures, _captions())
        assert said.fd is not None
        found[count] = Drawn(
            prompt_accuracy=round(said.prompt_accuracy, 4),
            one_object=round(said.by_count[1], 4),
            two_objects=round(said.by_count[2], 4),
            fd=round(said.fd, 1),
            diversity=round(_diversity(bundle, count), 3),
        )
        _save(pictures[:SHOWN], out / "pictures" / f"{_slug(name)}-{count}")
    return found


def _draw(bundle: Path, prompts: tuple[str, ...], steps: int) -> Any:
    return draw(Bundle.open(bundle), make(Runtime, "onnx", {}), prompts, steps=steps)


def _diversity(bundle: Path, steps: int) -> float:
    from edgeflash.distill.judge import load_judge, look

    prompts = tuple(np.repeat(_prompts()[:CAPTIONS], SEEDS))
    _, features = look(load_judge(), _draw(bundle, prompts, steps))
    groups = features.reshape(CAPTIONS, SEEDS, -1)
    gaps = np.linalg.norm(groups[:, :, None] - groups[:, None], axis=-1)
    return float(gaps.sum() / (CAPTIONS * SEEDS * (SEEDS - 1)))


def _save(pictures: Any, folder: Path) -> None:
    for i, picture in enumerate(pictures):
        save_png(Image.fromarray(picture), folder / f"{i}.png")


@cache
def _captions() -> list[Any]:
    from edgeflash.distill.judge import held_out_captions

    return held_out_captions(JUDGED)


def _prompts() -> tuple[str, ...]:
    return tuple(caption.text for caption in _captions())


def _result(out: Path, name: str) -> Path:
    return out / "results" / f"{_slug(name)}.json"


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _keep(out: Path, entry: Entry) -> None:
    told = entry.model_dump_json(indent=1, exclude_none=True) + "\n"
    write_for_people(_result(out, entry.name), told)


def write_results(out: Path) -> list[Entry]:
    """Writes table and picture of all results there are; what was not trained here comes first."""
    found = [Entry.model_validate(read_json(path)) for path in (out / "results").glob("*.json")]
    entries = sorted(found, key=lambda e: (e.steps is not None, e.name != "teacher", -_best(e)))
    rows = [_row(f"{e.name}, 25 steps", e, (25,)) for e in entries if 25 in e.drawn]
    rows += [_row(entry.name, entry, COUNTS) for entry in entries]
    heads = ["| " + " | ".join(COLUMNS + COSTS) + " |", "|---" + "|--:" * 9 + "|"]
    write_for_people(out / RESULTS, "\n".join([HEAD, *heads, *rows]) + "\n")
    shown = {e.name: max(count for count in COUNTS if count in e.drawn) for e in entries}
    sheet = {
        f"{name}, {count} step{'s' * (count > 1)}": [
            out / "pictures" / f"{_slug(name)}-{count}" / f"{i}.png" for i in range(SHOWN)
        ]
        for name, count in shown.items()
    }
    contact_sheet(sheet, _prompts()[:SHOWN], out / SHEET)
    return entries


def _best(entry: Entry) -> float:
    return max(entry.drawn[count].prompt_accuracy for count in COUNTS if count in entry.drawn)


def _row(name: str, entry: Entry, counts: Sequence[int]) -> str:
    def each(field: str, scale: float, digits: int) -> str:
        drawn = [entry.drawn.get(count) for count in counts]
        told = [f"{getattr(d, field) * scale:.{digits}f}" if d else "-" for d in drawn]
        return " / ".join(told)

    costs = ["-"] * 4
    if entry.steps and entry.seconds and entry.samples_per_s and entry.peak_rss_mib:
        costs = [f"{entry.seconds / 60:.0f}", f"{entry.steps:,}"]
        costs += [f"{entry.samples_per_s:.1f}", f"{entry.peak_rss_mib:,.0f}"]
    figures = [each("prompt_accuracy", 100, 1), each("one_object", 100, 0)]
    figures += [each("two_objects", 100, 0), each("fd", 1, 0), each("diversity", 1, 1)]
    return "| " + " | ".join([name, *figures, *costs]) + " |"


HEAD = """# The methods, side by side

`edgeflash benchmark-methods`: each method begins with the same student (pruned by `blocks`, and
distilled to draw as its teacher does), and trains as many steps as fit into the same time, with
the options of `benchmark.toml`, of which `ablations.toml` changes some. Figures are of 1 / 2 / 4
network calls a picture, where the method's sampler has them: prompt accuracy over 500 held-out
prompts, all of them and those of one and of two objects; FD against held-out renders; diversity,
the mean distance of pictures of one caption in the judge's features. The decoder is the teacher's
own. Teacher and start, above, draw with the teacher's sampler, guided: two calls a step.
"""
COLUMNS = "method", "accuracy, %", "one object", "two objects", "FD", "diversity"
COSTS = "min", "steps", "samples/s", "peak RSS, MiB"
