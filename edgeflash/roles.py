"""The four roles a plug-in can play. Read this file first, then one `by_`, `to_` and `on_` file.

A plug-in is one file and one frozen pydantic class: its fields are its options, each with a
default, a range and one line of description. It names the packages it ``needs``, so that they are
looked for before anything heavy is imported. Targets and runtimes import heavy packages inside the
functions that use them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from edgeflash.bundle import Bundle, Component, Engine, Latent, TensorSpec
    from edgeflash.distill.stage import Stage, Workshop
    from edgeflash.export.capture import Captured, Network
    from edgeflash.student import Student

Array = NDArray[Any]
NO_DEVICE = "numpy"  # as the device of a session whose times are those of none


class Plugin(BaseModel):
    """What all plug-ins share: options are fields, unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs: ClassVar[tuple[str, ...]] = ()


class Method(Plugin, ABC):
    """Trains one stage of a recipe: ``distill/by_<name>.py``."""

    needs: ClassVar[tuple[str, ...]] = (
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "tensorboard",
        "webdataset",
    )
    wants: ClassVar[tuple[str, ...]] = ()  # of the recipe: "teacher", "shapes"
    families: ClassVar[tuple[str, ...]] = ()  # whose components it can make; none named: all
    flows: ClassVar[bool] = False  # whether it learns flows from picture to noise too, as SD 3's
    conditioned: ClassVar[bool] = False  # also learns from denoisers that see more than x_t
    keeps_control: ClassVar[bool] = True  # of these, from denoisers that see a control picture
    steers: ClassVar[str] = ""  # the component it makes that sees one, if any

    steps: int = Field(1000, ge=1, description="optimizer steps")
    minutes: float | None = Field(None, gt=0, description="stop after this time, if it comes first")
    batch_size: int = Field(16, ge=1, description="samples a step, over all processes")
    accumulate: int = Field(
        1, ge=1, description="micro-batches a step is cut into, over all processes"
    )
    learning_rate: float = Field(
        1e-4, gt=0, description="peak learning rate of AdamW; the default is ours"
    )
    decay: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="course of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's decoupled weight decay")
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average kept; 0: none")
    ends: int | None = Field(
        None,
        ge=2,
        description="save the mean of what so many stages of this method, one after the other and "
        "this one the last, ended with",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="autocast of the networks")
    lora_rank: int | None = Field(
        None, ge=1, description="train LoRA of this rank on the denoiser, not all of it"
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="LoRA counts alpha / rank; none: as much as the rank"
    )
    lora_targets: tuple[str, ...] | None = Field(
        None, description="how names of layers with LoRA end; none: as diffusers' LCM-LoRA has it"
    )
    lora_init: Literal["uniform", "gaussian"] = Field(
        "uniform", description="how its first factor begins; gaussian: of deviation 1 / rank"
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        plain = self.lora_init == "uniform" and not (self.lora_alpha or self.lora_targets)
        if not self.lora_rank and not plain:
            raise ValueError("lora_alpha, lora_targets and lora_init go with lora_rank")
        if self.lora_rank and self.ends:
            raise ValueError("ends is of whole networks: leave it or lora_rank out")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide {self.batch_size}")
        return self

    def step_counts(self) -> range | None:
        """The step counts that the student's sampler can run; None: this stage limits none."""
        return None

    def folds_guidance(self) -> bool:
        """Whether the student is sampled without guidance though its sampler does not tell so."""
        return False

    def needs_teacher(self) -> bool:
        """Whether the recipe must name one for it to do what these options say."""
        return "teacher" in self.wants

    def told_scales(self) -> tuple[float, float] | None:
        """The least and the greatest guidance scale that it trains the denoiser to be told.

        None: it tells the denoiser none.
        """
        return None

    def shows_more(self) -> bool:
        """Whether it makes a denoiser that sees a picture beside x_t, for later stages to teach."""
        return False

    def refuse_after(self, earlier: Sequence[Method]) -> str:
        """Why it cannot come after these stages of a recipe, the first first; "" where it can."""
        return ""

    @abstractmethod
    def begin(self, shop: Workshop) -> Stage:
        """Builds the networks, losses and batches of this stage."""


class Target(Plugin, ABC):
    """Lowers one captured component to one vendor's format: ``export/to_<name>.py``."""

    runtime: ClassVar[str]  # the runtime that opens what this writes, for the parity ladder
    picks: ClassVar[bool] = True  # lowers what picks tokens by what they are, as merging does
    learns: ClassVar[bool] = False  # notes in a network, as it runs, what lowering needs

    precision: Literal[  # each takes some of them
        "fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8"
    ] = Field("fp32", description="of weights and sums")

    @classmethod
    def idle(cls, precision: str) -> Mapping[str, str]:
        """Options that do nothing at a precision: giving one is a mistake; with what they go."""
        return {}

    @model_validator(mode="after")
    def _none_idle(self) -> Self:
        for name, goes_with in self.idle(self.precision).items():
            field = type(self).model_fields.get(name)
            if field and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name}: goes with {goes_with}, and does nothing in {self.precision}: leave "
                    "it out, or choose another precision"
                )
        return self

    def check(self) -> None:
        """Raises what stands in the way on this machine, before any network is loaded."""

    def check_student(self, student: Student) -> None:
        """Raises what of its options does not belong to that student, before the work."""

    def check_components(self, components: Collection[str]) -> None:
        """Raises where options mean none of a student's components, before any is loaded."""

    def families(self) -> tuple[str, ...]:
        """Whose components it can lower with these options; none named: all."""
        return ()

    def refuse_caching(self) -> str:
        """Why it cannot lower a denoiser in two graphs with these options; "" where it can."""
        return ""

    def refuse_conditions(self) -> str:
        """Why it cannot lower a denoiser that sees a picture beside x_t, or an adapter."""
        return ""

    def refuse_control(self) -> str:
        """Why it cannot lower a denoiser that a ControlNet steers; "" where it can."""
        return self.refuse_conditions()

    @abstractmethod
    def lower(self, captured: Captured, out: Path) -> list[Path]:
        """Writes one component below ``out`` and returns its files, the one to open first."""

    def precision_of(self, component: str) -> str:
        """The precision it lowers that component to; not every one gains from quantization."""
        return self.precision

    def calibrates(self, component: str) -> bool:
        """Whether ranges of its tensors come from what is recorded, from all prompts."""
        return False

    def scans(self, component: str) -> bool:
        """Whether what is recorded, of whatever prompts, tells what of it stays in float32."""
        return False

    def wider(self, components: Collection[str]) -> Self:
        """The same, with these in float32 where their sums would run in float16."""
        return self

    def shaped_by(self, component: str) -> dict[str, Any]:
        """The options that shape what it lowers a component to: others may change without that."""
        return self.model_dump(mode="json")

    def engine_of(self, component: str) -> Engine | None:
        """How engines are built of what it lowers, where the vendor's runtime runs no other."""
        return None

    def prover(self) -> Runtime:
        """What the ladder runs on at the end of an export: the runtime that opens the files."""
        from edgeflash import shelf

        return shelf.make(Runtime, self.runtime, {})

    def takes(self, spec: TensorSpec, *, whole: bool) -> TensorSpec:
        """An input as its ecosystem feeds it; ``whole``: every timestep is a whole number."""
        return spec

    def scales(self, latent: Latent) -> Latent:
        """How its ecosystem scales what a decoder is fed."""
        return latent

    def adapt(self, network: Network, latent: Latent) -> Network:
        """A component, its inputs as ``takes`` has them, as its ecosystem calls it.

        ``latent``: as the student scales latents. What comes back is recorded and captured.
        """
        return network

    def rewrite(self, network: Network) -> Network:
        """The same in operators that suit the device; the recorded answers stay the reference."""
        return network

    def furnish(self, student: Student, components: Sequence[Component], out: Path) -> str:
        """Adds what the ecosystem's own pipelines look for beside components and tokenizer.

        Returns what a person should know of it, in one line; "" for nothing.
        """
        return ""

    def fuse(self, bundle: Bundle) -> Component | None:
        """One more file: the whole bundle as one graph, tokens and noise in, pictures out.

        ``bundle``: without its ladder. None where no such graph is asked for.
        """
        return None

    def diverged(
        self, component: str, capture: Callable[[], Captured], out: Path, floor_db: float
    ) -> str:
        """Where a lowered component below ``out`` first goes astray, and what to do about it.

        "" where it cannot say, or all reaches ``floor_db``, a PSNR. ``capture`` makes its program
        once more, which takes a while: only where it helps.
        """
        return ""


