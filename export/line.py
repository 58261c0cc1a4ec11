"""The whole way from a student folder to a bundle: capture, lower, pack, verify.

Finished stages are kept beside the bundle in the making (`journal.py`), for the same command to go
on with. The bundle takes its place only when it has passed the ladder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edgeflash import control
from edgeflash.blame import blamed, floor_db
from edgeflash.bundle import (
    CACHED_VERSION,
    CONDITIONED_VERSION,
    CONTROLLED_VERSION,
    Bundle,
    Figure,
    Image,
    Manifest,
    Merging,
)
from edgeflash.caching import cached_name
from edgeflash.complaint import wrong_types
from edgeflash.disk import check_replaceable, fresh_folder
from edgeflash.errors import EdgeflashError
from edgeflash.export_options import AS_USUAL, ExportOptions
from edgeflash.families import tokenizer_of
from edgeflash.floors import check_floors
from edgeflash.golden import Sampler, times_to_sweep
from edgeflash.networks_sd import quiet, without_weights
from edgeflash.no_memory import memory_named
from edgeflash.roles import Runtime, Target
from edgeflash.schedule import Schedule
from edgeflash.shelf import target_name
from edgeflash.student import Student, sha256_of_all
from edgeflash.verify import refuse_below, verify

from . import hashing, memory, pack
from .apart import request_of
from .caching import Way, check_rows, rows_of
from .capture import Tape
from .components import make_all, unfinished
from .hashing import homes_of
from .journal import DRAFT, Outcome, Stage, drop_others, run_folder
from .merging import MOST
from .nursery import Nursery
from .progress import Rates, Stages
from .remarks import tell_changed, tell_losses
from .stages import Run, captured_again, component_of
from .ways import way_of

PROMPTS = (  # for students that bring none of their own
    "a photo of a red car on a mountain road",
    "portrait of an old man with a white beard, oil painting",
    "a cat sleeping on a blue sofa",
    "a bowl of fruit on a wooden table, studio light",
    "city skyline at night, reflections on the water",
    "a small house in a snowy forest",
    "close-up of a yellow flower with dew drops",
    "an astronaut riding a horse on the moon, digital art",
)


def export_student(
    student: Student,
    target: Target,
    out: Path,
    options: ExportOptions = AS_USUAL,
    *,
    console: Console | None = None,
    lasting: bool = True,
    nursery: Nursery | None = None,
) -> Bundle:
    """Writes a bundle, and puts it in its place when it has passed the parity ladder.

    Args:
        student: what to export.
        target: what to lower it to.
        out: folder of the bundle; replaced when it exists.
        options: what else is asked for.
        console: where progress is told; None: the terminal's standard error.
        lasting: whether ``out`` lies where its stages stay for the next command; see `run_folder`.
        nursery: where processes of large components begin; None: each imports all anew.

    Raises:
        EdgeflashError: options that do not fit the student, a failed rung, or an interruption.
    """
    console = console or Console(stderr=True)
    _check_target(target, student, options)
    prover = target.prover()
    unproven = prover.unproven or None
    check_floors(options.floors)
    check_replaceable(out, student.folder, kind="bundle")
    plan = _upcast(planned(student, target, options), console)
    target = plan.tape.target
    tell_changed(student, options, plan.schedules, console)
    if any(map(target.calibrates, plan.components)) and not plan.tape.held_out:
        console.print("one prompt: proved on what it is calibrated on; --prompt takes more")
    stages = Stages(console, _rates(plan, target))
    with (
        run_folder(out, lasting=lasting) as folder,
        ThreadPoolExecutor(1) as pool,
        stages.showing(),
    ):
        homes = [homes_of(student, name) for name in plan.components]
        hashes = hashing.begin(student.folder, homes, pool)
        run = Run(folder, hashes, student.lora_scales(), pack.made_by(student, target))
        request = request_of(student, target, options, folder)
        large = memory.large(student, plan.components)
        left = unfinished(plan.tape, plan.components, run)
        at_once = memory.check(student, target, left, console)
        if "vae_decoder" in left:
            memory.check_size(student, plan.tape.size)
        if left:
            memory.check_running(student, target, plan.components, plan.tape.size, console)
        work = (plan.tape, plan.components, run, request, large, at_once, stages, nursery)
        lowered = make_all(*work)
        tell_losses(plan.tape, console)
        made = [folder / f"lower-{name}" for name in plan.components]
        with fresh_folder(out, folder / DRAFT) as draft, pack.lent(made, lowered, draft):
            with stages.told("pack"):
                pack.gather(made, lowered, draft, lasting=lasting)
                manifest = _pack(plan, target, lowered, run, draft, console)
            on = "a stand-in" if unproven else target.runtime
            with stages.told(f"verify on {on}"), memory_named("the ladder", memory.LESS_PX):
                figures = _proved(Bundle(draft, manifest), prover, plan, options, run)
            proof = {"parity": figures, "unproven": unproven}
            pack.write_manifest(manifest.model_copy(update=proof), draft)
            kept = f"finished stages are kept in {folder}" if lasting else "nothing was written"
            _refuse(figures, plan, run, draft, out, kept)
        drop_others(folder, plan.components)
    if unproven:
        console.print(unproven, markup=False, highlight=False)
    return Bundle.open(out, check="size")


def _rates(plan: _Plan, target: Target) -> Rates:
    """How long its stages took the last time, for the work of this one."""
    tape = plan.tape
    numbers = {name: memory.numbers_of(plan.student, name) for name in plan.components}
    pictures = len(tape.prompts) * len(tape.sampler.schedule.steps)
    return Rates(target_name(target), numbers, math.prod(tape.size) * pictures)


def _check_target(target: Target, student: Student, options: ExportOptions) -> None:
    """Raises what keeps a target from lowering that."""
    _check_family(student, target)
    target.check()
    target.check_student(student)
    steering = student.family.steering
    why = target.refuse_control() if steering == control.NAME else ""
    if steering == control.ADAPTER or student.family.conditions(student):
        why = why or target.refuse_conditions()
    if why:
        raise EdgeflashError(
            f"{student.folder}: its {student.family.denoiser} sees a picture beside x_t, and "
            f"--to {target_name(target)} {why}: choose another target, or other options"
        )
    if way := way_of(options):
        _check_caching(target, student, way)
    merge_tokens = options.merge_tokens
    if not 0 <= merge_tokens <= MOST:
        raise EdgeflashError(f"--merge-tokens {merge_tokens:g}: give a share from 0 to {MOST}")
    if merge_tokens and student.family.denoiser != "unet":
        raise EdgeflashError(
            f"--merge-tokens: merges those of UNets alone so far, and {student.folder} has a "
            f"{student.family.denoiser}: leave it out"
        )
    if merge_tokens and not target.picks:
        raise EdgeflashError(
            f"--merge-tokens: --to {target_name(target)} cannot lower it so far: "
            "leave one of them out"
        )


def _check_caching(target: Target, student: Student, way: Way) -> None:
    if student.family.denoiser != "unet":
        raise EdgeflashError(
            f"{way.flag}: cuts UNets alone so far, and {student.folder} has a "
            f"{student.family.denoiser}: leave it out"
        )
    if steering := student.family.steering:
        raise EdgeflashError(
            f"{way.flag}: cuts no UNets that a {control.CALLED[steering]} steers so far, as that "
            f"of {student.folder}: leave it out"
        )
    if why := target.refuse_caching():
        raise EdgeflashError(f"{way.flag}: --to {target_name(target)} {why}: leave one of them out")
    with torch.device("meta"), quiet():
        way.check(without_weights(student, "unet"))


def _check_family(student: Student, target: Target) -> None:
    name = student.family.name
    can = target.families()
    if can and name not in can:
        raise EdgeflashError(
            f"{student.folder}: is of the family {name!r}, but --to {target_name(target)} as "
            f"asked takes {', '.join(can)} alone so far: choose another target, or other options"
        )


@dataclass(frozen=True)
class _Plan:
    """What was asked for, with the student's own settings filled in."""

    student: Student
    components: tuple[str, ...]
    schedules: dict[int, Schedule]
    default_steps: int
    tape: Tape
    goldens: int  # prompts that ship as such
    climbed: int  # prompts that the ladder is climbed on here


