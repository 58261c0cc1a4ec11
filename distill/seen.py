"""What denoisers see of the data beside x_t: masks, and what these leave of the pictures.

Of networks that enlarge, the pictures as small ones have them; of those that a ControlNet
or an adapter steers, the edges. It travels in the last rows of
c [n, s, d]: all methods carry c to whatever denoiser they ask, which takes it off there
(`Family.listening`). Guidance without a caption keeps it: see `unprompted`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeflash.bundle import Condition, Latent
from edgeflash.conditions import PICTURES, as_seen, on_cells
from edgeflash.control import edges

Rows = Callable[[np.ndarray], Tensor]

SEED = 0x3A5C  # of the masks, so that they depend on nothing but the row
EVERYTHING = 0.25  # share of masks that paint all, as Stable Diffusion's inpainting models had it
LEAST = 0.25  # of each side that a mask covers, at most all of it


def painted(indices: np.ndarray, side_px: int) -> np.ndarray:
    """Where to paint into the store's pictures, bool [n, 1, s, s]: a rectangle, or all of it.

    The mask of a row is always the same, so that what it leaves of the picture is encoded once.
    """
    found = np.zeros((len(indices), 1, side_px, side_px), np.bool_)
    for mask, index in zip(found, indices.tolist(), strict=True):
        draw = np.random.default_rng((SEED, index)).random(5)
        share = np.ones(2) if draw[4] < EVERYTHING else LEAST + (1 - LEAST) * draw[:2]
        height, width = np.rint(share * side_px).astype(int)
        top, left = (draw[2:4] * (side_px + 1 - np.array([height, width]))).astype(int)
        mask[0, top : top + height, left : left + width] = True
    return found


def seen_of(
    conditions: Sequence[Condition],
    pictures: Rows,
    side_px: int,
    latent: Latent,
    cached: Callable[[str, Rows], Rows],
) -> Rows:
    """The channels behind those of x_t, float32 [n, k, h, w].

    Args:
        conditions: what they are.
        pictures: rows -> [n, 3, s, s] in [-1, 1].
        side_px: s.
        latent: how large cells are, and how latents are scaled.
        cached: name and pictures -> their scaled latents [n, c, h, w].
    """

    def part(condition: Condition) -> Rows:
        if condition.kind not in PICTURES:
            return lambda indices: torch.from_numpy(
                on_cells(painted(indices, side_px), latent.downsampling)
            )
        times = condition.enlarges or 1

        def shown(indices: np.ndarray) -> Tensor:
            some, places = coarse(pictures(indices), times), painted(indices, side_px)
            seen: Tensor = PICTURES[condition.kind](some, torch.from_numpy(places))
            return seen

        encoded = cached(f"{condition.kind}-{times}", shown)
        return lambda indices: as_seen(condition, encoded(indices), latent)

    parts = [part(condition) for condition in conditions]
    return lambda indices: torch.cat([rows(indices) for rows in parts], 1)


def edges_of(pictures: Tensor) -> Tensor:
    """What a denoiser is steered by: the edges of pictures [n, 3, s, s] in [-1, 1], 0 or 1."""
    return torch.from_numpy(edges(pictures.numpy()))


def coarse(pictures: Tensor, times: int) -> Tensor:
    """Pictures [n, 3, s, s] as ones so many times smaller along a side have them, at their size."""
    small = F.avg_pool2d(pictures, times)
    return small.repeat_interleave(times, 2).repeat_interleave(times, 3)


def unprompted(c: Tensor, nothing: Tensor) -> Tensor:
    """c [n, s + k, d] as it is without its captions: what is seen of pictures, in k rows, stays.

    ``nothing``: conditioning of the empty caption [1, s, d].
    """
    rows = nothing.shape[1]
    empty = nothing.to(c.dtype).expand(len(c), -1, -1)
    return empty if c.shape[1] == rows else torch.cat([empty, c[:, rows:]], 1)


def dropped(c: Tensor, nothing: Tensor, empty: Tensor) -> Tensor:
    """c [n, s, d], of the samples that ``empty`` [n] names without its captions."""
    return torch.where(empty[:, None, None].to(c.device), unprompted(c, nothing), c)
