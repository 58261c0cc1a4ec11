"""optimum on ONNX Runtime: an ONNX bundle of edgeflash, whose layout is optimum's own."""

from __future__ import annotations

import torch
from clock import Draw
from optimum.onnxruntime import ORTStableDiffusionPipeline


def load(folder: str, *, steps: int, side: int) -> Draw:
    pipeline = ORTStableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int) -> object:
        drawn = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=1,
            height=side,
            width=side,
            generator=torch.Generator().manual_seed(seed),
        )
        return drawn.images[0]

    return draw
