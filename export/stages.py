"""The two stages of a component: what it does in the student's own loop, and its lowered files.

Each is made from what it depends on alone, so that a changed option redoes no more than it shapes:
what was recorded does not depend on a precision, nor the lowered text encoder on the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflash.bundle import Component, File, Tokenizer
from edgeflash.caching import whole_name
from edgeflash.control import ADAPTER
from edgeflash.roles import Target
from edgeflash.shelf import target_name
from edgeflash.student import Student

from . import recorded
from .capture import Captured, Sample, Tape
from .hashing import Hashes, homes_of
from .journal import Inputs, Outcome, Stage

Tell = Callable[[str], AbstractContextManager[None]]  # shows a stage while it runs


@dataclass(frozen=True)
class Run:
    """Where the stages of an export lie, and what all of them are made from.

    Attributes:
        folder: of the stages.
        hashes: of the student's files, being computed.
        loras: sha256 of each fused LoRA -> its scale.
        tools: package -> version, and the hash of edgeflash's code; see `pack.made_by`.
    """

    folder: Path
    hashes: Hashes
    loras: dict[str, float]
    tools: dict[str, str]


def record_stage(tape: Tape, name: str, run: Run, before: str) -> Stage:
    """What a component does in every prompt; ``before``: hash of what was recorded before it."""

    def inputs() -> Inputs:
        asked: Inputs = {"before": before, "prompts": [*tape.prompts]} | _made_from(tape, name, run)
        if name in tape.student.family.text_encoders:
            none = tape.student.family.no_prompt(tape.student)
            asked |= {"heard": sorted(tape.heard), "none": none}
        elif _is_denoiser(name):
            sampler = tape.sampler
            asked |= {
                "schedule": sampler.schedule.model_dump(mode="json"),
                "guidance": sampler.guidance.model_dump(mode="json"),
                "shape": [*sampler.shape],
                "size": [*tape.size],
                "times": [*tape.times],
            }
            asked |= {} if tape.proved is None else {"proved": tape.proved}
        elif name == "vae_decoder":
            asked |= {"latent": tape.latent.model_dump(mode="json")}
        if tape.target.learns:
            asked |= {"target": _asked_of(tape.target, name)}
        return asked

    return Stage(run.folder, f"record-{name}", inputs)


def lower_stage(tape: Tape, name: str, run: Run, calls: Outcome | None) -> Stage:
    """A component's files; ``calls``: what was recorded of it; None where that does not matter."""

    def inputs() -> Inputs:
        asked = _made_from(tape, name, run) | {"target": _asked_of(tape.target, name)}
        if _needs_calls(tape.target, name):
            assert calls is not None, name
            held_out = tape.held_out if tape.target.calibrates(name) else 0
            asked |= {"calls": calls.sha256, "held_out": held_out}
        return asked

    return Stage(run.folder, f"lower-{name}", inputs)


def _needs_calls(target: Target, name: str) -> bool:
    """Whether what a component is lowered to depends on what is recorded."""
    return target.calibrates(name) or target.scans(name) or target.learns


def _asked_of(target: Target, name: str) -> Inputs:
    return {"to": target_name(target)} | target.shaped_by(name)


def _made_from(tape: Tape, name: str, run: Run) -> Inputs:
    """What a component is as torch runs it."""
    student, (takes, gives) = tape.student, tape.signature(whole_name(name))
    homes = homes_of(student, name)
    found: Inputs = {
        "files": run.hashes.of(homes),
        "class": student.class_of(homes[0]),
        "loras": run.loras,
        "takes": [spec.model_dump(mode="json") for spec in takes],
        "gives": [spec.model_dump(mode="json") for spec in gives],
        "tools": run.tools,
    }
    if _is_denoiser(name):
        found |= {
            "timestep": tape.timestep,
            "merge": tape.merge,
            "way": tape.way and tape.way.cuts,
        }
    return found


def _is_denoiser(name: str) -> bool:
    return not name.startswith(("text_encoder", "vae_", ADAPTER))


def make_component(
    tape: Tape,
    name: str,
    run: Run,
    before: str,
    tell: Tell,
    done: Callable[[Outcome], object] = lambda calls: None,
) -> tuple[Outcome, Outcome]:
    """Both stages of a component, as far as they are not there yet; winds the tape on.

    Returns what was recorded, of which ``done`` is told at once, and the lowered files.
    """
    record = record_stage(tape, name, run, before)
    samples: tuple[Sample, ...] = ()
    calls = record.outcome()
    lowered = lower_stage(tape, name, run, calls).outcome() if calls else None
    kept = [calls] if calls and (lowered or not tape.target.learns) else []
    if kept:
        samples = recorded.take_up(tape, name, record.folder)
        done(kept[0])
    if lowered:
        with tell(f"{name} taken up"):
            return kept[0], lowered

    def keep(samples: tuple[Sample, ...]) -> None:
        recorded.save(tape, name, samples, record.begin())
        kept.append(record.finish())
        done(kept[0])

    if not calls and not _needs_calls(tape.target, name):
        if lowered := lower_stage(tape, name, run, None).outcome():  # of another sampler
            with tell(f"record {name}"):
                keep(tape.record(name)[1])
            return kept[0], lowered
    with tell(f"capture {name}"):
        if kept:
            captured = tape.captured(tape.load(name), samples)
        else:
            captured = tape.capture(name, keep)
    stage = lower_stage(tape, name, run, kept[0])
    with tell(f"lower {name} to {tape.target.precision_of(name)}"):
        return kept[0], _lower(captured, tape, stage)


def captured_again(tape: Tape, name: str, run: Run) -> Captured:
    """A finished component as a program, without its loop: its calls were recorded."""
    if tape.target.learns:  # its network notes what it needs as it runs
        return tape.capture(name)
    samples = recorded.take_up(tape, name, run.folder / f"record-{name}")
    return tape.captured(tape.load(name), samples)


def _lower(captured: Captured, tape: Tape, stage: Stage) -> Outcome:
    target, folder = tape.target, stage.begin()
    files = [path.relative_to(folder).as_posix() for path in target.lower(captured, folder)]
    component = Component(
        name=captured.component,
        target=target_name(target),
        precision=target.precision_of(captured.component),
        files=(),
        inputs=captured.inputs,
        outputs=captured.outputs,
        engine=target.engine_of(captured.component),
        tokenizer=_own_tokenizer(tape.student, captured.component),
    )
    return stage.finish(component=component.model_dump(mode="json"), files=files)


def component_of(lowered: Outcome) -> Component:
    """What the manifest says of it."""
    files: dict[str, File] = {file.path: file for file in lowered.files}
    told: dict[str, Any] = lowered.told["component"]
    listed = tuple(files[path] for path in lowered.told["files"])
    return Component.model_validate(told).model_copy(update={"files": listed})


def _own_tokenizer(student: Student, component: str) -> Tokenizer | None:
    """Of a text encoder that does not share the first one's."""
    _, *others = student.family.text_encoders
    return student.family.tokenizer(student, component) if component in others else None
