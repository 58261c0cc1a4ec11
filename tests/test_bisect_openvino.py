"""Bisection of OpenVINO's models: operator, product to blame, and what only fusing breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

from edgeflash.export.bisect import Graph, Node, first_divergence
from edgeflash.export.bisect_openvino import OpenVinoGraph
from edgeflash.export.quantize_openvino import LAYERS

CALL = {"sample": np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)}


def chain(path: Path, spoilt: str = "", count: int = 0) -> OpenVinoGraph:
    """Three convolutions with a ReLU between; of one the weights are off, as if rounded.

    ``count``: what OpenVINO had named in that process before.
    """
    sample = opset13.parameter([-1, 4, 6, 6], np.float32, name="sample")
    sample.output(0).set_names({"sample"})
    random, x = np.random.default_rng(1), sample
    for number, name in enumerate(("conv_1", "conv_2", "conv_3")):
        weights = random.standard_normal((4, 4, 3, 3)).astype(np.float32)
        told = opset13.constant(weights)
        told.set_friendly_name(f"{name}.weight")
        if name == spoilt:
            told = opset13.multiply(opset13.constant(weights), opset13.constant(np.float32(1.01)))
        x = opset13.convolution(x, told, [1, 1], [1, 1], [1, 1], [1, 1])
        x.set_friendly_name(f"{name}/WithoutBiases")
        x = opset13.relu(x)
        x.set_friendly_name(f"Relu_{(count + number) % 3}")
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


def test_names_that_openvino_counted_are_no_names(tmp_path: Path) -> None:
    """They are others in every process, and would lead astray."""
    whole, same = chain(tmp_path / "whole.xml"), chain(tmp_path / "same.xml", count=1)
    assert first_divergence(whole, same, "unet", [CALL], 200.0) is None
    found = first_divergence(whole, chain(tmp_path / "c.xml", "conv_3", 1), "unet", [CALL], 60.0)
    assert found and found.operator == "conv_3/WithoutBiases"


def test_halves_and_parts_are_looked_through(tmp_path: Path) -> None:
    """A product before a split is to blame for what comes behind; one in halves is as it was."""

    def gated(path: Path, rounded: bool) -> OpenVinoGraph:
        sample = opset13.parameter([-1, 4, 6, 6], np.float32, name="sample")
        sample.output(0).set_names({"sample"})
        weights = np.random.default_rng(1).standard_normal((4, 4, 1, 1)).astype(np.float32)
        x, whole = sample, opset13.constant(weights)
        half = opset13.convert(opset13.constant(weights.astype(np.float16)), np.float32)
        off = opset13.multiply(whole, opset13.constant(np.float32(1.001)))
        both = (off, half) if rounded else (whole, whole)
        for name, kernel in zip(("conv_1", "conv_2"), both, strict=True):
            x = opset13.convolution(x, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
            x.set_friendly_name(name)
        parts = opset13.split(x, opset13.constant(np.int64(1)), 2)
        parts.set_friendly_name("parts")
        end = opset13.multiply(parts.output(0), opset13.constant(np.float32(1 + 0.2 * rounded)))
        end.set_friendly_name("end")
        openvino.save_model(openvino.Model([end], [sample]), path, compress_to_fp16=False)
        return OpenVinoGraph(path)

    whole, suspect = gated(tmp_path / "a.xml", False), gated(tmp_path / "b.xml", True)
    found = first_divergence(whole, suspect, "unet", [CALL], 45.0)
    assert found and (found.operator, found.product) == ("end", "unet/conv_1")


class Dim(Graph):
    """Right wherever somebody looks."""

    def __init__(self, factor: float) -> None:
        self.factor, self.path = factor, Path("model")
        product = Node("Conv", "conv", ("sample",), ("w",))
        self.makers = {"a": product, "y": Node("Add", "sum", ("a", "b"))}
        self.named = self.makers

    def values(self, names: Any, inputs: Any) -> Any:
        return [inputs["sample"]] * len(names)

    def results(self, inputs: Any) -> Any:
        return [self.factor * inputs["sample"]]

    def changes(self, name: str, product: Node) -> bool:
        return True

    def rest(self) -> None:
        pass


@pytest.mark.parametrize("calls", [[CALL], [CALL, CALL]])
def test_what_is_wrong_only_while_nobody_looks_is_told(calls: Any) -> None:
    found = first_divergence(Dim(1), Dim(1.1), "unet", calls, 45.0)
    assert found and str(found).startswith("the whole, though no operator alone (33.2 dB")
    assert found.remedy("int8", "int8").startswith("no product is to blame")
    assert first_divergence(Dim(1), Dim(1.0001), "unet", calls, 45.0) is None


def test_ctrl_c_is_heard_after_it(tmp_path: Path) -> None:
    """Where several Cores came and went, it ended the process, on CPUs with AMX."""
    paths = [chain(tmp_path / "whole.xml").path, chain(tmp_path / "off.xml", "conv_2").path]
    code = f"""
import signal, numpy as np
from pathlib import Path
from edgeflash.export.bisect import first_divergence
from edgeflash.export.bisect_openvino import OpenVinoGraph
call = {{"sample": np.ones((1, 4, 6, 6), np.float32)}}
whole, suspect = (OpenVinoGraph(Path(path)) for path in {[str(path) for path in paths]!r})
for _ in range(2):
    assert first_divergence(whole, suspect, "unet", [call, call], 60.0)
del whole, suspect
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
signal.raise_signal(signal.SIGINT)
assert heard
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
