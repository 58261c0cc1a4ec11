"""Even steps for samplers of flows, whose own steps in diffusers end too near the picture.

The steps of `FlowMatchEulerDiscreteScheduler` go from noise alone to the least noise that it knows:
the last of four begins at sigma 0.009, where next to nothing is left to do. Few-step students are
trained at N even ones instead, sigma = 1, (N - 1) / N ... 1 / N before the shift. Tables of
edgeflash have those; pipelines of diffusers must be told them, ``sigmas=[1, 0.75, 0.5, 0.25]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeflash.errors import EdgeflashError

MARK = "_even_steps"  # N, in a scheduler's config, where diffusers keeps it and looks past it


def chosen(of: int, steps: int) -> list[int]:
    """Which of N steps a sampler of fewer takes, 0 the noisiest: as `LCMScheduler` chooses."""
    return [int(i) for i in np.linspace(0, of, steps, endpoint=False)]


def timing(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """What ``set_timesteps`` of a scheduler with that config is to be told; nothing if unmarked.

    Raises:
        EdgeflashError: more steps than the student was trained at.
    """
    if not (of := config.get(MARK)):
        return {}
    if steps > of:
        raise EdgeflashError(
            f"{steps} steps: the student was trained at {of} alone: take no more than those"
        )
    return {"sigmas": [1 - i / of for i in chosen(of, steps)]}
