"""What a denoiser leaves for later steps: roles, names, and the one rule of how it is carried.

A bundle may hold a second graph of its denoiser, which computes less and takes the rest from what
the whole network made at an earlier step. Rows of a schedule name the graph they run. Whoever runs
the loop does this::

    whole row:   output, cache.0 … cache.k = denoiser(…)         # keep what it leaves
    cached row:  output = denoiser_cached(…, cache.0 … cache.k)  # as the last whole row left it

With the method "t-gate" of the manifest the cached graph hears no prompt, so there is nothing to
guide: it runs once, on the mean of what the two calls of the last guided row left (`unguided`).
With "deep-cache" it is guided like the other, each call on what its own left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROLE = "cache."  # of inputs and outputs, before their number
SUFFIX = "_cached"  # of the component, behind the denoiser's name


def cached_name(denoiser: str) -> str:
    """The component that is a denoiser's cached graph."""
    return denoiser + SUFFIX


def whole_name(component: str) -> str:
    """The component whose weights these are: a cached graph has those of its denoiser."""
    return component.removesuffix(SUFFIX)


def left_by(answers: Mapping[str, Array]) -> dict[str, Array]:
    """Of what a denoiser answers, by role, that which later steps take."""
    return {role: array for role, array in answers.items() if role.startswith(ROLE)}


def unguided(sides: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The mean of what was left with the prompt and without (arXiv 2404.02747)."""
    first, *others = sides
    if not others:
        return dict(first)
    return {
        role: np.mean([array, *(other[role] for other in others)], axis=0, dtype=array.dtype)
        for role, array in first.items()
    }
