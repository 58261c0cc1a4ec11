"""Latent consistency distillation: few steps, with the teacher's guidance folded in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from edgeflash.errors import EdgeflashError
from edgeflash.even_steps import chosen
from edgeflash.roles import Method

from .consistency import consistency
from .draws import rand, randint
from .encoded import cached_samples
from .few_steps import few_step_scheduler
from .losses import pseudo_huber
from .process import Process, noise_like
from .rollout import renoised
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .teacher import guided
from .w_embedding import KEY, listen, waves
from .witness import WEIGHT, Witness

LORA_RATE = 1e-4  # of diffusers' train_lcm_distill_lora_sd_wds.py


class LCM(Method):
    """LCM (arXiv 2310.04378, alg. 1): f(x_t) = f(x_s), x_s one guided teacher DDIM step below x_t.

    The guidance weight w is drawn for each sample and folded in. With ``w_embedding`` the student
    is told it, f(x_t, w, c, t), and is sampled at any guidance scale 1 + w of that range, in one
    call a step (sec. 4.2). Without, as LCM-LoRA has it, it learns one answer to all of them and is
    sampled without guidance. The student keeps an `LCMScheduler`.

    "fine-tuning" is LCF (sec. 4.4, alg. 4): an LCM goes on with pictures of one's own, without a
    teacher. x_s is then alpha_s x_0 + sigma_s eps, of the picture and the noise of x_t, and w is
    no more than what the student is told. Of a denoiser that is no LCM it is consistency training.

    ``attribute_weight`` adds what a `Witness` says of f(x_t), as a reward (arXiv 2403.11027, sec.
    4). ``own_steps`` shows the student what it will meet in use, its own samples noised again
    (arXiv 2405.05224, sec. 4.1).

    Of a flow (SD 3) the teacher's step is Euler's, f = x_0 needs no boundary scalings, and the grid
    is shifted as the teacher's; pipelines of diffusers must be told it: `edgeflash/even_steps.py`.

    A step asks the guided teacher, the target and the student once each; in memory are these three,
    and the student's average. The rate is what is told of the authors' own runs, not seen in their
    code; diffusers' scripts take 1e-6, and w from 5. Published: 32 hours of an A100 to a model of
    768 px; measured by others for SD 1.5 at 4 steps FID 34.7, CLIP 30.9 (COCO 2017, 5 k: arXiv
    2403.16627).
    """

    flows: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True

    kind: Literal["distillation", "fine-tuning"] = Field(
        "distillation", description="from a teacher, or an LCM's own from data alone (LCF)"
    )
    learning_rate: float = Field(
        8e-6, gt=0, description="peak learning rate of AdamW; with LoRA, 1e-4 where none is named"
    )
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    target_ema: float = Field(
        0.95, ge=0, lt=1, description="decay of the target network; 0: it is the student"
    )
    ddim_steps: int = Field(
        50, ge=2, description="grid of the teacher's solver; the skip is T / it"
    )
    w_min: float = Field(3.0, ge=0, description="least guidance weight; CFG's scale is 1 + w")
    w_max: float = Field(15.0, ge=0, description="greatest guidance weight")
    w_embedding: int | None = Field(
        None,
        ge=4,
        description="width of the waves that tell the student's UNet w, usually 256; none: it is "
        "not told",
    )
    huber_c: float = Field(1e-3, gt=0, description="width of the pseudo-Huber loss")
    timestep_scaling: float = Field(10.0, gt=0, description="in the boundary scalings")
    attribute_weight: float = Field(0.0, ge=0, description=WEIGHT)
    own_steps: int = Field(
        0,
        ge=0,
        description="half of a batch is met on the way of the student's own sampling, in 1 to so "
        "many steps; 0: all of it is data, noised",
    )

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, given: Any) -> Any:
        lora = isinstance(given, dict) and given.get("lora_rank")
        return {"learning_rate": LORA_RATE} | given if lora else given

    @model_validator(mode="after")
    def _ordered(self) -> LCM:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is greater than w_max {self.w_max}")
        if self.own_steps > self.ddim_steps:
            raise ValueError(f"own_steps {self.own_steps} is greater than ddim_steps")
        if self.own_steps and self.kind == "fine-tuning":
            raise ValueError("own_steps needs a teacher, which fine-tuning does not ask")
        return self

    def step_counts(self) -> range:
        return range(1, self.ddim_steps + 1)

    def needs_teacher(self) -> bool:
        return self.kind == "distillation"

    def told_scales(self) -> tuple[float, float] | None:
        return (1 + self.w_min, 1 + self.w_max) if self.w_embedding else None

    def begin(self, shop: Workshop) -> Stage:
        source = shop.teacher or shop.student
        teacher = shop.frozen(source) if self.needs_teacher() else None
        student = self.listening(shop)
        target = average(student, self.target_ema, warm=False) if self.target_ema else student
        process = shop.process()
        if self.ddim_steps > process.timesteps:
            raise EdgeflashError(f"lcm.ddim_steps: at most {process.timesteps} of this teacher's")
        scheduler = few_step_scheduler(source, self.ddim_steps, self.timestep_scaling)
        batch, nothing = cached_samples(shop)
        witness = None
        if self.attribute_weight:
            witness = Witness.at(shop, "lcm", batch(np.arange(1)), process)
        lesson = Lesson(self, teacher, target, process, nothing, self.ways(), witness)
        players = witness.players() if witness else {}
        return Stage(
            players=players | {"student": Player(student, lesson.loss)},
            batch=batch,
            results={shop.denoiser: student, "scheduler": scheduler},
            averages={shop.denoiser: average(student, self.ema)} if self.ema else {},
            targets=[(target, student)] if target is not student else [],
        )

    def listening(self, shop: Workshop) -> Any:
        """The student's denoiser, with the input for w where the options say so.

        Raises:
            EdgeflashError: it has one already, of another width, or cannot have one.
        """
        has, wants = shop.config(shop.student).get(KEY), self.w_embedding
        if has and has != wants:
            raise EdgeflashError(
                f"lcm.w_embedding: the student's UNet is told w by {has} waves ({KEY}): set {has}"
            )
        if wants and shop.denoiser == "transformer":
            raise EdgeflashError("lcm.w_embedding: diffusers' UNets alone take w: leave it out")
        if wants and not has and self.lora_rank:
            raise EdgeflashError(
                "lcm.w_embedding: needs an input that LoRA does not train: leave one of them out, "
                "as LCM-LoRA does (arXiv 2311.05556)"
            )
        student = shop.load(shop.student, shop.denoiser).train()
        if wants and not has:
            listen(student, wants)
            student.register_to_config(**{KEY: wants})
        return student

    def times(self, n: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
        """Levels of t, grid entry n, and of s, one entry below it, which is 0 at the end; int64."""
        skip = timesteps // self.ddim_steps
        t = (n + 1) * skip - 1
        return t, (t - skip).clamp(min=0)

    def ways(self) -> list[Tensor]:
        """Where sampling in 1 to own_steps steps may stand: the grid entries passed till there."""
        found = []
        for steps in range(1, self.own_steps + 1):
            entries = self.ddim_steps - 1 - torch.tensor(chosen(self.ddim_steps, steps))
            found += [entries[: i + 1] for i in range(steps)]
        return found


@dataclass(frozen=True)
class Lesson:
    """The loss of the student, who may be met on its own ways."""

    options: LCM
    teacher: Any
    target: Any
    process: Process
    nothing: Tensor
    ways: list[Tensor]
    witness: Witness | None

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        x_0, c, options = batch["x_0"], batch["c"], self.options
        w = options.w_min + (options.w_max - options.w_min) * rand(len(c), generator)
        w = w.to(c.device)
        x_t, eps, t, s = self.start(network, x_0, c, w, generator)
        if self.teacher is not None:
            clean, eps = guided(self.teacher, self.process, x_t, t, c, self.nothing, w)
            x_s = self.process.ddim(clean, eps, s)
        else:
            x_s = self.process.noised(x_0, eps, s)
        with torch.no_grad():
            wanted = self.consistency(self.telling(self.target, w), x_s, s, c)
        torch.clear_autocast_cache()  # the target may be the student, whose weights shall learn
        told = self.consistency(self.telling(network, w), x_t, t, c)
        terms = {"consistency": pseudo_huber(told, wanted, options.huber_c)}
        if self.witness:
            doubt = self.witness.doubt(told, batch["labels"], generator)
            terms["attributes"] = options.attribute_weight * doubt.mean()
        return terms

    def start(
        self, network: Any, x_0: Tensor, c: Tensor, w: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t and eps [n, c, h, w], t and s [n]: of data, and of own samples in the second half."""
        count, half, eps = len(x_0), len(x_0) // 2, noise_like(x_0, generator)
        n = randint(0, self.options.ddim_steps, count, generator)
        if self.ways:
            way = self.ways[int(torch.randint(len(self.ways), (), generator=generator))]
            n[half:] = way[-1]
        levels = self.options.times(n, self.process.timesteps)
        t, s = (self.process.at(level).to(x_0.device) for level in levels)
        x_t = self.process.noised(x_0, eps, t)
        if self.ways:
            telling = self.telling(network, w[half:])
            x_t[half:] = self.own(telling, eps[half:], way, c[half:], generator)
        return x_t, eps, t, s

    def own(
        self, network: Any, noise: Tensor, way: Tensor, c: Tensor, generator: torch.Generator
    ) -> Tensor:
        """x [n, c, h, w] at the last grid entry of a way that begins with noise; no gradients."""
        levels, _ = self.options.times(way.to(noise.device), self.process.timesteps)
        times = [time.expand(len(noise)) for time in self.process.at(levels)]

        def ask(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.consistency(network, x, t, c), x

        return renoised(ask, self.process, noise, times, generator)

    def telling(self, unet: Any, w: Tensor) -> Any:
        """The denoiser, told the weights w [n] of its samples where it takes them."""
        width = self.options.w_embedding
        return partial(unet, timestep_cond=waves(w, width)) if width else unet

    def consistency(self, unet: Any, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return consistency(unet, self.process, x, t, c, self.options.timestep_scaling)