def _upcast(plan: _Plan, console: Console) -> _Plan:
    """Leaves the autoencoder in float32 where the student's pipeline does, and says so."""
    student, target = plan.student, plan.tape.target
    target.check_components(plan.components)
    own = [name for name in plan.components if name.startswith("vae_")]
    if not student.family.upcasts(student) or (wider := target.wider(own)) == target:
        return plan
    console.print("the VAE says force_upcast: it stays in fp32, as in diffusers' pipeline")
    return replace(plan, tape=replace(plan.tape, target=wider))


def rehearsal(student: Student, target: Target, options: ExportOptions = AS_USUAL) -> Tape:
    """The tape of such an export, with all prompts on it, and nothing recorded yet.

    Raises:
        EdgeflashError: options that do not fit the student, or a denoiser in two graphs.
    """
    if way := way_of(options):
        raise EdgeflashError(f"{way.flag}: plans are of whole denoisers so far: leave it out")
    if steering := student.family.steering:
        name = control.CALLED[steering]
        raise EdgeflashError(f"{student.folder}: no plans are searched with a {name} so far")
    plan = planned(student, target, options)
    return replace(plan.tape, prompts=_prompts(student, options.prompts))


def _prompts(student: Student, given: Sequence[str]) -> tuple[str, ...]:
    own = student.manifest.prompts if student.manifest else ()
    return tuple(given) or own or PROMPTS


