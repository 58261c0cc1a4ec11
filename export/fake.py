"""What the words of a plan do to a layer, in torch: the numbers it would compute, and its bytes.

As ONNX Runtime has them: int8 weights with one scale an output channel, symmetric; 4 bits with a
scale and a zero point a block of inputs; activations uint8 with one recorded range a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantize_weights import BLOCK, LARGEST

WORDS = ("int8-weights", "int8", "int4-weights")  # those it knows, finest first
SCALE_BYTES = 4
NODE_BYTES = 400  # of an operator that a quantized weight brings along, its names above all


@dataclass
class Range:
    """Smallest and largest value that a tensor had; zero is always among them."""

    low: float = 0.0
    high: float = 0.0

    def see(self, values: Tensor) -> None:
        """Takes in more values."""
        low, high = torch.aminmax(values.detach())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def rounded(self, values: Tensor) -> Tensor:
        """The nearest of the 256 values that uint8 has in this range."""
        step = (self.high - self.low) / 255
        if not step:
            return values
        zero = round(-self.low / step)
        return ((values / step).round() + zero).clamp(0, 255).sub(zero).mul(step)


def weight(layer: nn.Module, word: str) -> Tensor:
    """The weight of a convolution or linear layer, [out, in, ...], as that word leaves it."""
    whole: Tensor = layer.weight.detach()  # type: ignore[operator]
    if word == "int4-weights":
        return _blocks(whole)
    step = whole.abs().amax(dim=tuple(range(1, whole.ndim)), keepdim=True) / LARGEST
    step = torch.where(step == 0, 1, step)
    return (whole / step).round().clamp(-LARGEST, LARGEST) * step


def _blocks(whole: Tensor) -> Tensor:
    """4 bits a weight: 16 values between the smallest and the largest of a block, or zero."""
    flat = whole.flatten(1)
    full = nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK))
    blocks = full.reshape(len(full), -1, BLOCK)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 15
    step = torch.where(step == 0, 1, step)
    zero = (-low / step).round()
    rounded = ((blocks / step).round() + zero).clamp(0, 15).sub(zero).mul(step)
    found: Tensor = rounded.flatten(1)[:, : flat.shape[1]].reshape(whole.shape)
    return found


def change(layer: nn.Module, word: str, given: Tensor, taken: Range, made: Range) -> Tensor:
    """By how much a word changes what a layer makes of ``given``.

    Args:
        layer: a convolution or linear layer.
        word: of a plan, one of ``WORDS``.
        given: what it is given, of any rank that it takes.
        taken: range of what it is given, in all recorded calls.
        made: range of what it makes.
    """
    if word != "int8":
        return _apply(layer, given, weight(layer, word) - layer.weight, None)  # type: ignore[operator]
    rounded = _apply(layer, taken.rounded(given), weight(layer, word), layer.bias)
    return made.rounded(rounded) - _apply(layer, given, layer.weight, layer.bias)


def _apply(layer: Any, given: Tensor, weight: Any, bias: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(given, weight, bias)
    found: Tensor = layer._conv_forward(given, weight, bias)
    return found


def stored_bytes(word: str, weights: int, channels: int, float_bytes: int) -> float:
    """What the weight of a layer takes in a file.

    Args:
        word: of a plan.
        weights: how many numbers it holds.
        channels: how many of them are output channels, with a scale each.
        float_bytes: of a number that is left alone.
    """
    if word == "none":
        return weights * float_bytes
    if word == "int4-weights":
        return weights / 2 + weights / BLOCK * (float_bytes + 0.5) + NODE_BYTES
    return weights + SCALE_BYTES * channels + NODE_BYTES
