"""LoRA instead of the whole denoiser: put on it when a stage begins, taken off when it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeflash.errors import EdgeflashError
from edgeflash.networks_control import taken_off
from edgeflash.roles import Method

from .stage import Stage

TARGETS = (  # of diffusers' train_lcm_distill_lora_sd_wds.py: nearly all layers of the blocks
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


def add_lora(stage: Stage, method: Method, name: str, seed: int) -> None:
    """Freezes the stage's denoiser and adds alpha / r * B A to its layers (arXiv 2106.09685).

    B begins at 0, so the denoiser and its averages give what they gave before. Other players,
    critics and fake scores, train as they did.

    Args:
        stage: as `Method.begin` built it; its networks are changed in place.
        method: rank, alpha and targets.
        name: of the method, for complaints.
        seed: of A.

    Raises:
        EdgeflashError: a stage that trains no denoiser, or targets that it has no layer for.
    """
    name_of = stage.denoiser
    if name_of == "transformer":
        raise EdgeflashError(
            f"{name}.lora_rank: no LoRA is put on transformers so far: leave it out, to train all"
        )
    unet: Any = stage.results.get(name_of)
    if not any(player.network is unet for player in stage.players.values()):
        raise EdgeflashError(f"{name}.lora_rank: method {name!r} trains no denoiser: leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _add(unet, method, name)
    followers = [average for average, network in stage.targets if network is unet]
    if name_of in stage.averages:
        followers.append(stage.averages[name_of])
    for follower in followers:
        _add(follower.module, method, name)
        follower.module.load_state_dict(unet.state_dict())
        follower.requires_grad_(False)


def _add(unet: Any, method: Method, name: str) -> None:
    from peft import LoraConfig

    rank, targets = method.lora_rank, method.lora_targets or TARGETS
    assert rank
    config = LoraConfig(
        r=rank,
        lora_alpha=method.lora_alpha or rank,
        target_modules=list(targets),
        bias="none",
        init_lora_weights=True if method.lora_init == "uniform" else "gaussian",
    )
    steering = taken_off(unet)  # which stays as it is
    try:
        unet.add_adapter(config)
    except ValueError:  # none of them is there
        raise EdgeflashError(
            f"{name}.lora_targets: no layer of the denoiser ends in {' or '.join(targets)}"
        ) from None
    for part, network in steering.items():
        setattr(unet, part, network.requires_grad_(False))


def save_and_fuse(unet: Any, folder: Path) -> None:
    """Writes the LoRA as `load_lora_weights` reads it, and leaves a plain denoiser, LoRA fused."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    told = unet.peft_config["default"].to_dict()
    told["target_modules"] = sorted(told["target_modules"])  # a set: else no two files are equal
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=told,
    )
    unet.fuse_lora()
    unet.unload_lora()
