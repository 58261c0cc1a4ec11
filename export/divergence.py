"""An operator that goes astray: what is told of it, and which option of the export to try."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edgeflash.parity import BEST_DB, psnr_db
from edgeflash.roles import Array, Target
from edgeflash.shelf import target_name

from .which import FLOATS

LARGEST_HALF = 65504.0
NEVER = 1e30
Call = TypeVar("Call")
WIDER = {"tensorrt": "bf16 or fp32"}  # target -> what has no bounds that matter; others: fp32


@dataclass(frozen=True)
class Divergence:
    """An operator whose output is off, while all before it are not.

    Attributes:
        kind: of the operator, in its format's words.
        operator: its name.
        psnr_db: of its output.
        low: smallest value that the reference has there.
        high: largest.
        overflows: whether something there is not finite.
        product: what ``keep`` calls the product of fewer bits that its values come from, or its
            own; "" if there is none.
    """

    kind: str
    operator: str
    psnr_db: float
    low: float
    high: float
    overflows: bool = False
    product: str = ""

    def remedy(
        self, precision: str, exported: str, target: str = "", keep: Iterable[str] = ()
    ) -> str:
        """What to try, as options that its export takes.

        Args:
            precision: of the component.
            exported: that the export was asked for, of which the component may be the rest.
            target: what it was exported to.
            keep: what it was told to leave alone already.
        """
        if precision == "fp32":
            return "no rounding explains that: export it again"
        rest = exported not in FLOATS and (precision in FLOATS or target != "coreml")
        wider = "--set rest=" if rest else "--precision "
        if self.overflows and max(-self.low, self.high) > LARGEST_HALF:
            return f"its values are beyond float16's 65,504: {wider}{WIDER.get(target, 'fp32')}"
        if precision in FLOATS:
            return f"its sums lose too much in 16 bits: {wider}fp32"
        if self.product:
            return f"leave it alone: --set 'keep={json.dumps([*keep, self.product])}'"
        return "no product is to blame: --precision fp16 or fp32"

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.operator} ({self.psnr_db:.1f} dB, "
            f"values {self.low:.4g} to {self.high:.4g})"
        )


def off(
    kind: str, operator: str, expected: Array, found: Array, floor_db: float
) -> Divergence | None:
    """An operator whose output misses a floor; None where it does not, or is not of floats.

    What masks put for minus infinity, in float32 and in halves, is the same and no overflow.
    """
    if expected.dtype.kind != "f" or expected.size == 0:
        return None
    never = (expected < -NEVER) & (found <= -LARGEST_HALF)
    if never.any():
        expected, found = expected[~never], found[~never]
    value = psnr_db(expected, found)
    if value >= min(floor_db, BEST_DB):
        return None
    low, high = float(expected.min()), float(expected.max())
    return Divergence(kind, operator, value, low, high, not np.isfinite(found).all())


def told(found: Divergence | None, target: Target, component: str, keep: Iterable[str]) -> str:
    """That, and the remedy, for an export to ``target``; "" for nothing."""
    if found is None:
        return ""
    asked = target.precision_of(component), target.precision, target_name(target)
    return f"{found}; {found.remedy(*asked, keep)}"


def worst_first(calls: Iterable[tuple[float, Call]], floor_db: float) -> list[Call]:
    """Calls, by the PSNR in dB of what they give: those that miss a floor, or else the worst."""
    ranked = sorted(calls, key=lambda call: call[0])
    least_db = min(floor_db, BEST_DB)
    return [call for value, call in ranked if value < least_db] or [ranked[0][1]]
