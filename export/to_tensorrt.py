"""TensorRT: engines ahead of time for RTX GPUs, or ONNX files that become engines later."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from edgeflash.bundle import EACH_STEP, Component, Engine
from edgeflash.engine import AHEAD, ENGINE, build, capability, load_vendor
from edgeflash.errors import EdgeflashError
from edgeflash.gpu import find_gpu
from edgeflash.roles import Runtime

from .plan import Kind, Quantizing, Ranges

if TYPE_CHECKING:
    from .capture import Captured

ONNX_BYTES = 2**30  # of weights within the ONNX file; protobuf holds 2 GiB
QUANTIZED = ("int8", "fp8")
USUAL = ("8.0", "8.6", "8.9", "12.0")
LEAST = {"fp32": "8.0", "bf16": "8.0", "fp8": "8.9"}  # compute capability that has the type's sums


def _listed(value: Any) -> Any:
    """``8.9``, ``"8.6,8.9"`` or a list of them, as texts."""
    if value is None:
        return None
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(map(str, value if isinstance(value, list | tuple) else [value]))


class TensorRtTarget(Quantizing):
    """Strongly typed networks in fp32, fp16, bf16, int8 or fp8, by symmetric QDQ.

    With ``vendor=tensorrt_rtx`` the bundle holds engines, built here for the compute capabilities
    named and this version of the package alone; no GPU is needed for that. With ``tensorrt``, or no
    compute capability, engines are built where the bundle runs: by ``edgeflash build``, or at first
    load. The ONNX files that they are built from ship in both cases.

    int8 and fp8 apply to UNet, ControlNet, decoder and encoder, or to what ``quantized`` and
    ``plan`` say; with ``tensorrt_rtx`` to no Gemm, and fp8 to products in the first two alone, no
    convolution.

    Where no GPU is here to run the engines, the ladder runs on those ONNX files instead: the
    manifest says so, and ``edgeflash verify`` on the device proves the engines.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
    )
    runtime: ClassVar[str] = "tensorrt"

    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = Field(
        "fp32", description="of weights and sums"
    )
    vendor: Literal["tensorrt_rtx", "tensorrt"] = Field(
        "tensorrt_rtx", description="package that builds and runs the engines"
    )
    compute_capabilities: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        description="tensorrt_rtx: GPUs to build for, as in 8.6,8.9; empty: build where it runs; "
        f"default: those of {', '.join(USUAL)} that have the precision",
    )
    rows: int = Field(1, ge=1, le=32, description="pictures of a call that engines are tuned for")
    most_rows: int = Field(
        0, ge=0, le=32, description="leave the pictures of a call free up to this; 0: fixed"
    )
    rest: Literal["fp32", "fp16", "bf16"] = Field(  # type: ignore[assignment]
        "fp16", description="int8, fp8: precision of all that is not quantized"
    )
    ranges: Ranges = "minmax"
    tf32: bool = Field(False, description="fp32: products of numbers rounded to 10 bits; faster")
    refit: bool = Field(
        False, description="engines whose weights can be replaced, by a LoRA's say; needs the GPU"
    )
    weight_streaming: bool = Field(
        False, description="engines that can keep part of their weights in the host's memory"
    )
    version_compatible: bool = Field(
        False, description="tensorrt: engines that later versions of it open"
    )
    hardware: Literal["this", "same_capability", "ampere_plus"] = Field(
        "this", description="tensorrt: GPUs, besides the one that builds them, that engines run on"
    )
    optimization_level: int | None = Field(
        None, ge=0, le=5, description="tensorrt: time to build for speed; default: the vendor's"
    )

    @model_validator(mode="after")
    def _on_offer(self) -> Self:
        """What one of the packages lacks."""
        if self.most_rows and self.most_rows < self.rows:
            raise ValueError(f"most_rows {self.most_rows} is less than rows {self.rows}")
        if self.vendor == AHEAD and self.refit and self.compute_capabilities:
            raise ValueError(
                "refit: tensorrt_rtx builds such engines on the GPU they run on alone, so leave "
                "compute_capabilities out"
            )
        if self.vendor != AHEAD and self.compute_capabilities:
            raise ValueError(
                f"compute_capabilities: {self.vendor} builds for the GPU it runs on; tensorrt_rtx "
                "builds ahead"
            )
        only_plain = {
            "version_compatible": self.version_compatible,
            "hardware": self.hardware != "this",
            "optimization_level": self.optimization_level is not None,
        }
        if self.vendor == AHEAD and any(only_plain.values()):
            names = ", ".join(name for name, asked in only_plain.items() if asked)
            raise ValueError(f"{names}: not in tensorrt_rtx, only with vendor=tensorrt")
        return self

    @property
    def built_for(self) -> tuple[str, ...]:
        """Compute capabilities that engines are built for here; none: they are built elsewhere."""
        if self.vendor != AHEAD or self.refit:
            return ()
        if self.compute_capabilities is None:
            return tuple(name for name in USUAL if not self._lacking(name))
        return self.compute_capabilities

    def _lacking(self, name: str) -> str:
        """A precision in use that a compute capability lacks; "" for none."""
        used = (self.precision, *([self.rest] if self.precision in QUANTIZED else []))
        lacking = [kind for kind in used if _number(name) < _number(LEAST.get(kind, "0"))]
        return lacking[0] if lacking else ""

    def check(self) -> None:
        """Raises for a package that is missing, and for GPUs that cannot run what is asked."""
        if not self.built_for:
            return
        trt = load_vendor(self.vendor)
        for name in self.built_for:
            capability(trt, self.vendor, name)
            if precision := self._lacking(name):
                raise EdgeflashError(
                    f"compute_capabilities: {name} has no {precision} in {self.vendor}, which "
                    f"starts at {LEAST[precision]}: choose other GPUs, or another precision"
                )

    @property
    def honours(self) -> tuple[str, ...]:
        return (self.precision,)

    def halves(self, component: str) -> bool:
        """Also of what int8 and fp8 leave alone in a component that they apply to."""
        beside = self.precision in QUANTIZED and bool(self.words_in(component))
        return self.rest != "fp32" if beside else super().halves(component)

    def can(self, kind: Kind, rank: int) -> frozenset[str]:
        from .quantize import operator_of

        return frozenset() if operator_of(kind, rank) in self._unfit else super().can(kind, rank)

    def usual(self) -> tuple[str, ...]:
        return EACH_STEP if self._only_products else super().usual()

    def engine_of(self, component: str) -> Engine:
        most = self.most_rows or self.rows
        rows = (1 if self.most_rows else self.rows, self.rows, most)
        shared = set(Engine.model_fields) & set(type(self).model_fields) - {"rows"}
        made: dict[str, Any] = {}
        if self.built_for:
            version = load_vendor(self.vendor).__version__
            made = {"built_with": version, "built_for": self.built_for}
        return Engine(rows=rows, **{name: getattr(self, name) for name in shared}, **made)

    def shaped_by(self, component: str) -> dict[str, Any]:
        engine = self.engine_of(component).model_dump(mode="json")  # GPUs, and the vendor's version
        return super().shaped_by(component) | {"engine": engine}

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        files = self._write_onnx(captured, out / captured.component / "model.onnx")
        if not self.built_for:
            return files
        component = Component(
            name=captured.component,
            target="tensorrt",
            precision=self.precision_of(captured.component),
            files=(),
            inputs=captured.inputs,
            outputs=captured.outputs,
        )
        engine = self.engine_of(captured.component)
        path = files[0].with_suffix(ENGINE)
        path.write_bytes(build(files[0], component, engine, self.built_for))
        return [path, *files]

    def _write_onnx(self, captured: Captured, path: Path) -> list[Path]:
        """The typed network that engines are built from."""
        from . import onnx_graph
        from .quantize import PRODUCTS, decide, named, quantize_static
        from .quantize_symmetric import keep_positive, only_in_front, to_fp8
        from .ranges import halve

        kinds = {"fp16": onnx_graph.HALF, "bf16": onnx_graph.BF16}
        precision, bundle = self.precision_of(captured.component), path.parents[1]
        model = onnx_graph.translate(captured)
        if precision not in QUANTIZED:
            if precision in kinds:
                halve(model, captured, self.in_float32(captured.component), kinds[precision])
            return onnx_graph.save(model, path, ONNX_BYTES)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{precision}-") as scratch:
            whole = onnx_graph.save(model, Path(scratch) / "float.onnx", ONNX_BYTES)[0]
            left = [kind for kind in PRODUCTS if kind not in self._unfit]
            words = decide(whole, captured, self, dict.fromkeys(left, (precision,)), bundle)
            found = quantize_static(
                whole,
                captured,
                named(words, precision),
                self.ranges,
                symmetric=True,
                QuantizeBias=False,  # TensorRT takes no int32
                OpTypesToExcludeOutputQuantization=left,
            )
            model = onnx_graph.load(found)
            only_in_front(model, left)
            if precision == "fp8":
                to_fp8(model, onnx_graph.load(whole))
            else:
                keep_positive(model)
            if self.rest in kinds:
                onnx_graph.to_half(model, kinds[self.rest])
            return onnx_graph.save(model, path, ONNX_BYTES)

    @property
    def _unfit(self) -> tuple[str, ...]:
        """Operators that stay as they are, whatever is asked.

        The builder of tensorrt_rtx 1.7 fails on quantized Gemms, which take one row here: the
        embeddings of time and prompt, next to no work.
        """
        if self.vendor != AHEAD:
            return ()
        return ("Gemm", "Conv") if self._only_products else ("Gemm",)

    @property
    def _only_products(self) -> bool:
        """Whether convolutions stay as they are: tensorrt_rtx documents fp8 for products alone."""
        return (self.precision, self.vendor) == ("fp8", AHEAD)

    def prover(self) -> Runtime:
        """TensorRT itself where its GPU is here, else ONNX Runtime on the ONNX files."""
        from .stand_in import StandIn

        try:
            gpu = find_gpu()
            load_vendor(self.vendor)
        except EdgeflashError as error:
            return StandIn(reason=str(error))
        if self.built_for and gpu.capability not in self.built_for:
            return StandIn(reason=f"{gpu} is none that they are for")
        return super().prover()

    def diverged(
        self, component: str, capture: Callable[[], Captured], out: Path, floor_db: float
    ) -> str:
        """Lowers the component once more in float32, and compares tensor by tensor."""
        from .bisect import lowered_again

        suspect = out / component / "model.onnx"

        def lower(plain: Any, captured: Captured, home: Path) -> Path:
            found: Path = plain._write_onnx(captured, home / "model.onnx")[0]
            return found

        return lowered_again(self, component, capture, suspect, floor_db, lower)


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
