"""What to quantize, and to what: one plan in three levels, and the options of all that follow it.

A plan speaks of products: convolutions, linear layers, and products of two activations, as in
attention. Each is left alone, or gets a word; the most specific level that speaks of it wins::

    default = "int8"              # of all; left out: the precision of the export

    [kinds]                       # conv, linear, attention
    attention = "none"

    [names]                       # of operators; * stands for anything, the longest pattern wins
    "unet/mid_block.*" = "int8-weights"
    "unet/up_blocks.1.resnets.0.conv1" = "none"

What targets leave alone by themselves, the timestep's path, edges and shortcuts, yields to names
alone; attention to its kind too.

The name of an operator is its component, and in there the layer as diffusers names it. Where the
graph of a target does not tell that, it is the operator's own name, which other targets do not
know. Operators of one layer share its name, and its fate. A pattern without a component, as
``*.attn1.*``, has to fit an operator of every one that is quantized: ``unet/*.attn1.*`` is of one.
"""

from __future__ import annotations

import fnmatch
import tomllib
from abc import abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgeflash.bundle import ANSWER, EACH_STEP
from edgeflash.caching import SUFFIX, cached_name, whole_name
from edgeflash.complaint import complaint
from edgeflash.control import PICTURE
from edgeflash.errors import EdgeflashError
from edgeflash.floors import PRECISIONS
from edgeflash.roles import Target

from .which import FLOATS, Components, check_quantized

FILE = "plan.toml"  # in a bundle: what was decided
NONE = "none"
CALIBRATED = ("int8", "fp8")  # words whose ranges come from recorded calls
IDLE = (  # options that floats have no use for
    *("plan", "quantized", "rest", "attention", "shortcuts", "edges", "ranges", "activations"),
    "narrow",
)
PIXELS = ("sample", "latent", "image", "prediction", PICTURE)  # roles of tensors

