"""Exports full-size models with random weights; tells seconds and peak memory of the process.

    python tests/benchmarks/export_full_size.py sdxs-512            # also: bk-sdm-tiny, sd15
    python tests/benchmarks/export_full_size.py sd15 --precision fp16

The folder is written once, by another process, and is gone at the end unless ``--keep`` names a
place for it. What is measured is one fresh process: from starting Python to the finished bundle,
imports, hashes and the parity ladder on one golden included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
VIT_L |= {"num_attention_heads": 12}
VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
VIT_H |= {"num_attention_heads": 16}
PARAMETERS = {  # of the UNet
    "sd15": 859_520_964,
    "bk-sdm-tiny": 323_384_964,
    "sdxs-512": 318_695_364,
}


def unet_config(name: str) -> dict[str, Any]:
    """The UNet as its authors configured it."""
    crossed, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    if name == "sd15":
        return {
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        }
    config = {"block_out_channels": (320, 640, 1280), "layers_per_block": 1}
    config |= {"mid_block_type": None}
    if name == "bk-sdm-tiny":
        return config | {
            "down_block_types": (crossed,) * 3,
            "up_block_types": (crossed.replace("Down", "Up"),) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        }
    return config | {
        "down_block_types": (plain, crossed, crossed),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
    }


def write_folder(name: str, folder: Path) -> None:
    """The whole diffusers folder, at the size its authors published."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, **unet_config(name))
    assert unet.num_parameters() == PARAMETERS[name], unet.num_parameters()
    unet.save_pretrained(folder / "unet")
    del unet
    text = CLIPTextConfig(vocab_size=49408, **(VIT_H if name == "sdxs-512" else VIT_L))
    text.bos_token_id, text.eos_token_id = 49406, 49407
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    vae = AutoencoderTiny() if name == "sdxs-512" else AutoencoderKL(**_kl())
    vae.save_pretrained(folder / "vae")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    LCMScheduler(**betas).save_pretrained(folder / "scheduler")
    _write_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def _kl() -> dict[str, Any]:
    return {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 512,
    }


def _write_tokenizer(folder: Path) -> None:
    """CLIP's rules and special tokens, with letters alone."""
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)]
    tokens = {t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters)])}
    tokens |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def export(folder: Path, out: Path, target: str, precision: str) -> None:
    """What `edgeflash export` does, with the time of each stage."""
    from edgeflash import shelf
    from edgeflash.export.line import export_student
    from edgeflash.roles import Target
    from edgeflash.student import Student

    lowered = shelf.make(Target, target, {"precision": precision})
    bundle = export_student(Student.open(folder), lowered, out, steps=(1,))
    for figure in bundle.manifest.parity:
        if figure.metric in ("psnr_db", "delta_ratio"):
            print(f"{figure.rung} {figure.component:<14} {figure.metric} {figure.value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PARAMETERS)
    parser.add_argument("--to", default="onnx")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--keep", type=Path, help="write the folder here, or use what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / options.name
        if not (folder / "model_index.json").exists():
            subprocess.run([sys.executable, __file__, "--write", folder, options.name], check=True)
        out = Path(scratch) / "bundle"
        start = time.perf_counter()
        command = [sys.executable, __file__, "--export", folder, out, options.to, options.precision]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        print(
            f"{options.name} to {options.to} {options.precision}: {seconds:.1f} s "
            f"({usage.ru_utime + usage.ru_stime:.1f} s of CPU), "
            f"peak {usage.ru_maxrss / 2**20:.2f} GiB"
        )
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_folder(sys.argv[3], Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--export"]:
        export(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:6])
    else:
        main()
