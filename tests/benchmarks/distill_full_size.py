"""Distils a full-size Stable Diffusion 1.5 with random weights for a few steps.

Does it fit, run and end?

    python tests/benchmarks/distill_full_size.py                   # 512 px, two steps a stage

Tells the seconds and the peak memory of one `edgeflash distill` process that runs three stages at
their published sizes: tiny decoder, BK-SDM-Tiny's block removal, latent consistency.
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

from export_full_size import __file__ as writer
from PIL import Image

from edgeflash import shapes

PICTURES = 4


def write_pictures(folder: Path, size_px: int, count: int) -> None:
    """Captioned pictures of the size the model was made for."""
    folder.mkdir()
    pictures, captions, _ = shapes.batch(0, range(count))
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).resize((size_px, size_px)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="px")
    parser.add_argument("--steps", type=int, default=2, help="of every stage")
    parser.add_argument("--teacher", type=Path, help="write the teacher here, or use what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        teacher = options.teacher or home / "sd15"
        if not (teacher / "model_index.json").exists():
            subprocess.run([sys.executable, writer, "--write", teacher, "sd15"], check=True)
        write_pictures(home / "pictures", options.size, PICTURES)
        command = [sys.executable, "-m", "edgeflash", "distill", "--out", home / "student"]
        command += ["--by", "decoder", "--by", "blocks", "--by", "lcm", "--teacher", teacher]
        command += ["--data", home / "pictures"]
        sets = {"blocks.rule": "tiny", "data.size_px": options.size, "batch_size": 1}
        for name, value in (sets | {"steps": options.steps, "weights": "fp16"}).items():
            command += ["--set", f"{name}={value}"]
        start = time.perf_counter()
        _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
        seconds = time.perf_counter() - start
        print(f"{seconds:.0f} s, peak {usage.ru_maxrss / 2**20:.1f} GiB")
        if status == 0:
            tell(home / "student")
        sys.exit(os.waitstatus_to_exitcode(status))


def tell(student: Path) -> None:
    """Parameters and bytes of what came out."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(student / "unet")
    classes = {
        k: v[1]
        for k, v in json.loads((student / "model_index.json").read_text()).items()
        if isinstance(v, list)
    }
    size = sum(path.stat().st_size for path in student.rglob("*") if path.is_file())
    print(
        f"unet {unet.num_parameters():,} parameters, vae {classes['vae']}, {size / 2**20:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
