"""The whole way from a student folder to a bundle: capture, lower, pack, verify.

One network is in memory at a time. The bundle takes its place only when it has passed the ladder.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from edgeflash import align_your_steps
from edgeflash.bundle import (
    CACHED_VERSION,
    Bundle,
    Component,
    Figure,
    File,
    Image,
    Manifest,
    Merging,
    Tokenizer,
    describe_file,
)
from edgeflash.caching import cached_name
from edgeflash.disk import check_replaceable, fresh_folder
from edgeflash.errors import EdgeflashError, Stopped
from edgeflash.families import tokenizer_of
from edgeflash.golden import Sampler
from edgeflash.roles import Target
from edgeflash.schedule import Guidance, Schedule
from edgeflash.student import INSTEAD, Student, folder_sha256
from edgeflash.tokenizer import read_tokenizer
from edgeflash.verify import check_floors, refuse_below, verify

from . import pack
from .caching import Way, check_rows, rows_of
from .capture import Captured, Tape
from .merging import MOST

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
GOLDENS = 3  # prompts that ship as goldens
BIG_BYTES = 256 * 2**20  # denoisers of that size take seconds a call: one golden


def export_student(
    student: Student,
    target: Target,
    out: Path,
    *,
    steps: Sequence[int] | None = None,
    timesteps: str | None = None,
    guidance: Guidance | None = None,
    prompts: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    image_to_image: bool = False,
    fold_timestep: bool = True,
    merge_tokens: float = 0.0,
    way: Way | None = None,
    floors: Mapping[str, float] | None = None,
    console: Console | None = None,
) -> Bundle:
    """Writes a bundle, and puts it in its place when it has passed the parity ladder.

    Args:
        student: what to export.
        target: what to lower it to.
        out: folder of the bundle; replaced when it exists.
        steps: step counts to ship schedules for; None: those the student was made for.
        timesteps: "align-your-steps"; None: as the student's sampler spaces them.
        guidance: how the prompt steers; None: as the student says.
        prompts: recorded for calibration and parity; the first ones ship as goldens. Empty: the
            student's own, or some of all kinds.
        size: (height, width) of the images in px; None: what the denoiser was made for.
        image_to_image: also export the encoder.
        fold_timestep: where all schedules have one and the same timestep, make it a constant; stock
            pipelines of optimum and OpenVINO GenAI want it as an input.
        merge_tokens: share of the denoiser's tokens to merge, up to 0.75. The ladder then holds
            the bundle against the student with this merging in torch.
        way: how to leave some of the denoiser out at some steps; held against the same in torch.
        floors: of the ladder, instead of the defaults; see `edgeflash.verify`.
        console: where progress is told; None: the terminal's standard error.

    Raises:
        EdgeflashError: options that do not fit the student, a failed rung, or an interruption.
    """
    console = console or Console(stderr=True)
    _check_target(target, student, merge_tokens, way)
    prover = target.prover()
    unproven = prover.unproven or None
    check_floors(floors or {})
    check_replaceable(out, student.folder, kind="bundle")
    plan = _plan(
        student,
        target,
        student.schedules(steps, timesteps),
        guidance,
        prompts,
        size,
        image_to_image=image_to_image,
        fold_timestep=fold_timestep,
        merge_tokens=merge_tokens,
        way=way,
    )
    _tell_changed(student, timesteps, prompts, console)
    try:
        with fresh_folder(out) as draft, ThreadPoolExecutor(1) as hashing:
            student_sha256 = hashing.submit(folder_sha256, student.folder)
            pieces = [*_lowered(plan, target, draft, hashing, console)]
            _tell_losses(plan.tape, console)
            with _told(console, "pack"):
                sha256 = student_sha256.result()
                manifest = _pack(plan, target, pieces, sha256, draft, console)
            with _told(console, "verify on " + ("a stand-in" if unproven else target.runtime)):
                figures = verify(Bundle(draft, manifest), prover, floors)
                told = {"parity": figures, "unproven": unproven}
                pack.write_manifest(manifest.model_copy(update=told), draft)
            _refuse(figures, plan, target, draft, out)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted: {out} was not written; run the same command again") from None
    if unproven:
        console.print(unproven, markup=False, highlight=False)
    return Bundle.open(out)


def _check_target(target: Target, student: Student, merge_tokens: float, way: Way | None) -> None:
    """Raises what keeps a target from lowering that."""
    _check_family(student, target)
    target.check()
    if way and (why := target.refuse_caching()):
        raise EdgeflashError(f"{way.flag}: --to {_name(target)} {why}: leave one of them out")
    if not 0 <= merge_tokens <= MOST:
        raise EdgeflashError(f"--merge-tokens {merge_tokens:g}: give a share of at most {MOST}")
    if merge_tokens and not target.picks:
        raise EdgeflashError(
            f"--merge-tokens: --to {_name(target)} cannot lower it so far: leave one of them out"
        )


def _check_family(student: Student, target: Target) -> None:
    name = student.family.name
    can = target.families()
    if can and name not in can:
        raise EdgeflashError(
            f"{student.folder}: is of the family {name!r}, but --to {_name(target)} as "
            f"asked takes {', '.join(can)} alone so far: choose another target, or other options"
        )


def _name(target: Target) -> str:
    return type(target).__module__.rpartition(".to_")[2]


@dataclass(frozen=True)
class _Plan:
    """What was asked for, with the student's own settings filled in."""

    student: Student
    components: tuple[str, ...]
    schedules: dict[int, Schedule]
    default_steps: int
    tape: Tape
    goldens: int


