"""One peer in its own environment: loads, draws, tells. Knows nothing of edgeflash."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from clock import clock

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    script = importlib.import_module(f"draw_{job['script']}")
    clock(
        lambda: script.load(job["folder"], **job["options"]),
        Path(job["out"]),
        warm=job["warm"],
        runs=job["runs"],
    )
