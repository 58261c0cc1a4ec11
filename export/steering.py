"""What a student's denoiser is shown as its calls are recorded: examples, no picture is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeflash.conditions import beside, example
from edgeflash.control import NAME, PICTURE, Array, Controlled, edges_of

if TYPE_CHECKING:
    from .capture import Eager, Tape


def look(tape: Tape, adapter: Eager) -> None:
    """Asks an adapter of every golden's picture, once: its maps go with all calls from then on."""
    for number, golden in enumerate(tape.goldens):
        picture = _shown(tape.seed(number), tape.size)
        golden |= {PICTURE: picture} | adapter.answers(**{PICTURE: picture})


def controlnet_of(tape: Tape) -> Eager | None:
    """The student's ControlNet, to be asked before its denoiser."""
    from .capture import Eager

    return Eager(tape.load(NAME)) if tape.student.family.steering == NAME else None


def steered(
    denoiser: Eager, controlnet: Eager | None, number: int, size: tuple[int, int]
) -> Eager | Controlled:
    """The denoiser as the loop of a golden calls it, of an example.

    Args:
        denoiser: by itself.
        controlnet: what sees the example's edges; None: there is none.
        number: chooses the example.
        size: (height, width) of the picture in px.
    """
    if controlnet is None:
        return denoiser
    return Controlled(denoiser, controlnet, _shown(number, size))


def _shown(number: int, size: tuple[int, int]) -> Array:
    """An example's edges, [1, 3, H, W]."""
    picture, _ = example(number, size)
    return edges_of(picture).transpose(2, 0, 1)[None].astype(np.float32) / 255


def seen_beside(tape: Tape) -> list[Array | None]:
    """What the denoiser sees behind x_t, of each golden."""
    family, student = tape.student.family, tape.student
    if not (conditions := family.conditions(student)):
        return [None] * len(tape.goldens)
    space = family.latent(student)
    encoder = family.load(student, "vae_encoder")

    def encode(pictures: Array) -> Array:
        with torch.no_grad():
            mean: Array = encoder(torch.from_numpy(pictures))[:, : space.channels].numpy()
        return (mean - space.shift) * space.scale

    found: list[Array | None] = []
    for number in range(len(tape.goldens)):
        pixels, painted = example(tape.seed(number), tape.size)
        picture = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        found.append(beside(conditions, picture, painted[None, None], space, encode))
    return found
