"""What a method hands to the training loop, and what it finds in the workshop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgeflash import control
from edgeflash.bundle import DENOISERS
from edgeflash.errors import EdgeflashError
from edgeflash.lora import Lora
from edgeflash.networks_sd import load_network
from edgeflash.student import Student

from .data import Store
from .process import Process, predicts
from .w_embedding import insist

Batch = dict[str, Tensor]
CONTEXT = (  # how a denoiser's config calls the width of c
    "caption_channels",
    "joint_attention_dim",
    "cross_attention_dim",
)
Terms = dict[str, Tensor]  # the loss is their sum
Loss = Callable[[Any, Batch, torch.Generator], Terms]


@dataclass
class Player:
    """Networks that one optimizer moves, and the loss it moves them by.

    ``loss(network, batch, generator)`` is given the network as the accelerator wrapped it, and
    draws every random number from ``generator``, which is seeded by the step: that is what makes a
    resumed run equal to an uninterrupted one. For samples it draws by `draws`, and is a mean over
    them: then micro-batches and processes make no difference either. ``batch["step"]``, int64 [],
    counts the steps before.
    """

    network: nn.Module
    loss: Loss
    learning_rate: float | None = None  # None: the method's
    every: int = 1  # takes its turn at every so many steps
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's


@dataclass
class Stage:
    """One stage of training, built by `Method.begin`.

    Attributes:
        players: who takes turns, in this order; one for plain training, two for adversarial.
        batch: the samples of given indices, as the losses want them; the loop adds "step" [], how
            many were done before.
        results: component of the student -> network, tokenizer or scheduler that becomes it.
        averages: component -> exponential moving average of its network; saved in its stead.
        targets: averages that a loss looks at, with the network each one follows; not saved.
        pipeline: class of diffusers that the student is from now on; "": as before.
        finish: called once on the networks about to be saved; its figures go to the log.
    """

    players: dict[str, Player]
    batch: Callable[[np.ndarray], Batch]
    results: dict[str, Any]
    averages: dict[str, AveragedModel] = field(default_factory=dict)
    targets: list[tuple[AveragedModel, nn.Module]] = field(default_factory=list)
    pipeline: str = ""
    finish: Callable[[dict[str, Any]], dict[str, float]] = lambda _: {}

    @property
    def denoiser(self) -> str:
        """What the denoiser is called among the results; "" where there is none."""
        return next((name for name in DENOISERS if name in self.results), "")

    def final(self) -> dict[str, Any]:
        """What to save, everything with a ``save_pretrained``: averages where they are kept."""
        averaged = {name: average.module for name, average in self.averages.items()}
        return self.results | averaged


@dataclass
class Workshop:
    """What lies ready for a method: teacher, the student so far, data, and a place to write.

    Attributes:
        teacher: diffusers folder of the recipe's teacher; None when training from nothing.
        student: diffusers folder of the student as earlier stages left it.
        store: the data, with latents and conditioning cached.
        folder: scratch folder of this stage.
        device: where networks live.
        half: the stage trains in bf16.
    """

    teacher: Path | None
    student: Path
    store: Store
    folder: Path
    device: torch.device
    half: bool = False

    @property
    def denoiser(self) -> str:
        """The component of teacher and student that denoises, as their family calls it."""
        return Student.unfinished(self.student).family.denoiser

    def config(self, folder: Path) -> dict[str, Any]:
        """Of the denoiser in a diffusers folder."""
        return Student.unfinished(folder).config(self.denoiser)

    def load(self, folder: Path, component: str, *loras: Lora) -> Any:
        """A network of a diffusers folder: float32, evaluating, on the device, LoRAs fused into it.

        A denoiser carries the folder's ControlNet or adapter, which learns along with it, or is
        averaged.
        """
        student = Student.unfinished(folder)
        student.loras = loras
        network = load_network(student, component).eval()
        if component == student.family.denoiser:
            network = student.family.listening(student, network)
            insist(network, folder)
        return network.to(self.device, memory_format=torch.channels_last)

    def frozen(self, folder: Path, *loras: Lora) -> Any:
        """A denoiser that learns nothing; in bf16 where the stage is, to be called in `autocast`.

        Only the weights of products are: autocast would round the same ones at every call.

        Raises:
            EdgeflashError: it is of another family than the student, whose c it would not take.
        """
        theirs, ours = (Student.unfinished(each).family.name for each in (folder, self.student))
        if theirs != ours:
            raise EdgeflashError(
                f"{folder}: is of the family {theirs}, the student of {ours}, and they do not hear "
                "prompts alike: name one of the same family"
            )
        denoiser = self.load(folder, self.denoiser, *loras).requires_grad_(False)
        for layer in denoiser.modules() if self.half else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(torch.bfloat16)
        return denoiser

    def autocast(self) -> torch.autocast:
        """What the loop computes losses in, for what is computed beside it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def process(self, *, steers: bool = False) -> Process:
        """The teacher's noise, which the student so far must know; without a teacher its own.

        It is a `Flow` for methods that say that they learn those, and for no others. ``steers``:
        the stage makes a ControlNet or an adapter, which the teacher may have before the student.

        Raises:
            EdgeflashError: the student predicts something else than the teacher, of the same x_t
                and c, or is made for other latents or texts.
        """
        if self.teacher:
            theirs, ours = _kind(self.teacher), _kind(self.student)
            for what, wanted in theirs.items():
                if ours[what] != wanted and not (steers and what in control.CALLED):
                    raise EdgeflashError(
                        f"{self.student}: {what} is {ours[what]}, but the teacher's is {wanted}, "
                        "and neither is converted: name a base, or a teacher, of the same kind"
                    )
        return Process.of(self.teacher or self.student, self.device)

    def listening(self, denoiser: Any) -> Any:
        """A new denoiser of the student's, to be called as loaded ones are: denoiser(x, t, c)."""
        student = Student.unfinished(self.student)
        return student.family.listening(student, denoiser)


def _kind(folder: Path) -> dict[str, Any]:
    """What must be the same of two denoisers, of which one learns from the other."""
    student = Student.unfinished(folder)
    denoiser = student.config(student.family.denoiser)
    hears = next(key for key in CONTEXT if denoiser.get(key))
    width = denoiser[hears]
    has = student.family.steering
    return {
        **{name: "there" if name == has else "missing" for name in control.CALLED},
        "prediction_type": predicts(folder),
        "in_channels": denoiser["in_channels"],
        hears: str(width) if isinstance(width, int) else str(sorted({*width})),
    }


def average(
    network: nn.Module, decay: float | Callable[[int], float], *, warm: bool = True
) -> AveragedModel:
    """A copy of ``network`` that the loop moves by avg <- decay * avg + (1 - decay) * network.

    ``decay`` may depend on how many steps came before; the first step copies ``network``. A number
    is at most (1 + n) / (10 + n) after n steps if ``warm``, or a short training would keep much of
    its start: 0.996^250 is a third. Networks that losses are taken against stay as their paper has
    them.
    """

    def move(averages: Any, weights: Any, steps: Any) -> None:
        n = int(steps)
        now = decay(n) if callable(decay) else min(decay, (1 + n) / (10 + n) if warm else 1)
        own, theirs = _here(averages), _here(weights)
        get_ema_multi_avg_fn(now)(own, theirs, steps)  # type: ignore[no-untyped-call]

    copy = AveragedModel(network, multi_avg_fn=move, use_buffers=True)
    return copy.requires_grad_(False).eval()


def _here(tensors: list[Tensor]) -> list[Tensor]:
    """What of tensors lies in this process, where FSDP has cut them up."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
