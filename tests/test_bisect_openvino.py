"""Bisection of OpenVINO's models: operator, product to blame, and what only fusing breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from exported import Exported
from openvino import opset13
from test_bisect import remade
from test_openvino import drawn as drawn  # a fixture

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.export.bisect import Graph, Node, bisect_bundles, check_pair, first_divergence
from edgeflash.export.bisect_openvino import OpenVinoGraph
from edgeflash.export.quantize_openvino import LAYERS
from edgeflash.roles import Target

CALL = {"sample": np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)}


def chain(path: Path, spoilt: str = "") -> OpenVinoGraph:
    """Three convolutions with a ReLU between; of one the weights are off, as if rounded."""
    sample = opset13.parameter([-1, 4, 6, 6], np.float32, name="sample")
    sample.output(0).set_names({"sample"})
    random, x = np.random.default_rng(1), sample
    for name in ("conv_1", "conv_2", "conv_3"):
        weights = random.standard_normal((4, 4, 3, 3)).astype(np.float32)
        told = opset13.constant(weights)
        told.set_friendly_name(f"{name}.weight")
        if name == spoilt:
            told = opset13.multiply(opset13.constant(weights), opset13.constant(np.float32(1.01)))
        x = opset13.convolution(x, told, [1, 1], [1, 1], [1, 1], [1, 1])
        x.set_friendly_name(f"{name}/WithoutBiases")
        x = opset13.relu(x)
        x.set_friendly_name(f"{name}.gate")
    model = openvino.Model([x], [sample])
    model.set_rt_info('{"conv_1": "down.0.conv", "conv_2": "down.1.conv"}', LAYERS)
    openvino.save_model(model, path, compress_to_fp16=False)
    return OpenVinoGraph(path)


@pytest.mark.parametrize(
    ("spoilt", "layer"), [("conv_1", "down.0.conv"), ("conv_2", "down.1.conv")]
)
def test_the_product_that_is_computed_otherwise_is_to_blame(
    spoilt: str, layer: str, tmp_path: Path
) -> None:
    whole, suspect = chain(tmp_path / "whole.xml"), chain(tmp_path / "off.xml", spoilt)
    found = first_divergence(whole, suspect, "unet", [CALL], 60.0)
    assert found and found.operator == f"{spoilt}/WithoutBiases" and 30 < found.psnr_db < 60
    assert (found.kind, found.product) == ("Convolution", f"unet/{layer}")
    option = f"""--set 'keep=["unet/{layer}"]'"""
    assert found.remedy("int8", "int8", "openvino") == f"leave it alone: {option}"
    assert first_divergence(whole, chain(tmp_path / "same.xml"), "unet", [CALL], 200.0) is None


class Dim(Graph):
    """Right wherever somebody looks."""

    def __init__(self, factor: float) -> None:
        self.factor, self.path = factor, Path("model")
        product = Node("Conv", "conv", ("sample",), ("w",))
        self.makers = {"a": product, "y": Node("Add", "sum", ("a", "b"))}

    def values(self, names: Any, inputs: Any) -> Any:
        return [inputs["sample"]] * len(names)

    def results(self, inputs: Any) -> Any:
        return [self.factor * inputs["sample"]]


@pytest.mark.parametrize("calls", [[CALL], [CALL, CALL]])
def test_what_is_wrong_only_while_nobody_looks_is_told(calls: Any) -> None:
    found = first_divergence(Dim(1), Dim(1.1), "unet", calls, 45.0)
    assert found and str(found).startswith("the whole, though no operator alone (33.2 dB")
    assert found.remedy("int8", "int8").startswith("no product is to blame")
    assert first_divergence(Dim(1), Dim(1.0001), "unet", calls, 45.0) is None


def test_an_int8_network_leads_to_a_layer_of_its_plan(drawn: Exported, tmp_path: Path) -> None:
    unet = drawn.captured["unet"]
    target: Any = shelf.make(Target, "openvino", {"precision": "int8"})
    target.lower(unet, tmp_path)
    line = target.diverged("unet", lambda: unet, tmp_path, 55.0)
    name = line.partition('keep=["')[2].partition('"')[0]
    assert name.startswith("unet/") and f'"{name}" = "int8"' in (tmp_path / "plan.toml").read_text()
    assert target.diverged("unet", lambda: unet, tmp_path, 5.0) == ""


def test_bundles_are_bisected_too(drawn: Exported, tmp_path: Path) -> None:
    bundle: Bundle = drawn.bundle
    assert bisect_bundles(bundle, bundle, "unet", 90.0) is None
    check_pair(remade(bundle, update={"precision": "int8"}), bundle)
