"""The files of weights in a component's folder, and whether they are whole: they are not read."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from edgeflash.disk import read_json
from edgeflash.errors import EdgeflashError


@dataclass(frozen=True)
class Weights:
    """The weight files of one component, and the variant (fp16, ...) to ask diffusers for."""

    files: tuple[Path, ...]
    variant: str | None


def check_weights(path: Path) -> None:
    """Whether a safetensors file is as long as its header says.

    Raises:
        EdgeflashError: missing, truncated, or no safetensors file.
    """
    if not path.is_file():
        raise EdgeflashError(f"{path}: missing: copy or download the folder again")
    if path.suffix != ".safetensors":
        return
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise EdgeflashError(f"{path}: no safetensors file, or truncated ({size} bytes)")
        try:
            tensors = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise EdgeflashError(f"{path}: no safetensors file (unreadable header)") from None
    ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
    if (expected := 8 + length + max(ends, default=0)) != size:
        raise EdgeflashError(
            f"{path}: {size} bytes where its header says {expected}: truncated or altered; copy or "
            "download it again"
        )


def find_weights(home: Path, stem: str) -> Weights | None:
    """Weights called ``stem``: whole before shards, plain before variants."""
    pattern = re.compile(
        rf"{stem}(\.(?P<before>[\w-]+?))?\.(?P<kind>safetensors|bin)"
        r"(?P<shards>\.index(\.(?P<after>[\w-]+))?\.json)?"
    )
    found = []
    for path in sorted(home.iterdir()) if home.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            variant = match["before"] or match["after"]
            if not re.search(r"-\d{5}-of-\d{5}$", variant or ""):
                rank = (variant is not None, match["kind"] == "bin", bool(match["shards"]))
                found.append((rank, path, variant))
    if not found:
        return None
    _, path, variant = min(found, key=lambda item: item[0])
    if path.suffix == ".json":
        shards = sorted(set(read_json(path)["weight_map"].values()))
        return Weights(tuple(home / shard for shard in shards), variant)
    return Weights((path,), variant)
