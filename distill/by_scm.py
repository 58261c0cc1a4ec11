"""Continuous-time consistency: consistency models in the limit of infinitely small steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .draws import randn
from .encoded import cached_samples
from .few_steps import few_step_scheduler, source_of
from .process import Process, noise_like
from .rates import STEP, differentiable, rate
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked, plain


class SCM(Method):
    """sCM (arXiv 2410.11081, alg. 1): f(x, t) = cos(t) x - sin(t) F(x, t) does not change with t.

    TrigFlow, x_t = cos(t) x_0 + sin(t) z, is the teacher's own noise told by its angle t =
    atan(sigma / alpha): latents have a standard deviation near 1, so sigma_d drops out. F is v, and
    f the x_0 that a network of eps, v or x_0 means. So a student stays what its teacher is, and an
    `LCMScheduler` samples it without guidance, by x_0 and fresh noise. A flow (SD 3) is TrigFlow
    too, but for the length of x_t, which networks are given as they know it (SANA-Sprint, arXiv
    2503.09641, sec. 3.1); its sampler is that of `edgeflash/even_steps.py`.

    "distillation" (sCD) moves x_t by the teacher's velocity dx/dt, "training" (sCT) by that of
    picture and noise, without a teacher. F follows F + g / (rms(g) + c), where g = cos(t) df/dt =
    -cos(t)^2 (F - dx/dt) - r cos(t) sin(t) (x + dF/dt), and r rises from 0 to 1. The error is that
    of what the network puts out, so that one of eps or x_0 moves F as one of v does. dF/dt is a
    difference, or exact (`rates.py` tells why). The weight e^w(t) that the paper learns is left
    out: it undoes the vanishing of g at the goal.

    A step asks the guided teacher once, and the student three times; in memory are both, and the
    student's average. Published, with networks made for it: CIFAR-10 FID 2.06 and ImageNet 512x512
    1.88, both at 2 steps.
    """

    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    kind: Literal["distillation", "training"] = Field(
        "distillation", description="from a teacher, or from data alone"
    )
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    guidance: float = Field(
        1.0, ge=1, description="the teacher's guidance scale, folded in; SANA-Sprint: 4 to 5"
    )
    noise_mean: float = Field(
        -0.3, description="of log(sigma / alpha), P_mean - log sigma_d; SANA-Sprint: 0.9"
    )
    noise_std: float = Field(1.4, gt=0, description="of it, P_std; SANA-Sprint: 1.6")
    tangent_c: float = Field(0.1, gt=0, description="c of the tangent's normalization")
    tangent_warmup: float = Field(
        0.1, ge=0, le=1, description="share of the steps in which r rises to 1"
    )
    difference: float = Field(0.05, ge=0, lt=1, description=STEP)
    inference_steps: int = Field(50, ge=1, description="timesteps that the sampler chooses from")

    @model_validator(mode="after")
    def _fits(self) -> SCM:
        if self.kind == "training" and self.guidance > 1:
            raise ValueError(f"guidance {self.guidance}: training has no teacher to guide")
        return self

    def step_counts(self) -> range:
        return range(1, self.inference_steps + 1)

    def begin(self, shop: Workshop) -> Stage:
        distils = self.kind == "distillation"
        source = source_of(shop, "scm", self.kind)
        process = shop.process()
        if self.inference_steps > process.timesteps:
            raise EdgeflashError(f"scm.inference_steps: at most {process.timesteps} of this noise")
        batch, nothing = cached_samples(shop)
        teacher = shop.frozen(source) if distils else None
        student = shop.load(shop.student, shop.denoiser).train()
        if self.difference == 0:
            differentiable(student)
        return Stage(
            players={"student": Player(student, Lesson(self, teacher, process, nothing).loss)},
            batch=batch,
            results={
                shop.denoiser: student,
                "scheduler": few_step_scheduler(source, self.inference_steps),
            },
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
        )

    def times(self, process: Process, count: int, generator: torch.Generator) -> Tensor:
        """Angles t [count], within those of the timesteps."""
        normal = randn((count,), generator).to(process.angles.device)
        t = (self.noise_mean + self.noise_std * normal).exp().atan()
        return t.clamp(process.angles[1], process.angles[-1])

    def warmth(self, step: int) -> float:
        """r at a step, counted from 0: how much of the tangent's second part is there."""
        warmup = self.tangent_warmup * self.steps
        return min(1.0, step / warmup) if warmup else 1.0


@dataclass(frozen=True)
class Lesson:
    """The loss, with the networks that stand beside the student."""

    options: SCM
    teacher: Any
    process: Process
    nothing: Tensor

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, process, options = batch["x_0"], batch["c"], self.process, self.options
        eps, angle = noise_like(x_0, generator), options.times(process, len(x_0), generator)
        t, (cos, sin) = process.timestep(angle), _cos_sin(angle)
        x_t = cos * x_0 + sin * eps
        seen = process.norm(t) * x_t
        if self.teacher is not None:
            ask = asked(self.teacher, process, c, self.nothing, options.guidance)
            x_0, eps = ask(seen, t)
        dx = cos * eps - sin * x_0
        output = network(seen, t, c).sample.float()
        v = (cos * process.eps(output, seen, t) - sin * process.x_0(output, seen, t)).detach()
        dv = rate(
            lambda x, angle: trigflow(network, process, x, angle, c),
            x_t, angle, dx, options.difference, (process.angles[1], process.angles[-1]),
        )  # fmt: skip
        g = tangent(x_t, angle, v, dv, dx, options.warmth(int(batch["step"])))
        g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + options.tangent_c)
        wanted = process.target(*parts(x_t, angle, v + g), t)
        return {"consistency": F.mse_loss(output, wanted)}


def trigflow(unet: Any, process: Process, x: Tensor, angle: Tensor, c: Tensor) -> Tensor:
    """F(x, t) [n, c, h, w]: the velocity that a network means, at angles [n]."""
    t, (cos, sin) = process.timestep(angle), _cos_sin(angle)
    x_0, eps = plain(unet, process, process.norm(t) * x, t, c)
    return cos * eps - sin * x_0


def parts(x: Tensor, angle: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 = f(x, t) and eps, [n, c, h, w], of which x is made where its velocity is v."""
    cos, sin = _cos_sin(angle)
    return cos * x - sin * v, sin * x + cos * v


def tangent(x: Tensor, angle: Tensor, v: Tensor, dv: Tensor, dx: Tensor, warmth: float) -> Tensor:
    """g [n, c, h, w] of alg. 1, which is cos(t) df/dt where ``warmth``, r, is 1.

    Args:
        x, angle: where, [n, c, h, w] and [n].
        v, dv: F there, and dF/dt.
        dx: dx/dt, the velocity that x is moved by.
        warmth: from 0 to 1.
    """
    cos, sin = _cos_sin(angle)
    return -(cos**2) * (v - dx) - warmth * cos * sin * (x + dv)


def _cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
