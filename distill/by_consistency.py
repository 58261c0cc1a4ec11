"""Consistency models: every point of a path leads to the same sample; with or without a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .consistency import consistency
from .draws import randint
from .encoded import cached_samples
from .few_steps import few_step_scheduler, source_of
from .losses import pseudo_huber
from .process import Process, noise_like
from .rollout import heun
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked

RHO = 7.0


class Consistency(Method):
    """Consistency models (arXiv 2303.01469): f(x_t, t) = f^-(x_s, s), s next below t on a grid.

    "distillation" (alg. 2): x_s is one Heun step of the teacher below x_t, along x / alpha over
    sigma / alpha. "training" (alg. 3): x_s is the same picture with the same noise, without a
    teacher; the grid grows from ``scales_min`` to ``scales_max``, and the decay of the target
    network with it, as N(k) and mu(k) of the authors' code. The grid is Karras' (arXiv 2206.00364,
    eq. 5) between the ends of the process, each entry at the nearest timestep.

    f is that of latent models (arXiv 2310.04378, eq. 9), which the student's `LCMScheduler` has as
    well. Distances are of latents; LPIPS, the paper's best, is not there. "huber" is that of arXiv
    2310.14189. The paper has no guidance: what is more than 1 is folded in by distillation.

    A step asks the teacher twice, target network and student once each; in memory are these three,
    and the student's average. Published with LPIPS, without guidance: CIFAR-10 FID 3.55 and 2.93 at
    1 and 2 steps, ImageNet 64x64 6.20 at 1, all distilled.
    """

    conditioned: ClassVar[bool] = True

    kind: Literal["distillation", "training"] = Field(
        "distillation", description="from a teacher, or from data alone"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    target_ema: float = Field(
        0.95, gt=0, lt=1, description="decay of the target network; in training mu_0"
    )
    scales: int = Field(40, ge=2, description="entries of the grid in distillation, N")
    scales_min: int = Field(2, ge=1, description="of the grid in training at first, s_0")
    scales_max: int = Field(150, ge=1, description="of the grid in training at last, s_1")
    distance: Literal["l2", "l1", "huber"] = Field("l2", description="of two answers of f")
    huber_c: float = Field(1e-3, gt=0, description="width of the pseudo-Huber distance")
    guidance: float = Field(1.0, ge=1, description="the teacher's guidance scale, folded in")
    inference_steps: int = Field(50, ge=1, description="timesteps that the sampler chooses from")

    @model_validator(mode="after")
    def _fits(self) -> Consistency:
        if self.scales_min > self.scales_max:
            raise ValueError(
                f"scales_min {self.scales_min} is greater than scales_max {self.scales_max}"
            )
        if self.kind == "training" and self.guidance > 1:
            raise ValueError(f"guidance {self.guidance}: training has no teacher to guide")
        return self

    def step_counts(self) -> range:
        return range(1, self.inference_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        distils = self.kind == "distillation"
        source = source_of(shop, "consistency", self.kind)
        process = shop.process()
        if process.abar[-1] == 0:
            raise EdgeflashError(
                "consistency: the grid ends nowhere, as this noise does (rescale_betas_zero_snr): "
                "use method 'lcm' or 'tcd'"
            )
        if self.inference_steps > process.timesteps:
            raise EdgeflashError(
                f"consistency.inference_steps: at most {process.timesteps} of this noise"
            )
        batch, nothing = cached_samples(shop)
        student = shop.load(shop.student, shop.denoiser).train()
        lesson = Lesson(
            options=self,
            teacher=shop.frozen(source) if distils else None,
            target=average(student, self.target_ema if distils else self.mu, warm=False),
            process=process,
            nothing=nothing,
        )
        return Stage(
            players={"student": Player(student, lesson.loss)},
            batch=batch,
            results={
                shop.denoiser: student,
                "scheduler": few_step_scheduler(source, self.inference_steps),
            },
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
            targets=[(lesson.target, student)],
        )

    def intervals(self, step: int) -> int:
        """Intervals of the grid at a step, counted from 0: N - 1, in training as it grows."""
        if self.kind == "distillation":
            return self.scales - 1
        first, last = self.scales_min**2, (self.scales_max + 1) ** 2
        return max(1, ceil(sqrt(step / self.steps * (last - first) + first) - 1))

    def mu(self, step: int) -> float:
        """Decay of the target network in training, mu(k) = mu_0^(s_0 / intervals)."""
        return exp(self.scales_min * log(self.target_ema) / self.intervals(step))

    def grid(self, process: Process, step: int) -> Tensor:
        """Its timesteps, int64 [N], ascending from 0; fewer than N where two are the same."""
        every = torch.arange(process.timesteps, device=process.abar.device)
        ratios = process.ratio(every).flatten()
        wanted = karras(self.intervals(step) + 1, float(ratios[0]), float(ratios[-1]))
        gaps = wanted.to(ratios).log()[:, None] - ratios.log()
        grid: Tensor = gaps.abs().argmin(1).unique()  # type: ignore[no-untyped-call]
        return grid

    def between(self, told: Tensor, wanted: Tensor) -> Tensor:
        if self.distance == "huber":
            return pseudo_huber(told, wanted, self.huber_c)
        return (F.mse_loss if self.distance == "l2" else F.l1_loss)(told, wanted)


@dataclass(frozen=True)
class Lesson:
    """The loss, with the networks that stand beside the student."""

    options: Consistency
    teacher: Any
    target: Any
    process: Process
    nothing: Tensor

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, process, options = batch["x_0"], batch["c"], self.process, self.options
        grid = options.grid(process, int(batch["step"]))
        n = randint(0, len(grid) - 1, len(x_0), generator).to(x_0.device)
        t, s, eps = grid[n + 1], grid[n], noise_like(x_0, generator)
        x_t, x_s = process.noised(x_0, eps, t), process.noised(x_0, eps, s)
        if options.kind == "distillation":
            ask = asked(self.teacher, process, c, self.nothing, options.guidance)
            x_s = heun(ask, process, x_t, [t, s])
        with torch.no_grad():
            wanted = consistency(self.target, process, x_s, s, c)
        told = consistency(network, process, x_t, t, c)
        return {"consistency": options.between(told, wanted)}


def karras(count: int, low: float, high: float) -> Tensor:
    """Karras' grid of sigma / alpha (arXiv 2206.00364, eq. 5), float64 [count], ascending."""
    ends = low ** (1 / RHO), high ** (1 / RHO)
    return torch.linspace(*ends, count, dtype=torch.float64) ** RHO
