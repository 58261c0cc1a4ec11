"""edgeflash itself: a bundle, on one of its runtimes."""

from __future__ import annotations

from clock import Draw
from PIL import Image

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.roles import Runtime
from edgeflash.runtimes.pipeline import Request, TextToImage


def load(folder: str, *, steps: int, on: str, **options: str) -> Draw:
    pipeline = TextToImage(Bundle.open(folder), shelf.make(Runtime, on, options))
    pipeline.load()

    def draw(prompt: str, seed: int) -> Image.Image:
        found = pipeline.generate(Request(prompt, seed=seed, steps=steps))
        return Image.fromarray(found.images[0])

    return draw
