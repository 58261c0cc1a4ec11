"""Timesteps named by number: those that a student was distilled for, or that suit it best.

Not all are where a sampler of as many steps would stop: DMD2's one-step UNets (arXiv 2405.14867)
are asked at 399, those of four steps at 999, 749, 499 and 249, where diffusers' own `LCMScheduler`
stops at 999, 759, 499 and 259. A pipeline of diffusers is told the same, ``timesteps=[399]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from edgeflash import noise_correction
from edgeflash.errors import EdgeflashError
from edgeflash.even_steps import MARK
from edgeflash.noise_correction import corrected
from edgeflash.schedule import Schedule, lower_schedule

if TYPE_CHECKING:
    from edgeflash.student import Student

FLAG = "--timesteps"


def are_numbers(text: str) -> bool:
    """Whether this is a list of numbers, as in 999,749,499,249, and no name."""
    return re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text) is not None


def schedules(student: Student, text: str, steps: Sequence[int] | None) -> dict[int, Schedule]:
    """The student's sampler at these timesteps; at other counts of ``steps`` as it spaces them."""
    timesteps = [int(t) for t in text.split(",")]
    others = [n for n in steps or () if n != len(timesteps)]
    usual = student.schedules(others) if others else {}
    return usual | {len(timesteps): table(student, timesteps, f"{FLAG} {text}")}


def table(student: Student, timesteps: Sequence[int], told: str) -> Schedule:
    """The student's sampler at these timesteps; ``told``: who asked.

    Raises:
        EdgeflashError: timesteps that do not fall or that it does not know, or a sampler that takes
            none.
    """
    from edgeflash.networks_sd import quiet

    check(student, timesteps, told)
    try:
        with quiet():  # it warns of any that it would not have chosen
            found = lower_schedule(student.scheduler(), None, timesteps=[*timesteps])
    except EdgeflashError as error:
        raise EdgeflashError(f"{told}: {student.folder}: {error}") from None
    return corrected(found) if student.config("scheduler").get(noise_correction.MARK) else found


def check(student: Student, timesteps: Sequence[int], told: str) -> None:
    """Raises where timesteps do not fall, or its noise has none of that number, or is a flow's."""
    name, config = student.class_of("scheduler")[1], student.config("scheduler")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        raise EdgeflashError(f"{told}: a flow's steps are told by their noise: leave them out")
    most = config.get("num_train_timesteps") or 1000  # as usual
    if not all(0 <= t < most for t in timesteps):
        raise EdgeflashError(f"{told}: {name} has 0 to {most - 1}: choose among those")
    if any(t <= s for t, s in pairwise(timesteps)):
        raise EdgeflashError(f"{told}: name the noisiest first, each of them once")


def unusual(student: Student, tables: dict[int, Schedule]) -> dict[int, list[float]]:
    """Timesteps of those tables whose sampler would stop at others in diffusers' pipelines.

    Of samplers of flows nothing is told: they are told sigmas (`edgeflash.even_steps`).
    """
    if student.config("scheduler").get(MARK):
        return {}
    scheduler, found = student.scheduler(), {}
    for steps, own in tables.items():
        times = [step.t for step in own.steps]
        try:
            scheduler.set_timesteps(steps)
            usual = [float(t) for t in scheduler.timesteps]
        except ValueError:  # so many are beyond it
            usual = []
        if times != usual:
            found[steps] = times
    return found
