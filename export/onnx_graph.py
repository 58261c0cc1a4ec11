"""From a captured program to an ONNX graph, and what edgeflash changes in it before it is saved.

Weights stay where they lie, mapped from the student's files, until they are written once: every
change of a weight is a lazy one.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import constant_folding

from edgeflash.errors import EdgeflashError
from edgeflash.golden import Array

from .capture import Captured
from .plan import layer_of
from .wide import LAYER, kept

OPSET = 20  # the first with Gelu; ONNX Runtime 1.17 and later
EXTERNAL_SUFFIX = "_data"  # never .bin, which hub downloads for ONNX leave out
HALF, BF16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
BF16_OPSET = 22  # the first in which convolutions take bfloat16; nothing else has changed
SCOPES = "pkg.torch.onnx.name_scopes"  # modules around an operator, and its own name in torch
KEEPS_FLOAT = {("Resize", 1), ("Resize", 2)}  # inputs that stay float32 by definition: roi, scales


def translate(captured: Captured) -> ir.Model:
    """The program as an ONNX model in float32, named as the specs say.

    Raises:
        EdgeflashError: it holds an operator that the exporter does not know.
    """
    try:
        exported = _export_plain(captured) or _export(captured)
    except torch.onnx.OnnxExporterError as error:
        said = " ".join(str(error.__cause__ or error).split())[:300]
        raise EdgeflashError(f"{captured.component}: no ONNX for it: {said}") from error
    model: ir.Model = exported.model
    for change in _clean_up():
        change(model)
    _tell_layers_alone(model)
    for value, spec in zip(model.graph.inputs, captured.inputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    for value, spec in zip(model.graph.outputs, captured.outputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    return model


def _clean_up() -> list[ir.passes.InPlacePass]:
    """What makes half of the exporter's operators disappear.

    Its own optimizer would search the graph for patterns besides, which takes longer than all the
    rest and finds nothing that ONNX Runtime does not find when it loads.
    """
    return [
        constant_folding.FoldConstantsPass(
            shape_inference=True, input_size_limit=1024, output_size_limit=2**20
        ),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.NameFixPass(),
    ]


def _export_plain(captured: Captured) -> torch.onnx.ONNXProgram | None:
    """Without decomposing the program first, which traces all of it once more, mostly for nothing.

    None where an operator has no ONNX form of its own, which holds for all that write in place.
    """
    program = copy.copy(captured.program)
    program.run_decompositions = lambda *_: program
    try:
        return _export(dataclasses.replace(captured, program=program))
    except torch.onnx.OnnxExporterError:
        return None


def _export(captured: Captured) -> torch.onnx.ONNXProgram:
    with _quiet():
        exported = torch.onnx.export(
            captured.program,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in captured.inputs],
            output_names=[spec.name for spec in captured.outputs],
        )
    assert exported is not None
    return exported


def save(model: ir.Model, path: Path, external_bytes: int) -> list[Path]:
    """Writes a model; its weights beside it when they exceed ``external_bytes``.

    Returns the files, the model first.
    """
    total = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None, value.name
        total += tensor.nbytes
        if isinstance(tensor, ir.Tensor) and not tensor.numpy().flags.c_contiguous:
            # Constant folding left a transposed view, which numpy writes number by number.
            value.const_value = _later(tensor, _contiguous, tensor.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    if total <= external_bytes:
        ir.save(ir.external_data.load_to_model(model), path)
        return [path]
    data = path.with_name(path.name + EXTERNAL_SUFFIX)
    ir.save(model, path, external_data=data.name)
    return [path, data]


def _tell_layers_alone(model: ir.Model) -> None:
    """Leaves of the exporter's remarks the layer that each node comes from, as diffusers names it.

    The others, a quarter of what an int8 UNet weighs, name the folders of this machine.
    """
    for node in model.graph:
        *modules, _ = ast.literal_eval(node.metadata_props.get(SCOPES, "['', '']"))
        layer = layer_of("".join(modules[-1:]))
        node.metadata_props.clear()
        node.metadata_props.update({LAYER: layer} if layer else {})
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def layers(model: ir.Model) -> dict[str, str]:
    """The layer that each node comes from; "" where that is not known."""
    return {node.name or "": node.metadata_props.get(LAYER, "") for node in model.graph}


def load(path: Path) -> ir.Model:
    """Reads a model; its weights stay in their file."""
    return ir.load(path)


def to_half(model: ir.Model, kind: ir.DataType = HALF, besides: Iterable[ir.Node] = ()) -> None:
    """Makes weights and sums float16 or bfloat16; inputs and outputs stay float32.

    So does what `wide.kept` names, and ``besides`` these nodes.
    """
    graph = model.graph
    if kind == BF16:
        graph.opset_imports[""] = max(BF16_OPSET, graph.opset_imports[""])
    island = kept(graph, narrow_range=kind == HALF) | set(besides)
    inside = {value for node in island for value in node.outputs}
    crossed: dict[ir.Value, ir.Value] = {}
    for value in list(graph.initializers.values()):
        _halve_weight(graph, value, island, kind)
    for node in list(graph):
        if node not in island:
            _halve_node(graph, node, kind, inside, crossed)
    for node in list(graph):
        if node in island:
            _widen_inputs(graph, node, kind, crossed)
    for i, value in enumerate(graph.outputs):
        if value.dtype == kind:
            graph.outputs[i] = _widened(graph, value)


def _halve_weight(
    graph: ir.Graph, value: ir.Value, island: set[ir.Node], kind: ir.DataType
) -> None:
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    if tensor.dtype != ir.DataType.FLOAT:
        return
    uses = [u for u in value.uses() if u.node not in island and not _keeps_float(u.node, u.idx)]
    if not uses:
        return
    half = ir.Value(
        name=f"{value.name}.half",
        shape=value.shape,
        type=ir.TensorType(kind),
        const_value=_later(tensor, partial(clipped_half, kind=kind), kind),
    )
    graph.register_initializer(half)
    for use in uses:
        use.node.replace_input_with(use.idx, half)
    if not value.uses():
        del graph.initializers[value.name]


def _halve_node(
    graph: ir.Graph,
    node: ir.Node,
    kind: ir.DataType,
    inside: set[ir.Value],
    crossed: dict[ir.Value, ir.Value],
) -> None:
    for i, value in enumerate(node.inputs):
        if value is None or _keeps_float(node, i) or node.op_type == "Cast":
            continue
        if value.dtype == ir.DataType.FLOAT and (value in inside or value.is_graph_input()):
            if value not in crossed:
                crossed[value] = _cast(graph, value, kind, before=node)
            node.replace_input_with(i, crossed[value])
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, kind)
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                halved = ir.tensor(clipped_half(tensor.numpy(), kind))
                node.attributes[name] = ir.AttrTensor(name, halved)
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = kind


def _widen_inputs(
    graph: ir.Graph, node: ir.Node, kind: ir.DataType, crossed: dict[ir.Value, ir.Value]
) -> None:
    """Casts what a node that stays float32 takes of the others."""
    for i, value in enumerate(node.inputs):
        if value is not None and value.dtype == kind and node.op_type != "Cast":
            if value not in crossed:
                crossed[value] = _cast(graph, value, ir.DataType.FLOAT, before=node)
            node.replace_input_with(i, crossed[value])


def _widened(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A graph output of half the width, cast back to float32 under its own name."""
    name = value.name
    value.name = f"{name}.half"
    node = value.producer()
    assert node is not None
    wide = _cast(graph, value, ir.DataType.FLOAT, after=node)
    wide.name = name
    return wide


