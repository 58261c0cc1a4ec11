"""The models inside the package: small enough, and diffusers alone draws the same with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import Exported

from edgeflash import shapes
from edgeflash.distill.judge import frechet_distance, load_judge, look, verdict
from edgeflash.embedded import embedded
from edgeflash.named_timesteps import unusual
from edgeflash.noise import randn
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.score import draw, score
from edgeflash.shelf import make
from edgeflash.student import Student

SHARES = {"int8": 0.98, "int8-weights": 0.995, "int4-weights": 0.95}  # of fp32's accuracy
JUDGED = 10_000
PROMPT = "a large red circle on the left on a white background"


def mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


@pytest.mark.parametrize(
    ("name", "most"), [("shapes-teacher", 19.07), ("shapes-student", 11.44), ("shapes-judge", 1.9)]
)
def test_the_models_are_as_small_as_promised(name: str, most: float) -> None:
    assert mib(embedded(name)) <= most  # 20, 12 and 2 MB


@pytest.mark.parametrize("name", ["shapes-teacher", "shapes-student"])
def test_the_folders_are_sound_and_say_where_they_come_from(name: str) -> None:
    student = Student.open(embedded(name))
    assert student.manifest and student.manifest.lineage.recipe_sha256
    assert student.manifest.lineage.weights_licence == "apache-2.0"
    card = (embedded(name) / "README.md").read_text()
    assert "edgeflash score" in card and student.manifest.lineage.recipe_sha256[:12] in card


def diffusers_picture(
    folder: Path, steps: int, guidance: float, timesteps: list[int] | None
) -> np.ndarray:
    """What diffusers alone draws from edgeflash's noise, uint8 [64, 64, 3].

    ``timesteps``: what it is told, as users are.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        str(folder), torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    draws = (torch.from_numpy(randn((1, channels, size, size), 5, k)) for k in range(steps + 1))
    with pytest.MonkeyPatch.context() as patch:  # a stochastic sampler draws at every step
        fresh = f"{type(pipeline.scheduler).__module__}.randn_tensor"
        patch.setattr(fresh, lambda *_, **__: next(draws))
        drawn: Any = pipeline(
            PROMPT,
            latents=next(draws),
            num_inference_steps=steps,
            timesteps=timesteps,
            guidance_scale=guidance,
            output_type="np",
        )
    return np.rint(drawn.images[0] * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("shapes-student", 1, marks=pytest.mark.slow),
        ("shapes-student", 4),
        pytest.param("shapes-teacher", 4, marks=pytest.mark.slow),
    ],
)
def test_diffusers_alone_draws_the_same_picture(tmp_path: Path, name: str, steps: int) -> None:
    from edgeflash.export.line import export_student
    from edgeflash.export_options import ExportOptions

    folder = embedded(name)
    student = Student.open(folder)
    options = ExportOptions(steps=(steps,))
    bundle = export_student(student, make(Target, "torch", {}), tmp_path / "b", options)
    with TextToImage(bundle, make(Runtime, "torch", {})) as pipeline:
        ours = pipeline.generate(Request(prompt=PROMPT, seed=5)).images[0]
    scale = student.guidance().scale if student.guidance().kind == "cfg" else 0.0
    told = unusual(student, student.schedules([steps])).get(steps)
    assert bool(told) == (name == "shapes-student" and steps == 4)
    theirs = diffusers_picture(folder, steps, scale, told and [int(t) for t in told])
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


@pytest.mark.slow
def test_quantized_the_student_meets_its_prompts_as_often(tmp_path: Path) -> None:
    """At its fewest steps, whatever student ships.

    All draw the same prompts from the same seeds, so that what turns right or wrong alone is noise.
    """
    from edgeflash.export.line import export_student
    from edgeflash.export_options import ExportOptions

    student = Student.open(embedded("shapes-student"))
    steps = min(student.step_counts())

    def accuracy(precision: str) -> float:
        target, folder = make(Target, "onnx", {"precision": precision}), tmp_path / precision
        bundle = export_student(student, target, folder, ExportOptions(steps=(steps,)))
        runtime = make(Runtime, "onnx", {})
        return score(bundle, runtime, steps=steps, images=JUDGED).prompt_accuracy

    whole = accuracy("fp32")
    shares = {precision: accuracy(precision) / whole for precision in SHARES}
    assert all(shares[name] >= least for name, least in SHARES.items()), shares


def test_the_judge_reads_every_attribute() -> None:
    pictures, captions, known = shapes.batch(shapes.HELD_OUT_SEED + 2, range(600))
    found, _ = look(load_judge(), pictures)
    for column, name in enumerate(shapes.HEADS):
        there = known[:, column] >= 0
        assert (found == known)[there, column].mean() >= 0.99, name
    said = verdict(pictures, captions)
    assert said.prompt_accuracy > 0.95 and said.fd is not None
    gray = pictures.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    without_colour = verdict(gray, captions)
    assert without_colour.fd and without_colour.fd > 5 * said.fd
    wrong = verdict(pictures, captions[::-1])
    assert wrong.prompt_accuracy < 0.05


def test_the_teachers_autoencoder_gives_pictures_back() -> None:
    """PSNR over the squared error of all pixels of held-out renders, of a peak of 2."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(embedded("shapes-teacher") / "vae").float().eval()
    pictures, _, _ = shapes.batch(shapes.HELD_OUT_SEED + 3, range(60))
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        back = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    assert 10 * torch.log10(4 / (back - x).square().mean()) >= 27


def test_judged_pictures_come_in_the_order_of_their_seeds(guided: Exported) -> None:
    """However many draw: that of prompt i has seed i, as `edgeflash run` would draw it."""
    prompts = tuple(f"a {hue} star" for hue in ("red", "blue", "green") * 15)
    runtime = make(Runtime, "onnx", {})
    told: list[int] = []
    pictures = draw(
        guided.bundle, runtime, prompts, steps=2, tell=lambda done, of: told.append(done)
    )
    assert told == [20, 40, 45] and len(pictures) == 45
    with TextToImage(guided.bundle, runtime) as pipeline:
        for i in (0, 19, 20, 44):
            alone = pipeline.generate(Request(prompt=prompts[i], seed=i, steps=2)).images[0]
            assert np.abs(pictures[i].astype(int) - alone.astype(int)).max() <= 1


def test_the_frechet_distance_of_gaussians() -> None:
    """|m1 - m2|^2 + d (s1 - s2)^2 for isotropic ones."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (20_000, 4)), rng.normal(0.5, 2, (20_000, 4))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, b) == pytest.approx(4 * 0.25 + 4 * 1, rel=0.05)


@pytest.mark.parametrize("recipe", ["shapes-teacher", "shapes"])
def test_the_models_name_the_recipes_in_the_package(recipe: str) -> None:
    """What differed when they were made, their cards say."""
    from edgeflash.recipe import find_recipe, read_recipe

    name = {"shapes": "shapes-student"}.get(recipe, recipe)
    told = json.loads((embedded(name) / "edgeflash.json").read_text())
    assert told["lineage"]["recipe_sha256"] == read_recipe(find_recipe(recipe)).sha256
