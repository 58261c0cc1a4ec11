"""Trains a UNet by plain denoising: how a new teacher is made, or mended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from edgeflash.bundle import Condition
from edgeflash.conditions import inpainting, of_image, width
from edgeflash.errors import EdgeflashError
from edgeflash.family_sd import ENLARGES, ENLARGING, INPAINTING
from edgeflash.roles import Method
from edgeflash.student import Student

from . import crew
from .draws import rand, randn, rows
from .encoded import cached_samples, mistaken_latents
from .process import Process
from .seen import dropped
from .skipping import SKIP, Skipping
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .witness import WEIGHT, Witness

BETAS: dict[str, Any] = {  # arXiv 2006.11239, sec. 4, and Stable Diffusion's own config
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
}


class Denoising(Method):
    """Latent diffusion (arXiv 2112.10752, eq. 3) with caption dropout (arXiv 2207.12598).

    Autoencoder and text encoder of the student folder are frozen, and what they make of the data is
    cached. With ``attribute_weight`` a `Witness` says which objects the predicted x_0 shows. With
    ``mistakes`` the noise of some samples holds a part of the scene as it should not be, in the
    manner of arXiv 2301.11706, which adds plain noise: on its own way the network meets its own
    errors, and must learn to trust the caption more than them. With ``skip`` it is trained to lose
    blocks, before `edgeflash search` chooses which (`Skipping`). With ``inpaint`` it also sees a
    mask, and the picture without what the mask covers, with ``enlarge`` the picture as a smaller
    one has it (arXiv 2112.10752, secs. 4.5 and 4.4).
    """

    families: ClassVar[tuple[str, ...]] = ("sd",)
    conditioned: ClassVar[bool] = True
    keeps_control: ClassVar[bool] = False  # it makes another UNet

    widths: tuple[int, ...] = Field((64, 128), description="UNet channels at each resolution")
    attention: tuple[bool, ...] = Field((True, True), description="transformers at each resolution")
    layers_per_block: int = Field(2, ge=1, description="resnet and transformer pairs per block")
    heads: int = Field(4, ge=1, description="attention heads")
    predicts: Literal["epsilon", "v_prediction"] = Field(
        "v_prediction", description="what the UNet puts out"
    )
    timestep_power: float = Field(
        1.0, gt=0, description="t = T u^power, u uniform; below 1: more of the noisy ones"
    )
    betas: Literal["linear", "scaled_linear"] = Field(
        "scaled_linear", description="noise of DDPM, or the lesser one of Stable Diffusion"
    )
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of empty captions, for CFG")
    attribute_weight: float = Field(0.0, ge=0, description=WEIGHT)
    skip: float = Field(0.0, ge=0, lt=1, description=SKIP)
    mistakes: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of samples whose noise has a part of the wrong colours and shapes in it",
    )

    stochastic: bool = Field(
        False, description="sample with fresh noise at every step: DDIM of eta 1, which is DDPM"
    )
    warm: bool = Field(
        False, description="go on from the UNet that an earlier stage or the base left"
    )
    inpaint: bool = Field(
        False, description="paint into pictures: a mask and the rest of the picture are seen too"
    )
    enlarge: int | None = Field(
        None, ge=2, description="pictures so many times along a side: small ones are seen too"
    )

    @model_validator(mode="after")
    def _one_for_each(self) -> Denoising:
        if len(self.widths) != len(self.attention):
            raise ValueError(f"{len(self.widths)} widths but {len(self.attention)} attention flags")
        if any(width % 16 for width in self.widths):
            raise ValueError("every width must be a multiple of 16")
        if self.inpaint and self.enlarge:
            raise ValueError("inpaint and enlarge do not go together")
        return self

    def begin(self, shop: Workshop) -> Stage:
        torch.manual_seed(0)
        scheduler = self.scheduler()
        with crew.main_first():
            scheduler.save_pretrained(str(shop.folder / "scheduler"))
        process = Process.of(shop.folder, shop.device)
        before = Student.unfinished(shop.student)
        channels = before.family.latent(before).channels
        conditions = self.conditions(channels, shop.store.size_px)
        batch, nothing = cached_samples(shop, conditions)
        sample = batch(np.arange(1))
        size = sample["x_0"].shape[-1]
        unet = self.unet(channels, width(conditions), size, nothing.shape[-1])
        if self.enlarge:
            unet.register_to_config(**{ENLARGES: self.enlarge})
        unet = shop.listening(unet).to(shop.device)
        unet.to(memory_format=torch.channels_last)
        if self.warm:
            self.go_on(unet, shop)

        skipping = Skipping(unet, self.skip)
        witness = None
        if self.attribute_weight:
            witness = Witness.at(shop, "denoising", sample, process)
        if self.mistakes:
            batch = self.with_mistakes(shop, batch)

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, count = batch["x_0"], len(batch["x_0"])
            eps = randn(x_0.shape, generator).to(x_0.device)
            t = self.times(count, process.timesteps, generator).to(x_0.device)
            empty = rand(count, generator) < self.caption_dropout
            c = dropped(batch["c"], nothing, empty)
            if self.mistakes:
                part = self.parts(empty, generator).to(x_0.device)
                eps = eps + part * process.alpha(t) * (batch["mistaken"] - x_0)
            x_t = process.noised(x_0, eps, t)
            with skipping(generator):
                output = network(x_t, t, c).sample.float()
            terms = {"denoising": F.mse_loss(output, process.target(x_0, eps, t))}
            if witness:
                doubt = witness.doubt(process.x_0(output, x_t, t), batch["labels"], generator, t)
                doubt = torch.where(empty.to(x_0.device), 0, doubt)
                terms["attributes"] = self.attribute_weight * doubt.mean()
            return terms

        players = witness.players() if witness else {}
        return Stage(
            players=players | {"unet": Player(unet, loss)},
            batch=batch,
            results={"unet": unet, "scheduler": scheduler},
            averages={"unet": average(unet, self.ema)} if self.ema else {},
            pipeline=INPAINTING if self.inpaint else ENLARGING if self.enlarge else "",
        )

    def shows_more(self) -> bool:
        return self.inpaint or self.enlarge is not None

    def conditions(self, channels: int, side_px: int) -> tuple[Condition, ...]:
        """What the UNet sees beside x_t, of latents of so many channels."""
        if self.enlarge and side_px % self.enlarge:
            raise EdgeflashError(
                f"denoising.enlarge: {side_px} px is no multiple of {self.enlarge}"
            )
        if self.enlarge:
            return of_image(channels, self.enlarge)
        return inpainting(channels) if self.inpaint else ()

    def go_on(self, unet: Any, shop: Workshop) -> None:
        """Gives a new UNet the weights of the student's so far.

        One that sees more than the student's begins blind to it, with zeros.

        Raises:
            EdgeflashError: there is none, or the options describe another network.
        """
        if not (shop.student / "unet").is_dir():
            raise EdgeflashError(
                "denoising.warm: no earlier stage has made a UNet; name a base that has one, or "
                "leave warm out"
            )
        before = shop.load(shop.student, "unet")
        weights, sees = before.state_dict(), before.config.in_channels
        more = unet.config.in_channels - sees
        widened = more > 0 and sees == before.config.out_channels
        but = ("in_channels", ENLARGES) if widened else ()
        check_alike(unet, before, shop.student, but)
        if widened:  # what is seen anew has no say at first
            first = weights["conv_in.weight"]  # [w, c, 3, 3]
            weights["conv_in.weight"] = F.pad(first, (0, 0, 0, 0, 0, more))
        unet.load_state_dict(weights)

    def with_mistakes(
        self, shop: Workshop, batch: Callable[[np.ndarray], Batch]
    ) -> Callable[[np.ndarray], Batch]:
        """Batches that also have ``mistaken`` [n, c, h, w], the latents of the wrong scenes.

        Raises:
            EdgeflashError: the data are not the shapes scenes.
        """
        if shop.store.labels is None:
            raise EdgeflashError("denoising.mistakes needs [data] kind = 'shapes'")
        mistaken = mistaken_latents(shop)
        return lambda indices: batch(indices) | {"mistaken": mistaken(indices)}

    def parts(self, empty: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """How much of its mistakes a sample's noise holds, [n, 1, 1, 1]; none without a caption."""
        both = rows(lambda n: torch.rand(2, n, generator=generator).T, len(empty), generator)
        drawn, part = both.T
        return torch.where((drawn < self.mistakes) & ~empty, part, 0)[:, None, None, None]

    def times(self, count: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
        """Training timesteps, int64 [count], of mean ``timesteps`` / (1 + timestep_power)."""
        u = rand(count, generator) ** self.timestep_power
        return (u * timesteps).long().clamp(max=timesteps - 1)  # u may round to 1

    def scheduler(self) -> DDIMScheduler | DDPMScheduler:
        """The sampler that the UNet is saved with: it begins at t = 999 for every step count."""
        common = {
            "beta_schedule": self.betas,
            **BETAS[self.betas],
            "clip_sample": False,
            "prediction_type": self.predicts,
            "timestep_spacing": "trailing",
        }
        if self.stochastic:
            return DDPMScheduler(**common)
        return DDIMScheduler(**common, set_alpha_to_one=False)

    def unet(self, latent_channels: int, more: int, latent_size: int, text_width: int) -> Any:
        """A new one; it sees so many channels ``more`` than those of x_t."""
        kinds = ["CrossAttn" if there else "" for there in self.attention]
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels + more,
            out_channels=latent_channels,
            block_out_channels=self.widths,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
            layers_per_block=self.layers_per_block,
            cross_attention_dim=text_width,
            attention_head_dim=self.heads,  # diffusers' old name for the number of heads
            norm_num_groups=16,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",
            addition_embed_type_num_heads=self.heads,
        )


def check_alike(unet: Any, other: Any, folder: Path, but: tuple[str, ...]) -> None:
    """Raises EdgeflashError where a folder's UNet is not the one that the options describe."""
    here, there = (json.loads(each.to_json_string()) for each in (unet, other))
    told = [k for k in here if k[0] != "_" and k not in but and there.get(k) != here[k]]
    if told:
        raise EdgeflashError(
            f"denoising.warm: {folder / 'unet'} is another network than the options "
            f"describe (differs: {', '.join(told)})"
        )
