"""SDXS: one step, by matching features first and then scores where there is less noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.control import CALLED
from edgeflash.errors import EdgeflashError
from edgeflash.lora import Lora, components_of
from edgeflash.roles import Method
from edgeflash.shelf import require
from edgeflash.student import Student

from .draws import randint, randn
from .encoded import cached_conditioning, latent_shape
from .few_steps import few_step_scheduler
from .inner import EncoderHalf, encoder_blocks, encoder_taps
from .losses import noised_matching
from .process import Process, noise_like
from .rollout import denoised
from .run import locate_teacher
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import asked, plain

C = 1e-6  # keeps SSIM finite for constant maps; DISTS has the same

Solves = Callable[[Tensor, Tensor], Tensor]  # noise [n, c, h, w], conditioning -> psi
Sees = Callable[[Tensor, Tensor], list[Tensor]]  # latents, conditioning -> maps [n, w, h, w]


class SDXS(Method):
    """SDXS (arXiv 2403.16627): feature matching as a warm-up, then Segmented Diff-Instruct.

    The student makes x of pure noise in one step. Its features shall be those of psi, the sample
    that an ODE solver makes of the same noise: lambda_FM sum_l w_l (1 - SSIM(f_l(x), f_l(psi))).
    After the warm-up Diff-Instruct (arXiv 2305.18455) joins in, on the segment t <= alpha T alone:
    x follows the score of the teacher less that of an online network, at first a copy of the
    teacher, which learns to denoise what the student makes. Where there is more noise, features go
    on to stand in for scores. alpha and lambda_FM fall, here along straight lines.

    psi is best drawn by a ``straight_teacher``, a model that was made for few steps (SD-Turbo for
    the published SDXS-512-0.9, with SD 2.1 base as the teacher); the teacher itself takes many. Of
    the data the captions alone are used. The student keeps an `LCMScheduler` of one step, at 999;
    of anything but pure noise, as in image-to-image, it knows nothing.

    Not published, and chosen here: all rates, weights, courses, guidance and step counts. f is the
    latent and what the teacher's UNet encoder, one of the paper's examples, makes of it at t = 0,
    with equal w_l. w(t) is DMD's (`losses.matching`): the authors later trained as DMD2 does. The
    online network learns from the first step on, so that it knows the student's samples when it is
    asked. The paper's adversarial finish is not here.

    A student and a teacher that a ControlNet (or an adapter) steers see the edges of the data's own
    pictures, where the paper takes those of pictures that a teacher drew: let such be the data.
    psi is drawn along them, and both score networks keep the teacher's own ControlNet, which does
    not learn. With ``control_alone`` the student's alone does, beside a UNet that draws in one step
    already, as in the paper; ``control`` distils one before.

    With ``style_lora`` a one-step student, the recipe's base, learns that LoRA's style (the paper's
    LoRA distillation): it is fused into the teacher whose scores are followed, and not into the
    online network, which begins as the teacher without it; there is no warm-up. psi has the style
    where the teacher itself draws it; a straight teacher is as its folder has it.

    A step asks the solver's model ``solver_steps`` times, twice as often where it is guided, the
    teacher's encoder twice, the guided teacher once, student and online network twice each. In
    memory are teacher, online network and student, and the straight teacher. Published for
    SDXS-512, of 319 M, at one step: FID 28.21, CLIP 32.81 (COCO 2017, 5 k).
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")  # it looks into a UNet
    conditioned: ClassVar[bool] = True

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of both AdamWs")
    straight_teacher: str | None = Field(
        None,
        description="few-step model that draws psi, named as teachers are, and asked without "
        "guidance; none: the teacher itself",
    )
    solver_steps: int = Field(8, ge=1, description="DDIM steps from noise to psi")
    guidance: float = Field(7.5, ge=1, description="the teacher's guidance scale")
    feature_share: float = Field(
        0.2, ge=0, le=1, description="share of the steps that feature matching has for itself"
    )
    feature_weight: tuple[float, float] = Field(
        (1.0, 0.1), description="lambda_FM at the end of the warm-up and at the last step"
    )
    alpha: tuple[float, float] = Field(
        (0.98, 0.5), description="share of T, the segment of the scores, likewise"
    )
    online_updates: int = Field(
        1, ge=1, description="steps of the online network for one of the student"
    )
    style_lora: str | None = Field(
        None,
        description="LoRA whose style is learnt, a file or a folder with one; of it the UNet's part"
        " counts",
    )
    style_scale: float = Field(1.0, gt=0, description="how much of it is added")
    control_alone: bool = Field(
        False,
        description="train what steers the student, its ControlNet or adapter, and not its UNet",
    )

    @model_validator(mode="after")
    def _fits(self) -> SDXS:
        if not 1 >= self.alpha[0] >= self.alpha[1] > 0:
            raise ValueError(f"alpha {self.alpha}: from at most 1 it falls, but not to 0")
        if not self.feature_weight[0] >= self.feature_weight[1] >= 0:
            raise ValueError(f"feature_weight {self.feature_weight}: it falls, to 0 at the least")
        if self.feature_share and not self.feature_weight[0]:
            raise ValueError("feature_weight 0 leaves the warm-up without a loss: feature_share 0")
        if self.style_lora and self.feature_share:
            raise ValueError("style_lora is learnt without the warm-up: set feature_share = 0")
        return self

    def step_counts(self) -> range:
        return range(1, 2)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        process = shop.process()
        teacher = shop.frozen(shop.teacher, *self.style())
        conditioning, nothing = cached_conditioning(shop)
        lesson = Lesson(
            options=self,
            teacher=teacher,
            online=self.online(shop),
            student=self.student(shop),
            solve=self.solver(shop, teacher, process, nothing),
            sees=encoder_maps(teacher),
            process=process,
            nothing=nothing,
            shape=latent_shape(shop),
        )

        def batch(indices: np.ndarray) -> Batch:
            return {"c": conditioning(indices)}

        players = {"online": Player(lesson.online, lesson.online_loss)} if lesson.online else {}
        student = Player(lesson.student, lesson.student_loss, every=self.online_updates)
        made, network = shop.denoiser, lesson.student
        if self.control_alone:
            made = Student.unfinished(shop.student).family.steering
            network = getattr(network, made)
        return Stage(
            players=players | {"student": student},
            batch=batch,
            results={made: network, "scheduler": few_step_scheduler(shop.teacher, 1)},
            averages={made: average(network, self.ema)} if self.ema else {},
        )

    def online(self, shop: Workshop) -> Any:
        """The online score network, if there is one; what steers it stays the teacher's."""
        if self.feature_share == 1:
            return None
        assert shop.teacher
        network = shop.load(shop.teacher, shop.denoiser).train()
        if steers := Student.unfinished(shop.teacher).family.steering:
            getattr(network, steers).requires_grad_(False).eval()
        return network

    def student(self, shop: Workshop) -> Any:
        """The student's denoiser, what shall learn of it ready to.

        Raises:
            EdgeflashError: its ControlNet alone shall, and it has none.
        """
        network = shop.load(shop.student, shop.denoiser)
        if not self.control_alone:
            return network.train()
        steers = Student.unfinished(shop.student).family.steering
        if not steers:
            raise EdgeflashError(
                f"sdxs.control_alone: {shop.student} has no ControlNet and no adapter: let "
                "'control' or 'adapter' come first, or set it to false"
            )
        network.requires_grad_(False)
        getattr(network, steers).requires_grad_(True).train()
        return network

    def style(self) -> tuple[Lora, ...]:
        """The LoRA of the teacher, if any.

        Raises:
            EdgeflashError: the file is none, or has nothing for a UNet.
        """
        if not self.style_lora:
            return ()
        require("sdxs.style_lora", ["peft"])
        lora = Lora(Path(self.style_lora), self.style_scale)
        if "unet" not in (has := components_of(lora)):
            raise EdgeflashError(
                f"sdxs.style_lora: {lora.file} is for the {' and '.join(sorted(has))} alone, where "
                "the UNet's scores are followed: choose another"
            )
        return (lora,)

    def solver(self, shop: Workshop, teacher: Any, process: Process, nothing: Tensor) -> Solves:
        """psi, by the straight teacher, or by the guided teacher where there is none.

        Raises:
            EdgeflashError: a straight teacher of other latents or texts than the teacher's.
        """
        unet, scale = teacher, self.guidance
        if self.straight_teacher:
            folder = locate_teacher(self.straight_teacher)
            process = Process.of(folder, shop.device)
            unet, scale = shop.frozen(folder), 1.0
            theirs, ours = map(Student.unfinished, (folder, shop.student))
            if theirs.family.steering != ours.family.steering:
                raise EdgeflashError(
                    f"sdxs.straight_teacher: {folder} has "
                    f"{CALLED.get(theirs.family.steering, 'no ControlNet')}, the student "
                    f"{CALLED.get(ours.family.steering, 'none')}: name one that sees the same, or "
                    "leave it out"
                )
            for key in ("in_channels", "cross_attention_dim"):
                if unet.config[key] != teacher.config[key]:
                    raise EdgeflashError(
                        f"sdxs.straight_teacher: {key} {unet.config[key]} of its UNet, but the "
                        f"teacher's has {teacher.config[key]}: name one of the same family"
                    )

        def solve(noise: Tensor, c: Tensor) -> Tensor:
            last = torch.full((len(noise),), process.timesteps - 1, device=noise.device)
            ask = asked(unet, process, c, nothing, scale)
            return denoised(ask, process, noise, last, self.solver_steps)

        return solve

    def course(self, step: int) -> tuple[float, float]:
        """alpha, which is 0 in the warm-up, and lambda_FM after so many steps."""
        first = round(self.feature_share * self.steps)
        if step < first:
            return 0.0, self.feature_weight[0]
        share = (step - first) / max(1, self.steps - 1 - first)
        alpha, weight = (
            start + share * (end - start) for start, end in (self.alpha, self.feature_weight)
        )
        return alpha, weight


