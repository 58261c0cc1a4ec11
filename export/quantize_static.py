"""int8 from recorded ranges by ONNX Runtime's quantizer, which is shown no weights.

`onnxruntime.quantization.quantize_static` holds all weights several times over: 6 to 7 GB for a
UNet of 319 M parameters. What it makes of a weight follows from the extremes of each output channel
alone. So here it gets a stand-in of two numbers a channel, and the weights themselves are quantized
one by one while they are written, with the scales that it chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnxruntime import quantization as ort
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from edgeflash.golden import Array

from .capture import Sample
from .extremes import extremes
from .onnx_graph import load, save
from .quantize_weights import LARGEST, channels
from .quiet import quiet


def quantize_by_extremes(
    path: Path,
    calls: Sequence[Sample],
    names: list[str],
    operators: Sequence[str],
    *,
    symmetric: bool,
    extra: Mapping[str, Any],
) -> Path:
    """Quantizes these products of a float32 model; the result lies beside it.

    Weights are int8 per output channel, activations uint8, or int8 where ``symmetric``, with one
    range a tensor, from the least to the greatest value of all calls. ``extra``: more of ONNX
    Runtime's extra options.
    """
    whole, proto = load(path), onnx.load(str(path), load_external_data=False)
    proto = onnx.shape_inference.infer_shapes(proto)
    chosen = [node for node in whole.graph if node.name in names]
    ranges = extremes(path, [call.inputs for call in calls], names)
    weights = _weights(chosen)
    _show_extremes_alone(proto, whole, weights, chosen, path.parent)
    add_infer_metadata(proto)  # or it would save the model and infer shapes from the stand-ins
    with quiet():
        quantizer = QDQQuantizer(
            proto,
            per_channel=True,
            reduce_range=False,
            weight_qType=ort.QuantType.QInt8,
            activation_qType=ort.QuantType.QInt8 if symmetric else ort.QuantType.QUInt8,
            tensors_range=TensorsData(ort.CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=names,
            nodes_to_exclude=[],
            op_types_to_quantize=list(operators),
            extra_options={"ActivationSymmetric": symmetric, **extra},
        )
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    found = ir.from_proto(quantizer.model.model)
    ir.external_data.set_base_dir(found.graph, path.parent)
    _fill_in(found.graph, whole.graph, weights)
    return save(found, path.with_name("int8.onnx"), 0)[0]


def _weights(products: Iterable[ir.Node]) -> dict[str, int]:
    """Names of the weights of products -> the axis of output channels, where all agree on it."""
    axes: dict[str, set[int]] = {}
    for node in products:
        weight = node.inputs[1]
        if weight is not None and weight.is_initializer():
            axes.setdefault(weight.name or "", set()).add(channels(node, weight))
    return {name: axis for name, (axis, *others) in axes.items() if not others}


def _show_extremes_alone(
    proto: onnx.ModelProto,
    whole: ir.Model,
    weights: Mapping[str, int],
    products: Iterable[ir.Node],
    folder: Path,
) -> None:
    """Puts stand-ins where weights are; what else the products take comes whole, as biases do."""
    taken = {value.name for node in products for value in node.inputs if value is not None}
    for tensor in proto.graph.initializer:
        value = whole.graph.initializers[tensor.name].const_value
        assert value is not None
        if tensor.name in weights:
            stand_in = _extremes_of(_read(value), weights[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(stand_in, tensor.name))
        elif tensor.external_data and tensor.name in taken:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT


def _read(weight: Any) -> Array:
    """From its file where it has one, not by a map that keeps all that was ever looked at."""
    if not isinstance(weight, ir.ExternalTensor):
        found: Array = weight.numpy()
        return found
    kind, start = weight.dtype.numpy(), weight.offset or 0
    flat = np.fromfile(weight.path, kind, count=weight.size, offset=start)
    return flat.reshape(weight.shape.numpy())


def _extremes_of(weight: Array, axis: int) -> Array:
    """Least and greatest of each channel, in a tensor of as many axes."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    ends = [weight.min(axis=others, keepdims=True), weight.max(axis=others, keepdims=True)]
    return np.concatenate(ends, axis=others[0])


def _fill_in(graph: ir.Graph, whole: ir.Graph, weights: Mapping[str, int]) -> None:
    """Puts weights where stand-ins are: in 8 bits by the scales chosen for them, or whole."""
    for name, axis in weights.items():
        weight = whole.initializers[name]
        assert weight.const_value is not None
        narrow, left = (graph.initializers.get(key) for key in (f"{name}_quantized", name))
        if left is not None:
            left.shape, left.const_value = weight.shape, weight.const_value
        if narrow is not None:
            scale = graph.initializers[f"{name}_scale"].const_value
            assert scale is not None
            narrow.shape = weight.shape
            narrow.const_value = _narrowed(weight.const_value, scale.numpy(), axis)


def _narrowed(weight: Any, scale: Array, axis: int) -> ir.LazyTensor:
    """A weight in int8, computed when it is written."""

    def now() -> Any:
        shape = [-1 if i == axis else 1 for i in range(len(weight.shape))]
        steps = np.rint(_read(weight) / scale.reshape(shape))
        return ir.tensor(steps.clip(-LARGEST, LARGEST).astype(np.int8))

    return ir.LazyTensor(now, dtype=ir.DataType.INT8, shape=weight.shape)
