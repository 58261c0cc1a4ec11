"""Adversarial diffusion distillation: a critic on a frozen network's features, and a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .draws import randint
from .encoded import cached_conditioning, cached_latents, conditioning_of, unscaled
from .features import Sees, encoder_features, judge_features, vision_features
from .few_steps import estimate, few_step_scheduler, ladder
from .heads import Head, Heads, fooling, hinge, r1
from .judge import load_judge
from .process import Process, noise_like
from .rollout import denoised
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked, plain

NFSD_PROMPT = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
    "low-resolution, gloomy"
)


class ADD(Method):
    """ADD (arXiv 2311.17042): L = L_adv + lambda L_distill (eq. 1), in pixels.

    The student is given a latent noised to one of N timesteps, and noise alone at the last, and
    makes x of it. L_adv is what heads on the features of a frozen network say of x's decoding (eq.
    2); they learn by hinge loss, with R1 on the features (eq. 3). L_distill = c(t) |x - x_psi|^2,
    x_psi what the guided teacher sees in x noised anew (eq. 4): c = alpha_t ("exponential"), or
    alpha_t sigma_t / 2, whose gradient in latents is that of SDS with w = sigma_t^2 (arXiv
    2209.14988); "nfsd" leaves the noise out of that gradient (arXiv 2310.17590). |.|^2 is a mean
    over elements. Student and sampler (`LCMScheduler`) stop at 999, 749, 499 and 249; Stability's
    demo of the published weights takes ancestral Euler steps from 999, 899, 799 and 699.

    The paper's features are those of DINOv2 ViT-S, ``features = "facebook/dinov2-small"``, and its
    conditions CLIP ViT-g's text and DINOv2 ViT-L's picture embedding; here they are the student's
    own text states and the feature network's own embedding. "encoder", the teacher's autoencoder,
    is at hand for every teacher. "judge", made for the shapes, must not then also score them.

    A step makes x twice and decodes three times, once each with gradients, asks the teacher twice
    the batch, and the feature network four times; all of them lie in memory. Published at one step
    for SD 1.5, COCO 2017, 5 k, 512 px: FID 19.7, CLIP 0.326; for SD 2.1 20.6 and 0.319, of L_adv
    alone 20.8 and 0.315, of L_distill alone 315.6 and 0.076. Learning rates and the teacher's
    guidance were not found.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    flows: ClassVar[bool] = True

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of the student")
    critic_learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of the heads")
    student_steps: int = Field(4, ge=1, description="N: timesteps that the student is trained at")
    adversarial_weight: float = Field(1.0, ge=0, description="of L_adv; 0: no critic")
    distill_weight: float = Field(2.5, ge=0, description="lambda, of L_distill")
    features: str = Field(
        "encoder",
        description="what the heads see: 'encoder' (the teacher's autoencoder), 'judge' (the "
        "embedded judge of the shapes), or a vision transformer's folder or hub id",
    )
    condition: Literal["none", "text", "image", "both"] = Field(
        "both", description="what the heads are told of a picture"
    )
    r1_weight: float = Field(1e-5, ge=0, description="gamma, of R1; in the heads' loss")
    weighting: Literal["exponential", "sds", "nfsd"] = Field(
        "exponential", description="of L_distill over t; the paper's final models: nfsd"
    )
    distance: Literal["pixels", "latents"] = Field("pixels", description="where L_distill is taken")
    guidance: float = Field(7.5, ge=1, description="the teacher's guidance scale; NFSD's s")
    teacher_steps: int = Field(1, ge=1, description="DDIM steps of the teacher to x_psi")
    negative_prompt: str = Field(NFSD_PROMPT, description="of nfsd")

    @model_validator(mode="after")
    def _fits(self) -> ADD:
        if not self.adversarial_weight and not self.distill_weight:
            raise ValueError("adversarial_weight and distill_weight are both 0: nothing to learn")
        if self.weighting == "nfsd" and (self.distance == "pixels" or self.teacher_steps > 1):
            raise ValueError(
                "weighting 'nfsd' is a gradient on latents at one step: set distance = 'latents' "
                "and teacher_steps = 1"
            )
        return self

    def step_counts(self) -> range:
        return range(1, self.student_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        times = ladder(process, self.student_steps, "add.student_steps")
        latents, (conditioning, nothing) = cached_latents(shop), cached_conditioning(shop)
        sees, nfsd = self.feature_network(shop), self.weighting == "nfsd"
        decoder = shop.load(shop.student, "vae").requires_grad_(False)
        del decoder.encoder
        duel = Duel(
            options=self,
            teacher=shop.frozen(shop.teacher),
            student=shop.load(shop.student, shop.denoiser).train(),
            heads=self.heads(sees, shop, nothing.shape[-1]),
            sees=sees,
            decode=lambda z: decoder.decode(unscaled(z, decoder)).sample.float(),
            process=process,
            times=times,
            nothing=nothing,
            negative=conditioning_of(shop, self.negative_prompt) if nfsd else nothing,
        )

        def batch(indices: np.ndarray) -> Batch:
            pictures = shop.store.pictures(indices)
            return {"x_0": latents(indices), "c": conditioning(indices), "pictures": pictures}

        critic = Player(duel.heads, duel.critic_loss, self.critic_learning_rate)
        players = {"critic": critic} if self.adversarial_weight else {}
        players["student"] = Player(duel.student, duel.student_loss)
        return Stage(
            players=players,
            batch=batch,
            results={
                shop.denoiser: duel.student,
                "scheduler": few_step_scheduler(shop.teacher, self.student_steps),
            },
            averages={shop.denoiser: average(duel.student, self.ema)} if self.ema else {},
        )

    def feature_network(self, shop: Workshop) -> Sees:
        """What the heads see, frozen.

        Raises:
            EdgeflashError: a network that is not there, or not made for these data.
        """
        assert shop.teacher
        if self.features == "judge":
            if shop.store.labels is None:
                raise EdgeflashError("add.features: 'judge' knows the shapes alone; name another")
            return judge_features(load_judge().requires_grad_(False).to(shop.device))
        if self.features == "encoder":
            config = shop.teacher / "vae" / "config.json"
            if (kind := json.loads(config.read_text())["_class_name"]) != "AutoencoderKL":
                raise EdgeflashError(f"add.features: 'encoder' is no {kind}'s: name another")
            return encoder_features(shop.load(shop.teacher, "vae").requires_grad_(False))
        return vision_features(self.features, shop.device)

    @torch.no_grad()
    def heads(self, sees: Sees, shop: Workshop, text: int) -> Heads:
        """A head on each feature map; ``text``: width of the conditioning."""
        maps, embedding = sees(shop.store.pictures(np.arange(1)).to(shop.device))
        told = {"text": text, "image": embedding.shape[1]}
        width = sum(told.values()) if self.condition == "both" else told.get(self.condition, 0)
        heads = Heads([Head(m.shape[1], width, m.shape[1], dims=1) for m in maps])
        return heads.to(shop.device)

    def weight(self, process: Process, t: Tensor) -> Tensor:
        """c(t), [n, 1, 1, 1]; SDS and NFSD: alpha w / (2 sigma) with w = sigma^2."""
        if self.weighting == "exponential":
            return process.alpha(t)
        return process.alpha(t) * process.sigma(t) / 2


@dataclass(frozen=True)
class Duel:
    """The losses of student and heads."""

    options: ADD
    teacher: Any
    student: Any
    heads: Heads
    sees: Sees
    decode: Callable[[Tensor], Tensor]
    process: Process
    times: Tensor
    nothing: Tensor
    negative: Tensor

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        options, c = self.options, batch["c"]
        x = self.made(network, batch, generator)
        picture = self.decode(x)
        terms: Terms = {}
        if options.adversarial_weight:
            with torch.no_grad():
                _, embedding = self.sees(batch["pictures"])
            maps, _ = self.sees(picture)
            fooled = fooling(self.heads(maps, self.told(c, embedding)))
            terms["adversarial"] = options.adversarial_weight * fooled
        if options.distill_weight:
            gap = self.distillation(x, picture, c, generator)
            terms["distillation"] = options.distill_weight * gap
        return terms

    def critic_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        with torch.no_grad():
            x = self.made(self.student, batch, generator)
            fake_maps, _ = self.sees(self.decode(x))
            real_maps, embedding = self.sees(batch["pictures"])
        told = self.told(batch["c"], embedding)
        real_maps = [features.requires_grad_() for features in real_maps]
        real, fake = network(real_maps, told), network(fake_maps, told)
        terms = {"hinge": hinge(real, fake)}
        if self.options.r1_weight:
            terms["r1"] = self.options.r1_weight * r1(real, real_maps)
        return terms

    def made(self, network: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """x, at timesteps drawn with equal odds."""
        shares = torch.ones(len(self.times))
        return estimate(network, self.process, batch, self.times, shares, generator)

    def told(self, c: Tensor, embedding: Tensor) -> Tensor | None:
        """The heads' condition [n, e]: the caption's mean state, the real picture's embedding."""
        parts = {"text": c.mean(1), "image": embedding}
        kinds = list(parts) if self.options.condition == "both" else [self.options.condition]
        chosen = [parts[kind] for kind in kinds if kind in parts]
        return torch.cat(chosen, 1) if chosen else None

    def distillation(
        self, x: Tensor, picture: Tensor, c: Tensor, generator: torch.Generator
    ) -> Tensor:
        """L_distill (eq. 4) of samples x, or of the pictures that they were decoded to."""
        k = randint(0, self.process.timesteps, len(x), generator).to(x.device)
        t = self.process.at(k)
        with torch.no_grad():
            x_t = self.process.noised(x, noise_like(x, generator), t)
            wanted = self.wanted(x, x_t, k, c)
            if self.options.distance == "pixels":
                wanted = self.decode(wanted)
        ours = picture if self.options.distance == "pixels" else x
        return (self.options.weight(self.process, t) * (ours - wanted).square()).mean()

    def wanted(self, x: Tensor, x_t: Tensor, k: Tensor, c: Tensor) -> Tensor:
        """x_psi of x_t at level k, without gradients; NFSD's is a step against its direction."""
        options, process = self.options, self.process
        if options.weighting == "nfsd":
            t = process.at(k)
            alpha = process.alpha(t).clamp(min=1e-4)  # where it is 0, so is c(t)
            return x - process.sigma(t) / alpha * self.nfsd(x_t, k, c)
        ask = asked(self.teacher, process, c, self.nothing, options.guidance)
        return denoised(ask, process, x_t, k, options.teacher_steps)

    def nfsd(self, x_t: Tensor, k: Tensor, c: Tensor) -> Tensor:
        """delta_D + s delta_C (arXiv 2310.17590), which stand in for SDS's eps_psi - eps'."""
        texts = torch.cat([c, self.nothing.expand_as(c), self.negative.expand_as(c)])
        t = self.process.at(k).repeat(3)
        _, eps = plain(self.teacher, self.process, x_t.repeat(3, 1, 1, 1), t, texts)
        with_c, without, bad = eps.chunk(3)
        quiet = (k < self.process.timesteps // 5)[:, None, None, None]  # little noise is in x_t
        delta_d = torch.where(quiet, without, without - bad)
        return delta_d + self.options.guidance * (with_c - without)
