"""Timesteps that a person names: those that a published student was distilled for.

Not all are where a sampler of as many steps would stop: DMD2's one-step UNets (arXiv 2405.14867)
are asked at 399, of four steps at 999, 749, 499 and 249.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from edgeflash.errors import EdgeflashError
from edgeflash.schedule import Schedule, lower_schedule

if TYPE_CHECKING:
    from edgeflash.student import Student


def are_numbers(text: str) -> bool:
    """Whether this is a list of numbers, as in 999,749,499,249, and no name."""
    return re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text) is not None


def schedules(student: Student, text: str, steps: Sequence[int] | None) -> dict[int, Schedule]:
    """The student's sampler at these timesteps; at other counts of ``steps`` as it spaces them.

    Raises:
        EdgeflashError: timesteps that do not fall or that it does not know, or a sampler that takes
            none.
    """
    timesteps, name = [int(t) for t in text.split(",")], student.class_of("scheduler")[1]
    most = student.config("scheduler").get("num_train_timesteps") or 1000
    if not all(0 <= t < most for t in timesteps):
        raise EdgeflashError(f"--timesteps {text}: {name} has 0 to {most - 1}: choose among those")
    if any(t <= s for t, s in pairwise(timesteps)):
        raise EdgeflashError(f"--timesteps {text}: name the noisiest first, each of them once")
    try:
        table = lower_schedule(student.scheduler(), None, timesteps=timesteps)
    except EdgeflashError as error:
        raise EdgeflashError(f"--timesteps {text}: {student.folder}: {error}") from None
    others = [n for n in steps or () if n != len(timesteps)]
    return (student.schedules(others) if others else {}) | {len(timesteps): table}
