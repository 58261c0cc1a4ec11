"""Finds a plug-in by its file name: ``by_lcm`` is `distill/by_lcm.py`. No list names plug-ins."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shlex
from collections.abc import Collection, Iterable
from itertools import chain, combinations
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from edgeflash.complaint import complaint
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.roles import Method, Plugin, Runtime, Target

P = TypeVar("P", bound=Plugin)

SHELVES: dict[type[Plugin], tuple[str, str]] = {  # role -> room, prefix of its files
    Method: ("distill", "by_"),
    Target: ("export", "to_"),
    Runtime: ("runtimes", "on_"),
}
EXTRAS: dict[str, tuple[str, ...]] = {  # extra -> distributions, as in pyproject.toml
    "onnx": ("onnxruntime",),
    "onnx-gpu": ("onnxruntime-gpu",),
    "export": ("torch", "diffusers", "peft", "transformers", "onnx", "onnxscript", "onnxruntime"),
    "distill": (
        "torch",
        "accelerate",
        "diffusers",
        "peft",
        "tensorboard",
        "transformers",
        "webdataset",
    ),
    "openvino": ("openvino",),
    "executorch": ("executorch", "torch", "torchao"),
    "openvino-export": ("openvino", "nncf", "openvino-tokenizers"),
    "coreml": ("coremltools",),
    "coreml-export": ("coremltools", "scikit-learn"),
    "tensorrt": ("tensorrt", "cuda-python"),
    "tensorrt-rtx": ("tensorrt-rtx", "cuda-python"),
}
IMPORTED_AS = {  # others: their own name
    "onnxruntime-gpu": "onnxruntime",
    "cuda-python": "cuda",
    "scikit-learn": "sklearn",
}


def names(role: type[Plugin]) -> list[str]:
    """What stands on a shelf, by file name, without importing any of it."""
    room, prefix = SHELVES[role]
    spec = importlib.util.find_spec(f"edgeflash.{room}")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.py"))


def absent(packages: Iterable[str]) -> list[str]:
    """Those of some packages, by import name, that are not installed here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def missing(plugin: type[Plugin]) -> list[str]:
    """The packages a plug-in needs that are not installed here."""
    return absent(plugin.needs)


def imported_as(distribution: str) -> str:
    """The package that a distribution brings."""
    return IMPORTED_AS.get(distribution, distribution.replace("-", "_"))


def require(what: str, packages: Iterable[str]) -> None:
    """Whether all packages are here.

    Raises:
        EdgeflashError: ``what`` needs one that is not, with the line that installs it.
    """
    if lacking := absent(dict.fromkeys(packages)):
        raise EdgeflashError(f"{what} needs {', '.join(lacking)}: {pip_line(lacking)}")


def pip_line(packages: Collection[str]) -> str:
    """What installs packages, with the fewest extras.

    >>> pip_line(["torch", "onnxscript"])
    "pip install 'edgeflash[export]'"
    """
    brought = {extra: set(map(imported_as, found)) for extra, found in EXTRAS.items()}
    known = {name for found in brought.values() for name in found}.intersection(packages)
    choices = chain.from_iterable(combinations(EXTRAS, n) for n in range(len(EXTRAS) + 1))
    fewest = next(c for c in choices if known <= {name for extra in c for name in brought[extra]})
    ours = [f"edgeflash[{','.join(sorted(fewest))}]"] if fewest else []
    return shlex.join(["pip", "install", *ours, *sorted(set(packages) - known)])


def find(role: type[P], name: str, *, check: bool = True) -> type[P]:
    """The class in the file of that name.

    Args:
        role: `Method`, `Target` or `Runtime`.
        name: file name without the prefix.
        check: refuse when a needed package is missing, and not only one that the file imports.

    Raises:
        EdgeflashError: no such plug-in (with the nearest name), or a missing package (with the
            line that installs it).
    """
    room, prefix = SHELVES[role]
    if name not in names(role):
        raise unknown(role.__name__.lower(), name, names(role))
    what = f"{role.__name__.lower()} {name!r}"
    require(what, role.needs)  # methods all need torch, and import it at their top
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
        require(what, found[0].needs)
    return found[0]


def target_name(target: Target) -> str:
    """What ``--to`` calls it."""
    return type(target).__module__.rpartition(".to_")[2]


def make(role: type[P], name: str, options: dict[str, Any], **kwargs: bool) -> P:
    """A plug-in with its options set; a bad option is one line with the nearest name."""
    plugin = find(role, name, **kwargs)
    return validated(plugin, options, f"{role.__name__.lower()} {name!r}")


def validated(model: type[P], options: dict[str, Any], where: str) -> P:
    """``model(**options)`` with pydantic's complaint turned into one line."""
    try:
        return model(**options)
    except ValidationError as error:
        raise complaint(error, model, where, "option") from None


def opener(target: str) -> str:
    """The name of the runtime that opens what a target writes.

    Raises:
        EdgeflashError: none here does.
    """
    for name in names(Runtime):
        if target in find(Runtime, name, check=False).opens:
            return name
    raise EdgeflashError(f"no runtime here opens what target {target!r} writes")
