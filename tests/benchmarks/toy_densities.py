"""Every latent few-step method on two-dimensional densities, where it can be seen what it draws.

    python tests/benchmarks/toy_densities.py OUT [METHOD …] [--density ring] [--steps 2000]

ring: eight Gaussians of standard deviation 0.2 on a circle of radius 2; grid: 5 x 5 of 0.05, one
apart; both, where none is named. The points are latents [n, 2, 1, 1] of a real student folder, so
recipes, the training loop and the methods are those that pictures are distilled with. A teacher is
trained by `denoising`, and each student begins as a copy of it. Told in OUT/RESULTS.md for 1, 2 and
4 calls of the network, where a method's sampler has them: the share of samples within 2 standard
deviations of a mode (of the density itself 86.5 %) and how many modes have at least a quarter of
their due. Above the methods stand the teacher, by its own sampler, and the student before it
learns, by the sampler that most methods leave it with. ``add`` is not here: it judges pictures.

Steps are those that methods count, of which adversarial ones give some to their critics: so many
are no equal time, which is told as well. What is in OUT is not done again, method by method, so an
interrupted run goes on, and stays in the table; another recipe for it is refused. Not run at its
full length yet.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from edgeflash.disk import read_json, write_atomic
from edgeflash.distill.by_denoising import Denoising
from edgeflash.distill.data import Store, open_store
from edgeflash.distill.encoded import _weights_key, conditioning_of
from edgeflash.distill.few_steps import few_step_scheduler
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Recipe, recipe_of
from edgeflash.schedule import Schedule, advance, lower_schedule
from edgeflash.student import Student

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_student

DENSITIES = ("ring", "grid")
SAMPLES, DRAWN, SIDE = 8192, 8192, 8
COUNTS, TEACHER_CALLS = (1, 2, 4), 50
CAPTION = "a point"
TEACHER: dict[str, Any] = {
    "widths": (128,), "attention": (False,),  # its norms are of 16 groups: of 8 channels each
    "predicts": "epsilon", "caption_dropout": 0.0,
    "batch_size": 512, "learning_rate": 1e-3, "decay": "cosine", "ema": 0.999,
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
    "sdxs": {"guidance": 1.0},
    "imagine": {"guidance": 1.0, "denoising_steps": 4},
    "ladd": {"guidance": 1.0, "solver_steps": 10, "head_width": 64},
    "ufogen": {},
    # A point has no place to turn or cut, and its batch norms need more than the one sample of R1.
    "gan": {"guidance": 1.0, "solver_steps": 25, "augmented": False, "r1_weight": 0.0},
}
HEAD = """# Few-step methods on two-dimensional densities

