"""A module as a `torch.export` program, captured on a recorded call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram

from edgeflash.bundle import TensorSpec

from .caching import before_list

if TYPE_CHECKING:
    from .capture import Sample

MOST_BATCH = 63  # diffusers' upsampling takes another path from 64 on
NOTHING_TO_DO = {"aten.contiguous.default", "aten.dropout.default", "aten.alias.default"}


def to_program(
    module: torch.nn.Module, inputs: Iterable[TensorSpec], sample: Sample
) -> ExportedProgram:
    """Captures a module on a recorded call, at batch 2 where the batch stays free."""
    free: dict[str, Any] = {}
    arguments, shapes = [], []
    for spec in inputs:
        example = torch.from_numpy(sample.inputs[spec.name])
        named = {i: d for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for dimension in named.values():
            free.setdefault(dimension, Dim(dimension, min=1, max=MOST_BATCH))
        whole = zip(spec.shape, example.shape, strict=True)
        repeats = [2 if isinstance(side, str) else int(side) // one for side, one in whole]
        arguments.append(example.repeat(repeats))  # copied: numpy gives views of stride 0
        shapes.append({i: free[d] for i, d in named.items()})
    with torch.no_grad():
        free_shapes: tuple[Any, ...] | None = tuple(shapes) if free else None
        if free_shapes and (own := before_list(module)) is not None:
            free_shapes = (*free_shapes[:own], free_shapes[own:])
        program = torch.export.export(
            module, tuple(arguments), dynamic_shapes=free_shapes, strict=False
        )
    _tidy(program)
    return program


def _tidy(program: ExportedProgram) -> None:
    """Takes out what does nothing in a finished network: dropout, casts to the type it has."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = str(node.target)
        if name == "aten._assert_tensor_metadata.default":
            graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            program.graph_signature.replace_all_uses(node.name, node.args[0].name)
            graph.erase_node(node)
        elif name.startswith("aten.to."):
            node.target = torch.ops.aten._to_copy.default
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _does_nothing(node: torch.fx.Node) -> bool:
    """Of an operator that may give back what it is given, whether it does."""
    name = str(node.target)
    if name in NOTHING_TO_DO or name.startswith("aten.to.") or name == "aten.squeeze.dim":
        given, made = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
        return bool(given.dtype == made.dtype and given.ndim == made.ndim)
    return False
