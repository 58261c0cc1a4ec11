"""One system measured in a process of its own: ``python -m edgeflash.runtimes.measure``.

A fresh process, so that the first load is a first load and the peak of memory is the run's and not
the tool's. Takes a `Job` as JSON on standard input; writes JSON lines: progress, then what it
found.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from edgeflash import shelf, talk
from edgeflash.bundle import Bundle
from edgeflash.conditions import example, masks
from edgeflash.control import edges_of
from edgeflash.errors import EdgeflashError
from edgeflash.machine import peak_rss_mib
from edgeflash.png import save_png
from edgeflash.roles import Runtime
from edgeflash.runtimes.pipeline import Request, TextToImage

WARM_LOADS = 3


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Json):
    """What to measure. None leaves a setting to the bundle."""

    bundle: str
    runtime: str
    options: dict[str, Any] = {}
    prompts: tuple[str, ...] = Field(min_length=1)
    steps: int | None = None
    guidance: float | None = None
    batch: int = Field(1, ge=1)
    seed: int = 0
    warmup_runs: int = Field(2, ge=0)
    runs: int = Field(10, ge=1)
    minutes: float = Field(0, ge=0)  # of drawing without a pause, after the runs
    low_memory: bool = False
    images: str | None = None  # folder to save one picture for each prompt in


class Measured(_Json):
    """What was found; times in ms. ``stages_ms``: samples of each stage, the denoiser's by step."""

    device: str
    options: dict[str, Any]
    steps: int
    guidance_scale: float
    height: int
    width: int
    cold_load_ms: float | None  # None with low_memory, which loads while it draws
    first_image_ms: float
    warm_load_ms: float | None
    runs_ms: tuple[float, ...]
    sustained_ms: tuple[float, ...] = ()  # every run of the minutes without a pause
    stages_ms: dict[str, tuple[float, ...]]
    peak_rss_mib: float | None
    images: tuple[str, ...]  # file names


def measure(job: Job, tell: Callable[[int, int], None]) -> Measured:
    """Does the job in this process.

    ``tell(done, of)`` after every image of ``of``; between them, seconds of those without a pause.
    """
    start = time.perf_counter()
    runtime = shelf.make(Runtime, job.runtime, job.options)
    pipeline = TextToImage(
        Bundle.open(job.bundle, check="size"), runtime, low_memory=job.low_memory
    )
    if not job.low_memory:
        pipeline.load()
    cold_load_ms = _since(start)

    texts = tuple(job.prompts[j % len(job.prompts)] for j in range(job.batch))
    request = request_of(pipeline.bundle, job, texts)
    of = 1 + job.warmup_runs + job.runs + len(job.prompts)
    stages_ms: dict[str, list[float]] = defaultdict(list)
    runs_ms = []
    for done in range(1 + job.warmup_runs + job.runs):
        start = time.perf_counter()
        events = [(event.stage, event.elapsed_ms) for event in pipeline.stream(request)]
        runs_ms.append(_since(start))
        if done > job.warmup_runs:
            for stage, elapsed_ms in events:
                stages_ms[stage].append(elapsed_ms)
        tell(done + 1, of)
    sustained_ms = _sustain(pipeline, request, job.minutes * 60, tell)
    peak = peak_rss_mib()

    names = _draw_each(pipeline, job, lambda j: tell(of - len(job.prompts) + j + 1, of))
    manifest = pipeline.manifest
    scale = manifest.guidance.scale if job.guidance is None else job.guidance
    return Measured(
        device=pipeline.device,
        options=runtime.model_dump(),
        steps=job.steps or manifest.default_steps,
        guidance_scale=scale,
        height=manifest.image.height,
        width=manifest.image.width,
        cold_load_ms=None if job.low_memory else cold_load_ms,
        first_image_ms=runs_ms[0],
        warm_load_ms=None if job.low_memory else _warm_load_ms(pipeline),
        runs_ms=tuple(runs_ms[1 + job.warmup_runs :]),
        sustained_ms=sustained_ms,
        stages_ms={stage: tuple(samples) for stage, samples in stages_ms.items()},
        peak_rss_mib=peak,
        images=names,
    )


def request_of(bundle: Bundle, job: Job, prompts: tuple[str, ...]) -> Request:
    """What is drawn; of bundles that see a picture too, of an example."""
    made, conditions = bundle.manifest.image, bundle.manifest.conditions
    image, mask = example(job.seed, (made.height, made.width))
    return Request(
        prompts,
        seed=job.seed,
        steps=job.steps,
        guidance=job.guidance,
        image=image if conditions else None,
        mask=mask if masks(conditions) else None,
        control=edges_of(image) if bundle.steering else None,
    )


def _sustain(
    pipeline: TextToImage, request: Request, seconds: float, tell: Callable[[int, int], None]
) -> tuple[float, ...]:
    """Draws for so long without a pause -> ms of every run."""
    runs_ms: list[float] = []
    start = time.perf_counter()
    while (gone := time.perf_counter() - start) < seconds:
        began = time.perf_counter()
        pipeline.generate(request)
        runs_ms.append(_since(began))
        tell(round(gone), round(seconds))
    return tuple(runs_ms)


def _draw_each(pipeline: TextToImage, job: Job, tell: Callable[[int], None]) -> tuple[str, ...]:
    """One picture for each prompt, all with the job's seed -> file names."""
    if job.images is None:
        return ()
    names = []  # nothing is written before all else went well
    for j, prompt in enumerate(job.prompts):
        request = request_of(pipeline.bundle, job, (prompt,))
        names.append(f"{j}.png")
        picture = Image.fromarray(pipeline.generate(request).images[0])
        save_png(picture, Path(job.images) / names[-1])
        tell(j)
    return tuple(names)


def _warm_load_ms(pipeline: TextToImage) -> float:
    samples = []
    for _ in range(WARM_LOADS):
        pipeline.close()
        start = time.perf_counter()
        pipeline.load()
        samples.append(_since(start))
    return statistics.median(samples)


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _end_with(parent: int) -> None:
    """Nobody hears what is measured any more, and it may be at work for long."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    say = talk.speaker()
    job = Job.model_validate_json(sys.stdin.read())
    try:
        found = measure(job, lambda done, of: say({"done": done, "of": of}))
    except EdgeflashError as error:
        say({"error": str(error)})
        raise SystemExit(2) from None
    say({"measured": found.model_dump(mode="json")})


if __name__ == "__main__":
    main()
