"""Weights of fewer bits for ONNX Runtime, activations left as they are.

int8-weights: one scale an output channel, by ``DequantizeLinear``, which is plain ONNX and takes
every kind of product. int4-weights: one scale and zero point a block, by ``MatMulNBits``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgeflash.golden import Array

from .onnx_graph import load, save
from .quiet import quiet

BLOCK = 32  # weights a scale: 128 is smaller by 5 %, and 1 to 4 dB worse on the embedded student
LARGEST = 127  # of int8; -128 stays unused, as in ONNX Runtime's own symmetric weights


def to_int8(path: Path, names: list[str]) -> Path:
    """Gives the weights of these products 8 bits; the result lies beside the model."""
    model, found = load(path), path.with_name("int8-weights.onnx")
    graph, made = model.graph, dict[tuple[ir.Value, int], ir.Value]()
    for node in list(graph):
        if node.name not in names:
            continue
        at = next(i for i, v in enumerate(node.inputs) if v is not None and v.is_initializer())
        weight = node.inputs[at]
        assert weight is not None
        key = weight, channels(node, weight)
        if key not in made:
            made[key] = _widened(graph, *key, before=node)
        node.replace_input_with(at, made[key])
    for weight, _ in made:
        if not weight.uses():
            del graph.initializers[weight.name or ""]
    return save(model, found, 0)[0]


def channels(node: ir.Node, weight: ir.Value) -> int:
    """The axis of the output channels in the weight of a product."""
    assert weight.shape is not None
    flipped = node.op_type == "Gemm" and node.attributes.get_int("transB", False)
    return 0 if node.op_type == "Conv" or flipped else len(weight.shape) - 1


def _widened(graph: ir.Graph, weight: ir.Value, axis: int, *, before: ir.Node) -> ir.Value:
    """The weight from int8 and one scale a channel, in the type it had."""
    assert weight.const_value is not None
    whole, scale = narrowed(weight.const_value.numpy(), axis)
    parts = []
    for suffix, array in (("int8", whole), ("scale", scale)):
        tensor = ir.tensor(array, name=f"{weight.name}.{suffix}")
        part = ir.Value(
            name=tensor.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(part)
        parts.append(part)
    node = ir.node("DequantizeLinear", parts, attributes={"axis": axis})
    node.outputs[0].name = f"{weight.name}.wide"
    node.outputs[0].type, node.outputs[0].shape = weight.type, weight.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def narrowed(weight: Array, axis: int) -> tuple[Array, Array]:
    """int8 numbers of the weight's shape, and a scale [channels] of its type."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (np.abs(weight.astype(np.float32)).max(axis=others) / LARGEST).astype(weight.dtype)
    scale[scale == 0] = 1
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    steps = weight.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.rint(steps).clip(-LARGEST, LARGEST).astype(np.int8), scale


def to_int4(path: Path, names: list[str]) -> Path:
    """Gives the weights of these matrix products 4 bits; the result lies beside the model."""
    found = path.with_name("int4.onnx")
    model = onnx.load(path)
    others = {node.name for node in model.graph.node}.difference(names)
    with quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK, bits=4)
        quantizer = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(found), use_external_data_format=True)
    return found
