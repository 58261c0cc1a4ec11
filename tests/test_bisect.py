"""Bisection: which product is to blame, in which call, below which floor, and what remedies do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from exported import Exported
from onnx import helper
from small_onnx import network
from test_ladder import altered, rewire

from edgeflash import shelf
from edgeflash.arguments import read_options
from edgeflash.blame import blamed, floor_db
from edgeflash.bundle import Bundle, Figure, File, Merging
from edgeflash.calls import recorded_calls
from edgeflash.errors import EdgeflashError
from edgeflash.export import bisect
from edgeflash.export.bisect import bisect_bundles, check_pair
from edgeflash.export.bisect_onnx import OnnxGraph
from edgeflash.export.divergence import Divergence, off, told
from edgeflash.export.line import _refuse
from edgeflash.export.onnx_graph import BF16, HALF, load, save, to_half
from edgeflash.export.quantize import TAKES, decide, quantize_dynamic
from edgeflash.export.quantize_weights import to_int4, to_int8
from edgeflash.roles import Target

RANDOM = np.random.default_rng(0)
CALL = {"sample": RANDOM.standard_normal((1, 4, 4, 4)).astype(np.float32)}


def first_divergence(whole: Path, suspect: Path, *rest: Any) -> Divergence | None:
    return bisect.first_divergence(OnnxGraph(whole), OnnxGraph(suspect), *rest)


def weight(*shape: int, factor: float = 1.0) -> Any:
    return (factor * RANDOM.standard_normal(shape)).astype(np.float32)


def chain(path: Path) -> Path:
    """Two convolutions, then two matrix products: conv_1, conv_2, first, second, and a sum."""
    nodes = [
        helper.make_node("Conv", ["sample", "c1"], ["a"], name="conv_1"),
        helper.make_node("Conv", ["a", "c2"], ["b"], name="conv_2"),
        helper.make_node("Reshape", ["b", "sides"], ["c"], name="rows"),
        helper.make_node("MatMul", ["c", "w1"], ["d"], name="first"),
        helper.make_node("MatMul", ["d", "w2"], ["e"], name="second"),
        helper.make_node("Add", ["e", "one"], ["y"], name="sum"),
    ]
    products = {"c1": weight(4, 4, 1, 1), "c2": weight(4, 4, 1, 1)}
    products |= {"w1": weight(64, 64), "w2": weight(64, 64)}
    return network(path, *nodes, **products, sides=[-1, 1, 64], one=np.float32(1))


# --- which product --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "product", "quantized"),
    [
        ("int4-weights", "second", to_int4),
        ("int8-weights", "second", to_int8),
        ("int8-weights", "conv_2", to_int8),
        ("int8-dynamic", "second", quantize_dynamic),
        ("int8-dynamic", "conv_2", quantize_dynamic),
    ],
)
def test_the_product_that_was_quantized_is_to_blame(
    word: str, product: str, quantized: Any, tmp_path: Path
) -> None:
    whole = chain(tmp_path / "whole.onnx")
    found = first_divergence(whole, quantized(whole, [product]), "unet", [CALL], 90.0)
    assert found and (found.operator, found.product) == (product, f"unet/{product}")
    option = f"""--set 'keep=["unet/{product}"]'"""
    assert found.remedy(word, word) == f"leave it alone: {option}"


def test_plain_products_behind_a_quantized_one_are_not_to_blame(tmp_path: Path) -> None:
    """What comes in is already off, but by less than the floor; the layer's name is told."""
    whole = chain(tmp_path / "whole.onnx")
    model = onnx.load(whole)
    node = next(node for node in model.graph.node if node.name == "conv_1")
    node.metadata_props.add(key="layer", value="down.0.conv")
    onnx.save(model, whole)
    suspect = onnx.load(to_int8(whole, ["conv_1"]))
    more = onnx.numpy_helper.from_array(np.float32(400), "more")
    suspect.graph.initializer.append(more)
    last = next(node for node in suspect.graph.node if node.name == "sum")
    last.input[1] = "more"
    onnx.save(suspect, tmp_path / "suspect.onnx")
    found = first_divergence(whole, tmp_path / "suspect.onnx", "unet", [CALL], 36.0)
    assert found and (found.operator, found.product) == ("sum", "unet/down.0.conv")


