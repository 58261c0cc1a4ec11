"""A tiny decoder and encoder that stand in for the teacher's autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import AutoencoderTiny
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .discriminators import PatchCritic, hinge_critic
from .encoded import at_once, cached_latents, drawn_latents
from .process import noise_like
from .stage import Batch, Player, Stage, Terms, Workshop, average

KL = "AutoencoderKL"


class Decoder(Method):
    """SDXS's decoder distillation (arXiv 2403.16627, eq. 5) into an `AutoencoderTiny`.

    L = |down8(G(z)) - down8(x)|_1 + pixel |G(z) - x|_1 + adversarial L_GAN, x the teacher's own
    decoding of z; SDXS has no pixel term. The encoder learns the teacher's scaled latents by MSE
    after `whitening`, and the decoder's first layer begins as if it saw them so: what the small
    directions of latents tell, such as green from dark on black, is else learnt last.
    With ``target = "pictures"`` x is the picture that z was encoded from, which saves the teacher's
    call at every step. With ``own_steps`` the student's drawings are decoded too: they are no
    latents of pictures, and a decoder that knows those alone misreads them.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)

    target: Literal["decodings", "pictures"] = Field(
        "decodings", description="what a latent should become"
    )
    width: int = Field(64, ge=8, description="channels of every layer of the decoder")
    blocks: tuple[int, ...] = Field(
        (3, 3, 3, 1), description="decoder blocks per resolution, smallest first"
    )
    encoder_width: int | None = Field(
        None, ge=8, description="channels of the encoder; none: as many as the decoder's"
    )
    down_weight: float = Field(1.0, ge=0, description="of the L1 on 8x downsampled pictures")
    pixel_weight: float = Field(1.0, ge=0, description="of the L1 at full resolution")
    adversarial_weight: float = Field(0.0, ge=0, description="of the hinge critic; 0: no critic")
    latent_noise: float = Field(
        0.0,
        ge=0,
        description="noise on the latents, in standard deviations up to this: students do not hit "
        "latents of pictures",
    )
    own_steps: int = Field(
        0,
        ge=0,
        description="half of a batch is what the student draws in 1 to so many steps, to become "
        "what the teacher decodes, whatever the target; 0: all of it is data",
    )
    encoder_weight: float = Field(1.0, ge=0, description="of the encoder's MSE on latents")

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        teacher = self.teacher(shop, shop.teacher)
        tiny = self.build(teacher.config.latent_channels)
        latents = cached_latents(shop)
        first = np.arange(min(256, len(shop.store)))
        white = whitening(latents(first))
        see_whitened(tiny.decoder.layers[0], white)
        tiny.to(shop.device, memory_format=torch.channels_last)
        white = white.to(shop.device)
        critic = PatchCritic().to(shop.device)

        drawn = drawn_latents(shop, self.own_steps) if self.own_steps else None

        def batch(indices: np.ndarray) -> Batch:
            z, pictures = latents(indices), shop.store.pictures(indices)
            own = {"own": drawn(indices[len(indices) // 2 :])} if drawn else {}
            return {"z": z, "pictures": pictures} | own

        def example(batch: Batch) -> tuple[Tensor, Tensor]:
            """Latents to decode, and what they should become."""
            z, x = batch["z"], batch["pictures"]
            if drawn:
                half = len(z) - len(batch["own"])
                z = torch.cat([z[:half], batch["own"]])
                if self.target == "pictures":
                    return z, torch.cat([x[:half], decoded(batch["own"])])
            return z, x if self.target == "pictures" else decoded(z)

        def decoded(z: Tensor) -> Tensor:
            with torch.no_grad():
                x: Tensor = teacher.decode(z / teacher.config.scaling_factor).sample
            return x.float().clamp(-1, 1)

        def seen(z: Tensor, generator: torch.Generator) -> Tensor:
            strength = self.latent_noise * torch.rand(len(z), 1, 1, 1, generator=generator)
            return z + strength.to(z.device) * noise_like(z, generator)

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            z, x = example(batch)
            y, found = (out.float() for out in network(seen(z, generator), batch["pictures"]))
            terms = {
                "down8": self.down_weight * F.l1_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8)),
                "pixel": self.pixel_weight * F.l1_loss(y, x),
                "encoder": self.encoder_weight * mixed(white, found - batch["z"]).square().mean(),
            }
            if self.adversarial_weight:
                terms["adversarial"] = -self.adversarial_weight * critic(y).float().mean()
            return terms

        def critic_loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            z, x = example(batch)
            with torch.no_grad():
                y = tiny.decode(seen(z, generator)).sample.float()
            real, fake = network(x).float(), network(y).float()
            return {"critic": hinge_critic(real, fake)}

        players = {"tiny": Player(_Both(tiny), loss)}
        if self.adversarial_weight:
            players["critic"] = Player(critic, critic_loss)
        return Stage(
            players=players,
            batch=batch,
            results={"vae": tiny},
            averages={"vae": average(tiny, self.ema)} if self.ema else {},
            finish=lambda networks: _measure(
                networks["vae"],
                torch.split(latents(first).to(shop.device), at_once(shop.store.size_px)),
                decoded,
            ),
        )

    def teacher(self, shop: Workshop, folder: Path) -> Any:
        """The autoencoder to learn from, if it is one that these options fit."""
        if json.loads((folder / "vae" / "config.json").read_text())["_class_name"] != KL:
            raise EdgeflashError(f"{folder / 'vae'}: method 'decoder' needs an {KL} to learn from")
        teacher = shop.load(folder, "vae").requires_grad_(False)
        if len(self.blocks) != (levels := len(teacher.config.block_out_channels)):
            raise EdgeflashError(
                f"method 'decoder': the teacher's autoencoder has {levels} resolutions, so blocks "
                f"must name {levels} numbers, not {len(self.blocks)}"
            )
        return teacher

    def build(self, latent_channels: int) -> AutoencoderTiny:
        """TAESD's layers at any width and depth; the encoder mirrors the decoder's blocks."""
        depth = len(self.blocks)
        return AutoencoderTiny(
            latent_channels=latent_channels,
            encoder_block_out_channels=(self.encoder_width or self.width,) * depth,
            decoder_block_out_channels=(self.width,) * depth,
            num_encoder_blocks=self.blocks[::-1],
            num_decoder_blocks=self.blocks,
        )


def whitening(latents: Tensor) -> Tensor:
    """The symmetric [c, c] that gives latents [n, c, h, w] unit variance in every direction."""
    values, vectors = torch.linalg.eigh(torch.cov(latents.transpose(0, 1).flatten(1)))
    scales = values.clamp(min=1e-4 * float(values.max())).rsqrt()
    white: Tensor = vectors @ torch.diag(scales) @ vectors.T
    return white


def mixed(matrix: Tensor, latents: Tensor) -> Tensor:
    """Channels of latents [n, c, h, w] mixed by a matrix [c, c]."""
    return torch.einsum("ij,njhw->nihw", matrix, latents)


@torch.no_grad()
def see_whitened(layer: nn.Conv2d, white: Tensor) -> None:
    """Makes a convolution answer to latents as it would to whitened ones."""
    layer.weight.copy_(torch.einsum("oikl,ij->ojkl", layer.weight, white))


class _Both(nn.Module):
    """Decoder and encoder as one network, so that one wrapper synchronises both."""

    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        self.tiny = tiny

    def forward(self, z: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.tiny.decode(z).sample, self.tiny.encode(pictures).latents


@torch.no_grad()
def _measure(
    tiny: AutoencoderTiny, parts: Sequence[Tensor], decoded: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """PSNR of the tiny decoder against the teacher's own, over latents."""
    gaps = (tiny.decode(z).sample.clamp(-1, 1) - decoded(z) for z in parts)
    mse = torch.cat([gap.square().mean((1, 2, 3)) for gap in gaps]) / 4  # on [0, 1]
    return {"psnr_db": float(-10 * mse.log10().mean())}
