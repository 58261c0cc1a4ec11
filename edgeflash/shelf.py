"""Finds a plug-in by its file name: ``by_lcm`` is `distill/by_lcm.py`. There is no list to edit."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from edgeflash.errors import EdgeflashError, unknown
from edgeflash.roles import Method, Plugin, Runtime, Target

P = TypeVar("P", bound=Plugin)

SHELVES: dict[type[Plugin], tuple[str, str]] = {  # role -> room, prefix of its files
    Method: ("distill", "by_"),
    Target: ("export", "to_"),
    Runtime: ("runtimes", "on_"),
}
EXTRAS = {  # package -> the extra of edgeflash that brings it
    "torch": "distill",
    "diffusers": "distill",
    "transformers": "distill",
    "accelerate": "distill",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "onnx",
    "tensorboard": "distill",
    "webdataset": "distill",
    "coremltools": "coreml",
    "nncf": "openvino",
    "tensorrt_rtx": "tensorrt-rtx",
}


def names(role: type[Plugin]) -> list[str]:
    """What stands on a shelf, by file name, without importing any of it."""
    room, prefix = SHELVES[role]
    spec = importlib.util.find_spec(f"edgeflash.{room}")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.py"))


def missing(plugin: type[Plugin]) -> list[str]:
    """The packages a plug-in needs that are not installed here."""
    return [name for name in plugin.needs if importlib.util.find_spec(name) is None]


def find(role: type[P], name: str, *, check: bool = True) -> type[P]:
    """The class in the file of that name.

    Args:
        role: `Method`, `Target` or `Runtime`.
        name: file name without the prefix.
        check: refuse when a needed package is missing.

    Raises:
        EdgeflashError: no such plug-in (with the nearest name), or a missing package (with the
            line that installs it).
    """
    room, prefix = SHELVES[role]
    if name not in names(role):
        raise unknown(role.__name__.lower(), name, names(role))
    if check:
        _require(role, name, role)  # methods all need torch, and import it at their top
    module = importlib.import_module(f"edgeflash.{room}.{prefix}{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, role)
        and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} holds {len(found)} {role.__name__} classes, not one"
    if check:
        _require(found[0], name, role)
    return found[0]


def _require(plugin: type[Plugin], name: str, role: type[Plugin]) -> None:
    if lacking := missing(plugin):
        extras = sorted({EXTRAS.get(package, package) for package in lacking})
        raise EdgeflashError(
            f"{role.__name__.lower()} {name!r} needs {', '.join(lacking)}: "
            f"pip install 'edgeflash[{','.join(extras)}]'"
        )


def make(role: type[P], name: str, options: dict[str, Any], **kwargs: bool) -> P:
    """A plug-in with its options set; a bad option is one line with the nearest name."""
    plugin = find(role, name, **kwargs)
    return validated(plugin, options, f"{role.__name__.lower()} {name!r}")


def validated(model: type[P], options: dict[str, Any], where: str) -> P:
    """``model(**options)`` with pydantic's complaint turned into one line."""
    try:
        return model(**options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown(f"option in {where}:", field, model.model_fields) from None
        raise EdgeflashError(f"{where}: {field} = {first['input']!r}: {first['msg']}") from None


def opener(target: str) -> str:
    """The name of the runtime that opens what a target writes.

    Raises:
        EdgeflashError: none here does.
    """
    for name in names(Runtime):
        if target in find(Runtime, name, check=False).opens:
            return name
    raise EdgeflashError(f"no runtime here opens what target {target!r} writes")
