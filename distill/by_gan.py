"""Diffusion2GAN: noise and the picture that the teacher makes of it, learnt as a translation."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgeflash.roles import Method

from .discriminators import softplus_critic
from .draws import rand, randint, randn, rows
from .encoded import cached_conditioning, latent_shape, noise_of, sampled_latents
from .few_steps import few_step_scheduler
from .heads import Head, Heads
from .inner import EncoderHalf, across, encoder_blocks, encoder_taps
from .process import Process
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import plain

SCALE_STD, ASPECT_STD, SHIFT_STD = 0.2, 0.2, 0.125  # of StyleGAN2-ADA (arXiv 2006.06676, app. B)


class Diffusion2GAN(Method):
    """Diffusion2GAN (arXiv 2405.05967): G(z, c) follows the x that the teacher's ODE makes of z.

    The regression is a perceptual distance of latents under random augmentations, the same of both,
    which leave no blind spots to end in (E-LatentLPIPS). The paper trains a VGG on latents for it,
    of Stable Diffusion's own; here the frozen teacher's encoder at t = 0 is what sees: each block's
    output, of unit length at every place (arXiv 1801.03924, eq. 1, all channels alike). Of PixArt
    the encoder is the first half of the blocks.

    The critic begins as the teacher's encoder too, has heads at every block, and is also shown z,
    through a convolution that begins at zero. Besides (x, z, c) against (G, z, c) it learns that x
    under another caption is wrong. Every ``r1_every`` steps, R1 on one sample of the batch. Where
    R1 is lazy (arXiv 1912.04958, app. B) it counts ``r1_every``-fold, to be as strong as if it came
    at every step. Here ``r1_weight`` is what counts at its turn: no published weight is there to
    be kept.

    The weights of the adversarial term and of R1, the heads and the rates were not found: these are
    ours. A step asks student and features twice each, the critic four times; pairs cost 2 x
    ``solver_steps`` calls a caption, once. In memory are teacher and student, and a critic of half
    that size. Published for SD 1.5 at one step: FID 9.29 (COCO 2014, 30 k), with 12 M pairs of
    guidance 8; of the distances alone MSE 110.6, pseudo-Huber 87.6, without augmentations 67.2,
    with them 23.0.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of both AdamWs")
    solver_steps: int = Field(50, ge=1, description="DDIM steps of the teacher to a picture")
    guidance: float = Field(8.0, ge=1, description="the teacher's guidance scale, folded in")
    augmented: bool = Field(True, description="turn, stretch, shift and cut what is compared")
    adversarial_weight: float = Field(0.5, ge=0, description="of the critic's say; 0: no critic")
    r1_weight: float = Field(1.0, ge=0, description="gamma / 2, of R1, when it is its turn")
    r1_every: int = Field(16, ge=1, description="steps from one R1 to the next")
    head_width: int = Field(64, ge=1, description="channels of every head of the critic")

    def step_counts(self) -> range:
        return range(1, 2)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        teacher = shop.frozen(shop.teacher)
        texts = conditioning, nothing = cached_conditioning(shop)
        pictures = sampled_latents(
            shop, teacher, process, texts, guidance=self.guidance, steps=self.solver_steps
        )
        shape = latent_shape(shop)
        critic = None
        if self.adversarial_weight:
            denoiser = shop.load(shop.teacher, shop.denoiser).train()
            critic = PairCritic(denoiser, self.head_width).to(shop.device)
        student = shop.load(shop.student, shop.denoiser).train()
        lesson = Lesson(self, student, critic, Sight(teacher, nothing), process)

        def batch(rows: np.ndarray) -> Batch:
            return {"z": noise_of(rows, shape), "x": pictures(rows), "c": conditioning(rows)}

        players = {"critic": Player(critic, lesson.critic_loss)} if critic else {}
        return Stage(
            players=players | {"student": Player(student, lesson.student_loss)},
            batch=batch,
            results={shop.denoiser: student, "scheduler": few_step_scheduler(shop.teacher, 1)},
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
        )


class Sight:
    """What the teacher's encoder sees in clean latents, without a caption."""

    def __init__(self, denoiser: Any, nothing: Tensor) -> None:
        self.half, self.nothing = EncoderHalf(denoiser), nothing
        self.taps = encoder_taps(denoiser, encoder_blocks(denoiser)[0])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Of latents [n, c, h, w]: mean square of what differs in unit features, over blocks."""
        with torch.no_grad():
            wanted = [F.normalize(layer.float(), dim=1) for layer in self(b)]
        found = [F.normalize(layer.float(), dim=1) for layer in self(a)]
        gaps = [
            (one - other).square().sum(1).mean() for one, other in zip(found, wanted, strict=True)
        ]
        return torch.stack(gaps).mean()

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The latents themselves, and every block's output."""
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.half(x, t, self.nothing.expand(len(x), -1, -1))
        return [x, *(across(tokens, x) for tokens in self.taps.outputs)]


