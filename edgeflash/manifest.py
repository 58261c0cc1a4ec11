"""`edgeflash.json` of a student or a bundle, as far as both share it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError

FORMAT_VERSION = 4  # the newest that is read


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The JSON of `edgeflash.json`, after the checks that every kind of folder shares."""
    path = folder / MANIFEST
    if not path.is_file():
        raise EdgeflashError(f"{folder}: no {kind} folder ({MANIFEST} is missing)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EdgeflashError(f"{path}: not readable as JSON ({error}); export it again") from None
    version = data.get("format_version", 0) if isinstance(data, dict) else 0
    if not isinstance(version, int):
        raise EdgeflashError(f"{path}: format_version {version!r} is no number; export it again")
    if version > FORMAT_VERSION:
        raise EdgeflashError(
            f"{path}: format {version} is newer than this edgeflash reads ({FORMAT_VERSION}): "
            "pip install -U edgeflash"
        )
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise EdgeflashError(f"{path}: is a {found}, not a {kind}")
    return data


def parse_manifest(model: type[Any], data: dict[str, Any], folder: Path) -> Any:
    """``model.model_validate(data)``, its complaint as one line that names the field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        said = f"field {field}: " * bool(field) + first["msg"].removeprefix("Value error, ")
        raise EdgeflashError(f"{folder / MANIFEST}: {said}") from None
