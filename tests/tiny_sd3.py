"""A small Stable Diffusion 3 folder with random weights, written as diffusers itself writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_pixart import t5_encoder, write_t5_tokenizer
from tiny_sdxl import clip_config, small_vae
from tiny_student import write_tokenizer

WIDTHS, POOLED, JOINT, CHANNELS = (16, 24), (12, 20), 48, 16
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 2,  # the last of them hears the prompt otherwise than the others
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "joint_attention_dim": JOINT,
    "caption_projection_dim": 24,
    "pooled_projection_dim": sum(POOLED),
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "pos_embed_max_size": 16,
}


def write_sd3(folder: Path, *, t5: bool = True) -> Path:
    """16x16 px, latents 8x8 of 16 channels; the second tokenizer pads with "!" as SD 3's does."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        told = json.loads((folder / "tokenizer_2" / name).read_text()) | {"pad_token": "!"}
        (folder / "tokenizer_2" / name).write_text(json.dumps(told))
    for name, width, pooled in zip(("text_encoder", "text_encoder_2"), WIDTHS, POOLED, strict=True):
        encoder = transformers.CLIPTextModelWithProjection(clip_config(width, pooled, layers=1))
        encoder.save_pretrained(folder / name)
    if t5:
        write_t5_tokenizer(folder / "tokenizer_3")
        t5_encoder(JOINT).save_pretrained(folder / "text_encoder_3")
    transformer = diffusers.SD3Transformer2DModel(**SMALL)
    for name, parameter in transformer.named_parameters():  # fresh ones hardly listen
        if name.endswith(("context_embedder.weight", "norm1.linear.weight", "linear_2.weight")):
            parameter.data.mul_(6)
    transformer.save_pretrained(folder / "transformer")
    vae = small_vae(CHANNELS, scaling_factor=1.5305, shift_factor=0.0609)
    vae.save_pretrained(folder / "vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"] if t5 else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5Tokenizer"] if t5 else [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
