"""Trains the judge: a classifier of every attribute of the shapes scenes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.nn import functional as F

from edgeflash import shapes
from edgeflash.roles import Method

from .draws import rand, randn
from .judge import Judge, known_cross_entropy, look
from .stage import Batch, Player, Stage, Terms, Workshop, average


class Attributes(Method):
    """Cross-entropy of each head, on pictures softened and shifted a little.

    Distilled pictures are softer than renders, and the judge must read them as well: a share of
    every batch is blurred by resampling.
    """

    wants: ClassVar[tuple[str, ...]] = ("shapes",)

    widths: tuple[int, ...] = Field((32, 64, 96, 128), description="channels at each resolution")
    features: int = Field(128, ge=8, description="width of the layer FD is measured on")
    soften: float = Field(0.5, ge=0, le=1, description="share of pictures that are blurred")

    @field_validator("widths")
    @classmethod
    def _whole_groups(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if any(width % 8 for width in widths):
            raise ValueError("every width must be a multiple of 8")
        return widths

    def begin(self, shop: Workshop) -> Stage:
        labels = shop.store.labels
        assert labels is not None
        torch.manual_seed(0)
        judge = Judge(self.widths, self.features).to(shop.device)

        def batch(indices: np.ndarray) -> Batch:
            known = torch.from_numpy(labels[indices])
            return {"pictures": shop.store.pictures(indices), "labels": known}

        def loss(network: Judge, batch: Batch, generator: torch.Generator) -> Terms:
            logits, _ = network(self._soften(batch["pictures"], generator))
            heads = zip(shapes.HEADS, logits, batch["labels"].T, strict=True)
            return {name: known_cross_entropy(out.float(), known) for name, out, known in heads}

        return Stage(
            players={"judge": Player(judge, loss)},
            batch=batch,
            results={"judge": judge},
            averages={"judge": average(judge, self.ema)} if self.ema else {},
            finish=held_out_accuracy,
        )

    def _soften(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        small = int(torch.randint(32, 64, (), generator=generator))
        blurred = F.interpolate(x, (small, small), mode="bilinear", antialias=True)
        blurred = F.interpolate(blurred, x.shape[-2:], mode="bilinear")
        noise = randn(x.shape, generator).to(x.device) * 0.03
        chosen = rand(len(x), generator).to(x.device) < self.soften
        return torch.where(chosen[:, None, None, None], blurred, x) + noise


def held_out_accuracy(networks: dict[str, Any]) -> dict[str, float]:
    """Share right per attribute on 4,000 held-out renders."""
    pictures, _, known = shapes.batch(shapes.HELD_OUT_SEED, range(4000))
    found, _ = look(networks["judge"].eval(), pictures)
    told = {}
    for column, name in enumerate(shapes.HEADS):
        there = known[:, column] >= 0
        told[f"accuracy_{name}"] = float((found == known)[there, column].mean())
    return told
