"""Exports full-size models with random weights; tells seconds and peak memory.

    python tests/benchmarks/export_full_size.py sdxs-512            # also: bk-sdm-tiny, sd15 …
    python tests/benchmarks/export_full_size.py sd15 --precision fp16
    python tests/benchmarks/export_full_size.py --bounds            # those with limits, in turn
    python tests/benchmarks/export_full_size.py sdxs-512 --children none     # or one, or two

The folder is written once, by another process, and is gone at the end unless ``--keep`` names a
place for it. What is measured is one fresh process with its children: from starting Python to the
finished bundle, imports, hashes and the parity ladder included; int8 is calibrated on 16 prompts.
Memory is told twice: of the largest process, and of all together (what they share counts once,
looked at four times a second); beside each stage of a large component, of the process it ran in.
``--children`` says how many components may be made at a time in processes of their own, to see what
that is worth.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from edgeflash.blueprints import UNETS, Blueprint
from edgeflash.price import NO_FLOORS

GB = 1e9
BOUNDS: dict[tuple[str, str, str], tuple[float | None, float]] = {  # of the UNet: seconds, GB
    ("sdxs-512", "onnx", "int8"): (90, 3),
    ("sd15", "onnx", "fp16"): (60, 5),
    ("sdxl", "onnx", "fp16"): (None, 16),
    ("sdxl", "onnx", "int8-weights"): (None, 16),
    ("sdxl", "openvino", "fp16"): (None, 16),
    ("sdxl", "openvino", "int8-weights"): (None, 16),
}
CHILDREN = {"none": 0, "one": 1, "two": 2}
STAGE = re.compile(r"(?:capture|lower) unet\b.*?([\d.]+) s +([\d.]+) GiB")


def export(folder: Path, out: Path, target: str, precision: str, children: str) -> None:
    """What `edgeflash export` does, with the time of each stage."""
    from edgeflash import shelf
    from edgeflash.export import memory, nursery
    from edgeflash.export_options import ExportOptions
    from edgeflash.roles import Target
    from edgeflash.student import Student

    if children == "none":
        memory.APART_NUMBERS = sys.maxsize
    elif children in CHILDREN:
        memory.check = lambda *_: CHILDREN[children]  # type: ignore[assignment]
    lowered = shelf.make(Target, target, {"precision": precision})
    student = Student.open(folder)
    with nursery.begun(student, lowered) as imports:
        from edgeflash.export.line import PROMPTS, export_student

        asked = ExportOptions(steps=(1,))
        if precision == "int8":  # fresh weights are no test of floors
            pictures = (*PROMPTS, *(f"{prompt}, at night" for prompt in PROMPTS))
            asked = ExportOptions(steps=(1,), prompts=pictures, floors=NO_FLOORS)
        bundle = export_student(student, lowered, out, asked, nursery=imports)
    for figure in bundle.manifest.parity:
        if figure.metric in ("psnr_db", "delta_ratio"):
            print(f"{figure.rung} {figure.component:<14} {figure.metric} {figure.value:.4g}")


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    for parent in found:
        try:
            told = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found += map(int, told.split())
    return found


def held_bytes(pid: int) -> int:
    """Memory of a process; of what it shares, its part."""
    try:
        told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return int(told.split("Pss:")[1].split()[0]) * 1024


def measured(command: list[str]) -> str:
    """Runs a command, passes on what it says, and returns that."""
    start, together, said = time.perf_counter(), [0], list[str]()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.25):
            together.append(sum(map(held_bytes, family(process.pid))))

    looking = threading.Thread(target=look)
    looking.start()
    assert process.stderr
    for line in process.stderr:
        print(line, end="", flush=True)
        said.append(line)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    ended.set()
    looking.join()
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{seconds:.1f} s ({cpu:.1f} s of CPU), peak {usage.ru_maxrss / 2**20:.2f} GiB in one "
        f"process, {max(together) / 2**30:.2f} GiB together"
    )
    if code := os.waitstatus_to_exitcode(status):
        print(f"ended with {code}")
    return "".join(said)


def judge(said: str, seconds: float | None, most_gb: float) -> None:
    """Holds what was told of the UNet against its limits."""
    stages = [(float(s), float(gib) * 2**30 / GB) for s, gib in STAGE.findall(said)]
    if len(stages) != 2:
        print("bound: its UNet was not made in a process of its own, or not made")
        return
    took, peak_gb = sum(s for s, _ in stages), max(gb for _, gb in stages)
    within = peak_gb <= most_gb and (seconds is None or took <= seconds)
    limit = f"{most_gb:g} GB" + (f" and {seconds:g} s" if seconds else "")
    told = "within" if within else "BEYOND"
    print(f"bound: UNet {took:.1f} s, {peak_gb:.2f} GB: {told} {limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=UNETS, nargs="?")
    parser.add_argument("--bounds", action="store_true", help="all that have limits")
    parser.add_argument("--to", default="onnx")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--children", choices=CHILDREN, default="", help="default: as usual")
    parser.add_argument("--keep", type=Path, help="write folders below this, or use what is there")
    options = parser.parse_args()
    if options.bounds == bool(options.name):
        parser.error("say either a name or --bounds")
    asked = [*BOUNDS] if options.bounds else [(options.name, options.to, options.precision)]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, to, precision) in enumerate(asked):
            folder = (options.keep or Path(scratch)) / name
            if not (folder / "model_index.json").exists():
                command = [sys.executable, __file__, "--write", str(folder), name]
                subprocess.run(command, check=True)
            print(f"{name} to {to} {precision}", flush=True)
            out = Path(scratch) / f"bundle-{number}"
            words = ["--export", str(folder), str(out), to, precision, options.children]
            said = measured([sys.executable, __file__, *words])
            judge(said, *BOUNDS.get((name, to, precision), (None, float("inf"))))
            for path in (out, out.with_name(f"{out.name}.run")):
                shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        Blueprint.of(sys.argv[3]).write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--export"]:
        export(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:7])
    else:
        main()
