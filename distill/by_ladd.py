"""Latent adversarial diffusion distillation: the teacher's own features tell real from made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import Transformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from pydantic import Field, model_validator
from torch import Tensor

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .draws import randn
from .encoded import cached_conditioning, cached_latents, sampled_latents
from .features import Taps
from .few_steps import estimate, few_step_scheduler, ladder
from .heads import Head, Heads, fooling, hinge
from .inner import across
from .process import Process, noise_like
from .stage import Batch, Player, Stage, Terms, Workshop, average

TIME_CHANNELS = 128  # of the noise level, as the heads are told it


class LADD(Method):
    """LADD (arXiv 2403.12015): hinge loss alone, by heads on the teacher's own features.

    The student is given a latent noised to one of its timesteps, and noise alone at the last, and
    makes x of it. x, and latents that the guided teacher made of the captions, are noised anew and
    shown to the frozen teacher; a head on each of its transformers, or on each block of the one
    that it is, tells the two apart, knowing the noise level and the caption's mean state. The level
    sigma / (alpha + sigma), which is t in the paper's rectified flow, is logit-normal: more noise,
    more of the composition is judged. With latents of the teacher's own the paper needs no
    distillation term; ``latents = "pictures"`` takes those of the data.

    The paper's student times 1, 0.75, 0.5 and 0.25 are shares of all timesteps here, where an
    `LCMScheduler` stops: 999, 749, 499 and 249, of levels 0.94, 0.80, 0.62 and 0.41. On a flow they
    are the paper's, shifted as the teacher's steps are, with SD 3's shift to 1, 0.9, 0.75 and 0.5:
    see `edgeflash/even_steps.py`.

    The paper's hyperparameters were not found; the defaults are those of a public re-implementation
    (Z-Image, 6 B), except guidance and solver. It blames its collapse on one sample a batch: take
    more. ``steps`` counts those of the heads. Their step asks the student once and the teacher on
    twice the batch, without gradients; the student's both, with gradients. The teacher's latents
    cost 2 x ``solver_steps`` calls a caption, once. In memory are both, and the heads. Published:
    SD3-Turbo (8 B), four unguided steps, compared with others by people; no FID was found.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of the student")
    critic_learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of the heads")
    critic_updates: int = Field(5, ge=1, description="steps of the heads for one of the student")
    latents: Literal["synthetic", "pictures"] = Field(
        "synthetic", description="what is real: the guided teacher's latents, or the data's"
    )
    guidance: float = Field(7.5, ge=1, description="of the teacher when it makes latents")
    solver_steps: int = Field(25, ge=1, description="DDIM steps of the teacher to a latent")
    shares: tuple[float, ...] = Field(
        (0.7, 0.1, 0.1, 0.1), description="how often each student timestep is drawn, noisiest first"
    )
    first_shares: tuple[float, ...] = Field(
        (0.0, 0.0, 0.5, 0.5), description="the same at the beginning, where the task shall be easy"
    )
    first_steps: int = Field(500, ge=0, description="steps that first_shares are for")
    noise_mean: float = Field(1.0, description="m, of the noise level's logit")
    noise_std: float = Field(1.0, gt=0, description="s, of the noise level's logit")
    head_width: int = Field(256, ge=1, description="channels of every head")

    @model_validator(mode="after")
    def _fits(self) -> LADD:
        if len(self.shares) != len(self.first_shares):
            raise ValueError(f"{len(self.shares)} shares but {len(self.first_shares)} first_shares")
        for shares in (self.shares, self.first_shares):
            if min(shares, default=0) < 0 or sum(shares) <= 0:
                raise ValueError(f"shares {shares}: none below 0, and not all 0")
        return self

    def step_counts(self) -> range:
        return range(1, len(self.shares) + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        times = ladder(process, len(self.shares), "ladd.shares")
        teacher = shop.frozen(shop.teacher)
        texts = conditioning, nothing = cached_conditioning(shop)
        if self.latents == "pictures":
            latents = cached_latents(shop)
        else:
            latents = sampled_latents(
                shop, teacher, process, texts, guidance=self.guidance, steps=self.solver_steps
            )
        seen, widths = transformers(teacher)
        told = TIME_CHANNELS + nothing.shape[-1]
        heads = [Head(width, told, self.head_width, dims=2) for width in widths]
        duel = Duel(
            options=self,
            teacher=teacher,
            taps=Taps(seen, which=-1),  # text and picture, where transformers put out both
            student=shop.load(shop.student, shop.denoiser).train(),
            heads=Heads(heads).to(shop.device),
            process=process,
            times=times,
        )

        def batch(indices: np.ndarray) -> Batch:
            return {"x_0": latents(indices), "c": conditioning(indices)}

        return Stage(
            players={
                "critic": Player(duel.heads, duel.critic_loss, self.critic_learning_rate),
                "student": Player(duel.student, duel.student_loss, every=self.critic_updates),
            },
            batch=batch,
            results={
                shop.denoiser: duel.student,
                "scheduler": few_step_scheduler(shop.teacher, len(self.shares)),
            },
            averages={shop.denoiser: average(duel.student, self.ema)} if self.ema else {},
        )

    def shares_at(self, step: int) -> Tensor:
        """How often each student timestep is drawn after so many steps."""
        return torch.tensor(self.first_shares if step < self.first_steps else self.shares)

    def levels(self, count: int, process: Process, generator: torch.Generator) -> Tensor:
        """Timesteps [count] of logit-normal levels sigma / (alpha + sigma)."""
        logits = self.noise_mean + self.noise_std * randn((count,), generator)
        alpha, sigma = process.abar.sqrt(), (1 - process.abar).sqrt()
        k = torch.searchsorted(sigma / (alpha + sigma), logits.sigmoid().to(alpha.device))
        return process.at(k.clamp(max=process.timesteps - 1))  # there is no more noise than there


def transformers(denoiser: Any) -> tuple[Sequence[Any], list[int]]:
    """What heads are put on, and its widths: a UNet's transformers, or a transformer's blocks.

    Raises:
        EdgeflashError: it has none.
    """
    if blocks := getattr(denoiser, "transformer_blocks", None):
        config = denoiser.config
        return blocks, [config.num_attention_heads * config.attention_head_dim] * len(blocks)
    found = [module for module in denoiser.modules() if isinstance(module, Transformer2DModel)]
    if not found:
        raise EdgeflashError(
            "method 'ladd' puts heads on transformers: the teacher's UNet has none"
        )
    return found, [transformer.config.in_channels for transformer in found]


@dataclass(frozen=True)
class Duel:
    """The losses of student and heads."""

    options: LADD
    teacher: Any
    taps: Taps
    student: Any
    heads: Heads
    process: Process
    times: Tensor

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x, c = self.made(network, batch, generator), batch["c"]
        t = self.options.levels(len(x), self.process, generator)
        scores = self.heads(self.features(x, t, c, generator), told(t, c))
        return {"adversarial": fooling(scores)}

    def critic_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, count = batch["x_0"], batch["c"], len(batch["x_0"])
        t = self.options.levels(count, self.process, generator)
        with torch.no_grad():
            both = torch.cat([x_0, self.made(self.student, batch, generator)])
            maps = self.features(both, t.repeat(2), torch.cat([c, c]), generator)
        # Each in a call of its own: a batch norm must not see real and made together.
        real = network([features[:count] for features in maps], told(t, c))
        fake = network([features[count:] for features in maps], told(t, c))
        return {"hinge": hinge(real, fake)}

    def made(self, network: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """x, at timesteps drawn as the options say."""
        shares = self.options.shares_at(int(batch["step"]))
        return estimate(network, self.process, batch, self.times, shares, generator)

    def features(self, x: Tensor, t: Tensor, c: Tensor, generator: torch.Generator) -> list[Tensor]:
        """What the teacher's transformers make of latents x noised to t, [n, w, h, w] each."""
        self.teacher(self.process.noised(x, noise_like(x, generator), t), t, c)
        return [across(tokens, x) for tokens in self.taps.outputs]


def told(t: Tensor, c: Tensor) -> Tensor:
    """The heads' condition [n, e]: noise level and the caption's mean state."""
    return torch.cat([get_timestep_embedding(t, TIME_CHANNELS), c.mean(1)], 1)
