"""Options that several commands have, and what people write behind them as values."""

from __future__ import annotations

import math
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeflash.errors import EdgeflashError, unknown

if TYPE_CHECKING:
    from edgeflash.bundle import Bundle
    from edgeflash.lora import Lora
    from edgeflash.recipe import Recipe
    from edgeflash.roles import Runtime


def finite(value: float | None) -> float | None:
    """Refuses NaN and infinity, which pass every range."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="An option of edgeflash list NAME; may be repeated."
    ),
]
SetRecipe = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Of the recipe: steps=9, lcm.steps=9, data.samples=50."
    ),
]
Floors = Annotated[
    list[str] | None,
    typer.Option("--floor", help="Least that passes: L4.psnr_db=30, int8.psnr_db=22."),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="To draw; may be repeated.")]
Recorded = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="To calibrate and prove it with; may be repeated."),
]
On = Annotated[str | None, typer.Option(help="Runtime; default: the bundle's own.")]


def typed(folder: Path | None = None) -> str:
    """The command line as it was typed, for the record; of ``folder`` its name alone."""
    words = [folder.name if folder and word == str(folder) else word for word in sys.argv[1:]]
    return shlex.join(["edgeflash", *words])


def read_options(sets: list[str] | None, flag: str = "--set") -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values as TOML writes them, or plain text."""
    options: dict[str, Any] = {}
    for pair in sets or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise EdgeflashError(f"{flag} {pair}: write it as NAME=VALUE")
        try:
            options[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[name] = text
    return options


def with_precision(to: str, precision: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a target with what ``--precision`` says; auto leaves them as they are.

    Raises:
        EdgeflashError: no precision of that target, or ``--set`` says another one.
    """
    from edgeflash.choice import precisions

    if precision not in (known := (*precisions(to), "auto")):
        raise unknown("--precision", precision, known)
    if precision == "auto":
        return options
    if (other := options.get("precision", precision)) != precision:
        raise EdgeflashError(
            f"--precision {precision} and --set precision={other}: leave one of them out"
        )
    return {"precision": precision} | options


def read_floors(pairs: list[str] | None) -> dict[str, float]:
    """``METRIC=NUMBER`` pairs."""
    floors = read_options(pairs, "--floor")
    for name, value in floors.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise EdgeflashError(f"--floor {name}={value}: the value must be a number")
    return floors


def finite_number(text: str) -> float:
    """Raises ValueError where it is none."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def read_loras(given: list[str] | None) -> tuple[Lora, ...]:
    """``FILE`` or ``FILE=SCALE``; of a folder, the file in it that diffusers looks for."""
    from edgeflash.lora import Lora
    from edgeflash.shelf import require
    from edgeflash.weights import check_weights

    found = []
    for text in given or []:
        require("--lora", ["peft"])
        name, equals, number = text.rpartition("=")
        if not equals or Path(text).exists():
            name, number = text, "1"
        try:
            found.append(Lora(Path(name), finite_number(number)))
        except ValueError:
            raise EdgeflashError(f"--lora {text}: write it as FILE or FILE=SCALE") from None
        if not found[-1].file.is_file():
            raise EdgeflashError(f"--lora {found[-1].file}: no such file")
        check_weights(found[-1].file)
    for lora in found:
        if [each.file for each in found].count(lora.file) > 1:
            raise EdgeflashError(f"--lora {lora.file}: is given twice; give it once, with the sum")
    return tuple(found)


def read_counts(text: str | None) -> tuple[int, ...] | None:
    """``1,2,4``; None stays None."""
    if text is None:
        return None
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise EdgeflashError(f"--steps {text}: write numbers of 1 or more with commas, as in 1,2,4")
    return counts


def read_size(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``512x768`` as (height, width); None stays None."""
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise EdgeflashError(f"--size {text}: write one side or HEIGHTxWIDTH, as in 512 or 512x768")
    return sides[0], sides[-1]


def read_recipe(
    name: str | None, by: list[str], teacher: str | None, data: Path | None, sets: list[str]
) -> Recipe:
    """The recipe of a file, or one made of ``--by``, with the command line's changes in it."""
    from edgeflash import recipe

    if (not name) == (not by):
        raise EdgeflashError("say either a recipe or --by METHOD: edgeflash distill shapes")
    plain: dict[str, Any] = {"name": "-".join(by), "stage": [{"by": method} for method in by]}
    made = recipe.read_recipe(recipe.find_recipe(name)) if name else recipe.recipe_of(plain, "--by")
    given: dict[str, Any] = {"teacher": teacher} if teacher else {}
    if data:
        shards = data.suffix == ".tar" or "{" in data.name
        given |= {"data.kind": "shards" if shards else "folder", "data.path": str(data)}
    return recipe.changed(made, given | read_options(sets))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """A recipe with every default filled in, but the size of a teacher that is no folder yet."""
    from edgeflash.embedded import embedded, located
    from edgeflash.recipe import sized

    named = recipe.teacher or recipe.base or ""
    folder = embedded("shapes-teacher") if named == "embedded" else Path(named)
    if named and not folder.is_file() and (folder := located(folder)).is_dir():
        return sized(recipe, folder).resolved()
    plain = recipe.resolved()
    if recipe.data.kind != "shapes" and "size_px" not in recipe.data.model_fields_set:
        del plain["data"]["size_px"]
    return plain


def read_runtime(name: str | None, bundle: Bundle, sets: list[str] | None) -> Runtime:
    """The runtime of that name, or the bundle's own, with its options set."""
    from edgeflash.roles import Runtime
    from edgeflash.shelf import make

    return make(Runtime, own_runtime(bundle) if name is None else name, read_options(sets))


def own_runtime(bundle: Bundle) -> str:
    """The name of the runtime that opens what the bundle holds."""
    from edgeflash.shelf import opener

    return opener(bundle.manifest.components[0].target)
