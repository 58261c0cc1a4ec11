"""What a model family is, and which family a folder belongs to. One family is one `family_*.py`."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from edgeflash.bundle import Condition, Latent, TensorSpec, Tokenizer
from edgeflash.errors import unknown
from edgeflash.schedule import Guidance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeflash.student import Student


class Family(ABC):
    """Which components a family has, and how they play together.

    It knows no folder; at most, by `of`, which optional components one has.

    Attributes:
        name: how manifests call it.
        denoiser: its folder in students and bundles, by the ecosystem's convention.
        pipelines: diffusers pipeline classes that belong to it.
        folders: sub-folders that a folder of this family must have.
        optional: those that it does without where its index says [null, null] of them.
        single_files: the kinds of single-file checkpoints, as diffusers calls them, that are of
            this family, each with the hub repository that has their configs.
        cfg_scale: that its diffusers pipeline guides with when nobody says.
        steering: the component that sees a control picture for the denoiser, by its name in
            `edgeflash.control`; "": none does.
        steered_pipelines: of each that a folder may have, the one of ``pipelines`` that has it.
    """

    name: ClassVar[str]
    denoiser: ClassVar[str] = "unet"
    pipelines: ClassVar[tuple[str, ...]]
    folders: tuple[str, ...]
    optional: ClassVar[tuple[str, ...]] = ()
    single_files: ClassVar[dict[str, str]] = {}
    cfg_scale: ClassVar[float] = 7.5
    steering: str = ""
    steered_pipelines: ClassVar[dict[str, str]] = {}

    def of(self, index: dict[str, Any]) -> Self:
        """The family as a folder with that `model_index.json` has it."""
        return self

    @abstractmethod
    def check(self, student: Student) -> None:
        """Raises ``EdgeflashError`` when the components do not fit together."""

    @abstractmethod
    def check_guidance(self, student: Student, guidance: Guidance) -> None:
        """Raises ``EdgeflashError`` when the denoiser cannot be steered that way."""

    def scheduler_config(self, student: Student) -> dict[str, Any]:
        """The scheduler's config as the family's diffusers pipeline runs it."""
        return student.config("scheduler")

    @abstractmethod
    def components(self, *, encoder: bool = False) -> tuple[str, ...]:
        """What gets exported, in the order a prompt passes it; ``encoder``: for image to image."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that read prompts."""
        return tuple(name for name in self.components() if name.startswith("text_encoder"))

    @abstractmethod
    def load(self, student: Student, component: str, *, timestep: float | None = None) -> nn.Module:
        """One exportable component: float32, on the CPU, takes and gives what `signature` says.

        ``timestep``: fold this one into the denoiser, which then takes none.
        """

    @abstractmethod
    def wrap(self, network: Any, component: str, timestep: float | None = None) -> nn.Module:
        """A plain network in the form that `load` gives it."""

    @abstractmethod
    def signature(
        self, student: Student, component: str, size: tuple[int, int], *, folded: bool = False
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs, by position, and outputs of a component for images of ``size`` (height, width).

        ``size`` is in px; ``folded``: of the denoiser without its timestep.
        """

    @abstractmethod
    def unit(self, student: Student) -> int:
        """Sides of pictures are multiples of so many px."""

    @abstractmethod
    def size(self, student: Student) -> tuple[int, int]:
        """(height, width) in px of the images the denoiser was made for."""

    @abstractmethod
    def latent(self, student: Student) -> Latent:
        """The latent space between denoiser and decoder."""

    def conditions(self, student: Student) -> tuple[Condition, ...]:
        """What the denoiser sees beside x_t: in its sample's channels behind the latent's."""
        return ()

    def upcasts(self, student: Student) -> bool:
        """Whether its pipeline runs the autoencoder in float32 where all else is in float16."""
        return False

    @abstractmethod
    def tokenizer(self, student: Student, text_encoder: str = "text_encoder") -> Tokenizer:
        """How a prompt becomes a text encoder's ids; ``folder`` as it lies in the student."""

    def no_prompt(self, student: Student) -> Literal["zeros"] | None:
        """What stands for no prompt: zeros, or what the text encoders make of "", like any."""
        return None

    @abstractmethod
    def encode_prompt(self, text_encoders: Sequence[Any], ids: Sequence[Tensor]) -> Tensor:
        """Prompts as the one tensor c [n, s, d] that methods train with.

        Args:
            text_encoders: the plain networks, in the order of `text_encoders`.
            ids: token ids of each, int64 [n, s].
        """

    def listening(self, student: Student, denoiser: Any) -> Any:
        """A plain denoiser, to be called as methods call it: denoiser(x, t, c), c as above."""
        return denoiser

    @abstractmethod
    def tokenize(self, tokenizer: Path, texts: Sequence[str]) -> Any:
        """Texts -> token ids int64 [n, s], with the tokenizer in that folder."""


def tokenizer_of(text_encoder: str) -> str:
    """The folder of a text encoder's tokenizer, by the ecosystem's convention."""
    return text_encoder.replace("text_encoder", "tokenizer")


def families() -> list[Family]:
    """Every family there is, by file name."""
    return [_family(path.stem) for path in sorted(Path(__file__).parent.glob("family_*.py"))]


def find_family(folder: Path, pipeline: str) -> Family:
    """The family of a diffusers pipeline class.

    Raises:
        EdgeflashError: nobody's.
    """
    known = {name: family for family in families() for name in family.pipelines}
    if pipeline not in known:
        raise unknown(f"family in {folder} for pipeline", pipeline, known)
    return known[pipeline]


def family_named(name: str) -> Family:
    """The family that a manifest names."""
    known = {family.name: family for family in families()}
    if name not in known:
        raise unknown("family", name, known)
    return known[name]


def _family(stem: str) -> Family:
    module = importlib.import_module(f"edgeflash.{stem}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Family)
        and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{stem} holds {len(found)} families, not one"
    family: Family = found[0]()
    return family
