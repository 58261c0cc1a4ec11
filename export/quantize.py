"""Fewer bits for ONNX Runtime and TensorRT, by ONNX Runtime's own quantizers and one plan.

int8: ranges from what was recorded in the student's own loop, as QDQ pairs. int8-dynamic: ranges
measured in every run. Weights alone are in `quantize_weights.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization as ort
from onnxruntime.quantization import CalibrationDataReader

from edgeflash.errors import EdgeflashError
from edgeflash.golden import Tensors

from .capture import Captured, Sample
from .onnx_graph import layers, load
from .plan import PIXELS, Kind, Operator, Quantizing
from .quantize_static import quantize_by_extremes
from .quantize_weights import to_int4, to_int8
from .quiet import quiet

PRODUCTS = ("Conv", "MatMul", "Gemm")
TAKES = {  # by ONNX Runtime; of two activations products take int8 alone
    "Conv": ("int8", "int8-dynamic", "int8-weights"),
    "MatMul": ("int8", "int8-dynamic", "int8-weights", "int4-weights"),
    "Gemm": ("int8", "int8-weights"),
}
METHODS = {"percentile": "Percentile", "entropy": "Entropy"}


class Recorded(CalibrationDataReader):  # type: ignore[misc]
    """Feeds recorded calls to a calibrator, one at a time: all, or those of a range."""

    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self._samples = samples
        self._left: Iterator[Sample] = iter(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._samples[start_index:end_index])

    def get_next(self) -> Tensors | None:
        sample = next(self._left, None)
        return sample.inputs if sample is not None else None


def decide(
    path: Path,
    captured: Captured,
    options: Quantizing,
    takes: Mapping[str, Collection[str]],
    out: Path,
) -> dict[str, str]:
    """What becomes of each product of a model, by node name; told to the plan in ``out`` too.

    ``takes``: words that a kind of node can get.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    operators = operators_of(graph, layers(load(path)), takes)
    words = options.decided(captured.component, operators, away(graph, captured, options))
    options.write_down(out, captured.component, operators, words)
    return words


def operators_of(
    graph: Any, layers: Mapping[str, str], takes: Mapping[str, Collection[str]]
) -> list[Operator]:
    """The products of an ONNX graph."""
    weights = {weight.name for weight in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in PRODUCTS:
            loose = weights.isdisjoint(node.input)
            kind: Kind = "attention" if loose else "conv" if node.op_type == "Conv" else "linear"
            words = frozenset(takes.get(node.op_type, ()))
            if loose:
                words &= {"int8"}
            found.append(Operator(node.name, layers[node.name], kind, words))
    return found


def operator_of(kind: Kind, rank: int) -> str:
    """What a layer with weights becomes; ``rank``: of what it is given."""
    return "Conv" if kind == "conv" else "Gemm" if rank == 2 else "MatMul"


def quantize(
    path: Path, captured: Captured, words: Mapping[str, str], ranges: str, *, symmetric: bool
) -> Path:
    """Quantizes the model at ``path`` as decided; the result lies beside it.

    Raises:
        EdgeflashError: int8 beside int8-dynamic; ONNX Runtime gives their tensors the same names.
    """
    if {"int8", "int8-dynamic"} <= set(words.values()):
        name = captured.component
        raise EdgeflashError(f"plan: {name} cannot hold both int8 and int8-dynamic: choose one")
    if names := named(words, "int8-dynamic"):
        path = quantize_dynamic(path, names)
    if names := named(words, "int8"):
        path = quantize_static(path, captured, names, ranges, symmetric=symmetric)
    if names := named(words, "int8-weights"):
        path = to_int8(path, names)
    if names := named(words, "int4-weights"):
        path = to_int4(path, names)
    return path


def named(words: Mapping[str, str], word: str) -> list[str]:
    """The operators that got a word."""
    return [name for name, found in words.items() if found == word]


def quantize_static(
    path: Path,
    captured: Captured,
    names: list[str],
    ranges: str,
    *,
    symmetric: bool = False,
    **extra: Any,
) -> Path:
    """Quantizes these products of a float32 model; the result lies beside it.

    Weights are int8 per output channel, activations uint8, or int8 where ``symmetric``, with one
    range a tensor. ``extra``: more of ONNX Runtime's extra options.
    """
    if ranges == "minmax":
        calls = captured.calibration
        return quantize_by_extremes(path, calls, names, PRODUCTS, symmetric=symmetric, extra=extra)
    found = path.with_name("int8.onnx")
    extra |= {"CalibStridedMinMax": 1}  # recorded calls at a time, also for histograms
    with quiet():
        ort.quantize_static(
            path,
            found,
            Recorded(captured.calibration),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_quantize=names,
            per_channel=True,
            activation_type=ort.QuantType.QInt8 if symmetric else ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, METHODS[ranges]),
            use_external_data_format=True,
            extra_options={"ActivationSymmetric": symmetric} | extra,
        )
    return found


