"""OpenVINO's models for bisection, run on the CPU with sums in float32."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeflash.golden import Array, Tensors
from edgeflash.openvino_core import core

from .bisect import Graph, Node
from .quantize_openvino import LAYERS, PRODUCTS, layer_of

ENDS = ("Parameter", "Constant", "Result")


class OpenVinoGraph(Graph):
    """An IR. Tensors are called by the operator that makes them, which mostly keeps ONNX's name.

    The CPU fuses what nobody looks at, int8 above all: a tensor may be right only when looked at.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = self._read()
        layers = {}
        if model.has_rt_info(LAYERS):
            layers = json.loads(model.get_rt_info(LAYERS).astype(str))
        nodes = [n for n in model.get_ordered_ops() if n.get_type_name() not in ENDS]
        self.makers = {node.get_friendly_name(): _node(node, layers) for node in nodes}
        self.named = {
            node.get_friendly_name()
            for node in nodes
            if node.get_output_size() == 1 and not _numbered(node)
        }

    def changes(self, name: str, product: Node) -> bool:
        same = self.makers.get(name)
        return same is None or (same.kind, same.operands) != (product.kind, product.operands)

    def values(self, names: Sequence[str], inputs: Tensors) -> list[Array]:
        import openvino

        model = self._read()
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        ends = [nodes[name].output(0) for name in names]
        return _run(_compiled(openvino.Model(ends, model.get_parameters())), inputs)

    def results(self, inputs: Tensors) -> list[Array]:
        return _run(self._whole, inputs)

    def rest(self) -> None:
        self.__dict__.pop("_whole", None)

    @cached_property
    def _whole(self) -> Any:
        return _compiled(self._read())

    def _read(self) -> Any:
        return core().read_model(str(self.path))


def _node(node: Any, layers: dict[str, str]) -> Node:
    kind, name = node.get_type_name(), node.get_friendly_name()
    sources = [port.get_source_output().get_node() for port in node.inputs()]
    takes = tuple(source.get_friendly_name() for source in sources)
    if kind not in PRODUCTS or _numbered(node):
        return Node(kind, name, takes)
    return Node(kind, name, takes, (_operands(sources[:2]),), layer_of(name, layers))


def _numbered(node: Any) -> bool:
    """Whether OpenVINO named it, by a count that is another one in every process."""
    return re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()) is not None


def _operands(sources: Sequence[Any]) -> str:
    """ "rounded" or "plain", by a product's weights, or where it has none by what it takes.

    Their names would not tell: constants that were folded are numbered. Halves are plain.
    """
    weights = [source for source in sources if _is_constant(source)]
    if weights:
        kinds = [_before_cast(source).get_type_name() for source in weights]
        return "plain" if all(kind == "Constant" for kind in kinds) else "rounded"
    kinds = [source.get_type_name() for source in sources]
    return "rounded" if "FakeQuantize" in kinds else "plain"


def _before_cast(node: Any) -> Any:
    if node.get_type_name() != "Convert":
        return node
    source = node.input(0).get_source_output().get_node()
    return node if source.get_element_type().is_integral() else source


def _is_constant(node: Any, depth: int = 6) -> bool:
    """Whether it is a weight, or made of one in a few operations, as rounded ones are."""
    if node.get_type_name() == "Parameter" or not depth:
        return False
    sources = (port.get_source_output().get_node() for port in node.inputs())
    return all(_is_constant(source, depth - 1) for source in sources)


def _compiled(model: Any) -> Any:
    return core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _run(compiled: Any, inputs: Tensors) -> list[Array]:
    asked = {name for port in compiled.inputs for name in port.get_names()}
    found = compiled({name: array for name, array in inputs.items() if name in asked})
    return [found[port] for port in compiled.outputs]
