"""Every few-step method for an equal time: same teacher, same start, same judge.

Each method trains in a process of its own, as many steps as fit into the time, so that phases and
courses of the learning rate come to their end. What is finished is kept, one JSON file a training,
beside a note of what it was asked with: a later call goes on with the rest, and refuses a folder
that was begun with other options, minutes or models. Knows all rooms, as the command line does.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from edgeflash.benchmark_table import (
    COUNTS,
    SHOWN,
    TEACHER_STEPS,
    Drawn,
    Entry,
    keep,
    labelled,
    result,
    results,
    slug,
    strip,
    write_results,
)
from edgeflash.bundle import Bundle
from edgeflash.disk import check_writable, read_json, write_atomic
from edgeflash.embedded import embedded
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.export_options import ExportOptions
from edgeflash.machine import Machine, peak_rss_mib
from edgeflash.recipe import Recipe, Sampling, at_default, find_recipe, read_recipe, recipe_of
from edgeflash.roles import Runtime, Target
from edgeflash.score import draw
from edgeflash.shelf import make
from edgeflash.student import Student, folder_sha256

JUDGED = 500  # prompts that prompt accuracy and FD are measured on
CAPTIONS, SEEDS = 25, 8  # pictures that diversity is measured on
PROBE_STEPS = 30  # that tell how fast a method trains
START = "start, not distilled"
LOW_FLOORS = {"L3.psnr_db": 40.0, "L4.psnr_db": 40.0}  # a bad student amplifies rounding
ASKED = "asked"  # folder of notes: what each training that was begun was asked with


def benchmark(
    out: Path, names: Sequence[str] = (), *, minutes: float = 20, seeds: int = 1
) -> list[Entry]:
    """Trains and judges methods, and writes `RESULTS.md` and a picture of them all.

    Args:
        out: folder; the figures of each training are `results/NAME.json` there, beside what it
            drew; its student is below `students`. Results of another machine are taken as they are.
        names: methods, or what `ablations.toml` has of them; none: all that `benchmark.toml` has
            options for.
        minutes: of training, each.
        seeds: how often each is trained: all of them once, then all again.

    Raises:
        EdgeflashError: a method that the benchmark has no options for, a folder that was begun with
            other options, minutes or models, or an interruption.
    """
    console = Console(stderr=True, highlight=False)
    methods = _options()
    options = methods | _ablations()
    for name in names:
        if name not in options:
            raise unknown("method in the benchmark", name, options)
    check_writable(out)
    _check_kept(out, options, minutes)
    start = _references(out, console)
    failed = []
    for seed in range(seeds):
        for name in names or methods:
            label = labelled(name, seed)
            if result(out, label).exists():
                continue
            console.print(f"[bold]{label}[/bold]")
            _note(out, label, {"name": name, "seed": seed} | _asked(name, options[name], minutes))
            try:
                keep(out, _entry(name, options[name], start, out, minutes, seed))
            except EdgeflashError as error:  # the others do not wait for it
                failed.append(f"{label}: {error}")
                console.print(failed[-1])
    entries = write_results(out, _prompts())
    if failed:
        raise EdgeflashError("; ".join(failed))
    return entries


def _references(out: Path, console: Console) -> Path:
    """Judges the teacher, and the student that all begin with, which is trained here -> folder."""
    start = out / "students" / "start"
    _note(out, START, {"name": START, "seed": 0} | _models())
    _train(_start_recipe(), start, out)
    references = {
        "teacher": (embedded("shapes-teacher"), (*COUNTS, TEACHER_STEPS)),
        START: (start, COUNTS),
    }
    for name, (folder, counts) in references.items():
        if not result(out, name).exists():
            console.print(f"[bold]{name}[/bold]")
            drawn = _judge(name, folder, out, counts)
            keep(out, Entry(name=name, drawn=drawn, asked=_models(), machine=Machine.here()))
    return start


def _check_kept(out: Path, options: dict[str, dict[str, Any]], minutes: float) -> None:
    """Refuses a folder in which anything was begun otherwise than it would be now.

    Its table would have unequal things side by side, and nobody would know.
    """
    for kept in [*map(_asked_with, results(out)), *map(read_json, (out / ASKED).glob("*.json"))]:
        name = kept["name"]
        if name in options:  # what an older version did not ask was as it is at its default
            kept = _at_default(name, options[name]) | kept
        asked = _asked(name, options[name], minutes) if name in options else _models()
        now = asked | {"name": name, "seed": kept["seed"]}
        if changed := [key for key in kept | now if kept.get(key) != now.get(key)]:
            raise EdgeflashError(
                f"{out}: {labelled(name, kept['seed'])} was begun otherwise "
                f"(changed: {', '.join(changed)}); choose another --out, or delete that folder"
            )


def _asked_with(path: Path) -> dict[str, Any]:
    """What a result says that it was asked with."""
    told = read_json(path)
    if "asked" not in told:
        raise EdgeflashError(f"{path}: does not tell what it was asked with; choose another --out")
    asked: dict[str, Any] = told["asked"]
    return asked | {"name": told["name"], "seed": told["seed"]}


def _note(out: Path, label: str, asked: dict[str, Any]) -> None:
    path = out / ASKED / f"{slug(label)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asked, indent=1))


def _asked(name: str, options: dict[str, Any], minutes: float) -> dict[str, Any]:
    """All that a training goes by, every default filled in, but its seed and the code."""
    recipe = _recipe(name, options, Path("start"), 1).resolved()
    (stage,) = recipe["stage"]
    said = {f"{stage['by']}.{key}": value for key, value in stage.items() if key != "steps"}
    whole = {key: recipe.get(key) for key in ("teacher", "base", "data", "sampling")}
    return _models() | {"minutes": minutes} | whole | said


def _at_default(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a method that have their default, as notes call them."""
    (method,) = _recipe(name, options, Path("start"), 1).methods()
    by = options.get("by", name)
    return {f"{by}.{key}": value for key, value in at_default(method).items() if key != "steps"}


