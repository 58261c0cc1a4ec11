"""Imagine Flash: on its own way back from noise the student learns where the teacher would go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.noise_correction import MARK
from edgeflash.roles import Method

from .discriminators import FrozenCritic, hinge_critic
from .draws import randint
from .encoded import cached_samples
from .few_steps import ddim_scheduler, trailing
from .process import Process, noise_like
from .rollout import ddim, denoised
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked, plain


class Imagine(Method):
    """Imagine Flash (arXiv 2405.05224): backward distillation, shifted reconstruction, a critic.

    The student starts where its own sampler leads from pure noise, x_t, without gradients, so that
    it sees nothing of the data. Its x_0 there, noised to gamma(t), is where the teacher begins;
    ``teacher_steps`` DDIM steps later the teacher's x_0 is the target: |x_0 - x_0'|^2.

    The sampler's first step is noise-corrected: x_T itself stands in for the eps of x_T. Tables of
    edgeflash have that; the folder's DDIM, as stock pipelines run it, has not.

    Not published, and chosen here: gamma, whether its noise is fresh, the critic, guidance, and all
    weights, rates and steps. gamma is ``shift`` t / (1 + (``shift`` - 1) t), of t / T. With "own"
    noise, the eps that the student means, and ``shift = 1`` the teacher begins at x_t itself: no
    shift at all. A smaller one leaves later steps the finer details. On Gaussians "own" noise
    overstates the spread where gamma(t) is not t, and "fresh" noise without a critic ends in the
    mean. The critic, on frozen features of the teacher, is hinged as ADD's is (arXiv 2311.17042).

    A step asks the teacher ``teacher_steps`` times, and student and critic each ask the student up
    to ``denoising_steps`` times; in memory are both, and the critic's head. Published for Emu, with
    its authors' prompts: FID 40.4, 34.7 and 35.5 at 1, 2 and 3 steps, 35.7 for the teacher at 25;
    at 3 steps, without backward distillation 44.2, without the shift 45.9, without the critic 39.0,
    without noise correction 35.5.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of both AdamWs")
    denoising_steps: int = Field(3, ge=1, description="steps that the student is made for")
    teacher_steps: int = Field(4, ge=1, description="DDIM steps of the teacher to its target")
    guidance: float = Field(7.5, ge=1, description="the teacher's guidance scale, folded in")
    backward: bool = Field(True, description="start from the student's own steps, or noised data")
    shift: float = Field(0.5, gt=0, description="of the teacher's start; 1: none")
    renoise: Literal["own", "fresh"] = Field("own", description="noise of the teacher's start")
    noise_correction: bool = Field(True, description="of the sampler's first step")
    gan_weight: float = Field(0.1, ge=0, description="of the adversarial term; 0: no critic")

    def step_counts(self) -> range:
        return range(self.denoising_steps, self.denoising_steps + 1)

    def folds_guidance(self) -> bool:
        return True

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        if self.denoising_steps > process.timesteps:
            raise EdgeflashError(
                f"imagine.denoising_steps: at most {process.timesteps} of this teacher's timesteps"
            )
        batch, nothing = cached_samples(shop)
        teacher = shop.frozen(shop.teacher)
        lesson = Lesson(
            options=self,
            teacher=teacher,
            student=shop.load(shop.student, shop.denoiser).train(),
            critic=FrozenCritic(teacher).to(shop.device) if self.gan_weight else None,
            process=process,
            nothing=nothing,
        )
        players = {"student": Player(lesson.student, lesson.student_loss)}
        if lesson.critic:
            players["critic"] = Player(lesson.critic, lesson.critic_loss)
        return Stage(
            players=players,
            batch=batch,
            results={shop.denoiser: lesson.student, "scheduler": self.scheduler(shop.teacher)},
            averages={shop.denoiser: average(lesson.student, self.ema)} if self.ema else {},
        )

    def gamma(self, k: Tensor, timesteps: int) -> Tensor:
        """Levels int64 [n] at which the teacher begins, for the student's."""
        share = (k + 1) / timesteps
        shifted = self.shift * share / (1 + (self.shift - 1) * share)
        return ((shifted * timesteps).round().long() - 1).clamp(min=0)

    def scheduler(self, teacher: Path) -> Any:
        """DDIM with the teacher's noise, marked for noise correction."""
        scheduler = ddim_scheduler(teacher, self.denoising_steps)
        scheduler.register_to_config(**{MARK: self.noise_correction})
        return scheduler


@dataclass(frozen=True)
class Lesson:
    """The losses of student and critic."""

    options: Imagine
    teacher: Any
    student: Any
    critic: Any
    process: Process
    nothing: Tensor

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        c, options = batch["c"], self.options
        x_t, k = self.start(batch["x_0"], c, generator)
        x, eps = plain(network, self.process, x_t, self.process.at(k), c)
        if options.renoise == "fresh":
            eps = noise_like(x, generator)
        wanted = self.target(x.detach(), eps.detach(), options.gamma(k, self.process.timesteps), c)
        terms = {"reconstruction": F.mse_loss(x, wanted)}
        if options.gan_weight:
            judged = self.critic(*self.noised(x, generator), c)
            terms["adversarial"] = -options.gan_weight * judged.mean()
        return terms

    def critic_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c = batch["x_0"], batch["c"]
        with torch.no_grad():
            x_t, k = self.start(x_0, c, generator)
            x, _ = plain(self.student, self.process, x_t, self.process.at(k), c)
        both = self.noised(torch.cat([x_0, x]), generator)
        real, fake = network(*both, torch.cat([c, c])).chunk(2)
        return {"critic": hinge_critic(real, fake)}

    def start(self, x_0: Tensor, c: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_t of a step of the student's and its level [n], one step for the whole batch."""
        stops = trailing(self.process.timesteps, self.options.denoising_steps)
        last = int(torch.randint(self.options.denoising_steps, (1,), generator=generator))
        levels = [stop.to(x_0.device).expand(len(x_0)) for stop in stops[: last + 1]]
        times, noise = [self.process.at(k) for k in levels], noise_like(x_0, generator)
        if not self.options.backward:
            return self.process.noised(x_0, noise, times[-1]), levels[-1]
        return self.rollout(noise, times, c), levels[-1]

    @torch.no_grad()
    def rollout(self, noise: Tensor, times: list[Tensor], c: Tensor) -> Tensor:
        """x_t where the student's own sampler gets to from noise, by the steps between times."""
        ask = asked(self.student, self.process, c, self.nothing)
        if len(times) == 1 or not self.options.noise_correction:
            return ddim(ask, self.process, noise, times)
        x_0, _ = ask(noise, times[0])
        return ddim(ask, self.process, self.process.ddim(x_0, noise, times[1]), times[1:])

    def target(self, x: Tensor, eps: Tensor, gamma: Tensor, c: Tensor) -> Tensor:
        """The teacher's x_0 for samples x that it is given noised by eps to gamma, [n, c, h, w]."""
        ask = asked(self.teacher, self.process, c, self.nothing, self.options.guidance)
        x_t = self.process.noised(x, eps, self.process.at(gamma))
        return denoised(ask, self.process, x_t, gamma, self.options.teacher_steps)

    def noised(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples as the critic sees them, at any timestep."""
        t = self.process.at(randint(0, self.process.timesteps, len(x), generator)).to(x.device)
        return self.process.noised(x, noise_like(x, generator), t), t
