"""What of a component would leave float16's range, and what a person wants in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeflash.caching import SUFFIX
from edgeflash.errors import EdgeflashError
from edgeflash.rounding import MOVES

from .capture import Captured
from .divergence import LARGEST_HALF, NEVER
from .memory import APART_NUMBERS
from .onnx_graph import HALF, to_half
from .plan import Operator
from .wide import LAYER

MARGIN = 2.0  # what other prompts may bring
CALLS, FEW_CALLS = 16, 2  # of small components, and of those that take seconds a call


def halve(
    model: ir.Model, captured: Captured, keep: Sequence[str], kind: ir.DataType = HALF
) -> None:
    """`to_half`, but for operators by name, and in float16 for what could not hold its values."""
    besides = set(_named(model.graph, captured.component, keep))
    if kind == HALF:
        besides |= set(_around(model.graph, large(captured)))
    to_half(model, kind, besides)


def large(captured: Captured) -> set[str]:
    """Names of results that came near the end of float16's range in recorded calls.

    They are those of the program, which the graph made of it keeps. Few calls are run where each
    takes seconds: the first and the last.
    """
    numbers = sum(weight.numel() for weight in captured.program.parameters())
    count = min(CALLS if numbers <= APART_NUMBERS else FEW_CALLS, len(captured.samples))
    watch = _Watch(captured.program.module())
    with torch.no_grad():
        for i in np.linspace(0, len(captured.samples) - 1, count):
            given = captured.samples[round(i)].inputs
            watch.run(*(torch.from_numpy(given[spec.name]) for spec in captured.inputs))
    return {name for name, value in watch.largest.items() if value * MARGIN > LARGEST_HALF}


class _Watch(torch.fx.Interpreter):
    """Runs a program, and notes the largest magnitude of every result."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.largest: dict[str, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        found = super().run_node(n)
        float32 = isinstance(found, torch.Tensor) and found.dtype == torch.float32
        if n.op == "call_function" and float32 and found.numel():
            self.largest[n.name] = max(self.largest.get(n.name, 0.0), _largest(found))
        return found


def _largest(found: torch.Tensor) -> float:
    """Of the magnitudes, but for what masks put for minus infinity, which may become it."""
    low, high = torch.aminmax(found)
    largest = max(-low.item(), high.item())
    if largest <= NEVER:
        return largest
    inside = found[found.abs() <= NEVER]
    return inside.abs().max().item() if inside.numel() else 0.0


def _around(graph: ir.Graph, names: Iterable[str]) -> Iterator[ir.Node]:
    """The nodes that make such values, and those that take them, also where they were moved."""
    left, wanted = list[ir.Value](), set(names)
    for node in graph:
        if any(value.name in wanted for value in node.outputs):
            yield node
            left += node.outputs
    seen = set(left)
    while left:
        for use in left.pop().uses():
            yield use.node
            if use.node.op_type in MOVES:
                left += [value for value in use.node.outputs if value not in seen]
                seen.update(use.node.outputs)


def _named(graph: ir.Graph, component: str, keep: Iterable[str]) -> Iterator[ir.Node]:
    """The nodes that patterns mean.

    Raises:
        EdgeflashError: a pattern that means none; but a cached graph lacks most layers.
    """
    known = {
        node: Operator(node.name or "", node.metadata_props.get(LAYER, ""), "linear", frozenset())
        for node in graph
    }
    for pattern in keep:
        head = pattern.partition("/")[0]  # of a cached graph also that of the whole one
        found = [node for node, operator in known.items() if operator.fits(head, pattern)]
        if not found and not component.endswith(SUFFIX):
            names = dict.fromkeys(op.called(head) for op in known.values() if op.layer)
            raise EdgeflashError(
                f"keep: no operator of {component} is called {pattern!r}: their names are like "
                f"{', '.join([*names][:2])}"
            )
        yield from found
