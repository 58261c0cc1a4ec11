"""MeanFlow: the velocity averaged over a step, so that the step ends where the flow does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from pydantic import Field
from torch import Tensor

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from . import w_embedding
from .draws import rand, rows
from .encoded import cached_samples
from .few_steps import ddim_scheduler, source_of
from .process import Process, noise_like
from .rates import STEP, differentiable, rate
from .seen import dropped, unprompted
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked

WAVES = 256  # sines and cosines of a step's length that the student is told


class MeanFlow(Method):
    """MeanFlow (arXiv 2505.13447, alg. 1): u(z, r, t) = v - (t - r) du/dt, v the flow's velocity.

    Time is the level of noise, t = sigma / (alpha + sigma), and z = x / (alpha + sigma) is then the
    paper's (1 - t) x_0 + t eps. A network of eps, v or x_0 means a velocity eps - x_0, and a step
    z - (t - r) u is the DDIM step with what it means: a student stays what its teacher is.

    It is told t by its timestep, and the step's length, as a share of all timesteps, where a UNet
    of diffusers is told the guidance (`timestep_cond`). Steps that divide the timesteps evenly have
    one length: when training ends, that of ``denoising_steps`` is folded into a bias, and the
    student is a plain UNet, with which a DDIM sampler takes just so many steps, unguided.

    "distillation" takes v from the teacher, guided by ``guidance``. "training" takes eps - x_0 of
    picture and noise, guided by the student itself, as the authors' code does: v = omega (eps -
    x_0) + kappa u(z, t, t, c) + (1 - omega - kappa) u(z, t, t), omega = (1 - kappa) ``guidance``.

    du/dt is a difference, or exact (`rates.py` tells why). A step asks the guided teacher once, the
    student once, and twice more for those with r < t; in memory are both, and the student's
    average. Published, from nothing: ImageNet 256x256 FID 3.43 in one step.
    """

    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")  # it tells a UNet two times
    conditioned: ClassVar[bool] = True

    kind: Literal["distillation", "training"] = Field(
        "distillation", description="from a teacher, or from data alone"
    )
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    denoising_steps: int = Field(1, ge=1, description="of the student")
    noise_mean: float = Field(-0.4, description="of the logit of the times, log(sigma / alpha)")
    noise_std: float = Field(1.0, gt=0, description="likewise")
    equal_share: float = Field(0.75, ge=0, lt=1, description="share of a batch with r = t")
    guidance: float = Field(
        1.0, ge=1, description="guidance scale, folded in; the authors' code: 2"
    )
    kappa: float = Field(0.5, ge=0, lt=1, description="share of u(z, t, t, c) in that, in training")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of empty captions, in training with guidance"
    )
    weight_p: float = Field(1.0, ge=0, description="p of a sample's weight, (error + c)^-p")
    weight_c: float = Field(0.01, gt=0, description="c of it; the error is summed, not averaged")
    difference: float = Field(0.05, ge=0, lt=1, description=STEP)

    def step_counts(self) -> range:
        return range(self.denoising_steps, self.denoising_steps + 1)

    def folds_guidance(self) -> bool:
        return True

    def begin(self, shop: Workshop) -> Stage:
        if self.lora_rank:
            raise EdgeflashError(
                "meanflow.lora_rank: a step's length needs an input that LoRA lacks: leave it out"
            )
        distils = self.kind == "distillation"
        source = source_of(shop, "meanflow", self.kind)
        process = shop.process()
        if self.denoising_steps > process.timesteps:
            raise EdgeflashError(
                f"meanflow.denoising_steps: at most {process.timesteps} of this noise"
            )
        batch, nothing = cached_samples(shop)
        teacher = shop.frozen(source) if distils else None
        student = shop.load(shop.student, shop.denoiser).train()
        listen(student)
        if self.difference == 0:
            differentiable(student)
        return Stage(
            players={"student": Player(student, Lesson(self, teacher, process, nothing).loss)},
            batch=batch,
            results={
                shop.denoiser: student,
                "scheduler": ddim_scheduler(source, self.denoising_steps),
            },
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
            finish=lambda networks: fold(networks[shop.denoiser], 1 / self.denoising_steps),
        )

    def times(
        self, process: Process, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Times t and r [count], r <= t; in the first of them, by ``equal_share``, r = t.

        A share that is no whole number of samples is rounded by chance: also in small batches both
        kinds are met, and so often.
        """

        def first(n: int) -> Tensor:
            more = torch.rand((), generator=generator, dtype=torch.float64)
            return torch.arange(n) < int(self.equal_share * n + more)

        both = rows(lambda n: torch.randn(2, n, generator=generator).T, count, generator)
        normal = both.T.to(process.angles.device)
        r, t = (self.noise_mean + self.noise_std * normal).sigmoid().sort(0).values
        t = t.clamp(*level(process.angles[[1, -1]]))
        equal = rows(first, count, generator).to(t.device)
        return t, torch.where(equal, t, r.minimum(t))


