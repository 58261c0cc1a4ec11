"""int8 without the weights in memory: what ONNX Runtime's own quantizer makes, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import Exported
from numpy.typing import NDArray
from onnx import numpy_helper

ort = pytest.importorskip("onnxruntime.quantization")

from edgeflash.errors import EdgeflashError  # noqa: E402
from edgeflash.export import extremes, onnx_graph  # noqa: E402
from edgeflash.export.quantize import PRODUCTS, Recorded  # noqa: E402
from edgeflash.export.quantize_static import quantize_by_extremes  # noqa: E402
from edgeflash.export.quiet import quiet  # noqa: E402

SYMMETRIC = {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)}


def products(path: Path) -> list[str]:
    """All but every seventh, so that there are some of every kind that are left alone."""
    graph = onnx.load(path, load_external_data=False).graph
    found = [node.name for node in graph.node if node.op_type in PRODUCTS]
    return [name for i, name in enumerate(found) if i % 7]


def onnx_runtimes_own(
    path: Path, calls: Any, names: list[str], *, symmetric: bool, extra: dict[str, Any]
) -> Path:
    found = path.with_name("own.onnx")
    kind = ort.QuantType.QInt8 if symmetric else ort.QuantType.QUInt8
    with quiet():
        ort.quantize_static(
            path,
            found,
            Recorded(calls),
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_quantize=names,
            per_channel=True,
            activation_type=kind,
            weight_type=ort.QuantType.QInt8,
            extra_options={"ActivationSymmetric": symmetric} | extra,
        )
    return found


def told(path: Path) -> tuple[list[Any], dict[str, NDArray[Any]]]:
    graph = onnx.load(path).graph
    nodes = sorted(
        (n.op_type, n.name, tuple(n.input), tuple(n.output), str(n.attribute)) for n in graph.node
    )
    return nodes, {w.name: numpy_helper.to_array(w) for w in graph.initializer}


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize(
    ("symmetric", "extra", "external_bytes"), [(False, {}, 0), (True, SYMMETRIC, 2**30)]
)
def test_it_is_onnx_runtimes_own_quantization(
    component: str,
    symmetric: bool,
    extra: dict[str, Any],
    external_bytes: int,
    one_step: Exported,
    tmp_path: Path,
) -> None:
    captured = one_step.captured[component]
    model = onnx_graph.translate(captured)
    path = onnx_graph.save(model, tmp_path / "float.onnx", external_bytes)[0]
    if not external_bytes:  # biases too, which are no longer small in large models
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, size_threshold=64)
    asked: Any = {"symmetric": symmetric, "extra": extra}
    names, calls = products(path), captured.calibration
    ours = told(quantize_by_extremes(path, calls, names, PRODUCTS, **asked))
    own = told(onnx_runtimes_own(path, calls, names, **asked))
    assert ours[0] == own[0]
    assert ours[1].keys() == own[1].keys()
    assert any(name.endswith("_quantized") for name in own[1])
    for name, array in own[1].items():
        assert array.dtype == ours[1][name].dtype
        np.testing.assert_array_equal(ours[1][name], array, err_msg=name)


def test_a_process_of_its_own_finds_the_same_ranges(
    one_step: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = one_step.captured["unet"]
    path = onnx_graph.save(onnx_graph.translate(captured), tmp_path / "float.onnx", 0)[0]
    calls, names = [call.inputs for call in captured.calibration], products(path)
    here = extremes.extremes(path, calls, names)
    monkeypatch.setattr(extremes, "APART_BYTES", 0)
    assert extremes.extremes(path, calls, names) == here
    monkeypatch.setattr(extremes.sys, "executable", "false")
    with pytest.raises(EdgeflashError, match=f"{tmp_path.name}: ranges could not be taken"):
        extremes.extremes(path, calls, names)
