"""Trajectory consistency distillation: one network for a step from any noise to any smaller one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .draws import rand, randint
from .encoded import cached_samples
from .few_steps import trajectory_scheduler
from .process import Process, noise_like
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import guided, plain


class TCD(Method):
    """TCD (arXiv 2402.19159, sec. 4; prior art: CTM, arXiv 2310.02279), without a critic.

    L = |f(x_t, t, s) - f^-(x_u, u, s)|^2 at t = t_{n+k}, u = t_n, s = t_m with m <= n, where x_u is
    one guided teacher DDIM step below x_t and f^- the target network. f is the paper's TCF(1),
    alpha_s x_0 + sigma_s eps, so f(x, s, s) = x whatever the network says. The guidance weight w is
    drawn for each sample and folded in; the student is sampled without guidance. A step asks the
    teacher once for both branches, and target and student once each; in memory are these three, and
    the student's average. Published as a LoRA of SDXL; figures to compare with were not found, nor
    rates.

    The student keeps a `TCDScheduler`, whose tables have its gamma of 0.3. Pipelines of diffusers
    pass a gamma of their own, 0: call them with ``eta=0.3``. Of a flow (SD 3) gamma is 0, and steps
    are Euler's: see `edgeflash/even_steps.py`.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    target_ema: float = Field(
        0.95, ge=0, lt=1, description="decay of the target network; 0: it is the student"
    )
    ddim_steps: int = Field(
        50, ge=2, description="grid of the teacher's solver; the skip is T / it"
    )
    w_min: float = Field(2.0, ge=0, description="least guidance weight; CFG's scale is 1 + w")
    w_max: float = Field(14.0, ge=0, description="greatest guidance weight")

    @model_validator(mode="after")
    def _ordered(self) -> TCD:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is greater than w_max {self.w_max}")
        return self

    def step_counts(self) -> range:
        return range(1, self.ddim_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        student = shop.load(shop.student, shop.denoiser).train()
        process = shop.process()
        if self.ddim_steps > process.timesteps:
            raise EdgeflashError(f"tcd.ddim_steps: at most {process.timesteps} of this teacher's")
        batch, nothing = cached_samples(shop)
        lesson = Lesson(
            options=self,
            teacher=shop.frozen(shop.teacher),
            target=average(student, self.target_ema, warm=False) if self.target_ema else student,
            process=process,
            nothing=nothing,
        )

        return Stage(
            players={"student": Player(student, lesson.loss)},
            batch=batch,
            results={shop.denoiser: student, "scheduler": self.scheduler(shop.teacher)},
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
            targets=[(lesson.target, student)] if lesson.target is not student else [],
        )

    def draws(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Grid entries n, uniform, and m, uniform up to n; int64 [count] each."""
        n = randint(0, self.ddim_steps, count, generator)
        m = (rand(count, generator) * (n + 1)).long()
        return n, torch.minimum(m, n)  # what is below 1 may be rounded up

    def times(self, n: Tensor, m: Tensor, timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of t_{n+k}, t_n and t_m: k of one step below the other, and 0 at the end."""
        skip = timesteps // self.ddim_steps
        t, u, s = ((entry * skip - 1).clamp(min=0) for entry in (n + 1, n, m))
        return t, u, s

    def scheduler(self, teacher: Path) -> Any:
        """The sampler, on the loss's grid."""
        return trajectory_scheduler(teacher, self.ddim_steps)


@dataclass(frozen=True)
class Lesson:
    """The loss, with the networks that stand beside the student."""

    options: TCD
    teacher: Any
    target: Any
    process: Process
    nothing: Tensor

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, process, options = batch["x_0"], batch["c"], self.process, self.options
        eps = noise_like(x_0, generator)
        entries = options.draws(len(x_0), generator)
        levels = options.times(*entries, process.timesteps)
        t, u, s = (process.at(level).to(x_0.device) for level in levels)
        spread = options.w_max - options.w_min
        w = options.w_min + spread * rand(len(x_0), generator).to(x_0.device)
        x_t = process.noised(x_0, eps, t)
        x_u = process.ddim(*guided(self.teacher, process, x_t, t, c, self.nothing, w), u)
        with torch.no_grad():
            wanted = trajectory(self.target, process, x_u, u, s, c)
        torch.clear_autocast_cache()  # the target may be the student, whose weights shall learn
        return {"trajectory": F.mse_loss(trajectory(network, process, x_t, t, s, c), wanted)}


def trajectory(unet: Any, process: Process, x: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """f(x, t, s), TCF(1): where the network says that x at t was at s; [n, c, h, w]."""
    return process.ddim(*plain(unet, process, x, t, c), s)
