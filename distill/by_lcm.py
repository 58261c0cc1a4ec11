"""Latent consistency distillation: few steps, with the teacher's guidance folded in."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import LCMScheduler
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .encoded import cached_conditioning, cached_latents
from .process import Process, noise_config
from .rollout import renoised
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import guided
from .witness import WEIGHT, Witness

SIGMA_DATA = 0.5


class LCM(Method):
    """LCM (arXiv 2310.04378, alg. 1): f(x_t) = f(x_s), x_s one guided teacher DDIM step below x_t.

    The guidance weight w is drawn for each sample and folded in; the student takes no w-embedding
    and is sampled without guidance. The student keeps an `LCMScheduler`. ``attribute_weight`` adds
    what a `Witness` says of f(x_t), as a reward (arXiv 2403.11027, sec. 4). ``own_steps`` shows the
    student what it will meet in use, its own samples noised again (arXiv 2405.05224, sec. 4.1).
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)

    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    target_ema: float = Field(0.95, ge=0, lt=1, description="decay of the target network")
    ddim_steps: int = Field(
        50, ge=2, description="grid of the teacher's solver; the skip is T / it"
    )
    w_min: float = Field(3.0, ge=0, description="least guidance weight; CFG's scale is 1 + w")
    w_max: float = Field(15.0, ge=0, description="greatest guidance weight")
    huber_c: float = Field(1e-3, gt=0, description="width of the pseudo-Huber loss")
    timestep_scaling: float = Field(10.0, gt=0, description="in the boundary scalings")
    attribute_weight: float = Field(0.0, ge=0, description=WEIGHT)
    own_steps: int = Field(
        0,
        ge=0,
        description="half of a batch is met on the way of the student's own sampling, in 1 to so "
        "many steps; 0: all of it is data, noised",
    )

    @model_validator(mode="after")
    def _ordered(self) -> LCM:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is greater than w_max {self.w_max}")
        if self.own_steps > self.ddim_steps:
            raise ValueError(f"own_steps {self.own_steps} is greater than ddim_steps")
        return self

    def step_counts(self) -> range:
        return range(1, self.ddim_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        teacher = shop.load(shop.teacher, "unet").requires_grad_(False)
        student = shop.load(shop.student, "unet").train()
        target = average(student, self.target_ema)
        process = Process.of(shop.teacher, shop.device)
        if self.ddim_steps > process.timesteps:
            raise EdgeflashError(f"lcm.ddim_steps: at most {process.timesteps} of this teacher's")
        scheduler = lcm_scheduler(shop.teacher, self)
        ways = self.ways(scheduler, process.timesteps)
        latents, (conditioning, nothing) = cached_latents(shop), cached_conditioning(shop)
        witness = None
        if self.attribute_weight:
            witness = Witness.at(shop, "lcm", latents, process)

        def batch(indices: np.ndarray) -> Batch:
            known = witness.known(indices) if witness else {}
            return {"x_0": latents(indices), "c": conditioning(indices)} | known

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, c, count = batch["x_0"], batch["c"], len(batch["x_0"])
            eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
            n = torch.randint(self.ddim_steps, (count,), generator=generator)
            w = self.w_min + (self.w_max - self.w_min) * torch.rand(count, generator=generator)
            if ways:
                way = ways[int(torch.randint(len(ways), (), generator=generator))]
                n[count // 2 :] = way[-1]
            t, s = (time.to(x_0.device) for time in self.times(n, process.timesteps))
            x_t = process.noised(x_0, eps, t)
            if ways:
                x_t[count // 2 :] = self.own(
                    network, process, eps[count // 2 :], way, c[count // 2 :], generator
                )
            clean, noise = guided(teacher, process, x_t, t, c, nothing, w.to(x_0.device))
            x_s = process.ddim(clean, noise, s)
            with torch.no_grad():
                wanted = self.consistency(target, process, x_s, s, c)
            told = self.consistency(network, process, x_t, t, c)
            terms = {"consistency": self.huber(told, wanted)}
            if witness:
                doubt = witness.doubt(told, batch["labels"], generator)
                terms["attributes"] = self.attribute_weight * doubt.mean()
            return terms

        players = witness.players() if witness else {}
        return Stage(
            players=players | {"student": Player(student, loss)},
            batch=batch,
            results={"unet": student, "scheduler": scheduler},
            averages={"unet": average(student, self.ema)} if self.ema else {},
            targets=[(target, student)],
        )

    def times(self, n: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
        """Timestep t of grid entry n, int64, and s one entry below it, which is 0 at the end."""
        skip = timesteps // self.ddim_steps
        t = (n + 1) * skip - 1
        return t, (t - skip).clamp(min=0)

    def ways(self, scheduler: LCMScheduler, timesteps: int) -> list[Tensor]:
        """Where sampling in 1 to own_steps steps may stand: the grid entries passed till there."""
        skip, found = timesteps // self.ddim_steps, []
        for steps in range(1, self.own_steps + 1):
            scheduler.set_timesteps(steps)
            entries = (scheduler.timesteps + 1) // skip - 1
            found += [entries[: i + 1] for i in range(steps)]
        return found

    def own(
        self,
        unet: nn.Module,
        process: Process,
        noise: Tensor,
        way: Tensor,
        c: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """x [n, c, h, w] at the last grid entry of a way that begins with noise; no gradients."""
        t, _ = self.times(way.to(noise.device), process.timesteps)
        return renoised(
            lambda x, t: (self.consistency(unet, process, x, t, c), x),
            process,
            noise,
            [time.expand(len(noise)) for time in t],
            generator,
        )

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, [n, 1, 1, 1]: f(x, 0) = x whatever the network says."""
        scaled = self.timestep_scaling * t.float()[:, None, None, None]
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return c_skip, c_out

    def consistency(
        self, unet: nn.Module, process: Process, x: Tensor, t: Tensor, c: Tensor
    ) -> Tensor:
        """f(x, t) = c_skip x + c_out x_0(x, t), eq. 9; [n, c, h, w]."""
        c_skip, c_out = self.scalings(t)
        return c_skip * x + c_out * process.x_0(unet(x, t, c).sample.float(), x, t)

    def huber(self, a: Tensor, b: Tensor) -> Tensor:
        """Pseudo-Huber distance, arXiv 2310.14189 eq. 7, mean over elements."""
        return ((a - b).square() + self.huber_c**2).sqrt().mean() - self.huber_c


def lcm_scheduler(teacher: Path, options: LCM) -> LCMScheduler:
    """The sampler the student is made for, with the teacher's betas and the loss's grid."""
    return LCMScheduler(
        **noise_config(teacher),
        clip_sample=False,
        original_inference_steps=options.ddim_steps,
        timestep_scaling=options.timestep_scaling,
    )
