"""Trains a T2I-Adapter beside a denoiser that stays as it is: edges seen once a picture."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from edgeflash.control import ADAPTER
from edgeflash.networks_control import adapter_beside

from .by_control import Control
from .draws import rand


class Adapter(Control):
    """T2I-Adapter (arXiv 2302.08453, sec. 3.4): denoising, of pictures whose edges it sees.

    It begins as diffusers makes it, at random, or as the adapter that the base has. What it sees
    are the edges of the data's own pictures (`edgeflash.control.edges`). Noisy timesteps, where a
    picture gets its structure, come more often (non-uniform time step sampling, in the same place).
    """

    steers: ClassVar[str] = ADAPTER

    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of empty captions")
    timestep_power: float = Field(
        3.0,
        ge=1,
        description="t = T (1 - u^power), u uniform; 1: all alike, 3: as the paper has it",
    )

    def made(self, unet: Any, unit_px: int) -> Any:
        return adapter_beside(unet, unit_px)

    def times(self, count: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
        """Training timesteps, int64 [count], of mean T power / (1 + power)."""
        u = rand(count, generator) ** self.timestep_power
        return ((1 - u) * timesteps).long().clamp(max=timesteps - 1)  # u may be 0
