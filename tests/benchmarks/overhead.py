"""What the pipeline costs over the raw sessions, on a bundle, in one run.

    python tests/benchmarks/overhead.py BUNDLE [--on onnx] [--set threads=1] [--runs 10]

Every call into a session is timed inside the pipeline's own run, so both sides of the ratio see the
same machine at the same moment. Overhead = (whole image - time in sessions) / time in sessions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeflash import shelf
from edgeflash.bundle import Bundle, Component
from edgeflash.roles import Array, Runtime, Session
from edgeflash.runtimes.pipeline import Request, TextToImage


class Timed(Session):
    """A session that writes down how long each call took, in seconds."""

    def __init__(self, inner: Session, spent: list[float]) -> None:
        self.inner, self.spent, self.device = inner, spent, inner.device

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        start = time.perf_counter()
        outputs = self.inner(inputs)
        self.spent.append(time.perf_counter() - start)
        return outputs


def overheads(bundle: Bundle, runtime: Runtime, steps: int | None, runs: int) -> list[float]:
    """Overhead of each run, as a share of the time in sessions; two warm-up runs come first."""
    spent: list[float] = []

    class Clocked(type(runtime)):  # type: ignore[misc]
        def open(self, folder: Path, component: Component) -> Session:
            return Timed(super().open(folder, component), spent)

    pipeline = TextToImage(bundle, Clocked(**runtime.model_dump()))
    shares = []
    for run in range(2 + runs):
        spent.clear()
        start = time.perf_counter()
        pipeline.generate(Request("a photograph of a red ball", seed=run, steps=steps))
        whole = time.perf_counter() - start
        shares.append((whole - sum(spent)) / sum(spent))
        told = f"{whole * 1000:9.2f} ms an image, {sum(spent) * 1000:9.2f} ms in sessions"
        print(f"{'warm-up' if run < 2 else f'run {run - 1:3d}'}  {told}  overhead {shares[-1]:.3%}")
    return shares[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--on", default="onnx", help="runtime")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="its options")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    runtime = shelf.make(Runtime, given.on, dict(pair.split("=", 1) for pair in given.set))
    shares = overheads(Bundle.open(given.bundle), runtime, given.steps, given.runs)
    print(f"overhead over the raw sessions: median {statistics.median(shares):.3%}", end="")
    print(f", worst {max(shares):.3%} of {len(shares)} runs")


if __name__ == "__main__":
    main()
