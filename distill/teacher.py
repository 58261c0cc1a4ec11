"""Networks as methods ask them: for x_0 and eps, plain or guided, in one batched call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .process import Process
from .rollout import Asked
from .seen import unprompted


def plain(unet: Any, process: Process, x_t: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and eps [n, c, h, w], float32, that a network means by its output; with gradients."""
    output = unet(x_t, t, c).sample.float()
    return process.x_0(output, x_t, t), process.eps(output, x_t, t)


def guided(
    unet: Any, process: Process, x_t: Tensor, t: Tensor, c: Tensor, nothing: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """x_0 and eps [n, c, h, w] that a guided network means, (1 + w) F(c) - w F(nothing).

    Both are affine in the network's output F, so guiding the output guides both alike.

    Args:
        x_t, t: noised samples [n, c, h, w] and their timesteps int64 [n].
        c, nothing: conditioning [n, s, d] and that of the empty caption [1, s, d].
        w: guidance in LCM's convention, [n]; CFG's scale is 1 + w.
    """
    both = unet(
        torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c, unprompted(c, nothing)])
    ).sample.float()
    with_c, without = both.chunk(2)
    output = with_c + w[:, None, None, None] * (with_c - without)
    return process.x_0(output, x_t, t), process.eps(output, x_t, t)


def asked(
    unet: Any, process: Process, c: Tensor, nothing: Tensor, scale: float | Tensor = 1.0
) -> Asked:
    """A network under conditioning c, guided where the scale says so.

    Args:
        c, nothing: conditioning [n, s, d] and that of the empty caption [1, s, d].
        scale: CFG's, one number or one a sample [n]; the number 1 makes do without guidance.
    """
    if isinstance(scale, float) and scale == 1:
        return lambda x, t: plain(unet, process, x, t, c)
    w = torch.as_tensor(scale, device=c.device).expand(len(c)) - 1
    return lambda x, t: guided(unet, process, x, t, c, nothing, w)
