"""From a captured program to an ONNX graph, and what edgeflash changes in it before it is saved.

Weights stay where they lie, mapped from the student's files, until they are written once: every
change of a weight is a lazy one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeflash.errors import EdgeflashError

from .capture import Captured

OPSET = 20  # the first with Gelu; ONNX Runtime 1.17 and later
EXTERNAL_SUFFIX = "_data"  # never .bin, which hub downloads for ONNX leave out
LARGEST_HALF = 65504.0
KEEPS_FLOAT = {("Resize", 1), ("Resize", 2)}  # inputs that stay float32 by definition: roi, scales


def translate(captured: Captured) -> ir.Model:
    """The program as an ONNX model in float32, named as the specs say.

    Raises:
        EdgeflashError: it holds an operator that the exporter does not know.
    """
    try:
        exported = _export_plain(captured) or _export(captured)
    except torch.onnx.OnnxExporterError as error:
        said = " ".join(str(error.__cause__ or error).split())[:300]
        raise EdgeflashError(f"{captured.component}: no ONNX for it: {said}") from error
    with _quiet():
        exported.optimize()
    model: ir.Model = exported.model
    for value, spec in zip(model.graph.inputs, captured.inputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    for value, spec in zip(model.graph.outputs, captured.outputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    fold_transposed_weights(model.graph)
    return model


def _export_plain(captured: Captured) -> torch.onnx.ONNXProgram | None:
    """Without decomposing the program first, which traces all of it once more, mostly for nothing.

    None where an operator has no ONNX form of its own, or writes to its inputs.
    """
    program = copy.copy(captured.program)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    if any(getattr(call, "_schema", None) and call._schema.is_mutable for call in calls):
        return None
    program.run_decompositions = lambda *_: program  # type: ignore[method-assign,assign]
    try:
        return _export(dataclasses.replace(captured, program=program))
    except torch.onnx.OnnxExporterError:
        return None


def _export(captured: Captured) -> torch.onnx.ONNXProgram:
    with _quiet():
        exported = torch.onnx.export(
            captured.program,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in captured.inputs],
            output_names=[spec.name for spec in captured.outputs],
        )
    assert exported is not None
    return exported


def save(model: ir.Model, path: Path, external_bytes: int) -> list[Path]:
    """Writes a model; its weights beside it when they exceed ``external_bytes``.

    Returns the files, the model first.
    """
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if total <= external_bytes:
        ir.save(ir.external_data.load_to_model(model), path)
        return [path]
    data = path.with_name(path.name + EXTERNAL_SUFFIX)
    ir.save(model, path, external_data=data.name)
    return [path, data]


def load(path: Path) -> ir.Model:
    """Reads a model; its weights stay in their file."""
    return ir.load(path)


def fold_transposed_weights(graph: ir.Graph) -> None:
    """Writes transposed weights as they are used, so that loading need not copy them."""
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or source.const_value is None:
            continue
        axes = node.attributes["perm"].as_ints()
        name = f"{source.name}.{''.join(map(str, axes))}"
        if name not in graph.initializers:
            tensor = source.const_value
            shape = [tensor.shape[i] for i in axes]
            graph.register_initializer(_lazy(tensor, name, _transposed(axes), tensor.dtype, shape))
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _transposed(axes: Sequence[int]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda array: array.transpose(axes)


def to_half(model: ir.Model) -> None:
    """Makes weights and sums float16; inputs and outputs stay float32.

    What computes the timestep's sinusoids stays float32 too: half precision has no room for angles
    up to 1000 radians.
    """
    graph = model.graph
    island = _sinusoids(graph)
    inside = {value for node in island for value in node.outputs}
    crossed: dict[ir.Value, ir.Value] = {}
    for value in list(graph.initializers.values()):
        _halve_weight(graph, value, island)
    for node in list(graph):
        if node not in island:
            _halve_node(graph, node, inside, crossed)
    for i, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            graph.outputs[i] = _widened(graph, value)


def _halve_weight(graph: ir.Graph, value: ir.Value, island: set[ir.Node]) -> None:
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    if tensor.dtype != ir.DataType.FLOAT:
        return
    uses = [u for u in value.uses() if u.node not in island and not _keeps_float(u.node, u.idx)]
    if not uses:
        return
    half = _lazy(tensor, f"{value.name}.half", clipped_half, ir.DataType.FLOAT16)
    graph.register_initializer(half)
    for use in uses:
        use.node.replace_input_with(use.idx, half)
    if not value.uses():
        del graph.initializers[value.name]


def _halve_node(
    graph: ir.Graph, node: ir.Node, inside: set[ir.Value], crossed: dict[ir.Value, ir.Value]
) -> None:
    for i, value in enumerate(node.inputs):
        if value is None or _keeps_float(node, i) or node.op_type == "Cast":
            continue
        if value.dtype == ir.DataType.FLOAT and (value in inside or value.is_graph_input()):
            if value not in crossed:
                crossed[value] = _cast(graph, value, ir.DataType.FLOAT16, before=node)
            node.replace_input_with(i, crossed[value])
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(clipped_half(tensor.numpy())))
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = ir.DataType.FLOAT16


def _sinusoids(graph: ir.Graph) -> set[ir.Node]:
    """The nodes from the timestep to its sines and cosines."""
    found: set[ir.Node] = set()
    reached = {value for value in graph.inputs if value.name == "timestep"}
    for node in graph:
        if any(value in reached for value in node.inputs):
            found.add(node)
            if node.op_type not in ("Sin", "Cos"):
                reached |= set(node.outputs)
    return found


def _widened(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A graph output of float16, cast back to float32 under its own name."""
    name = value.name
    value.name = f"{name}.half"
    node = value.producer()
    assert node is not None
    wide = _cast(graph, value, ir.DataType.FLOAT, after=node)
    wide.name = name
    return wide


def _cast(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    node.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
    if before is not None:
        graph.insert_before(before, node)
    else:
        assert after is not None
        graph.insert_after(after, node)
    return node.outputs[0]


def _keeps_float(node: ir.Node, index: int) -> bool:
    return (node.op_type, index) in KEEPS_FLOAT


def clipped_half(array: NDArray[Any]) -> NDArray[np.float16]:
    """float16, with finite values that it cannot hold (masks of -3e38) at its limits."""
    finite = np.isfinite(array)
    return np.where(finite, np.clip(array, -LARGEST_HALF, LARGEST_HALF), array).astype(np.float16)


def _lazy(
    tensor: ir.TensorProtocol,
    name: str,
    change: Callable[[NDArray[Any]], NDArray[Any]],
    dtype: ir.DataType,
    shape: Iterable[int] | None = None,
) -> ir.Value:
    """An initializer that is ``change(tensor)`` when it is written."""
    size = ir.Shape(tensor.shape if shape is None else tuple(shape))
    later = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(change(tensor.numpy())), name=name),
        dtype=dtype,
        shape=size,
        name=name,
    )
    return ir.Value(name=name, shape=size, type=ir.TensorType(dtype), const_value=later)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about itself off the terminal."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
