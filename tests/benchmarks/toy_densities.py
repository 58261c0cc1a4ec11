"""Every latent few-step method on two-dimensional densities, where it can be seen what it draws.

    python tests/benchmarks/toy_densities.py OUT [METHOD …] [--density ring] [--steps 2000]

ring: eight Gaussians of standard deviation 0.2 on a circle of radius 2; grid: 5 x 5 of 0.05, one
apart. The points are latents [n, 2, 1, 1] of a real student folder, so recipes, the training loop
and the methods are those that pictures are distilled with. A teacher is trained by `denoising`, and
each student begins as a copy of it. Told for 1, 2 and 4 calls of the network: the share of samples
within 2 standard deviations of a mode (of the density itself 86.5 %) and how many modes have at
least a quarter of their due. Methods whose losses look at pictures have nothing to look at here.

What is in OUT already is not trained again, so an interrupted run goes on.
Written, and not run to its end yet.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from edgeflash.distill.by_denoising import Denoising
from edgeflash.distill.data import Store, open_store
from edgeflash.distill.encoded import _weights_key
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.networks_sd import load_network
from edgeflash.recipe import Recipe, recipe_of
from edgeflash.schedule import Schedule, advance
from edgeflash.student import Student

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_student

SAMPLES, DRAWN, SIDE = 8192, 8192, 8
COUNTS = (1, 2, 4)
TEACHER: dict[str, Any] = {
    "widths": (64, 128), "attention": (False, False), "predicts": "epsilon",
    "steps": 6000, "batch_size": 512, "learning_rate": 1e-3, "decay": "cosine", "ema": 0.999,
}  # fmt: skip
COMMON = {"batch_size": 256, "learning_rate": 2e-4, "warmup_steps": 50, "ema": 0.99}
METHODS: dict[str, dict[str, Any]] = {  # nothing is guided: there is one caption
    "lcm": {"ddim_steps": 50, "w_min": 0.0, "w_max": 0.0},
    "tcd": {"ddim_steps": 50, "w_min": 0.0, "w_max": 0.0},
    "consistency": {"guidance": 1.0, "distance": "l2"},
    "scm": {"guidance": 1.0},
    "meanflow": {"guidance": 1.0, "denoising_steps": 4},
    "progressive": {"guidance": 1.0},
    "perflow": {"guidance": 1.0},
    "dmd": {"real_guidance": 1.0, "fake_updates": 5},
    "flash": {"guidance_min": 1.0, "guidance_max": 1.0, "teacher_steps": 16},
    "ladd": {"guidance": 1.0, "solver_steps": 10, "head_width": 64},
    "ufogen": {},
}


def modes(density: str) -> tuple[np.ndarray, float]:
    """Centres [k, 2] of the Gaussians, and their standard deviation."""
    if density == "ring":
        angles = np.arange(8) * np.pi / 4
        return 2 * np.stack([np.cos(angles), np.sin(angles)], 1), 0.2
    side = np.arange(-2.0, 3.0)
    return np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), 0.05


def points(density: str, count: int, seed: int) -> np.ndarray:
    """Samples of the density, [count, 2]."""
    rng = np.random.default_rng(seed)
    centres, spread = modes(density)
    return centres[rng.integers(len(centres), size=count)] + spread * rng.normal(size=(count, 2))


def told(drawn: np.ndarray, density: str) -> dict[str, float]:
    """Share within 2 standard deviations of a mode, and the modes that are not forgotten."""
    centres, spread = modes(density)
    gaps = np.linalg.norm(drawn[:, None] - centres, axis=-1)
    near = gaps.min(1) <= 2 * spread
    counts = np.bincount(gaps.argmin(1)[near], minlength=len(centres))
    due = len(drawn) / len(centres)
    return {"within": float(near.mean()), "modes": int((counts >= due / 4).sum())}


def beginning(home: Path) -> Path:
    """A student folder to train the teacher in; its autoencoder is never asked."""
    if not (home / "model_index.json").exists():
        method = Denoising(**TEACHER)
        blocks = 4  # 8 px to one latent
        vae = AutoencoderKL(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=2,
            norm_num_groups=4,
            scaling_factor=1.0,
            sample_size=SIDE,
        )
        tiny_student.write_tokenizer(home / "tokenizer")
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=tiny_student._text_encoder(),
            tokenizer=CLIPTokenizer.from_pretrained(home / "tokenizer"),
            unet=method.unet(2, 1, tiny_student.WIDTH),
            scheduler=method.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(home)
    return home


def shard(path: Path) -> Path:
    """Pictures for the loop to count; what it learns from are the points, as their latents."""
    if not path.exists():
        png = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE)).save(png, "PNG")
        with tarfile.open(path, "w") as tar:
            for i in range(SAMPLES):
                for suffix, data in (("png", png.getvalue()), ("txt", b"a point")):
                    entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return path


def recipe(name: str, stage: dict[str, Any], out: Path, **sources: str) -> Recipe:
    data = {"kind": "shards", "path": str(shard(out / "points.tar")), "size_px": SIDE}
    plain = {"name": name, "licence": "apache-2.0", "data": data, "stage": [stage], **sources}
    return recipe_of(plain, name)


def as_latents(store: Store, vae: Path, density: str) -> None:
    """Puts the points where the loop looks for the latents of the pictures."""
    drawn = torch.from_numpy(points(density, SAMPLES, seed=1)).reshape(-1, 2, 1, 1)
    store.cached(f"latents {_weights_key(vae)}", lambda rows: drawn[rows])


def trained(made: Recipe, folder: Path, density: str, out: Path) -> Student:
    """The student of a recipe; it is trained unless it is there."""
    if not folder.exists():
        vae = Path(made.teacher or made.base or "") / "vae"
        as_latents(open_store(made.data, made.seed, out / "cache"), vae, density)
        distill(made, folder, cache=out / "cache")
    return Student.open(folder)


@torch.no_grad()
def draw(student: Student, schedule: Schedule, seed: int = 0) -> np.ndarray:
    """Points that the student makes of noise, [n, 2]."""
    generator = torch.Generator().manual_seed(seed)
    unet = load_network(student, "unet").eval()

    def noise() -> torch.Tensor:
        return torch.randn(DRAWN, 2, 1, 1, generator=generator)

    x, previous = schedule.init * noise(), None
    c = torch.zeros(DRAWN, 1, tiny_student.WIDTH)
    for step in schedule.steps:
        t = torch.full((DRAWN,), step.t)
        output = unet(step.in_scale * x, t, encoder_hidden_states=c).sample
        fresh = noise() if step.needs_noise else None
        x, previous = advance(step, x, output, noise=fresh, previous=previous), (x, output)
    return np.asarray(x.reshape(DRAWN, 2))


def row(name: str, student: Student, counts: tuple[int, ...], density: str) -> str:
    """Of the table: share and modes by calls of the network."""
    cells = []
    for count in COUNTS if counts == COUNTS else counts:
        try:
            found = told(draw(student, student.schedules((count,))[count]), density)
            cells.append(f"{found['within']:.1%}, {found['modes']}")
        except EdgeflashError:
            cells.append("")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--density", choices=("ring", "grid"), default="ring")
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    out = given.out.resolve() / given.density
    out.mkdir(parents=True, exist_ok=True)
    base = beginning(out / "base")
    stage = TEACHER | {"stochastic": False}
    teacher = trained(
        recipe("teacher", stage, out, base=str(base)), out / "teacher", given.density, out
    )
    print("| method | 1 call | 2 calls | 4 calls |\n|---|--:|--:|--:|")
    print(row("teacher, its own sampler", teacher, COUNTS, given.density))
    print(row("teacher, 50 calls", teacher, (50,), given.density), flush=True)
    for name in given.methods or METHODS:
        stage = {"by": name} | COMMON | METHODS[name] | {"steps": given.steps}
        try:
            made = recipe(name, stage, out, teacher=str(out / "teacher"))
            student = trained(made, out / name, given.density, out)
        except EdgeflashError as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        print(row(name, student, COUNTS, given.density), flush=True)


if __name__ == "__main__":
    main()
