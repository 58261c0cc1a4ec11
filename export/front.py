"""Which layers to give which words: the Pareto front of bytes, or of time, and error.

Errors of layers are taken to have nothing to do with each other, so that their squares add. Then
the best plans of all sizes are those that a greedy walk passes: from each layer's words only those
on the lower convex hull of (saved, error) matter, and of all steps along these hulls the walk takes
the one with the least error for what it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeflash.errors import EdgeflashError

from .fake import stored_bytes
from .plan import NONE, Plan, Quantizing, weights_alone
from .sensitivity import Layer, Sensitivity, decibels

MIB = 2**20
FAST = ("int8", "fp8")  # words whose products run in fewer bits


@dataclass(frozen=True)
class Point:
    """A plan on the front.

    Attributes:
        words: layer -> word, of those that are not left alone.
        bytes: of all weights, predicted.
        error: mean square error of the picture, of values from -1 to 1, predicted.
        products: the share of multiplications that run in fewer bits, 0 to 1.
    """

    words: dict[str, str]
    bytes: float
    error: float
    products: float

    @property
    def psnr_db(self) -> float:
        """Of the picture, predicted."""
        return decibels(self.error)

    @property
    def mib(self) -> float:
        return self.bytes / MIB

    def plan(self) -> Plan:
        """As targets that take one read it."""
        return Plan.model_validate({"default": NONE, "names": dict(sorted(self.words.items()))})


@dataclass(frozen=True)
class _Step:
    """From one word of a layer to the next on its hull."""

    layer: Layer
    word: str
    bytes: float  # saved
    error: float  # added
    products: float  # moved to fewer bits
    slope: float


def front(found: Sensitivity, target: Quantizing, words: Sequence[str]) -> tuple[Point, ...]:
    """The points of the front, the finest first, which leaves everything alone.

    With a word that makes products faster, and none for weights alone, it is a front of time: what
    is saved are multiplications. Else it is a front of size.
    """
    by_time = all(word in FAST for word in words)
    whole = sum(layer.products for layer in found.layers)
    steps = [
        step
        for layer in found.layers
        for step in _hull(found, layer, _float_bytes(layer, target, words), by_time)
    ]
    bytes_ = sum(n * _bytes_of(name, target, words) for name, n in found.numbers.items())
    points = [Point({}, bytes_, 0.0, 0.0)]
    for step in sorted(steps, key=lambda step: step.slope):
        last = points[-1]
        points.append(
            Point(
                last.words | {step.layer.name: step.word},
                last.bytes - step.bytes,
                last.error + step.error,
                last.products + step.products / whole,
            )
        )
    return tuple(points)


def _hull(found: Sensitivity, layer: Layer, float_bytes: int, by_time: bool) -> list[_Step]:
    """The steps of a layer, each with more error for what it saves than the one before."""
    alone = stored_bytes(NONE, layer.weights, layer.channels, float_bytes)
    at, steps = (0.0, 0.0, 0.0, 0.0), list[_Step]()  # saved, error, bytes, products
    options = []
    for word in layer.words:
        saved = alone - stored_bytes(word, layer.weights, layer.channels, float_bytes)
        moved = float(layer.products if word in FAST else 0)
        options.append((moved if by_time else saved, found.error(layer, word), saved, moved, word))
    while further := [option for option in options if option[0] > at[0]]:
        best = min(further, key=lambda o: ((o[1] - at[1]) / (o[0] - at[0]), -o[0]))
        slope = (best[1] - at[1]) / (best[0] - at[0])
        step = _Step(layer, best[4], best[2] - at[2], best[1] - at[1], best[3] - at[3], slope)
        steps.append(step)
        at = best[:4]
    return steps


def _float_bytes(layer: Layer, target: Quantizing, words: Sequence[str]) -> int:
    return _bytes_of(layer.name.partition("/")[0], target, words)


def _bytes_of(component: str, target: Quantizing, words: Sequence[str]) -> int:
    """Of a number that a component leaves alone, where these are the words in it."""
    coarse = next((word for word in words if not weights_alone([word])), words[0])
    return 2 if target.model_copy(update={"precision": coarse}).halves(component) else 4


def within(points: Sequence[Point], budget_bytes: float) -> Point:
    """The point with the least error whose weights fit.

    Raises:
        EdgeflashError: none fits.
    """
    for point in points:
        if point.bytes <= budget_bytes:
            return point
    least = min(points, key=lambda point: point.bytes)
    raise EdgeflashError(
        f"--budget-mib: weights of {budget_bytes / MIB:.2f} MiB are left for it, but these words "
        f"get them down to {least.mib:.2f} MiB at the least: allow more, or name --words of "
        "fewer bits"
    )


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """So many points, evenly spread by what they move to fewer bits; the last is among them."""
    last = points[-1].products
    wanted = [last * (i + 1) / count for i in range(count)]
    at = [next(i for i, p in enumerate(points) if p.products >= share - 1e-9) for share in wanted]
    return [points[i] for i in sorted(set(at))]
