"""ONNX Runtime in the place of a GPU that is not here: what an engine's ONNX file computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort
from pydantic import Field

from edgeflash.bundle import Component
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Array, Runtime, Session
from edgeflash.rounding import FOLDER, rounded


class StandIn(Runtime):
    """Runs ONNX files as TensorRT's networks are typed, fp8 and bfloat16 included.

    All sums run in float32, and every result is rounded to the type it has: `edgeflash.rounding`.
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
        options.add_session_config_entry(FOLDER, str(path.parent))
        try:
            model = rounded(path.read_bytes())
            found = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return _Session(found, component)
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
