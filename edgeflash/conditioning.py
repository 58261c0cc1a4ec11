"""What a denoiser hears beside latent and time: arrays by role, one row a picture.

Arrays of one role are those of all text encoders that give it, side by side along the last axis and
in the order of the components. ``joint`` [n, s, d] is what is called conditioning so, and below it,
in further rows, what is called below; zeros where neither is. What `FROM_SIZE` has follows from the
size of the picture alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import TensorSpec
from edgeflash.control import ROLE

JOINT, PARTS = "joint", ("conditioning", "below")
SIZES = 6  # numbers in time_ids
Array = NDArray[Any]
Conditioning = Mapping[str, Array]


def joined(
    answers: Sequence[Conditioning], inputs: Iterable[TensorSpec], size: tuple[int, int]
) -> dict[str, Array]:
    """What of the text encoders' answers a denoiser with these inputs takes.

    Args:
        answers: role -> [n, ...] of each text encoder, in order.
        inputs: of the denoiser.
        size: (height, width) of the picture in px.
    """
    found: dict[str, Array] = {}
    for spec in inputs:
        role, told = spec.role, _beside(answers, spec.role)
        if role == JOINT:
            found[role] = _stacked([_beside(answers, part) for part in PARTS], spec)
        elif told is not None:
            found[role] = told
        elif role in FROM_SIZE:
            rows = len(next(iter(answers[0].values())))
            found[role] = np.repeat(FROM_SIZE[role](*size), rows, axis=0)
    return found


def told_of(inputs: Iterable[TensorSpec]) -> set[str]:
    """The roles of text encoders' answers that a denoiser with these inputs may hear."""
    roles = [spec.role for spec in inputs if not spec.role.startswith(ROLE)]
    return {part for role in roles for part in (PARTS if role == JOINT else (role,))}


def _beside(answers: Sequence[Conditioning], role: str) -> Array | None:
    parts = [answer[role] for answer in answers if role in answer]
    if len(parts) > 1:
        return np.concatenate(parts, axis=-1)
    return parts[0] if parts else None


def _stacked(parts: Sequence[Array | None], spec: TensorSpec) -> Array:
    """Parts [n, ., .] below each other, in zeros of the shape of ``spec``."""
    there = [part for part in parts if part is not None]
    tokens, width = spec.shape[1:]
    out = np.zeros((len(there[0]), int(tokens), int(width)), there[0].dtype)
    start = 0
    for part in there:
        out[:, start : start + part.shape[1], : part.shape[2]] = part
        start += part.shape[1]
    return out


def time_ids(height: int, width: int) -> NDArray[np.float32]:
    """Original size, top left corner of the crop, and size, each as (y, x) in px: [1, 6]."""
    return np.array([[height, width, 0, 0, height, width]], np.float32)


def resolution(height: int, width: int) -> NDArray[np.float32]:
    """(height, width) in px: [1, 2]."""
    return np.array([[height, width]], np.float32)


def aspect_ratio(height: int, width: int) -> NDArray[np.float32]:
    """height / width: [1, 1]."""
    return np.array([[height / width]], np.float32)


FROM_SIZE = {"time_ids": time_ids, "resolution": resolution, "aspect_ratio": aspect_ratio}