class Runtime(Plugin, ABC):
    """Opens lowered components: ``runtimes/on_<name>.py``. Imports no torch at module level."""

    opens: ClassVar[tuple[str, ...]]  # names of the targets it can open

    @property
    def unproven(self) -> str:
        """What the ladder leaves open on it, and what to do about that; "" for nothing."""
        return ""

    def exact(self) -> Runtime:
        """Itself as the ladder climbs on it: computing in the types of a file, however slowly."""
        return self

    @property
    def untimed(self) -> str:
        """Why its times are those of no device, and what to do; "" where they are one's."""
        return ""

    @abstractmethod
    def open(self, folder: Path, component: Component) -> Session:
        """Loads one component of the bundle in ``folder``."""

    def watch(
        self, folder: Path, component: Component, inputs: Mapping[str, Array]
    ) -> Iterator[tuple[str, str, Array]]:
        """Runs a component once: the operator, the name and the value of each tensor on the way.

        Nothing where a runtime cannot look inside.
        """
        return iter(())

    def build(self, folder: Path, component: Component) -> str:
        """Makes ahead what the first `open` would make, and tells what; "" for nothing."""
        return ""


class Session(ABC):
    """One loaded component: named arrays in, named arrays out."""

    device: str = "cpu"  # what it runs on, in its vendor's words, for the report

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, np.ndarray[Any, Any]]:
        """Runs once. Shapes and dtypes are those of the component's tensor specs."""

    def close(self) -> None:  # noqa: B027 - most sessions free everything with the object
        """Gives the memory back; the session is not used again."""
