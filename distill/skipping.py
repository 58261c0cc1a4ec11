"""Blocks of a UNet that are left out at random, so that it comes to bear their removal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

SKIP = "share of the resnets and transformers that each step leaves out; 0: none, and no draws"


class Skipping:
    """SnapFusion's robust training (arXiv 2306.00980): each block is drawn from {block, identity}.

    What is left out is a resnet or a transformer, in one step for all samples, so that a step is
    the same in micro-batches and processes. Its input goes on as if the block were not there; where
    a resnet changes the channels its shortcut, a 1x1 convolution, stays. The block is computed all
    the same, and counts 0 times: its weights have gradients, which processes wait for, of zeros.
    Resnets that change the resolution stay.
    """

    def __init__(self, unet: nn.Module, share: float) -> None:
        """``share``: of the blocks, each by its own draw; the published one is not known."""
        self.share = share
        self.blocks = [block for block in unet.modules() if share and _can_go(block)]
        self.gone: list[nn.Module] = []
        for block in self.blocks:
            block.register_forward_hook(self._hook())

    @contextmanager
    def __call__(self, generator: torch.Generator) -> Iterator[None]:
        """Calls of the UNet in here go without the blocks that are drawn, once for all of them."""
        if self.blocks:
            drawn = torch.rand(len(self.blocks), generator=generator) < self.share
            self.gone = [self.blocks[int(i)] for i in drawn.nonzero()]
        try:
            yield
        finally:
            self.gone = []

    def _hook(self) -> Any:
        def without(block: Any, given: tuple[Tensor, ...], output: Any) -> Any:
            if not any(block is each for each in self.gone):
                return None
            if isinstance(block, Transformer2DModel):
                return (given[0] + 0 * output[0],)
            x = block.conv_shortcut(given[0]) if block.conv_shortcut else given[0]
            return x / block.output_scale_factor + 0 * output

        return without


def _can_go(block: nn.Module) -> bool:
    """Whether it is one that can be left out, residual alone going on."""
    if isinstance(block, ResnetBlock2D):
        return not (block.up or block.down)
    return isinstance(block, Transformer2DModel)
