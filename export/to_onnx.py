"""ONNX, laid out as optimum's ONNX Runtime pipelines read it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgeflash.bundle import Bundle, Component
from edgeflash.roles import Target
from edgeflash.student import INDEX, Student
from edgeflash.verify import FLOORS

from .ecosystem import write_configs, write_json

if TYPE_CHECKING:
    from .capture import Captured

MIB = 2**20


class OnnxTarget(Target):
    """One ONNX file a component, opset 20: fp32, fp16, or int8 with static QDQ quantization.

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

    precision: Literal["fp32", "fp16", "int8"] = Field("fp32", description="of weights and sums")
    external_mib: float = Field(
        128, ge=0, le=1536, description="weights larger than this go to a file of their own, MiB"
    )
    quantized: tuple[str, ...] = Field(
        ("unet", "vae_decoder", "vae_encoder"), description="components that int8 applies to"
    )
    rest: Literal["fp32", "fp16"] = Field(
        "fp16", description="int8: precision of the components that are not quantized"
    )
    operators: tuple[str, ...] = Field(
        ("Conv", "MatMul", "Gemm"), description="int8: kinds of operators to quantize"
    )
    keep: tuple[str, ...] = Field(
        (), description="int8: operators to leave alone, by name; * stands for anything"
    )
    activations: Literal["uint8", "int8"] = Field(
        "uint8", description="int8: type of activations; int8 is symmetric, as TensorRT wants it"
    )
    attention: bool = Field(
        False, description="int8: also quantize products of two activations, as in attention"
    )
    shortcuts: bool = Field(
        False, description="int8: also quantize convolutions of skip connections as they come"
    )
    edges: bool = Field(
        False, description="int8: also quantize what stands next to latents, images, conditioning"
    )
    ranges: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax", description="int8: how recorded values become ranges"
    )

    fused: int = Field(
        0, ge=0, le=16, description="pictures of a call of one graph of all steps; 0: no such graph"
    )

    def families(self) -> tuple[str, ...]:
        return ("sd",) if self.fused else ()  # the fused graph has one text encoder

    def precision_of(self, component: str) -> str:
        skipped = self.precision == "int8" and component not in self.quantized
        return self.rest if skipped else self.precision

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        from . import onnx_graph
        from .quantize import quantize_static

        path = out / captured.component / "model.onnx"
        external_bytes = int(self.external_mib * MIB)
        precision = self.precision_of(captured.component)
        model = onnx_graph.translate(captured)
        if precision == "fp16":
            onnx_graph.to_half(model)
        if precision != "int8":
            return onnx_graph.save(model, path, external_bytes)
        with tempfile.TemporaryDirectory(dir=out, prefix=".int8-") as scratch:
            whole = onnx_graph.save(model, Path(scratch) / "float.onnx", external_bytes)[0]
            symmetric = self.activations == "int8"
            found = quantize_static(whole, captured, self, symmetric=symmetric)
            return onnx_graph.save(onnx_graph.load(found), path, external_bytes)

    def fuse(self, bundle: Bundle) -> Component | None:
        from .fuse import fuse

        if not self.fused:
            return None
        external_bytes = int(self.external_mib * MIB)
        return fuse(bundle, self.prover(), self.fused, self.precision, external_bytes)

    def diverged(self, captured: Captured, out: Path) -> str:
        """Lowers the component once more in float32, and compares tensor by tensor."""
        from .bisect import first_divergence

        precision = self.precision_of(captured.component)
        if precision == "fp32":
            return ""
        with tempfile.TemporaryDirectory(dir=out, prefix=".fp32-") as scratch:
            whole = self.model_copy(update={"precision": "fp32"}).lower(captured, Path(scratch))
            found = out / captured.component / "model.onnx"
            floor_db = FLOORS[precision]["psnr_db"]
            divergence = first_divergence(whole[0], found, captured.samples[0].inputs, floor_db)
        return str(divergence or "")

    def furnish(self, student: Student, out: Path) -> str:
        """Configs, scheduler and index where optimum looks for them."""
        index = write_configs(student, out)
        del index["vae"]
        for name in student.family.components(encoder=True):
            if (out / name).is_dir():
                index[name] = ["diffusers", "OnnxRuntimeModel"]
        write_json(out / INDEX, index)
        return ""
