"""Trains a text encoder and a UNet from nothing by plain denoising: how a new teacher is made."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from edgeflash.roles import Method

from .encoded import cached_latents, token_ids
from .process import Process
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .vocabulary import small_clip_tokenizer


class Denoising(Method):
    """Latent diffusion (arXiv 2112.10752, eq. 3) with caption dropout (arXiv 2207.12598).

    The autoencoder of the student folder is frozen; its latents are cached. CLIP tokenizer and text
    encoder are trained from nothing together with the UNet.
    """

    widths: tuple[int, ...] = Field((64, 128), description="UNet channels at each resolution")
    attention: tuple[bool, ...] = Field((True, True), description="transformers at each resolution")
    layers_per_block: int = Field(2, ge=1, description="resnet and transformer pairs per block")
    heads: int = Field(4, ge=1, description="attention heads of UNet and text encoder")
    text_width: int = Field(128, ge=8, description="width of the text encoder")
    text_layers: int = Field(3, ge=1, description="layers of the text encoder")
    max_tokens: int = Field(24, ge=4, description="length every prompt is padded to")
    predicts: Literal["epsilon", "v_prediction"] = Field(
        "v_prediction", description="what the UNet puts out"
    )
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty captions, for CFG")

    @model_validator(mode="after")
    def _one_for_each(self) -> Denoising:
        if len(self.widths) != len(self.attention):
            raise ValueError(f"{len(self.widths)} widths but {len(self.attention)} attention flags")
        return self

    def begin(self, shop: Workshop) -> Stage:
        torch.manual_seed(0)
        tokenizer = small_clip_tokenizer(shop.store.captions, self.max_tokens)
        scheduler = self.scheduler()
        scheduler.save_pretrained(str(shop.folder / "scheduler"))
        process = Process.of(shop.folder, shop.device)
        text_encoder = self.text_encoder(tokenizer).to(shop.device)
        latents = cached_latents(shop)
        shape = latents(np.arange(1)).shape
        unet = self.unet(shape[1], shape[2]).to(shop.device, memory_format=torch.channels_last)
        ids = token_ids(tokenizer, [*shop.store.captions, ""])

        def batch(indices: np.ndarray) -> Batch:
            return {"x_0": latents(indices), "ids": ids[indices]}

        def loss(network: _TextDenoiser, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, count = batch["x_0"], len(batch["x_0"])
            eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
            t = torch.randint(process.timesteps, (count,), generator=generator).to(x_0.device)
            empty = torch.rand(count, generator=generator) < self.caption_dropout
            tokens = torch.where(
                empty[:, None].to(x_0.device), ids[-1].to(x_0.device), batch["ids"]
            )
            output = network(process.noised(x_0, eps, t), t, tokens)
            return {"denoising": F.mse_loss(output.float(), process.target(x_0, eps, t))}

        networks: dict[str, Any] = {"unet": unet, "text_encoder": text_encoder}
        return Stage(
            players={"denoiser": Player(_TextDenoiser(unet, text_encoder), loss)},
            batch=batch,
            results=networks | {"tokenizer": tokenizer, "scheduler": scheduler},
            averages={k: average(v, self.ema) for k, v in networks.items()} if self.ema else {},
        )

    def scheduler(self) -> DDIMScheduler:
        """Stable Diffusion's betas, ending at t = 999 for every number of steps."""
        return DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type=self.predicts,
            timestep_spacing="trailing",
        )

    def text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.text_width,
                intermediate_size=4 * self.text_width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=self.heads,
                max_position_embeddings=self.max_tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def unet(self, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
        kinds = ["CrossAttn" if there else "" for there in self.attention]
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=self.widths,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
            layers_per_block=self.layers_per_block,
            cross_attention_dim=self.text_width,
            attention_head_dim=self.heads,  # diffusers' old name for the number of heads
            norm_num_groups=16,
        )


class _TextDenoiser(nn.Module):
    """UNet and text encoder as one network, so that one wrapper synchronises both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        output: Tensor = self.unet(x_t, t, self.text_encoder(ids)[0]).sample
        return output
