"""The consistency function of latent diffusion models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .process import Process

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def scalings(t: Tensor, timestep_scaling: float = TIMESTEP_SCALING) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, [n, 1, 1, 1]: f(x, 0) = x whatever the network says."""
    scaled = timestep_scaling * t.float()[:, None, None, None]
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


def consistency(
    unet: Any,
    process: Process,
    x: Tensor,
    t: Tensor,
    c: Tensor,
    timestep_scaling: float = TIMESTEP_SCALING,
) -> Tensor:
    """f(x, t) = c_skip x + c_out x_0(x, t), arXiv 2310.04378 eq. 9; [n, c, h, w]."""
    c_skip, c_out = scalings(t, timestep_scaling)
    return c_skip * x + c_out * process.x_0(unet(x, t, c).sample.float(), x, t)
