"""The bundle: the folder an app ships, with its manifest `edgeflash.json`.

Everything a runtime must know stands in the manifest: which file holds which component, what each
tensor means, how a prompt becomes token ids, the sampler as tables of numbers. A native app reads
it with any JSON parser. Nothing in it is secret and no path is absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edgeflash import control
from edgeflash.caching import cached_name, whole_name
from edgeflash.disk import sha256_of
from edgeflash.errors import EdgeflashError
from edgeflash.manifest import parse_manifest, read_manifest
from edgeflash.schedule import Guidance, Schedule

QUICK_BYTES = 256 * 2**20  # of bundles that are hashed whenever they are opened
CACHED_VERSION = 2  # of bundles with a cached graph; plain ones are still written as 1
CONDITIONED_VERSION = 3  # of bundles whose denoiser sees more than x_t
CONTROLLED_VERSION = 4  # of bundles with a ControlNet, or an adapter
ANSWER = {  # component -> role of the output that the loop goes on with
    "text_encoder": "conditioning",
    "text_encoder_2": "conditioning",
    "text_encoder_3": "below",
    "unet": "prediction",
    "transformer": "prediction",
    "unet_cached": "prediction",
    "vae_decoder": "image",
    "vae_encoder": "latent",
    **dict.fromkeys(control.CALLED, control.ROLE + "0"),  # one of many
}
PREDICTING = tuple(name for name, role in ANSWER.items() if role == "prediction")
DENOISERS = tuple(name for name in PREDICTING if name == whole_name(name))
EACH_STEP = (*DENOISERS, control.NAME)


def kind_of(component: str) -> str:
    """What a component is: text_encoder, denoiser, or, of those that are one of a kind, its name.

    A denoiser's cached graph is a denoiser_cached.
    """
    if component.startswith("text_encoder"):
        return "text_encoder"
    if component not in PREDICTING:
        return component
    return "denoiser" if component in DENOISERS else cached_name("denoiser")


class Part(BaseModel):
    """Base of everything in the manifest: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Part):
    """One input or output of a component.

    ``role`` says what a runtime must feed or may read, whatever it is called: tokens [n, s],
    conditioning [n, s, d], below (more of it, in further rows) [n, s, d], joint (both) [n, s, d],
    mask (1 where conditioning is of a token, 0 of padding) [n, s], pooled (a prompt in one vector)
    [n, d], time_ids [n, 6], resolution [n, 2] and aspect_ratio [n, 1] (of the picture), sample
    [n, c, h, w], timestep (rank 0 or [n]), guidance (the w-embedding) [n, d], prediction
    [n, c, h, w], latent [n, c, h, w], image [n, 3, H, W], or unused; of a fused graph noise
    [k, n, c, h, w] and pixels [n, H, W, 3]. In layout "NC1S" conditioning is [n, d, 1, s]. A
    dimension that is a string is free. `edgeflash.conditioning` says how the denoiser's
    conditioning comes from the text encoders'. What the denoiser leaves for its cached graph has
    the roles cache.0, cache.1 … in both (`edgeflash.caching`), what a ControlNet or an
    adapter makes of control [n, 3, H, W] residual.0, residual.1 … in both (`edgeflash.control`).
    """

    name: str
    role: str
    shape: tuple[int | str, ...]
    dtype: str
    layout: str = ""  # "NCHW", "NSC", "NC1S" …; empty where it means nothing
    low: float | None = None  # value range, where it is a promise
    high: float | None = None

    @model_validator(mode="after")
    def _has_rows(self) -> TensorSpec:
        if not self.shape and self.role in {"tokens", "sample", *ANSWER.values()}:
            raise ValueError("shape: has no rows")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The value range of a picture; -1 to 1 where the manifest is silent."""
        return -1.0 if self.low is None else self.low, 1.0 if self.high is None else self.high

    def arranged(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array as this tensor has it: dtype and layout; no copy where it fits already."""
        if self.layout == "NC1S":
            array = array.transpose(0, 2, 1)[:, :, None]
        return np.asarray(array, self.dtype, order="C")


class File(Part):
    path: str  # relative to the bundle, forward slashes
    bytes: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts:
            raise ValueError(f"{path} leads out of the bundle")
        return path


class Engine(Part):
    """How TensorRT's engine of a component is built from its ONNX file, and which one ships."""

    vendor: Literal["tensorrt_rtx", "tensorrt"]  # the package that builds and runs it
    rows: tuple[int, int, int]  # of a call: fewest, those it is tuned for, most; all one: static
    tf32: bool = False
    refit: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware: Literal["this", "same_capability", "ampere_plus"] = "this"
    optimization_level: int | None = None  # None: the vendor's default
    built_with: str | None = None  # version of the package; None: no engine ships
    built_for: tuple[str, ...] = ()  # compute capabilities, as in 8.9


