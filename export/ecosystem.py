"""What the ecosystem's own pipelines look for beside the networks: configs, scheduler, index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeflash.bundle import DENOISERS, Component, TensorSpec
from edgeflash.student import Student

FOLDED = "this bundle has its one folded in: export with --keep-timestep for them"
SIZED = ("UNet2DConditionModel", "SD3Transformer2DModel")  # PixArt's sample_size says more


def write_configs(student: Student, components: Iterable[Component], out: Path) -> dict[str, Any]:
    """Writes the config of every component that lies below ``out``, and the scheduler's.

    The denoiser's ``sample_size``, from which stock pipelines know what size to draw by default, is
    the one that it was exported at, and fixed to.

    Returns:
        The student's index, without what stays behind (a safety checker and the like). The caller
        says in it how its networks are called, and writes it.
    """
    latent = student.family.latent(student)
    others = [name for name in student.family.components() if not name.startswith("vae_")]
    for name in others:
        config = student.config(name)
        if student.class_of(name)[1] in SIZED:
            config = config | {"sample_size": _cells(components)}
        write_json(out / name / "config.json", config)
    for name in ("vae_decoder", "vae_encoder"):
        if (out / name).is_dir():
            # Without a factor, GenAI takes 1 and optimum-intel the downsampling.
            config = {"scaling_factor": latent.scale} | as_kl(student.config("vae"))
            write_json(out / name / "config.json", config)
    shutil.copytree(student.folder / "scheduler", out / "scheduler")
    # GenAI reads the file as it is, where diffusers' pipelines put some settings right.
    settings = student.family.scheduler_config(student)
    write_json(out / "scheduler" / "scheduler_config.json", settings)
    index = dict(student.index)
    for key, value in index.items():
        if isinstance(value, list) and key not in student.family.folders:
            index[key] = [None, None]
    return index


def denoiser_input(components: Iterable[Component], role: str) -> TensorSpec | None:
    """What the denoiser is fed in that role; None: it takes no such input."""
    return next(c for c in components if c.name in DENOISERS).input(role)


def _cells(components: Iterable[Component]) -> int | list[int]:
    """Sides of the latents, as diffusers' configs have them: one number where they are square."""
    sample = denoiser_input(components, "sample")
    assert sample, "a denoiser takes a sample"
    height, width = (int(side) for side in sample.shape[2:4])
    return height if height == width else [height, width]


def as_kl(config: dict[str, Any]) -> dict[str, Any]:
    """A tiny autoencoder's config as that of an `AutoencoderKL`, the only one that others know.

    The exported decoder takes latent / scaling_factor like the other, and its factor is 1.
    """
    if config["_class_name"] != "AutoencoderTiny":
        return config
    widths = config["decoder_block_out_channels"]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": config.get("_diffusers_version", "0.35.0"),
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "scaling_factor": config.get("scaling_factor", 1.0),
        "shift_factor": config.get("shift_factor", 0.0),
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As JSON, without diffusers' note of where the model was loaded from."""
    told = {key: value for key, value in data.items() if key != "_name_or_path"}
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
