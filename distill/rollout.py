"""Several network calls in a row, without gradients: a path of the teacher's, or the student's own.

A network is handed over as `Asked`, so that conditioning and guidance are the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .process import Process, noise_like

Asked = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x_t [n, c, h, w], t [n] -> x_0, eps


@torch.no_grad()
def ddim(ask: Asked, process: Process, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """The probability-flow ODE from x at times[0] to times[-1] (arXiv 2010.02502, eq. 12, sigma 0).

    Args:
        x: [n, c, h, w] at times[0].
        times: timesteps [n], each below the one before.
    """
    for t, s in pairwise(times):
        x = process.ddim(*ask(x, t), s)
    torch.clear_autocast_cache()  # weights that were cast in here would stay without gradients
    return x


@torch.no_grad()
def heun(ask: Asked, process: Process, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """The same ODE by Heun's steps of two calls each, in x / alpha over sigma / alpha.

    There dx = eps d(sigma / alpha): arXiv 2206.00364, alg. 1. ``times`` do not reach the clean one.
    """
    for t, s in pairwise(times):
        start, span = x / process.alpha(t), process.ratio(s) - process.ratio(t)
        _, eps = ask(x, t)
        _, later = ask(process.alpha(s) * (start + span * eps), s)
        x = process.alpha(s) * (start + span * (eps + later) / 2)
    torch.clear_autocast_cache()  # as above
    return x


@torch.no_grad()
def multistep(ask: Asked, process: Process, x: Tensor, times: Sequence[Tensor]) -> Tensor:
    """The same ODE by DPM-Solver++ (2M), which looks a call back (arXiv 2211.01095, alg. 2).

    Its first step, one from noise alone and one to the clean sample are of first order, as DDIM's.

    Args:
        x: [n, c, h, w] at times[0].
        times: timesteps [n], each below the one before.
    """
    before, h_before = x, torch.full_like(process.sigma(times[0]), torch.inf)
    for t, s in pairwise(times):
        x_0, _ = ask(x, t)
        h = process.ratio(t).log() - process.ratio(s).log()  # of lambda = log(alpha / sigma)
        d = x_0 + torch.where(h.isfinite(), h / (2 * h_before), 0) * (x_0 - before)
        shrinks = process.sigma(s) / process.sigma(t)
        x = shrinks * x + (process.alpha(s) - shrinks * process.alpha(t)) * d
        before, h_before = x_0, h
    torch.clear_autocast_cache()  # as above
    return x


@torch.no_grad()
def denoised(ask: Asked, process: Process, x: Tensor, k: Tensor, steps: int) -> Tensor:
    """x_0 that so many DDIM steps, at evenly spaced levels down from k, lead to.

    Args:
        x: [n, c, h, w] at level k.
        k: noise levels int64 [n].
        steps: calls of the network.
    """
    levels = [((k + 1) * (steps - i) // steps - 1).clamp(min=0) for i in range(steps)]
    times = [process.at(level) for level in levels]
    x_0, _ = ask(ddim(ask, process, x, times), times[-1])
    return x_0


@torch.no_grad()
def renoised(
    ask: Asked, process: Process, x: Tensor, times: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """Where a student gets to that takes x_0, and fresh noise on it, at every step.

    That is multistep consistency sampling (arXiv 2303.01469, alg. 1), as LCM and DMD2 sample.

    Args:
        x: [n, c, h, w] at times[0].
        times: timesteps [n], each below the one before; what comes back is at times[-1].
    """
    for t, s in pairwise(times):
        x_0, _ = ask(x, t)
        x = process.noised(x_0, noise_like(x, generator), s)
    torch.clear_autocast_cache()  # as above
    return x
