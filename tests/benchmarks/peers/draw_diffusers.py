"""diffusers in torch: the student's own folder, eager or compiled."""

from __future__ import annotations

import torch
from clock import Draw
from diffusers import DiffusionPipeline


def load(folder: str, *, steps: int, compiled: str = "", dtype: str = "float32") -> Draw:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decoder = torch.compile(pipeline.vae.decoder)

    def draw(prompt: str, seed: int) -> object:
        noise = torch.Generator().manual_seed(seed)
        drawn = pipeline(prompt, num_inference_steps=steps, guidance_scale=1, generator=noise)
        return drawn.images[0]

    return draw
