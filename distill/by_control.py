"""Trains a ControlNet beside a denoiser that stays as it is: pictures drawn along given edges."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from edgeflash.control import NAME
from edgeflash.networks_control import attach, beside
from edgeflash.roles import Method
from edgeflash.student import Student

from .draws import rand, randint
from .encoded import cached_samples
from .process import noise_like
from .seen import dropped
from .stage import Batch, Player, Stage, Terms, Workshop, average


class Control(Method):
    """ControlNet (arXiv 2302.05543, eq. 5): denoising, of pictures whose edges it sees.

    It begins as the UNet's way down, giving zeros, or as the ControlNet that the base has. What it
    sees are the edges of the data's own pictures (`edgeflash.control.edges`).
    """

    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")
    steers: ClassVar[str] = NAME

    caption_dropout: float = Field(
        0.5, ge=0, lt=1, description="share of empty captions: then the edges alone tell what it is"
    )

    def begin(self, shop: Workshop) -> Stage:
        torch.manual_seed(0)
        family = Student.unfinished(shop.student).family
        unet = self.steered(shop)
        steering = getattr(unet, self.steers)
        process = shop.process()
        batch, nothing = cached_samples(shop, steered=True)

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, count = batch["x_0"], len(batch["x_0"])
            eps = noise_like(x_0, generator)
            t = self.times(count, process.timesteps, generator).to(x_0.device)
            c = dropped(batch["c"], nothing, rand(count, generator) < self.caption_dropout)
            output = network(process.noised(x_0, eps, t), t, c).sample.float()
            return {"denoising": F.mse_loss(output, process.target(x_0, eps, t))}

        return Stage(
            players={self.steers: Player(unet, loss)},
            batch=batch,
            results={self.steers: steering},
            averages={self.steers: average(steering, self.ema)} if self.ema else {},
            pipeline=family.steered_pipelines[self.steers],
        )

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

    def times(self, count: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
        """Training timesteps, int64 [count]."""
        return randint(0, timesteps, count, generator)
