"""Exports full-size models with random weights; tells seconds and peak memory of the process.

    python tests/benchmarks/export_full_size.py sdxs-512            # also: bk-sdm-tiny, sd15 …
    python tests/benchmarks/export_full_size.py sd15 --precision fp16

The folder is written once, by another process, and is gone at the end unless ``--keep`` names a
place for it. What is measured is one fresh process: from starting Python to the finished bundle,
imports, hashes and the parity ladder on one golden included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgeflash.blueprints import UNETS, Blueprint


def export(folder: Path, out: Path, target: str, precision: str) -> None:
    """What `edgeflash export` does, with the time of each stage."""
    from edgeflash import shelf
    from edgeflash.export.line import export_student
    from edgeflash.export_options import ExportOptions
    from edgeflash.roles import Target
    from edgeflash.student import Student

    lowered = shelf.make(Target, target, {"precision": precision})
    bundle = export_student(Student.open(folder), lowered, out, ExportOptions(steps=(1,)))
    for figure in bundle.manifest.parity:
        if figure.metric in ("psnr_db", "delta_ratio"):
            print(f"{figure.rung} {figure.component:<14} {figure.metric} {figure.value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=UNETS)
    parser.add_argument("--to", default="onnx")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--keep", type=Path, help="write the folder here, or use what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / options.name
        if not (folder / "model_index.json").exists():
            subprocess.run([sys.executable, __file__, "--write", folder, options.name], check=True)
        out = Path(scratch) / "bundle"
        start = time.perf_counter()
        command = [sys.executable, __file__, "--export", folder, out, options.to, options.precision]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        print(
            f"{options.name} to {options.to} {options.precision}: {seconds:.1f} s "
            f"({usage.ru_utime + usage.ru_stime:.1f} s of CPU), "
            f"peak {usage.ru_maxrss / 2**20:.2f} GiB"
        )
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        Blueprint.of(sys.argv[3]).write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--export"]:
        export(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:6])
    else:
        main()
