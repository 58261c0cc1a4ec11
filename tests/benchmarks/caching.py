"""A bundle with a cached graph against itself without: CPU time of a picture, and the pictures.

    python tests/benchmarks/caching.py shapes-teacher --deep-cache 2,3 --gate 10 --images 100

One export to ONNX of each kind; when the whole denoiser runs is a matter of the schedule alone, so
the others are that bundle with another table. All take turns in one process, on one thread; times
are medians of CPU time, as other work on the machine moves that least. Accuracy is the judge's, of
the embedded models, on the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.distill.judge import held_out_captions, verdict
from edgeflash.export.caching import Way, rows_of, without
from edgeflash.export.line import export_student
from edgeflash.export.ways import way_of
from edgeflash.export_options import ExportOptions
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.student import Student

BATCH = 10


def variants(bundle: Bundle, ways: Sequence[Way]) -> dict[str, Bundle]:
    """The bundle as it is drawn without, and by each way."""
    plain = {n: without(table) for n, table in bundle.manifest.schedules.items()}
    found = {"plain": plain}
    for way in ways:
        found[way.flag] = {n: rows_of(way, table) for n, table in plain.items()}
    return {
        name: Bundle(bundle.folder, bundle.manifest.model_copy(update={"schedules": tables}))
        for name, tables in found.items()
    }


def clock(pipelines: dict[str, TextToImage], rounds: int) -> None:
    """Tells the time of a picture, each in its turn."""
    found: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name, pipeline in pipelines.items():
            begun = time.process_time()
            pipeline.generate(Request("a small red star", seed=number))
            found[name].append((time.process_time() - begun) * 1000)
    plain = found["plain"][1:]  # the first warms up
    for name, times in found.items():
        ratios = [ms / other for ms, other in zip(times[1:], plain, strict=True)]
        print(
            f"{name}: {statistics.median(times[1:]):.0f} ms of CPU, ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def judge(pipelines: dict[str, TextToImage], images: int) -> None:
    """Tells the prompt accuracy of each, and how far its pictures are from those without."""
    captions = held_out_captions(images)
    prompts = tuple(caption.text for caption in captions)
    drawn = {
        name: np.concatenate(
            [
                pipeline.generate(Request(prompts[i : i + BATCH], seed=i)).images
                for i in range(0, images, BATCH)
            ]
        )
        for name, pipeline in pipelines.items()
    }
    for name, pictures in drawn.items():
        pairs = zip(drawn["plain"], pictures, strict=True)
        apart = [psnr_db(a.astype(float), b.astype(float), 255) for a, b in pairs]
        accuracy = verdict(pictures, captions).prompt_accuracy
        print(
            f"{name}: prompt accuracy {accuracy:.1%} of {images}, median of the pictures "
            f"{statistics.median(apart):.1f} dB from plain",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("--deep-cache", default="", help="intervals, with commas")
    parser.add_argument("--gate", default="", help="steps, with commas")
    parser.add_argument("--branch", type=int, default=0)
    parser.add_argument("--images", type=int, default=0, help="to judge")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    student = Student.open(options.student)
    intervals, gates = (
        map(int, filter(None, text.split(","))) for text in (options.deep_cache, options.gate)
    )
    for asked in (
        [ExportOptions(deep_cache=n, cache_branch=options.branch) for n in intervals],
        [ExportOptions(gate=n) for n in gates],
    ):
        if asked:
            measure(student, asked, options.rounds, options.images)


def measure(student: Student, asked: Sequence[ExportOptions], rounds: int, images: int) -> None:
    ways = [way for each in asked if (way := way_of(each))]
    with tempfile.TemporaryDirectory() as scratch:
        target = shelf.make(Target, "onnx", {})
        bundle = export_student(student, target, Path(scratch) / "bundle", asked[0])
        runtime = shelf.make(Runtime, "onnx", {"threads": 1})
        drawn_by = variants(bundle, ways)
        pipelines = {name: TextToImage(each, runtime) for name, each in drawn_by.items()}
        clock(pipelines, rounds)
        if images:
            judge(pipelines, images)


if __name__ == "__main__":
    main()