def _cast(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    node.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
    if before is not None:
        graph.insert_before(before, node)
    else:
        assert after is not None
        graph.insert_after(after, node)
    return node.outputs[0]


def _keeps_float(node: ir.Node, index: int) -> bool:
    return (node.op_type, index) in KEEPS_FLOAT


def clipped_half(array: Array, kind: ir.DataType = HALF) -> Array:
    """float16 or bfloat16, with finite values beyond it (masks of -3e38) at its limits."""
    wide = torch.from_numpy(np.array(array, np.float32))
    narrow = torch.float16 if kind == HALF else torch.bfloat16
    largest = torch.finfo(narrow).max
    half = torch.where(wide.isinf(), wide, wide.clamp(-largest, largest)).to(narrow).contiguous()
    return half.view(torch.int16).numpy().view(kind.numpy())


def _later(
    tensor: ir.TensorProtocol, change: Callable[[Array], Array], dtype: ir.DataType
) -> ir.LazyTensor:
    """``change(tensor)``, of the same shape, made when it is written and not kept."""
    return ir.LazyTensor(
        lambda: ir.tensor(change(tensor.numpy()), name=tensor.name),
        dtype=dtype,
        shape=ir.Shape(tensor.numpy().shape),
        name=tensor.name,
    )


def _contiguous(array: Array) -> Array:
    return torch.from_numpy(array).contiguous().numpy()  # ten times as fast as numpy's


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about itself off the terminal."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