class Tokenizer(Part):
    kind: Literal["clip", "t5"]
    folder: str  # holds tokenizer.json, or vocab.json and merges.txt; of CLIP mostly both
    max_length: int = Field(gt=0)
    start_id: int | None = None  # None: nothing goes before the prompt
    end_id: int
    pad_id: int
    lower: bool | None = None  # true: letters are made small, and outer blanks taken off, before


class Component(Part):
    """A network of the bundle, by a name in `ANSWER`; the denoiser has one of `DENOISERS`.

    Or ``unet_cached``, the graph that rows of a schedule name which take what unet left before, or
    ``controlnet``, which is asked before unet at every step, for what that takes besides, or
    ``adapter``, which takes no sample and is asked once a picture, for the same. Or ``pipeline``,
    which stands by itself: text_encoder, all steps and vae_decoder in one graph.
    """

    name: str
    target: str
    precision: str
    files: tuple[File, ...]  # the one to open first
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engine: Engine | None = None
    tokenizer: Tokenizer | None = None  # of a text encoder; None: the bundle's

    def input(self, role: str) -> TensorSpec | None:
        """The input that plays a role; None when the component has none (a folded timestep)."""
        return next((spec for spec in self.inputs if spec.role == role), None)

    def output(self, role: str) -> TensorSpec:
        found = next((spec for spec in self.outputs if spec.role == role), None)
        if found is None:
            raise EdgeflashError(f"component {self.name!r} has no output of role {role!r}")
        return found


class Latent(Part):
    channels: int = Field(gt=0)
    downsampling: int = Field(gt=0)  # image pixels per latent cell along one side
    scale: float = Field(gt=0)  # the decoder is fed latent / scale + shift
    shift: float = 0.0


class Image(Part):
    height: int = Field(gt=0)  # px; what the bundle was captured and checked at
    width: int = Field(gt=0)


class Condition(Part):
    """What a denoiser sees beside x_t, as channels of its sample; see `edgeflash.conditions`."""

    kind: Literal["mask", "masked_image", "image"]
    channels: int = Field(gt=0)
    enlarges: int | None = Field(None, gt=0)  # times along a side; none: it is seen at its size


class Golden(Part):
    """One prompt whose whole way was recorded in torch, for the parity ladder on the device."""

    prompt: str
    seed: int
    steps: int
    token_ids: tuple[int, ...]
    noise_sha256: str  # of the float32 little-endian bytes of x[0] / init
    latent_mean: float
    latent_std: float
    tensors: str  # safetensors file of recorded inputs and outputs, relative path
    thumbnail: str  # 64-px PNG, relative path


class Figure(Part):
    """One rung of the parity ladder on one component."""

    rung: Literal["L0", "L1", "L2", "L3", "L4"]
    component: str  # "pipeline" for L3 and L4
    metric: str  # psnr_db, cosine, relative_l2, delta_ratio, ssim
    value: float
    floor: float | None = None
    ceiling: float | None = None
    prompts: int | None = None  # that it was measured on; None: it is of none

    @property
    def passed(self) -> bool:
        low = self.floor is None or self.value >= self.floor
        return low and (self.ceiling is None or self.value <= self.ceiling)


class Merging(Part):
    """Tokens that the denoiser merges before self-attention (`export/merging.py`)."""

    share: float  # of the tokens where it has most of them
    image_psnr_db: float  # of the pictures, against the student's own without it; the worst


class Caching(Part):
    """What the denoiser's cached graph leaves out (`export/caching.py`), and what that costs."""

    method: Literal["deep-cache", "t-gate"]
    interval: int | None = None  # deep-cache: every so many steps the whole network runs
    branch: int | None = None  # deep-cache: skip connection whose feature is kept
    gate: int | None = None  # t-gate: the first step that hears no prompt
    image_psnr_db: float  # of the pictures, against the student's own without it; the worst


class Lineage(Part):
    teacher: str | None = None
    recipe_sha256: str | None = None
    student_sha256: str | None = None
    loras: dict[str, float] = {}  # sha256 of a fused LoRA file -> its scale
    tools: dict[str, str] = {}
    weights_licence: str | None = None


