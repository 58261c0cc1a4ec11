"""Trains a ControlNet beside a denoiser that stays as it is: pictures drawn along given edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.control import CALLED, NAME
from edgeflash.errors import EdgeflashError
from edgeflash.networks_control import attach, beside
from edgeflash.roles import Method
from edgeflash.student import Student

from .by_blocks import feature_pairs
from .draws import rand, randint
from .encoded import cached_samples
from .features import Taps
from .process import noise_like
from .seen import dropped
from .stage import Batch, Player, Stage, Terms, Workshop, average


class Control(Method):
    """ControlNet (arXiv 2302.05543, eq. 5): denoising, of pictures whose edges it sees.

    It begins as the UNet's way down, giving zeros, or as the ControlNet that the base has. What it
    sees are the edges of the data's own pictures (`edgeflash.control.edges`).

    With ``output_weight`` and ``feature_weight`` it is also distilled from a teacher that has one
    of its own, beside a smaller UNet: the teacher's output, and what the blocks of its way up put
    out, which alone see what a ControlNet adds, as SDXS does (arXiv 2403.16627). The weights are
    ours, as it tells none. A step then asks the teacher once, which is in memory too.
    """

    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")
    steers: ClassVar[str] = NAME

    denoising_weight: float = Field(1.0, ge=0, description="of the data term")
    output_weight: float = Field(0.0, ge=0, description="of the output of a steered teacher")
    feature_weight: float = Field(
        0.0, ge=0, description="of its blocks on the way up, each relative to its mean square"
    )

    caption_dropout: float = Field(
        0.5, ge=0, lt=1, description="share of empty captions: then the edges alone tell what it is"
    )

    def needs_teacher(self) -> bool:
        return bool(self.output_weight or self.feature_weight)

    def begin(self, shop: Workshop) -> Stage:
        torch.manual_seed(0)
        family = Student.unfinished(shop.student).family
        unet = self.steered(shop)
        steering = getattr(unet, self.steers)
        process = shop.process(steers=self.needs_teacher())
        taught = self.taught(shop, unet) if self.needs_teacher() else None
        batch, nothing = cached_samples(shop, steered=True)

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, count = batch["x_0"], len(batch["x_0"])
            eps = noise_like(x_0, generator)
            t = self.times(count, process.timesteps, generator).to(x_0.device)
            c = dropped(batch["c"], nothing, rand(count, generator) < self.caption_dropout)
            x_t = process.noised(x_0, eps, t)
            output = network(x_t, t, c).sample.float()
            denoising = F.mse_loss(output, process.target(x_0, eps, t))
            terms = {"denoising": self.denoising_weight * denoising}
            return terms | (taught(output, x_t, t, c) if taught else {})

        return Stage(
            players={self.steers: Player(unet, loss)},
            batch=batch,
            results={self.steers: steering},
            averages={self.steers: average(steering, self.ema)} if self.ema else {},
            pipeline=family.steered_pipelines[self.steers],
        )

    def taught(self, shop: Workshop, unet: Any) -> Callable[..., Terms]:
        """The terms of a steered teacher, of the student's output and its x_t, t and c.

        Raises:
            EdgeflashError: nothing steers the teacher.
        """
        assert shop.teacher
        if Student.unfinished(shop.teacher).family.steering != self.steers:
            raise EdgeflashError(
                f"output_weight, feature_weight: {shop.teacher} has no {CALLED[self.steers]} to "
                "learn from: name a teacher that has, or leave them at 0"
            )
        teacher = shop.frozen(shop.teacher)
        if len(unet.up_blocks) > len(teacher.up_blocks):
            raise EdgeflashError(
                f"{shop.teacher}: has {len(teacher.up_blocks)} stages, the student "
                f"{len(unet.up_blocks)}: name a base that was pruned from it"
            )
        up = [pair for pair in feature_pairs(teacher, unet) if pair[1] in list(unet.up_blocks)]
        if self.feature_weight and not up:
            raise EdgeflashError(
                f"feature_weight: no block of {shop.teacher} is as wide as the student's: set it "
                "to 0"
            )
        theirs, ours = Taps([t for t, _ in up]), Taps([s for _, s in up])

        def terms(output: Tensor, *told: Tensor) -> Terms:
            with torch.no_grad():
                wanted = teacher(*told).sample.float()
            found = {"output": self.output_weight * F.mse_loss(output, wanted)}
            for i, (learnt, known) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
                gap = F.mse_loss(learnt.float(), known.float()) / known.float().square().mean()
                found[f"features.{i}"] = self.feature_weight * gap
            return found

        return terms

    def steered(self, shop: Workshop) -> Any:
        """The student's UNet, of which what steers it learns alone: a new one if it has none."""
        student = Student.unfinished(shop.student)
        unet = shop.load(shop.student, "unet")
        if not student.family.steering:
            unit_px = student.family.latent(student).downsampling
            attach(unet, self.steers, self.made(unet, unit_px).to(shop.device), unit_px)
        unet.requires_grad_(False)
        getattr(unet, self.steers).requires_grad_(True).train()
        return unet

    def made(self, unet: Any, unit_px: int) -> Any:
        """What steers a UNet, new; ``unit_px``: side of a cell of the latent."""
        return beside(unet, unit_px)

    def times(self, count: int, timesteps: int, generator: torch.Generator) -> Tensor:
        """Training timesteps, int64 [count]."""
        return randint(0, timesteps, count, generator)
