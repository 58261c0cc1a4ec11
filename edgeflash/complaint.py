"""What pydantic finds wrong with a file or with options, in one line and in our own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from edgeflash.errors import EdgeflashError, did_you_mean, unknown

EXPECTED = {  # type of pydantic's error -> what must stand there
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "too_short": "a list of at least {min_length}",
}
KINDS = ("int", "float", "str", "bool")  # what pydantic adds to a place where either may stand
KEY = "[key]"  # what it adds where not the value is wrong but its key
SHOWN = 60  # letters of what was found there; more than that tells nobody anything
Place = tuple[int | str, ...]


def complaint(
    error: ValidationError, model: type[BaseModel], where: str, kind: str = "key"
) -> EdgeflashError:
    """The first thing that is wrong: which key, where, what is expected, and the nearest name.

    Keys that are not known come first: a mistyped one may also be missed under its right name.

    Args:
        error: as validating ``model`` raised it.
        model: what the file or the options are.
        where: the file, or what has the options.
        kind: what its keys are called.
    """
    errors = error.errors()
    strange = [each for each in errors if each["type"] == "extra_forbidden"]
    first = (strange or errors)[0]
    place = _place(first["loc"])
    if strange:
        return _unknown(kind, where, place, _table(model, place[:-1]).model_fields)
    if KEY in place:
        place = place[: place.index(KEY)]
        if names := _names(first):
            return _unknown(kind, where, place, names)
        return EdgeflashError(f"{where}: {_dotted(place)}: this key must be {_expected(first)}")
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        said = "is missing"
    elif first["type"] in EXPECTED or first["type"] == "literal_error":
        same = [each for each in errors if _place(each["loc"]) == place]
        must = " or ".join(dict.fromkeys(map(_expected, same)))
        hint = did_you_mean(str(first["input"]), [n for each in same for n in _names(each)])
        found = repr(first["input"])
        equals = f" = {found}" if len(found) <= SHOWN else ""
        return EdgeflashError(f"{where}: {_dotted(place)}{equals}: must be {must}{hint}")
    return EdgeflashError(": ".join(filter(None, (where, _dotted(place), said))))


def _unknown(kind: str, where: str, place: Place, known: Sequence[str] | Any) -> EdgeflashError:
    *table, key = place
    inside = f" [{_dotted(tuple(table))}]" if table else ""
    return unknown(f"{kind} in {where}{inside}:", str(key), known)


def _expected(error: Any) -> str:
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return f"one of {', '.join(_names(error)) or context['expected']}"
    if error["type"] == "tuple_type" and isinstance(error["input"], dict):
        return "a list of tables, [[…]] in TOML"
    if error["type"] == "tuple_type" and isinstance(error["input"], str | int | float):
        found = error["input"]
        parts = [part.strip() for part in found.split(",")] if isinstance(found, str) else [found]
        return f"a list, as in {json.dumps(parts)}"
    must = EXPECTED.get(error["type"])
    return must.format(**context) if must else str(error["msg"])


def _names(error: Any) -> list[str]:
    """The texts that may stand there, where these are few."""
    expected = error.get("ctx", {}).get("expected", "") if error["type"] == "literal_error" else ""
    return re.findall(r"'([^']*)'", expected)


def _place(loc: Place) -> Place:
    while len(loc) > 1 and loc[-1] in KINDS:
        loc = loc[:-1]
    return loc


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _table(model: type[BaseModel], place: Place) -> type[BaseModel]:
    """The model that a place within another belongs to; numbers and keys of tables lead nowhere."""
    for step in place:
        field = model.model_fields.get(str(step))
        model = (field and _within(field.annotation)) or model
    return model


def _within(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation speaks of, as list, optional or in a table."""
    if isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_within, get_args(annotation))), None)


@contextmanager
def wrong_types(folder: Path) -> Iterator[None]:
    """Where configs of a folder are read: what breaks on a value of a wrong type is one line."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise EdgeflashError(
            f"{folder}: a config in it holds a value that it cannot ({told}): copy or download the "
            "folder again"
        ) from None
