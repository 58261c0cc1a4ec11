"""Which operator of a quantized ONNX model goes astray first: taps on every tensor of both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from edgeflash.bundle import Bundle
from edgeflash.calls import first_call
from edgeflash.errors import EdgeflashError
from edgeflash.floors import FLOORS
from edgeflash.golden import Array, Tensors
from edgeflash.parity import psnr_db

TAPS = 48  # tensors held at a time
LARGEST_HALF = 65504.0
NEVER = 1e30
PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Divergence:
    """An operator whose output is off, while all before it are not.

    Attributes:
        operator: its name in the model.
        kind: its ONNX type.
        psnr_db: of its output.
        low: smallest value that the reference has there.
        high: largest.
        product: name of the product that its values come from, or its own; "" if there is none.
    """

    operator: str
    kind: str
    psnr_db: float
    low: float
    high: float
    product: str

    def remedy(self, precision: str) -> str:
        """What to try, in a bundle of this precision."""
        if precision == "fp32":
            return "no rounding explains that: export it again"
        if precision in ("fp16", "bf16"):
            if max(-self.low, self.high) > LARGEST_HALF and precision == "fp16":
                return "its values are beyond float16's 65,504: export in bf16 or fp32"
            return "its sums lose too much in 16 bits: export in fp32"
        if self.product:
            return f"leave it alone: --set 'keep=[\"{self.product}\"]'"
        return "no product is to blame: export in fp16 or fp32"

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.operator} ({self.psnr_db:.1f} dB, "
            f"values {self.low:.4g} to {self.high:.4g})"
        )


def first_divergence(
    reference: Path, suspect: Path, inputs: Tensors, floor_db: float
) -> Divergence | None:
    """The first operator of ``suspect``, in its own order, whose output falls below the floor.

    The two must be the same graph at different precisions, so that tensors share their names; what
    only one has (the QuantizeLinear pairs) is passed over. None: all tensors reach the floor.
    """
    makers = _makers(suspect)
    shared = [name for name in makers if name in _makers(reference)]
    for start in range(0, len(shared), TAPS):
        chunk = shared[start : start + TAPS]
        wanted = _tapped(reference, chunk, inputs)
        found = _tapped(suspect, chunk, inputs)
        for name, expected, got in zip(chunk, wanted, found, strict=True):
            if expected.dtype.kind != "f" or expected.size == 0:
                continue
            expected, got = _without_never(expected, got)
            value = psnr_db(expected, got)
            if value < floor_db:
                node, low, high = makers[name], float(expected.min()), float(expected.max())
                product = _product(node, makers)
                return Divergence(node.name, node.op_type, value, low, high, product)
    return None


def _without_never(expected: Array, got: Array) -> tuple[Array, Array]:
    """What masks put for minus infinity, in float32 and in halves, is the same and no overflow."""
    never = (expected < -NEVER) & (got <= -LARGEST_HALF)
    return np.where(never, 0, expected), np.where(never, 0, got)


def _product(node: Any, makers: dict[str, Any]) -> str:
    """Name of the nearest product among those that a node's values come from, itself included."""
    seen, rank = {node.name}, [node]
    while rank:
        for each in rank:
            if each.op_type in PRODUCTS:
                return str(each.name)
        before = [makers[name] for each in rank for name in each.input if name in makers]
        rank = [each for each in before if each.name not in seen]
        seen.update(each.name for each in rank)
    return ""


def check_pair(bundle: Bundle, reference: Bundle) -> None:
    """Asks before the work whether two bundles can be held against each other.

    Raises:
        EdgeflashError: another target, bundles of different students, or a component that the
            reference lacks.
    """
    for each in (bundle, reference):
        for component in each.manifest.components:
            if component.target != "onnx":
                told = f"only ONNX bundles can be bisected, not {component.target}"
                raise EdgeflashError(f"{each.folder}: {told}")
    ours, theirs = bundle.manifest.lineage, reference.manifest.lineage
    if (ours.student_sha256, ours.loras) != (theirs.student_sha256, theirs.loras):
        raise EdgeflashError(f"{reference.folder}: was made from another student")
    for component in bundle.manifest.components:
        reference.component(component.name)


def bisect_bundles(
    bundle: Bundle, reference: Bundle, name: str, floor_db: float
) -> Divergence | None:
    """`first_divergence` of a component of two ONNX bundles of one student.

    Raises:
        EdgeflashError: see `check_pair`.
    """
    check_pair(bundle, reference)
    suspect, whole = bundle.component(name), reference.component(name)
    paths = (reference.folder / whole.files[0].path, bundle.folder / suspect.files[0].path)
    return first_divergence(*paths, first_call(bundle, suspect), floor_db)


def told_by_component(bundle: Bundle, reference: Bundle) -> list[str]:
    """A line a component: what goes astray first, below its precision's floor, and what to try."""
    lines = []
    for component in bundle.manifest.components:
        floor_db = FLOORS[component.precision]["psnr_db"]
        found = bisect_bundles(bundle, reference, component.name, floor_db)
        told = f"every tensor reaches {floor_db:g} dB"
        if found:
            told = f"first below {floor_db:g} dB: {found}; {found.remedy(component.precision)}"
        lines.append(f"{component.name}: {told}")
    return lines


def _makers(path: Path) -> dict[str, Any]:
    """Tensor name -> the node that makes it, in the order they run."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return {name: node for node in graph.node for name in node.output if name}


def _tapped(path: Path, names: list[str], inputs: Tensors) -> Iterator[Array]:
    """Runs a model for some of its inner tensors, unoptimized so that they exist."""
    model = onnx.load(str(path), load_external_data=False)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        onnx.save(model, file.name)
        session = ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
        answers = session.run(names, inputs)
    for answer in answers:
        yield answer.astype(np.float32) if answer.dtype == np.float16 else answer
