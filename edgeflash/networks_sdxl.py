"""The networks of the SDXL family in torch, wrapped to take and give exactly what gets exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeflash.networks_sd import fold_timestep


class TextEncoder(nn.Module):
    """Token ids int64 [n, s] -> states [n, s, d], state at the end token [n, e], states before.

    The states before, [n, s, d] each, are what goes into each layer; the denoiser takes what goes
    into the last. With a projection the state at the end token comes first, projected.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.network(input_ids, output_hidden_states=True)
        before = out.hidden_states[:-1]
        if hasattr(out, "text_embeds"):
            return out.text_embeds, out.last_hidden_state, *before
        return out.last_hidden_state, out.pooler_output, *before


class Unet(nn.Module):
    """Latent [n, c, h, w], timestep [], conditioning [n, s, d], pooled [n, p], time_ids [n, 6].

    It gives the prediction [n, c, h, w]. Networks distilled over a range of guidance also take the
    w-embedding [n, e].
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.network(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return out


class FoldedUnet(nn.Module):
    """`Unet` at one timestep for good."""

    def __init__(self, network: Any, t: float) -> None:
        super().__init__()
        fold_timestep(network, t)
        self.unet = Unet(network)
        self.register_buffer("t", torch.tensor(t))

    def forward(
        self,
        sample: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        told = (encoder_hidden_states, text_embeds, time_ids, timestep_cond)
        out: Tensor = self.unet(sample, self.t, *told)
        return out
