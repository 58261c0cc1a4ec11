"""The shapes benchmark on a bundle: prompt accuracy and Fréchet distance of what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeflash import shapes
from edgeflash.bundle import Bundle
from edgeflash.conditions import masks
from edgeflash.control import edges_of
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.machine import usable_cores
from edgeflash.roles import Runtime

if TYPE_CHECKING:
    from edgeflash.distill.judge import Verdict

BATCH = 20
TIMES = 4  # that a picture is enlarged along a side, where a network does not say it
TASKS = ("text", "inpaint", "enlarge", "edges")

Given = Callable[[int], dict[str, Any]]  # prompt number -> what a request holds beside the prompt


def draw(
    bundle: Bundle,
    runtime: Runtime,
    prompts: tuple[str, ...],
    *,
    steps: int,
    given: Given | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> NDArray[np.uint8]:
    """One picture a prompt, uint8 [n, h, w, 3]; the picture of prompt i has seed i.

    With ``given`` each prompt is a request of its own, else they are drawn in batches. Every core
    draws others: that takes a sixth less time than all cores at one. A runtime whose threads were
    chosen draws alone.
    """
    from edgeflash.runtimes.pipeline import Request, TextToImage

    crew, size = [runtime], 1 if given else BATCH
    if getattr(runtime, "threads", 1) == 0:
        crew = [runtime.model_copy(update={"threads": 1})] * usable_cores()
    idle: SimpleQueue[TextToImage] = SimpleQueue()

    def batch(start: int) -> NDArray[np.uint8]:
        pipeline = idle.get()
        try:
            more = given(start) if given else {}
            request = Request(prompts[start : start + size], seed=start, steps=steps, **more)
            return pipeline.generate(request).images
        finally:
            idle.put(pipeline)

    pictures: list[NDArray[np.uint8]] = []
    with ExitStack() as pipelines, ThreadPoolExecutor(len(crew)) as pool:
        for one in crew:
            idle.put(pipelines.enter_context(TextToImage(bundle, one)))
        for part in pool.map(batch, range(0, len(prompts), size)):
            pictures.append(part)
            tell(sum(map(len, pictures)), len(prompts))
    return np.concatenate(pictures)


def check(
    bundle: Bundle, runtime: Runtime, counts: Sequence[int], task: str | None = None
) -> Given | None:
    """Asks for every step count before the first picture is drawn; gives what `given_of` does.

    Raises:
        EdgeflashError: a bundle that cannot draw in so many steps, or is not for the task, or whose
            pictures are not of the judge's size.
    """
    from edgeflash.runtimes.pipeline import Request, TextToImage

    size = bundle.manifest.image
    if (size.height, size.width) != (shapes.SIZE_PX, shapes.SIZE_PX):
        raise EdgeflashError(
            f"{bundle.folder}: draws {size.height}x{size.width} px; the benchmark judges "
            f"{shapes.SIZE_PX} px pictures of shapes"
        )
    pipeline, given = TextToImage(bundle, runtime), given_of(bundle, task)
    for count in counts:
        pipeline.check(Request("", steps=count, **(given(0) if given else {})))
    return given


def score(
    bundle: Bundle,
    runtime: Runtime,
    *,
    steps: int,
    images: int,
    task: str | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Verdict:
    """What the judge says of the bundle's pictures for the benchmark's first prompts.

    Args:
        bundle: of a model of the shapes scenes.
        steps: one of the bundle's step counts.
        images: how many of the benchmark's prompts; FD needs at least 500.
        task: of `TASKS`; None: what its networks were trained for.

    Raises:
        EdgeflashError: see `check`.
    """
    from edgeflash.distill.judge import held_out_captions, verdict

    given = check(bundle, runtime, (steps,), task)
    captions = held_out_captions(images)
    prompts = tuple(caption.text for caption in captions)
    pictures = draw(bundle, runtime, prompts, steps=steps, given=given, tell=tell)
    return verdict(pictures, captions)


def given_of(bundle: Bundle, task: str | None) -> Given | None:
    """What each prompt's own scene gives for a task; None where prompts are all there is.

    inpaint: the scene, and a mask over one of its objects; networks that see no masks blend.
    enlarge: the scene so many times smaller; networks that see no pictures keep its pixels as means
    (`runtimes/edit.py`). edges: those of the scene, for what steers.
    """
    conditions = bundle.manifest.conditions
    own = "text" if not conditions else "inpaint" if masks(conditions) else "enlarge"
    own = "edges" if bundle.steering else own
    task = task or own
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    changes = own == "enlarge" and not conditions[0].enlarges
    if (task != own and (own != "text" or task == "edges")) or changes:
        raise EdgeflashError(f"{bundle.folder}: what its networks see is not for {task!r}")
    if task == "text":
        return None
    if task == "edges":
        return lambda number: {"control": edges_of(_held_out(number)[1])}
    if task == "inpaint":
        return _to_inpaint
    return lambda number: _to_enlarge(number, conditions[0].enlarges if conditions else None)


def _to_inpaint(number: int) -> dict[str, Any]:
    scene, picture = _held_out(number)
    slot = number % len(scene.things)
    return {"image": picture, "mask": shapes.around(scene, slot)}


def _to_enlarge(number: int, sees: int | None) -> dict[str, Any]:
    from edgeflash.runtimes.edit import enlarge

    _, picture = _held_out(number)
    times = sees or TIMES
    side = len(picture) // times
    patches = picture.reshape(side, times, side, times, 3)
    small = np.rint(patches.mean((1, 3))).astype(np.uint8)
    return {"image": small} if sees else {"edit": enlarge(small, picture.shape[:2])}


def _held_out(number: int) -> tuple[shapes.Scene, NDArray[np.uint8]]:
    """The scene of the benchmark's prompt number so and so, and its picture."""
    scene = shapes.scene(shapes.HELD_OUT_SEED, number)
    return scene, shapes.render([scene], shapes.HELD_OUT_SEED, [number])[0]
