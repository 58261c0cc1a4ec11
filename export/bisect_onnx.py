"""ONNX files for bisection, run by ONNX Runtime as they are typed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from edgeflash.golden import Array, Tensors
from edgeflash.rounding import FOLDER, WIDE, rounded

from .bisect import Graph, Node
from .wide import LAYER

PRODUCTS = ("Conv", "MatMul", "Gemm")
HALF = ".half"  # what `onnx_graph.to_half` puts behind names of halves


class OnnxGraph(Graph):
    """An ONNX file, its weights beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        graph = onnx.load(str(path), load_external_data=False).graph
        weights = frozenset(weight.name for weight in graph.initializer)
        self.makers = {
            name: _node(node, weights) for node in graph.node for name in node.output if name
        }
        self.named = self.makers

    def changes(self, name: str, product: Node) -> bool:
        """By its weights, if it has any: what it takes is rounded for all that take it.

        Halves are no other operands.
        """
        same = self.makers.get(f"{name}{HALF}") or self.makers.get(name)
        if same is None or same.kind != product.kind:
            return True
        return not {*product.operands} & {*same.takes}

    def values(self, names: Sequence[str], inputs: Tensors) -> list[Array]:
        model = _as_typed(self.path)
        there = {name for node in model.graph.node for name in node.output}
        taps = [f"{name}{WIDE}" if f"{name}{WIDE}" in there else name for name in names]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
        return list(_opened(model, self.path.parent).run(taps, inputs))

    def results(self, inputs: Tensors) -> list[Array]:
        return list(self._session.run(None, inputs))

    def rest(self) -> None:
        self.__dict__.pop("_session", None)

    @cached_property
    def _session(self) -> ort.InferenceSession:
        return _opened(_as_typed(self.path), self.path.parent)


def _node(node: Any, weights: frozenset[str]) -> Node:
    takes = tuple(each.removesuffix(HALF) for each in node.input)
    if node.op_type not in PRODUCTS:
        return Node(node.op_type, node.name, takes)
    operands = tuple(each for each in node.input[:2] if each in weights) or takes[:2]
    layers = [each.value for each in node.metadata_props if each.key == LAYER]
    return Node(node.op_type, node.name, takes, operands, "".join(layers[:1]))


def _opened(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    """Unoptimized, so that every tensor exists; with pairs of fp8, which ONNX Runtime breaks on."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(FOLDER, str(folder))
    told = model.SerializeToString()
    return ort.InferenceSession(told, options, providers=["CPUExecutionProvider"])


def _as_typed(path: Path) -> onnx.ModelProto:
    """The model, its weights left beside it, rounding as it is typed."""
    return onnx.load_from_string(rounded(path.read_bytes()))
