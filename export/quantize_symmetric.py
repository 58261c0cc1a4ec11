"""QDQ as TensorRT wants it: pairs in front of what they quantize alone, in int8 or fp8 (E4M3)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from edgeflash.golden import Array

LARGEST = 448.0  # of E4M3
FP8 = ir.DataType.FLOAT8E4M3FN
QUANTIZED = "_quantized"  # what ONNX Runtime's quantizer adds to the name of a weight
SMALLEST = 2.0**-24  # of fp16, in which scales may be kept: 0 would give NaN


def only_in_front(model: ir.Model, operators: Collection[str]) -> None:
    """Gives the values themselves to all that took rounded ones beside a quantized operator.

    ONNX Runtime's quantizer puts a tensor's pair before all that use it: skip connections and
    norms too. A quantized operator is one of ``operators`` with both its inputs in pairs.
    """
    for node in model.graph:
        if node.op_type != "QuantizeLinear":
            continue
        for pair in list(node.outputs[0].consumers()):
            for use in list(pair.outputs[0].uses()):
                if use.node.op_type not in operators or not _quantizes(use.node):
                    use.node.replace_input_with(use.idx, node.inputs[0])


def _quantizes(node: ir.Node) -> bool:
    makers = [value.producer() if value else None for value in node.inputs[:2]]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def to_fp8(model: ir.Model, whole: ir.Model) -> None:
    """Turns QDQ pairs of int8 into pairs of fp8, and quantizes the weights of ``whole`` anew.

    Args:
        model: int8, symmetric, as ONNX Runtime's static quantization writes it.
        whole: the float32 model that it was made from.
    """
    initializers = model.graph.initializers
    scales = {
        node.inputs[1]: node
        for node in model.graph
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    for scale, node in scales.items():
        widened = np.maximum(_array(scale) * np.float32(127 / LARGEST), np.float32(SMALLEST))
        source, zero = node.inputs[0], node.inputs[2]
        assert source is not None and zero is not None and zero.name is not None
        if source.is_initializer():
            assert source.name is not None
            weight = whole.graph.initializers[source.name.removesuffix(QUANTIZED)]
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            _set(source, _quantized(_array(weight), widened, axis))
        _set(scale, widened)
        _set(zero, np.zeros(_array(zero).shape, FP8.numpy()))
    for value in initializers.values():
        assert value.dtype != ir.DataType.INT8, value.name
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = FP8


def _quantized(weight: Array, scale: Array, axis: int) -> Array:
    """fp8 of a weight, one scale for all of it or for each slice along ``axis``."""
    along = [1] * weight.ndim
    if scale.ndim:
        along[axis] = -1
    scaled = weight / scale.reshape(along)
    return scaled.clip(-LARGEST, LARGEST).astype(FP8.numpy())


def _array(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _set(value: ir.Value | None, array: Array) -> None:
    assert value is not None
    value.const_value = ir.tensor(array, name=value.name)
    value.dtype = value.const_value.dtype