Kind = Literal["conv", "linear", "attention"]
Word = Literal["none", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8"]


class Plan(BaseModel):
    """What to quantize, and to what.

    Attributes:
        default: of all that nothing else speaks of; None: the precision of the export.
        kinds: by kind of operator.
        names: by name of operator, in which * stands for anything; the longest that fits wins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Word | None = None
    kinds: dict[Kind, Word] = {}
    names: dict[str, Word] = {}

    def toml(self) -> str:
        """As text, which reads back as the same plan."""
        return tomli_w.dumps(self.model_dump(exclude_defaults=True))

    def words(self) -> set[str]:
        """All that it says anywhere."""
        return {self.default or NONE, *self.kinds.values(), *self.names.values()}

    def __str__(self) -> str:
        return self.toml().strip() or "none"


def read_plan(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        EdgeflashError: not there, not TOML, or something no plan says.
    """
    try:
        return Plan.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise EdgeflashError(f"plan: {path}: no such file") from None
    except OSError as error:
        raise EdgeflashError(f"plan: {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeflashError(f"plan: {path}: not TOML: {error}") from None
    except ValidationError as error:
        raise complaint(error, Plan, f"plan: {path}") from None


def _given(value: Any) -> Any:
    return read_plan(Path(value)) if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class Operator:
    """A product in the graph of a target.

    Attributes:
        name: its own in that graph.
        layer: the layer in the network that it comes from, as diffusers names it; "" if unknown.
        kind: what it multiplies; "attention" for any two activations.
        takes: words that this target can honour here.
    """

    name: str
    layer: str
    kind: Kind
    takes: frozenset[str]

    def called(self, component: str) -> str:
        """Its name in plans."""
        return f"{component}/{self.layer or self.name}"

    def fits(self, component: str, pattern: str) -> bool:
        """Whether it is meant by a pattern: by its name in plans, or in its own graph."""
        names = (self.called(component), f"{component}/{self.name}", self.name)
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def layer_of(path: str) -> str:
    """A path of modules without what edgeflash wraps around the network."""
    while path.startswith("network."):
        path = path.removeprefix("network.")
    return path if path != "network" else ""


Ranges = Annotated[
    Literal["minmax", "percentile", "entropy"],
    Field(description="int8, fp8: how recorded values become ranges"),
]


def join(parts: Iterable[Path], out: Path) -> None:
    """One plan of those that components left, if any did; each speaks of its own operators."""
    plans = [read_plan(path) for path in parts if path.is_file()]
    names = {name: word for plan in plans for name, word in plan.names.items()}
    if plans:
        joined = Plan.model_validate({"default": NONE, "names": names})
        out.write_text(joined.toml(), encoding="utf-8")


class Quantizing(Target):
    """The options of targets that quantize by a plan."""

    islands: ClassVar[bool] = True  # whether what it keeps in float32 also runs so

    plan: Annotated[Plan, BeforeValidator(_given)] = Field(
        Plan(), description="what to quantize: a TOML file, as plan.toml of bundles, or a table"
    )
    quantized: Components | None = Field(
        None,
        description="components to quantize, besides those in plan; default: those that gain",
    )
    rest: Literal["fp32", "fp16"] = Field(
        "fp16",
        description="precision of components that are not quantized, and of what else a component "
        "holds where weights alone are",
    )
    keep: tuple[str, ...] = Field(
        (),
        description="operators to leave alone, by name as in plans; * stands for anything; in fp16 "
        "and bf16 they stay in float32, of unet/* all of it, in every precision",
    )
    attention: bool = Field(
        False, description="also quantize products of two activations, as in attention"
    )
    shortcuts: bool = Field(
        False, description="also quantize convolutions of skip connections as they come"
    )
    edges: bool = Field(
        False, description="also quantize what stands next to latents, images, conditioning"
    )

    @model_validator(mode="after")
    def _honours_the_plan(self) -> Self:
        for word in sorted(self.plan.words() - {NONE, *self.honours}):
            raise ValueError(f"plan: {word!r} is not among {', '.join(self.honours)}")
        return self

    @model_validator(mode="after")
    def _keeps_of_components(self) -> Self:
        for pattern in self.keep if self.precision in FLOATS else ():
            if pattern.partition("/")[0] not in ANSWER:
                raise ValueError(f"keep: {pattern!r} names no component, as unet/{pattern} does")
        return self

    @classmethod
    def idle(cls, precision: str) -> dict[str, str]:
        if precision not in FLOATS:
            return {}
        found = dict.fromkeys(IDLE, "a precision that quantizes, such as int8")
        if not cls.islands:
            found["keep"] = found["plan"]
        elif precision == "fp32":
            found["keep"] = "a precision that is not fp32"
        return found

    def check_components(self, components: Collection[str]) -> None:
        here = {*components, "vae_encoder"}  # plans of edits are followed without it, too
        for option, patterns in (("keep", self.keep), ("plan", self.plan.names)):
            for pattern in patterns:
                head = pattern.partition("/")[0]
                if head in ANSWER and head not in (components if option == "keep" else here):
                    raise EdgeflashError(
                        f"{option}: {pattern!r}: {head} is none of what is exported: "
                        f"{', '.join(components)}"
                    )
        check_quantized(self, components)

    @property
    @abstractmethod
    def honours(self) -> tuple[str, ...]:
        """The words that plans may hold, besides "none"."""

    def can(self, kind: Kind, rank: int) -> frozenset[str]:
        """Words that a layer with weights can get; ``rank``: of what it is given."""
        return frozenset(self.honours)

    def usual(self) -> tuple[str, ...]:
        """Components that are quantized where nobody says which: those that gain."""
        if weights_alone([self.precision]):
            return tuple(name for name in ANSWER if not name.startswith("vae_"))
        return (*EACH_STEP, "vae_decoder", "vae_encoder")

    def words_in(self, component: str) -> set[str]:
        """What operators of a component can get, but for "none"."""
        plan, words = self.plan, set[str]()
        if self._whole(component):
            return words
        if component in self._chosen():
            words = {plan.default or self.precision, *plan.kinds.values()}
        words |= {word for pattern, word in plan.names.items() if self._means(pattern, component)}
        return words - {NONE, *FLOATS}

    def precision_of(self, component: str) -> str:
        """The coarsest word in it; of others ``rest``, or the precision where that is a float."""
        if self._whole(component):
            return "fp32"
        if self.precision in FLOATS:
            return self.precision
        words = self.words_in(component)
        return max(words, key=PRECISIONS.index) if words else self.rest

    def halves(self, component: str) -> bool:
        """Whether its floats are of 16 bits: all of them, or those beside quantized weights."""
        words = self.words_in(component)
        beside = self.rest == "fp16" and bool(words) and weights_alone(words)
        return beside or self.precision_of(component) == "fp16"

    def calibrates(self, component: str) -> bool:
        return self.precision not in FLOATS and not self.words_in(component).isdisjoint(CALIBRATED)

    def scans(self, component: str) -> bool:
        return self.islands and self.halves(component)

    def wider(self, components: Collection[str]) -> Self:
        left = (f"{name}/*" for name in components if self.islands and self.halves(name))
        return self.model_copy(update={"keep": (*self.keep, *left)})

    def _whole(self, component: str) -> bool:
        """Whether all of it is to stay in float32."""
        return self.islands and f"{whole_name(component)}/*" in self.keep

    def in_float32(self, component: str) -> tuple[str, ...]:
        """Patterns of the operators that stay so where the others of a component are halves."""
        if self.words_in(component):
            return ()  # there `keep` is of what is not quantized
        heads = (component, whole_name(component))
        return tuple(pattern for pattern in self.keep if pattern.partition("/")[0] in heads)

    def shaped_by(self, component: str) -> dict[str, Any]:
        told = super().shaped_by(component)
        if not self.words_in(component):
            for name in ("precision", *Quantizing.__annotations__):
                told.pop(name, None)
            told["floats"] = self.precision_of(component), self.halves(component)
            told["keep"] = self.in_float32(component)
        else:
            names = told["plan"]["names"].items()
            told["plan"]["names"] = {p: word for p, word in names if _may_be_in(component, p)}
            told["keep"] = [p for p in told["keep"] if _may_be_in(component, p)]
            told["quantized"] = component in self._chosen()
        return told

    def _chosen(self) -> tuple[str, ...]:
        """The components to quantize; a denoiser's cached graph goes with it."""
        names = self.usual() if self.quantized is None else self.quantized
        return (*names, *map(cached_name, names))

    def _means(self, pattern: str, component: str) -> bool:
        """Whether a pattern can be of operators in this component."""
        head = pattern.partition("/")[0]
        return head == component if head in ANSWER else component in self._chosen()

    def decided(
        self, component: str, operators: Iterable[Operator], away: Collection[str]
    ) -> dict[str, str]:
        """What becomes of each operator, by its own name.

        Args:
            component: where they are.
            operators: all products of its graph.
            away: own names of those left alone, unless named: they lose more than they gain.

        Raises:
            EdgeflashError: a pattern that fits no operator, or nothing to quantize.
        """
        operators = list(operators)
        for option, patterns in (("keep", self.keep), ("plan", self.plan.names)):
            for pattern in patterns:
                # A cached graph lacks most of the layers that patterns without a component mean.
                means = self._means(pattern, component) and not component.endswith(SUFFIX)
                if means and not any(op.fits(component, pattern) for op in operators):
                    like = ", ".join(op.called(component) for op in operators[:2]) or "none at all"
                    alone = (
                        "" if pattern.partition("/")[0] in ANSWER else f"; unet/{pattern} is of one"
                    )
                    raise EdgeflashError(
                        f"{option}: no operator of {component} is called {pattern!r}: their names "
                        f"are like {like}{alone}"
                    )
        words = {op.name: self._word(component, op, away) for op in operators}
        fates: dict[str, set[str]] = {}
        for op in operators:
            fates.setdefault(op.called(component), set()).add(words[op.name])
        for op in operators:
            if len(fates[op.called(component)]) > 1:
                words[op.name] = NONE
        if not set(words.values()) - {NONE}:
            applied = self.precision_of(component)
            raise EdgeflashError(f"quantized: {component} has nothing that {applied} applies to")
        return words

    def _word(self, component: str, operator: Operator, away: Collection[str]) -> str:
        if any(operator.fits(component, pattern) for pattern in self.keep):
            return NONE
        fitting = [name for name in self.plan.names if operator.fits(component, name)]
        if fitting:
            word: str = self.plan.names[max(fitting, key=len)]
        elif component not in self._chosen():
            return NONE
        else:
            word = self.plan.default or self.precision
            if operator.kind == "attention" and not self.attention:
                word = NONE
            word = self.plan.kinds.get(operator.kind, word)
            if operator.name in away and not weights_alone([word]):
                return NONE
        return word if word in operator.takes else NONE

    def write_down(
        self, out: Path, component: str, operators: Iterable[Operator], words: dict[str, str]
    ) -> None:
        """Adds what was decided for a component to the plan in ``out``; left out is left alone."""
        path = out / FILE
        before = read_plan(path).names if path.is_file() else {}
        found = {op.called(component): words[op.name] for op in operators}
        names = before | {name: word for name, word in found.items() if word != NONE}
        plan = Plan.model_validate({"default": NONE, "names": names})
        path.write_text(plan.toml(), encoding="utf-8")


def _may_be_in(component: str, pattern: str) -> bool:
    """Whether a pattern does not name another component."""
    head = pattern.partition("/")[0]
    return head == component or head not in ANSWER


def weights_alone(words: Iterable[str]) -> bool:
    """Whether activations stay float with all of these."""
    return all(word.endswith("-weights") for word in words)
