"""Small diffusers folders with random weights, written as diffusers itself writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAIRS = ["r e", "re d</w>", "s t", "st a", "sta r</w>", "b l", "bl u", "blu e</w>", "r i", "ri n"]
PAIRS += ["rin g</w>"]
WIDTH, LENGTH = 32, 16


def write_student(
    folder: Path,
    *,
    tiny_decoder: bool = True,
    mid_block: bool = True,
    widths: tuple[int, ...] = (16, 32),
    scheduler: str = "LCMScheduler",
    guidance_channels: int | None = None,
    task: str = "",
    seed: int = 0,
) -> Path:
    """A Stable Diffusion student: 16x16 px with the 2x tiny decoder, latents 8x8.

    ``task``: "" or, with a UNet that sees a picture, "Inpaint" or "InstructPix2Pix", or, with a
    network beside it that sees one, "ControlNet" or "Adapter".
    """
    import torch

    torch.manual_seed(seed)
    write_tokenizer(folder / "tokenizer")
    _text_encoder().save_pretrained(folder / "text_encoder")
    sees = {"InstructPix2Pix": 8, "Inpaint": 9}.get(task, 4)
    unet = _unet(mid_block, widths, guidance_channels, sees)
    unet.save_pretrained(folder / "unet")
    if task == "ControlNet":
        controlnet_of(unet).save_pretrained(folder / "controlnet")
    if task == "Adapter":
        adapter_of(unet).save_pretrained(folder / "adapter")
    _vae(tiny_decoder).save_pretrained(folder / "vae")
    # their pipelines do not set this right, as the plain one does
    options = {"clip_sample": False} if task else {}
    _scheduler(scheduler, **options).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{task}Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny" if tiny_decoder else "AutoencoderKL"],
    }
    if task == "ControlNet":
        index["controlnet"] = ["diffusers", "ControlNetModel"]
    if task == "Adapter":
        index["adapter"] = ["diffusers", "T2IAdapter"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def controlnet_of(unet: Any) -> Any:
    """A ControlNet beside a UNet of latents 2x smaller, whose layers of zeros have learnt."""
    from edgeflash.networks_control import beside

    controlnet = beside(unet, 2)
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name and not parameter.any():
            parameter.data.normal_(std=5 if "cond_embedding" in name else 0.3)
    return controlnet


def adapter_of(unet: Any) -> Any:
    """An adapter beside a UNet of latents 2x smaller, whose maps are as large as what they meet."""
    from edgeflash.networks_control import adapter_beside

    adapter = adapter_beside(unet, 2)
    for parameter in adapter.parameters():
        parameter.data.mul_(2)
    return adapter


def write_tokenizer(folder: Path) -> None:
    """CLIP's rules with letters and a few words."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(c + "</w>" for c in letters), *(p.replace(" ", "") for p in PAIRS)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *PAIRS]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=2 * 94 + len(PAIRS) + 2,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=2 * 94 + len(PAIRS),
            eos_token_id=2 * 94 + len(PAIRS) + 1,
            pad_token_id=2 * 94 + len(PAIRS) + 1,
        )
    )


def _unet(
    mid_block: bool, widths: tuple[int, ...], guidance_channels: int | None, sees: int
) -> Any:
    """Listens to prompt and time, as trained ones do and fresh ones hardly."""
    from diffusers import UNet2DConditionModel

    crossed = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=sees,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * crossed,
        up_block_types=("CrossAttnUpBlock2D",) * crossed + ("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn" if mid_block else None,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=guidance_channels,
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("attn2.to_out.0.weight", "time_emb_proj.weight")):
            parameter.data.mul_(10)
    unet.conv_in.weight.data[:, 4:5] *= 5  # and to what it sees, if anything, beside x_t
    unet.conv_in.weight.data[:, 5:] *= 50 if sees == 9 else 20
    return unet


def _vae(tiny: bool) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    if tiny:
        return AutoencoderTiny(
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )


def _scheduler(name: str, **more: Any) -> Any:
    import diffusers

    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**options, **more)
