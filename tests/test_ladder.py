"""What the parity ladder catches: one thing in a good bundle is changed, and a rung fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import Exported, figure
from onnx import numpy_helper
from test_cli import say  # noqa: F401 - a fixture

from edgeflash.bundle import Bundle, Manifest, describe_file
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.golden import load_tensors, save_tensors
from edgeflash.verify import refuse_below, verify


def altered(
    exported: Exported,
    folder: Path,
    component: str,
    change: Callable[[Any], None] = lambda graph: None,
    **manifest: Any,
) -> Bundle:
    """A copy whose network, and hashes with it, are changed: a fault of the exporter."""
    shutil.copytree(exported.bundle.folder, folder)
    path = f"{component}/model.onnx"
    model = onnx.load(folder / path)
    change(model.graph)
    onnx.save(model, folder / path)
    found = exported.bundle.manifest
    components = tuple(
        c.model_copy(update={"files": (describe_file(folder, path),)}) if c.name == component else c
        for c in found.components
    )
    changes = {"components": components, **manifest}
    (folder / MANIFEST).write_text(found.model_copy(update=changes).model_dump_json())
    return Bundle.open(folder)


def swap_weights(graph: Any) -> None:
    """Two convolutions of the same shape change places."""
    weights = [t for t in graph.initializer if t.name.endswith("conv2.weight")]
    first, second = next(
        (a, b) for a in weights for b in weights if a.dims == b.dims and a.name < b.name
    )
    one, two = numpy_helper.to_array(first).copy(), numpy_helper.to_array(second).copy()
    first.CopyFrom(numpy_helper.from_array(two, first.name))
    second.CopyFrom(numpy_helper.from_array(one, second.name))


def rewire(graph: Any, name: str, node: Any, constants: dict[str, Any]) -> None:
    """All users of input ``name`` read the node's output instead."""
    for user in graph.node:
        user.input[:] = [node.output[0] if i == name else i for i in user.input]
    graph.node.insert(0, node)
    for key, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), key))


def freeze_timestep(graph: Any) -> None:
    node = onnx.helper.make_node("Identity", ["frozen"], ["timestep_used"], "freeze")
    rewire(graph, "timestep", node, {"frozen": 500.0})


def attenuate(graph: Any) -> None:
    node = onnx.helper.make_node(
        "Div", ["encoder_hidden_states", "nineteen"], ["weaker"], "attenuate"
    )
    rewire(graph, "encoder_hidden_states", node, {"nineteen": 19.0})


def test_swapped_weights_are_caught(guided: Exported, tmp_path: Path) -> None:
    bundle = altered(guided, tmp_path / "b", "unet", swap_weights)
    with pytest.raises(EdgeflashError, match=r"rung L1, unet: psnr_db \d.* misses its floor 80"):
        refuse_below(verify(bundle), bundle.folder)


def test_a_dropped_timestep_is_caught(guided: Exported, tmp_path: Path) -> None:
    bundle = altered(guided, tmp_path / "b", "unet", freeze_timestep)
    found = figure(bundle, "L2", "unet", "timestep_ratio")
    assert not found.passed and abs(found.value) < 1e-6
    with pytest.raises(EdgeflashError, match="rung L2, unet: timestep_ratio"):
        floors = {"psnr_db": 0.0, "delta_ratio": 0.0}
        refuse_below(verify(bundle, floors=floors), bundle.folder)


def test_timesteps_of_other_schedules_are_looked_at(guided: Exported, tmp_path: Path) -> None:
    """What torch told of them is altered: as if time did twice as much there."""
    bundle = altered(guided, tmp_path / "b", "unet")
    schedules = guided.bundle.manifest.schedules
    for golden in bundle.manifest.goldens:
        told = load_tensors(bundle.folder / golden.tensors)
        ts = {step.t for step in schedules[2].steps + schedules[3].steps}
        assert {*told["times"]} == ts - {schedules[3].steps[i].t for i in (0, 2)} != set()
        twice = {f"output_at.{j}": 2 * told[f"output_at.{j}"] for j in range(len(told["times"]))}
        twice = {name: array - told["output.0"] for name, array in twice.items()}
        save_tensors(bundle.folder / golden.tensors, told | twice)
    failed = {(f.rung, f.metric) for f in verify(bundle) if not f.passed}
    assert failed == {("L2", "timestep_ratio")}


def test_attenuated_conditioning_is_caught(guided: Exported, tmp_path: Path) -> None:
    bundle = altered(guided, tmp_path / "b", "unet", attenuate)
    found = figure(bundle, "L2", "unet", "delta_ratio")
    assert not found.passed and 0.01 < found.value < 0.15
    with pytest.raises(
        EdgeflashError, match=r"rung L2, unet: delta_ratio 0.* misses its floor 0.9"
    ):
        refuse_below(verify(bundle, floors={"psnr_db": 0}), bundle.folder)


def test_exaggerated_conditioning_is_caught_too(guided: Exported, tmp_path: Path) -> None:
    def exaggerate(graph: Any) -> None:
        node = onnx.helper.make_node("Mul", ["encoder_hidden_states", "two"], ["stronger"], "x")
        rewire(graph, "encoder_hidden_states", node, {"two": 1.5})

    bundle = altered(guided, tmp_path / "b", "unet", exaggerate)
    with pytest.raises(EdgeflashError, match=r"delta_ratio 1.* misses its ceiling 1.1"):
        refuse_below(verify(bundle, floors={"psnr_db": 0}), bundle.folder)


def test_a_wrong_latent_scale_is_caught(guided: Exported, tmp_path: Path) -> None:
    wrong = guided.bundle.manifest.latent.model_copy(update={"scale": 1.0})
    bundle = altered(guided, tmp_path / "b", "vae_decoder", latent=wrong)
    with pytest.raises(EdgeflashError, match="rung L1, vae_decoder: psnr_db"):
        refuse_below(verify(bundle), bundle.folder)


