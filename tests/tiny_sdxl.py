"""A small SDXL folder with random weights, written as diffusers itself writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_student import LENGTH, PAIRS, write_tokenizer

from edgeflash.blueprints import SDXL

WIDTHS, POOLED = (32, 24), 20  # of the text encoders
SMALL = SDXL | {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": (2, 4),
    "cross_attention_dim": sum(WIDTHS),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    "norm_num_groups": 4,
}


def write_sdxl(
    folder: Path,
    *,
    scheduler: str = "EulerDiscreteScheduler",
    guidance_channels: int | None = None,
    zeros: bool = True,
) -> Path:
    """16x16 px, latents 8x8; the second tokenizer pads with "!" as SDXL's does."""
    import diffusers
    import torch

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        told = json.loads((folder / "tokenizer_2" / name).read_text()) | {"pad_token": "!"}
        (folder / "tokenizer_2" / name).write_text(json.dumps(told))
    for name, encoder in zip(("text_encoder", "text_encoder_2"), _text_encoders(), strict=True):
        encoder.save_pretrained(folder / name)
    unet = diffusers.UNet2DConditionModel(**SMALL, time_cond_proj_dim=guidance_channels)
    for name, parameter in unet.named_parameters():  # fresh ones hardly listen
        if name.endswith(("attn2.to_out.0.weight", "time_emb_proj.weight", "linear_1.weight")):
            parameter.data.mul_(6)
    unet.save_pretrained(folder / "unet")
    small_vae().save_pretrained(folder / "vae")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    leading = {"timestep_spacing": "leading", "steps_offset": 1}
    getattr(diffusers, scheduler)(**betas, **leading).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": zeros,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _text_encoders() -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, second = (clip_config(width, POOLED) for width in WIDTHS)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def clip_config(width: int, pooled: int, layers: int = 2) -> Any:
    """Of a text encoder that reads `write_tokenizer`'s tokens."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=2 * 94 + len(PAIRS) + 2,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=pooled,
        bos_token_id=2 * 94 + len(PAIRS),
        eos_token_id=2 * 94 + len(PAIRS) + 1,
        pad_token_id=2 * 94 + len(PAIRS) + 1,
    )


def small_vae(channels: int = 4, **options: Any) -> Any:
    """2x, of two resolutions."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=channels,
        **({"scaling_factor": 0.13025} | options),
    )
