"""Critics that judge by the features of a frozen network: a head on each of several layers.

Scores are a list, one tensor [n, places] a head; positive means real.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .discriminators import hinge_critic

PROJECTION = 64  # width in which scores and condition meet
VIRTUAL_BATCH = 8


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most eight samples, without running averages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.tensor_split(ceil(len(x) / VIRTUAL_BATCH))
        normal = [F.batch_norm(g, None, None, self.weight, self.bias, True) for g in groups]
        return torch.cat(normal)


class Head(nn.Module):
    """A score for every place of a feature map, by StyleGAN-T's head (arXiv 2301.09515).

    A condition acts by projection (arXiv 1802.05637).

    Args:
        features: width of the feature map.
        condition: width of the condition; 0: none.
        width: of the head.
        dims: 1: convolutions go along all places in a row, as in StyleGAN-T; 2: across the map.
    """

    def __init__(self, features: int, condition: int, width: int, dims: Literal[1, 2]) -> None:
        super().__init__()
        self.flat = dims == 1
        self.narrow = _block(features, width, dims, 1)
        self.mix = _block(width, width, dims, 9 if self.flat else 3)
        self.score = _conv(width, PROJECTION if condition else 1, dims, 1)
        self.project = nn.Linear(condition, PROJECTION) if condition else None

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """Scores [n, places] of features [n, w, ...] under a condition [n, e]."""
        x = self.narrow(features.flatten(2) if self.flat else features)
        scores: Tensor = self.score((x + self.mix(x)) / sqrt(2)).flatten(2)
        if self.project is None:
            return scores[:, 0]
        wanted: Tensor = self.project(condition)[..., None]
        return (scores * wanted).sum(1) / sqrt(PROJECTION)


def _conv(before: int, after: int, dims: Literal[1, 2], kernel: int) -> nn.Module:
    pad = kernel // 2
    if dims == 2:
        return spectral_norm(nn.Conv2d(before, after, kernel, padding=pad))
    return spectral_norm(nn.Conv1d(before, after, kernel, padding=pad, padding_mode="circular"))


def _block(before: int, after: int, dims: Literal[1, 2], kernel: int) -> nn.Module:
    layers = [_conv(before, after, dims, kernel), LocalBatchNorm(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class Heads(nn.Module):
    """One head on each of several feature maps, all under the same condition."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, maps: Sequence[Tensor], condition: Tensor | None) -> list[Tensor]:
        """Scores of feature maps [n, w, ...], one a head."""
        pairs = zip(self.heads, maps, strict=True)
        return [head(features, condition).float() for head, features in pairs]


def hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The critic's hinge loss, summed over heads."""
    return torch.stack([hinge_critic(r, f) for r, f in zip(real, fake, strict=True)]).sum()


def fooling(fake: list[Tensor]) -> Tensor:
    """The other side's loss: its mean score, turned round, summed over heads."""
    return -torch.stack([scores.mean() for scores in fake]).sum()


def r1(scores: list[Tensor], maps: list[Tensor]) -> Tensor:
    """R1 (arXiv 1801.04406, eq. 9, less its half) on what each head was given, not on pictures.

    |gradient of a head's scores by its feature map|^2, mean over samples, summed over heads.

    Args:
        scores: of real samples.
        maps: the leaves they came from.
    """
    gradients = torch.autograd.grad([s.sum() for s in scores], maps, create_graph=True)
    return torch.stack([g.float().square().flatten(1).sum(1).mean() for g in gradients]).sum()
