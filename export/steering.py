"""The denoiser in the recording loop, where a student has a ControlNet: that is asked before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeflash.conditions import example
from edgeflash.control import NAME, Controlled, edges_of

if TYPE_CHECKING:
    from .capture import Eager, Tape


def controlnet_of(tape: Tape) -> Eager | None:
    """The student's ControlNet, to be asked before its denoiser."""
    from .capture import Eager

    there = NAME in tape.student.family.components()
    return Eager(tape.load(NAME)) if there else None


def steered(
    denoiser: Eager, controlnet: Eager | None, number: int, size: tuple[int, int]
) -> Eager | Controlled:
    """The denoiser as the loop of a golden calls it: no picture is at hand, so of an example.

    Args:
        denoiser: by itself.
        controlnet: what sees the example's edges; None: there is none.
        number: chooses the example.
        size: (height, width) of the picture in px.
    """
    if controlnet is None:
        return denoiser
    picture, _ = example(number, size)
    shown = edges_of(picture).transpose(2, 0, 1)[None].astype(np.float32) / 255
    return Controlled(denoiser, controlnet, shown)