# --- halves ---------------------------------------------------------------------------------------


def halved(path: Path, kind: Any = HALF) -> Path:
    model = load(path)
    to_half(model, kind)
    return save(model, path.with_name("half.onnx"), 2**20)[0]


def test_an_overflow_of_halves_is_found_though_sums_are_wider_here(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["sample", "c1"], ["a"], name="conv_1"),
        helper.make_node("Conv", ["a", "c2"], ["y"], name="conv_2"),
    ]
    products = {"c1": weight(4, 4, 1, 1, factor=3e4), "c2": weight(4, 4, 1, 1, factor=3e-4)}
    told_sides = [("a", ["n", 4, 4, 4])]
    whole = network(tmp_path / "whole.onnx", *nodes, recorded=told_sides, **products)
    faint = {"sample": 1e-5 * CALL["sample"]}
    found = first_divergence(whole, halved(whole), "unet", [faint, CALL], 45.0)
    assert found and found.operator == "conv_1" and found.overflows
    assert first_divergence(whole, halved(whole, BF16), "unet", [faint, CALL], 35.0) is None
    beyond = "its values are beyond float16's 65,504: "
    assert found.remedy("fp16", "fp16", "onnx") == beyond + "--precision fp32"
    assert found.remedy("fp16", "int8", "onnx") == beyond + "--set rest=fp32"
    assert found.remedy("int8", "int8", "tensorrt") == beyond + "--set rest=bf16 or fp32"
    assert found.remedy("lut4", "lut4", "coreml") == beyond + "--precision fp32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.onnx", "whole.onnx"]


# --- which call, which floor ----------------------------------------------------------------------


def test_the_call_that_went_wrong_is_looked_into(tmp_path: Path) -> None:
    def positive(factor: float, name: str) -> Path:
        nodes = [
            helper.make_node("Relu", ["sample"], ["a"], name="gate"),
            helper.make_node("Mul", ["a", "more"], ["b"], name="scale"),
            helper.make_node("Add", ["sample", "b"], ["y"], name="end"),
        ]
        return network(tmp_path / name, *nodes, more=np.float32(factor))

    paths = positive(1.0, "a.onnx"), positive(1.004, "b.onnx")
    calls = [{"sample": sign * abs(CALL["sample"])} for sign in (-1, -2, 1)]
    found = first_divergence(*paths, "unet", calls, 60.0)
    assert found and found.operator == "scale" and 45 < found.psnr_db < 60
    assert first_divergence(*paths, "unet", calls[:2], 60.0) is None
    assert first_divergence(*paths, "unet", calls, 45.0) is None
    assert first_divergence(paths[0], paths[0], "unet", calls, 250.0) is None, "no floor beyond it"


def test_bundles_are_bisected_over_all_recorded_calls(guided: Exported, tmp_path: Path) -> None:
    counts = {"text_encoder": 4, "unet": 12, "vae_decoder": 2, "vae_encoder": 2}
    for name, count in counts.items():
        calls = list(recorded_calls(guided.bundle, guided.bundle.component(name)))
        samples = guided.captured[name].samples
        assert len(calls) == count
        for call in calls:
            alike = [
                all(np.allclose(s.inputs[k], call[k], atol=1e-6) for k in call) for s in samples
            ]
            assert any(alike), f"no such call of {name} was recorded"

    def late(graph: Any) -> None:
        """As if the timestep were never less than the last but one."""
        least = sorted(step.t for step in guided.bundle.manifest.schedules[3].steps)[1]
        node = helper.make_node("Max", ["timestep", "least"], ["clipped"], "late")
        rewire(graph, "timestep", node, {"least": least})

    bundle = altered(guided, tmp_path / "b", "unet", late)
    assert bisect_bundles(bundle, guided.bundle, "unet", 60.0)


