"""edgeflash beside the peers: the same student, prompt to PNG, each in a process of its own.

    python tests/benchmarks/peers STUDENT --work DIR [--steps 1] [--rounds 2] [--only NAME …]

STUDENT is a diffusers folder with fixed weights, such as `export_full_size.py sdxs-512 --keep`
leaves. Bundles and the peers' virtual environments are made in DIR once and used again: take
another DIR for another edgeflash. The systems take turns, round by round, so that all of them see
the machine's good and bad moments; compare ratios, not milliseconds. Peers whose exporters refuse
the student (optimum and OpenVINO GenAI know no AutoencoderTiny) are given edgeflash's own bundle,
so what is compared there is the runtime; one is given the fp32 bundle as NNCF quantizes it unasked.
A peer that fails has a row that says so. `peers.json` in DIR is rewritten after every answer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeflash.disk import MANIFEST
from edgeflash.machine import Machine
from edgeflash.price import NO_FLOORS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OURS = sys.executable


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        script: `draw_*.py` without the affixes.
        bundle: target, precision and settings of the bundle it opens; None: the student's folder.
        venv: name of its environment; "": this one.
        options: keyword arguments of the script's `load`.
    """

    name: str
    script: str
    bundle: tuple[str, ...] | None = None
    venv: str = ""
    options: dict[str, Any] = field(default_factory=dict)


VENVS = {  # what others' pipelines want, each of its own time
    "optimum": ("torch", "optimum-onnx[onnxruntime]", "diffusers<0.36"),
    "genai": ("openvino", "openvino-tokenizers", "openvino-genai", "pillow"),
}
BF16 = {"on": "openvino", "inference_precision": "bf16", "static": "true"}  # GenAI is told so too
NNCF = "nncf"  # a "precision": int8 without any of edgeflash's choices
ALL = 'quantized=["text_encoder","unet","vae_decoder"]'
PEERS = (
    Peer("diffusers, eager", "diffusers"),
    Peer("diffusers, eager, bf16", "diffusers", options={"dtype": "bfloat16"}),
    Peer("diffusers, torch.compile", "diffusers", options={"compiled": "1"}),
    Peer("optimum, ONNX Runtime fp32", "optimum", ("onnx", "fp32"), "optimum"),
    Peer("OpenVINO GenAI, fp32 file", "genai", ("openvino", "fp32"), "genai"),
    Peer("OpenVINO GenAI, NNCF's own int8", "genai", ("openvino", NNCF), "genai"),
    Peer("OpenVINO GenAI, edgeflash's int8", "genai", ("openvino", "int8"), "genai"),
    Peer("edgeflash, onnx fp32", "edgeflash", ("onnx", "fp32"), options={"on": "onnx"}),
    Peer("edgeflash, onnx int8", "edgeflash", ("onnx", "int8"), options={"on": "onnx"}),
    Peer("edgeflash, onnx int8, all", "edgeflash", ("onnx", "int8", ALL), options={"on": "onnx"}),
    Peer("edgeflash, openvino bf16", "edgeflash", ("openvino", "fp32"), options=BF16),
    Peer("edgeflash, openvino int8", "edgeflash", ("openvino", "int8"), options=BF16),
    Peer("edgeflash, openvino int8, all", "edgeflash", ("openvino", "int8", ALL), options=BF16),
)


def bundle(kind: tuple[str, ...], given: argparse.Namespace) -> Path:
    """The student as a bundle; with the timestep as an input, which stock pipelines want."""
    target, precision, *settings = kind
    asked = f"{given.student.name}-{given.side}-{given.steps}-{target}-{precision}"
    out: Path = given.work / f"bundle-{asked}{'-all' if settings else ''}"
    if (out / MANIFEST).exists():
        return out
    if precision == NNCF:
        plain = bundle((target, "fp32"), given)
        check([OURS, HERE / "nncf_defaults.py", plain, out])
        return out
    told = ["--to", target, "--precision", precision, "--steps", str(given.steps)]
    told += ["--guidance", "1", "--keep-timestep", "--size", str(given.side)]
    told += [f"--floor={name}={least}" for name, least in NO_FLOORS.items()]
    told += [f"--set={setting}" for setting in settings]
    check([OURS, "-m", "edgeflash", "export", given.student, *told, "--out", out])
    return out