@dataclass(frozen=True)
class Lesson:
    """The losses of student and online network."""

    options: SDXS
    teacher: Any
    online: Any
    student: Any
    solve: Solves
    sees: Sees
    process: Process
    nothing: Tensor
    shape: tuple[int, int, int]

    def student_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        alpha, weight = self.options.course(int(batch["step"]))
        noise, c = self.noise(batch, generator), batch["c"]
        x = self.sample(network, noise, c)
        terms: Terms = {}
        if weight:
            terms["features"] = weight * self.feature_matching(x, self.solve(noise, c), c)
        if alpha:  # their integral over the segment: its length times their mean
            terms["scores"] = alpha * self.score_distillation(x, c, alpha, generator)
        return terms

    def online_loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        """Denoising of the student's samples, weighed as in the teacher's training."""
        c, process = batch["c"], self.process
        with torch.no_grad():
            x = self.sample(self.student, self.noise(batch, generator), c)
        t = randint(0, process.timesteps, len(x), generator).to(x.device)
        eps = noise_like(x, generator)
        told = network(process.noised(x, eps, t), t, c).sample.float()
        return {"denoising": F.mse_loss(told, process.target(x, eps, t))}

    def noise(self, batch: Batch, generator: torch.Generator) -> Tensor:
        c = batch["c"]
        return randn((len(c), *self.shape), generator).to(c.device)

    def sample(self, network: Any, noise: Tensor, c: Tensor) -> Tensor:
        """x [n, c, h, w], the student's one step."""
        last = torch.full((len(noise),), self.process.timesteps - 1, device=noise.device)
        x, _ = plain(network, self.process, noise, last, c)
        return x

    def feature_matching(self, x: Tensor, psi: Tensor, c: Tensor) -> Tensor:
        """1 - SSIM of features of samples x and psi, a mean over layers."""
        ours = self.sees(x, c)
        with torch.no_grad():
            theirs = self.sees(psi, c)
        layers = [1 - ssim(a, b) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(layers).mean()

    def score_distillation(
        self, x: Tensor, c: Tensor, alpha: float, generator: torch.Generator
    ) -> Tensor:
        """Diff-Instruct of samples x at t ~ U{0 .. alpha T}, a mean over the segment."""
        process, options = self.process, self.options
        end = max(1, round(alpha * process.timesteps))
        t = randint(0, end, len(x), generator).to(x.device)
        offline = asked(self.teacher, process, c, self.nothing, options.guidance)
        online = asked(self.online, process, c, self.nothing)
        return noised_matching(x, t, offline, online, process, generator)


def encoder_maps(unet: Any) -> Sees:
    """Latents, and what the blocks of a UNet's encoder make of them at t = 0."""
    half = EncoderHalf(unet)
    taps = encoder_taps(unet, encoder_blocks(unet)[0])

    def sees(x: Tensor, c: Tensor) -> list[Tensor]:
        half(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), c)
        return [x, *taps.outputs]

    return sees


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of feature maps [n, w, h, w], each one window: a scalar from -1 to 1.

    It is the mean of what means say, (2 mx my + C) / (mx^2 + my^2 + C), and what variances and
    covariance say, (2 sxy + C) / (sx^2 + sy^2 + C), as in DISTS (arXiv 2004.07728). In the product
    of the two, SSIM of pictures, the second would count the wrong way round where means of features
    differ in sign.
    """
    x, y = x.float(), y.float()
    x_mean, y_mean = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
    x_gap, y_gap = x - x_mean, y - y_mean
    variances = (x_gap.square() + y_gap.square()).mean((2, 3))
    texture = (2 * x_mean * y_mean + C) / (x_mean.square() + y_mean.square() + C)
    structure = (2 * (x_gap * y_gap).mean((2, 3)) + C) / (variances + C)
    return (texture.mean() + structure.mean()) / 2
