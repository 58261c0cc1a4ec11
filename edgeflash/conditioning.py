"""What a denoiser hears beside latent and time: arrays by role, one row a picture.

Arrays of one role are those of all text encoders that give it, side by side along the last axis and
in the order of the components. What `FROM_SIZE` has follows from the size of the picture alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import TensorSpec

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
    for role in (spec.role for spec in inputs):
        parts = [answer[role] for answer in answers if role in answer]
        if parts:
            found[role] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        elif role in FROM_SIZE:
            rows = len(next(iter(answers[0].values())))
            found[role] = np.repeat(FROM_SIZE[role](*size), rows, axis=0)
    return found


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
