"""Whether files of weights are whole, as far as their size tells: they are not read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from edgeflash.errors import EdgeflashError


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
