"""Bundles, unmodified, in the pipelines of others, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported import Exported

from edgeflash import shelf
from edgeflash.noise import randn
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime
from edgeflash.runtimes.pipeline import Request, TextToImage

ROOT = Path(__file__).resolve().parents[1]

OPTIMUM = """
import sys
import numpy as np, torch
from optimum.onnxruntime import ORTStableDiffusionPipeline
folder, noise, prompt, steps, scale, out = sys.argv[1:]
pipeline = ORTStableDiffusionPipeline.from_pretrained(folder)
latents = torch.from_numpy(np.load(noise))
side = latents.shape[-1] * pipeline.vae_scale_factor
drawn = pipeline(prompt, num_inference_steps=int(steps), guidance_scale=float(scale), height=side,
                 width=side, latents=latents, output_type="np")
np.save(out, drawn.images)
"""


@pytest.mark.slow
def test_optimum_draws_the_same(guided: Exported, tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    packages = [_pinned("torch"), "optimum-onnx[onnxruntime]", "diffusers<0.36"]  # of one time
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    script, noise, out = (tmp_path / name for name in ("draw.py", "noise.npy", "out.npy"))
    script.write_text(OPTIMUM)
    manifest = guided.bundle.manifest
    golden, space, size = manifest.goldens[0], manifest.latent, manifest.image
    side = size.height // space.downsampling
    np.save(noise, randn((1, space.channels, side, side), golden.seed))
    words = [guided.bundle.folder, noise, golden.prompt, golden.steps, manifest.guidance.scale, out]
    subprocess.run(
        [str(word) for word in (python, script, *words)],
        check=True,
        env=os.environ | {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"},
    )
    with TextToImage(guided.bundle, shelf.make(Runtime, "onnx", {})) as pipeline:
        request = Request(golden.prompt, seed=golden.seed, steps=golden.steps)
        ours = pipeline.generate(request).images.astype(float)
    assert psnr_db(ours, np.load(out) * 255, 255) >= 40


def _pinned(package: str) -> str:
    """A package as `.ci/constraints.txt` names it; other people's pins go before the rest of it."""
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))
