"""OpenVINO, on Intel's CPUs, GPUs and NPUs, and on other x86 and ARM CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from edgeflash.bundle import Component, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.openvino_core import core
from edgeflash.roles import Array, Runtime, Session


class OpenVinoRuntime(Runtime):
    """Runs what `to_openvino` and `to_onnx` write."""

    needs: ClassVar[tuple[str, ...]] = ("openvino",)
    opens: ClassVar[tuple[str, ...]] = ("openvino", "onnx")

    device: Literal["cpu", "gpu", "npu", "auto"] = Field(
        "cpu", description="where to run; auto: as OpenVINO chooses"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: OpenVINO's choice")
    inference_precision: Literal["auto", "f32", "f16", "bf16"] = Field(
        "auto", description="of sums; auto: f32 on cpu, as in torch, else the device's own"
    )
    static: bool = Field(
        False, description="compile for one row, and run batches row by row; npu always does"
    )
    cache_dir: str = Field(
        "", description="folder for compiled models, which load faster again; empty: none"
    )

    def open(self, folder: Path, component: Component) -> OpenVinoSession:
        """Compiles the component's model file for the device.

        Raises:
            EdgeflashError: no such device here, or the file does not load.
        """
        self._check_device()
        path = folder / component.files[0].path
        by_row = self.static or self.device == "npu"
        try:
            model = self._compiled(str(path), component if by_row else None)
        except Exception as error:  # of several kinds, by what went wrong
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{path}: OpenVINO does not load it: {said}") from None
        return OpenVinoSession(model, component, self.device, by_row=by_row)

    def _check_device(self) -> None:
        here = [name.partition(".")[0].lower() for name in core().available_devices]
        if self.device not in (*here, "auto"):
            have = ", ".join(dict.fromkeys(here))
            raise EdgeflashError(
                f"device {self.device}: OpenVINO finds {have} here: install its driver, or use "
                "device=cpu"
            )

    def _compiled(self, path: str, one_row: Component | None) -> Any:
        """By its path where possible: what lies in the cache is then not even read."""
        device, properties = self.device.upper(), self._properties()
        if one_row is None:
            return core().compile_model(path, device, properties)
        model = core().read_model(path)
        model.reshape({spec.name: _for_one_row(spec) for spec in _by_row(one_row)})
        return core().compile_model(model, device, properties)

    def _properties(self) -> dict[str, Any]:
        precision = self.inference_precision
        if precision == "auto" and self.device == "cpu":
            precision = "f32"  # its own choice would be bf16 where the CPU has it
        properties: dict[str, Any] = {}
        if precision != "auto":
            properties["INFERENCE_PRECISION_HINT"] = precision
        if self.threads:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        if self.cache_dir:
            properties["CACHE_DIR"] = str(Path(self.cache_dir).expanduser())
        return properties


def _by_row(component: Component) -> list[TensorSpec]:
    """The inputs that have a row for each picture."""
    return [spec for spec in component.inputs if spec.shape and isinstance(spec.shape[0], str)]


def _for_one_row(spec: TensorSpec) -> list[int]:
    """The shape for one picture; -1 stands for other sides that are free."""
    return [1, *(-1 if isinstance(side, str) else side for side in spec.shape[1:])]


class OpenVinoSession(Session):
    """One compiled model; inputs are handed over by address, outputs copied."""

    def __init__(self, model: Any, component: Component, device: str, *, by_row: bool) -> None:
        found = {name for port in (*model.inputs, *model.outputs) for name in port.get_names()}
        for spec in (*component.inputs, *component.outputs):
            if spec.name not in found:
                raise EdgeflashError(
                    f"components.{component.name}: the model has no tensor {spec.name!r} "
                    f"(has: {', '.join(sorted(found))}); export it again"
                )
        self.device = device
        if device == "auto":
            self.device = ", ".join(model.get_property("EXECUTION_DEVICES")).lower()
        self._name = component.name
        self._model = model
        self._outputs = [spec.name for spec in component.outputs]
        # Names of the inputs with a row for each picture, where these come one by one.
        self._rows = [spec.name for spec in _by_row(component)] if by_row else []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self._run_by_row(inputs) if self._rows else self._run(inputs)
        except Exception as error:  # of several kinds, by what went wrong
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{self._name}: OpenVINO failed in a run: {said}") from None

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = self._model(dict(inputs))
        return {name: found[name] for name in self._outputs}

    def _run_by_row(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = range(len(inputs[self._rows[0]]))
        answers = [
            self._run(dict(inputs) | {name: inputs[name][i : i + 1] for name in self._rows})
            for i in rows
        ]
        return {name: np.concatenate([a[name] for a in answers]) for name in self._outputs}

    def close(self) -> None:
        del self._model
