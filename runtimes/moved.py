"""Bytes that a call of a network has to move, whatever its runtime: from its graph, of one image.

Weights are read once; every result of an operator is written once and read once, as if nothing
stayed in a cache and nothing were fused but quantization, which all runtimes fuse: what is handed
from layer to layer are the quantized numbers alone.
"""

from __future__ import annotations

from edgeflash.bundle import Bundle

from .graph import Graph, at_work
from .lint import look

WIDENS, NARROWS = "DequantizeLinear", "QuantizeLinear"


def moved_mib(bundle: Bundle, batch: int = 1) -> dict[str, float]:
    """Of a call, by component; those whose graph nothing here reads are not among them."""
    return {
        part.component.name: (part.weight_bytes + 2 * batch * results_bytes(part.graph)) / 2**20
        for part in look(bundle)
        if not part.unread
    }


def results_bytes(graph: Graph) -> int:
    """Of all results that are handed on."""
    operators = at_work(graph)
    narrowed = {op.takes[0] for op in operators if op.kind == NARROWS}
    narrowed -= {name for op in operators if op.kind != NARROWS for name in op.takes}
    handed = [name for op in operators if op.kind != WIDENS for name in op.gives]
    wanted = [name for name in handed if name in graph.tensors and name not in narrowed]
    return sum(graph.tensors[name].bytes for name in wanted)
