"""A tiny decoder and encoder that stand in for the teacher's autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from .draws import rand
from .encoded import at_once, cached_latents, drawn_latents
from .process import noise_like
from .stage import Batch, Player, Stage, Terms, Workshop, average

KL = "AutoencoderKL"


class Decoder(Method):
    """SDXS's decoder distillation (arXiv 2403.16627, eq. 5) into an `AutoencoderTiny`.

    L = |down8(G(z)) - down8(x)|_1 + pixel |G(z) - x|_1 + adversarial L_GAN, x the teacher's own
    decoding of z. SDXS has no pixel term, and its z are samples of a diffusion model: here they are
    latents of pictures, half of them where ``own_steps`` is set. The encoder learns the teacher's
    scaled latents by MSE after `whitening`, and the decoder's first layer begins as if it saw them
    so: what the small directions of latents tell, such as green from dark on black, is else learnt
    last. With ``target = "pictures"`` x is the picture that z was encoded from, which saves the
    teacher's call at every step. With ``own_steps`` the student's drawings are decoded too: they
    are no latents of pictures, and a decoder that knows those alone misreads them.

    A step asks the tiny autoencoder once, and once more for the critic; the teacher's decoder once,
    unless all are pictures. In memory are both autoencoders and the critic. Rate and batch are
    TAESD's. Published for SDXS-512: 1.7 ms a picture where the teacher's decoder takes 18; no
    figures of how well such a decoder draws were found.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl", "pixart")  # latents without a shift
    conditioned: ClassVar[bool] = True

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rates of both AdamWs")
    target: Literal["decodings", "pictures"] = Field(
        "decodings", description="what a latent should become"
    )
    width: int = Field(64, ge=8, description="channels of every layer of the decoder")
    blocks: tuple[int, ...] = Field(
        (3, 3, 3, 1),
        description="decoder blocks per resolution, smallest first; the lite decoder that "
        "edgeflash price knows has a width of 32 and 4, 4, 1, 0",
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
        drawn = drawn_latents(shop, self.own_steps) if self.own_steps else None
        first = latents(np.arange(min(256, len(shop.store))))
        white = whitening(first)
        see_whitened(tiny.decoder.layers[0], white)
        tiny.to(shop.device, memory_format=torch.channels_last)
        lesson = Lesson(self, teacher, tiny, PatchCritic().to(shop.device), white.to(shop.device))

        def batch(indices: np.ndarray) -> Batch:
            own = {"own": drawn(indices[len(indices) // 2 :])} if drawn else {}
            known = {"z": latents(indices), "pictures": shop.store.pictures(indices)} | own
            with shop.autocast():
                return known | lesson.wanted(known)

        players = {"tiny": Player(_Both(tiny), lesson.loss)}
        if self.adversarial_weight:
            players["critic"] = Player(lesson.critic, lesson.critic_loss)
        return Stage(
            players=players,
            batch=batch,
            results={"vae": tiny},
            averages={"vae": average(tiny, self.ema)} if self.ema else {},
            finish=lambda networks: _measure(
                networks["vae"],
                torch.split(first.to(shop.device), at_once(shop.store.size_px)),
                lesson.decoded,
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


@dataclass(frozen=True)
class Lesson:
    """The losses: of decoder and encoder at once, and of the critic."""

    options: Decoder
    teacher: Any
    tiny: AutoencoderTiny
    critic: PatchCritic
    white: Tensor

    def loss(self, network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
        options, (z, x) = self.options, example(batch)
        y, found = (out.float() for out in network(self.seen(z, generator), batch["pictures"]))
        gap = mixed(self.white, found - batch["z"])
        terms = {
            "down8": options.down_weight * F.l1_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8)),
            "pixel": options.pixel_weight * F.l1_loss(y, x),
            "encoder": options.encoder_weight * gap.square().mean(),
        }
        if options.adversarial_weight:
            terms["adversarial"] = -options.adversarial_weight * self.critic(y).float().mean()
        return terms

    def critic_loss(self, network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
        z, x = example(batch)
        with torch.no_grad():
            y = self.tiny.decode(self.seen(z, generator)).sample.float()
        return {"critic": hinge_critic(network(x).float(), network(y).float())}

    def wanted(self, batch: Batch) -> Batch:
        """``x``, what the last of the latents to decode should become: once for both players."""
        z = shown(batch) if self.options.target == "decodings" else batch.get("own")
        return {} if z is None else {"x": self.decoded(z.to(self.white.device))}

    def seen(self, z: Tensor, generator: torch.Generator) -> Tensor:
        strength = self.options.latent_noise * rand(len(z), generator)[:, None, None, None]
        return z + strength.to(z.device) * noise_like(z, generator)

    @torch.no_grad()
    def decoded(self, z: Tensor) -> Tensor:
        """Pictures in [-1, 1] by the teacher's autoencoder."""
        x: Tensor = self.teacher.decode(z / self.teacher.config.scaling_factor).sample
        return x.float().clamp(-1, 1)


def shown(batch: Batch) -> Tensor:
    """Latents to decode: those of pictures, and the student's own drawings in the second half."""
    z, own = batch["z"], batch.get("own", batch["z"][:0])
    return torch.cat([z[: len(z) - len(own)], own])


def example(batch: Batch) -> tuple[Tensor, Tensor]:
    """Latents to decode, and what they should become: the pictures, where no teacher decoded."""
    x, pictures = batch.get("x", batch["pictures"][:0]), batch["pictures"]
    return shown(batch), torch.cat([pictures[: len(pictures) - len(x)], x])


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
