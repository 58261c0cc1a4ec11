"""Distribution matching distillation: the student's samples follow the teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .discriminators import DenoiserCritic, softplus_critic
from .draws import randint
from .encoded import cached_samples
from .few_steps import few_step_scheduler
from .losses import noised_matching
from .process import Process, noise_like
from .rollout import renoised
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked, plain
from .witness import WEIGHT, Witness


class DMD(Method):
    """DMD2 (arXiv 2405.14867): no pairs, a fake score on a faster time scale, several steps.

    The student steps along x_0 of the fake score less x_0 of the guided teacher, both asked at a
    noised sample of its own (eq. 2). The fake score, at first a copy of the teacher, learns to
    denoise the student's samples, and takes ``fake_updates`` steps for one of the student's (sec.
    4.2): ``steps`` counts those, the student moves at every so many-th. What the student is given
    at its later steps is what its own sampler leads to (sec. 4.5), and the number of steps
    simulated is drawn once a batch.

    With ``gan_weight`` the fake score also judges samples and pictures, noised alike, by its
    innermost features (eq. 4), which a transformer has behind its middle block. The student keeps
    an `LCMScheduler` that stops where it was trained: 999, 749, 499, 249. One step at 399, the
    paper's one-step SDXL, is ``denoising_steps = 1`` with ``denoising_timestep = 400``. Of a flow
    (SD 3) it stops at even steps from noise alone, shifted as the teacher's: see
    `edgeflash/even_steps.py`. ``attribute_weight`` adds what a `Witness` says of the student's
    samples, as a reward (arXiv 2403.11027, sec. 4).

    A step of the fake score asks it once, and the student up to ``denoising_steps`` times, without
    gradients; one of the student asks it as often, at last with gradients, and fake score and
    guided teacher once each. In memory are teacher, student and fake score, a second trained
    network of the teacher's size; SD 1.5 took 26 hours of 64 A100. Published: FID 8.35 for SD 1.5
    at one step (COCO 2014, 30 k), 19.3 for SDXL at 4 (10 k), with the adversarial term.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of both AdamWs")
    clip_norm: float = Field(10.0, gt=0, description="largest gradient norm")
    denoising_steps: int = Field(4, ge=1, description="steps that the student is made for")
    denoising_timestep: int = Field(
        1000, ge=1, description="timesteps they divide evenly; the first step is at the last one"
    )
    fake_updates: int = Field(
        10, ge=1, description="steps of the fake score for one of the student; SDXL: 5"
    )
    real_guidance: float = Field(
        1.75, ge=1, description="the teacher's guidance scale; the paper's SDXL: 8"
    )
    t_min: float = Field(0.02, ge=0, lt=1, description="least noise to compare at, as share of T")
    t_max: float = Field(0.98, ge=0, lt=1, description="greatest noise to compare at")
    gan_weight: float = Field(
        0.0,
        ge=0,
        description="of the adversarial term: 1e-3 in the paper, more for small latents, over "
        "whose numbers the matching term is a mean; 0: no critic",
    )
    critic_weight: float = Field(1e-2, ge=0, description="of the critic's term in the fake's loss")
    attribute_weight: float = Field(0.0, ge=0, description=WEIGHT)

    @model_validator(mode="after")
    def _fits(self) -> DMD:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is greater than t_max {self.t_max}")
        if self.denoising_timestep % self.denoising_steps:
            raise ValueError(
                f"denoising_steps {self.denoising_steps} does not divide denoising_timestep "
                f"{self.denoising_timestep}"
            )
        return self

    def step_counts(self) -> range:
        return range(1, self.denoising_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        if self.denoising_timestep > process.timesteps:
            raise EdgeflashError(
                f"dmd.denoising_timestep: at most {process.timesteps} of this teacher's"
            )
        batch, nothing = cached_samples(shop)
        fake = shop.load(shop.teacher, shop.denoiser).train()
        witness = None
        if self.attribute_weight:
            witness = Witness.at(shop, "dmd", batch(np.arange(1)), process)
        duel = Duel(
            options=self,
            teacher=shop.frozen(shop.teacher),
            fake=DenoiserCritic(fake).to(shop.device) if self.gan_weight else fake,
            student=shop.load(shop.student, shop.denoiser).train(),
            process=process,
            nothing=nothing,
            witness=witness,
        )

        return Stage(
            players=(witness.players() if witness else {})
            | {
                "fake": Player(duel.fake, duel.fake_loss),
                "student": Player(duel.student, duel.student_loss, every=self.fake_updates),
            },
            batch=batch,
            results={shop.denoiser: duel.student, "scheduler": self.scheduler(shop.teacher)},
            averages={shop.denoiser: average(duel.student, self.ema)} if self.ema else {},
        )

    def timesteps(self) -> range:
        """The levels of the student's steps, sec. 4.4: 999, 749, 499 and 249 by default."""
        stride = self.denoising_timestep // self.denoising_steps
        return range(self.denoising_timestep - 1, -1, -stride)

    def scheduler(self, teacher: Path) -> Any:
        """x_0, then fresh noise, at the student's own timesteps."""
        return few_step_scheduler(teacher, self.denoising_steps, first=self.denoising_timestep)


@dataclass(frozen=True)
class Duel:
    """The losses of student and fake score, who look at each other.

    ``fake`` is a denoiser, or a `DenoiserCritic` where the options weigh the adversarial term.
    """

    options: DMD
    teacher: Any
    fake: Any
    student: Any
    process: Process
    nothing: Tensor
    witness: Witness | None = None

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        c, process = batch["c"], self.process
        x_t, t = self.given(batch["x_0"], c, generator)
        x, _ = plain(network, process, x_t, t, c)
        terms = {"matching": self.matching(x, c, generator)}
        if self.options.gan_weight:
            t = process.at(randint(0, process.timesteps, len(x), generator)).to(x.device)
            x_t = process.noised(x, noise_like(x, generator), t)
            fooled = F.softplus(-self.fake(x_t, t, c).logits.float()).mean()
            terms["adversarial"] = self.options.gan_weight * fooled
        if self.witness:
            doubt = self.witness.doubt(x, batch["labels"], generator)
            terms["attributes"] = self.options.attribute_weight * doubt.mean()
        return terms

    def fake_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        """Denoising of samples (arXiv 2311.18828, eq. 6), weighed as in the teacher's training."""
        x_0, c, process, count = batch["x_0"], batch["c"], self.process, len(batch["x_0"])
        with torch.no_grad():
            clean, _ = plain(self.student, process, *self.given(x_0, c, generator), c)
        if self.options.gan_weight:  # samples and pictures in one call
            clean, c = torch.cat([clean, x_0]), torch.cat([c, c])
        t = process.at(randint(0, process.timesteps, len(clean), generator)).to(clean.device)
        eps = noise_like(clean, generator)
        told = network(process.noised(clean, eps, t), t, c)
        wanted = process.target(clean, eps, t)[:count]
        terms = {"denoising": F.mse_loss(told.sample[:count].float(), wanted)}
        if self.options.gan_weight:
            fake, real = told.logits.float().split(count)
            terms["critic"] = self.options.critic_weight * softplus_critic(real, fake)
        return terms

    def given(self, like: Tensor, c: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_t and t [n] as the student finds them at a step of its own, one for the whole batch."""
        ladder = self.process.at(torch.tensor(self.options.timesteps())).to(like.device)
        last = int(torch.randint(len(ladder), (1,), generator=generator))
        times = [t.expand(len(like)) for t in ladder[: last + 1]]
        x = renoised(
            lambda x, t: plain(self.student, self.process, x, t, c),
            self.process,
            noise_like(like, generator),
            times,
            generator,
        )
        return x, times[-1]

    def matching(self, x: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
        """Distribution matching of samples x, at t ~ U{t_min T .. t_max T} (sec. 3)."""
        options, process = self.options, self.process
        low, high = (round(share * process.timesteps) for share in (options.t_min, options.t_max))
        last = min(high, process.timesteps - 1)
        t = process.at(randint(low, last + 1, len(x), generator)).to(x.device)
        real = asked(self.teacher, process, c, self.nothing, options.real_guidance)
        fake = asked(self.fake, process, c, self.nothing)
        return noised_matching(x, t, real, fake, process, generator)
