"""Losses that several methods have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .process import Process, noise_like
from .rollout import Asked


def matching(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Distribution matching (arXiv 2311.18828, eq. 7 and 8): a scalar with the gradient wanted.

    Its gradient by x is (fake - real) / mean|x - real|, over the number of elements of x. With
    scores s = (alpha x_0 - x_t) / sigma^2 that is eq. 7, less a factor alpha_t that the authors'
    own code leaves out; a step against it leads from what samples are to what they should be.

    Args:
        x: samples of the student, [n, c, h, w].
        real, fake: x_0 that the teacher and the fake score see in a noised x, without gradients.
    """
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-8)
    return 0.5 * F.mse_loss(x, (x - (fake - real) / scale).detach())


def noised_matching(
    x: Tensor, t: Tensor, real: Asked, fake: Asked, process: Process, generator: torch.Generator
) -> Tensor:
    """`matching` of samples x [n, c, h, w] by what both see in them, noised to timesteps t [n]."""
    with torch.no_grad():
        x_t = process.noised(x, noise_like(x, generator), t)
        right, wrong = real(x_t, t)[0], fake(x_t, t)[0]
    return matching(x, right, wrong)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance of width c (arXiv 2310.14189, eq. 7), mean over elements."""
    return ((a - b).square() + c**2).sqrt().mean() - c
