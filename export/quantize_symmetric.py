"""QDQ as TensorRT wants it: pairs in front of what they quantize alone, in int8 or fp8 (E4M3)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from edgeflash.golden import Array

PAIR = ("QuantizeLinear", "DequantizeLinear")
LARGEST = 448.0  # of E4M3
FP8 = ir.DataType.FLOAT8E4M3FN
QUANTIZED = "_quantized"  # what ONNX Runtime's quantizer adds to the name of a weight
SMALLEST = 2.0**-24  # of fp16, in which scales may be kept


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


def keep_positive(model: ir.Model) -> None:
    """Raises the scales of int8 that fp16 would round to 0, which TensorRT takes for an error."""
    for node in model.graph:
        if node.op_type not in PAIR:
            continue
        scale, source = _array(node.inputs[1]), node.inputs[0]
        raised = np.maximum(scale, np.float32(SMALLEST))
        if source is not None and source.is_initializer() and (scale < raised).any():
            weight = _array(source)
            shrunk = weight * _along(scale / raised, weight, node)
            _set(source, np.rint(shrunk).astype(np.int8))
        _set(node.inputs[1], raised)


def to_fp8(model: ir.Model, whole: ir.Model) -> None:
    """Turns QDQ pairs of int8 into pairs of fp8, and quantizes the weights of ``whole`` anew.

    Args:
        model: int8, symmetric, as ONNX Runtime's static quantization writes it.
        whole: the float32 model that it was made from.
    """
    initializers = model.graph.initializers
    scales = {node.inputs[1]: node for node in model.graph if node.op_type in PAIR}
    for scale, node in scales.items():
        widened = np.maximum(_array(scale) * np.float32(127 / LARGEST), np.float32(SMALLEST))
        source, zero = node.inputs[0], node.inputs[2]
        assert source is not None and zero is not None and zero.name is not None
        if source.is_initializer():
            assert source.name is not None
            weight = whole.graph.initializers[source.name.removesuffix(QUANTIZED)]
            scaled = _array(weight) / _along(widened, _array(weight), node)
            _set(source, scaled.clip(-LARGEST, LARGEST).astype(FP8.numpy()))
        _set(scale, widened)
        _set(zero, np.zeros(_array(zero).shape, FP8.numpy()))
    for value in initializers.values():
        assert value.dtype != ir.DataType.INT8, value.name
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = FP8


def _along(scale: Array, weight: Array, node: ir.Node) -> Array:
    """A scale as it multiplies a weight: one for all of it, or one for each slice of an axis."""
    sides = [1] * weight.ndim
    if scale.ndim:
        sides[node.attributes["axis"].as_int() if "axis" in node.attributes else 1] = -1
    return scale.reshape(sides)


def _array(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _set(value: ir.Value | None, array: Array) -> None:
    assert value is not None
    value.const_value = ir.tensor(array, name=value.name)
    value.dtype = value.const_value.dtype
