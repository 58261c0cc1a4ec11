"""The recipe: one TOML file that says how a student and its bundles are made."""

from __future__ import annotations

import hashlib
import importlib.util
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeflash.complaint import complaint
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.floors import Floors
from edgeflash.roles import Method
from edgeflash.shelf import make

OWN = ("name", "teacher", "base", "seed", "weights", "licence")  # keys outside all tables
TABLES = ("data", "sampling", "floors")
SHAPES = 20_000  # rendered where nobody says how many


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Table):
    """Where the captioned pictures come from."""

    kind: Literal["shapes", "folder", "shards"] = "shapes"
    path: str | None = Field(
        None, description="folder, or shard pattern like 'data/{000..009}.tar'"
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="how many are used at the most; none: all there are, of shapes 20000",
    )
    size_px: int = Field(
        64,
        ge=8,
        description="side of the square pictures; where nothing is said, of folder and shards as "
        "the teacher draws them",
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> Data:
        if (self.path is None) != (self.kind == "shapes"):
            raise ValueError("path goes with kind = 'folder' or 'shards', and only with them")
        return self

    @property
    def most(self) -> int | None:
        """How many samples are used at the most; None: all there are."""
        return self.samples or (SHAPES if self.kind == "shapes" else None)


class StageSpec(_Table):
    """One stage: the method's name, and its options as the method itself declares them."""

    model_config = ConfigDict(frozen=True, extra="allow")
    by: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Sampling(_Table):
    """How the finished student samples: written into its folder."""

    steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(
        (1, 2, 4), description="step counts to ship schedules for"
    )
    default_steps: int = 4
    timesteps: tuple[tuple[int, ...], ...] | None = Field(
        None,
        description="the noisiest first, in place of those where the sampler stops in as many "
        "steps; pipelines of diffusers must be told them",
    )
    guidance: Literal["none", "cfg", "embedded"] = Field(
        "none", description="embedded: of students that are told it, as lcm.w_embedding makes them"
    )
    guidance_scale: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Sampling:
        if self.default_steps not in self.steps:
            raise ValueError(f"default_steps {self.default_steps} is not one of {self.steps}")
        counts = [len(grid) for grid in self.timesteps or ()]
        if len(counts) != len({*counts}):
            raise ValueError("timesteps: two grids of as many steps: leave one out")
        for grid in self.timesteps or ():
            if len(grid) not in self.steps:
                raise ValueError(f"timesteps {[*grid]}: {len(grid)} is not one of {self.steps}")
        if self.guidance == "none" and self.guidance_scale != 1:
            raise ValueError("guidance_scale needs guidance = 'cfg' or 'embedded'")
        return self


class Recipe(_Table):
    """A whole recipe, frozen."""

    name: str
    teacher: str | None = Field(
        None, description="diffusers folder, single-file checkpoint, hub id, or 'embedded'"
    )
    base: str | None = Field(
        None, description="what the student starts from, named likewise; default the teacher"
    )
    seed: int = Field(0, ge=0)
    weights: Literal["fp32", "fp16"] = Field("fp32", description="how the student is stored")
    licence: str | None = Field(None, description="licence of the weights that come out")
    data: Data = Data()
    stage: tuple[StageSpec, ...] = Field(min_length=1)
    sampling: Sampling | None = None
    floors: Floors = Field(
        {}, description="of the student's exports, where --floor says nothing; see edgeflash.floors"
    )

    def methods(self) -> list[Method]:
        """The stages as methods with every option resolved."""
        return [make(Method, stage.by, stage.options) for stage in self.stage]

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain data: what ``--dry-run`` prints."""
        plain = self.model_dump(mode="json", exclude_none=True)
        stages = zip(self.stage, self.methods(), strict=True)
        plain["stage"] = [
            {"by": s.by} | m.model_dump(mode="json", exclude_none=True) for s, m in stages
        ]
        return plain

    @property
    def sha256(self) -> str:
        """Identity of the recipe as written, defaults left out."""
        text = self.model_dump_json(exclude_defaults=True)
        return hashlib.sha256(text.encode()).hexdigest()


def at_default(options: BaseModel) -> dict[str, Any]:
    """Those of some options that have their default."""
    others = options.model_dump(mode="json", exclude_defaults=True)
    told = options.model_dump(mode="json", exclude_none=True)
    return {key: value for key, value in told.items() if key not in others}


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        EdgeflashError: not there, not TOML, or a key or value that is not known.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EdgeflashError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeflashError(f"{path}: not TOML: {error}") from None
    return recipe_of(data, str(path))


def recipe_of(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data; ``where`` it came from goes into the complaint.

    Raises:
        EdgeflashError: a key or value that is not known.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise complaint(error, Recipe, where) from None


def changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """A recipe with some keys set anew.

    Args:
        recipe: what to start from.
        given: ``data.samples`` sets a table's key, ``lcm.steps`` a stage's, ``steps`` all stages',
            and ``name``, ``teacher`` and the like the recipe's own.

    Raises:
        EdgeflashError: no such table, stage or key.
    """
    plain = recipe.model_dump(exclude_unset=True, mode="json") | {"name": recipe.name}
    for key, value in given.items():
        table, _, field = key.rpartition(".")
        if key.startswith("floors."):  # int8.L4.psnr_db is one name
            table, _, field = key.partition(".")
        stages = [s for s in plain["stage"] if table in ("", s["by"])]
        if key in (*TABLES, "stage"):
            raise EdgeflashError(f"--set {key}: is a table; set one of its keys: {key}.KEY=…")
        if not table and key in OWN:
            plain[key] = value
        elif table in TABLES:
            plain[table] = plain.get(table, {}) | {field: value}
        elif not table and get_close_matches(key, OWN, 1, 0.8):
            raise unknown("key of a recipe", key, OWN)
        elif stages:
            for stage in stages:
                stage[field] = value
        else:
            known = [*TABLES, *(stage["by"] for stage in plain["stage"])]
            raise unknown(f"table or stage in this recipe for --set {key}:", table, known)
    return recipe_of(plain, "the command line")


def sized(recipe: Recipe, teacher: Path | None) -> Recipe:
    """The recipe with pictures as large as its teacher's, where it says nothing of their size.

    Raises:
        EdgeflashError: the teacher cannot be opened, or its pictures are not square.
    """
    from edgeflash.student import Student

    data = recipe.data
    if data.kind == "shapes" or "size_px" in data.model_fields_set or not teacher:
        return recipe
    student = Student.open(teacher)
    height, width = student.family.size(student)
    if height != width:
        raise EdgeflashError(
            f"{teacher}: draws {width} x {height}, and pictures are square: say [data] size_px"
        )
    return recipe.model_copy(update={"data": data.model_copy(update={"size_px": height})})


def find_recipe(name: str) -> Path:
    """A recipe file by its path, or a shipped one by its name.

    Raises:
        EdgeflashError: neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in recipes_folder().glob("*.toml")}
    if name not in shipped:
        raise unknown("recipe file or shipped recipe", name, shipped)
    return shipped[name]


def recipes_folder() -> Path:
    """Where the shipped recipes lie; found without importing the room, which loads torch."""
    spec = importlib.util.find_spec("edgeflash.distill")
    assert spec is not None and spec.origin
    return Path(spec.origin).parent / "recipes"
