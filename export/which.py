"""Which components a precision is for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator

from edgeflash.bundle import ANSWER
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.roles import Target

FLOATS = ("fp32", "fp16", "bf16")


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in ANSWER:
            raise ValueError(unknown("component", name, ANSWER))
    return names


Components = Annotated[tuple[str, ...], AfterValidator(_known)]


def check_quantized(target: Target, components: Collection[str]) -> None:
    """Raises where a precision is asked for that none of a student's components gets."""
    found = {target.precision_of(name) for name in components}
    if target.precision not in FLOATS and found <= set(FLOATS):
        raise EdgeflashError(
            f"quantized: none of {', '.join(components)} would be in {target.precision}: name one "
            "of them, or choose another precision"
        )
