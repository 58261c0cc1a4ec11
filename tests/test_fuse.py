"""One graph for the whole bundle: it draws what the loop over the components draws."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exported import QUIET, Exported
from tiny_bundle import IDS, ROWS, tiny

from edgeflash import noise, shelf
from edgeflash.bundle import Bundle, Component
from edgeflash.devices import Device
from edgeflash.errors import EdgeflashError
from edgeflash.export.fuse import fuse
from edgeflash.export.line import export_student
from edgeflash.parity import psnr_db
from edgeflash.roles import Target
from edgeflash.runtimes.lint import Judgement, Seen, judge, look
from edgeflash.runtimes.on_onnx import OnnxRuntime
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for, verify

SEEDS = (7, 8)
RUNTIME = OnnxRuntime(provider="cpu", threads=1)


def draw(path: Path, ids: list[tuple[int, ...]]) -> Any:
    """All that an app has to do: ONNX Runtime, numpy, token ids and noise."""
    session = ort.InferenceSession(path)
    draws, _, channels, height, width = session.get_inputs()[1].shape
    fresh = [
        [noise.randn((channels, height, width), seed, k) for seed in SEEDS] for k in range(draws)
    ]
    return session.run(["images"], {"input_ids": np.array(ids), "noise": np.array(fresh)})[0]


def drawn_in_steps(bundle: Bundle, prompts: tuple[str, ...], **options: Any) -> Any:
    with TextToImage(bundle, runtime_for(bundle)) as pipeline:
        found = pipeline.generate(Request(prompts, seed=SEEDS[0], **options))
    return found.images, [tuple(map(int, ids)) for ids in found.tokens]


def fused_copy(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    """A copy with `pipeline.onnx`, made as if the manifest had said otherwise."""
    shutil.copytree(bundle.folder, folder)
    wrong = Bundle(folder, bundle.manifest.model_copy(update=changes))
    told = fuse(wrong, RUNTIME, len(SEEDS), "fp32", 2**20)
    return Bundle(folder, bundle.manifest.model_copy(update={"fused": told}))


def weight_bytes(folder: Path, component: Component) -> int:
    weights = onnx.load(folder / component.files[0].path).graph.initializer
    return sum(onnx.numpy_helper.to_array(weight).nbytes for weight in weights)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["fresh noise and memory", "one step"])
@pytest.mark.parametrize(
    "guidance",
    [
        {"kind": "none"},
        {"kind": "cfg", "scale": 3.0},
        {"kind": "cfg", "scale": 1.0},
        {"kind": "embedded", "scale": 2.5, "channels": 6},
    ],
    ids=lambda guidance: f"{guidance['kind']} {guidance.get('scale', '')}",
)
def test_it_draws_what_the_loop_draws(
    guidance: dict[str, Any], rows: tuple[dict[str, float], ...], tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "b", guidance=guidance, rows=rows)
    bundle, prompts = Bundle.open(folder), ("a red star", "blue ring")
    fused = fuse(bundle, RUNTIME, len(SEEDS), "fp32", 2**20)
    assert fused.inputs[1].shape[0] == {3: 3, 1: 2}[len(rows)], "draw 0, and where a row adds noise"
    expected, _ = drawn_in_steps(bundle, prompts)
    found = draw(folder / "pipeline.onnx", [IDS[prompt] for prompt in prompts])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_a_folded_timestep_needs_none(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b", timestep=None, rows=ROWS[:1])
    fuse(Bundle.open(folder), RUNTIME, len(SEEDS), "fp32", 0)
    expected, _ = drawn_in_steps(Bundle.open(folder), ("", "blue ring"))
    found = draw(folder / "pipeline.onnx", [IDS[""], IDS["blue ring"]])
    np.testing.assert_array_equal(found, expected)
    assert (folder / "pipeline.onnx_data").is_file(), "asked for beside the graph"


def test_weights_are_there_once(guided: Exported, tmp_path: Path) -> None:
    bundle = fused_copy(guided.bundle, tmp_path / "b", default_steps=3)
    expected, ids = drawn_in_steps(bundle, ("a red star", "ring"), steps=3)
    found = draw(bundle.folder / "pipeline.onnx", ids)
    assert np.abs(found.astype(int) - expected).max() <= 1
    parts = [bundle.component(name) for name in ("text_encoder", "unet", "vae_decoder")]
    sizes = [weight_bytes(bundle.folder, part) for part in parts]
    assert bundle.manifest.fused
    once = weight_bytes(bundle.folder, bundle.manifest.fused)
    assert math.isclose(once, sum(sizes), rel_tol=0.01)


def test_one_that_draws_otherwise_is_caught(guided: Exported, tmp_path: Path) -> None:
    weaker = Guidance(kind="cfg", scale=1.5)
    bundle = fused_copy(guided.bundle, tmp_path / "b", guidance=weaker)
    with pytest.raises(EdgeflashError, match=r"rung L4, pipeline: fused_psnr_db \d.* floor 45"):
        refuse_below(verify(bundle), bundle.folder)


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_exports_ship_it_and_the_ladder_covers_it(
    precision: str, one_step_student: Path, tmp_path: Path
) -> None:
    target = shelf.make(Target, "onnx", {"precision": precision, "fused": len(SEEDS)})
    export_student(Student.open(one_step_student), target, tmp_path / "out", console=QUIET)
    bundle = Bundle.open(tmp_path / "out", check="sha256")
    fused = bundle.manifest.fused
    assert fused and fused.precision == precision and fused.files[0] in bundle.files()
    figures = {f.metric: f for f in bundle.manifest.parity if f.rung == "L4"}
    assert figures["fused_psnr_db"].floor == {"fp16": 45, "int8": 25}[precision]
    expected, ids = drawn_in_steps(bundle, ("a red star", "ring"))
    found = draw(bundle.folder / "pipeline.onnx", ids)
    assert psnr_db(expected, found, 255) > {"fp16": 55, "int8": 35}[precision]


def test_lint_looks_at_it_as_what_an_app_may_ship_alone(tmp_path: Path) -> None:
    bundle = fused_copy(Bundle.open(tiny(tmp_path / "parts")), tmp_path / "b")
    fused, parts = bundle.manifest.fused, bundle.manifest.components
    assert fused
    seen = look(bundle)
    assert [part.component for part in seen] == [*parts, fused]
    assert seen[-1].graph.operators and not seen[-1].unread
    limit = {"name": "memory", "rule": "memory", "broken": "will be killed", "source": "a test"}
    large = tuple(replace(part, weight_bytes=10**6 * part.alone) for part in seen)

    def killed(parts: tuple[Seen, ...], most: int) -> list[str]:
        told = [{**limit, "most": most}]
        device = Device.model_validate(
            {"name": "small", "chip": "", "runs": ["onnx"], "limits": told}
        )
        return [finding.component for finding in judge(parts, device).findings]

    assert killed(large, 10**5) == ["pipeline"] and killed(large, 10**7) == []
    together = sum(part.weight_bytes for part in seen[:-1]) + max(p.peak.bytes for p in seen[:-1])
    limits = Judgement(Device(name="x", chip="", runs=("onnx",), limits=()), seen, ()).bytes
    assert limits[0] == together, "an app does not load it beside them"
