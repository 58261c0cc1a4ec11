"""int8 for OpenVINO: what NNCF is asked for, and what its CPU runtime makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

INSTALL = "is not installed: pip install 'edgeflash[openvino-export]'"
openvino = pytest.importorskip("openvino", reason=f"openvino {INSTALL}")
pytest.importorskip("nncf", reason=f"nncf {INSTALL}")

from openvino import opset13 as ops  # noqa: E402

from edgeflash.embedded import embedded  # noqa: E402
from edgeflash.export.line import export_student  # noqa: E402
from edgeflash.export.quantize_openvino import give_biases, to_int8  # noqa: E402
from edgeflash.export_options import ExportOptions  # noqa: E402
from edgeflash.openvino_core import core  # noqa: E402
from edgeflash.parity import psnr_db  # noqa: E402
from edgeflash.roles import Target  # noqa: E402
from edgeflash.shelf import make  # noqa: E402
from edgeflash.student import Student  # noqa: E402

CHANNELS, SIDE = 16, 8
Array = NDArray[np.float32]


def number(value: float) -> Any:
    return ops.constant(np.float32(value))


def residual(*, batch: int) -> Any:
    """An int8 convolution without a bias, whose result a later convolution's is added to."""
    rng = np.random.default_rng(0)
    x = ops.parameter([batch, CHANNELS, SIDE, SIDE], np.float32, "x")
    weights = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    scale = ops.constant(np.full((CHANNELS, 1, 1, 1), 1e-3, np.float32))
    wide = ops.multiply(ops.convert(ops.constant(weights), np.float32), scale)
    low, high = number(0), number(4)
    narrow = ops.fake_quantize(ops.relu(x), low, high, low, high, 256)
    first = convolution(narrow, wide)
    later = convolution(first, ops.constant(rng.normal(0, 0.1, weights.shape).astype(np.float32)))
    bias = ops.constant(rng.normal(size=(1, CHANNELS, 1, 1)).astype(np.float32))
    return openvino.Model([ops.add(ops.add(later, bias), first)], [x])


def convolution(x: Any, weights: Any) -> Any:
    return ops.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])


def run(model: Any, x: Array) -> Array:
    told = {"INFERENCE_PRECISION_HINT": "f32"}
    found: Array = core().compile_model(model, "CPU", told)(x)[0]
    return found


def test_convolutions_without_a_bias_keep_their_scale() -> None:
    x = np.random.default_rng(1).normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    right = run(residual(batch=1), x)
    model = residual(batch=-1)
    give_biases(model)
    assert psnr_db(right, run(model, x)) > 90  # 15 without


def test_a_convolution_gets_one_bias_at_most() -> None:
    model = residual(batch=-1)
    give_biases(model)
    give_biases(model)
    assert [op.get_type_name() for op in model.get_ops()].count("Add") == 3


def test_ranges_are_the_extremes_of_all_calls() -> None:
    """NNCF's own choice is the mean of the calls' extremes: 4 and 2 here."""
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, CHANNELS, SIDE, SIDE], np.float32, "x")
    weights = ops.constant(rng.normal(size=(4, CHANNELS, 3, 3)).astype(np.float32))
    model = openvino.Model([convolution(x, weights)], [x])
    calls = [rng.uniform(-1, 1, (1, CHANNELS, SIDE, SIDE)).astype(np.float32) for _ in range(2)]
    calls[0][0, 0, 0, 0], calls[1][0, 0, 0, 0] = 7.0, -3.0
    recorded = SimpleNamespace(calibration=[SimpleNamespace(inputs={"x": call}) for call in calls])
    x.output(0).set_names({"x"})
    (product,) = [op for op in model.get_ops() if op.get_type_name() == "Convolution"]
    words = {product.get_friendly_name(): "int8"}
    found = to_int8(model, recorded, words)  # type: ignore[arg-type]
    assert "Add" in [op.get_type_name() for op in found.get_ops()], "a bias"
    (narrow,) = [op for op in found.get_ops() if op.get_type_name() == "FakeQuantize"]
    low, high = (narrow.input_value(i).get_node().data.item() for i in (1, 2))
    assert (low, high) == pytest.approx((-3.0, 7.0), rel=0.03)  # zero is a multiple of the scale


@pytest.mark.parametrize(("narrow", "most"), [(False, 127), (True, 64)])
def test_narrow_weights_have_7_bits(narrow: bool, most: int) -> None:
    """Those of all layers: NNCF does so with the first by itself."""
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, CHANNELS, SIDE, SIDE], np.float32, "x")
    x.output(0).set_names({"x"})
    layers = [x]
    for _ in range(3):
        weights = ops.constant(rng.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32))
        layers.append(convolution(ops.relu(layers[-1]), weights))
    model = openvino.Model([layers[-1]], [x])
    call = rng.normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    recorded = SimpleNamespace(calibration=[SimpleNamespace(inputs={"x": call})])
    words = {layer.get_friendly_name(): "int8" for layer in layers[1:]}
    found = to_int8(model, recorded, words, narrow=narrow)  # type: ignore[arg-type]
    held = [op.data for op in found.get_ops() if op.get_type_name() == "Constant"]
    greatest = [np.abs(each.astype(int)).max() for each in held if each.dtype == np.int8]
    assert len(greatest) == 3 and max(greatest) == most


@pytest.mark.slow
def test_the_shipped_student_passes(tmp_path: Path) -> None:
    """Prompts that were not calibrated on fell to 19 dB with SmoothQuant and mean ranges."""
    student = Student.open(embedded("shapes-student"))
    target = make(Target, "openvino", {"precision": "int8"})
    bundle = export_student(student, target, tmp_path / "bundle", ExportOptions(steps=(1, 4)))
    told = {
        (figure.rung, figure.component): figure.value
        for figure in bundle.manifest.parity
        if figure.metric == "psnr_db"
    }
    assert told["L1", "unet"] > 35 and told["L1", "vae_decoder"] > 35
