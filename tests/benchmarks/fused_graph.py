"""One fused graph against the loop over the components: bytes, time of a picture, peak memory.

    edgeflash export STUDENT --to onnx --steps 4 --set fused=1 --out bundle
    python tests/benchmarks/fused_graph.py bundle                  # or several

Times are medians of runs that take turns in one process, tokens and noise included; memory is that
of a process each, which draws three times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeflash import noise
from edgeflash.bundle import Bundle
from edgeflash.runtimes.measure import peak_rss_mib
from edgeflash.runtimes.on_onnx import OnnxRuntime
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.tokenizer import read_tokenizer

PROMPT, SEED = "a small red star left of a large blue ring", 7
Draw = Callable[[], np.ndarray]


def loop(bundle: Bundle, threads: int) -> Draw:
    """The components, one call a stage."""
    pipeline = TextToImage(bundle, OnnxRuntime(provider="cpu", threads=threads))
    pipeline.load()
    return lambda: pipeline.generate(Request(PROMPT, seed=SEED)).images


def fused(bundle: Bundle, threads: int) -> Draw:
    """The fused graph, one call."""
    component = bundle.manifest.fused
    assert component, f"{bundle.folder} has no fused graph: export it with --set fused=1"
    session = OnnxRuntime(provider="cpu", threads=threads).open(bundle.folder, component)
    tokens, fresh = component.inputs
    tokenize = read_tokenizer(bundle.folder, bundle.manifest.tokenizer)
    draws, shape = int(fresh.shape[0]), tuple(map(int, fresh.shape[1:]))
    assert shape[0] == 1, "exported with fused=1"

    def draw() -> np.ndarray:
        ids = np.array([tokenize(PROMPT).ids], tokens.dtype)
        drawn = np.stack([noise.randn(shape, SEED, k) for k in range(draws)])
        return session({tokens.name: ids, fresh.name: drawn})[component.outputs[0].name]

    return draw


WAYS = {"loop": loop, "fused": fused}


def peak_mib(folder: Path, way: str, threads: int) -> float:
    command = [sys.executable, __file__, str(folder), "--only", way, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(folder: Path, runs: int, threads: int) -> None:
    bundle = Bundle.open(folder)
    drawing, load_ms = {}, {}
    for way, make in WAYS.items():
        start = time.perf_counter()
        drawing[way] = make(bundle, threads)
        load_ms[way] = (time.perf_counter() - start) * 1000
    apart = np.abs(drawing["loop"]().astype(int) - drawing["fused"]()).max()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way, draw in drawing.items():
            start = time.perf_counter()
            draw()
            found[way].append((time.perf_counter() - start) * 1000)
    parts = [bundle.component(name) for name in ("text_encoder", "unet", "vae_decoder")]
    whole = bundle.manifest.fused
    assert whole
    sizes = {"loop": [f for part in parts for f in part.files], "fused": whole.files}
    print(f"{folder.name}: {bundle.manifest.default_steps} steps, {apart} levels apart at the most")
    for way in WAYS:
        print(
            f"  {way:<6} {sum(f.bytes for f in sizes[way]) / 2**20:8.2f} MiB"
            f"  load {load_ms[way]:7.0f} ms  picture {statistics.median(found[way]):7.1f} ms"
            f"  peak RSS {peak_mib(folder, way, threads):6.0f} MiB"
        )
    ratios = [b / a for a, b in zip(found["loop"], found["fused"], strict=True)]
    print(f"  time of fused / loop: {statistics.median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="0: ONNX Runtime's choice")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for folder in options.bundles:
        if options.only:
            draw = WAYS[options.only](Bundle.open(folder), options.threads)
            for _ in range(3):
                draw()
            print(peak_rss_mib())
        else:
            compare(folder, options.runs, options.threads)


if __name__ == "__main__":
    main()
