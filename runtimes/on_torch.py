"""PyTorch itself, running the ExportedProgram: the reference that the others are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

from pydantic import Field

from edgeflash.bundle import Component
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Array, Runtime, Session

_LOADING = Lock()  # torch.export.load keeps what it is at in a global


class TorchRuntime(Runtime):
    """Runs what `to_torch` writes: a `torch.export` program (.pt2)."""

    needs: ClassVar[tuple[str, ...]] = ("torch",)
    opens: ClassVar[tuple[str, ...]] = ("torch",)

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to run; auto: cuda where torch finds one, else cpu"
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads inside an operator; 0: torch's choice"
    )

    def open(self, folder: Path, component: Component) -> TorchSession:
        """Loads the component's program.

        Raises:
            EdgeflashError: no CUDA device where one is asked for, or the file does not load.
        """
        import torch
        from torch.export.passes import move_to_device_pass

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise EdgeflashError("device cuda: torch finds none here; use device=cpu")
        if self.threads:
            torch.set_num_threads(self.threads)
        path = folder / component.files[0].path
        try:
            with _LOADING:
                program = torch.export.load(path)
        except Exception as error:
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{path}: torch does not load it: {said}") from None
        if device != "cpu":
            program = move_to_device_pass(program, device)
        return TorchSession(program.module(), component, device)


class TorchSession(Session):
    """One program; its inputs are taken by position, in the order of the component's specs."""

    def __init__(self, module: Any, component: Component, device: str) -> None:
        self.device = device
        self._module = module
        self._inputs = [spec.name for spec in component.inputs]
        self._outputs = [spec.name for spec in component.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch
        from torch.utils._pytree import tree_leaves

        with torch.inference_mode():
            # torch warns at read-only arrays; the program writes to none of its inputs.
            given = [torch.tensor(inputs[name], device=self.device) for name in self._inputs]
            answers = tree_leaves(self._module(*given))
        values = [answer.cpu().numpy() for answer in answers]
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        del self._module
