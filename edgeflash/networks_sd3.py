"""The networks of the SD3 family in torch, wrapped to take and give what gets exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class T5Encoder(nn.Module):
    """Token ids int64 [n, s] -> hidden states [n, s, d]; padding is read like any token."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.network(input_ids).last_hidden_state
        return out


class Transformer(nn.Module):
    """Latent [n, c, h, w], conditioning [n, s, d], pooled [n, p], timestep [n] -> flow.

    The flow is [n, c, h, w], from picture to noise.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        out: Tensor = self.network(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]
        return out


class FoldedTransformer(nn.Module):
    """`Transformer` at one timestep for good."""

    t: Tensor

    def __init__(self, whole: Transformer, t: float) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("t", torch.tensor(t))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        t = self.t.expand(hidden_states.shape[0])
        out: Tensor = self.whole(hidden_states, encoder_hidden_states, pooled_projections, t)
        return out
