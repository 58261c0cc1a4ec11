"""int8 for ONNX Runtime, with ranges from what was recorded in the student's own loop."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import onnx
from onnxruntime import quantization as ort
from onnxruntime.quantization import CalibrationDataReader

from edgeflash.errors import EdgeflashError
from edgeflash.golden import Tensors

from .capture import Captured, Sample
from .quiet import quiet

PRODUCTS = ("Conv", "MatMul", "Gemm")
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


class Choice(Protocol):
    """The options of a target that say what to quantize."""

    @property
    def operators(self) -> tuple[str, ...]: ...
    @property
    def keep(self) -> tuple[str, ...]: ...
    @property
    def attention(self) -> bool: ...
    @property
    def shortcuts(self) -> bool: ...
    @property
    def edges(self) -> bool: ...
    @property
    def ranges(self) -> str: ...


class Recorded(CalibrationDataReader):  # type: ignore[misc]
    """Feeds recorded calls to a calibrator, one at a time."""

    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self._left: Iterator[Sample] = iter(samples)

    def get_next(self) -> Tensors | None:
        sample = next(self._left, None)
        return sample.inputs if sample is not None else None


def quantize_static(
    path: Path, captured: Captured, options: Choice, *, symmetric: bool, **extra: Any
) -> Path:
    """Quantizes the float32 model at ``path``; the result lies beside it.

    Weights are int8 per output channel, activations uint8, or int8 where ``symmetric``, with one
    range a tensor. ``extra``: more of ONNX Runtime's extra options.
    """
    kind = ort.QuantType.QInt8 if symmetric else ort.QuantType.QUInt8
    found = path.with_name("int8.onnx")
    with quiet():
        ort.quantize_static(
            path,
            found,
            Recorded(captured.samples),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=list(options.operators),
            nodes_to_exclude=left_alone(path, captured, options),
            per_channel=True,
            activation_type=kind,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, METHODS[options.ranges]),
            use_external_data_format=True,
            extra_options={"ActivationSymmetric": symmetric} | extra,
        )
    return found


def left_alone(path: Path, captured: Captured, options: Choice) -> list[str]:
    """Operators that stay in float: those asked for, and those that lose more than they gain.

    These are all that work on the timestep alone, since they cost next to nothing and every error
    in them shifts the whole picture; and, unless asked for, products of two activations, and those
    whose inputs have outliers that leave little of a common scale: what stands next to latents,
    images and conditioning, 6 dB on the images of the embedded student, and the shortcuts of
    skip connections, which no norm comes before, 18 dB on the outputs of its UNet.

    Raises:
        EdgeflashError: a pattern that fits no operator.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    names = [node.name for node in graph.node]
    left = _away_from(graph, {s.name for s in captured.inputs if s.role != "timestep"})
    for pattern in options.keep:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise EdgeflashError(f"keep: no operator of {captured.component} is called {pattern!r}")
        left.update(found)
    if not options.edges:
        left.update(_edges(graph, captured))
    if not options.shortcuts:
        joined = {name for node in graph.node if node.op_type == "Concat" for name in node.output}
        left.update(n.name for n in graph.node if n.op_type == "Conv" and n.input[0] in joined)
    if not options.attention:
        weights = {weight.name for weight in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMul"]
        left.update(node.name for node in products if not weights.intersection(node.input))
    return sorted(left)


def _edges(graph: Any, captured: Captured) -> set[str]:
    """Names of the operators next to the latents, images and conditioning that go in and out."""
    pixels = ("sample", "latent", "image", "prediction")
    fed = {s.name for s in captured.inputs if s.role in (*pixels, "conditioning")}
    given = {s.name for s in captured.outputs if s.role in pixels}
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
