"""Stable Diffusion XL, and the compact students made from it: SSD-1B, KOALA and the like.

Two CLIP text encoders read every prompt. The denoiser takes what goes into the last layer of each,
side by side, and beside it the second one's projected state at the end token and the size of the
picture (arXiv 2307.01952, sec. 2). Tensor names are those of optimum's ONNX pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgeflash import control
from edgeflash.conditioning import SIZES, time_ids
from edgeflash.errors import EdgeflashError
from edgeflash.family_sd import StableDiffusion
from edgeflash.latent_diffusion import AUTOENCODERS, BATCH, Specs, as_rows, floats, of_rows
from edgeflash.student import Student

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST, SECOND = "text_encoder", "text_encoder_2"
CLASSES = {
    FIRST: ("CLIPTextModel",),
    SECOND: ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": AUTOENCODERS,
}


class StableDiffusionXL(StableDiffusion):
    """SDXL base and everything of its shape: see the module."""

    name = "sdxl"
    steered_pipelines: ClassVar[dict[str, str]] = {
        control.NAME: "StableDiffusionXLControlNetPipeline",
        control.ADAPTER: "StableDiffusionXLAdapterPipeline",
    }
    pipelines = ("StableDiffusionXLPipeline", *steered_pipelines.values())
    folders = (*StableDiffusion.folders, "tokenizer_2", SECOND)
    single_files: ClassVar[dict[str, str]] = {}
    cfg_scale = 5.0
    classes = CLASSES
    fed: ClassVar[dict[str, str]] = {"addition_embed_type": "text_time"}

    def check(self, student: Student) -> None:
        super().check(student)
        unet = student.config("unet")
        if unet.get("addition_embed_type") != "text_time":
            raise EdgeflashError(
                f"{student.folder}: unet has addition_embed_type "
                f"{unet.get('addition_embed_type')!r}, where this family has 'text_time'"
            )
        pooled, sizes = self._pooled(student), SIZES * unet["addition_time_embed_dim"]
        if (takes := unet["projection_class_embeddings_input_dim"]) != pooled + sizes:
            raise EdgeflashError(
                f"{student.folder}: unet takes {takes} numbers beside the conditioning "
                f"(projection_class_embeddings_input_dim), but {SECOND} and six sizes give "
                f"{pooled} + {sizes}"
            )

    def width(self, student: Student) -> int:
        return sum(int(student.config(name)["hidden_size"]) for name in self.text_encoders)

    def scheduler_config(self, student: Student) -> dict[str, Any]:
        return student.config("scheduler")  # this pipeline changes nothing of it

    def _wrap(self, network: Any, component: str, timestep: float | None) -> nn.Module:
        from edgeflash.networks_sdxl import FoldedUnet, TextEncoder, Unet

        if component == "unet":
            return Unet(network) if timestep is None else FoldedUnet(network, timestep)
        if component in self.text_encoders:
            return TextEncoder(network)
        return super()._wrap(network, component, None)

    def _text_encoder(self, student: Student, name: str) -> tuple[Specs, Specs]:
        config = student.config(name)
        layers, width = config["num_hidden_layers"], config["hidden_size"]
        inputs, (states, _) = super()._text_encoder(student, name)
        last = states.model_copy(update={"role": "unused"})
        if name == FIRST:
            ends = (last, floats("pooler_output", "unused", (BATCH, width), "NC"))
        else:
            ends = (floats("text_embeds", "pooled", (BATCH, self._pooled(student)), "NC"), last)
        before = (  # stock pipelines want them all
            floats(
                f"hidden_states.{i}",
                "conditioning" if i == layers - 1 else "unused",
                states.shape,
                "NSC",
            )
            for i in range(layers)
        )
        return inputs, (*ends, *before)

    def _denoiser(self, student: Student, z: tuple[int | str, ...]) -> tuple[Specs, Specs]:
        (sample, timestep, text, *guidance), outputs = super()._denoiser(student, z)
        pooled = floats("text_embeds", "pooled", (BATCH, self._pooled(student)), "NC")
        sizes = floats("time_ids", "time_ids", (BATCH, SIZES), "NC")
        return (sample, timestep, text, pooled, sizes, *guidance), outputs

    def _pooled(self, student: Student) -> int:
        """Width of the second text encoder's projected state."""
        return int(student.config(SECOND)["projection_dim"])

    def no_prompt(self, student: Student) -> Literal["zeros"] | None:
        # What the pipeline's constructor takes for granted where the index is silent.
        return "zeros" if student.index.get("force_zeros_for_empty_prompt", True) else None

    def upcasts(self, student: Student) -> bool:
        # Its values leave float16's range; what was retrained for it says false. Where a config is
        # silent, diffusers' own classes do not agree.
        kl = student.class_of("vae")[1] == "AutoencoderKL"
        return bool(student.config("vae").get("force_upcast", kl))

    def encode_prompt(self, text_encoders: Sequence[Any], ids: Sequence[Tensor]) -> Tensor:
        """c [n, s + k, d]: the conditioning, and behind it the pooled state in k rows of d."""
        import torch

        told = [
            encoder(given, output_hidden_states=True)
            for encoder, given in zip(text_encoders, ids, strict=True)
        ]
        text = torch.cat([each.hidden_states[-2] for each in told], -1)
        return torch.cat([text, as_rows(told[1].text_embeds, text.shape[-1])], 1)

    def listening(self, student: Student, denoiser: Any) -> Any:
        """Takes c apart, and tells of pictures as large as the latent means, uncropped."""
        import torch

        unit, wide = self.latent(student).downsampling, self._pooled(student)

        def apart(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x, t, c = given
            text, pooled = of_rows(c, wide)
            height, width = (unit * side for side in x.shape[-2:])
            added = {
                "text_embeds": pooled,
                "time_ids": torch.from_numpy(time_ids(height, width)).to(c).expand(len(c), -1),
            }
            return (x, t, text), named | {"added_cond_kwargs": added}

        denoiser.register_forward_pre_hook(apart, with_kwargs=True)
        self._attach(student, denoiser)
        return denoiser
