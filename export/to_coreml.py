"""Core ML programs, named and shaped as Apple's Swift package `StableDiffusion` reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgeflash import control
from edgeflash.bundle import EACH_STEP, Bundle, Component, Latent, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.parity import psnr_db
from edgeflash.roles import Array, Target
from edgeflash.student import Student, folder_sha256

if TYPE_CHECKING:
    from .capture import Captured, Network, Sample
    from .divergence import Divergence

MIB = 2**20
COMPARED = 2**18  # numbers of a tensor, evenly spread: all tensors of a network are in memory
PACKAGES = {
    "text_encoder": "TextEncoder",
    "unet": "Unet",
    "controlnet": "ControlNet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
STEERED = "ControlledUnet"  # a UNet that takes a ControlNet's residuals
INPUTS = {"latent": "z", "image": "x"}  # role -> Apple's name; others keep theirs
FED = {  # role -> the component that takes it; others: unet
    "tokens": "text_encoder",
    control.PICTURE: "controlnet",
    "latent": "vae_decoder",
    "image": "vae_encoder",
}
Part = Literal["text_encoder", "unet", "controlnet", "vae_decoder", "vae_encoder"]
Precision = Literal["fp32", "fp16", "int8", "w8a8", "lut8", "lut6", "lut4", "lut3", "lut2", "lut1"]


class CoreMlTarget(Target):
    """One mlprogram (`.mlpackage`) a component, and the folder `Resources` for Apple's package.

    fp32; fp16; int8: linear weights, one scale a channel; lut8 to lut1: palettes of 2^bits values;
    w8a8: int8 weights and activations. All but fp32 compute in float16, angles of the timestep
    excepted. On a Mac with Xcode `Resources` also gets the compiled models.

    One picture a call; of UNet and ControlNet ``rows``. Latents are scaled with 0.18215 whatever
    the student says, because Apple's runtime does so. It feeds a timestep, so one-step students
    want ``--keep-timestep`` there.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "torch",
        "diffusers",
        "transformers",
        "coremltools",
        "sklearn",
    )
    runtime: ClassVar[str] = "coreml"
    picks: ClassVar[bool] = False
    learns: ClassVar[bool] = True

    precision: Precision = Field(  # type: ignore[assignment]
        "fp32", description="of weights and sums"
    )
    ios: Literal[16, 17, 18] = Field(
        16, description="oldest iOS to run on; macOS 13, 14 and 15 go with them"
    )
    attention: Literal["original", "split_einsum"] = Field(
        "original", description="of UNet and ControlNet; split_einsum suits the Neural Engine"
    )
    quantized: tuple[Part, ...] = Field(
        ("text_encoder", "unet", "controlnet"),
        description="components that int8, w8a8 and lut apply to",
    )
    rest: Literal["fp32", "fp16"] = Field(
        "fp16", description="precision of the components that are not quantized"
    )
    keep: tuple[str, ...] = Field(
        (), description="layers to leave unquantized, by name, of any component; *: anything"
    )
    smallest: int = Field(
        2048, ge=0, description="weights of no more numbers than this stay as they are"
    )
    group: int = Field(
        0, ge=0, description="lut: channels that share a palette; 0: all; else iOS 18"
    )
    rows: Literal[1, 2] = Field(
        1,
        description="of a call of UNet and ControlNet; 2: a picture with and without prompt, which "
        "is how Swift asks ControlNets",
    )
    chunk_mib: float = Field(
        0, ge=0, description="split a UNet with larger weights into two packages; 0: never"
    )
    join: tuple[str, ...] = Field(
        (), description="bundles of the student at other sizes, to be functions beside this; iOS 18"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        newer = {"w8a8": 17, "lut3": 18}.get(self.precision, 16)
        asked = f"precision {self.precision}"
        if self.group or self.join:
            newer, asked = 18, "group" if self.group else "join"
        if self.ios < newer:
            raise ValueError(f"{asked}: is known since iOS {newer}: set ios={newer}, or leave it")
        if self.chunk_mib and self.precision == "w8a8":
            raise ValueError("chunk_mib: ranges of w8a8 are measured on whole UNets: leave one")
        if self.chunk_mib and self.join:
            raise ValueError("chunk_mib: chunks cannot be joined with other sizes: leave one")
        return self

    @classmethod
    def idle(cls, precision: str) -> dict[str, str]:
        found = {} if precision.startswith("lut") else {"group": "palettes, such as lut6"}
        if precision in ("fp32", "fp16"):
            these = ("quantized", "rest", "keep", "smallest")
            found |= dict.fromkeys(these, "a precision of fewer bits, such as int8")
        return found

    def check_components(self, components: Collection[str]) -> None:
        from .which import check_quantized

        check_quantized(self, components)

    def families(self) -> tuple[str, ...]:
        return ("sd",)  # Apple's names and factors of others differ

    def refuse_caching(self) -> str:
        return "knows one graph of the denoiser so far, as Apple's Swift package does"

    def refuse_conditions(self) -> str:
        return "knows denoisers of x_t alone so far"

    def refuse_control(self) -> str:
        return ""

    def check_student(self, student: Student) -> None:
        """Raises for bundles to join that are another student's, or two of one size."""
        ours = (folder_sha256(student.folder), student.lora_scales()) if self.join else None
        sizes: dict[str, str] = {}
        for folder in self.join:
            manifest = Bundle.open(folder).manifest
            told, size = manifest.lineage, f"{manifest.image.height}x{manifest.image.width}"
            if (told.student_sha256, told.loras) != ours:
                raise EdgeflashError(f"join: {folder}: was made from another student")
            if size in sizes:
                said = f"is of the size of {sizes[size]}, {size}: leave one out"
                raise EdgeflashError(f"join: {folder}: {said}")
            sizes[size] = folder

    def precision_of(self, component: str) -> str:
        skipped = self.precision not in ("fp32", "fp16") and component not in self.quantized
        return self.rest if skipped else self.precision

    def shaped_by(self, component: str) -> dict[str, Any]:
        others = [Bundle.open(folder).manifest.model_dump(mode="json") for folder in self.join]
        return super().shaped_by(component) | {"joined": others}

    def calibrates(self, component: str) -> bool:
        return self.precision_of(component) == "w8a8"

    def takes(self, spec: TensorSpec, *, whole: bool) -> TensorSpec:
        component = FED.get(spec.role, "unet")
        half = self.precision_of(component) != "fp32"
        half = half and (whole or spec.role != "timestep")
        rows = self.rows if component in EACH_STEP else 1
        shape = (rows, *spec.shape[1:])
        told: dict[str, Any] = {"name": INPUTS.get(spec.role, spec.name), "shape": shape}
        told["dtype"] = "float16" if half and spec.role != "tokens" else "float32"
        if spec.role == "conditioning":
            told |= {"shape": (rows, shape[2], 1, shape[1]), "layout": "NC1S"}
        return spec.model_copy(update=told)

    def scales(self, latent: Latent) -> Latent:
        from .coreml_networks import SCALE

        return latent.model_copy(update={"scale": SCALE, "shift": 0.0})

    def adapt(self, network: Network, latent: Latent) -> Network:
        from . import coreml_norms
        from .coreml_networks import adapted

        if self.precision_of(network.component) != "fp32":
            coreml_norms.watch(network.module)
        else:  # a ControlNet may be, and share inputs with a UNet that is not
            wide = (spec.model_copy(update={"dtype": "float32"}) for spec in network.inputs)
            network = replace(network, inputs=tuple(wide))
        return adapted(network, latent)

    def rewrite(self, network: Network) -> Network:
        from . import coreml_norms
        from .coreml_attention import split_einsum

        coreml_norms.unwatch(network.module)
        if self.attention == "split_einsum" and network.component in EACH_STEP:
            split_einsum(network.module)
        coreml_norms.rescale(network.module)
        return network

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        from . import coreml_program, quantize_coreml

        name, precision = captured.component, self.precision_of(captured.component)
        squeezed = precision not in ("fp32", "fp16")
        if squeezed:
            quantize_coreml.check(captured, precision)
        others = dict(self._others(captured))
        model = coreml_program.convert(captured, ios=self.ios, half=precision != "fp32")
        package = out / f"{package_of(name, captured.inputs)}.mlpackage"

        def finished(model: Any) -> Any:
            if not squeezed:
                return model
            return quantize_coreml.compress(model, captured, precision, self)

        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".coreml-") as scratch:
            if self._in_chunks(captured, precision):  # fewer bits last: what is packed stays whole
                chunks = map(finished, coreml_program.bisected(model, Path(scratch)))
                return coreml_program.save_chunks(chunks, package, self.chunk_mib)
            coreml_program.save(finished(model), package)
            if others:
                coreml_program.join(package, others, Path(scratch))
        return coreml_program.package_files(package)

    def _in_chunks(self, captured: Captured, precision: str) -> bool:
        """Whether the weights alone are more than one package may hold."""
        numbers = sum(weight.numel() for weight in captured.program.parameters())
        bits = int("".join(filter(str.isdigit, precision.split("a")[0])))
        return captured.component == "unet" and 0 < self.chunk_mib < numbers * bits / 8 / MIB

    def _others(self, captured: Captured) -> Iterator[tuple[str, Path]]:
        """Function and package of other sizes of a component, if it has any.

        Raises:
            EdgeflashError: bundles that cannot be joined with this export.
        """
        for folder in self.join:
            bundle = Bundle.open(folder)
            other = bundle.component(captured.component)
            height, width = bundle.manifest.image.height, bundle.manifest.image.width
            wanted = ("coreml", self.precision_of(captured.component))
            if (other.target, other.precision) != wanted:
                found = f"{other.target} {other.precision}"
                raise EdgeflashError(f"join: {folder}: is {found}, not {' '.join(wanted)}")
            if captured.component == "text_encoder":
                continue
            if other.inputs == captured.inputs:
                raise EdgeflashError(f"join: {folder}: is of the same size, {height}x{width}")
            package = bundle.folder / f"{package_of(other.name, other.inputs)}.mlpackage"
            if not package.is_dir():
                raise EdgeflashError(f"join: {folder}: its UNet is in chunks; export it as a whole")
            yield f"size_{height}x{width}", package

    def diverged(
        self, component: str, capture: Callable[[], Captured], out: Path, floor_db: float
    ) -> str:
        """Evaluates it once more with sums in float32, and weights not quantized.

        Of a quantized one it names a layer, if it can: that ``keep`` can leave alone.
        """
        from .divergence import told

        precision = self.precision_of(component)
        if precision == "fp32":
            return ""
        captured = capture()
        whole = package_of(component, captured.inputs)
        names = sorted(path.stem for path in out.glob(f"{whole}*.mlpackage"))
        exact = self.model_copy(update={"precision": "fp16", "chunk_mib": 0, "join": ()})
        with tempfile.TemporaryDirectory(dir=out, prefix=".fp16-") as scratch:
            exact.lower(captured, Path(scratch))
            for sample in _worst_first(captured, out, names, floor_db):
                astray = _astray(captured, sample, Path(scratch), out, names, floor_db)
                if first := next(astray, None):
                    layers = (each for each in (first, *astray) if each.product)
                    found = first if precision == "fp16" else next(layers, first)
                    return told(found, self, component, self.keep)
        return ""

    def furnish(self, student: Student, components: Sequence[Component], out: Path) -> str:
        """The folder `Resources`, and what still keeps Apple's package from using it."""
        from . import quantize_coreml
        from .coreml_resources import write_resources

        quantize_coreml.check_kept(self.keep, out)
        return write_resources(student, out)


