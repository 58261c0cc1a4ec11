"""Zero-shot editing with consistency models (arXiv 2303.01469, alg. 4): what is known stays.

Their samplers make a whole picture at every step and noise it anew. In between, what is known of a
picture is put into the one made. That is a heuristic: nothing makes the rest follow but the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeflash.errors import EdgeflashError, unknown
from edgeflash.schedule import Schedule

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

LUMINANCE = np.array([0.2989, 0.5870, 0.1140], np.float32)  # of red, green and blue, ITU-R BT.601

EDITS = ("inpaint", "colourise", "enlarge")


@dataclass(frozen=True, eq=False)
class Edit:
    """How to put what is known into pictures.

    Attributes:
        size: (height, width) in px of the pictures it takes.
        project: float32 [n, 3, height, width] of 0 to 255 -> the same with what is known in its
            place; done twice it changes nothing more.
    """

    size: tuple[int, int]
    project: Callable[[Float32], Float32]


def edit_of(
    name: str | None, picture: UInt8 | None, mask: UInt8 | None, size: tuple[int, int]
) -> Edit | None:
    """What ``--edit``, ``--image`` and ``--mask`` of the command line ask for.

    Args:
        name: inpaint, colourise or enlarge; None for no edit.
        picture: uint8 [h, w, 3].
        mask: uint8 [h, w, 3], white where inpaint paints.
        size: (height, width) of the picture to make.

    Raises:
        EdgeflashError: an unknown name, a picture or mask missing or idle, or a size that is off.
    """
    if name is None:
        return None
    if name not in EDITS:
        raise unknown("edit", name, EDITS)
    if picture is None:
        raise EdgeflashError(f"--edit {name}: give the picture with --image")
    if (mask is None) == (name == "inpaint"):
        need = "give --mask," if mask is None else "leave out --mask, for inpaint alone,"
        raise EdgeflashError(f"--edit {name}: {need} a picture that is white where to paint")
    if name == "enlarge":
        return enlarge(picture, size)
    for what in (picture, mask):
        if what is not None and what.shape[:2] != size:
            has, made = ("x".join(map(str, shape)) for shape in (what.shape[:2], size))
            raise EdgeflashError(
                f"--edit {name}: a picture of {has} px, but {made} px are made: crop or scale it"
            )
    return colourise(picture) if mask is None else inpaint(picture, mask[..., 0] >= 128)


def inpaint(picture: UInt8, painted: NDArray[np.bool_]) -> Edit:
    """Keeps a picture [h, w, 3] but where ``painted`` [h, w] is true."""
    known = _planes(picture)
    return Edit(_size(picture), lambda x: np.where(painted, x, known))


def colourise(picture: UInt8) -> Edit:
    """Keeps the luminance of a picture [h, w, 3]: of colours, the part along that axis."""
    axis = (LUMINANCE / np.linalg.norm(LUMINANCE)).astype(np.float32)[:, None, None]
    along = (axis * _planes(picture)).sum(0)

    def project(x: Float32) -> Float32:
        lacking: Float32 = along - (axis * x).sum(1)
        return x + axis * lacking[:, None]

    return Edit(_size(picture), project)


def enlarge(small: UInt8, size: tuple[int, int]) -> Edit:
    """Keeps the pixels of a small picture [h, w, 3] as the means of patches of a larger one.

    Raises:
        EdgeflashError: ``size`` is no whole multiple of the small picture's.
    """
    (h, w), (height, width) = _size(small), size
    if height % h or width % w:
        raise EdgeflashError(
            f"--edit enlarge: {height}x{width} px is no whole multiple of {h}x{w}; "
            "scale the picture first"
        )
    known = _planes(small)

    def project(x: Float32) -> Float32:
        patches = x.reshape(len(x), 3, h, height // h, w, width // w)
        lacking = known[..., None, :, None] - patches.mean((3, 5), keepdims=True)
        moved: Float32 = (patches + lacking).reshape(x.shape)
        return moved

    return Edit(size, project)


@dataclass(frozen=True, eq=False)
class Blend:
    """Inpainting without training, for any sampler: what is known, noised as far as x is, stays.

    As diffusers' `StableDiffusionInpaintPipeline` does with networks that see x_t alone, and
    arXiv 2206.02779, alg. 1.

    Attributes:
        schedule: that is run.
        latent: of the picture, [n, c, h, w].
        noise: that x begins with, and the picture is noised with at every step, [n, c, h, w].
        painted: cells to paint 1, others 0, [1, 1, h, w].
    """

    schedule: Schedule
    latent: Float32
    noise: Float32
    painted: Float32

    def __call__(self, x: Float32, row: int) -> Float32:
        """x after a row of the schedule, with what is known in its place."""
        entries, p, q = self.schedule.entries, 1.0, 0.0
        if row + 1 < len(self.schedule.steps):
            p, q = entries[row + 1].p, entries[row + 1].q
        return np.where(self.painted > 0, x, p * self.latent + q * self.noise).astype(x.dtype)


def renoises(schedule: Schedule) -> bool:
    """Whether each step but the last ends in p x_0 + q noise, as LCM's: x_0 and fresh noise."""
    steps, entries = schedule.steps, schedule.entries
    return (
        len(entries) == len(steps)
        and steps[-1].c == 0
        and not any(step.needs_previous for step in steps)
        and all(
            math.isclose(step.c, entry.q, rel_tol=1e-4)
            for step, entry in zip(steps, entries[1:], strict=False)
        )
    )


def _size(picture: UInt8) -> tuple[int, int]:
    return picture.shape[0], picture.shape[1]


def _planes(picture: UInt8) -> Float32:
    """uint8 [h, w, 3] -> float32 [3, h, w]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)