`python tests/benchmarks/toy_densities.py`: share of {drawn:,} samples within 2 standard deviations
of a mode, and modes that have at least a quarter of their due, by calls of the network. Teachers
learnt in {teacher_steps:,} steps, students in {steps:,}, as each method counts its own.
"""


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
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=2,
            norm_num_groups=4,
            scaling_factor=1.0,
            sample_size=SIDE,
        )
        if not (home / "tokenizer").exists():
            tiny_student.write_tokenizer(home / "tokenizer")
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=tiny_student._text_encoder(),
            tokenizer=CLIPTokenizer.from_pretrained(home / "tokenizer"),
            unet=method.unet(2, 0, 1, tiny_student.WIDTH),
            scheduler=method.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(home)
    return home


def shard(path: Path) -> Path:
    """Pictures for the loop to count; what it learns from are the points, as their latents."""
    if not path.exists():
        png, draft = io.BytesIO(), path.with_suffix(".new")
        Image.new("RGB", (SIDE, SIDE)).save(png, "PNG")
        with tarfile.open(draft, "w") as tar:
            for i in range(SAMPLES):
                for suffix, data in (("png", png.getvalue()), ("txt", CAPTION.encode())):
                    entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        draft.rename(path)
    return path


def recipe(name: str, stage: dict[str, Any], out: Path, **sources: str) -> Recipe:
    data = {"kind": "shards", "path": str(shard(out / "points.tar")), "size_px": SIDE}
    plain = {"name": name, "licence": "apache-2.0", "data": data, "stage": [stage], **sources}
    return recipe_of(plain, name)


def as_latents(store: Store, vae: Path, density: str) -> None:
    """Puts the points where the loop looks for the latents of the pictures."""
    drawn = torch.from_numpy(points(density, SAMPLES, seed=1)).reshape(-1, 2, 1, 1)
    store.cached(f"latents {_weights_key(vae)}", lambda rows: drawn[rows])


def trained(made: Recipe, out: Path) -> Student:
    """The student of a recipe, named like it; it is trained unless it is there."""
    folder = out / made.name
    if not folder.exists() or _recipe_sha256(Student.open(folder)) != made.sha256:
        vae = Path(made.teacher or made.base or "") / "vae"
        as_latents(open_store(made.data, made.seed, out / "cache"), vae, out.name)
        distill(made, folder, cache=out / "cache")
    return Student.open(folder)


def _recipe_sha256(student: Student) -> str | None:
    return student.manifest.lineage.recipe_sha256 if student.manifest else None


@torch.no_grad()
def draw(student: Student, schedule: Schedule, store: Store, seed: int = 0) -> np.ndarray:
    """Points that a student makes of noise under the caption, [n, 2]."""
    generator = torch.Generator().manual_seed(seed)
    shop = Workshop(None, student.folder, store, student.folder, torch.device("cpu"))
    unet, c = shop.load(student.folder, "unet"), conditioning_of(shop, CAPTION)

    def noise() -> Any:  # numpy's arithmetic is what `advance` speaks of; torch's is the same
        return torch.randn(DRAWN, 2, 1, 1, generator=generator)

    x, previous = schedule.init * noise(), None
    for step in schedule.steps:
        t = torch.full((DRAWN,), step.t)
        output = unet(step.in_scale * x, t, c.expand(DRAWN, -1, -1)).sample
        fresh = noise() if step.needs_noise else None
        x, previous = advance(step, x, output, noise=fresh, previous=previous), (x, output)
    return np.asarray(x.reshape(DRAWN, 2))


def figures(
    name: str, made: Recipe, student: Student, schedules: Mapping[int, Schedule], out: Path
) -> dict[str, Any]:
    """What a student draws by each of some tables; kept, with the recipe that they are of."""
    path = out / "figures" / f"{name}.json"
    if path.exists() and (kept := read_json(path))["recipe_sha256"] == made.sha256:
        return kept
    store = open_store(made.data, made.seed, out / "cache")
    drawn = {str(n): told(draw(student, table, store), out.name) for n, table in schedules.items()}
    assert student.manifest
    seconds = student.manifest.lineage.seconds
    found = {"recipe_sha256": made.sha256, "seconds": seconds, "drawn": drawn}
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(found, indent=1))
    return found


def row(name: str, found: dict[str, Any], *, seconds: bool = True) -> str:
    """Of the table: share and modes by calls of the network, and what training took."""
    drawn = [found["drawn"].get(str(count)) for count in COUNTS]
    cells = [f"{d['within']:.1%}, {d['modes']}" if d else "-" for d in drawn]
    return f"| {name} | " + " | ".join([*cells, f"{found['seconds']:.0f}" * seconds]) + " |"


def method_row(name: str, out: Path, steps: int) -> str:
    """Trains and tells one method; what goes wrong with it is told in its place."""
    stage = {"by": name} | COMMON | METHODS[name] | {"steps": steps}
    try:
        made = recipe(name, stage, out, teacher=str(out / "teacher"))
        (method,), student = made.methods(), trained(made, out)
        runs = method.step_counts()
        assert runs
        tables = student.schedules([n for n in COUNTS if n in runs])
        return row(name, figures(name, made, student, tables, out))
    except EdgeflashError as error:
        return f"| {name} | " + " ".join(str(error).split()).replace("|", "/") + " | | | |"


def table(density: str, given: argparse.Namespace, tell: Any) -> None:
    """Trains the teacher of a density and every method, and tells the table line by line."""
    out = given.out.resolve() / density
    out.mkdir(parents=True, exist_ok=True)
    base = beginning(out / "base")
    stage = {"by": "denoising"} | TEACHER | {"steps": given.teacher_steps}
    made = recipe("teacher", stage, out, base=str(base))
    teacher = trained(made, out)
    own = figures("teacher", made, teacher, teacher.schedules((*COUNTS, TEACHER_CALLS)), out)
    few = few_step_scheduler(teacher.folder, max(COUNTS))
    untrained = {count: lower_schedule(few, count) for count in COUNTS}
    most = own["drawn"][str(TEACHER_CALLS)]
    tell(f"\n## {density}, {len(modes(density)[0])} modes\n")
    tell(f"Of the density itself 86.5 %. The teacher in {TEACHER_CALLS} calls of its own sampler:")
    tell(f"{most['within']:.1%}, {most['modes']} modes.\n")
    tell("| method | 1 call | 2 calls | 4 calls | s |\n|---|--:|--:|--:|--:|")
    tell(row("teacher, its own sampler", own))
    before = figures("student", made, teacher, untrained, out)
    tell(row("student, not trained", before, seconds=False))
    for name in METHODS:
        if name in (given.methods or METHODS) or (out / "figures" / f"{name}.json").exists():
            tell(method_row(name, out, given.steps))


def main(words: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--density", choices=DENSITIES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--teacher-steps", type=int, default=6000)
    given = parser.parse_args(words)
    if unknown := sorted({*given.methods} - {*METHODS}):
        parser.error(f"no such method here: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        write_atomic(given.out / "RESULTS.md", "\n".join(lines) + "\n")

    tell(HEAD.format(drawn=DRAWN, steps=given.steps, teacher_steps=given.teacher_steps))
    try:
        for density in [given.density] if given.density else DENSITIES:
            table(density, given, tell)
    except EdgeflashError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
