"""What of an ONNX graph stays float32 where all else becomes halves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir

LAYER = "layer"  # in the metadata of nodes: the layer that they come from, as torch names it
T5_SUMS = re.compile(  # the states that T5's layers add to, and the product that adds the most
    r"encoder\.block\.\d+\.layer\.\d+(\.DenseReluDense\.wo)?"
)
WHOLE = {ir.DataType.INT32, ir.DataType.INT64}
FROM_SQUARES = 4  # nodes from a mean of squares to the product: plus eps, root, inverse, it


def kept(graph: ir.Graph, *, narrow_range: bool) -> set[ir.Node]:
    """Nodes that compute in float32 whatever is around them.

    Angles, which go up to 1000 radians, and places, of which half precision would round one into
    the next; squares whose mean is taken, which leave float16's range from 256 on, and its normal
    numbers below 0.008. In float16, whose range is narrow, also what T5's layers add up: its
    feed-forward products go beyond 65,504, for which transformers keeps their weights in float32
    too.
    """
    ends = [node for node in graph if node.op_type in ("Sin", "Cos")]
    found = {*ends, *_before(ends), *_places(graph), *_norms(graph)}
    if narrow_range:
        found |= {n for n in graph if T5_SUMS.fullmatch(n.metadata_props.get(LAYER, ""))}
    return found


def _before(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """All that these are computed from in float32, back to where it comes from whole numbers."""
    left, seen = [*nodes], set[ir.Node]()
    while left:
        for value in left.pop().inputs:
            node = value.producer() if value is not None else None
            if value is None or node is None or value.dtype != ir.DataType.FLOAT or node in seen:
                continue
            seen.add(node)
            left.append(node)
            yield node


def _places(graph: ir.Graph) -> Iterator[ir.Node]:
    """What whole numbers are made of that depend on sizes alone, as T5's distances do."""
    felt = _felt(graph)
    for node in graph:
        whole = node.op_type == "Cast" and node.outputs[0].dtype in WHOLE
        if whole and node not in felt:
            yield from _before([node])


def _felt(graph: ir.Graph) -> set[ir.Node]:
    """The nodes in which the inputs' numbers have a say, and not their shapes alone."""
    reached, found = set(graph.inputs), set[ir.Node]()
    for node in graph:
        if node.op_type != "Shape" and any(value in reached for value in node.inputs):
            found.add(node)
            reached |= set(node.outputs)
    return found


def _norms(graph: ir.Graph) -> Iterator[ir.Node]:
    """From squares to what the root of their mean divides (arXiv 1910.07467, eq. 4)."""
    for node in graph:
        averaged = node.inputs[0] if node.op_type == "ReduceMean" else None
        squares = averaged.producer() if averaged is not None else None
        if squares is None or not _squares(squares):
            continue
        last = node
        yield from (squares, last)
        for _ in range(FROM_SQUARES):
            users = {use.node for use in last.outputs[0].uses()}
            if len(users) != 1:
                break
            (last,) = users
            yield last
            if squares.inputs[0] in last.inputs:
                break


def _squares(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    exponent = node.inputs[1] if node.op_type == "Pow" else None
    power = exponent.const_value if exponent is not None else None
    return power is not None and power.size == 1 and float(power.numpy().reshape(())) == 2
