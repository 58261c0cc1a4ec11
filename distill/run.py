"""Runs a recipe: stage after stage, resumable, to a finished student folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from edgeflash import named_timesteps
from edgeflash.disk import TRAINING, check_replaceable, fresh_folder, write_atomic
from edgeflash.embedded import embedded, located, models
from edgeflash.errors import EdgeflashError, did_you_mean
from edgeflash.networks_control import apart
from edgeflash.no_memory import memory_named
from edgeflash.recipe import Recipe, at_default, sized
from edgeflash.roles import Method
from edgeflash.schedule import Guidance
from edgeflash.shelf import require
from edgeflash.student import (
    INDEX,
    Student,
    StudentLineage,
    folder_sha256,
    write_manifest,
)
from edgeflash.tokenizer import write_vocabulary

from . import crew, ends, fit, sharded
from .data import open_store
from .folders import copy_folder, halve
from .loop import Outcome, train
from .lora import add_lora, save_and_fuse
from .stage import Workshop
from .telling import Costs, summed

LESS = "raise accumulate, which keeps the batch, or set precision = 'bf16'"
STEERING = {"steps", "minutes", "learning_rate", "decay", "warmup_steps", "weight_decay"}
STEERING |= {"clip_norm", "precision", "accumulate"}  # a begun stage goes on with these changed
NEEDED = ["model_index.json", "*/*"]  # the root holds the same weights once more
NOT_NEEDED = ["*.ckpt", "*.onnx*", "*.msgpack", "*.h5", "*.bin", "*non_ema*", "*.png", "*.jpg"]
PROMPTS = 16  # captions that travel with the student, for calibration and parity


def distill(
    recipe: Recipe, out: Path, *, cache: Path | None = None, console: Console | None = None
) -> Path:
    """Trains every stage of a recipe and writes the student folder.

    Stages, checkpoints, caches and logs lie in ``out`` + ".run"; a second call with the same recipe
    goes on where the first one stopped, and refuses to when the recipe has changed. Every process
    of torchrun or accelerate launch calls it; the main one writes, and all must see ``out``.

    Args:
        recipe: the recipe.
        out: the student folder to write; replaced when it exists.
        cache: folder of the encoded data, for several runs to share; none: one beside the stages.

    Raises:
        EdgeflashError: a teacher that cannot be opened, a changed recipe, or an interruption.
    """
    console = console or Console(stderr=True)
    methods = recipe.methods()
    check_replaceable(out, kind="student")
    work = out.parent / f"{out.name}.run"
    _check_no_export(work)
    teacher = locate_teacher(recipe.teacher) if recipe.teacher else None
    base = locate_teacher(recipe.base) if recipe.base else teacher
    recipe = sized(recipe, teacher or base)
    work.mkdir(parents=True, exist_ok=True)
    _same_recipe(recipe, work, teacher, base)
    for folder in filter(None, (teacher, base)):
        _check(Student.open(folder), recipe, out)
    for spec, method in zip(recipe.stage, methods, strict=True):
        fit.check_wants(spec.by, method, recipe)
        if method.lora_rank:
            require(f"{spec.by}.lora_rank", ["peft"])
    fit.check_kind(recipe, list(filter(None, (teacher, base))))
    _check_steps(recipe)
    fit.check_guidance(recipe, base)
    accelerator = crew.assemble()
    sharded.heed(accelerator)
    fit.check_parts(recipe, methods, accelerator.num_processes)
    store = open_store(recipe.data, recipe.seed, cache or work / "cache")
    with crew.main_first():
        student = base or _empty(work / "0-empty")
    told: list[dict[str, Any]] = []
    for number, (spec, method) in enumerate(zip(recipe.stage, methods, strict=True), 1):
        folder = work / f"{number}-{spec.by}"
        label = f"{number}/{len(methods)} {spec.by}"
        if not (folder / "outcome.json").exists():
            folder.mkdir(exist_ok=True)
            half = method.precision == "bf16"
            shop = Workshop(teacher, student, store, folder, accelerator.device, half)
            with memory_named(label, LESS):
                _run_stage(spec.by, method, shop, accelerator, recipe.seed + number, label)
        told.append({"by": spec.by} | json.loads((folder / "outcome.json").read_text()))
        if accelerator.is_main_process:
            console.print(_line(label, told[-1]), highlight=False)
        student = folder / "student"
    if accelerator.is_main_process:
        with fresh_folder(out) as draft:
            copy_folder(student, draft, link=False)
            if recipe.weights == "fp16":
                halve(draft)
            _write_manifest(recipe, teacher, base, told, store.captions[:200], draft)
    accelerator.wait_for_everyone()
    return out


def _check_no_export(work: Path) -> None:
    if any(work.glob("record-*.json")) or any(work.glob("lower-*.json")):
        raise EdgeflashError(
            f"{work}: holds stages of an export; choose another --out for the student"
        )


def _check(student: Student, recipe: Recipe, out: Path) -> None:
    """Says what is wrong with a folder and what is asked of it before any work is done."""
    check_replaceable(out, student.folder, kind="student")
    if recipe.sampling:
        student.check_steps(recipe.sampling.steps)
        for grid in recipe.sampling.timesteps or ():
            named_timesteps.check(student, grid, f"[sampling] timesteps {[*grid]}")
    unit, side = student.family.unit(student), recipe.data.size_px
    if side % unit:
        raise EdgeflashError(
            f"[data] size_px = {side}: {student.folder} wants a multiple of {unit} px"
        )


def _check_steps(recipe: Recipe) -> None:
    """Refuses step counts that the finished student's sampler cannot run."""
    name, runs = _sampler(recipe)
    for asked in recipe.sampling.steps if recipe.sampling and runs else ():
        if asked not in runs:
            makes = f"at most {runs[-1]}" if runs.step == 1 else f"multiples of {runs.step}"
            makes = f"{runs[0]} alone" if len(runs) == 1 and runs[0] > 1 else makes
            raise EdgeflashError(f"[sampling] steps: {asked}, but {name!r} makes {makes}")


