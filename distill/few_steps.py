"""The few timesteps that a student is trained at, and the sampler that stops at them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import LCMScheduler
from torch import Tensor

from edgeflash.errors import EdgeflashError

from .process import Process, noise_config


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


def few_step_scheduler(teacher: Path, steps: int) -> LCMScheduler:
    """x_0, then fresh noise, at the timesteps of the ladder, with the teacher's betas."""
    return LCMScheduler(**noise_config(teacher), clip_sample=False, original_inference_steps=steps)
