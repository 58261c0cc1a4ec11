"""OpenVINO's models for bisection, run on the CPU with sums in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeflash.golden import Array, Tensors

from .bisect import Graph, Node
from .quantize_openvino import LAYERS, PRODUCTS, layer_of


class OpenVinoGraph(Graph):
    """An IR. Tensors are called by the operator that makes them, which keeps ONNX's name.

    The CPU fuses what nobody looks at, int8 above all: a tensor may be right only when looked at.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = self._read()
        layers = {}
        if model.has_rt_info(LAYERS):
            layers = json.loads(model.get_rt_info(LAYERS).astype(str))
        self.makers = {
            node.get_friendly_name(): _node(node, layers)
            for node in model.get_ordered_ops()
            if node.get_type_name() not in ("Parameter", "Constant", "Result")
            and node.get_output_size() == 1
        }

    def values(self, names: Sequence[str], inputs: Tensors) -> list[Array]:
        import openvino

        model = self._read()
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        ends = [nodes[name].output(0) for name in names]
        return _run(_compiled(openvino.Model(ends, model.get_parameters())), inputs)

    def results(self, inputs: Tensors) -> list[Array]:
        return _run(self._whole, inputs)

    @cached_property
    def _whole(self) -> Any:
        return _compiled(self._read())

    def _read(self) -> Any:
        import openvino

        return openvino.Core().read_model(str(self.path))


def _node(node: Any, layers: dict[str, str]) -> Node:
    kind, name = node.get_type_name(), node.get_friendly_name()
    sources = [port.get_source_output().get_node() for port in node.inputs()]
    takes = tuple(source.get_friendly_name() for source in sources)
    if kind not in PRODUCTS:
        return Node(kind, name, takes)
    constant = [source.get_type_name() == "Constant" for source in sources[:2]]
    weights = tuple(each for each, still in zip(takes, constant, strict=False) if still)
    return Node(kind, name, takes, weights or takes[:2], layer_of(name, layers))


def _compiled(model: Any) -> Any:
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _run(compiled: Any, inputs: Tensors) -> list[Array]:
    asked = {name for port in compiled.inputs for name in port.get_names()}
    found = compiled({name: array for name, array in inputs.items() if name in asked})
    return [found[port] for port in compiled.outputs]