def quantize_dynamic(path: Path, names: list[str]) -> Path:
    """Quantizes these products with ranges that are measured in every run.

    Weights are uint8, with which alone ONNX Runtime's convolutions are not several times slower:
    one scale for a convolution, one for each output channel of other products.
    """
    model, found = onnx.load(path, load_external_data=False), path.with_name("dynamic.onnx")
    weights = {weight.name for weight in model.graph.initializer}
    shapes = [told for told in model.graph.value_info if told.name not in weights]
    del model.graph.value_info[:]  # it transposes weights, but not their recorded shapes
    model.graph.value_info.extend(shapes)
    plain = path.with_name("plain.onnx")
    onnx.save(model, plain)
    with quiet():
        ort.quantize_dynamic(
            plain,
            found,
            op_types_to_quantize=["Conv", "MatMul"],
            nodes_to_quantize=names,
            per_channel=True,
            weight_type=ort.QuantType.QUInt8,
            use_external_data_format=True,
        )
    return found


def away(graph: Any, captured: Captured, options: Quantizing) -> set[str]:
    """Operators that stay in float unasked, because they lose more than they gain.

    These are all that work on the timestep alone, since they cost next to nothing and every error
    in them shifts the whole picture; and, unless asked for, those whose inputs have outliers that
    leave little of a common scale: what stands next to latents, images and conditioning, 6 dB on
    the images of the embedded student, and the shortcuts of skip connections, which no norm comes
    before, 18 dB on the outputs of its UNet.
    """
    left = _away_from(graph, {s.name for s in captured.inputs if s.role != "timestep"})
    if not options.edges:
        left.update(_edges(graph, captured))
    if not options.shortcuts:
        joined = {name for node in graph.node if node.op_type == "Concat" for name in node.output}
        left.update(n.name for n in graph.node if n.op_type == "Conv" and n.input[0] in joined)
    return left


def _edges(graph: Any, captured: Captured) -> set[str]:
    """Names of the operators next to the latents, images and conditioning that go in and out."""
    fed = {s.name for s in captured.inputs if s.role in (*PIXELS, "conditioning")}
    given = {s.name for s in captured.outputs if s.role in PIXELS}
    found: set[str] = set()
    for node in graph.node:
        if fed.intersection(node.input) and node.op_type in PRODUCTS:
            found.add(node.name)
        elif fed.intersection(node.input) and node.op_type != "Shape":
            fed.update(node.output)
    for node in reversed(graph.node):
        if given.intersection(node.output) and node.op_type in PRODUCTS:
            found.add(node.name)
        elif given.intersection(node.output):
            given.update(node.input)
    return found


def _away_from(graph: Any, inputs: set[str]) -> set[str]:
    """Names of the operators that do not depend on the values of any of these inputs."""
    reached, left = set(inputs), set()
    for node in graph.node:
        if reached.intersection(node.input) and node.op_type != "Shape":
            reached.update(node.output)
        else:
            left.add(node.name)
    return left
