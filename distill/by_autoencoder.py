"""Trains an `AutoencoderKL` from nothing on the recipe's pictures: the floor of a new teacher."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from . import crew
from .draws import randn
from .encoded import at_once
from .stage import Batch, Player, Stage, Terms, Workshop, average


class Autoencoder(Method):
    """Latent-diffusion autoencoder (arXiv 2112.10752, sec. 3.1) with L1 and L2 reconstruction.

    The adversarial and perceptual terms of the paper are left out: pictures of flat shapes do not
    need them, and there is no perceptual network offline.
    """

    widths: tuple[int, ...] = Field((32, 48, 64, 96), description="channels at each resolution")
    latent_channels: int = Field(4, ge=1, description="channels of the latent")
    norm_groups: int = Field(4, ge=1, description="groups of the group norms; few keep colour")
    l2_weight: float = Field(2.0, ge=0, description="weight of the squared error beside L1")
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL term, per sample")

    @model_validator(mode="after")
    def _whole_groups(self) -> Autoencoder:
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(f"every width must be a multiple of norm_groups {self.norm_groups}")
        return self

    def begin(self, shop: Workshop) -> Stage:
        if crew.size() > 1:  # DDP wraps `forward` alone
            raise EdgeflashError("autoencoder trains in one process: start one")
        torch.manual_seed(0)
        if shop.store.size_px % (unit := 2 ** (len(self.widths) - 1)):
            raise EdgeflashError(f"[data] size_px: must be a multiple of {unit} for these widths")
        vae = self.build(shop.store.pictures(np.arange(1)).shape[-1]).to(shop.device)
        vae.to(memory_format=torch.channels_last)

        def loss(network: AutoencoderKL, batch: Batch, generator: torch.Generator) -> Terms:
            x = batch["pictures"].to(memory_format=torch.channels_last)
            posterior = network.encode(x).latent_dist
            noise = randn(posterior.mean.shape, generator).to(x.device)
            y = network.decode(posterior.mean + posterior.std * noise).sample.float()
            return {
                "l1": F.l1_loss(y, x),
                "l2": self.l2_weight * F.mse_loss(y, x),
                "kl": self.kl_weight * posterior.kl().float().mean(),
            }

        def finish(networks: dict[str, AutoencoderKL]) -> dict[str, float]:
            return reconstruction(networks["vae"], shop.store.held_out(500).to(shop.device))

        return Stage(
            players={"vae": Player(vae, loss)},
            batch=lambda indices: {"pictures": shop.store.pictures(indices)},
            results={"vae": vae},
            averages={"vae": average(vae, self.ema)} if self.ema else {},
            finish=finish,
        )

    def build(self, size_px: int) -> AutoencoderKL:
        """A fresh network whose latent noise starts small, at a standard deviation of e^-3."""
        depth = len(self.widths)
        vae = AutoencoderKL(
            block_out_channels=self.widths,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            layers_per_block=1,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_groups,
            sample_size=size_px,
        )
        log_variance = slice(self.latent_channels, None)
        vae.quant_conv.weight.data[log_variance].mul_(0.1)
        vae.quant_conv.bias.data[log_variance].fill_(-6.0)
        return vae


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, pictures: Tensor) -> dict[str, float]:
    """Sets the scaling factor to 1 / std of the latents, and tells the reconstruction's PSNR."""
    chunks = torch.split(pictures, at_once(pictures.shape[-1]))
    latents = [vae.encode(x).latent_dist.mean for x in chunks]
    scale = 1 / torch.cat(latents).std().item()
    vae.register_to_config(scaling_factor=scale)
    decoded = torch.cat([vae.decode(z).sample.clamp(-1, 1) for z in latents])
    mse = (decoded - pictures).square().mean((1, 2, 3)) / 4  # on [0, 1]
    return {"psnr_db": float(-10 * mse.log10().mean()), "scaling_factor": scale}
