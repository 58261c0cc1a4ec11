"""The graph of an ONNX file, its free sides set to those of one image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeflash.errors import EdgeflashError

from .graph import Graph, Operator, Tensor

Dims = tuple[int | str, ...]  # a text is a free side, or a product as in 4*batch
Values = dict[str, tuple[Dims, int]]  # name -> sides, type
Shapes = Mapping[str, tuple[int, ...]]

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
REARRANGES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast")
SMALL_BYTES = 4096  # constants up to this can be shapes, which inference reads


def read_onnx(path: Path, inputs: Shapes) -> Graph:
    """Reads the graph; of the weights only what they are, not their numbers.

    Args:
        path: `model.onnx`.
        inputs: shapes of one image, by name.

    Raises:
        EdgeflashError: the file does not read as ONNX.
    """
    model = _loaded(path)
    graph, recorded = model.graph, _values(model)
    weights = {told.name: _tensor(told.name, told.dims, told.data_type) for told in _weights(graph)}
    operators = tuple(_operators(graph))
    off_centre = tuple(_off_centre(graph, operators, path.parent))
    names = tuple(value.name for value in graph.input if value.name not in weights)
    _lighten(graph)
    tensors: dict[str, Tensor] = {}
    unknown: tuple[str, ...] = ()
    before = -1
    while len(unknown) != before:  # what one pass counts helps the next to infer
        before = len(unknown)
        shapes = {name: tensor.shape for name, tensor in tensors.items()} | dict(inputs)
        model = _inferred(model, shapes, path)
        tensors, unknown = _sized(operators, names, recorded, _values(model))
    outputs = tuple(value.name for value in graph.output)
    return Graph(operators, weights, tensors, names, outputs, off_centre, unknown)


def _loaded(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise EdgeflashError(f"{path}: does not read as ONNX: {error}") from None


def _weights(graph: Any) -> Iterator[Any]:
    """Constants, as `TensorProto` messages under the names that operators take them by."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            told = node.attribute[0].t
            told.name = node.output[0]
            yield told


def _operators(graph: Any) -> Iterator[Operator]:
    for node in graph.node:
        if node.op_type != "Constant":
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
            takes = tuple(name for name in node.input if name)
            gives = tuple(name for name in node.output if name)
            yield Operator(domain + node.op_type, node.name or gives[0], takes, gives)


def _off_centre(graph: Any, operators: tuple[Operator, ...], folder: Path) -> Iterator[Operator]:
    import onnx

    constants = {told.name: told for told in _weights(graph)}
    for op in operators:
        if op.kind not in QUANTIZERS or len(op.takes) < 3:
            continue
        told = constants.get(op.takes[2])
        if told is None or told.data_type == onnx.TensorProto.UINT8:
            yield op
        elif onnx.numpy_helper.to_array(told, str(folder)).any():
            yield op


def _sized(
    operators: tuple[Operator, ...], inputs: tuple[str, ...], recorded: Values, inferred: Values
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Inputs and results by name, and the names of results of unknown shape.

    Inference does not see through every computed shape. There the count of numbers helps, or the
    file's own free sides, with the numbers they were found to stand for elsewhere.
    """
    free = {
        side: number
        for name, (sides, _) in recorded.items()
        for side, number in zip(sides, inferred[name][0], strict=False)
        if side and isinstance(side, str) and isinstance(number, int)
    }
    found: dict[str, Tensor] = {}
    unknown = []
    made = [(name, "", "") for name in inputs]
    made += [(name, op.kind, op.takes[0]) for op in operators for name in op.gives if op.takes]
    for name, by, source in made:
        told, kind = inferred.get(name, ((), 0))
        sides = [_number(side, free) for side in told]
        if by in REARRANGES and source in found and sides.count(None) == 1:
            rest, open_side = math.prod(side for side in sides if side), sides.index(None)
            sides[open_side] = math.prod(found[source].shape) // rest
        if kind and None not in sides:
            found[name] = _tensor(name, sides, kind)
        else:
            unknown.append(name)
    return found, tuple(unknown)


def _lighten(graph: Any) -> None:
    """Takes large weights out: inference would copy them, and need not know them."""
    for told in graph.initializer:
        if told.ByteSize() > SMALL_BYTES:
            for numbers in ("raw_data", "float_data", "int32_data", "int64_data"):
                told.ClearField(numbers)


def _inferred(model: Any, shapes: Shapes, path: Path) -> Any:
    """The model with all shapes that follow from those given."""
    import onnx

    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        sides = value.type.tensor_type.shape.dim
        for side, number in zip(sides, shapes.get(value.name, ()), strict=False):
            side.dim_value = number
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        said = " ".join(str(error).split())
        raise EdgeflashError(f"{path}: ONNX infers no shapes: {said}") from None


def _values(model: Any) -> Values:
    """Sides and type of every tensor that the model tells the rank of."""
    graph, found = model.graph, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        told = value.type.tensor_type
        if told.HasField("shape"):
            sides = (
                s.dim_value if s.HasField("dim_value") else s.dim_param for s in told.shape.dim
            )
            found[value.name] = (tuple(sides), told.elem_type)
    return found


def _number(side: int | str, free: Mapping[str, int]) -> int | None:
    """A side at the size of one image; None where the file does not tell."""
    if isinstance(side, int):
        return side
    factors = [int(part) if part.isdigit() else free.get(part) for part in side.split("*")]
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _tensor(name: str, shape: Any, kind: int) -> Tensor:
    import onnx

    packed = onnx.TensorProto.DataType.Name(kind) in ("INT4", "UINT4")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return Tensor(name, tuple(shape), dtype.name, 4 if packed else 8 * dtype.itemsize)
