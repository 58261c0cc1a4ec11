"""Tiny decoders of several shapes: what each costs at 512 px, and how well it draws once trained.

    python tests/benchmarks/decoders.py OUT [--steps 1000] [--only NAME …]

Cost is that of an `AutoencoderTiny` for Stable Diffusion's latents (8 px each), random weights, on
ONNX Runtime and OpenVINO, in turns. Quality is that of its like for the embedded teacher's latents
(4 px, so one level less), each trained by method ``decoder`` for the same steps on the same data:
PSNR against the teacher's decoder on latents of pictures, and prompt accuracy and FD of what the
teacher draws in 25 guided steps, decoded by each. What is in OUT is not trained again;
`decoders.md` there is rewritten after every one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edgeflash.distill.judge import held_out_captions, verdict
from edgeflash.distill.run import distill
from edgeflash.embedded import embedded
from edgeflash.recipe import find_recipe, read_recipe, recipe_of
from edgeflash.student import Student

DRAWN, BATCH, TURNS, SIDE = 500, 50, 9, 64  # SIDE: of latents of 512 px


@dataclass(frozen=True)
class Shape:
    """Blocks of each resolution, smallest first: for latents of 8 px, and of 4."""

    width: int
    blocks: tuple[int, ...]
    here: tuple[int, ...]


SHAPES = {
    "TAESD's": Shape(64, (3, 3, 3, 1), (3, 3, 1)),
    "half as wide": Shape(32, (3, 3, 3, 1), (3, 3, 1)),
    "no block at full size": Shape(64, (3, 3, 3, 0), (3, 3, 0)),
    "early": Shape(64, (4, 4, 1, 0), (4, 1, 0)),
    "lite: early, half as wide": Shape(32, (4, 4, 1, 0), (4, 1, 0)),
    "48 wide, early": Shape(48, (4, 4, 1, 0), (4, 1, 0)),
}

FIRST = next(iter(SHAPES))  # what the others are held against


def decoder_of(shape: Shape) -> Any:
    depth, mirrored = len(shape.blocks), shape.blocks[::-1]
    return AutoencoderTiny(
        encoder_block_out_channels=(shape.width,) * depth,
        decoder_block_out_channels=(shape.width,) * depth,
        num_encoder_blocks=mirrored,
        num_decoder_blocks=shape.blocks,
    ).decoder.eval()


def cost(shape: Shape, out: Path) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """Parameters and GFLOP at 512 px, and a call on every engine."""
    import onnxruntime

    network, z = decoder_of(shape), torch.randn(1, 4, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter:
        network(z)
    parameters = sum(p.numel() for p in network.parameters())
    path = out / "decoder.onnx"
    torch.onnx.export(network, (z,), str(path), dynamo=True, input_names=["z"], verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    calls: dict[str, Callable[[], object]] = {}
    calls["onnx fp32"] = lambda: session.run(None, {"z": z.numpy()})
    for kind in ("f32", "bf16"):
        told = {"INFERENCE_PRECISION_HINT": kind}
        model = openvino.Core().compile_model(openvino.convert_model(str(path)), "CPU", told)
        calls[f"openvino {kind}"] = lambda model=model: model({"z": z.numpy()})
    return {"parameters": parameters, "gflop": counter.get_total_flops() / 1e9}, calls


def costs(out: Path) -> dict[str, dict[str, Any]]:
    """Of all shapes; times are medians of calls in turns."""
    found, calls = {}, {}
    for name, shape in SHAPES.items():
        found[name], calls[name] = cost(shape, out)
    for engine in next(iter(calls.values())):
        spent: dict[str, list[float]] = {name: [] for name in SHAPES}
        for turn in range(1 + TURNS):
            for name in SHAPES:
                start = time.perf_counter()
                calls[name][engine]()
                spent[name] += [(time.perf_counter() - start) * 1e3] * bool(turn)
        for name, each in spent.items():
            found[name][engine] = statistics.median(each)
    return found


@torch.no_grad()
def teacher_latents(out: Path) -> Tensor:
    """What the teacher draws of held-out captions, [n, c, h, w], as its decoder takes it."""
    path = out / "latents.pt"
    if not path.exists():
        folder = embedded("shapes-teacher")
        guidance = Student.open(folder).guidance().scale
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        captions = [caption.text for caption in held_out_captions(DRAWN)]
        drawn = [
            pipe(
                captions[i : i + BATCH],
                num_inference_steps=25,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(i),
                output_type="latent",
            ).images
            for i in range(0, DRAWN, BATCH)
        ]
        torch.save(torch.cat(drawn), path)
    found: Tensor = torch.load(path, weights_only=True)
    return found


def trained(name: str, shape: Shape, steps: int, out: Path) -> dict[str, Any]:
    """Of the embedded teacher's latents, by the method's own measure."""
    student = out / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-{steps}"
    if not student.exists():
        data = read_recipe(find_recipe("shapes")).data.model_dump(exclude_none=True)
        stage = {"by": "decoder", "target": "pictures", "width": shape.width}
        stage |= {"blocks": shape.here, "encoder_width": 32, "steps": steps, "batch_size": 16}
        stage |= {"learning_rate": 1e-3, "decay": "cosine", "warmup_steps": 100, "ema": 0.995}
        stage |= {"precision": "bf16"}
        plain = {"name": "decoders", "teacher": "embedded", "licence": "apache-2.0"}
        recipe = recipe_of(plain | {"data": data, "stage": [stage]}, "decoders.py")
        distill(recipe, student, cache=out / "cache")
    manifest = Student.open(student).manifest
    assert manifest is not None
    return {"folder": student} | manifest.lineage.stages[-1]


def judged(network: Any, latents: Tensor) -> tuple[float, float]:
    """Prompt accuracy and FD of drawings by a decoder of latents."""
    with torch.no_grad():
        parts = [network.decode(z).sample.clamp(-1, 1) for z in latents.split(BATCH)]
    pictures = ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    said = verdict(np.ascontiguousarray(pictures), held_out_captions(len(pictures)))
    assert said.fd is not None
    return said.prompt_accuracy, said.fd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=list(SHAPES))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    spent = given.out / "costs.json"
    if not spent.exists():
        spent.write_text(json.dumps(costs(given.out), indent=1))
    cost_of, latents = json.loads(spent.read_text()), teacher_latents(given.out)
    whole = AutoencoderKL.from_pretrained(embedded("shapes-teacher"), subfolder="vae").eval()
    accuracy, fd = judged(whole, latents / whole.config.scaling_factor)
    engines = [key for key in cost_of[FIRST] if " " in key]
    heads = ["decoder", "width; blocks", "parameters", "GFLOP", *(f"{e}, ms" for e in engines)]
    heads += ["samples/s", "PSNR, dB", "accuracy", "FD"]
    rows = ["| " + " | ".join(heads) + " |", "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for name in given.only:
        shape, spends = SHAPES[name], cost_of[name]
        told = trained(name, shape, given.steps, given.out)
        tiny = AutoencoderTiny.from_pretrained(told["folder"], subfolder="vae").eval()
        good, far = judged(tiny, latents)
        of_tiny = [f"{spends[e]:.0f} ({spends[e] / cost_of[FIRST][e]:.2f})" for e in engines]
        cells = [name, f"{shape.width}; {shape.blocks}", f"{spends['parameters']:,}"]
        cells += [f"{spends['gflop']:.0f}", *of_tiny, f"{told['samples_per_s']:.0f}"]
        cells += [f"{told['psnr_db']:.2f}", f"{good:.1%}", f"{far:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
        end = f"\nThe teacher's own decoder: {accuracy:.1%}, FD {fd:.0f}.\n"
        (given.out / "decoders.md").write_text("\n".join(rows) + "\n" + end)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
