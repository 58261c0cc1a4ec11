"""Norms whose squares would leave half precision, which ends at 65504.

Core ML computes a group norm operator by operator, the squares of x - mean among them. What comes
out stays the same if x - mean is first multiplied by k, and eps by k^2. Which norms need it, and
how much, is seen while the student's own loop is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ENOUGH = 128.0  # |x - mean| up to this is left alone: its square has room for a factor of 4
SCALED = 64.0  # what others are scaled to stay below


def watch(network: nn.Module) -> None:
    """From now on every norm remembers its largest |x - mean|."""
    for _, norm in _norms(network):
        norm.watched = norm.register_forward_pre_hook(_remember)


def unwatch(network: nn.Module) -> None:
    """Ends it; what they remember stays."""
    for _, norm in _norms(network):
        if hasattr(norm, "watched"):
            norm.watched.remove()


def factor_of(norm: nn.Module) -> float:
    """The power of two that x - mean is to be multiplied by."""
    largest = float(getattr(norm, "largest", 0.0))
    if largest <= ENOUGH or not math.isfinite(largest):
        return 1.0
    return float(2 ** -math.ceil(math.log2(largest / SCALED)))


def rescale(network: nn.Module) -> None:
    """Puts `ScaledGroupNorm` where a group norm needs it."""
    for name, norm in list(_norms(network)):
        if isinstance(norm, nn.GroupNorm) and factor_of(norm) != 1:
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, ScaledGroupNorm(norm))


class ScaledGroupNorm(nn.Module):
    """`GroupNorm` of x [b, c, ...]."""

    def __init__(self, whole: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.factor = whole.num_groups, factor_of(whole)
        self.eps = whole.eps * self.factor**2
        self.weight, self.bias = whole.weight, whole.bias

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), self.groups, -1, *x.shape[2:])
        axes = tuple(range(2, grouped.ndim))
        centred = (grouped - grouped.mean(axes, keepdim=True)) * self.factor
        variance = (centred * centred).mean(axes, keepdim=True)
        normed: Tensor = (centred / torch.sqrt(variance + self.eps)).reshape(x.shape)
        if self.weight is None:
            return normed
        shape = (1, -1, *(1,) * (x.ndim - 2))
        out: Tensor = normed * self.weight.reshape(shape) + self.bias.reshape(shape)
        return out


def _norms(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            yield name, module


def _remember(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0].detach()
    if isinstance(norm, nn.GroupNorm):
        x = x.reshape(len(x), norm.num_groups, -1)
    largest = float((x - x.mean(-1, keepdim=True)).abs().max())
    norm.largest = max(getattr(norm, "largest", 0.0), largest)