def test_a_missed_rung_leads_to_a_component_and_its_floor() -> None:
    def figures(*missed: tuple[str, str, str, float]) -> list[Figure]:
        names = ("text_encoder", "unet", "vae_decoder")
        found = [("L1", name, "psnr_db", 45.0) for name in names]
        found += [("L3", "pipeline", "psnr_db", 45.0), ("L4", "pipeline", "psnr_db", 20.0)]
        kept = [each for each in found if each[:3] not in {miss[:3] for miss in missed}]
        values = [*((*each, 99.0) for each in kept), *((*each, each[3] - 5) for each in missed)]
        names = ("rung", "component", "metric", "floor", "value")
        return [Figure.model_validate(dict(zip(names, each, strict=True))) for each in values]

    def leads(*missed: tuple[str, str, str, float]) -> tuple[str, float]:
        name = blamed(figures(*missed), "unet")
        return name, floor_db(figures(*missed), name, "unet")

    latents, pictures = ("L3", "pipeline", "psnr_db", 60.0), ("L4", "pipeline", "psnr_db", 50.0)
    assert leads(("L1", "unet", "psnr_db", 70.0), latents, pictures) == ("unet", 70)
    assert leads(latents, pictures) == ("unet", 60)
    assert leads(pictures) == ("vae_decoder", 50)
    assert leads(("L4", "pipeline", "psnr_db", 30.0)) == ("vae_decoder", 45), (
        "it reached that alone"
    )
    assert leads(("L4", "pipeline", "ssim", 0.9)) == ("vae_decoder", 45)
    assert leads(("L2", "unet", "delta_ratio", 0.9)) == ("unet", 45)
    assert leads(("L4", "pipeline", "fused_psnr_db", 45.0)) == leads() == ("", 0)
    assert leads(("L0", "tokenizer", "equal", 1.0)) == ("", 0)
    assert floor_db(figures(latents), "vae_decoder", "unet") == 45

    asked: list[Any] = []
    target = SimpleNamespace(diverged=lambda name, _, __, least: asked.append((name, least)) or "x")
    family = SimpleNamespace(denoiser="unet")
    tape = SimpleNamespace(student=SimpleNamespace(family=family), target=target)
    plan: Any = SimpleNamespace(tape=tape, components=("unet", "vae_decoder"))
    run: Any = None
    with pytest.raises(EdgeflashError, match=r"misses its floor 50; first astray: x; kept$"):
        _refuse(tuple(figures(pictures)), plan, run, Path(), Path("out"), "kept")
    assert asked == [("vae_decoder", 50)]


# --- remedies that exports take -------------------------------------------------------------------


def test_the_remedy_is_an_option_that_the_export_takes(guided: Exported, tmp_path: Path) -> None:
    """Though other components have no such layer, or one of that name."""
    made: Any = shelf.make(Target, "onnx", {"precision": "int8", "keep": ["unet/mid_block.*"]})
    product = "unet/down_blocks.0.resnets.0.conv1"
    line = told(Divergence("Add", "add", 3, -1, 1, product=product), made, "unet", made.keep)
    option = line.partition("--set '")[2].removesuffix("'")
    assert option == f'keep=["unet/mid_block.*", "{product}"]'
    again: Any = shelf.make(Target, "onnx", {"precision": "int8"} | read_options([option]))
    for name in ("unet", "vae_decoder"):
        path = guided.bundle.folder / name / "model.onnx"
        decide(path, guided.captured[name], again, TAKES, tmp_path)
    words = (tmp_path / "plan.toml").read_text()
    assert f'"{product}"' not in words and "unet/down_blocks.0.resnets.0.conv2" in words
    assert "vae_decoder/" in words


