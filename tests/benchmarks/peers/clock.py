"""Times "prompt to PNG" the same way in every peer's own environment; standard library alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROMPT = "a photograph of a red ball on a wooden table"

MEASURED = "torch", "diffusers", "optimum-onnx", "onnxruntime", "openvino", "openvino-genai"

Draw = Callable[[str, int], Any]  # prompt, seed -> a picture with PIL's `save`


def clock(load: Callable[[], Draw], out: Path, *, warm: int, runs: int) -> None:
    """Loads, draws and saves; prints what was found as one JSON line.

    The peak of memory is that of this process, so a peer is asked once a process.
    """
    start = time.perf_counter()
    draw = load()
    load_ms = _since(start)
    spent = []
    for seed in range(1 + warm + runs):
        start = time.perf_counter()
        draw(PROMPT, seed).save(out)
        spent.append(_since(start))
    found = {
        "versions": {name: found for name in MEASURED if (found := _version(name))},
        "load_ms": load_ms,
        "first_ms": spent[0],
        "runs_ms": spent[1 + warm :],
        "peak_rss_mib": _peak_rss_mib(),
    }
    print(json.dumps(found), file=sys.__stdout__, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _peak_rss_mib() -> float | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None
