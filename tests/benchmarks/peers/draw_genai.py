"""OpenVINO GenAI: an OpenVINO bundle of edgeflash, with fixed shapes, which its guide advises."""

from __future__ import annotations

import openvino_genai
from clock import Draw
from PIL import Image


def load(folder: str, *, steps: int, side: int) -> Draw:
    pipeline = openvino_genai.Text2ImagePipeline(folder)
    pipeline.reshape(1, side, side, 1.0)  # guidance scale: 1.0 leaves one row of the batch
    pipeline.compile("CPU")

    def draw(prompt: str, seed: int) -> Image.Image:
        drawn = pipeline.generate(
            prompt, height=side, width=side, num_inference_steps=steps, guidance_scale=1.0,
            rng_seed=seed,
        )  # fmt: skip
        return Image.fromarray(drawn.data[0])

    return draw
