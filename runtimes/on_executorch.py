"""ExecuTorch, by its Python package, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from edgeflash.bundle import Component
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Array, Runtime, Session


class ExecuTorchRuntime(Runtime):
    """Runs what `to_executorch` writes. Its Python package takes and gives torch's tensors."""

    needs: ClassVar[tuple[str, ...]] = ("executorch", "torch")
    opens: ClassVar[tuple[str, ...]] = ("executorch",)

    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of the process; 0: ExecuTorch's choice"
    )

    def open(self, folder: Path, component: Component) -> ExecuTorchSession:
        """Loads the component's program.

        Raises:
            EdgeflashError: the file does not load.
        """
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Vendor

        if self.threads:
            portable_lib._unsafe_reset_threadpool(self.threads)  # unsafe while a program runs
        path = folder / component.files[0].path
        try:
            program = Vendor.get().load_program(path)
            return ExecuTorchSession(program, component)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{path}: ExecuTorch does not load it: {said}") from None


class ExecuTorchSession(Session):
    """One program; its inputs are taken by position, in the order of the component's specs."""

    def __init__(self, program: Any, component: Component) -> None:
        self._program = program  # a method does not hold it
        self._method = program.load_method("forward")
        self._name = component.name
        self._inputs = [spec.name for spec in component.inputs]
        self._outputs = [spec.name for spec in component.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        # torch warns at read-only arrays; the program writes to none of its inputs.
        given = [torch.tensor(inputs[name]) for name in self._inputs]
        try:
            answers = self._method.execute(given)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{self._name}: ExecuTorch failed in a run: {said}") from None
        return {name: a.numpy() for name, a in zip(self._outputs, answers, strict=True)}

    def close(self) -> None:
        del self._method, self._program
