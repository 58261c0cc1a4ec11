"""What a lowered network consists of, read from its file, and how much of it is alive at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SHAPE_OF = ("Shape", "Size", "shape")  # operators that look at nothing but sides


@dataclass(frozen=True)
class Tensor:
    """A weight, an input or a result, at the size of one image."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # float16, INT4 …, as its file calls it
    bits: int  # of a number

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.shape) * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class Operator:
    kind: str
    name: str
    takes: tuple[str, ...]  # names of tensors
    gives: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Graph:
    """A network; the one without operators stands for one that could not be read.

    Attributes:
        operators: in the order they run.
        weights: constants as they are stored, by name.
        tensors: inputs and results, by name.
        inputs, outputs: names of what it takes and gives.
        off_centre: operators that quantize with a zero point other than 0, or to uint8.
        unknown: results whose shape the file does not tell; they are not among ``tensors``.
    """

    operators: tuple[Operator, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    off_centre: tuple[Operator, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peak:
    """The operator at which most is alive, the largest tensor then, and the bytes of all."""

    bytes: int = 0
    operator: Operator | None = None
    largest: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.operator}, with {self.largest}" if self.operator else ""


def at_work(graph: Graph) -> list[Operator]:
    """The operators that compute from the inputs' numbers, in order.

    The others follow from weights, and from shapes that are known once the size of the image is:
    runtimes fold those before they run, or fuse a dequantized weight into the operator it is for.
    """
    fixed, found = set(graph.weights), []
    for op in graph.operators:
        if op.kind in SHAPE_OF or (op.takes and fixed.issuperset(op.takes)):
            fixed.update(op.gives)
        else:
            found.append(op)
    return found


def peak(graph: Graph) -> Peak:
    """When most inputs and results are alive, if operators run one by one in the file's order.

    A result lives from the operator that gives it to the last that takes it; inputs and outputs
    live to the end. No operator works in place and none are fused.
    """
    operators = at_work(graph)
    last = {name: number for number, op in enumerate(operators) for name in op.takes}
    kept = {*graph.inputs, *graph.outputs}
    alive = {name: graph.tensors[name] for name in graph.inputs if name in graph.tensors}
    worst = Peak()
    for number, op in enumerate(operators):
        alive |= {name: graph.tensors[name] for name in op.gives if name in graph.tensors}
        total = sum(tensor.bytes for tensor in alive.values())
        if total > worst.bytes:
            worst = Peak(total, op, max(alive.values(), key=lambda tensor: tensor.bytes))
        spent = [name for name in alive if name not in kept and last.get(name, 0) <= number]
        for name in spent:
            del alive[name]
    return worst
