"""Stable Diffusion 3 (arXiv 2403.03206), and the compact students made from it.

Two CLIP text encoders read every prompt, and T5 where the folder has it. What goes into the last
layer of the CLIP ones, side by side and filled up with zeros, stands above T5's states, or above
zeros in their place; the projected states at the end token, side by side, go in beside it. The
denoiser, `SD3Transformer2DModel`, predicts the flow from picture to noise. Tensor names are those
of optimum's ONNX pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Tokenizer
from edgeflash.errors import EdgeflashError
from edgeflash.families import tokenizer_of
from edgeflash.family_sd import clip_tokenizer, tokenizer_spec
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

FIRST, SECOND, THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"
T5_LENGTH = 256  # tokens that its diffusers pipeline gives T5


class StableDiffusion3(LatentDiffusion):
    """SD 3 and 3.5: see the module. Whether T5 is there is the one thing that an object knows."""

    name = "sd3"
    denoiser = "transformer"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    optional: ClassVar[tuple[str, ...]] = (tokenizer_of(THIRD), THIRD)
    cfg_scale = 7.0

    def __init__(self, t5: bool = True) -> None:
        self.t5 = t5
        readers = {name: ("CLIPTextModelWithProjection",) for name in (FIRST, SECOND)}
        readers |= {THIRD: ("T5EncoderModel",)} if t5 else {}
        networks = {"transformer": ("SD3Transformer2DModel",), "vae": AUTOENCODERS}
        self.classes = readers | networks
        self.folders = (*map(tokenizer_of, readers), *self.classes, "scheduler")

    def of(self, index: dict[str, Any]) -> Self:
        return type(self)(t5=(index.get(THIRD) or [None])[0] is not None)

    def check(self, student: Student) -> None:
        super().check(student)
        config = student.config("transformer")
        takes, gives = config["pooled_projection_dim"], self._pooled(student)
        if takes != gives:
            raise EdgeflashError(
                f"{student.folder}: transformer takes {takes} numbers beside the conditioning "
                f"(pooled_projection_dim), but {FIRST} and {SECOND} give {gives}"
            )
        width, clip = config["joint_attention_dim"], self._clip_width(student)
        t5 = int(student.config(THIRD)["d_model"]) if self.t5 else width
        if t5 != width or clip > width:
            raise EdgeflashError(
                f"{student.folder}: transformer expects conditioning of width {width} "
                f"(joint_attention_dim), but the text encoders give {clip}"
                f"{f' and {t5}' * self.t5}"
            )

    def wrap(self, network: Any, component: str, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_sd3 import FoldedTransformer, T5Encoder, Transformer
        from edgeflash.networks_sdxl import TextEncoder

        if component == "transformer":
            whole = Transformer(network)
            return whole if timestep is None else FoldedTransformer(whole, timestep)
        if component in (FIRST, SECOND):
            return TextEncoder(network)
        return T5Encoder(network) if component == THIRD else super().wrap(network, component)

    def _text_encoder(self, student: Student, name: str) -> tuple[Specs, Specs]:
        config, tokens = student.config(name), (BATCH, self.tokenizer(student, name).max_length)
        if name == THIRD:
            below = floats("last_hidden_state", "below", (*tokens, config["d_model"]), "NSC")
            return (token_ids(tokens),), (below,)
        layers, shape = config["num_hidden_layers"], (*tokens, config["hidden_size"])
        pooled = floats("text_embeds", "pooled", (BATCH, config["projection_dim"]), "NC")
        names = ["last_hidden_state", *(f"hidden_states.{i}" for i in range(layers))]
        used = f"hidden_states.{layers - 1}"  # stock pipelines want them all
        roles = {each: "conditioning" if each == used else "unused" for each in names}
        states = (floats(each, role, shape, "NSC") for each, role in roles.items())
        return (token_ids(tokens),), (pooled, *states)

    def _denoiser(self, student: Student, z: tuple[int | str, ...]) -> tuple[Specs, Specs]:
        joint = (BATCH, *self._joint(student))
        inputs = (
            image("hidden_states", "sample", z),
            floats("encoder_hidden_states", "joint", joint, "NSC"),
            floats("pooled_projections", "pooled", (BATCH, self._pooled(student)), "NC"),
            floats("timestep", "timestep", (BATCH,), "N"),
        )
        return inputs, (image("out_hidden_states", "prediction", z),)

    def _joint(self, student: Student) -> tuple[int, int]:
        """(tokens, width) of what the denoiser attends to."""
        tokens = self.tokenizer(student).max_length + T5_LENGTH
        return tokens, int(student.config("transformer")["joint_attention_dim"])

    def _clip_width(self, student: Student) -> int:
        return sum(int(student.config(name)["hidden_size"]) for name in (FIRST, SECOND))

    def _pooled(self, student: Student) -> int:
        return sum(int(student.config(name)["projection_dim"]) for name in (FIRST, SECOND))

    def tokenizer(self, student: Student, text_encoder: str = FIRST) -> Tokenizer:
        if text_encoder == THIRD:
            return t5_tokenizer(student.folder / tokenizer_of(THIRD), T5_LENGTH)
        return clip_tokenizer(student, text_encoder)

    def tokenize(self, tokenizer: Path, texts: Sequence[str]) -> NDArray[np.int64]:
        if tokenizer.name == tokenizer_of(THIRD):
            spec = t5_tokenizer(tokenizer, T5_LENGTH)
        else:
            spec = tokenizer_spec(tokenizer)
        encode = read_tokenizer(tokenizer.parent, spec)
        return np.array([encode(text).ids for text in texts], np.int64)

    def encode_prompt(self, text_encoders: Sequence[Any], ids: Sequence[Tensor]) -> Tensor:
        """c [n, s + k, d]: CLIP's above T5's, and behind them the pooled states in k rows of d.

        Without T5 it is CLIP's alone.
        """
        import torch
        from torch.nn.functional import pad

        pairs = list(zip(text_encoders, ids, strict=True))
        told = [encoder(given, output_hidden_states=True) for encoder, given in pairs[:2]]
        text = torch.cat([each.hidden_states[-2] for each in told], -1)
        for encoder, given in pairs[2:]:
            below = encoder(given).last_hidden_state
            text = torch.cat([pad(text, (0, below.shape[-1] - text.shape[-1])), below], 1)
        pooled = torch.cat([each.text_embeds for each in told], -1)
        return torch.cat([text, as_rows(pooled, text.shape[-1])], 1)

    def listening(self, student: Student, denoiser: Any) -> Any:
        """Takes c apart, and puts zeros where T5 is not. Times may be numbers, or one a row."""
        import torch
        from torch.nn.functional import pad

        (tokens, width), wide = self._joint(student), self._pooled(student)

        def apart(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x, t, c = given
            text, pooled = of_rows(c, wide)
            lacks = (0, width - text.shape[-1], 0, tokens - text.shape[1])
            told = {"encoder_hidden_states": pad(text, lacks), "pooled_projections": pooled}
            told["timestep"] = torch.as_tensor(t, device=x.device).expand(len(x))
            return (x,), named | told

        denoiser.register_forward_pre_hook(apart, with_kwargs=True)
        return denoiser
