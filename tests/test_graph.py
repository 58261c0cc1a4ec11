"""Graphs are read from the files that ship, and what is alive at once is counted right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from small_onnx import network

from edgeflash.errors import EdgeflashError
from edgeflash.runtimes.graph import Graph, Operator, Peak, Tensor, peak
from edgeflash.runtimes.graph_coreml import read_coreml
from edgeflash.runtimes.graph_onnx import read_onnx

node, ONE = helper.make_node, {"sample": (1, 4, 4, 4)}


def test_the_peak_is_that_counted_by_hand(tmp_path: Path) -> None:
    """x, a, b and c take 256 bytes each, y 128; most lives while c is made, when a goes."""
    path = network(
        tmp_path / "m.onnx",
        node("Relu", ["sample"], ["a"]),
        node("DequantizeLinear", ["q", "scale"], ["w"]),
        node("Sigmoid", ["a"], ["b"]),
        node("Mul", ["a", "b"], ["c"], name="both"),
        node("MatMul", ["c", "w"], ["y"], name="last"),
        q=np.ones((4, 2), np.int8),
        scale=np.float32(0.5),
    )
    graph = read_onnx(path, ONE)
    found = peak(graph)
    assert found.bytes == 4 * 256 and str(found.operator) == "Mul both"
    assert sum(weight.bytes for weight in graph.weights.values()) == 8 + 4
    assert graph.tensors["y"].shape == (1, 4, 4, 2) and not graph.unknown
    two = peak(read_onnx(path, {"sample": (2, 4, 4, 4)}))
    assert two.bytes == 2 * found.bytes


def test_what_nobody_needs_any_more_is_gone() -> None:
    sizes = {"x": 1, "a": 9, "b": 2, "c": 4, "y": 5}
    tensors = {name: Tensor(name, (size,), "int8", 8) for name, size in sizes.items()}
    chain = [
        Operator("Relu", f"to_{gives}", (takes,), (gives,))
        for takes, gives in ("xa", "ab", "bc", "cy")
    ]
    graph = Graph(tuple(chain), {}, tensors, ("x",), ("y",))
    assert peak(graph) == Peak(1 + 9 + 2, chain[1], tensors["a"])
    kept = Graph(tuple(chain), {}, tensors, ("x",), ("a", "y"))
    assert peak(kept).bytes == 1 + 9 + 4 + 5 and peak(Graph()) == Peak()


def test_sides_that_are_computed_are_found(tmp_path: Path) -> None:
    """By inference, counts of numbers, what the file's free sides stand for, or a second pass."""
    path = network(
        tmp_path / "m.onnx",
        node("Relu", ["sample"], ["inferred"]),
        node("Shape", ["sample"], ["rows"], end=1),
        node("Reshape", ["rows", "flat"], ["same"]),
        node("Concat", ["same", "rest"], ["shape"], axis=0),
        node("Reshape", ["sample", "shape"], ["counted"]),
        node("Expand", ["counted", "shape"], ["named"]),
        node("Expand", ["counted", "shape"], ["product"]),
        node("MatMul", ["counted", "weight"], ["second"]),
        node("Odd", ["inferred"], ["odd"], domain="com.microsoft"),
        node("Sigmoid", ["inferred"], ["nameless"]),
        node("NonZero", ["product"], ["y"]),
        recorded=[
            ("second", ["unk__9", 4, 2]),
            ("odd", [None, 4]),
            ("nameless", [None, 4, 4, 4]),
            ("inferred", ["s1", 4, 4, 4]),
            ("named", ["s1", 4, 16]),
            ("product", ["4*s1", 4, 16]),
        ],
        flat=[-1],
        rest=[4, 16],
        weight=np.ones((16, 2), np.float32),
    )
    graph = read_onnx(path, {"sample": (3, 4, 4, 4)})
    found = {name: graph.tensors[name].shape for name in ("inferred", "counted", "named")}
    assert found == {"inferred": (3, 4, 4, 4), "counted": (3, 4, 16), "named": (3, 4, 16)}
    assert graph.tensors["second"].shape == (3, 4, 2)
    assert graph.tensors["product"].shape == (12, 4, 16) and graph.unknown == ("odd", "y")


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(EdgeflashError, match=r"model\.onnx: does not read as ONNX"):
        read_onnx(path, {})
    network(path, node("Odd", ["sample"], ["y"], domain="acme"))
    with pytest.raises(EdgeflashError, match=r"model\.onnx: ONNX infers no shapes"):
        read_onnx(path, ONE)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x w + 1 with w float16 [4, 8], as an mlprogram."""
    coremltools = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb

    weight = np.arange(32, dtype=np.float16).reshape(4, 8)

    @mb.program(  # type: ignore[untyped-decorator]
        input_specs=[mb.TensorSpec((1, 2, 4), dtype=coremltools.converters.mil.mil.types.fp16)],
        opset_version=coremltools.target.iOS16,
    )
    def program(x: Any) -> Any:
        product = mb.matmul(x=x, y=mb.const(val=weight, name="w"), name="product")
        return mb.add(x=product, y=np.float16(1), name="y")

    model = coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT16,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("coreml") / "Unet.mlpackage"
    model.save(str(path))
    return path


def test_a_core_ml_package_is_read(package: Path) -> None:
    graph = read_coreml([package])
    assert [op.kind for op in graph.operators] == ["matmul", "add"]
    assert graph.inputs == ("x",) and len(graph.outputs) == 1
    assert max(weight.bytes for weight in graph.weights.values()) == 2 * 4 * 8
    assert peak(graph).bytes == 2 * (8 + 16 + 16)  # x, product, y


def test_two_packages_are_one_network(package: Path) -> None:
    graph = read_coreml([package, package])
    assert len(graph.operators) == 4 and graph.inputs == ("x",)
