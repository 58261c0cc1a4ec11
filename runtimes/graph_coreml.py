"""The graph of a Core ML component: the programs of its packages, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .graph import Graph, Operator, Tensor
from .mil_program import read_by, read_model
from .mil_weights import BITS, DTYPES, kind_of


def read_coreml(packages: Sequence[Path]) -> Graph:
    """Reads the programs; of the weights only what they are, not their numbers.

    Raises:
        EdgeflashError: no package, or one of another kind.
    """
    operators: list[Operator] = []
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}
    outputs: tuple[str, ...] = ()
    for package in packages:
        model = read_model(package)
        told = model.mlProgram.functions[model.description.defaultFunctionName or "main"]
        block = told.block_specializations[told.opset]
        given = (_tensor(tensor.name, tensor.type) for tensor in told.inputs)
        inputs |= {tensor.name: tensor for tensor in given if tensor.name not in results}
        outputs = tuple(block.outputs)
        for op in block.operations:
            gives = [_tensor(output.name, output.type) for output in op.outputs]
            if op.type == "const":
                weights[gives[0].name] = gives[0]
                continue
            stored = {tensor.name: tensor for tensor in _stored(op)}
            names = tuple(tensor.name for tensor in gives)
            operators.append(Operator(op.type, names[0], (*read_by(op), *stored), names))
            weights |= stored
            if not op.type.startswith("constexpr_"):
                results |= dict(zip(names, gives, strict=True))
    return Graph(tuple(operators), weights, inputs | results, tuple(inputs), outputs)


def _stored(op: Any) -> Iterator[Tensor]:
    """What an operator keeps in the weight file itself, as those for fewer bits do."""
    inner = [(name, given.arguments[0].value) for name, given in op.inputs.items()]
    for name, value in (*op.attributes.items(), *inner):
        if value.WhichOneof("value") == "blobFileValue":
            yield _tensor(f"{op.outputs[0].name}.{name}", value.type)


def _tensor(name: str, told: Any) -> Tensor:
    kind = kind_of(told)
    bits = BITS.get(kind) or 8 * np.dtype(DTYPES.get(kind, "?")).itemsize
    shape = tuple(side.constant.size for side in told.tensorType.dimensions)
    return Tensor(name, shape, kind.lower(), bits)