@dataclass(frozen=True)
class Lesson:
    """The loss, with the networks that stand beside the student."""

    options: MeanFlow
    teacher: Any
    process: Process
    nothing: Tensor

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, process, options = batch["x_0"], batch["c"], self.process, self.options
        eps = noise_like(x_0, generator)
        t, r = options.times(process, len(x_0), generator)
        wide_t, wide_r = t[:, None, None, None], r[:, None, None, None]
        z = (1 - wide_t) * x_0 + wide_t * eps
        v, c = self.velocity(network, z, t, eps - x_0, c, generator)
        du, some = torch.zeros_like(z), r < t
        some[0] = True  # so that all processes call the network as often, which FSDP waits for
        du[some] = rate(
            lambda z, t: mean_velocity(network, process, z, t, r[some], c[some]),
            z[some], t[some], v[some], options.difference, (r[some], level(process.angles[-1])),
        )  # fmt: skip
        u = v - torch.where(wide_r < wide_t, (wide_t - wide_r) * du, 0)
        output, _, timesteps = told(network, process, z, t, r, c)
        wanted = process.target(z - wide_t * u, z + (1 - wide_t) * u, timesteps)
        error = (output - wanted).square().sum((1, 2, 3))
        weight = (error.detach() + options.weight_c) ** -options.weight_p
        return {"flow": (weight * error).mean()}

    @torch.no_grad()
    def velocity(
        self, network: Any, z: Tensor, t: Tensor, v: Tensor, c: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The velocity to follow at z, [n, c, h, w], and the conditioning it is for, [n, s, d].

        ``v`` is that of picture and noise.
        """
        options, process = self.options, self.process
        if self.teacher is not None:
            ask = asked(self.teacher, process, c, self.nothing, options.guidance)
            x_0, eps = ask(*as_seen(process, z, t))
            return eps - x_0, c
        if options.guidance == 1:
            return v, c
        both, twice = torch.cat([c, unprompted(c, self.nothing)]), torch.cat([t, t])
        with_c, without = mean_velocity(
            network, process, torch.cat([z, z]), twice, twice, both
        ).chunk(2)
        torch.clear_autocast_cache()  # weights that were cast in here would stay without gradients
        kappa, omega = options.kappa, (1 - options.kappa) * options.guidance
        guided = omega * v + kappa * with_c + (1 - omega - kappa) * without
        empty = rand(len(z), generator) < options.caption_dropout
        empty = empty.to(z.device)
        c = dropped(c, self.nothing, empty)
        return torch.where(empty[:, None, None, None], v, guided), c


def level(angle: Tensor) -> Tensor:
    """sigma / (alpha + sigma) where atan(sigma / alpha) is so much."""
    return angle.sin() / (angle.sin() + angle.cos())


def as_seen(process: Process, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, c, h, w] and timesteps [n] as networks of this noise are shown z at times t."""
    norm = (t.square() + (1 - t).square()).sqrt()
    return z / norm[:, None, None, None], process.timestep(torch.atan2(t, 1 - t))


def told(
    unet: Any, process: Process, z: Tensor, t: Tensor, r: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the student puts out for the step from t to r, and the x and timesteps it is shown."""
    x, timesteps = as_seen(process, z, t)
    length = timesteps - process.timestep(torch.atan2(r, 1 - r))
    waves = get_timestep_embedding(length / process.timesteps, WAVES)
    return unet(x, timesteps, c, timestep_cond=waves).sample.float(), x, timesteps


def mean_velocity(
    unet: Any, process: Process, z: Tensor, t: Tensor, r: Tensor, c: Tensor
) -> Tensor:
    """u(z, r, t), [n, c, h, w]: the velocity that the student means by what it puts out."""
    output, x, timesteps = told(unet, process, z, t, r, c)
    return process.eps(output, x, timesteps) - process.x_0(output, x, timesteps)


def listen(unet: Any) -> None:
    """Gives a UNet the input for a step's length; until it is trained, it does not matter.

    Raises:
        EdgeflashError: something else already has this input.
    """
    if unet.time_embedding.cond_proj is not None:
        raise EdgeflashError(
            "meanflow tells the student a step's length where this one takes guidance "
            "(time_cond_proj_dim): begin with a student that does not"
        )
    w_embedding.listen(unet, WAVES)


@torch.no_grad()
def fold(unet: Any, length: float) -> dict[str, float]:
    """Makes a UNet one for steps of this length alone, a share of all timesteps: a plain one."""
    embedding = unet.time_embedding
    first = embedding.linear_1
    waves = get_timestep_embedding(torch.tensor([length], device=first.weight.device), WAVES)
    first.bias += first.weight @ embedding.cond_proj(waves)[0]
    embedding.cond_proj = None
    return {}
