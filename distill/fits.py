"""Whether a recipe's methods can teach what its teacher and base are, asked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeflash import shelf
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Recipe
from edgeflash.roles import Method
from edgeflash.student import Student


def check_kind(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Refuses what would only fail when the student is put together.

    Raises:
        EdgeflashError: teacher and base of two families, or a method that does not know theirs, or
            not what its denoisers see.
    """
    _check_families(recipe, folders)
    _check_conditions(recipe, folders)


def _check_families(recipe: Recipe, folders: Sequence[Path]) -> None:
    names = sorted({Student.unfinished(folder).family.name for folder in folders})
    if len(names) > 1:
        raise EdgeflashError(
            f"teacher and base: are of the families {' and '.join(names)}, which do not hear "
            "prompts alike: choose two of one"
        )
    for spec, method in zip(recipe.stage, recipe.methods(), strict=True):
        if method.families and not set(names) <= set(method.families):
            raise EdgeflashError(
                f"method {spec.by!r} makes parts of {', '.join(method.families)} alone, not of "
                f"{names[0]}: leave it out; {names[0]} is taken by {', '.join(_takers(names[0]))}"
            )


def _check_conditions(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Refuses methods that show a denoiser nothing but x_t where it sees more."""
    students = map(Student.unfinished, folders)
    seeing = next((s for s in students if s.family.conditions(s)), None)
    seen = seeing.family.conditions(seeing) if seeing else ()
    if seeing and any(each.kind == "image" and each.enlarges is None for each in seen):
        raise EdgeflashError(
            f"{seeing.folder}: its denoiser changes a picture that it sees, and no data here have "
            "two of each: it can be exported and run, but teaches nobody so far"
        )
    for spec, method in zip(recipe.stage, recipe.methods(), strict=True):
        if seeing and not method.conditioned:
            raise EdgeflashError(
                f"{seeing.folder}: its denoiser sees a picture beside x_t, which method "
                f"{spec.by!r} does not show it so far: choose another, such as lcm"
            )


def _takers(family: str) -> list[str]:
    """The methods that make parts of a family."""
    methods = {name: shelf.find(Method, name, check=False) for name in shelf.names(Method)}
    return [n for n, m in methods.items() if not m.families or family in m.families]
