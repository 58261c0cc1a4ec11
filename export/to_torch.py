"""The reference target: the captured program itself, as torch saves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgeflash.roles import Target

if TYPE_CHECKING:
    from .capture import Captured


class TorchTarget(Target):
    """A `torch.export` program (.pt2) of each component: what all others are held against."""

    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers")
    runtime: ClassVar[str] = "torch"

    precision: Literal["fp32"] = Field("fp32", description="of weights and sums")

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        import torch

        path = out / captured.component / "program.pt2"
        path.parent.mkdir(parents=True, exist_ok=True)
        for node in captured.program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names folders of the machine that exported it
        torch.export.save(captured.program, path)
        return [path]