def test_another_schedule_is_caught(guided: Exported, tmp_path: Path) -> None:
    tables = guided.bundle.manifest.schedules
    rows = tables[3].steps
    changed = rows[1].model_copy(update={"a": 1.05 * rows[1].a})
    wrong = tables[3].model_copy(update={"steps": (rows[0], changed, rows[2])})
    bundle = altered(guided, tmp_path / "b", "unet", schedules={2: tables[2], 3: wrong})
    with pytest.raises(EdgeflashError, match="rung L3, pipeline: psnr_db"):
        refuse_below(verify(bundle), bundle.folder)


def test_another_tokenizer_and_other_noise_are_caught(guided: Exported, tmp_path: Path) -> None:
    goldens = guided.bundle.manifest.goldens
    other = tuple(g.model_copy(update={"token_ids": (1, *g.token_ids[1:])}) for g in goldens)
    bundle = altered(guided, tmp_path / "b", "unet", goldens=other)
    with pytest.raises(EdgeflashError, match="rung L0, tokenizer: equal 0"):
        refuse_below(verify(bundle), bundle.folder)
    other = tuple(g.model_copy(update={"seed": g.seed + 9}) for g in goldens)
    bundle = altered(guided, tmp_path / "c", "unet", goldens=other)
    with pytest.raises(EdgeflashError, match="rung L0, noise: equal 0"):
        refuse_below(verify(bundle), bundle.folder)


def test_the_first_operator_that_went_astray_is_named(guided: Exported, tmp_path: Path) -> None:
    from edgeflash.export.bisect import bisect_bundles

    def scale_one(graph: Any) -> None:
        node = next(n for n in graph.node if n.op_type == "LayerNormalization")
        weight = next(t for t in graph.initializer if t.name == node.input[1])
        changed = numpy_helper.from_array(numpy_helper.to_array(weight) * 1.1, "tampered")
        graph.initializer.append(changed)
        node.input[1] = "tampered"

    bundle = altered(guided, tmp_path / "b", "unet", scale_one)
    graph = onnx.load(bundle.folder / "unet/model.onnx").graph
    name = next(n.name for n in graph.node if n.op_type == "LayerNormalization")
    found = bisect_bundles(bundle, guided.bundle, "unet", 60.0)
    assert found and str(found).startswith(f"LayerNormalization {name} (")
    assert found.low < 0 < found.high
    assert bisect_bundles(guided.bundle, guided.bundle, "unet", 60.0) is None
    assert sorted(p.name for p in (bundle.folder / "unet").iterdir()) == [
        "config.json",
        "model.onnx",
    ], "the taps left nothing"


def test_verify_bisects_by_an_fp32_bundle(
    guided: Exported,
    tmp_path: Path,
    say: Any,  # noqa: F811
) -> None:
    def overflow(graph: Any) -> None:
        node = next(n for n in graph.node if n.op_type == "Conv" and "resnets" in n.input[1])
        weight = next(t for t in graph.initializer if t.name == node.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 3, weight.name))

    bundle = altered(guided, tmp_path / "b", "unet", overflow)
    asked = ("--floor", "fp32.psnr_db=70", "--floor", "L4.psnr_db=0")
    said = say("verify", bundle.folder, "--bisect", guided.bundle.folder, *asked)
    lines = dict(line.split(": ", 1) for line in said.out.splitlines() if ": " in line)
    assert lines["text_encoder"] == lines["vae_decoder"] == "every tensor reaches 70 dB"
    assert lines["unet"].startswith("first below 70 dB: Conv ")
    assert lines["unet"].endswith("export it again") and said.code == 2


@pytest.mark.parametrize(
    ("precision", "high", "product", "said"),
    [
        ("fp32", 1.0, "", "no rounding explains that: export it again"),
        ("fp16", 70_000.0, "unet/conv", "beyond float16's 65,504: --precision fp32"),
        ("fp16", 60_000.0, "unet/conv", "lose too much in 16 bits: --precision fp32"),
        ("int8", 1.0, "unet/conv", "leave it alone: --set 'keep=[\"unet/conv\"]'"),
        ("int8", 1.0, "", "no product is to blame: --precision fp16 or fp32"),
    ],
)
def test_what_goes_astray_has_a_remedy(
    precision: str, high: float, product: str, said: str
) -> None:
    from edgeflash.export.divergence import Divergence

    beyond = high > 65504
    found = Divergence("Add", "add", 3.0, -1.0, high, overflows=beyond, product=product)
    assert found.remedy(precision, precision, "onnx").endswith(said)


# --- what goes wrong on the way -------------------------------------------------------------------


def test_a_manifest_has_the_schedules_it_speaks_of(guided: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(guided.bundle.folder, tmp_path / "b")
    told = json.loads((folder / "edgeflash.json").read_text())
    del told["schedules"][str(told["goldens"][0]["steps"])]
    (folder / "edgeflash.json").write_text(json.dumps(told))
    with pytest.raises(EdgeflashError, match="schedules: none for"):
        Bundle.open(folder)


def test_goldens_are_needed(guided: Exported, tmp_path: Path) -> None:
    bundle = altered(guided, tmp_path / "b", "unet", goldens=())
    with pytest.raises(EdgeflashError, match="no goldens"):
        verify(bundle)
    manifest = Manifest.model_validate(guided.bundle.manifest.model_dump())
    path = bundle.folder / manifest.goldens[0].tensors
    path.write_bytes(b"no safetensors")
    with pytest.raises(EdgeflashError, match="unreadable golden"):
        verify(Bundle(bundle.folder, manifest))
