"""How cost grows with size, batch and steps, and what this machine could do at best.

    python tests/benchmarks/roofline.py sdxs-512 --out DIR [--sizes 256,512,768,1024]
        [--batches 1,2,4] [--steps 1,2,4,8] [--on onnx] [--precision fp32]

The student is a published UNet's name with random weights, as `edgeflash price` takes it. Every
size is exported and run; batches and steps at 512 px alone. A stage's roof is the smaller of the
machine's peak and what its memory feeds: GFLOP of the stage over the bytes that have to move (see
`runtimes/moved.py`). Peaks and bandwidth are measured in the same run. Writes `roofline.json` and
`roofline.html`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
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


STAGES = ("text_encoder", "unet", "vae_decoder", "image")  # in their colours


def page(found: list[Row], top: dict[str, float], precision: str) -> str:
    """Four plots: the stages under the roof, and times by pixels, by batch and by steps."""
    plain = [row for row in found if row.batch == 1 and row.steps == found[0].steps]
    here = [row for row in found if row.size == BASE]
    plots = [
        ("GFLOP/s over FLOP a byte, by px", _under_the_roof(plain, top, top[sums_of(precision)])),
        ("seconds of a call, and of a picture, by size", _growth(plain, _megapixels)),
        (f"seconds, by batch at {BASE} px", _growth([r for r in here if r.steps == 1], _batch)),
        (f"seconds, by steps at {BASE} px", _growth([r for r in here if r.batch == 1], _steps)),
    ]
    key = " &nbsp; ".join(
        f'<span style="color:var(--c{i})">\u25cf</span> {name.replace("_", " ")}'
        for i, name in enumerate(STAGES)
    )
    cards = "".join(f"<article><h2>{name}</h2><p>{key}</p>{plot}</article>" for name, plot in plots)
    head = f'<!doctype html><meta charset="utf-8"><title>roofline</title><style>{STYLE}</style>'
    return f"{head}<body><section class='plots'>{cards}</section></body>"


def _under_the_roof(rows: list[Row], top: dict[str, float], peak: float) -> str:
    told = [row for row in rows if row.stage not in ("image", "text_encoder")]
    told += [row for row in rows if row.stage == "text_encoder"][:1]  # the same at every size
    dots = [
        Dot(str(row.size), row.intensity, row.attained, STAGES.index(row.stage)) for row in told
    ]
    bend = peak / top["GB/s"]
    roof = [(bend / 8, peak / 8), (bend, peak), (max(8 * bend, *(d.x for d in dots)), peak)]
    return scatter("roofline", "FLOP a byte", dots, line=roof)


def _growth(rows: list[Row], along: Callable[[Row], float]) -> str:
    drawn = [
        Line(stage, tuple(sorted((along(r), r.ms / 1e3) for r in rows if r.stage == stage)), i)
        for i, stage in enumerate(STAGES)
    ]
    return lines("growth", along.__name__.removeprefix("_"), drawn)


def _megapixels(row: Row) -> float:
    return row.size**2 / 1e6


def _batch(row: Row) -> float:
    return row.batch


def _steps(row: Row) -> float:
    return row.steps


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
