"""Engines built where they run, each kept under all that it is bound to.

An engine lies beside a JSON file that says what it was built for, so that a machine on which none
fits can tell what there was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeflash.bundle import Component, Engine
from edgeflash.disk import write_atomic
from edgeflash.engine import ENGINE, shape_of
from edgeflash.gpu import Gpu


class Key(BaseModel):
    """What an engine is bound to: with another value of any of these it is built again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    files: tuple[str, ...]  # sha256 of the ONNX file and its weights
    precision: str
    vendor: str
    version: str
    gpu: str
    capability: str
    driver: str
    shapes: dict[str, tuple[tuple[int, ...], ...]]  # of the inputs: least, best, most
    options: dict[str, Any]

    def __str__(self) -> str:
        machine = ", ".join(filter(None, (self.gpu, f"compute capability {self.capability}")))
        return f"{self.vendor} {self.version}, {machine}, CUDA driver {self.driver}"

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"{self.component}-{digest[:16]}"


def key_of(component: Component, engine: Engine, version: str, gpu: Gpu) -> Key:
    """The key of an engine of this component for this machine.

    What an engine is built to be compatible with is left open: the GPU's name, its compute
    capability above 8.0, the vendor's minor version.
    """
    flags = ("tf32", "refit", "weight_streaming", "version_compatible", "hardware")
    return Key(
        component=component.name,
        files=tuple(f.sha256 for f in component.files if not f.path.endswith(ENGINE)),
        precision=component.precision,
        vendor=engine.vendor,
        version=version.partition(".")[0] if engine.version_compatible else version,
        gpu=gpu.name if engine.hardware == "this" else "",
        capability="8.0 and later" if engine.hardware == "ampere_plus" else gpu.capability,
        driver=gpu.driver,
        shapes={s.name: tuple(shape_of(s, n) for n in engine.rows) for s in component.inputs},
        options=engine.model_dump(include={*flags, "optimization_level"}),
    )


def folder_of(cache_dir: str) -> Path:
    """Where engines are kept: ``cache_dir``, or the user's own cache when that is empty."""
    own = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_dir or f"{own}/edgeflash/engines").expanduser()


def path_of(folder: Path, key: Key) -> Path:
    """Where the engine of that key lies, or would."""
    return folder / f"{key.name}{ENGINE}"


def keep(folder: Path, key: Key, made: Any) -> Path:
    """Writes a serialized engine, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, key)
    write_atomic(path, made)
    write_atomic(path.with_suffix(".json"), key.model_dump_json(indent=1) + "\n")
    return path


def others(folder: Path, key: Key) -> Iterator[Key]:
    """Keys of engines that are kept of the same component, built for something else."""
    for path in sorted(folder.glob(f"{key.component}-*.json")):
        try:
            found = Key.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            continue  # of another version of edgeflash
        if found.files == key.files and found != key:
            yield found
