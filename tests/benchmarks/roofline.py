"""How cost grows with size, batch and steps, and what this machine could do at best.

    python tests/benchmarks/roofline.py sdxs-512 --out DIR [--sizes 256,512,768,1024]
        [--batches 1,2,4] [--steps 1,2,4,8] [--on onnx] [--precision fp32]

The student is a published UNet's name with random weights, as `edgeflash price` takes it. Every
size is exported and run; batches and steps at 512 px alone. A stage's roof is the smaller of the
machine's peak and what its memory feeds: GFLOP of the stage over the bytes that have to move (see
`runtimes/moved.py`). Peaks and bandwidth are measured in the same run. Writes `roofline.json` and
`roofline.html`.
Written, and not run to its end yet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from edgeflash.blueprints import UNETS, Blueprint
from edgeflash.peaks import peaks, sums_of
from edgeflash.price import _export
from edgeflash.report_html import STYLE
from edgeflash.report_svg import Dot, Line, lines, scatter
from edgeflash.roles import Target
from edgeflash.runtimes.bench import PROMPT, run_apart
from edgeflash.runtimes.measure import Job
from edgeflash.runtimes.moved import moved_mib
from edgeflash.shelf import make
from edgeflash.student import Student
from edgeflash.work import gflops

BASE = 512  # px, for batches and steps
CONSOLE = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Row:
    """One stage of one run; ``attained`` and ``roof`` in GFLOP/s."""

    stage: str
    size: int
    batch: int
    steps: int
    ms: float
    gflop: float
    mib: float  # that have to move

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.gflop * 1e9 / (self.mib * 2**20)

    @property
    def attained(self) -> float:
        return self.gflop / self.ms * 1e3


def rows(given: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Every stage of every run."""
    folder = scratch / given.student
    Blueprint.of(given.student, given.decoder).write(folder)
    student, target = Student.open(folder), make(Target, given.on, {"precision": given.precision})
    for size in given.sizes:
        counts = given.steps if size == BASE else given.steps[:1]
        bundle = _export(student, target, scratch / "bundle", counts, (size, size), CONSOLE)
        work = gflops(student, (size, size))
        runs = [(batch, counts[0]) for batch in (given.batches if size == BASE else [1])]
        runs += [(1, steps) for steps in counts[1:]]
        for batch, steps in runs:
            CONSOLE.print(f"measuring {size} px, batch {batch}, {steps} steps")
            job = Job(
                bundle=str(bundle.folder),
                runtime=given.on,
                prompts=(PROMPT,),
                steps=steps,
                batch=batch,
                warmup_runs=1,
                runs=3,
            )
            measured = run_apart(job, lambda done, of: None)
            at_once = {name: 1 if name.startswith("text") else batch for name in work}  # one prompt
            mib = {name: moved_mib(bundle, many)[name] for name, many in at_once.items()}
            for stage, spent in measured.stages_ms.items():
                whole = work[stage] * at_once[stage]
                yield Row(stage, size, batch, steps, median(spent), whole, mib[stage])
            image = median(measured.runs_ms)
            parts = {name: steps if name == bundle.denoiser.name else 1 for name in work}
            whole = sum(work[name] * at_once[name] * parts[name] for name in work)
            moved = sum(mib[name] * parts[name] for name in work)
            yield Row("image", size, batch, steps, image, whole, moved)


def page(found: list[Row], top: dict[str, float], precision: str) -> str:
    """Two plots: the stages under the roof, and the time of a picture by its pixels."""
    peak = top[sums_of(precision)]
    stages = [row for row in found if row.stage != "image" and row.batch == 1]
    stages = [row for row in stages if row.steps == min(r.steps for r in stages)]
    dots = [
        Dot(f"{row.stage} {row.size}", row.intensity, row.attained, i)
        for i, row in enumerate(stages)
    ]
    bend = peak / top["GB/s"]
    roof = [(bend / 8, peak / 8), (bend, peak), (max(8 * bend, *(d.x for d in dots)), peak)]
    names = list(dict.fromkeys(row.stage for row in stages))
    growth = [
        Line(name, tuple((r.size**2 / 1e6, r.ms / 1e3) for r in stages if r.stage == name), i)
        for i, name in enumerate(names)
    ]
    plots = (
        ("GFLOP/s over FLOP a byte", scatter("roofline", "FLOP a byte", dots, line=roof)),
        ("seconds of a call by megapixels", lines("growth", "megapixels", growth)),
    )
    cards = "".join(f"<article><h2>{name}</h2>{plot}</article>" for name, plot in plots)
    head = f'<!doctype html><meta charset="utf-8"><title>roofline</title><style>{STYLE}</style>'
    return f"{head}<body><section class='plots'>{cards}</section></body>"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", choices=UNETS)
    parser.add_argument("--decoder", choices=("kl", "tiny", "lite"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=numbers, default=[256, 512, 768, 1024])
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4])
    parser.add_argument("--steps", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--on", choices=("onnx",), default="onnx", help="whose graphs are read")
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    top = peaks()
    print("peaks: " + ", ".join(f"{name} {value:,.0f}" for name, value in top.items()))
    print("| size | batch | steps | stage | ms | GFLOP | MiB moved | GFLOP/s | of the roof |")
    print("|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    found = []
    peak = top[sums_of(given.precision)]
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(given, Path(scratch)):
            found.append(row)
            roof = min(peak, row.intensity * top["GB/s"])
            print(
                f"| {row.size} | {row.batch} | {row.steps} | {row.stage} | {row.ms:,.0f} "
                f"| {row.gflop:,.0f} | {row.mib:,.0f} | {row.attained:,.0f} "
                f"| {row.attained / roof:.0%} |",
                flush=True,
            )
            keep(given, top, found)


def keep(given: argparse.Namespace, top: dict[str, float], found: list[Row]) -> None:
    """Writes what there is so far."""
    given.out.mkdir(parents=True, exist_ok=True)
    told = {"peaks": top, "precision": given.precision, "rows": [asdict(row) for row in found]}
    (given.out / "roofline.json").write_text(json.dumps(told, indent=1))
    (given.out / "roofline.html").write_text(page(found, top, given.precision))


if __name__ == "__main__":
    main()
