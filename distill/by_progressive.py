"""Progressive distillation: one step of the student does what two of its teacher did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .draws import rand, randint
from .encoded import cached_samples
from .few_steps import ddim_scheduler, trailing
from .process import Process, noise_like
from .rollout import ddim
from .seen import dropped
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked


class Progressive(Method):
    """Progressive distillation (arXiv 2202.00512, alg. 2): a stage halves the steps once.

    From x_t the teacher takes two DDIM steps, to u and to s. The student learns the x_0 whose one
    DDIM step ends at the same x_s, x = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s /
    sigma_t) alpha_t), by max(alpha_t^2 / sigma_t^2, 1) |x - x_0(x_t)|^2 or with the weight
    alpha_t^2 / sigma_t^2 + 1 (sec. 4). For 8 -> 4 -> 2 -> 1 write three stages, of 4, 2 and 1
    ``denoising_steps``; the later two with ``halves = "student"``.

    Guidance is folded in by the first stage, with ``guidance``, or it is kept. ``cfg_share`` is
    SnapFusion's way to keep it (arXiv 2306.00980, its CFG-aware loss): so many of the batches
    compare teacher and student both guided. ``denoising_weight`` adds the loss that the teacher was
    trained by, as there; SnapFusion also balances the two as it goes, and this does not.

    Teachers of v or x_0 are advised: at t = 999 an error of eps is 14.6 times as large in x_0. A
    step asks the teacher twice, the student once; in memory are both. Published for SD 1.5 at 4, 2
    and 1 steps: FID 26.4, 26.0 and 37.2 on COCO 2017 (arXiv 2311.17042); SnapFusion's own 8 steps,
    CFG kept: 24.2.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    denoising_steps: int = Field(4, ge=1, description="of the student; its teacher takes two each")
    halves: Literal["teacher", "student"] = Field(
        "teacher", description="whose steps: the recipe's teacher's, or the student's so far"
    )
    weighting: Literal["truncated_snr", "snr_plus_one"] = Field(
        "truncated_snr", description="of the timesteps, in x_0"
    )
    guidance: float = Field(1.0, ge=1, description="the teacher's guidance scale, folded in")
    cfg_share: float = Field(
        0.0, ge=0, le=1, description="batches that are compared guided; SnapFusion: 0.1"
    )
    guidance_min: float = Field(2.0, ge=1, description="least guidance scale of those batches")
    guidance_max: float = Field(14.0, ge=1, description="greatest guidance scale of those batches")
    denoising_weight: float = Field(
        0.0, ge=0, description="of the teacher's own loss on the data; SnapFusion: 0.2"
    )
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty captions, for CFG")

    @model_validator(mode="after")
    def _fits(self) -> Progressive:
        if self.guidance_min > self.guidance_max:
            raise ValueError(
                f"guidance_min {self.guidance_min} is greater than guidance_max {self.guidance_max}"
            )
        if self.guidance > 1 and (self.cfg_share or self.denoising_weight):
            raise ValueError(
                f"guidance {self.guidance} is folded in, so there is none to keep: "
                "set cfg_share and denoising_weight to 0, or guidance to 1"
            )
        return self

    def step_counts(self) -> range:
        return range(self.denoising_steps, self.denoising_steps + 1)

    def folds_guidance(self) -> bool:
        return self.guidance > 1

    def refuse_after(self, earlier: Sequence[Method]) -> str:
        if self.halves == "teacher":
            return ""
        made = next((runs for m in reversed(earlier) if (runs := m.step_counts())), None)
        if made and (twice := 2 * self.denoising_steps) not in made:
            return (
                f"halves {twice} steps to {self.denoising_steps}, but the stage before it makes a "
                f"student of {_told(made)}: set denoising_steps to half of them"
            )
        if (self.guidance > 1 or self.cfg_share) and any(m.folds_guidance() for m in earlier):
            return (
                "an earlier stage has folded guidance in, and this one would do so again: write "
                "guidance = 1 and cfg_share = 0 here, in the recipe, as --set speaks to all stages "
                "of a method"
            )
        return ""

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        process = shop.process()
        if 2 * self.denoising_steps > process.timesteps:
            raise EdgeflashError(
                f"progressive.denoising_steps: at most {process.timesteps // 2}, half of this "
                "teacher's timesteps"
            )
        batch, nothing = cached_samples(shop)
        student = shop.load(shop.student, shop.denoiser).train()
        halved = shop.teacher if self.halves == "teacher" else shop.student
        teacher = shop.frozen(halved)
        return Stage(
            players={"student": Player(student, Lesson(self, teacher, process, nothing).loss)},
            batch=batch,
            results={
                shop.denoiser: student,
                "scheduler": ddim_scheduler(shop.teacher, self.denoising_steps),
            },
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
        )

    def times(self, n: Tensor, timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of t, u and s of the student's steps n, of which 0 is the noisiest."""
        stops = trailing(timesteps, 2 * self.denoising_steps)
        return stops[2 * n], stops[2 * n + 1], stops[2 * n + 2]

    def weight(self, process: Process, t: Tensor) -> Tensor:
        """w(lambda_t), [n, 1, 1, 1]."""
        snr = (process.alpha(t) / process.sigma(t)).square()
        return snr + 1 if self.weighting == "snr_plus_one" else snr.clamp(min=1)

    def scales(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Guidance of teacher and student alike, [count]; None in batches without."""
        compared = torch.rand((), generator=generator) < self.cfg_share
        spread = self.guidance_max - self.guidance_min
        scales = self.guidance_min + spread * rand(count, generator)
        return scales if compared else None


def _told(steps: range) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"


@dataclass(frozen=True)
class Lesson:
    """The loss, with the networks that stand beside the student."""

    options: Progressive
    teacher: Any
    process: Process
    nothing: Tensor

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, count, process, options = batch["x_0"], len(batch["x_0"]), self.process, self.options
        eps = noise_like(x_0, generator)
        n = randint(0, options.denoising_steps, count, generator)
        levels = options.times(n, process.timesteps)
        t, u, s = (process.at(level).to(x_0.device) for level in levels)
        empty = rand(count, generator) < options.caption_dropout
        c = dropped(batch["c"], self.nothing, empty)
        kept = options.scales(count, generator)
        x_t = process.as_sampled(x_0, eps, t)
        ask = asked(
            self.teacher, process, c, self.nothing, options.guidance if kept is None else kept
        )
        wanted = halved(process, x_t, ddim(ask, process, x_t, [t, u, s]), t, s)
        told, _ = asked(network, process, c, self.nothing, 1.0 if kept is None else kept)(x_t, t)
        gap = (told - wanted).square()
        terms = {"halving": (options.weight(process, t) * gap).mean()}
        if options.denoising_weight:
            t = process.at(randint(0, process.timesteps, count, generator)).to(x_0.device)
            output = network(process.noised(x_0, eps, t), t, c).sample.float()
            denoising = F.mse_loss(output, process.target(x_0, eps, t))
            terms["denoising"] = options.denoising_weight * denoising
        return terms


def halved(process: Process, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x_0 whose DDIM step from x_t at t ends at x_s at s, [n, c, h, w] (alg. 2)."""
    ratio = process.sigma(s) / process.sigma(t)
    return (x_s - ratio * x_t) / (process.alpha(s) - ratio * process.alpha(t))