def _worst_first(captured: Captured, out: Path, names: list[str], floor_db: float) -> list[Sample]:
    from .coreml_program import evaluated
    from .divergence import worst_first

    def given_db(sample: Sample) -> float:
        told = evaluated(out, names, captured, sample)
        found = {name: array[:1] for _, name, array in told if name in sample.outputs}
        return min(psnr_db(sample.outputs[name], array) for name, array in found.items())

    ranked = ((given_db(sample), sample) for sample in captured.samples)
    return worst_first(ranked, floor_db)


def _astray(
    captured: Captured, sample: Sample, exact: Path, out: Path, names: list[str], floor_db: float
) -> Iterator[Divergence]:
    """The operators whose results miss the floor in a recorded call, in the order they run."""
    from .coreml_program import evaluated
    from .divergence import off
    from .quantize_coreml import squeezed

    whole, layers = [package_of(captured.component, captured.inputs)], squeezed(out, names)
    wanted: dict[str, Array] = {
        name: _some(array)
        for _, name, array in evaluated(exact, whole, captured, sample, halves=False)
    }
    for kind, name, array in evaluated(out, names, captured, sample):
        found = _some(array)
        if name not in wanted or wanted[name].shape != found.shape:
            continue
        if (made := off(kind, name, wanted[name], found, floor_db)) is not None:
            yield replace(made, product=layers.get(name, ""))


def package_of(component: str, inputs: Iterable[TensorSpec]) -> str:
    """What a component's package is called; Apple's of a UNet that a ControlNet steers differs."""
    steered = any(spec.role.startswith(control.ROLE) for spec in inputs)
    return STEERED if steered else PACKAGES[component]


def _some(array: Array) -> Array:
    return array.ravel()[:: max(1, array.size // COMPARED)].copy()
