"""Trains a UNet on its own trajectories, where what it draws goes astray unseen by denoising."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method
from edgeflash.student import FEW_STEP_SAMPLERS, Student

from .encoded import cached_conditioning, cached_latents
from .few_steps import ladder
from .process import Process, noise_like
from .rollout import ddim
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import plain
from .witness import WEIGHT, Witness


class Reward(Method):
    """Reward feedback (ReFL, arXiv 2304.05977, alg. 1) from a classifier of attributes.

    Half of a batch is denoised as data (eq. 4). The other half starts from noise and takes a random
    number of the network's own DDIM steps, without gradients and without guidance; on the x_0 it
    predicts then, as on that of the data, a `Witness` says which objects it shows.
    """

    wants: ClassVar[tuple[str, ...]] = ("shapes",)

    batch_size: int = Field(32, ge=2, description="samples a step, half of them data")
    solver_steps: int = Field(8, ge=1, description="DDIM steps of a whole trajectory")
    attribute_weight: float = Field(0.6, gt=0, description=WEIGHT.partition(";")[0])
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty captions, for CFG")

    def begin(self, shop: Workshop) -> Stage:
        _, sampler = Student.unfinished(shop.student).class_of("scheduler")
        if sampler in FEW_STEP_SAMPLERS:
            raise EdgeflashError(
                f"method 'reward' takes DDIM steps, and this student's are {sampler}'s"
            )
        torch.manual_seed(0)
        process = Process.of(shop.student, shop.device)
        times = ladder(process, self.solver_steps, "reward.solver_steps")
        latents, (conditioning, nothing) = cached_latents(shop), cached_conditioning(shop)
        unet = shop.load(shop.student, "unet").train()
        witness = Witness.at(shop, "reward", latents, process)

        def batch(indices: np.ndarray) -> Batch:
            known = witness.known(indices)
            return {"x_0": latents(indices), "c": conditioning(indices)} | known

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, count = batch["x_0"], len(batch["x_0"])
            half = count // 2
            eps = noise_like(x_0, generator)
            t = torch.randint(process.timesteps, (count,), generator=generator).to(x_0.device)
            empty = torch.rand(count, generator=generator) < self.caption_dropout
            empty = empty.to(x_0.device)
            c = torch.where(empty[:, None, None], nothing, batch["c"])
            x_t = process.noised(x_0, eps, t)
            done = int(torch.randint(self.solver_steps, (), generator=generator))
            path = [time.expand(count - half) for time in times[: done + 1]]
            x_t[half:] = ddim(
                lambda x, t: plain(network, process, x, t, c[half:]), process, eps[half:], path
            )
            t[half:] = path[-1]
            output = network(x_t, t, c).sample.float()
            wanted = process.target(x_0[:half], eps[:half], t[:half])
            doubt = witness.doubt(process.x_0(output, x_t, t), batch["labels"], generator, t)
            return {
                "denoising": F.mse_loss(output[:half], wanted),
                "attributes": self.attribute_weight * torch.where(empty, 0, doubt).mean(),
            }

        return Stage(
            players=witness.players() | {"unet": Player(unet, loss)},
            batch=batch,
            results={"unet": unet},
            averages={"unet": average(unet, self.ema)} if self.ema else {},
        )
