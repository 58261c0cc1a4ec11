"""How cost grows with size, batch and steps, and what this machine could do at best.

    python tests/benchmarks/roofline.py sdxs-512 --out DIR [--sizes 256,512,768,1024]
        [--batches 1,2,4] [--steps 1,2,4,8] [--on onnx] [--precision fp32]

The student is a published UNet's name with random weights, as `edgeflash price` takes it. Every
size is exported and run; batches and steps at 512 px alone. A stage's roof is the smaller of the
machine's peak and what its memory feeds: GFLOP of the stage over the bytes that have to move,
weights once and every result once out and once in, as if nothing stayed in a cache. Peaks and
bandwidth are measured in the same run. Writes `roofline.json` and `roofline.html`.
Written, and not run to its end yet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from rich.console import Console

from edgeflash.blueprints import UNETS, Blueprint
from edgeflash.bundle import Bundle
from edgeflash.price import _export, gflops, peak_gflops
from edgeflash.report_html import STYLE
from edgeflash.report_svg import Dot, Line, lines, scatter
from edgeflash.roles import Target
from edgeflash.runtimes.bench import PROMPT, run_apart
from edgeflash.runtimes.graph import at_work
from edgeflash.runtimes.lint import look
from edgeflash.runtimes.measure import Job
from edgeflash.shelf import make
from edgeflash.student import Student

BASE = 512  # px, for batches and steps
SIDE = 2048  # of the matrices that tell the peaks
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


def best(call: Callable[[], object], work: float) -> float:
    """``work`` a second, the best of seven calls after one that warms up."""
    call()
    spent = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return work / min(spent)


def peaks() -> dict[str, float]:
    """GFLOP/s of large matrix products by type, and GB/s of a large copy."""
    bf16 = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    block = torch.ones(2**27)  # 512 MiB
    other = torch.empty_like(block)
    work = 2 * SIDE**3 / 1e9
    return {
        "fp32": peak_gflops(),
        "bf16": best(lambda: bf16 @ bf16, work),
        "int8": best(_int8_product(), work),
        "GB/s": best(lambda: other.copy_(block), 2 * block.nbytes / 1e9),
    }


def _int8_product() -> Callable[[], object]:
    """A product of uint8 and int8 as ONNX Runtime does it, which is what int8 graphs run."""
    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [SIDE, SIDE])
    b = helper.make_tensor_value_info("b", TensorProto.INT32, [SIDE, SIDE])
    weight = helper.make_tensor(
        "w", TensorProto.INT8, [SIDE, SIDE], np.ones((SIDE, SIDE), np.int8).tobytes(), raw=True
    )
    node = helper.make_node("MatMulInteger", ["a", "w"], ["b"])
    graph = helper.make_graph([node], "product", [a], [b], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {"a": np.ones((SIDE, SIDE), np.uint8)}
    return lambda: session.run(None, given)


def moved_mib(bundle: Bundle, batch: int) -> dict[str, float]:
    """By component: weights, and every result of an operator written and read once."""
    found = {}
    for part in look(bundle):
        results = [name for op in at_work(part.graph) for name in op.gives]
        sizes = [part.graph.tensors[name].bytes for name in results if name in part.graph.tensors]
        found[part.component.name] = (part.weight_bytes + 2 * batch * sum(sizes)) / 2**20
    return found


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
            measured, mib = run_apart(job, lambda done, of: None), moved_mib(bundle, batch)
            for stage, spent in measured.stages_ms.items():
                whole = work[stage] * batch
                yield Row(stage, size, batch, steps, median(spent), whole, mib[stage])
            image = median(measured.runs_ms)
            parts = {name: steps if name == bundle.denoiser.name else 1 for name in work}
            whole = sum(work[name] * batch * parts[name] for name in work)
            moved = sum(mib[name] * parts[name] for name in work)
            yield Row("image", size, batch, steps, image, whole, moved)


def page(found: list[Row], top: dict[str, float], precision: str) -> str:
    """Two plots: the stages under the roof, and the time of a picture by its pixels."""
    peak = top["int8" if precision.startswith("int8") else "fp32"]
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
    parser.add_argument("--on", default="onnx")
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    top = peaks()
    print("peaks: " + ", ".join(f"{name} {value:,.0f}" for name, value in top.items()))
    print("| size | batch | steps | stage | ms | GFLOP | MiB moved | GFLOP/s | of the roof |")
    print("|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    found = []
    peak = top["int8" if given.precision.startswith("int8") else "fp32"]
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
    given.out.mkdir(parents=True, exist_ok=True)
    told = {"peaks": top, "precision": given.precision, "rows": [asdict(row) for row in found]}
    (given.out / "roofline.json").write_text(json.dumps(told, indent=1))
    (given.out / "roofline.html").write_text(page(found, top, given.precision))


if __name__ == "__main__":
    main()
