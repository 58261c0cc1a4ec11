"""What the ecosystem's own pipelines look for beside the networks: configs, scheduler, index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgeflash.student import Student


def write_configs(student: Student, out: Path) -> dict[str, Any]:
    """Writes the config of every component that lies below ``out``, and the scheduler's.

    Returns:
        The student's index, without what stays behind (a safety checker and the like). The caller
        says in it how its networks are called, and writes it.
    """
    latent = student.family.latent(student)
    others = [name for name in student.family.components() if not name.startswith("vae_")]
    for name in others:
        write_json(out / name / "config.json", student.config(name))
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
