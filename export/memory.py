"""What an export will take of the memory, before it starts: estimates, and where they end.

A component is loaded in float32, mapped where its file holds that; the rest comes on top as bytes
for each of its numbers, by what is made of them. The factors are estimates: the float32 one comes
from SDXS-512 (2.2 GiB for 340 million numbers of its text encoder, `export_full_size.py`), the
others from what each way keeps at once; `export_full_size.py` tells by how much they are off. So
they refuse only what is beyond all of the machine, and warn of what is beyond the free part.

What results take while a network runs is told from its layers (`edgeflash/work.py`). How much more
a runtime holds than that, `ARENA`, is measured in ONNX Runtime alone: whole exports of BK-SDM-Tiny
and Stable Diffusion 1.5 (export/README.md) fit 2.65 and 2.64 at their UNets; `AutoencoderKL`'s
decoder by itself, at 256 px, took 2.68.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edgeflash.errors import EdgeflashError
from edgeflash.machine import available_bytes, installed_bytes
from edgeflash.roles import Target
from edgeflash.shelf import target_name
from edgeflash.student import Student

from .hashing import home_of

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
BY_EXTREMES = 6.5  # int8 of "minmax" in ONNX: weights are mapped; 6.1 for SDXS-512's UNet, 512 px
RUN = {"fp32": 4.0, "fp16": 5.5, "bf16": 5.5}  # bytes of a number in a loaded session
RUN_ELSE = 5.0  # one, and in float32 what of it is not multiplied as it is
ARENA = 2.65  # bytes that a session takes of every byte of results alive at once
SMALL_PX = 2**16  # of pictures, up to which what small networks make is nothing to count
MORE = {"onnx": 0.0, "tensorrt": 0.0}  # bytes of a number that converters hold besides
LESS_PX = "choose a smaller --size, or a machine with more memory"
CONVERTED = 2.0  # others: not measured; a copy in halves


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
    if to in MORE and (precision, getattr(target, "ranges", "")) == ("int8", "minmax"):
        each = BY_EXTREMES
    numbers = numbers_of(student, component)
    return (BASE_BYTES if numbers > APART_NUMBERS else 0) + numbers * each


def check_size(student: Student, size: tuple[int, int]) -> None:
    """Refuses pictures of (height, width) px that not even the decoder's last layers have room for.

    Raises:
        EdgeflashError: what one layer takes and gives, at the pictures' own size, exceeds this
            machine.
    """
    config, most = student.config("vae"), installed_bytes()
    widths = config.get("decoder_block_out_channels") or config.get("block_out_channels") or [1]
    wanted = 2 * 4 * widths[0] * math.prod(size)
    if most is not None and wanted > most:
        raise EdgeflashError(
            f"{student.folder}: the decoder would take some {wanted / GIB:,.0f} GiB of memory for "
            f"{size[0]}x{size[1]} px (an estimate), {most / GIB:.1f} GiB is all there is: choose a "
            "smaller --size"
        )


def check_running(
    student: Student,
    target: Target,
    components: Sequence[str],
    size: tuple[int, int],
    console: Console,
) -> None:
    """Whether there is room to draw with every component, as the ladder does in this process.

    ``components``: of the bundle; ``size``: of its pictures, (height, width) in px.

    Raises:
        EdgeflashError: this machine has not that much; warns where it is not free now.
    """
    from edgeflash.work import alive_bytes  # torch, which a refused command need not have

    wanted = {}
    for name in _large_ones(student, components, size):
        weights = numbers_of(student, name) * RUN.get(target.precision_of(name), RUN_ELSE)
        text = name in student.family.text_encoders  # whose results are nothing beside its weights
        results = 0 if text else alive_bytes(student, name, size)
        wanted[name] = BASE_BYTES + weights + ARENA * results
    _hold(student, wanted, size, "to run", console)


def check_taught(
    student: Student, components: Sequence[str], size: tuple[int, int], console: Console
) -> None:
    """Whether there is room to backpropagate through denoiser and decoder, one picture at a time.

    Raises:
        EdgeflashError: this machine has not that much; warns where it is not free now.
    """
    from edgeflash.work import taught_bytes

    wanted = {
        name: BASE_BYTES + 4.0 * numbers_of(student, name) + taught_bytes(student, name, size)
        for name in _large_ones(student, components, size)
        if name not in student.family.text_encoders
    }
    _hold(student, wanted, size, "to backpropagate through", console)


def _large_ones(student: Student, components: Sequence[str], size: tuple[int, int]) -> list[str]:
    """Those of the family's whose results are worth counting."""
    whole = student.family.components(encoder=True)
    every = math.prod(size) > SMALL_PX
    return [n for n in whole if n in components and (every or large(student, [n]))]


def _hold(
    student: Student, wanted: dict[str, float], size: tuple[int, int], what: str, console: Console
) -> None:
    """Holds the largest of some estimates against what there is."""
    have, most = available_bytes(), installed_bytes()
    if have is None or most is None or not wanted:
        return
    name = max(wanted, key=lambda name: wanted[name])
    said = (
        f"{student.folder}: {name} would take some {wanted[name] / GIB:.1f} GiB of memory {what} "
        f"at {size[0]}x{size[1]} px (an estimate), "
    )
    if wanted[name] > most:
        raise EdgeflashError(f"{said}{most / GIB:.1f} GiB is all there is: {LESS_PX}")
    if wanted[name] > have:
        told = f"{said}{have / GIB:.1f} GiB are free: {LESS_PX}"
        console.print(told, markup=False, highlight=False)


def check(student: Student, target: Target, components: Sequence[str], console: Console) -> int:
    """Whether there is room for every component by itself; warns where it is not free now.

    ``components``: that are still to be made. Returns how many of the largest ones may be at work
    at a time, 1 or 2.

    Raises:
        EdgeflashError: this machine has not that much; tells how much it takes, and what does less.
    """
    have, most = available_bytes(), installed_bytes()
    wanted = {name: estimate(student, target, name) for name in components}
    if have is None or most is None or not wanted:
        return 1
    name = max(wanted, key=lambda name: wanted[name])
    said = (
        f"{student.folder}: {name} would take some {wanted[name] / GIB:.1f} GiB of memory to "
        f"lower to {target.precision_of(name)} (an estimate), "
    )
    if wanted[name] > most:
        said += f"{most / GIB:.1f} GiB is all there is: {instead(student, target, name, most)}"
        raise EdgeflashError(said)
    if wanted[name] > have:
        said += f"{have / GIB:.1f} GiB are free: {instead(student, target, name, have)}"
        console.print(said, markup=False, highlight=False)
    return 2 if sum(sorted(wanted.values())[-2:]) <= have else 1


def less(student: Student, target: Target, name: str) -> str:
    """What to do where a component was too much."""
    return instead(student, target, name, estimate(student, target, name))


def instead(student: Student, target: Target, name: str, below: float) -> str:
    """What takes less than so many bytes, where anything does."""
    others = {}
    for precision in BYTES:
        asked = target.model_dump(exclude=set(type(target).idle(precision)))
        try:
            other = type(target).model_validate(asked | {"precision": precision})
        except ValueError:  # not one of this target's
            continue
        others[precision] = estimate(student, other, name)
    fitting = [precision for precision, wanted in others.items() if wanted < below]
    if fitting:
        return f"choose --precision {' or '.join(fitting)}, or free some memory"
    return "free some memory, or export on a larger machine"