@dataclass(frozen=True)
class _Piece:
    """A lowered component, its files being hashed."""

    captured_as: Component
    files: Future[tuple[File, ...]]


def rehearsal(
    student: Student,
    target: Target,
    *,
    steps: Sequence[int] | None = None,
    guidance: Guidance | None = None,
    prompts: Sequence[str] = (),
    size: tuple[int, int] | None = None,
) -> Tape:
    """The tape of such an export, with all prompts on it, and nothing recorded yet."""
    plan = _plan(
        student,
        target,
        student.schedules(steps),
        guidance,
        prompts,
        size,
        image_to_image=False,
        fold_timestep=True,
        merge_tokens=0.0,
        way=None,
    )
    return replace(plan.tape, prompts=_prompts(student, prompts))


def _prompts(student: Student, given: Sequence[str]) -> tuple[str, ...]:
    own = student.manifest.prompts if student.manifest else ()
    return tuple(given) or own or PROMPTS


def _plan(
    student: Student,
    target: Target,
    schedules: dict[int, Schedule],
    guidance: Guidance | None,
    prompts: Sequence[str],
    size: tuple[int, int] | None,
    *,
    image_to_image: bool,
    fold_timestep: bool,
    merge_tokens: float,
    way: Way | None,
) -> _Plan:
    family = student.family
    guidance = guidance or student.guidance()
    family.check_guidance(student, guidance)
    default_steps = student.default_steps(schedules)
    height, width = size = size or family.size(student)
    components = family.components(encoder=image_to_image)
    for name in components:
        family.signature(student, name, size)
    space = family.latent(student)
    if way:
        check_rows(way, schedules[default_steps])
        schedules = {n: rows_of(way, table) for n, table in schedules.items()}
        at = components.index("unet") + 1
        components = (*components[:at], cached_name("unet"), *components[at:])
    shape = (1, space.channels, height // space.downsampling, width // space.downsampling)
    times = {step.t for schedule in schedules.values() for step in schedule.steps}
    prompts = _prompts(student, prompts)
    whole = not any(t % 1 for t in times)
    big = sum(p.stat().st_size for p in student.weights("unet").files) > BIG_BYTES
    goldens = min(1 if big else GOLDENS, len(prompts))
    calibrates = any(target.calibrates(name) for name in components)
    tape = Tape(
        student,
        target,
        Sampler(schedules[default_steps], guidance, shape, bool(way and way.gated)),
        prompts if calibrates else prompts[:goldens],
        size,
        timestep=times.pop() if fold_timestep and len(times) == 1 else None,
        whole=whole,
        merge=merge_tokens,
        way=way,
    )
    return _Plan(student, components, schedules, default_steps, tape, goldens)


def _tell_changed(
    student: Student, timesteps: str | None, prompts: Sequence[str], console: Console
) -> None:
    """Says what becomes of the sampler and of prompts that no table or text encoder can hold."""
    _tell_sampler(student, timesteps, console)
    tokenize = read_tokenizer(student.folder, student.family.tokenizer(student))
    for prompt in prompts:
        if cut := tokenize(prompt).cut:
            console.print(f"a prompt is too long: not seen was {cut!r}", markup=False)


def _tell_sampler(student: Student, timesteps: str | None, console: Console) -> None:
    """Says where another sampler than the folder's stands in."""
    name = student.class_of("scheduler")[1]
    if timesteps and (other := align_your_steps.sampler(name)) != name:
        console.print(f"{name} is not for {timesteps}: sampled by {other} instead")
    elif not timesteps and name in INSTEAD and not student.manifest:
        console.print(f"{name} needs four calls at once: sampled by {INSTEAD[name]} instead")


def _tell_losses(tape: Tape, console: Console) -> None:
    """Says what the merging of tokens costs, and what caching does."""
    told = {"merging": f"merging {tape.merge:.0%} of the tokens"}
    if tape.way:
        told["caching"] = tape.way.flag.removeprefix("--")
    for what, found_db in tape.loss_db.items():
        line = f"{told[what]}: the pictures are {min(found_db):.1f} dB from the student's own"
        console.print(line, highlight=False)


def _lowered(
    plan: _Plan, target: Target, draft: Path, hashing: ThreadPoolExecutor, console: Console
) -> Iterator[_Piece]:
    """Every component in turn, captured and lowered."""
    for name in plan.components:
        with _told(console, f"capture {name}"):
            captured = plan.tape.capture(name)
        with _told(console, f"lower {name} to {target.precision_of(name)}"):
            piece = _lower(captured, target, plan.student, draft, hashing)
        del captured
        gc.collect()
        yield piece


def _lower(
    captured: Captured, target: Target, student: Student, draft: Path, hashing: ThreadPoolExecutor
) -> _Piece:
    files = target.lower(captured, draft)
    paths = [path.relative_to(draft).as_posix() for path in files]
    described = hashing.submit(lambda: tuple(describe_file(draft, path) for path in paths))
    component = Component(
        name=captured.component,
        target=_name(target),
        precision=target.precision_of(captured.component),
        files=(),
        inputs=captured.inputs,
        outputs=captured.outputs,
        engine=target.engine_of(captured.component),
        tokenizer=_own_tokenizer(student, captured.component),
    )
    return _Piece(component, described)


def _own_tokenizer(student: Student, component: str) -> Tokenizer | None:
    """Of a text encoder that does not share the first one's."""
    _, *others = student.family.text_encoders
    return student.family.tokenizer(student, component) if component in others else None


def _pack(
    plan: _Plan,
    target: Target,
    pieces: list[_Piece],
    student_sha256: str,
    draft: Path,
    console: Console,
) -> Manifest:
    student, family, tape = plan.student, plan.student.family, plan.tape
    components = tuple(
        piece.captured_as.model_copy(update={"files": piece.files.result()}) for piece in pieces
    )
    for name in map(tokenizer_of, family.text_encoders):
        pack.copy_tokenizer(student.folder / name, draft / name)
    if told := target.furnish(student, draft):
        console.print(told, markup=False)
    goldens = pack.write_goldens(tape, plan.goldens, draft)
    loss_db = {what: round(min(found), 2) for what, found in tape.loss_db.items()}
    manifest = Manifest(
        format_version=CACHED_VERSION if tape.way else 1,
        family=family.name,
        name=student.folder.resolve().name,
        components=components,
        tokenizer=family.tokenizer(student),
        latent=tape.latent,
        image=Image(height=tape.size[0], width=tape.size[1]),
        schedules=plan.schedules,
        default_steps=plan.default_steps,
        guidance=tape.sampler.guidance,
        no_prompt=family.no_prompt(student),
        goldens=goldens,
        files=pack.other_files(draft, [f for c in components for f in c.files]),
        lineage=pack.lineage(student, student_sha256, target.needs),
        merging=Merging(share=tape.merge, image_psnr_db=loss_db["merging"]) if tape.merge else None,
        caching=tape.way.told(loss_db["caching"]) if tape.way else None,
    )
    return manifest.model_copy(update={"fused": target.fuse(Bundle(draft, manifest))})


def _refuse(
    figures: tuple[Figure, ...], plan: _Plan, target: Target, draft: Path, out: Path
) -> None:
    """Raises when a rung is missed; tells where it begins, if the target knows."""
    try:
        refuse_below(figures, out)
    except EdgeflashError as error:
        figure = next(f for f in sorted(figures, key=lambda f: f.rung) if not f.passed)
        name = figure.component if figure.component in plan.components else "unet"
        astray = target.diverged(plan.tape.capture(name), draft)
        hint = f"; first astray: {astray}" if astray else ""
        raise EdgeflashError(f"{error}{hint}; nothing was written") from None


@contextmanager
def _told(console: Console, stage: str) -> Iterator[None]:
    """Shows a stage while it runs, and how long it took when it is done."""
    start = time.perf_counter()
    with console.status(stage):
        yield
    console.print(f"{stage:<36} {time.perf_counter() - start:7.1f} s", highlight=False)
