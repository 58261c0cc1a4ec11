"""ONNX, laid out as optimum's ONNX Runtime pipelines read it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from edgeflash.roles import Target
from edgeflash.student import INDEX, Student
from edgeflash.verify import FLOORS

if TYPE_CHECKING:
    from .capture import Captured

MIB = 2**20


class OnnxTarget(Target):
    """One ONNX file a component, opset 20: fp32, fp16, or int8 with static QDQ quantization.

    Inputs and outputs are float32 in every precision. Weights above ``external_mib`` lie beside the
    model in `model.onnx_data`, from where ONNX Runtime maps them instead of reading them. Stock
    optimum pipelines open the bundle; they want the timestep as an input, also of one-step students
    (``--keep-timestep``).
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
    edges: bool = Field(
        False, description="int8: also quantize what stands next to latents, images, conditioning"
    )
    ranges: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax", description="int8: how recorded values become ranges"
    )

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
            found = quantize_static(whole, captured, self)
            return onnx_graph.save(onnx_graph.load(found), path, external_bytes)

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

    def furnish(self, student: Student, out: Path) -> None:
        """Configs, scheduler and index where optimum looks for them."""
        index = {key: value for key, value in student.index.items() if key != "vae"}
        for key, value in index.items():
            if isinstance(value, list) and key not in student.family.folders:
                index[key] = [None, None]  # a safety checker and the like stay behind
        for name in ("vae_decoder", "vae_encoder"):
            if (out / name).is_dir():
                _write(out / name / "config.json", _as_kl(student.config("vae")))
                index[name] = ["diffusers", "OnnxRuntimeModel"]
        for name in ("text_encoder", "unet"):
            _write(out / name / "config.json", student.config(name))
            index[name] = ["diffusers", "OnnxRuntimeModel"]
        _write(out / INDEX, index)
        shutil.copytree(student.folder / "scheduler", out / "scheduler")


def _as_kl(config: dict[str, Any]) -> dict[str, Any]:
    """A tiny autoencoder's config as that of an `AutoencoderKL`, which is all that optimum knows.

    The exported decoder takes latent / scaling_factor like the other, and its factor is 1.
    """
    if config["_class_name"] != "AutoencoderTiny":
        return config
    widths = config["decoder_block_out_channels"]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": config.get("_diffusers_version", "0.35.0"),
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": config.get("scaling_factor", 1.0),
        "shift_factor": config.get("shift_factor", 0.0),
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    """As JSON, without diffusers' note of where the model was loaded from."""
    told = {key: value for key, value in data.items() if key != "_name_or_path"}
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
