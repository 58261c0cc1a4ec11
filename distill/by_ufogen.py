"""UFOGen: a diffusion GAN that is made for one step, and needs no teacher beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from edgeflash.roles import Method

from .discriminators import EncoderCritic, softplus_critic
from .draws import randint
from .encoded import cached_samples
from .few_steps import few_step_scheduler, ladder
from .process import Process, noise_like
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import plain


class UFOGen(Method):
    """UFOGen (arXiv 2311.09257): L = -log D(x'_u, u) + gamma_t |x_0 - x'|^2.

    The student makes x' of a latent x_0 noised to t. A critic tells x' from x_0, both noised anew
    to u = max(t - T / N, 0): by the forward process, and not by a posterior as in DDGAN (arXiv
    2112.07804). That, and the reconstruction of x_0 in place of x_u, is what lets it sample in one
    step. gamma is constant, or "kl", (1 - beta_t) abar_u / (2 beta_t) with 1 - beta_t = abar_t /
    abar_u, where the second term is SIDDM's KL divergence (arXiv 2306.12511) but for its unit:
    |.|^2 is a mean over elements. The student keeps an `LCMScheduler` with steps at 999, 749, 499
    and 249.

    The teacher is where student and critic begin, and is not asked again. The critic is the first
    half of it with one logit; the authors' ImageNet code takes a whole network with many. Its
    clamped logits, learning rates, betas, turns and average are the defaults; what the paper trains
    Stable Diffusion with was not found. A step asks the student and the critic once, both with
    gradients, and every second step once more, the critic then on twice the batch; both lie in
    memory, with an average of the student. Published for SD 1.5 at one step: FID 22.5, CLIP 0.311
    (COCO 2017, 5 k), FID 12.78 (COCO 2014, 30 k).
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    conditioned: ClassVar[bool] = True

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of both AdamWs")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    segments: int = Field(4, ge=1, description="N: the critic sees T / N less noise; and steps")
    critic_every: int = Field(2, ge=1, description="the critic learns at every so many steps")
    adversarial_weight: float = Field(1.0, gt=0, description="of the critic's say")
    reconstruction_weight: float = Field(1.0, ge=0, description="of |x_0 - x'|^2; 0: a GAN alone")
    gamma: Literal["constant", "kl"] = Field("constant", description="the same over t")
    logit_clamp: float = Field(
        0.5, gt=0, description="logits further on the right side than this teach nothing"
    )

    def step_counts(self) -> range:
        return range(1, self.segments + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        ladder(process, self.segments, "ufogen.segments")  # where it will sample
        batch, _ = cached_samples(shop)
        critic = EncoderCritic(shop.load(shop.teacher, shop.denoiser).train()).to(shop.device)
        student = shop.load(shop.student, shop.denoiser).train()
        duel = Duel(self, student, critic, process)

        return Stage(
            players={
                "critic": Player(
                    critic, duel.critic_loss, every=self.critic_every, betas=(0.0, 0.999)
                ),
                "student": Player(student, duel.student_loss),
            },
            batch=batch,
            results={
                shop.denoiser: student,
                "scheduler": few_step_scheduler(shop.teacher, self.segments),
            },
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
        )

    def draws(self, process: Process, count: int, generator: torch.Generator) -> Tensor:
        """t and u, int64 [2, count]: t uniform but never 0, u a segment below it, or 0."""
        t = randint(1, process.timesteps, count, generator)
        u = (t - process.timesteps // self.segments).clamp(min=0)
        return torch.stack([t, u]).to(process.abar.device)

    def weight(self, process: Process, t: Tensor, u: Tensor) -> Tensor:
        """gamma_t, [n, 1, 1, 1]."""
        if self.gamma == "constant":
            return torch.ones_like(process.alpha(t))
        abar_t, abar_u = process.abar[t], process.abar[u]
        return (abar_t * abar_u / (2 * (abar_u - abar_t)))[:, None, None, None]


@dataclass(frozen=True)
class Duel:
    """The losses of student and critic."""

    options: UFOGen
    student: Any
    critic: Any
    process: Process

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        options, x_0, c = self.options, batch["x_0"], batch["c"]
        x, t, u = self.made(network, x_0, c, generator)
        x_u = self.process.noised(x, noise_like(x, generator), u)
        logits = self.critic(x_u, u, c).clamp(max=options.logit_clamp)
        terms = {"adversarial": options.adversarial_weight * F.softplus(-logits).mean()}
        if options.reconstruction_weight:
            gaps = options.weight(self.process, t, u) * (x_0 - x).square()
            terms["reconstruction"] = options.reconstruction_weight * gaps.mean()
        return terms

    def critic_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, clamp = batch["x_0"], batch["c"], self.options.logit_clamp
        with torch.no_grad():
            x, _, u = self.made(self.student, x_0, c, generator)
        both, u = torch.cat([x_0, x]), u.repeat(2)
        x_u = self.process.noised(both, noise_like(both, generator), u)
        real, fake = network(x_u, u, torch.cat([c, c])).chunk(2)
        return {"critic": softplus_critic(real.clamp(max=clamp), fake.clamp(min=-clamp))}

    def made(
        self, network: Any, x_0: Tensor, c: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x', and the t and u [n] that were drawn for it."""
        t, u = self.options.draws(self.process, len(x_0), generator)
        x_t = self.process.noised(x_0, noise_like(x_0, generator), t)
        x, _ = plain(network, self.process, x_t, t, c)
        return x, t, u
