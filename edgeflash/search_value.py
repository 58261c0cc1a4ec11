"""What blocks of a teacher are worth: what its UNet's output loses when they are removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflash.export_options import ExportOptions
from edgeflash.roles import Target
from edgeflash.shelf import make

if TYPE_CHECKING:
    from edgeflash.architecture import Config
    from edgeflash.search_blocks import Anatomy
    from edgeflash.student import Student

PROMPTS, STEPS, CALLS = 2, 4, 8  # drawn by the teacher; of these calls, so many at the most
Value = Callable[["Config", "Anatomy"], float]  # the higher, the better


def parameters_kept(start: Anatomy) -> Value:
    """The share of the teacher's weights that are left: a stand-in, where there is no teacher."""

    def value(_: Config, anatomy: Anatomy) -> float:
        return anatomy.parameters / start.parameters

    return value


class Teacher:
    """A trained UNet, and calls of it in its own loop.

    The loss of a smaller one is the mean of |T - S|^2 / |T|^2 over these calls, with the weights
    that block distillation begins with, before any training: SnapFusion (arXiv 2306.00980,
    sec. 3.1) asks the same of CLIP score.
    """

    def __init__(self, student: Student, size: tuple[int, int]) -> None:
        from edgeflash.export.line import rehearsal
        from edgeflash.networks_sd import load_network

        own = student.manifest.prompts if student.manifest else ()
        asked = ExportOptions(steps=(STEPS,), size=size, prompts=own, fold_timestep=False)
        tape = rehearsal(student, make(Target, "torch", {}), asked)
        tape.prompts = tape.prompts[:PROMPTS]
        for name in student.family.text_encoders:
            tape.record(name)
        samples = tape.record("unet")[1]
        names = [spec.name for spec in tape.signature("unet")[0]]
        answer = tape.signature("unet")[1][0].name
        chosen = samples[:: -(-len(samples) // CALLS)]
        self._calls = [([s.inputs[n] for n in names], s.outputs[answer]) for s in chosen]
        self._student = student
        self._unet = load_network(student, "unet").eval().requires_grad_(False)

    def __call__(self, config: Config, anatomy: Anatomy) -> float:
        """Minus the loss of the UNet with that config."""
        import torch

        network = self._student.family.wrap(self.pruned(config), "unet").eval()
        losses = []
        with torch.no_grad():
            for given, wanted in self._calls:
                made = network(*map(torch.from_numpy, given))
                made = made[0] if isinstance(made, tuple) else made
                error = (made - torch.from_numpy(wanted)).square().mean()
                losses.append(float(error / torch.from_numpy(wanted).square().mean()))
        return -sum(losses) / len(losses)

    def pruned(self, config: Config) -> Any:
        """The UNet as block distillation begins with it."""
        import torch

        from edgeflash.distill.by_blocks import prune_to
        from edgeflash.networks_sd import quiet

        torch.manual_seed(0)
        with quiet():
            return prune_to(self._unet, config)[0]

    def write(self, config: Config, folder: Path) -> None:
        """The teacher's folder with that UNet in it."""
        shutil.copytree(self._student.folder, folder, ignore=shutil.ignore_patterns("unet"))
        self.pruned(config).save_pretrained(str(folder / "unet"))
