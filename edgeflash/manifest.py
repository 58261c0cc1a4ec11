"""`edgeflash.json` of a student or a bundle, as far as both share it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeflash.complaint import complaint
from edgeflash.disk import MANIFEST
from edgeflash.embedded import located, meant
from edgeflash.errors import EdgeflashError

FORMAT_VERSION = 4  # the newest that is read
MODEL_INDEX = "model_index.json"  # of diffusers folders
EXPORT = "; export it first: edgeflash export {} --to onnx --out bundle"


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The JSON of `edgeflash.json`, after the checks that every kind of folder shares."""
    path = folder / MANIFEST
    if not path.is_file():
        why = "is a file" if folder.is_file() else "not there"
        why = f"{MANIFEST} is missing" if folder.is_dir() else why
        raise EdgeflashError(f"{folder}: no {kind} folder ({why}){_instead(folder, kind)}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EdgeflashError(f"{path}: not readable as JSON ({error}); export it again") from None
    version = data.get("format_version") if isinstance(data, dict) else 1
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise EdgeflashError(f"{path}: format_version {version!r} is none; export it again")
    if version > FORMAT_VERSION:
        raise EdgeflashError(
            f"{path}: format {version} is newer than this edgeflash reads ({FORMAT_VERSION}): "
            "pip install -U edgeflash"
        )
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        then = EXPORT.format(folder) if (found, kind) == ("student", "bundle") else ""
        raise EdgeflashError(f"{path}: is a {found}, not a {kind}{then}")
    return data


def _instead(folder: Path, kind: str) -> str:
    """What to do where a folder is no student or bundle: the end of the line, or ""."""
    if folder.is_file():
        return ""
    if kind == "bundle" and (located(folder) / MODEL_INDEX).is_file():
        return EXPORT.format(folder)
    return "" if folder.exists() else meant(folder)


def parse_manifest(model: type[Any], data: dict[str, Any], folder: Path) -> Any:
    """``model.model_validate(data)``, its complaint as one line that names the key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise complaint(error, model, str(folder / MANIFEST)) from None
