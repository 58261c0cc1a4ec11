"""Token merging (ToMe for Stable Diffusion, arXiv 2303.17604): self-attention of fewer tokens.

Of every 2x2 cells of the latent one token stays where it is, the first; of the others, those most
like a token that stays are averaged into it before self-attention, and get its answer after it.
Which ones depends on the picture, how many does not, so that all shapes are fixed. The paper picks
at random which token of four stays; here a network answers a call as it answered it before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError

MOST = 0.75  # of four tokens one stays


def merge_tokens(module: nn.Module, share: float, cells: tuple[int, int]) -> None:
    """Makes the UNet in ``module`` merge tokens where it has most of them, as the paper advises.

    Args:
        module: a UNet, however wrapped.
        share: of all tokens there, those that are merged away, up to 0.75.
        cells: (height, width) of the latent.

    Raises:
        EdgeflashError: no self-attention, or blocks of another kind than Stable Diffusion's.
    """
    unet = unet_in(module)
    found = list(transformers(unet))
    finest = min((level for level, _ in found), default=0)
    rows, columns = (-(-side // 2**finest) for side in cells)
    merged = 0
    for transformer in (t for level, t in found if level == finest):
        for i, block in enumerate(transformer.transformer_blocks):
            if not block.only_cross_attention:
                transformer.transformer_blocks[i] = MergingBlock(block, share, (rows, columns))
                merged += 1
    if not merged:
        raise EdgeflashError("--merge-tokens: this unet has no self-attention: leave it out")


def unet_in(module: nn.Module) -> UNet2DConditionModel:
    """The UNet, however wrapped."""
    return next(m for m in module.modules() if isinstance(m, UNet2DConditionModel))


def transformers(unet: UNet2DConditionModel) -> Iterator[tuple[int, Transformer2DModel]]:
    """The transformers, and how often the latent was halved before each."""
    deepest = len(unet.down_blocks) - 1
    blocks = [*enumerate(unet.down_blocks), (deepest, unet.mid_block)]
    blocks += [(deepest - i, block) for i, block in enumerate(unet.up_blocks)]
    for level, block in blocks:
        for transformer in getattr(block, "attentions", None) or ():
            if isinstance(transformer, Transformer2DModel):
                yield level, transformer


@contextmanager
def unmerged(*modules: nn.Module) -> Iterator[None]:
    """Has all tokens stay, for as long as it lasts."""
    blocks = [m for module in modules for m in module.modules() if isinstance(m, MergingBlock)]
    for block in blocks:
        block.merges = False
    try:
        yield
    finally:
        for block in blocks:
            block.merges = True


class MergingBlock(nn.Module):
    """`BasicTransformerBlock` on x [n, rows * columns, c], whose layers it takes over.

    Its attention to itself sees [n, rows * columns - k, c], where k is ``share`` of the tokens.
    """

    stays: Tensor
    others: Tensor
    sorted_back: Tensor

    def __init__(self, whole: BasicTransformerBlock, share: float, cells: tuple[int, int]) -> None:
        super().__init__()
        if (
            whole.norm_type != "layer_norm"
            or whole.pos_embed is not None
            or hasattr(whole, "fuser")
        ):
            raise EdgeflashError(
                "--merge-tokens: this unet has transformer blocks of another kind than Stable "
                "Diffusion's: leave it out"
            )
        self.norm1, self.attn1, self.ff = whole.norm1, whole.attn1, whole.ff
        self.norm2, self.attn2, self.norm3 = whole.norm2, whole.attn2, whole.norm3
        self.merges = True
        places = torch.arange(cells[0] * cells[1]).view(cells)
        stays = places[::2, ::2].flatten()
        others = places.flatten()[~torch.isin(places.flatten(), stays)]
        self.gone = min(int(share * places.numel()), len(others) - 1)
        if self.gone < 1:
            raise EdgeflashError(
                f"--merge-tokens {share:g}: none of {places.numel()} tokens would go: give more, "
                "or leave it out"
            )
        self.register_buffer("stays", stays)
        self.register_buffer("others", others)
        self.register_buffer("sorted_back", torch.cat([others, stays]).argsort())

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        x = hidden_states
        seen = self.norm1(x)
        x = x + (self._merged_attention(x, seen) if self.merges else self.attn1(seen))
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states)
        out: Tensor = x + self.ff(self.norm3(x))
        return out

    def _merged_attention(self, x: Tensor, seen: Tensor) -> Tensor:
        """Attention to itself of ``seen`` [n, s, c], merged as ``x`` [n, s, c] is alike."""
        kept = len(self.others) - self.gone
        order, nearest = self._alike(x)
        gone_to = nearest.gather(1, order[:, : self.gone])
        others, stays = seen[:, self.others], seen[:, self.stays]
        # A product instead of a scattered sum, which not every runtime has.
        numbers = torch.arange(len(self.stays), device=x.device)
        joins = (gone_to[..., None] == numbers).to(seen.dtype)  # [n, gone, stays]
        total = stays + joins.transpose(1, 2) @ _rows(others, order[:, : self.gone])
        mean = total / (1 + joins.sum(1)[..., None])
        answer = self.attn1(torch.cat([_rows(others, order[:, self.gone :]), mean], 1))

        ranks = torch.arange(len(self.others), device=x.device).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, ranks)
        found_at = torch.where(rank < self.gone, kept + nearest, rank - self.gone)
        own = (kept + numbers).expand(x.shape[0], -1)  # len(x) would fix the batch
        return _rows(answer, torch.cat([found_at, own], 1)[:, self.sorted_back])

    def _alike(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the others: their order, most alike first, and which that stays each is most like.

        Both int64 [n, others]; alike is the cosine.
        """
        unit = F.normalize(x, dim=-1)
        cosine = unit[:, self.others] @ unit[:, self.stays].transpose(1, 2)
        alike, nearest = cosine.max(-1)
        return alike.topk(len(self.others))[1], nearest


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """x [n, ., c] at places [n, k] -> [n, k, c]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
