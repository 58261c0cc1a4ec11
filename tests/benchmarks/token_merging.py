"""A UNet with merged tokens against the same without: time of a call on ONNX Runtime.

    python tests/benchmarks/token_merging.py edgeflash/models/shapes-student --size 64,256

Both take turns in one process, on one thread; times are medians of CPU time, as other work on the
machine moves that least.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from edgeflash.export import onnx_graph
from edgeflash.export.capture import Captured, Sample
from edgeflash.export.merging import MergingBlock, merge_tokens
from edgeflash.export.program import to_program
from edgeflash.student import Student


def call(
    student: Student, side: int, share: float, scratch: Path
) -> tuple[Callable[[], object], str]:
    """One call of the UNet, for a picture of ``side`` px, and the tokens that it merges."""
    module = student.family.load(student, "unet", timestep=999.0)
    inputs, outputs = student.family.signature(student, "unet", (side, side), folded=True)
    cells = side // student.family.latent(student).downsampling
    told = "none"
    if share:
        merge_tokens(module, share, (cells, cells))
        block = next(m for m in module.modules() if isinstance(m, MergingBlock))
        told = f"{block.gone} of {len(block.others) + len(block.stays)}"
    random = np.random.default_rng(0)
    given = {
        spec.name: random.standard_normal([n if isinstance(n, int) else 1 for n in spec.shape])
        for spec in inputs
    }
    given = {name: array.astype(np.float32) for name, array in given.items()}
    sample = Sample(given, {})
    program = to_program(module, inputs, sample)
    captured = Captured("unet", program, inputs, outputs, (sample,))
    path = scratch / f"{share}.onnx"
    onnx_graph.save(onnx_graph.translate(captured), path, 2**30)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, given), told


def compare(student: Student, side: int, share: float, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        calls = [call(student, side, given, Path(scratch)) for given in (0.0, share)]
        found: tuple[list[float], list[float]] = [], []
        for run, _ in calls:
            run()
        start = time.process_time()
        while time.process_time() - start < seconds or len(found[0]) < 3:
            for (run, _), times in zip(calls, found, strict=True):
                begun = time.process_time()
                run()
                times.append((time.process_time() - begun) * 1000)
    plain, merged = map(statistics.median, found)
    print(
        f"{side} px: {calls[1][1]} tokens merged, {plain:.1f} ms -> {merged:.1f} ms, "
        f"ratio {merged / plain:.2f} ({len(found[0])} runs each)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("--size", default="64", help="sides in px, with commas")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=5, help="of CPU time, a size")
    options = parser.parse_args()
    student = Student.open(options.student)
    for side in map(int, options.size.split(",")):
        compare(student, side, options.share, options.seconds)


if __name__ == "__main__":
    main()