class PairCritic(nn.Module):
    """A denoiser's first half with a head at every block; also sees the noise of a latent."""

    def __init__(self, denoiser: Any, width: int) -> None:
        super().__init__()
        channels = denoiser.config.in_channels
        self.encoder = EncoderHalf(denoiser)
        self.noise = nn.Conv2d(channels, channels, 1)
        for parameter in self.noise.parameters():
            nn.init.zeros_(parameter)
        blocks, widths = encoder_blocks(denoiser)
        self.taps = encoder_taps(denoiser, blocks)
        self.heads = Heads([Head(features, 0, width, dims=2) for features in widths])

    def forward(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """Scores [n, places] of latents and their noise [n, c, h, w] under c [n, s, d]."""
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.encoder(x + self.noise(z), t, c)
        maps = [across(tokens, x) for tokens in self.taps.outputs]
        return torch.cat(self.heads(maps, None), 1)


@dataclass(frozen=True)
class Lesson:
    """The losses of student and critic."""

    options: Diffusion2GAN
    student: Any
    critic: Any
    sight: Sight
    process: Process

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x, z, c = batch["x"], batch["z"], batch["c"]
        made = self.made(network, z, c)
        both = torch.cat([made, x])
        if self.options.augmented:
            both = augmented(both, generator)
        terms = {"distance": self.sight.distance(*both.chunk(2))}
        if self.critic is not None:
            said = F.softplus(-self.critic(made, z, c)).mean()
            terms["adversarial"] = self.options.adversarial_weight * said
        return terms

    def critic_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x, z, c = batch["x"], batch["z"], batch["c"]
        with torch.no_grad():
            made = self.made(self.student, z, c)
        terms = {"critic": softplus_critic(network(x, z, c), network(made, z, c))}
        if len(x) > 1:
            terms["captions"] = F.softplus(network(x, z, c.roll(1, 0))).mean()
        if self.options.r1_weight and int(batch["step"]) % self.options.r1_every == 0:
            one = int(torch.randint(len(x), (), generator=generator))
            terms["r1"] = self.options.r1_weight * r1(network, *(v[one, None] for v in (x, z, c)))
        return terms

    def made(self, network: Any, z: Tensor, c: Tensor) -> Tensor:
        """G(z, c) [n, c, h, w]: one step from noise alone."""
        last = torch.full((len(z),), self.process.timesteps - 1, device=z.device)
        x, _ = plain(network, self.process, z, last, c)
        return x


def r1(critic: Any, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
    """|gradient of the mean score by x|^2, mean over samples (arXiv 1801.04406, eq. 9)."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        scores = critic(x, z, c).mean(1)
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def augmented(both: Tensor, generator: torch.Generator) -> Tensor:
    """Two halves [2 n, c, h, w], mirrored, turned, stretched, shifted and cut alike."""
    count = len(both) // 2
    ways = affine(count, generator).to(both).repeat(2, 1, 1)
    grid = F.affine_grid(ways, list(both.shape), align_corners=False)
    moved = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    return moved * window(count, both.shape[2:], generator).to(both).repeat(2, 1, 1, 1)


def affine(count: int, generator: torch.Generator) -> Tensor:
    """Random maps [count, 2, 3]: mirror, any angle, scale, aspect and shift, as StyleGAN2-ADA's."""
    angle = 2 * pi * rand(count, generator)
    mirror = randint(0, 2, count, generator) * 2.0 - 1
    normal = rows(lambda n: torch.randn(2, n, generator=generator).T, count, generator)
    scale, aspect = normal.T * torch.tensor([[SCALE_STD], [ASPECT_STD]])
    shift = 2 * SHIFT_STD * randn((count, 2), generator)
    across, down = mirror * 2 ** (scale + aspect), 2 ** (scale - aspect)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([cos * across, -sin * down, sin * across, cos * down], 1)
    return torch.cat([turned.view(count, 2, 2), shift[:, :, None]], 2)


def window(count: int, sides: torch.Size, generator: torch.Generator) -> Tensor:
    """Ones [count, 1, h, w] with a square of half the side, anywhere, cut out as zeros."""
    both = rows(lambda n: torch.rand(2, n, generator=generator).T, count, generator)
    centre = both.T[:, :, None]
    near = [
        ((torch.arange(side) + 0.5) / side - at).abs() < 0.25
        for side, at in zip(sides, centre, strict=True)
    ]
    cut: Tensor = near[0][:, :, None] & near[1][:, None]
    return 1 - cut[:, None].float()
