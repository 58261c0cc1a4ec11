"""The networks of the PixArt family in torch, wrapped to take and give what gets exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def states_and_mask(text_encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids int64 [n, s] -> hidden states [n, s, d], and 1 where no padding is [n, s]."""
    mask = ids != text_encoder.config.pad_token_id
    states: Tensor = text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    return states, mask.to(states.dtype)


class TextEncoder(nn.Module):
    """Token ids int64 [n, s] -> hidden states [n, s, d], and 1 where no padding is [n, s]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return states_and_mask(self.network, input_ids)


class Transformer(nn.Module):
    """Latent [n, c, h, w], timestep [], conditioning [n, s, d], mask [n, s] -> prediction.

    The prediction is [n, c, h, w]. Some networks also take resolution [n, 2] in px and aspect
    ratio [n, 1].
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.network(
            hidden_states,
            timestep=timestep.reshape(-1).expand(hidden_states.shape[0]),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
            return_dict=False,
        )[0]
        return out[:, : hidden_states.shape[1]]


class FoldedTransformer(nn.Module):
    """`Transformer` at one timestep for good."""

    t: Tensor

    def __init__(self, whole: Transformer, t: float) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("t", torch.tensor(t))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        told = (encoder_hidden_states, encoder_attention_mask, resolution, aspect_ratio)
        out: Tensor = self.whole(hidden_states, self.t, *told)
        return out
