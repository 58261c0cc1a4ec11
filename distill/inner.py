"""The first half of a denoiser, and the innermost features that it ends in: what critics judge by.

Of UNets and transformers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import isqrt
from typing import Any, NoReturn

from torch import Tensor, nn

from .features import Taps


def encoder_blocks(denoiser: Any) -> tuple[list[nn.Module], list[int]]:
    """The blocks of a denoiser's first half, the innermost one last, and the widths of each.

    Of a UNet they are those on the way down and the one in the middle, where it has one. Patches of
    a transformer are as many from the first block to the last: its half ends in the middle one of
    n, number n // 2 from 0, by which FastGen's DMD2 judges Flux (NVlabs/FastGen,
    `Discriminator_ImageDiT`).
    """
    config = denoiser.config
    if _is_transformer(denoiser):
        half = list(denoiser.transformer_blocks)[: len(denoiser.transformer_blocks) // 2 + 1]
        return half, [config.num_attention_heads * config.attention_head_dim] * len(half)
    blocks, widths = [*denoiser.down_blocks], [*config.block_out_channels]
    if denoiser.mid_block is not None:
        blocks, widths = [*blocks, denoiser.mid_block], [*widths, widths[-1]]
    return blocks, widths


def encoder_taps(denoiser: Any, blocks: Sequence[nn.Module]) -> Taps:
    """Keeps what blocks of a denoiser put out, to be laid out by `across`."""
    return Taps(blocks, which=-1 if _is_transformer(denoiser) else 0)  # SD 3's: text, and picture


def across(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [n, s, w] of patches of latents ``like`` [n, c, h, w], row by row, as a map.

    What is a map [n, w, h, w] already stays as it is.
    """
    if tokens.dim() == 4:
        return tokens
    height, width = like.shape[-2:]
    patch = isqrt(height * width // tokens.shape[1])
    return tokens.mT.reshape(len(tokens), -1, height // patch, width // patch)


class EncoderHalf(nn.Module):
    """A denoiser's first half, on the same weights; what lies behind is neither run nor trained."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        half = copy(denoiser)
        if _is_transformer(denoiser):
            blocks, _ = encoder_blocks(denoiser)
            within = denoiser._modules | {"transformer_blocks": nn.ModuleList([*blocks, _End()])}
            half._modules = {k: v for k, v in within.items() if k not in ("norm_out", "proj_out")}
            half._parameters = {}  # PixArt's has one of its own, which scales what it puts out
        else:
            half._modules = denoiser._modules | {
                "up_blocks": nn.ModuleList(),
                "conv_norm_out": None,
                "conv_out": nn.Identity(),
            }
        self.denoiser = half

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Innermost features [n, w, h, w] of noised samples [n, c, h, w] at t [n] under c."""
        try:
            features: Tensor = self.denoiser(x_t, t, c).sample
        except _Reached as reached:
            features = across(reached.tokens, x_t)
        return features


class _Reached(Exception):
    """Leads out of a transformer's forward pass, which has no other way to end before its end."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


class _End(nn.Module):
    """The block behind the last one of a half."""

    def forward(self, hidden_states: Tensor, **_: Any) -> NoReturn:
        raise _Reached(hidden_states)


def _is_transformer(denoiser: Any) -> bool:
    return hasattr(denoiser, "transformer_blocks")