def check(command: Sequence[str | Path]) -> str:
    """What a command prints.

    Raises:
        Failed: with the last line that it said of why.
    """
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        raise Failed(said[-1].strip() if said else f"exit code {ended.returncode}")
    return ended.stdout


class Failed(Exception):
    """A process of a peer did not come to its end."""


def python_of(venv: str, work: Path) -> str:
    """The interpreter of an environment, which is made if there is none."""
    if not venv:
        return OURS
    folder = work / f"venv-{venv}"
    python = folder / "bin/python"
    if not (folder / "whole").exists():
        check([OURS, "-m", "venv", "--clear", folder])
        pinned = dict(
            (line.partition("==")[0], line)
            for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
        )
        packages = [pinned.get(name, name) for name in VENVS[venv]]
        check([python, "-m", "pip", "install", "--quiet", *packages])
        (folder / "whole").touch()
    return str(python)


def ask(peer: Peer, given: argparse.Namespace) -> dict[str, Any]:
    """One process of the peer, all of it measured."""
    python = python_of(peer.venv, given.work)
    folder = bundle(peer.bundle, given) if peer.bundle else given.student
    options = dict(peer.options) | {"steps": given.steps}
    if peer.venv:
        options["side"] = given.side
    out = given.work / f"{peer.name.replace(' ', '-').replace(',', '')}.png"
    job = {"script": peer.script, "folder": str(folder), "options": options, "out": str(out)}
    job |= {"warm": given.warm, "runs": given.runs}
    said = check([python, HERE / "job.py", json.dumps(job)])
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def table(answers: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> str:
    """Markdown: medians over all rounds, and each over the first row and over the fastest peer."""
    middle = {
        name: statistics.median(ms for answer in rounds for ms in answer["runs_ms"])
        for name, rounds in answers.items()
    }
    first = next(iter(middle.values()))
    best = min((ms for name, ms in middle.items() if not is_ours(name)), default=float("nan"))
    rows = [
        "| system | image, ms | load, ms | first image, ms | peak RSS, MiB | / first row "
        "| / best peer |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, ms in middle.items():
        load, start, rss = (
            statistics.median(answer[key] for answer in answers[name])
            for key in ("load_ms", "first_ms", "peak_rss_mib")
        )
        rows.append(
            f"| {name} | {ms:,.0f} | {load:,.0f} | {start:,.0f} | {rss:,.0f} "
            f"| {ms / first:.2f} | {ms / best:.2f} |"
        )
    return "\n".join([*rows, *(f"\n{name}: {why}" for name, why in failed.items())])


def is_ours(name: str) -> bool:
    return name.startswith("edgeflash")


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
    failed: dict[str, str] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for turn in range(1 + (0 if given.prepare else given.rounds)):
        for peer in (peer for peer in peers if peer.name not in failed):
            try:
                if turn:
                    answers.setdefault(peer.name, []).append(ask(peer, given))
                else:
                    prepare(peer, given)
            except Failed as error:
                failed[peer.name] = str(error)
            tell(peer.name, turn, answers, failed)
            if turn:
                keep(given, answers, failed)
    if answers:
        print(table({name: rounds for name, rounds in answers.items() if rounds}, failed))


def prepare(peer: Peer, given: argparse.Namespace) -> None:
    python_of(peer.venv, given.work)
    if peer.bundle:
        bundle(peer.bundle, given)


def tell(
    name: str, turn: int, answers: dict[str, list[dict[str, Any]]], failed: dict[str, str]
) -> None:
    said = failed.get(name, "ready")
    if turn and name not in failed:
        said = f"{statistics.median(answers[name][-1]['runs_ms']):,.0f} ms an image"
    print(f"{f'round {turn}' if turn else 'prepared'}: {name}: {said}", file=sys.stderr)


def keep(
    given: argparse.Namespace, answers: dict[str, list[dict[str, Any]]], failed: dict[str, str]
) -> None:
    told = {"machine": Machine.here().model_dump(), "student": given.student.name}
    told |= {"side": given.side, "steps": given.steps, "answers": answers, "failed": failed}
    (given.work / "peers.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
