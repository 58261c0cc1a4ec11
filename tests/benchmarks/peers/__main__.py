"""edgeflash beside the peers: the same student, prompt to PNG, each in a process of its own.

    python tests/benchmarks/peers STUDENT --work DIR [--steps 1] [--rounds 2] [--only NAME …]

STUDENT is a diffusers folder with fixed weights, such as `export_full_size.py sdxs-512 --keep`
leaves. Bundles and the peers' virtual environments are made in DIR once and used again. The systems
take turns, round by round, so that all of them see the machine's good and bad moments; compare
ratios, not milliseconds. Peers whose exporters refuse the student (optimum and OpenVINO GenAI know
no AutoencoderTiny) are given edgeflash's own bundle, so what is compared there is the runtime.
Written, and not run to its end yet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clock import clock

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OURS = sys.executable


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        script: `draw_*.py` without the affixes.
        bundle: (target, precision) of the bundle it opens; None: the student's folder.
        venv: name of its environment; "": this one.
        options: keyword arguments of the script's `load`.
    """

    name: str
    script: str
    bundle: tuple[str, str] | None = None
    venv: str = ""
    options: dict[str, Any] = field(default_factory=dict)


VENVS = {  # what others' pipelines want, each of its own time
    "optimum": ("torch", "optimum-onnx[onnxruntime]", "diffusers<0.36"),
    "genai": ("openvino", "openvino-tokenizers", "openvino-genai", "pillow"),
}
BF16 = {"on": "openvino", "inference_precision": "bf16"}
PEERS = (
    Peer("diffusers, eager", "diffusers"),
    Peer("diffusers, eager, bf16", "diffusers", options={"dtype": "bfloat16"}),
    Peer("diffusers, torch.compile", "diffusers", options={"compiled": "1"}),
    Peer("optimum, ONNX Runtime fp32", "optimum", ("onnx", "fp32"), "optimum"),
    Peer("OpenVINO GenAI, fp32 file", "genai", ("openvino", "fp32"), "genai"),
    Peer("OpenVINO GenAI, int8 file", "genai", ("openvino", "int8"), "genai"),
    Peer("edgeflash, onnx fp32", "edgeflash", ("onnx", "fp32"), options={"on": "onnx"}),
    Peer("edgeflash, onnx int8", "edgeflash", ("onnx", "int8"), options={"on": "onnx"}),
    Peer("edgeflash, openvino fp32 file, bf16", "edgeflash", ("openvino", "fp32"), options=BF16),
    Peer("edgeflash, openvino int8 file, bf16", "edgeflash", ("openvino", "int8"), options=BF16),
)


def bundle(student: Path, kind: tuple[str, str], work: Path, steps: int) -> Path:
    """The student as a bundle; with the timestep as an input, which stock pipelines want."""
    target, precision = kind
    out = work / f"bundle-{target}-{precision}"
    if not (out / "edgeflash.json").exists():
        told = ["--to", target, "--precision", precision, "--steps", str(steps)]
        floors = [f"--floor={name}=-1000" for name in ("L1.psnr_db", "L3.psnr_db", "L4.psnr_db")]
        command = [OURS, "-m", "edgeflash", "export", student, *told, "--keep-timestep", *floors]
        subprocess.run([*command, "--out", out], check=True)
    return out


def python_of(venv: str, work: Path) -> str:
    """The interpreter of an environment, which is made if there is none."""
    if not venv:
        return OURS
    folder = work / f"venv-{venv}"
    python = folder / "bin/python"
    if not (folder / "whole").exists():
        subprocess.run([OURS, "-m", "venv", "--clear", folder], check=True)
        pinned = dict(
            (line.partition("==")[0], line)
            for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
        )
        packages = [pinned.get(name, name) for name in VENVS[venv]]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "whole").touch()
    return str(python)


def ask(peer: Peer, given: argparse.Namespace) -> dict[str, Any]:
    """One process of the peer, all of it measured."""
    python = python_of(peer.venv, given.work)
    kind = peer.bundle
    folder = bundle(given.student, kind, given.work, given.steps) if kind else given.student
    options = dict(peer.options) | {"steps": given.steps}
    if peer.venv:
        options["side"] = given.side
    out = given.work / f"{peer.name.replace(' ', '-').replace(',', '')}.png"
    job = {"script": peer.script, "folder": str(folder), "options": options, "out": str(out)}
    job |= {"warm": given.warm, "runs": given.runs}
    found = subprocess.run(
        [python, str(HERE), "--job", json.dumps(job)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"},
    )
    answer: dict[str, Any] = json.loads(found.stdout.decode().splitlines()[-1])
    return answer


def draw(job: dict[str, Any]) -> None:
    """In the peer's process: load, draw, tell."""
    script = importlib.import_module(f"draw_{job['script']}")
    clock(
        lambda: script.load(job["folder"], **job["options"]),
        Path(job["out"]),
        warm=job["warm"],
        runs=job["runs"],
    )


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: medians over all rounds, and each over the fastest peer and over the first row."""
    middle = {
        name: statistics.median(ms for answer in answers for ms in answer["runs_ms"])
        for name, answers in found.items()
    }
    first = next(iter(middle.values()))
    others = [ms for name, ms in middle.items() if not name.startswith("edgeflash")]
    best = min(others) if others else float("nan")
    rows = [
        "| system | image, ms | load, ms | first image, ms | peak RSS, MiB | / first row "
        "| / best peer |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, ms in middle.items():
        answers = found[name]
        load, start, rss = (
            statistics.median(answer[key] for answer in answers)
            for key in ("load_ms", "first_ms", "peak_rss_mib")
        )
        rows.append(
            f"| {name} | {ms:,.0f} | {load:,.0f} | {start:,.0f} | {rss:,.0f} "
            f"| {ms / first:.2f} | {ms / best:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="names that begin so")
    parser.add_argument("--prepare", action="store_true", help="bundles and environments alone")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.work, given.student = given.work.resolve(), given.student.resolve()
    peers = [peer for peer in PEERS if not given.only or peer.name.startswith(tuple(given.only))]
    for peer in peers:
        python_of(peer.venv, given.work)
        if peer.bundle:
            bundle(given.student, peer.bundle, given.work, given.steps)
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(0 if given.prepare else given.rounds):
        for peer in peers:
            answer = ask(peer, given)
            found.setdefault(peer.name, []).append(answer)
            ms = statistics.median(answer["runs_ms"])
            print(f"round {turn + 1}: {peer.name}: {ms:,.0f} ms an image", file=sys.stderr)
    if found:
        (given.work / "peers.json").write_text(json.dumps(found, indent=1))
        print(table(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        draw(json.loads(sys.argv[2]))
    else:
        main()