@cache
def _models() -> dict[str, Any]:
    """The teacher, and how the start is made of it."""
    start = json.dumps(_start_recipe().resolved(), sort_keys=True)
    return {
        "the embedded teacher": folder_sha256(embedded("shapes-teacher")),
        "the start": hashlib.sha256(start.encode()).hexdigest(),
    }


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


def _recipe(name: str, options: dict[str, Any], start: Path, steps: int, seed: int = 0) -> Recipe:
    """The recipe of a method or an ablation; its teacher and base may be "teacher" and "start"."""
    places = {"teacher": "embedded", "start": str(start)}
    from_whom = {
        key: places[options.get(key, usual)]
        for key, usual in (("teacher", "teacher"), ("base", "start"))
    }
    plain = {"name": name, "licence": "apache-2.0", "seed": seed} | from_whom
    data = read_recipe(find_recipe("shapes")).data.model_dump(exclude_none=True)
    own = {key: value for key, value in options.items() if key not in from_whom}
    stage = {"by": name} | own | {"steps": steps}
    recipe = recipe_of(plain | {"data": data, "stage": [stage]}, "benchmark.toml")
    (method,) = recipe.methods()
    if method.step_counts() is None:  # it makes no sampler of its own
        recipe = recipe.model_copy(update={"sampling": _guided()})
    return recipe


def _entry(
    name: str, options: dict[str, Any], start: Path, out: Path, minutes: float, seed: int
) -> Entry:
    """Trains one method for so long, and judges it."""
    steps = _fitting(name, options, start, out, minutes)
    label = labelled(name, seed)
    recipe = _recipe(name, options, start, steps, seed)
    student = out / "students" / slug(label)
    peak_rss_mib = _train(recipe, student, out)
    manifest = Student.open(student).manifest
    assert manifest is not None and manifest.lineage.seconds
    (method,) = recipe.methods()
    counts = tuple(n for n in COUNTS if n in manifest.schedules)
    return Entry(
        name=name,
        seed=seed,
        drawn=_judge(label, student, out, counts),
        recipe_sha256=recipe.sha256,
        asked=_asked(name, options, minutes),
        steps=steps,
        seconds=manifest.lineage.seconds,
        cached_seconds=manifest.lineage.stages[-1]["cached_seconds"],
        samples_per_s=round(steps * method.batch_size / manifest.lineage.seconds, 2),
        peak_rss_mib=peak_rss_mib,
        machine=Machine.here(),
    )


def _fitting(name: str, options: dict[str, Any], start: Path, out: Path, minutes: float) -> int:
    """How many steps of a method fit into the time; noted, for later runs and all its seeds."""
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

    bundle = out / "bundles" / slug(name)
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
        if count <= max(COUNTS):
            strip(pictures[:SHOWN], result(out, name).with_suffix(".png"))
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


@cache
def _captions() -> list[Any]:
    from edgeflash.distill.judge import held_out_captions

    return held_out_captions(JUDGED)


def _prompts() -> tuple[str, ...]:
    return tuple(caption.text for caption in _captions())
