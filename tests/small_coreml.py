"""A small network in the place of a UNet, lowered to Core ML, and what its package holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeflash import shelf
from edgeflash.bundle import TensorSpec
from edgeflash.export.capture import Captured, Sample
from edgeflash.export.program import to_program
from edgeflash.parity import psnr_db
from edgeflash.roles import Target
from edgeflash.runtimes.mil_program import Program, data_folder, read_model


def to(**options: Any) -> Target:
    return shelf.make(Target, "coreml", options)


class Small(nn.Module):
    """Stands for a UNet: [1, 4, 8, 8] and conditioning [1, 4, 1, 6] -> [1, 4, 8, 8]."""

    def __init__(self, width: int = 64, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = (
            nn.Conv2d(4, width, 3, padding=1),
            nn.Conv2d(width, 4, 3, padding=1),
        )
        self.inner = nn.Linear(width, width)
        self.enter.weight.data *= factor
        self.leave.weight.data /= factor
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, sample: Any, encoder_hidden_states: Any) -> Any:
        x = self.enter(sample + encoder_hidden_states.mean((2, 3), keepdim=True))
        x = x + self.inner(x.transpose(1, 3)).transpose(1, 3).relu()
        x = torch.softmax(x.mean((0, 1)) + self.mask, -1) + x
        return self.leave(x)


def small(target: Target, module: nn.Module | None = None) -> Captured:
    """A captured component whose conversion takes no time."""
    specs = [
        TensorSpec(name="sample", role="sample", shape=("n", 4, 8, 8), dtype="float32"),
        TensorSpec(
            name="encoder_hidden_states", role="conditioning", shape=("n", 6, 4), dtype="float32"
        ),
    ]
    inputs = tuple(target.takes(spec, whole=True) for spec in specs)
    output = specs[0].model_copy(
        update={"name": "noise_pred", "role": "prediction", "shape": (1, 4, 8, 8)}
    )
    rng, samples = np.random.default_rng(0), []
    module = (module or Small()).eval()
    for _ in range(3):
        given = {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in inputs}
        with torch.no_grad():
            told = module(*map(torch.from_numpy, given.values())).numpy()
        samples.append(Sample(given, {"noise_pred": told}))
    program = to_program(module, inputs, samples[0])
    return Captured("unet", program, inputs, (output,), tuple(samples))


def evaluated_db(package: Path, captured: Captured, function: str = "") -> float:
    """Of the worst recorded call, against torch."""
    program = Program(package, function)
    return min(
        psnr_db(sample.outputs["noise_pred"], program(sample.inputs)["noise_pred"])
        for sample in captured.samples
    )


def kinds(package: Path) -> list[str]:
    told = read_model(package).mlProgram.functions["main"]
    return [op.type for op in told.block_specializations[told.opset].operations]


def weight_bytes(package: Path) -> int:
    return (data_folder(package) / "weights/weight.bin").stat().st_size
