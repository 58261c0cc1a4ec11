"""ControlNets: students that have one, their training, export and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import QUIET
from tiny_student import write_student

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.noise import randn
from edgeflash.roles import Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import runtime_for

PROMPT, SEED, SCALE = "a red star", 5, 2.0
PICTURE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "controlled"
    return write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler", task="ControlNet")


@pytest.fixture(scope="module", params=["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def steered(
    request: pytest.FixtureRequest, controlled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / request.param
    options = ExportOptions(
        steps=(2,), guidance=Guidance(kind="cfg", scale=SCALE), prompts=(PROMPT,)
    )
    target = shelf.make(Target, request.param, {})
    return export_student(Student.open(controlled), target, out, options, console=QUIET)


def by_diffusers(folder: Path, scale: float, guidance: float = SCALE) -> Any:
    """[16, 16, 3] in [0, 1], as its own pipeline draws."""
    from diffusers import StableDiffusionControlNetPipeline
    from PIL import Image

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        image=Image.fromarray(PICTURE),
        num_inference_steps=2,
        guidance_scale=guidance,
        controlnet_conditioning_scale=scale,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_it_draws_as_diffusers_does(steered: Bundle, controlled: Path, scale: float) -> None:
    request = Request(PROMPT, seed=SEED, control=PICTURE, control_scale=scale)
    with TextToImage(steered, runtime_for(steered), low_memory=scale == 0.5) as pipeline:
        ours = pipeline.generate(request).images[0]
    theirs = by_diffusers(controlled, scale)
    assert np.abs(ours / 255 - theirs).max() < 1 / 255