class Manifest(Part):
    format_version: int = 1
    kind: Literal["bundle"] = "bundle"
    family: str
    name: str
    components: tuple[Component, ...] = Field(min_length=1)
    tokenizer: Tokenizer
    latent: Latent
    image: Image
    schedules: dict[int, Schedule]  # by number of steps
    default_steps: int
    guidance: Guidance
    conditions: tuple[Condition, ...] = ()  # in sample's channels behind the latent's, in order
    merging: Merging | None = None
    caching: Caching | None = None
    fused: Component | None = None  # draws in default_steps, with the guidance above
    no_prompt: Literal["zeros"] | None = None  # what guides away; None: "" as any other prompt
    parity: tuple[Figure, ...] = ()
    unproven: str | None = None  # what of it the ladder did not run where it was made
    goldens: tuple[Golden, ...] = ()
    files: tuple[File, ...] = ()  # all others: tokenizer, goldens, configs of the ecosystem
    lineage: Lineage = Lineage()

    @property
    def lowered(self) -> tuple[Component, ...]:
        """The components, and the graph of them all where there is one."""
        return self.components if self.fused is None else (*self.components, self.fused)

    @property
    def gated(self) -> bool:
        """Whether the cached graph runs without guidance, on what the prompt had said before."""
        return self.caching is not None and self.caching.method == "t-gate"

    @model_validator(mode="after")
    def _has_its_channels(self) -> Manifest:
        for component in self.components:
            spec = component.input("latent")
            if component.name != "vae_decoder" or spec is None or len(spec.shape) != 4:
                continue
            found = spec.shape[spec.layout.index("C") if "C" in spec.layout else 1]
            ours = self.latent.channels
            if isinstance(found, int) and found != ours:
                raise ValueError(f"latent.channels: {ours}, but the decoder takes {found}")
        return self

    @model_validator(mode="after")
    def _has_its_files(self) -> Manifest:
        if bare := [component.name for component in self.lowered if not component.files]:
            raise ValueError(f"components: {bare[0]} has no files")
        return self

    @model_validator(mode="after")
    def _has_its_schedules(self) -> Manifest:
        for steps in (self.default_steps, *(golden.steps for golden in self.goldens)):
            if steps not in self.schedules:
                raise ValueError(f"schedules: none for {steps} steps, which it speaks of")
        return self


class Bundle:
    """An opened bundle folder.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path | str, *, check: Literal["size", "sha256"] | None = None) -> Bundle:
        """Reads the manifest and verifies that every file is there, by size or by hash.

        ``check``: None hashes bundles of up to `QUICK_BYTES`, which takes a fraction of a second.

        Raises:
            EdgeflashError: no bundle, a newer format, or a missing, truncated or altered file.
        """
        folder = Path(folder)
        manifest = parse_manifest(Manifest, read_manifest(folder, "bundle"), folder)
        bundle = cls(folder, manifest)
        quick = sum(file.bytes for file in bundle.files()) <= QUICK_BYTES
        for file in bundle.files():
            check_file(folder, file, check or ("sha256" if quick else "size"))
        return bundle

    def files(self) -> Iterator[File]:
        """Every file of the bundle but the manifest."""
        for component in self.manifest.lowered:
            yield from component.files
        yield from self.manifest.files

    @property
    def cached(self) -> Component | None:
        """The graph of the denoiser that takes what the whole one left before."""
        names = [cached_name(name) for name in DENOISERS]
        return next((c for c in self.manifest.components if c.name in names), None)

    def component(self, name: str) -> Component:
        for component in self.manifest.components:
            if component.name == name:
                return component
        have = ", ".join(c.name for c in self.manifest.components)
        raise EdgeflashError(f"{self.folder}: bundle has no component {name!r} (has: {have})")

    @property
    def denoiser(self) -> Component:
        """What every step of the sampler asks: a bundle has one, by either of two names."""
        found = [c for c in self.manifest.components if c.name in DENOISERS]
        return found[0] if found else self.component(DENOISERS[0])

    @property
    def steering(self) -> Component | None:
        """What sees a control picture, for what the denoiser takes besides; it has one at most."""
        return next((c for c in self.manifest.components if c.name in control.CALLED), None)

    @property
    def controlnet(self) -> Component | None:
        """That, where it is asked before every call of the denoiser."""
        return self.steering if self.steering and self.steering.name == control.NAME else None

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """Those that read prompts, in the order in which their answers are joined."""
        return tuple(c for c in self.manifest.components if c.name.startswith("text_encoder"))

    @property
    def bytes(self) -> int:
        """Size on disk of all files that ship, without the manifest."""
        return sum(file.bytes for file in self.files())


def describe_file(folder: Path, relative: str) -> File:
    path = folder / relative
    return File(path=relative, bytes=path.stat().st_size, sha256=sha256_of(path))


def check_file(folder: Path, file: File, how: Literal["size", "sha256"]) -> None:
    path = folder / file.path
    if not path.is_file():
        raise EdgeflashError(f"{path}: missing; the manifest lists it ({file.bytes} bytes)")
    if path.stat().st_size != file.bytes:
        raise EdgeflashError(
            f"{path}: {path.stat().st_size} bytes where the manifest says {file.bytes}, truncated "
            f"or altered: sha256 expected {file.sha256}, found {sha256_of(path)}; copy it again"
        )
    if how == "sha256" and (found := sha256_of(path)) != file.sha256:
        raise EdgeflashError(
            f"{path}: altered: sha256 expected {file.sha256}, found {found}; copy it again"
        )
