"""ONNX, laid out as optimum's ONNX Runtime pipelines read it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from edgeflash.bundle import Bundle, Component
from edgeflash.student import INDEX, Student

from .ecosystem import FOLDED, denoiser_input, write_configs, write_json
from .plan import Kind, Quantizing, Ranges
from .which import FLOATS

if TYPE_CHECKING:
    from .capture import Captured

MIB = 2**20


class OnnxTarget(Quantizing):
    """One ONNX file a component, opset 20: fp32, fp16, or as a plan of quantization says.

    int8: QDQ with recorded ranges. int8-dynamic: ranges are measured in every run. int8-weights:
    smaller files and next to no error, but no speed: on the CPU, ONNX Runtime makes floats of them
    when it loads. int4-weights: 4 bits for the weights of linear layers, by ``MatMulNBits``, which
    ONNX Runtime and OpenVINO know; there is none for convolutions, so they stay as they are.

    Inputs and outputs are float32 in every precision. Weights above ``external_mib`` lie beside the
    model in `model.onnx_data`, from where ONNX Runtime maps them instead of reading them. Stock
    optimum pipelines open the bundle; they want the timestep as an input, also of one-step students
    (``--keep-timestep``).

    With ``fused=1`` there is also `pipeline.onnx`, all that an app needs which wants one call:
    token ids [1, s] and noise [k, 1, c, h, w] in, a uint8 picture [1, H, W, 3] out, in the default
    steps (`export/fuse.py`). An app that takes this file can leave the components out.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
    )
    runtime: ClassVar[str] = "onnx"

    precision: Literal["fp32", "fp16", "int8", "int8-dynamic", "int8-weights", "int4-weights"] = (
        Field("fp32", description="of weights and sums")
    )
    external_mib: float = Field(
        128, ge=0, le=1536, description="weights larger than this go to a file of their own, MiB"
    )
    activations: Literal["uint8", "int8"] = Field(
        "uint8", description="int8: type of activations; int8 is symmetric, as TensorRT wants it"
    )
    ranges: Ranges = "minmax"

    fused: int = Field(
        0, ge=0, le=16, description="pictures of a call of one graph of all steps; 0: no such graph"
    )

    def families(self) -> tuple[str, ...]:
        return ("sd",) if self.fused else ()  # the fused graph has one text encoder

    def refuse_caching(self) -> str:
        return "puts one graph of the denoiser into fused=1 so far" if self.fused else ""

    def refuse_conditions(self) -> str:
        return "takes no pictures into fused=1 so far" if self.fused else ""

    def shaped_by(self, component: str) -> dict[str, Any]:
        return {k: v for k, v in super().shaped_by(component).items() if k != "fused"}

    @property
    def honours(self) -> tuple[str, ...]:
        return ("int8", "int8-dynamic", "int8-weights", "int4-weights")

    def can(self, kind: Kind, rank: int) -> frozenset[str]:
        from .quantize import TAKES, operator_of

        return frozenset(TAKES[operator_of(kind, rank)])

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        from . import onnx_graph
        from .ranges import halve

        path = out / captured.component / "model.onnx"
        external_bytes = int(self.external_mib * MIB)
        precision = self.precision_of(captured.component)
        model = onnx_graph.translate(captured)
        if self.halves(captured.component):
            halve(model, captured, self.in_float32(captured.component))
        if precision in FLOATS:
            return onnx_graph.save(model, path, external_bytes)
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{precision}-") as scratch:
            whole = onnx_graph.save(model, Path(scratch) / "float.onnx", external_bytes)[0]
            found = self._quantized(whole, captured, out)
            return onnx_graph.save(onnx_graph.load(found), path, external_bytes)

    def _quantized(self, whole: Path, captured: Captured, out: Path) -> Path:
        from .quantize import TAKES, decide, quantize

        words = decide(whole, captured, self, TAKES, out)
        return quantize(whole, captured, words, self.ranges, symmetric=self.activations == "int8")

    def fuse(self, bundle: Bundle) -> Component | None:
        from .fuse import fuse

        if not self.fused:
            return None
        external_bytes = int(self.external_mib * MIB)
        return fuse(bundle, self.prover(), self.fused, self.precision, external_bytes)

    def diverged(
        self, component: str, capture: Callable[[], Captured], out: Path, floor_db: float
    ) -> str:
        """Lowers the component once more in float32, and compares tensor by tensor."""
        from .bisect import lowered_again

        suspect = out / component / "model.onnx"
        return lowered_again(self, component, capture, suspect, floor_db)

    def furnish(self, student: Student, components: Sequence[Component], out: Path) -> str:
        """Configs, scheduler and index where optimum looks for them."""
        index = write_configs(student, components, out)
        del index["vae"]
        for name in student.family.components(encoder=True):
            if (out / name).is_dir():
                index[name] = ["diffusers", "OnnxRuntimeModel"]
        write_json(out / INDEX, index)
        if denoiser_input(components, "timestep"):
            return ""
        return f"optimum's pipelines feed a timestep, and {FOLDED}"
