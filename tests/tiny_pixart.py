"""A small PixArt folder with random weights, written as diffusers itself writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WIDTH = 16  # of the text encoder
SMALL: dict[str, Any] = {  # inner width 24, which three divide: a third is that of each size
    "sample_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": WIDTH,
    "in_channels": 4,
    "out_channels": 8,
    "norm_type": "ada_norm_single",
}
PIECES = ["▁a", "▁red", "▁blue", "▁star", "▁ring", "s", *"abcdefghijklmnopqrstuvwxyz", "▁"]


def write_pixart(
    folder: Path,
    *,
    scheduler: str = "DPMSolverMultistepScheduler",
    sized: bool = False,
    called: str = "PixArtTransformer2DModel",
) -> Path:
    """16x16 px, latents 8x8.

    Args:
        folder: to write.
        scheduler: diffusers' class.
        sized: the transformer hears the size of the picture, as that of 1024 px does.
        called: the transformer's class in the index and its config.
    """
    import diffusers
    import torch
    from tiny_sdxl import small_vae

    torch.manual_seed(0)
    write_t5_tokenizer(folder / "tokenizer")
    t5_encoder(WIDTH).save_pretrained(folder / "text_encoder")
    config = SMALL | {"sample_size": 128 if sized else 8}
    transformer = diffusers.PixArtTransformer2DModel(**config)
    for name, parameter in transformer.named_parameters():  # fresh ones hardly listen
        if name.endswith(("attn2.to_out.0.weight", "caption_projection.linear_2.weight")):
            parameter.data.mul_(8)
        if name.endswith(("embedder.linear_2.weight", "adaln_single.linear.weight")):
            parameter.data.mul_(4)
    transformer.save_pretrained(folder / "transformer")
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": called}))
    small_vae().save_pretrained(folder / "vae")
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    getattr(diffusers, scheduler)(**betas).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", called],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_t5_tokenizer(folder: Path) -> None:
    """T5's rules, its special tokens at their places, letters and a few words."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -len(PIECES) / len(piece)) for piece in PIECES]
    tokenizer = T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(str(folder))


def t5_encoder(width: int) -> Any:
    """Reads `write_t5_tokenizer`'s tokens."""
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(
        T5Config(
            vocab_size=3 + len(PIECES),
            d_model=width,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    for name, parameter in encoder.named_parameters():
        if "shared" in name or "embed_tokens" in name:
            parameter.data.normal_()
    return encoder
