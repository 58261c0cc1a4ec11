"""PixArt-alpha (arXiv 2310.00426), and the compact students made from it, such as its LCM.

A T5 encoder reads the prompt, and a transformer, `PixArtTransformer2DModel`, denoises patches of
the latent. It attends to the states of the prompt's own tokens, which a mask tells from padding;
trained for 1024 px it also hears the size of the picture. Of a transformer that learned the
variance too the first half of the channels counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Tokenizer
from edgeflash.conditioning import aspect_ratio, resolution
from edgeflash.errors import EdgeflashError
from edgeflash.families import tokenizer_of
from edgeflash.latent_diffusion import (
    AUTOENCODERS,
    BATCH,
    LatentDiffusion,
    Specs,
    as_rows,
    floats,
    image,
    of_rows,
    token_ids,
)
from edgeflash.student import Student
from edgeflash.tokenizer import read_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = {
    "text_encoder": ("T5EncoderModel",),
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),  # as it was called
    "vae": AUTOENCODERS,
}
LENGTH = 120  # tokens of a prompt (arXiv 2310.00426, sec. 3.1), whatever its tokenizer could do
ADALN_SINGLE = "ada_norm_single"
SIZED = 128  # cells along a side from which on the transformer is told sizes, if it does not say


class PixArt(LatentDiffusion):
    """PixArt-alpha at 256, 512 and 1024 px: see the module."""

    name = "pixart"
    denoiser = "transformer"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline",)
    folders = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    cfg_scale = 4.5
    classes = CLASSES

    def check(self, student: Student) -> None:
        super().check(student)
        config, width = student.config("transformer"), self.width(student)
        if (norm := config.get("norm_type", ADALN_SINGLE)) != ADALN_SINGLE:
            raise EdgeflashError(
                f"{student.folder}: transformer has norm_type {norm!r}, where this family has "
                f"{ADALN_SINGLE!r}"
            )
        takes = config.get("caption_channels") or config["cross_attention_dim"]
        if takes != width:
            raise EdgeflashError(
                f"{student.folder}: transformer expects conditioning of width {takes} "
                f"(caption_channels), but the text encoder gives {width} (d_model)"
            )
        pads, pad = self.tokenizer(student).pad_id, student.config("text_encoder")["pad_token_id"]
        if pads != pad:
            raise EdgeflashError(
                f"{student.folder}: the tokenizer pads with {pads}, but the text encoder takes "
                f"{pad} for padding (pad_token_id): the two do not belong together"
            )

    def width(self, student: Student) -> int:
        """Of the conditioning, [n, s, width]."""
        return int(student.config("text_encoder")["d_model"])

    def out_channels(self, student: Student) -> int:
        config = student.config("transformer")
        takes = int(config["in_channels"])
        gives = int(config.get("out_channels") or takes)
        return takes if gives == 2 * takes else gives  # the second half is the variance's

    def wrap(self, network: Any, component: str, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_pixart import FoldedTransformer, TextEncoder, Transformer

        if component == "transformer":
            whole = Transformer(network)
            return whole if timestep is None else FoldedTransformer(whole, timestep)
        if component == "text_encoder":
            return TextEncoder(network)
        return super().wrap(network, component)

    def _text_encoder(self, student: Student, name: str) -> tuple[Specs, Specs]:
        tokens = (BATCH, LENGTH)
        states = floats("last_hidden_state", "conditioning", (*tokens, self.width(student)), "NSC")
        return (token_ids(tokens),), (states, floats("attention_mask", "mask", tokens, "NS"))

    def _denoiser(self, student: Student, z: tuple[int | str, ...]) -> tuple[Specs, Specs]:
        width = self.width(student)
        inputs = [
            image("hidden_states", "sample", z),
            floats("timestep", "timestep", (), ""),
            floats("encoder_hidden_states", "conditioning", (BATCH, LENGTH, width), "NSC"),
            floats("encoder_attention_mask", "mask", (BATCH, LENGTH), "NS"),
        ]
        if self._is_sized(student):
            inputs.append(floats("resolution", "resolution", (BATCH, 2), "NC"))
            inputs.append(floats("aspect_ratio", "aspect_ratio", (BATCH, 1), "NC"))
        return tuple(inputs), (image("out_hidden_states", "prediction", z),)

    def _is_sized(self, student: Student) -> bool:
        """Whether the transformer hears the size of the picture (sec. 2.3 of the paper)."""
        config = student.config("transformer")
        said = config.get("use_additional_conditions")
        return config["sample_size"] == SIZED if said is None else bool(said)

    def tokenizer(self, student: Student, text_encoder: str = "text_encoder") -> Tokenizer:
        return t5_tokenizer(student.folder / tokenizer_of(text_encoder), LENGTH, lower=True)

    def tokenize(self, tokenizer: Path, texts: Sequence[str]) -> NDArray[np.int64]:
        encode = read_tokenizer(tokenizer.parent, t5_tokenizer(tokenizer, LENGTH, lower=True))
        return np.array([encode(text).ids for text in texts], np.int64)

    def encode_prompt(self, text_encoders: Sequence[Any], ids: Sequence[Tensor]) -> Tensor:
        """c [n, s + k, d]: the conditioning, and behind it the mask in k rows of width d."""
        import torch

        from edgeflash.networks_pixart import states_and_mask

        states, mask = states_and_mask(text_encoders[0], ids[0])
        return torch.cat([states, as_rows(mask, states.shape[-1])], 1)

    def listening(self, student: Student, denoiser: Any) -> Any:
        """Takes c apart, tells of pictures as large as the latent means, and leaves variances out.

        Times may be numbers, or one a row.
        """
        import torch

        unit = self.latent(student).downsampling
        channels, sized = denoiser.config.in_channels, self._is_sized(student)

        def apart(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x, t, c = given
            states, mask = of_rows(c, LENGTH)
            told = {
                "encoder_hidden_states": states,
                "encoder_attention_mask": mask,
                "timestep": torch.as_tensor(t, device=x.device).expand(len(x)),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
            if sized:
                size = [unit * side for side in x.shape[-2:]]
                told["added_cond_kwargs"] = {
                    fact.__name__: torch.from_numpy(fact(*size)).to(x.device).expand(len(x), -1)
                    for fact in (resolution, aspect_ratio)
                }
            return (x,), named | told

        def first_half(_: Any, __: Any, output: Any) -> Any:
            output.sample = output.sample[:, :channels]
            return output

        denoiser.register_forward_pre_hook(apart, with_kwargs=True)
        denoiser.register_forward_hook(first_half)
        return denoiser
