"""From a teacher's UNet to one within a budget, a removal at a time.

Greedy, as SnapFusion's evolution of its UNet (arXiv 2306.00980, sec. 3.1): of all that could be
removed, what loses least for each ms it saves goes first; what was not needed comes back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console

from edgeflash.architecture import Config, Smaller, smaller
from edgeflash.devices import Device
from edgeflash.errors import EdgeflashError
from edgeflash.price import Way
from edgeflash.report import told
from edgeflash.search_blocks import Anatomist, Anatomy, gflop_of
from edgeflash.search_times import Times
from edgeflash.search_value import Value

WORTH = 1e-3  # a removal that saves a smaller share of the step is none


@dataclass(frozen=True)
class Wish:
    """What students are searched for.

    Attributes:
        budget_ms: of a picture.
        steps: of it.
        on: where to measure it; or else
        device: what to estimate it for.
        size: (height, width) of it in px; None: what the UNet was made for.
    """

    budget_ms: float
    steps: int = 1
    on: Way | None = None
    device: Device | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.on is None) == (self.device is None):
            raise EdgeflashError("say where, one of the two: --on onnx, or --device galaxy-s24")

    @property
    def estimating(self) -> Device:
        assert self.device
        return self.device


@dataclass(frozen=True)
class Proposal:
    """A student, by its UNet.

    Attributes:
        name: of the walk that led to it.
        removed: what, in this order.
        config: of the UNet.
        anatomy: its blocks.
        step_ms: all its calls of a step, predicted.
        image_ms: a picture, predicted.
        value: share of parameters kept, or minus what the output loses.
        call_gflop: of a call of the UNet.
    """

    name: str
    removed: tuple[str, ...]
    config: Config = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    step_ms: float
    image_ms: float
    value: float

    @property
    def call_gflop(self) -> float:
        return sum(map(gflop_of, self.anatomy.blocks))


@dataclass
class Walker:
    """Walks from the teacher towards the budget.

    Attributes:
        anatomist: takes UNets apart.
        times: of their blocks.
        value: what is to be kept.
        calls: of the UNet in a step: two with guidance.
        wish: the budget.
        beside_ms: text encoders and decoder.
        console: where steps are told.
        scale: measured time of a whole step by the sum of its blocks, once one was measured.
    """

    anatomist: Anatomist
    times: Times
    value: Value
    calls: int
    wish: Wish
    beside_ms: float
    console: Console
    scale: float = 1.0
    _values: dict[str, float] = field(default_factory=dict)

    def look(self, name: str, config: Config, removed: tuple[str, ...]) -> Proposal:
        """What a UNet takes; its value is not asked yet."""
        anatomy = self.anatomist.apart(config)
        step_ms = self.scale * self.calls * sum(map(self.times.block_ms, anatomy.blocks))
        image_ms = self.beside_ms + self.wish.steps * step_ms
        return Proposal(name, removed, config, anatomy, step_ms, image_ms, math.nan)

    def valued(self, proposal: Proposal) -> Proposal:
        key = json.dumps(proposal.config, sort_keys=True)
        if key not in self._values:
            self._values[key] = self.value(proposal.config, proposal.anatomy)
        return replace(proposal, value=self._values[key])

    def walk(self, start: Proposal, name: str, **kinds: bool) -> Proposal | None:
        """The best one within the budget on the way; None where the way ends before."""
        at, within = replace(start, name=name), list[Proposal]()
        while at.image_ms > self.wish.budget_ms:
            steps = [
                self.look(name, each.config, (*at.removed, each.removed))
                for each in self._smaller(start, at.config, kinds)
            ]
            worth = [self.valued(s) for s in steps if s.step_ms < at.step_ms * (1 - WORTH)]
            if not worth:
                self.console.print(f"{name}: ends at {told(at.image_ms)} ms", highlight=False)
                return None
            within += [each for each in worth if each.image_ms <= self.wish.budget_ms]
            before = at
            at = min(worth, key=lambda s: (before.value - s.value) / (before.step_ms - s.step_ms))
            line = f"{name}: {at.removed[-1]} goes, {told(at.image_ms)} ms"
            self.console.print(line, highlight=False)
        best = max(within, key=lambda each: each.value, default=at)
        return self._given_back(start, best, **kinds)

    def _smaller(self, start: Proposal, config: Config, kinds: Mapping[str, bool]) -> list[Smaller]:
        """Stages keep half of their channels: by a count of weights outer ones would starve."""
        least = [width // 2 for width in start.config["block_out_channels"]]
        return smaller(config, least=least, **kinds)

    def _given_back(self, start: Proposal, end: Proposal, **kinds: bool) -> Proposal:
        """Without removals that were not needed, after what went later: the first ones first."""
        for i in range(len(end.removed)):
            left = end.removed[:i] + end.removed[i + 1 :]
            again = self._replayed(start, end.name, left, **kinds)
            if again and again.image_ms <= self.wish.budget_ms:
                again = self.valued(again)
                if again.value > end.value:
                    return self._given_back(start, again, **kinds)
        return end

    def _replayed(
        self, start: Proposal, name: str, removed: Sequence[str], **kinds: bool
    ) -> Proposal | None:
        config = start.config
        for what in removed:
            found = [s.config for s in self._smaller(start, config, kinds) if s.removed == what]
            if not found:
                return None
            config = found[0]
        return self.look(name, config, tuple(removed))
