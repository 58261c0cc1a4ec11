"""The few timesteps that a student is trained at, and the sampler that stops at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from edgeflash.errors import EdgeflashError

from .process import Process, noise_config, noise_like
from .stage import Batch
from .teacher import plain


def ladder(process: Process, steps: int, option: str) -> Tensor:
    """Timesteps that divide time evenly, the noisiest first: 999, 749, 499, 249; int64 [steps].

    Raises:
        EdgeflashError: they do not divide it; ``option`` says who asked.
    """
    stride, rest = divmod(process.timesteps, steps)
    if rest:
        raise EdgeflashError(
            f"{option}: {steps} do not divide this teacher's {process.timesteps} timesteps"
        )
    return torch.arange(process.timesteps - 1, -1, -stride, device=process.abar.device)


def estimate(
    network: Any,
    process: Process,
    batch: Batch,
    times: Tensor,
    shares: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """x [n, c, h, w], which a student makes of x_0 noised, and of noise alone at the last timestep.

    Args:
        network: the student.
        process: the teacher's noise.
        batch: x_0 [n, c, h, w] and its conditioning c.
        times: the student's timesteps, int64.
        shares: how often each of them is drawn, in any unit.
        generator: for all draws.
    """
    x_0 = batch["x_0"]
    drawn = torch.multinomial(shares, len(x_0), replacement=True, generator=generator)
    s = times[drawn.to(times.device)]
    x_s = process.as_sampled(x_0, noise_like(x_0, generator), s)
    x, _ = plain(network, process, x_s, s, batch["c"])
    return x


def few_step_scheduler(teacher: Path, steps: int) -> LCMScheduler:
    """x_0, then fresh noise, at the timesteps of the ladder, with the teacher's betas."""
    return LCMScheduler(**noise_config(teacher), clip_sample=False, original_inference_steps=steps)
