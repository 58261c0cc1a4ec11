"""Flash Diffusion: one step of the student for many of the teacher's, from a shifting start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .consistency import consistency
from .discriminators import FrozenCritic, least_squares_critic
from .draws import randint
from .encoded import cached_samples
from .few_steps import few_step_scheduler, trailing
from .losses import noised_matching
from .process import Process, noise_like
from .rollout import multistep
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked

RENOISED = (0.01, 0.25, 0.5, 0.75)  # where the critic looks, as shares of T


class Flash(Method):
    """Flash Diffusion (arXiv 2406.02347), with its authors' code for what the paper leaves open.

    f(x_t, t), LCM's consistency function (arXiv 2310.04378, eq. 9), follows the teacher's sample
    from the same x_t: guided DPM-Solver++ over what is left of ``teacher_steps``. Where a batch
    begins is drawn from a mixture of narrow bells, one at each step of the student. ``steps`` are
    cut into as many even phases as ``modes`` has rows, each a phase's shares of the bells, noisiest
    first: from late steps to all of them, and at last to pure noise.

    Distribution matching (arXiv 2311.18828, eq. 7) and a critic join from the second phase on. The
    student itself stands in for the fake score. The critic is a head on the teacher's frozen
    features and of least squares; it and the adversarial term take turns, a step each.

    The paper trains LoRA, this the whole student; its LPIPS, of decoded crops, is l2 of latents
    here. At pure noise a step asks the guided teacher 32 times, 18 on the mean of a run, and the
    guided teacher and the student once more for the matching; in memory are both, and the critic's
    head. Published for SD 1.5, LoRA, COCO 2014 (30 k): FID 12.41 at 4 steps, 12.27 at 2, in 26
    hours of an H100.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of both AdamWs")
    teacher_steps: int = Field(32, ge=1, description="steps of the teacher from pure noise, K")
    guidance_min: float = Field(3.0, ge=1, description="least guidance scale of the teacher, CFG's")
    guidance_max: float = Field(13.0, ge=1, description="greatest; one is drawn for each batch")
    distance: Literal["l2", "l1"] = Field("l2", description="from the teacher's sample")
    modes: tuple[tuple[float, ...], ...] = Field(
        ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2)),
        description="share of each step of the student's, noisiest first; a row a phase",
    )
    dmd_weights: tuple[float, ...] = Field(
        (0, 0.3, 0.5, 0.7), description="of the distribution matching, phase by phase"
    )
    gan_weights: tuple[float, ...] = Field(
        (0, 0.1, 0.2, 0.3),
        description="of the adversarial term; PixArt: 0, 0.05, 0.1, 0.2; SD 3: 0, 0.1, 0.3, 0.5",
    )

    @model_validator(mode="after")
    def _fits(self) -> Flash:
        if self.guidance_min > self.guidance_max:
            raise ValueError(
                f"guidance_min {self.guidance_min} is greater than guidance_max {self.guidance_max}"
            )
        if not len(self.modes) == len(self.dmd_weights) == len(self.gan_weights):
            raise ValueError("modes, dmd_weights and gan_weights must name as many phases")
        rows = {len(row) for row in self.modes}
        if len(rows) != 1 or any(min(row) < 0 or sum(row) <= 0 for row in self.modes if row):
            raise ValueError("modes: rows of one length, of shares from 0 on, and one above it")
        if not self.denoising_steps or self.teacher_steps % self.denoising_steps:
            raise ValueError(
                f"modes: {self.denoising_steps} a row do not divide teacher_steps "
                f"{self.teacher_steps}"
            )
        return self

    @property
    def denoising_steps(self) -> int:
        return len(self.modes[0]) if self.modes else 0

    def step_counts(self) -> range:
        return range(1, self.denoising_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        if self.teacher_steps > process.timesteps:
            raise EdgeflashError(
                f"flash.teacher_steps: at most {process.timesteps} of this teacher's timesteps"
            )
        batch, nothing = cached_samples(shop)
        teacher = shop.frozen(shop.teacher)
        lesson = Lesson(
            options=self,
            teacher=teacher,
            student=shop.load(shop.student, shop.denoiser).train(),
            critic=FrozenCritic(teacher).to(shop.device) if any(self.gan_weights) else None,
            process=process,
            nothing=nothing,
        )
        players = {"student": Player(lesson.student, lesson.student_loss)}
        if lesson.critic:
            players["critic"] = Player(lesson.critic, lesson.critic_loss, every=2)
        scheduler = few_step_scheduler(shop.teacher, self.denoising_steps)
        return Stage(
            players=players,
            batch=batch,
            results={shop.denoiser: lesson.student, "scheduler": scheduler},
            averages={shop.denoiser: average(lesson.student, self.ema)} if self.ema else {},
        )

    def phase(self, step: int) -> int:
        """Which of the even phases a step, counted from 0, falls into."""
        return min(step * len(self.modes) // self.steps, len(self.modes) - 1)

    def shares(self, phase: int) -> Tensor:
        """How probable it is to begin at each of the teacher's steps, [K], 0 the noisiest."""
        i = torch.arange(self.teacher_steps, dtype=torch.float64)
        stride = self.teacher_steps // self.denoising_steps
        bells = [(-(i - m * stride).square() / 0.5).exp() for m in range(self.denoising_steps)]
        mixed = torch.stack([b * bell for b, bell in zip(self.modes[phase], bells, strict=True)])
        return mixed.sum(0) / mixed.sum()

    def scale(self, generator: torch.Generator) -> float:
        """A guidance scale for one batch."""
        spread = self.guidance_max - self.guidance_min
        return self.guidance_min + spread * float(torch.rand((), generator=generator))


@dataclass(frozen=True)
class Lesson:
    """The losses of student and critic."""

    options: Flash
    teacher: Any
    student: Any
    critic: Any
    process: Process
    nothing: Tensor

    @property
    def stops(self) -> Tensor:
        """The timesteps of the teacher's steps, and the clean sample's, [K + 1]."""
        return self.process.at(trailing(self.process.timesteps, self.options.teacher_steps))

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        c, step, options = batch["c"], int(batch["step"]), self.options
        phase = options.phase(step)
        x_t, t, first = self.start(batch, generator)
        x = consistency(network, self.process, x_t, t, c)
        wanted = self.sample(x_t, first, c, options.scale(generator))
        distance = F.mse_loss if options.distance == "l2" else F.l1_loss
        terms = {"distillation": distance(x, wanted)}
        if weight := options.dmd_weights[phase]:
            terms["matching"] = weight * self.matching(x, c, generator)
        if (weight := options.gan_weights[phase]) and step % 2:
            judged = self.critic(*self.noised(x, generator), c)
            terms["adversarial"] = weight * (1 - judged.sigmoid()).square().mean()
        return terms

    def critic_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c = batch["x_0"], batch["c"]
        x_t, t, _ = self.start(batch, generator)
        with torch.no_grad():
            x = consistency(self.student, self.process, x_t, t, c)
        both = self.noised(torch.cat([x_0, x]), generator)
        real, fake = network(*both, torch.cat([c, c])).chunk(2)
        return {"critic": least_squares_critic(real, fake)}

    def start(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """x_t, t [n], and which of the teacher's steps that is: one for the whole batch."""
        x_0 = batch["x_0"]
        shares = self.options.shares(self.options.phase(int(batch["step"])))
        first = int(torch.multinomial(shares, 1, generator=generator))
        t = self.stops[first].to(x_0.device).expand(len(x_0))
        return self.process.as_sampled(x_0, noise_like(x_0, generator), t), t, first

    def sample(self, x: Tensor, first: int, c: Tensor, scale: float) -> Tensor:
        """Where the guided teacher gets to from x at its step number ``first``, [n, c, h, w]."""
        ask = asked(self.teacher, self.process, c, self.nothing, scale)
        times = [t.expand(len(x)) for t in self.stops[first:].to(x.device)]
        return multistep(ask, self.process, x, times)

    def matching(self, x: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
        """Distribution matching of samples x at any timestep; twice DMD's own half of a square."""
        process = self.process
        t = process.at(randint(0, process.timesteps, len(x), generator)).to(x.device)
        scale = self.options.scale(generator)
        real = asked(self.teacher, process, c, self.nothing, scale)
        fake = asked(self.student, process, c, self.nothing)
        return 2 * noised_matching(x, t, real, fake, process, generator)

    def noised(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples as the critic sees them, each at one of four timesteps."""
        stops = (torch.tensor(RENOISED) * self.process.timesteps).long()
        t = self.process.at(stops[randint(0, len(stops), len(x), generator)]).to(x.device)
        return self.process.noised(x, noise_like(x, generator), t), t
