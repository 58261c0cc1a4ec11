"""The consistency function of latent diffusion models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .process import Process

TIMESTEP_SCALING = 10.0


def consistency(
    unet: Any,
    process: Process,
    x: Tensor,
    t: Tensor,
    c: Tensor,
    timestep_scaling: float = TIMESTEP_SCALING,
) -> Tensor:
    """f(x, t) = c_skip x + c_out x_0(x, t), arXiv 2310.04378 eq. 9; [n, c, h, w]."""
    c_skip, c_out = process.scalings(t, timestep_scaling)
    return c_skip * x + c_out * process.x_0(unet(x, t, c).sample.float(), x, t)