def test_what_masks_put_for_minus_infinity_is_no_overflow() -> None:
    expected = np.array([-3.4e38, -3.4e38, -np.inf, -np.inf, 1.0, 2.0], np.float32)
    found = np.array([-65504, -np.inf, -np.inf, -65504, 1.0, 2.0], np.float16)
    assert off("add", "mask", expected, found, 45.0) is None
    found[-1] = np.inf
    wrong = off("add", "mask", expected, found, 45.0)
    assert wrong and (wrong.low, wrong.high, wrong.overflows) == (1, 2, True)


# --- which bundles --------------------------------------------------------------------------------


def remade(bundle: Bundle, name: str = "", update: Any = None, **manifest: Any) -> Bundle:
    """The same with another manifest; ``update``: of one component, or of all."""
    components = tuple(
        each.model_copy(update=update or {}) if name in ("", each.name) else each
        for each in bundle.manifest.components
    )
    changed = bundle.manifest.model_copy(update={"components": components, **manifest})
    return Bundle(bundle.folder, changed)


def test_unlike_bundles_are_refused_in_one_line(guided: Exported) -> None:
    def refused(bundle: Bundle, reference: Bundle) -> str:
        with pytest.raises(EdgeflashError) as caught:
            check_pair(bundle, reference)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    bundle = guided.bundle
    check_pair(bundle, bundle)
    inputs = bundle.denoiser.inputs
    folded = tuple(spec for spec in inputs if spec.role != "timestep")
    larger = tuple(
        s.model_copy(update={"shape": (*s.shape[:2], 8, 24)}) if s.role == "sample" else s
        for s in inputs
    )
    timeless = remade(bundle, "unet", {"inputs": folded})
    assert "its unet takes no timestep, unlike that of" in refused(bundle, timeless)
    assert "its unet takes timestep [" in refused(timeless, bundle)
    told = refused(bundle, remade(bundle, "unet", {"inputs": larger}))
    assert ", 8, 24, float32], unlike that of" in told
    assert told.endswith("export it with the same options, but for the precision")
    tables = {2: bundle.manifest.schedules[2]}
    other = remade(timeless, schedules=tables, default_steps=2)
    assert "unet has another timestep in it" in refused(timeless, other)
    merged = remade(bundle, merging=Merging(share=0.5, image_psnr_db=30))
    assert "unet merges another share of its tokens" in refused(bundle, merged)
    half = remade(bundle, "vae_decoder", {"precision": "fp16"})
    assert "vae_decoder is fp16; export it with --precision fp32" in refused(bundle, half)
    check_pair(half, bundle)
    apple = remade(bundle, update={"target": "coreml"})
    told = "only bundles of onnx, tensorrt, openvino can be bisected, not of coreml"
    assert told in refused(apple, bundle)
    intel = remade(bundle, update={"target": "openvino"})
    told = "its text_encoder is of onnx, that of"
    assert told in refused(intel, bundle) and refused(intel, bundle).endswith("the same target")


def test_tensorrt_bundles_are_bisected_by_their_onnx_files(guided: Exported) -> None:
    decoder = guided.bundle.component("vae_decoder")
    files = (File(path="vae_decoder/model.engine", bytes=0, sha256=""), *decoder.files)
    bundle = remade(guided.bundle, "vae_decoder", {"files": files})
    bundle = remade(bundle, update={"target": "tensorrt", "precision": "fp16"})
    assert bisect_bundles(bundle, guided.bundle, "vae_decoder", 60.0) is None


def test_networks_that_share_names_alone_are_refused(tmp_path: Path) -> None:
    cut = helper.make_node("Slice", ["sample", "zero", "two", "rows"], ["a"], name="cut")
    end = helper.make_node("Mul", ["a", "a"], ["y"], name="end")
    sides = {"zero": [0], "rows": [2]}
    whole = network(tmp_path / "a.onnx", cut, end, two=[2], **sides)
    other = network(tmp_path / "b.onnx", cut, end, two=[3], **sides)
    with pytest.raises(EdgeflashError, match=r"cut gives \[1, 4, 3, 4\], and \[1, 4, 2, 4\] in"):
        first_divergence(whole, other, "unet", [CALL, CALL], 45.0)
