"""Gaussian data, x_0 ~ N(m, s^2), whose scores, paths and steps have closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from edgeflash.distill.process import Process
from edgeflash.distill.rollout import Asked
from edgeflash.schedule import Schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
M, S = 0.7, 0.5
NOTHING = torch.zeros(1, 1, 1)  # conditioning that no network here listens to


def process(predicts: Any = "sample") -> Process:
    return Process(DDPMScheduler(**BETAS).alphas_cumprod, predicts)


def exact_process(predicts: Any = "sample") -> Process:
    """The same in float64, for equalities."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    return Process((1 - roots.square()).cumprod(0), predicts)


def teacher_folder(home: Path, **config: Any) -> Path:
    DDIMScheduler(**BETAS, **config).save_pretrained(str(home / "scheduler"))
    return home


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(count: int, seed: int = 9) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=seeded(seed))


def batch(count: int) -> dict[str, Tensor]:
    return {"x_0": M + S * normal(count), "c": torch.zeros(count, 1, 1)}


def network(it: Process, sees: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Puts out what means the x_0 and eps that it sees."""
    return lambda x, t, c: SimpleNamespace(sample=it.target(*sees(x, t), t))


def variance(it: Process, t: Tensor, s: float = S) -> Tensor:
    """Of x_t, [n, 1, 1, 1]."""
    return it.alpha(t) ** 2 * s**2 + it.sigma(t) ** 2


def posterior(it: Process, m: float = M, s: float = S) -> Any:
    """The perfect teacher: E[x_0 | x_t] and E[eps | x_t]."""

    def sees(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        gap = (x - it.alpha(t) * m) / variance(it, t, s)
        return m + it.alpha(t) * s**2 * gap, it.sigma(t) * gap

    return network(it, sees)


def unrounded(it: Process, net: Any) -> Asked:
    """What `edgeflash.distill.teacher.plain` reads from a network, but not in float32."""

    def ask(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output = net(x, t, NOTHING).sample
        return it.x_0(output, x, t), it.eps(output, x, t)

    return ask


class Shift(nn.Module):
    """A student whose sample is m + s x, with m to learn; notes what it is called with."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m, self.s = nn.Parameter(torch.tensor(m)), s
        self.seen: list[Tensor] = []
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
        self.given.append(x)
        self.seen.append(t)
        return SimpleNamespace(sample=self.m + self.s * x)


def exact(it: Process, m: float = M, s: float = S) -> Any:
    """Where the exact ODE ends: f*(x, t) = m + s (x - alpha m) / sqrt(V), the consistency map."""

    def sees(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = m + s * (x - it.alpha(t) * m) / variance(it, t, s).sqrt()
        return x_0, (x - it.alpha(t) * x_0) / it.sigma(t)

    return network(it, sees)


def sampled(schedule: Schedule, net: Any, x: Tensor) -> Tensor:
    """The loop of a runtime, for samplers without fresh noise."""
    for step in schedule.steps:
        t = torch.full((len(x),), int(step.t))
        x = step.a * x + step.b * net(step.in_scale * x, t, NOTHING).sample
    return x


def says(value: Callable[[Tensor], Tensor]) -> Any:
    """A network that puts out what ``value`` makes of the conditioning [n, 1, 1], everywhere."""
    return lambda x, t, c: SimpleNamespace(sample=0 * x + value(c)[..., None])
