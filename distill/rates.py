"""How fast what a network says changes along a path: the tangent of continuous-time methods.

`torch.func.jvp` gives it exactly. But Stable Diffusion tells a network its timestep by waves of up
to one radian a timestep, and what it does between the whole ones it was trained at is chance. The
derivative multiplies that by the timesteps in a unit of time; networks made for these methods are
told time itself instead (arXiv 2410.11081, sec. 4.1). A difference over many timesteps does not see
it: that is the default here, and asks for no particular attention or memory layout either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

STEP = "half the width of the tangent's difference, as a share of t; 0: the derivative itself"

Velocity = Callable[[Tensor, Tensor], Tensor]  # x [n, c, h, w], t [n] -> [n, c, h, w]


def differentiable(network: Any) -> Any:
    """A network, its weights laid out as forward-mode derivatives of group norms want them."""
    return network.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def rate(
    velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor, step: float, ends: tuple[Tensor, Tensor]
) -> Tensor:
    """d velocity(x, t) / dt where dx/dt is ``dx``, [n, c, h, w] float32, without gradients.

    Args:
        velocity: what a network says at x and t.
        x, t: where, [n, c, h, w] and [n].
        dx: the velocity there, [n, c, h, w].
        step: half of a central difference, as a share of t; 0: exactly, by forward mode, which
            asks for attention that is written out and for a network that is `differentiable`.
        ends: least and greatest t to ask at, [n] or []; differences are cut there.
    """
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would be coarser than the step
        if step == 0:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                exact: Tensor = torch.func.jvp(velocity, (x, t), (dx, torch.ones_like(t)))[1]
            return exact
        before, after = (t * (1 - step)).maximum(ends[0]), (t * (1 + step)).minimum(ends[1])
        told = [velocity(x + _wide(at - t) * dx, at) for at in (before, after)]
        return (told[1] - told[0]) / _wide(after - before)


def _wide(t: Tensor) -> Tensor:
    return t[:, None, None, None]
