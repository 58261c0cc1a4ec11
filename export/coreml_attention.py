"""Transformers as Apple's Neural Engine likes them: [b, c, 1, s] throughout, one head at a time.

After "Deploying Transformers on the Apple Neural Engine" (machinelearning.apple.com, 2022), whose
four principles are: channels first, 1x1 convolutions for linear layers, a chunk for each head, and
einsum "bchq,bkhc->bkhq", which Core ML runs without a transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError

from .coreml_norms import factor_of


def split_einsum(network: nn.Module) -> None:
    """Puts `SplitTransformer` in the place of every transformer of a UNet.

    Raises:
        EdgeflashError: a kind of transformer that it cannot rebuild.
    """
    named = [(n, m) for n, m in network.named_modules() if isinstance(m, Transformer2DModel)]
    for name, transformer in named:
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, SplitTransformer(transformer))


class SplitTransformer(nn.Module):
    """`Transformer2DModel` on [b, c, h, w], with conditioning [b, s, d]."""

    def __init__(self, whole: Transformer2DModel) -> None:
        super().__init__()
        self.norm = whole.norm
        self.proj_in = pointwise(whole.proj_in)
        self.blocks = nn.ModuleList(SplitBlock(block) for block in whole.transformer_blocks)
        self.proj_out = pointwise(whole.proj_out)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> tuple[Tensor]:
        x = self.proj_in(self.norm(hidden_states).flatten(2)[:, :, None])
        context = encoder_hidden_states
        if context is not None:
            context = context.transpose(1, 2)[:, :, None]
        for block in self.blocks:
            x = block(x, context)
        return (self.proj_out(x).reshape(hidden_states.shape) + hidden_states,)


class SplitBlock(nn.Module):
    """`BasicTransformerBlock` on x [b, c, 1, s], with context [b, d, 1, t]."""

    def __init__(self, whole: BasicTransformerBlock) -> None:
        super().__init__()
        unlike = {
            f"{whole.norm_type} norms": whole.norm_type != "layer_norm",
            "positions of its own": whole.pos_embed is not None,
            "two self-attentions": whole.double_self_attention,
            "gated self-attention": hasattr(whole, "fuser"),
        }
        for what in (what for what, there in unlike.items() if there):
            raise unsupported(f"a transformer with {what}")
        self.norm1, self.norm3 = ChannelNorm(whole.norm1), ChannelNorm(whole.norm3)
        self.attn1 = SplitAttention(whole.attn1)
        self.crosses = whole.only_cross_attention
        self.norm2 = None if whole.attn2 is None else ChannelNorm(whole.norm2)
        self.attn2 = None if whole.attn2 is None else SplitAttention(whole.attn2)
        self.ff = SplitFeedForward(whole.ff)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.crosses else None)
        if self.norm2 is not None and self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SplitAttention(nn.Module):
    """`Attention` of x [b, c, 1, s] to context [b, d, 1, t], or to itself."""

    def __init__(self, whole: Attention) -> None:
        super().__init__()
        for part in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
            if getattr(whole, part, None) is not None:
                raise unsupported(f"attention with {part}")
        if whole.residual_connection or whole.rescale_output_factor != 1:
            raise unsupported("attention that adds or scales by itself")
        self.heads, self.scale = whole.heads, whole.scale
        self.to_q, self.to_k, self.to_v, self.to_out = (
            pointwise(linear) for linear in (whole.to_q, whole.to_k, whole.to_v, whole.to_out[0])
        )

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        context = x if context is None else context
        queries = (self.to_q(x) * self.scale).chunk(self.heads, 1)
        keys = self.to_k(context).transpose(1, 3).chunk(self.heads, 3)  # [b, t, 1, c] each
        values = self.to_v(context).chunk(self.heads, 1)
        found = []
        for q, k, v in zip(queries, keys, values, strict=True):
            weights = torch.einsum("bchq,bkhc->bkhq", q, k).softmax(1)
            found.append(torch.einsum("bkhq,bchk->bchq", weights, v))
        out: Tensor = self.to_out(torch.cat(found, 1))
        return out


class SplitFeedForward(nn.Module):
    """`FeedForward` of x [b, c, 1, s]."""

    def __init__(self, whole: FeedForward) -> None:
        super().__init__()
        first = whole.net[0]
        if not isinstance(first, GEGLU | GELU):
            raise unsupported(f"feed-forward with {type(first).__name__}")
        self.gated = isinstance(first, GEGLU)
        self.approximate = getattr(first, "approximate", "none")
        self.proj_in, self.proj_out = pointwise(first.proj), pointwise(whole.net[2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        if self.gated:
            x, gate = x.chunk(2, 1)
            x = x * F.gelu(gate)
        else:
            x = F.gelu(x, approximate=self.approximate)
        out: Tensor = self.proj_out(x)
        return out


class ChannelNorm(nn.Module):
    """`LayerNorm` over the channels of [b, c, 1, s]."""

    def __init__(self, whole: nn.LayerNorm) -> None:
        super().__init__()
        self.factor = factor_of(whole)
        self.eps = whole.eps * self.factor**2
        shape = (1, -1, 1, 1)
        self.weight = None if whole.weight is None else nn.Parameter(whole.weight.reshape(shape))
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) * self.factor
        x = x / torch.sqrt((x * x).mean(1, keepdim=True) + self.eps)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


def pointwise(layer: nn.Linear | nn.Conv2d) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer
    with torch.device("meta"):
        conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight = nn.Parameter(layer.weight[:, :, None, None], requires_grad=False)
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias, requires_grad=False)
    return conv


def unsupported(what: str) -> EdgeflashError:
    return EdgeflashError(f"attention split_einsum: {what} cannot be split; use attention=original")