def _sampler(recipe: Recipe) -> tuple[str, range]:
    """The last stage that limits the step counts of the student's sampler, and those it can run."""
    for spec, method in zip(recipe.stage[::-1], recipe.methods()[::-1], strict=True):
        if (runs := method.step_counts()) is not None:
            return spec.by, runs
    return "", range(0)


def _run_stage(
    name: str, method: Method, shop: Workshop, accelerator: Accelerator, seed: int, label: str
) -> None:
    """Trains one stage and writes its student and `outcome.json`, the mark that it is done."""
    Costs.forget()
    shop.store.spent.clear()
    stage = method.begin(shop)
    if method.ends:
        ends.join(stage, name, method.ends, shop)
    if method.lora_rank:
        add_lora(stage, method, name, seed)
    outcome = train(
        stage, method, shop.folder, accelerator, samples=len(shop.store), seed=seed, label=label
    )
    if accelerator.is_main_process:
        shutil.rmtree(shop.folder / "student", ignore_errors=True)  # of a run cut off here
        with fresh_folder(shop.folder / "student") as draft:
            made = apart(stage.final())
            copy_folder(shop.student, draft, leave=made, link=True)
            if method.lora_rank:
                save_and_fuse(made[stage.denoiser], draft)
            _save_components(made, stage.pipeline, draft)
        told = _told(outcome, sum(shop.store.spent.values()))
        write_atomic(shop.folder / "outcome.json", json.dumps(told, indent=1))
        shutil.rmtree(shop.folder / "checkpoint", ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # free_memory leaves the averages of this stage registered


def _told(outcome: Outcome, cached_seconds: float) -> dict[str, Any]:
    """``cached_seconds``: what its caches took before the first step, whichever run filled them."""
    figures = {k: round(v, 5) for k, v in (outcome.terms | outcome.finished).items()}
    took = {"seconds": round(outcome.seconds, 1), "cached_seconds": round(cached_seconds, 1)}
    return {"steps": outcome.steps} | took | outcome.costs | figures


def _line(label: str, told: dict[str, Any]) -> str:
    floats = {k: v for k, v in told.items() if isinstance(v, float)}
    figures = "  ".join(f"{k} {v:.4g}" for k, v in summed(floats).items())
    return f"{label}: {told['steps']} steps  {figures}"


def _save_components(made: dict[str, Any], pipeline: str, draft: Path) -> None:
    """Saves a stage's networks into a diffusers folder and names their classes in its index."""
    index_path = draft / "model_index.json"
    index = json.loads(index_path.read_text())
    for name, network in made.items():
        network.save_pretrained(str(draft / name))
        if name.startswith("tokenizer"):
            write_vocabulary(draft / name)
        _forget_path(draft / name / "config.json")
        library = type(network).__module__.partition(".")[0]
        index[name] = [library, type(network).__name__]
    if pipeline:  # diffusers' pipeline for inpainting asks for the version, too
        index = {"_diffusers_version": version("diffusers")} | index
        index["_class_name"] = pipeline
    index_path.write_text(json.dumps(index, indent=2) + "\n")


def _forget_path(config: Path) -> None:
    """diffusers notes where a network was loaded from; that is nobody else's business."""
    if config.is_file():
        told = json.loads(config.read_text())
        told.pop("_name_or_path", None)
        config.write_text(json.dumps(told, indent=2) + "\n")


def _empty(folder: Path) -> Path:
    """A diffusers folder with nothing in it yet, for recipes that start from no teacher."""
    folder.mkdir(exist_ok=True)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {"requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def locate_teacher(name: str) -> Path:
    """The folder of a teacher: 'embedded', a path, an embedded model's name, or a hub id.

    Raises:
        EdgeflashError: none of these.
    """
    if name == "embedded":
        return embedded("shapes-teacher")
    if (folder := located(name)).exists():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED))
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise EdgeflashError(
            f"teacher {name!r}: no such folder or file, and the hub does not give it "
            f"({why}){did_you_mean(name, ['embedded', *models()])}"
        ) from None


