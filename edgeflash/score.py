"""The shapes benchmark on a bundle: prompt accuracy and Fréchet distance of what it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Runtime

if TYPE_CHECKING:
    from edgeflash.distill.judge import Verdict

BATCH = 20


def draw(
    bundle: Bundle,
    runtime: Runtime,
    prompts: tuple[str, ...],
    *,
    steps: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> NDArray[np.uint8]:
    """One picture a prompt, uint8 [n, h, w, 3]; the picture of prompt i has seed i."""
    from edgeflash.runtimes.pipeline import Request, TextToImage

    pictures = []
    with TextToImage(bundle, runtime) as pipeline:
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            made = pipeline.generate(Request(prompt=part, seed=start, steps=steps))
            pictures.append(made.images)
            tell(start + len(part), len(prompts))
    return np.concatenate(pictures)


def score(
    bundle: Bundle,
    runtime: Runtime,
    *,
    steps: int,
    images: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Verdict:
    """What the judge says of the bundle's pictures for the benchmark's first prompts.

    Args:
        bundle: of a model of the shapes scenes.
        steps: one of the bundle's step counts.
        images: how many of the benchmark's prompts; FD needs at least 500.

    Raises:
        EdgeflashError: a bundle whose pictures are not of the judge's size.
    """
    from edgeflash.distill.judge import held_out_captions, load_judge, verdict
    from edgeflash.shapes import SIZE_PX

    size = bundle.manifest.image
    if (size.height, size.width) != (SIZE_PX, SIZE_PX):
        raise EdgeflashError(
            f"{bundle.folder}: draws {size.height}x{size.width} px; the benchmark judges "
            f"{SIZE_PX} px pictures of shapes"
        )
    captions = held_out_captions(images)
    prompts = tuple(caption.text for caption in captions)
    pictures = draw(bundle, runtime, prompts, steps=steps, tell=tell)
    return verdict(load_judge(), pictures, captions)