def planned(student: Student, target: Target, options: ExportOptions) -> _Plan:
    """What an export of these will make, its tape at the beginning.

    Raises:
        EdgeflashError: options that do not fit the student.
    """
    family = student.family
    schedules = student.schedules(options.steps, options.timesteps)
    guidance = options.guidance or student.guidance()
    family.check_guidance(student, guidance)
    default_steps = student.default_steps(schedules)
    height, width = size = options.size or family.size(student)
    encoder = options.image_to_image or bool(family.conditions(student))
    components = family.components(encoder=encoder)
    with wrong_types(student.folder):
        for name in components:
            family.signature(student, name, size)
    space = family.latent(student)
    if way := way_of(options):
        check_rows(way, schedules[default_steps])
        schedules = {n: rows_of(way, table) for n, table in schedules.items()}
        at = components.index(family.denoiser) + 1
        components = (*components[:at], cached_name(family.denoiser), *components[at:])
    shape = (1, space.channels, height // space.downsampling, width // space.downsampling)
    times = {step.t for schedule in schedules.values() for step in schedule.steps}
    prompts = _prompts(student, options.prompts)
    whole = not any(t % 1 for t in times)
    sampler = Sampler(schedules[default_steps], guidance, shape, bool(way and way.gated))
    calibrates = any(target.calibrates(name) for name in components)
    most = max(1, len(prompts) // 2) if calibrates else len(prompts)  # ranges want others
    goldens = min(pack.most_goldens(student, sampler), most)
    every, small = options.record_all or calibrates, pack.climbs_all(student, sampler)
    tape = Tape(
        student,
        target,
        sampler,
        prompts if every or small else prompts[:goldens],
        size,
        timestep=times.pop() if options.fold_timestep and len(times) == 1 else None,
        whole=whole,
        merge=options.merge_tokens,
        way=way,
        times=times_to_sweep(schedules.values(), schedules[default_steps]),
        held_out=goldens if calibrates and len(prompts) > 1 else 0,
        proved=None if small or not every else goldens,
    )
    climbed = len(prompts) if small else goldens
    return _Plan(student, components, schedules, default_steps, tape, goldens, climbed)


def _pack(
    plan: _Plan, target: Target, lowered: list[Outcome], run: Run, draft: Path, console: Console
) -> Manifest:
    student, family, tape = plan.student, plan.student.family, plan.tape
    components = tuple(map(component_of, lowered))
    for name in map(tokenizer_of, family.text_encoders):
        pack.copy_tokenizer(student.folder / name, draft / name)
    if remark := target.furnish(student, components, draft):
        console.print(remark, markup=False)
    networks_bytes = sum(file.bytes for each in components for file in each.files)
    goldens = pack.write_goldens(tape, plan.goldens, draft, networks_bytes)
    sha256 = sha256_of_all(run.hashes.all())
    loss_db = {what: round(min(found), 2) for what, found in tape.loss_db.items()}
    conditions = family.conditions(student)
    usual = CONTROLLED_VERSION if family.steering else CACHED_VERSION if tape.way else 1
    manifest = Manifest(
        format_version=CONDITIONED_VERSION if conditions else usual,
        family=family.name,
        name=student.folder.resolve().name,
        components=components,
        tokenizer=family.tokenizer(student),
        latent=tape.latent,
        image=Image(height=tape.size[0], width=tape.size[1]),
        schedules=plan.schedules,
        default_steps=plan.default_steps,
        guidance=tape.sampler.guidance,
        conditions=conditions,
        no_prompt=family.no_prompt(student),
        goldens=goldens,
        files=pack.other_files(draft, [f for c in components for f in c.files]),
        lineage=pack.lineage(student, sha256, target.needs),
        merging=Merging(share=tape.merge, image_psnr_db=loss_db["merging"]) if tape.merge else None,
        caching=tape.way.told(loss_db["caching"]) if tape.way else None,
    )
    return manifest.model_copy(update={"fused": target.fuse(Bundle(draft, manifest))})


def _proved(
    bundle: Bundle, prover: Runtime, plan: _Plan, options: ExportOptions, run: Run
) -> tuple[Figure, ...]:
    """The ladder's figures; what was proved of the same files is not proved again."""
    floors, tape = (options.floors, plan.student.floors), plan.tape
    unshipped = range(len(bundle.manifest.goldens), plan.climbed)

    def inputs() -> dict[str, Any]:
        manifest = hashlib.sha256(bundle.manifest.model_dump_json().encode()).hexdigest()
        on = [type(prover).__name__, prover.model_dump(mode="json")]
        prompts = [tape.prompts[number] for number in unshipped]
        asked = {"manifest": manifest, "on": on, "prompts": prompts}
        return asked | {"floors": floors, "tools": run.tools}

    stage = Stage(run.folder, "verify", inputs)
    if found := stage.outcome():
        return tuple(map(Figure.model_validate, found.told["figures"]))
    beside = [pack.golden_of(tape, number) for number in unshipped]
    figures = verify(bundle, prover, floors[0], usual=floors[1], beside=beside)
    if all(figure.passed for figure in figures):
        stage.begin()
        stage.finish(figures=[figure.model_dump(mode="json") for figure in figures])
    return figures


def _refuse(
    figures: tuple[Figure, ...], plan: _Plan, run: Run, draft: Path, out: Path, kept: str
) -> None:
    """Raises when a rung is missed; tells where it begins, if the target knows."""
    try:
        refuse_below(figures, out)
    except EdgeflashError as error:
        name = blamed(figures, denoiser := plan.tape.student.family.denoiser)
        astray = ""
        if name in plan.components:
            again = partial(captured_again, plan.tape, name, run)
            least_db = floor_db(figures, name, denoiser)
            astray = plan.tape.target.diverged(name, again, draft, least_db)
        hint = f"; first astray: {astray}" if astray else ""
        raise EdgeflashError(f"{error}{hint}; {kept}") from None
