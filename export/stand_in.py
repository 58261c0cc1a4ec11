"""ONNX Runtime in the place of a GPU that is not here: what an engine's ONNX file computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import onnxruntime as ort
from pydantic import Field

from edgeflash.bundle import Component
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Array, Runtime, Session

from .onnx_graph import BF16, HALF

NARROW, WIDE = (HALF, BF16), ir.DataType.FLOAT


class StandIn(Runtime):
    """Runs ONNX files as TensorRT's networks are typed, fp8 and bfloat16 included.

    ONNX Runtime has no bfloat16 on the CPU, and computes much of float16 in float32 without
    rounding: here all sums run in float32, and every result is rounded to the type it has.
    """

    reason: str = Field("", description="why the engines cannot run here")

    @property
    def unproven(self) -> str:
        return (
            f"the TensorRT engines were not run: {self.reason}; the figures are those of the ONNX "
            "files that they are built from: run edgeflash verify on the device"
        )

    def open(self, folder: Path, component: Component) -> Session:
        """Loads the component's ONNX file.

        Raises:
            EdgeflashError: ONNX Runtime does not load it.
        """
        paths = [folder / file.path for file in component.files]
        path = next(path for path in paths if path.suffix == ".onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # it breaks on fp8
        model = ir.load(path)
        try:
            if any(value.dtype in NARROW for value in model.graph.initializers.values()):
                return _Session(_rounded(model, path, options), component)
            return _Session(_opened(path, options), component)
        except Exception as error:  # onnxruntime's exceptions share no base class
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{path}: ONNX Runtime does not load it: {said}") from None


class _Session(Session):
    def __init__(self, session: ort.InferenceSession, component: Component) -> None:
        self._session = session
        self._outputs = [spec.name for spec in component.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = self._session.run(self._outputs, dict(inputs))
        return dict(zip(self._outputs, found, strict=True))


def _opened(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _rounded(model: ir.Model, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session of such a model, from a file that lives no longer than this call."""
    round_results(model)
    with TemporaryDirectory(dir=path.parent, prefix=".", ignore_cleanup_errors=True) as scratch:
        draft = Path(scratch) / "rounded.onnx"
        ir.save(model, draft, external_data="rounded.onnx_data")
        return _opened(draft, options)


def round_results(model: ir.Model) -> None:
    """Makes narrow tensors float32 ones that hold the same numbers."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in NARROW and value.const_value is not None:
            wide = value.const_value.numpy().astype("float32")
            value.const_value, value.dtype = ir.tensor(wide, name=value.name), WIDE
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.as_int() in NARROW:
                node.attributes[name] = ir.AttrInt64(name, WIDE)
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype in NARROW:
                    widened = ir.tensor(tensor.numpy().astype("float32"))
                    node.attributes[name] = ir.AttrTensor(name, widened)
        for value in node.outputs:
            if value.dtype in NARROW:
                _round(graph, value)


def _round(graph: ir.Graph, value: ir.Value) -> None:
    """Puts a cast to its type, and one back, behind a value."""
    kind, uses, node = value.dtype, list(value.uses()), value.producer()
    assert kind is not None and node is not None
    value.dtype = WIDE
    narrow = ir.node("Cast", [value], attributes={"to": kind})
    wide = ir.node("Cast", narrow.outputs, attributes={"to": WIDE})
    graph.insert_after(node, [narrow, wide])
    for use in uses:
        use.node.replace_input_with(use.idx, wide.outputs[0])
