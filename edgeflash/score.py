"""The shapes benchmark on a bundle: prompt accuracy and Fréchet distance of what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.machine import usable_cores
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
    """One picture a prompt, uint8 [n, h, w, 3]; the picture of prompt i has seed i.

    Every core draws batches of its own: that takes a sixth less time than all cores at one. A
    runtime whose threads were chosen draws alone.
    """
    from edgeflash.runtimes.pipeline import Request, TextToImage

    crew = [runtime]
    if getattr(runtime, "threads", 1) == 0:
        crew = [runtime.model_copy(update={"threads": 1})] * usable_cores()
    idle: SimpleQueue[TextToImage] = SimpleQueue()

    def batch(start: int) -> NDArray[np.uint8]:
        pipeline = idle.get()
        try:
            request = Request(prompts[start : start + BATCH], seed=start, steps=steps)
            return pipeline.generate(request).images
        finally:
            idle.put(pipeline)

    pictures: list[NDArray[np.uint8]] = []
    with ExitStack() as pipelines, ThreadPoolExecutor(len(crew)) as pool:
        for one in crew:
            idle.put(pipelines.enter_context(TextToImage(bundle, one)))
        for part in pool.map(batch, range(0, len(prompts), BATCH)):
            pictures.append(part)
            tell(sum(map(len, pictures)), len(prompts))
    return np.concatenate(pictures)


def check(bundle: Bundle, runtime: Runtime, counts: Sequence[int]) -> None:
    """Asks for every step count before the first picture is drawn.

    Raises:
        EdgeflashError: a bundle that cannot draw in so many steps, or whose pictures are not of
            the judge's size.
    """
    from edgeflash.runtimes.pipeline import Request, TextToImage
    from edgeflash.shapes import SIZE_PX

    size = bundle.manifest.image
    if (size.height, size.width) != (SIZE_PX, SIZE_PX):
        raise EdgeflashError(
            f"{bundle.folder}: draws {size.height}x{size.width} px; the benchmark judges "
            f"{SIZE_PX} px pictures of shapes"
        )
    pipeline = TextToImage(bundle, runtime)
    for count in counts:
        pipeline.check(Request("", steps=count))


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
        EdgeflashError: see `check`.
    """
    from edgeflash.distill.judge import held_out_captions, verdict

    check(bundle, runtime, (steps,))
    captions = held_out_captions(images)
    prompts = tuple(caption.text for caption in captions)
    pictures = draw(bundle, runtime, prompts, steps=steps, tell=tell)
    return verdict(pictures, captions)
