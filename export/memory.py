"""What an export will take of the memory, before it starts: estimates, and where they end.

A component is loaded in float32, mapped where its file holds that; the rest comes on top as bytes
for each of its numbers, by what is made of them. The factors are estimates: the float32 one comes
from SDXS-512 (2.2 GiB for 340 million numbers of its text encoder, `export_full_size.py`), the
others from what each way keeps at once; `export_full_size.py` tells by how much they are off.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from edgeflash.errors import EdgeflashError
from edgeflash.machine import available_bytes
from edgeflash.roles import Target
from edgeflash.student import Student

from .stages import home_of, target_name

GIB = 2**30
BASE_BYTES = 0.6 * GIB  # Python, torch, diffusers, a vendor's tools; 0.54 with ONNX's
APART_NUMBERS = 2**26  # of a component; from there on, a process of its own pays for its imports
BYTES = {  # of a number, the float32 that torch holds included
    "fp32": 5.0,
    "fp16": 5.5,  # the halves are made one tensor at a time, but checked in float32
    "bf16": 5.5,
    "int8-weights": 5.5,  # one byte more, two where the rest is in halves
    "int4-weights": 9.0,  # the quantizer holds the model
    "int8-dynamic": 9.0,
}
HELD_TWICE = 13.0  # others: the vendor's quantizer holds the model, and a copy that it calibrates
MORE = {"onnx": 0.0}  # bytes of a number that other converters hold besides
CONVERTED = 4.0


def numbers_of(student: Student, component: str) -> int:
    """How many numbers the files of a component hold, as their headers tell."""
    files = student.weights(home_of(student, component)).files
    return sum(_numbers(path) for path in files)


def _numbers(path: Path) -> int:
    if path.suffix != ".safetensors":
        return path.stat().st_size // 4
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        tensors = json.loads(stream.read(length))
    return sum(math.prod(t["shape"]) for name, t in tensors.items() if name != "__metadata__")


def large(student: Student, components: Sequence[str]) -> list[str]:
    """Those that are made in processes of their own."""
    return [name for name in components if numbers_of(student, name) > APART_NUMBERS]


def estimate(student: Student, target: Target, component: str) -> float:
    """Bytes that capturing and lowering a component takes at its peak: an estimate."""
    precision, to = target.precision_of(component), target_name(target)
    each = BYTES.get(precision, HELD_TWICE) + MORE.get(to, CONVERTED)
    return BASE_BYTES + numbers_of(student, component) * each


def check(student: Student, target: Target, components: Sequence[str]) -> int:
    """Whether there is room for every component by itself.

    Returns how many of the largest ones may be at work at a time, 1 or 2.

    Raises:
        EdgeflashError: there is none; tells how much it takes, and what takes less.
    """
    have = available_bytes()
    wanted = {name: estimate(student, target, name) for name in components}
    if have is None:
        return 1
    name = max(wanted, key=lambda name: wanted[name])
    if wanted[name] > have:
        raise EdgeflashError(
            f"{student.folder}: {name} would take some {wanted[name] / GIB:.1f} GiB of memory to "
            f"lower to {target.precision_of(name)} (an estimate), {have / GIB:.1f} GiB are free: "
            f"{_instead(student, target, name, have)}"
        )
    return 2 if sum(sorted(wanted.values())[-2:]) <= have else 1


def _instead(student: Student, target: Target, name: str, have: float) -> str:
    """What takes less, where anything does."""
    others = {}
    for precision in BYTES:
        try:
            other = type(target).model_validate(target.model_dump() | {"precision": precision})
        except ValueError:  # not one of this target's
            continue
        others[precision] = estimate(student, other, name)
    fitting = [precision for precision, wanted in others.items() if wanted <= have]
    if fitting:
        return f"choose --precision {' or '.join(fitting)}, or free some memory"
    return "free some memory, or export on a larger machine"