def _same_recipe(
    recipe: Recipe, work: Path, teacher: Path | None = None, base: Path | None = None
) -> None:
    """Refuses to go on with stages that came from another recipe or teacher, and notes this one.

    What later stages alone see may change, and of the stage that was begun what only steers it: a
    failed stage can be mended. What an older version did not ask is as it was at its default.
    """
    sources = {"teacher": teacher, "base": base}
    path = work / TRAINING
    now = recipe.resolved() | {k: folder_sha256(v) for k, v in sources.items() if v}
    if path.exists():
        before = _brought_up(json.loads(path.read_text()), recipe)
        marks = [_mark(work / f"{i}-{s['by']}") for i, s in enumerate(before["stage"], 1)]
        changed = _changed(_bound(before, marks), _bound(now, marks)) if any(marks) else []
        if changed:
            raise EdgeflashError(
                f"{work}: was begun with another recipe (changed: {', '.join(changed)}); "
                "choose another --out, or delete that folder to start afresh"
            )
    write_atomic(path, json.dumps(now, indent=1))


def _brought_up(before: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A resolved recipe of an older version, the options added since at their defaults.

    These alone are known to have no say in what it began.
    """
    stages = [
        at_default(method) | stage if stage["by"] == spec.by else stage
        for stage, spec, method in zip(
            before["stage"], recipe.stage, recipe.methods(), strict=False
        )
    ]
    stages += before["stage"][len(stages) :]
    return before | {"stage": stages, "data": at_default(recipe.data) | before["data"]}


def _mark(stage: Path) -> str:
    """How far a stage came: "done", "begun", or "" where it left nothing."""
    if (stage / "outcome.json").exists():
        return "done"
    return "begun" if any(stage.glob("checkpoint*")) else ""


def _bound(resolved: dict[str, Any], marks: list[str]) -> dict[str, Any]:
    """What of a resolved recipe the marked stages were made from."""
    stages = [
        {k: v for k, v in stage.items() if mark == "done" or k not in STEERING}
        for stage, mark in zip(resolved["stage"], marks, strict=False)
        if mark
    ]
    return {k: resolved.get(k) for k in ("teacher", "base", "seed", "data")} | {"stage": stages}


def _changed(was: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Keys that differ, as ``--set`` takes them; "stage" where the methods are not the same."""
    same = [s["by"] for s in was["stage"]] == [s["by"] for s in here["stage"]]
    one, other = _flat(was, same), _flat(here, same)
    told = [key for key in one | other if one.get(key) != other.get(key)]
    return told + ["stage"] * (not same)


def _flat(bound: dict[str, Any], stages: bool) -> dict[str, list[Any]]:
    """Key -> its value, or its values where several stages have the same method."""
    tables = [("", bound), ("data.", bound["data"])]
    tables += [(f"{stage['by']}.", stage) for stage in bound["stage"]] if stages else []
    flat: dict[str, list[Any]] = {}
    for prefix, table in tables:
        for key in table:
            if key not in ("data", "stage"):
                flat.setdefault(prefix + key, []).append(table[key])
    return flat


def _write_manifest(
    recipe: Recipe,
    teacher: Path | None,
    base: Path | None,
    told: list[dict[str, Any]],
    captions: list[str],
    draft: Path,
) -> None:
    """Adds `edgeflash.json` to a finished student; folders that cannot sample get none."""
    index = json.loads((draft / INDEX).read_text())
    if not set(Student.unfinished(draft).family.folders) <= index.keys():
        return
    steps, default_steps, guidance = _sampling(recipe, base, draft)
    lineage = StudentLineage(
        teacher=folder_sha256(teacher) if teacher else None,
        recipe_sha256=recipe.sha256,
        stages=tuple(told),
        seconds=sum(stage["seconds"] for stage in told),
        tools={name: version(name) for name in ("edgeflash", "torch", "diffusers", "transformers")},
        weights_licence=recipe.licence,
        own_timesteps=_sampler(recipe)[0] or _own_timesteps(base),
    )
    write_manifest(
        draft,
        steps=steps,
        timesteps=(recipe.sampling and recipe.sampling.timesteps) or (),
        default_steps=default_steps,
        guidance=guidance,
        prompts=list(dict.fromkeys(captions))[:PROMPTS],
        floors=recipe.floors,
        lineage=lineage,
    )


def _own_timesteps(base: Path | None) -> str:
    """The method that had fitted the base to few timesteps, if any had."""
    manifest = Student.open(base).manifest if base else None
    return manifest.lineage.own_timesteps if manifest else ""


def _sampling(
    recipe: Recipe, base: Path | None, draft: Path
) -> tuple[Sequence[int], int, Guidance]:
    """Step counts, the usual one, and guidance.

    Where the recipe says nothing: the base's while its sampler stays, else the sampler's own.
    """
    student = Student.open(draft)
    if said := recipe.sampling:
        guidance = Guidance(
            kind=said.guidance, scale=said.guidance_scale, channels=fit.hears(student)
        )
        return said.steps, said.default_steps, guidance
    if base and (before := Student.open(base)).config("scheduler") == student.config("scheduler"):
        student = before
    counts, (_, runs) = student.step_counts(), _sampler(recipe)
    if runs:
        counts = tuple(n for n in counts if n in runs) or tuple(runs[:1])
    folded = any(method.folds_guidance() for method in recipe.methods())
    guidance = Guidance() if folded else fit.told(recipe, student, draft)
    return counts, student.default_steps(counts), guidance
