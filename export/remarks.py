"""What an export says of what becomes of a student's sampler, prompts and pictures."""

from __future__ import annotations

from rich.console import Console

from edgeflash import align_your_steps, named_timesteps
from edgeflash.export_options import ExportOptions
from edgeflash.schedule import Schedule
from edgeflash.student import INSTEAD, Student
from edgeflash.tokenizer import read_tokenizer, unread

from .capture import Tape


def tell_changed(
    student: Student, options: ExportOptions, tables: dict[int, Schedule], console: Console
) -> None:
    """Says what becomes of the sampler and of prompts that no table or text encoder can hold."""
    _tell_sampler(student, options.timesteps, console)
    _tell_timesteps(student, tables, options.timesteps, console)
    family, folder = student.family, student.folder
    specs = [family.tokenizer(student, name) for name in family.text_encoders]
    tokenizers = [read_tokenizer(folder, spec) for spec in specs]
    for prompt in options.prompts:
        if cut := unread(tokenizers, prompt):
            console.print(f"a prompt is too long: not seen was {cut!r}", markup=False)


def _tell_sampler(student: Student, timesteps: str | None, console: Console) -> None:
    """Says where another sampler than the folder's stands in."""
    name = student.class_of("scheduler")[1]
    fitted = timesteps == align_your_steps.NAME
    if fitted and (other := align_your_steps.sampler(name)) != name:
        console.print(f"{name} is not for {timesteps}: sampled by {other} instead")
    elif not fitted and name in INSTEAD and (timesteps or not student.manifest):
        console.print(f"{name} needs four calls at once: sampled by {INSTEAD[name]} instead")


def _tell_timesteps(
    student: Student, tables: dict[int, Schedule], named: str | None, console: Console
) -> None:
    """Says which timesteps pipelines of others have to be told, of few-step samplers."""
    if named == align_your_steps.NAME or not (named or student.own_timesteps()):
        return
    for steps, times in named_timesteps.unusual(student, tables).items():
        told = ", ".join(f"{t:g}" for t in times)
        line = f"{steps} steps: stock pipelines stop elsewhere: tell diffusers' and optimum's"
        line += f" timesteps=[{told}]; GenAI and Apple's package take none"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def tell_losses(tape: Tape, console: Console) -> None:
    """Says what the merging of tokens costs, and what caching does."""
    told = {"merging": f"merging {tape.merge:.0%} of the tokens"}
    if tape.way:
        told["caching"] = tape.way.flag.removeprefix("--")
    for what, found_db in tape.loss_db.items():
        line = f"{told[what]}: the pictures are {min(found_db):.1f} dB from the student's own"
        console.print(line, highlight=False)
