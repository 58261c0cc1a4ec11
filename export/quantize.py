"""int8 for ONNX Runtime, with ranges from what was recorded in the student's own loop."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnxruntime import quantization as ort
from onnxruntime.quantization import CalibrationDataReader

from edgeflash.errors import EdgeflashError
from edgeflash.golden import Tensors

from .capture import Captured, Sample

if TYPE_CHECKING:
    from .to_onnx import OnnxTarget

METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


class Recorded(CalibrationDataReader):  # type: ignore[misc]
    """Feeds recorded calls to a calibrator, one at a time."""

    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self._left: Iterator[Sample] = iter(samples)

    def get_next(self) -> Tensors | None:
        sample = next(self._left, None)
        return sample.inputs if sample is not None else None


def quantize_static(path: Path, captured: Captured, options: OnnxTarget) -> Path:
    """Quantizes the float32 model at ``path``; the result lies beside it.

    Weights are int8 per output channel, activations uint8 or int8 with one range a tensor.
    """
    symmetric = options.activations == "int8"
    kind = ort.QuantType.QInt8 if symmetric else ort.QuantType.QUInt8
    found = path.with_name("int8.onnx")
    logging.disable(logging.WARNING)  # it asks for preparations that the graph does not need
    try:
        ort.quantize_static(
            path,
            found,
            Recorded(captured.samples),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=list(options.operators),
            nodes_to_exclude=left_alone(path, captured, options.keep),
            per_channel=True,
            activation_type=kind,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, METHODS[options.ranges]),
            use_external_data_format=True,
            extra_options={
                "ActivationSymmetric": symmetric,
                "MatMulConstBOnly": not options.attention,
            },
        )
    finally:
        logging.disable(logging.NOTSET)
    return found


def left_alone(path: Path, captured: Captured, keep: tuple[str, ...]) -> list[str]:
    """Operators that stay in float: those asked for, and all that work on the timestep alone.

    The layers of the time embedding cost next to nothing, and every error in them shifts the whole
    picture.

    Raises:
        EdgeflashError: a pattern that fits no operator.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    names = [node.name for node in graph.node]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            raise EdgeflashError(f"keep: no operator of {captured.component} is called {pattern!r}")
    asked = {name for pattern in keep for name in fnmatch.filter(names, pattern)}
    timestep = next((s.name for s in captured.inputs if s.role == "timestep"), None)
    others = {s.name for s in captured.inputs} - {timestep}
    return sorted(asked | _untouched(graph, others))


def _untouched(graph: Any, inputs: set[str]) -> set[str]:
    """Names of the operators that do not depend on any of these inputs."""
    reached, left = set(inputs), set()
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
        else:
            left.add(node.name)
    return left
