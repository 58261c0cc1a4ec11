"""Painting into pictures: networks that see a mask and the rest of the picture, and blending."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import QUIET, Exported
from test_denoising import shop as shop  # a fixture
from test_distill import picture_folder
from tiny_student import write_student
from typer.testing import CliRunner

from edgeflash import shelf
from edgeflash.bundle import Bundle, Latent
from edgeflash.conditions import beside, example, inpainting, of_image
from edgeflash.disk import MANIFEST
from edgeflash.distill.by_denoising import Denoising
from edgeflash.distill.fit import check_kind
from edgeflash.distill.run import distill
from edgeflash.distill.seen import painted, unprompted
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.golden import load_tensors
from edgeflash.latent_diffusion import as_rows
from edgeflash.noise import randn
from edgeflash.recipe import changed, find_recipe, read_recipe, recipe_of
from edgeflash.roles import Method, Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import runtime_for

PROMPT, SEED, SCALE = "a red star", 5, 3.0
PICTURE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((16, 16), np.bool_)
MASK[3:11, 5:16] = True  # on no border of cells: where one is rounded to shows


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "inpainter"
    return write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler", task="Inpaint")


@pytest.fixture(scope="module", params=["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def painter(
    request: pytest.FixtureRequest, inpainter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / request.param
    options = ExportOptions(
        steps=(3,), guidance=Guidance(kind="cfg", scale=SCALE), prompts=(PROMPT,)
    )
    target = shelf.make(Target, request.param, {})
    return export_student(Student.open(inpainter), target, out, options, console=QUIET)


def by_diffusers(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """[16, 16, 3] in [0, 1], as its own pipeline paints; encoders give the mean, as ours do."""
    from diffusers import StableDiffusionInpaintPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from PIL import Image

    patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator: self.mode())
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    sampler = pipeline.scheduler  # only the plain pipeline sets this right
    pipeline.scheduler = type(sampler).from_config(sampler.config, clip_sample=False)
    return pipeline(
        PROMPT,
        image=Image.fromarray(PICTURE),
        mask_image=Image.fromarray(np.where(MASK, 255, 0).astype(np.uint8)),
        num_inference_steps=3,
        guidance_scale=SCALE,
        strength=1.0,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        output_type="np",
    ).images[0]


def test_it_paints_as_diffusers_does(
    painter: Bundle, inpainter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(PROMPT, seed=SEED, image=PICTURE, mask=MASK)
    with TextToImage(painter, runtime_for(painter), low_memory=True) as pipeline:
        ours = pipeline.generate(request).images[0]
    theirs = by_diffusers(inpainter, monkeypatch)
    assert np.abs(ours / 255 - theirs).max() < 1 / 255
    other = Request(PROMPT, seed=SEED, image=255 - PICTURE, mask=MASK)
    with TextToImage(painter, runtime_for(painter)) as pipeline:
        pipeline.load()
        two = Request(("blue ring", PROMPT), seed=SEED - 1, image=PICTURE, mask=MASK)
        assert np.abs(pipeline.generate(two).images[1].astype(int) - ours).max() <= 1
        assert np.abs(pipeline.generate(other).images[0].astype(int) - ours).max() > 8


def test_the_manifest_says_what_the_further_channels_are(painter: Bundle) -> None:
    told = json.loads((painter.folder / MANIFEST).read_text())
    seen = [{"kind": "mask", "channels": 1}, {"kind": "masked_image", "channels": 4}]
    assert told["conditions"] == seen and told["format_version"] == 3
    sample = painter.denoiser.input("sample")
    assert sample and sample.shape[1:] == (9, 8, 8)
    assert painter.denoiser.output("prediction").shape[1:] == (4, 8, 8)
    golden = load_tensors(painter.folder / painter.manifest.goldens[0].tensors)
    assert golden["latent"].shape == (1, 4, 8, 8)
    mask = golden["input.0"][0, 4]
    assert mask.sum() == 16 and golden["input.2"].shape == (1, 9, 8, 8)
    if (painter.folder / "model_index.json").is_file():  # what stock pipelines go by
        index = json.loads((painter.folder / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionInpaintPipeline"


def test_what_cannot_be_painted_is_said(painter: Bundle) -> None:
    pipeline = TextToImage(painter, runtime_for(painter))
    for options, said in (
        ({}, "cannot do that: it sees a picture too: give --image and --mask, and no more of it"),
        ({"image": PICTURE}, "give --image and --mask"),
        ({"image": PICTURE, "mask": MASK[:8]}, "the mask is 8x16 px, but the image 16x16"),
    ):
        with pytest.raises(EdgeflashError, match=said):
            pipeline.check(Request(PROMPT, **options))


def test_conditions_that_do_not_fit_are_refused(painter: Bundle) -> None:
    fewer = painter.manifest.model_copy(update={"conditions": painter.manifest.conditions[:1]})
    with pytest.raises(EdgeflashError, match="takes 9 channels, but latent and conditions have 5"):
        TextToImage(Bundle(painter.folder, fewer), runtime_for(painter))


def test_others_blend_latents_as_diffusers_does(
    guided: Exported, guided_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(PROMPT, seed=SEED, steps=3, image=PICTURE, mask=MASK)
    with TextToImage(guided.bundle, runtime_for(guided.bundle)) as pipeline:
        ours = pipeline.generate(request)
        with pytest.raises(EdgeflashError, match="a mask says where to paint into a picture"):
            pipeline.check(Request(PROMPT, mask=MASK))
    theirs = by_diffusers(guided_student, monkeypatch)
    assert np.abs(ours.images[0] / 255 - theirs).max() < 1 / 255


def test_the_command_paints(guided: Exported, tmp_path: Path) -> None:
    from PIL import Image

    from edgeflash.cli import app

    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    Image.fromarray(np.where(MASK, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    paths = {"--image": "in.png", "--mask": "mask.png", "--out": "out.png"}
    asked = [word for option, name in paths.items() for word in (option, str(tmp_path / name))]
    asked += ["--prompt", PROMPT, "--seed", str(SEED), "--steps", "3"]
    told = CliRunner().invoke(app, ["run", str(guided.bundle.folder), *asked])
    assert told.exit_code == 0, told.output
    request = Request(PROMPT, seed=SEED, steps=3, image=PICTURE, mask=MASK)
    with TextToImage(guided.bundle, runtime_for(guided.bundle)) as pipeline:
        wanted = pipeline.generate(request).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), wanted)


def test_a_mask_of_cells_is_that_of_their_first_pixels_and_holes_are_grey() -> None:
    picture = np.full((1, 3, 4, 4), 0.5, np.float32)
    mask = np.zeros((1, 1, 4, 4), np.bool_)
    mask[..., 1, 1] = mask[..., 2, 2] = True
    shown: list[Any] = []

    def encode(pictures: Any) -> Any:
        shown.append(pictures)
        return np.full((1, 4, 2, 2), 7, np.float32)

    latent = Latent(channels=4, downsampling=2, scale=0.5, shift=1)
    seen = beside(inpainting(4), picture, mask, latent, encode)
    assert seen.shape == (1, 5, 2, 2) and seen.dtype == np.float32
    np.testing.assert_array_equal(seen[0, 0], [[0, 0], [0, 1]])
    assert (seen[:, 1:] == 7).all()
    np.testing.assert_array_equal(shown[0], np.where(mask, 0, picture))
    whole = beside(of_image(4, 2), picture, mask, latent, encode)
    assert whole.shape == (1, 4, 2, 2) and (whole == 15).all()
    np.testing.assert_array_equal(shown[1], picture)


def test_examples_differ_and_leave_some_of_the_picture() -> None:
    (one, mask), (other, _) = example(0, (16, 8)), example(1, (16, 8))
    assert one.shape == (16, 8, 3) and one.dtype == np.uint8 and (one != other).any()
    assert mask.shape == (16, 8) and mask.mean() == 0.25
    np.testing.assert_array_equal(example(0, (16, 8))[0], one)


def test_the_mask_of_a_sample_is_always_the_same() -> None:
    many = painted(np.arange(400), 16)
    np.testing.assert_array_equal(painted(np.array([7, 3]), 16), many[[7, 3]])
    share = many.mean((1, 2, 3))
    assert 0.15 < (share == 1).mean() < 0.35 and share.min() >= 1 / 16
    assert many[share < 1].mean() < 0.6
    assert many[:, 0, 0].any() and many[:, 0, :, -1].any() and len(np.unique(share)) > 40


def test_a_caption_that_is_dropped_leaves_what_is_seen() -> None:
    c, nothing = torch.randn(2, 5, 3), torch.randn(1, 4, 3)
    bare = unprompted(c, nothing)
    assert torch.equal(bare[:, :4], nothing.expand(2, -1, -1))
    assert torch.equal(bare[:, 4:], c[:, 4:])
    assert torch.equal(unprompted(c[:, :4], nothing), nothing.expand(2, -1, -1))


def test_an_inpainting_network_begins_as_the_one_it_comes_from(shop: Workshop) -> None:
    sizes = {"widths": (16, 16), "layers_per_block": 1, "caption_dropout": 0}
    before = Denoising.model_validate(sizes).begin(shop).results["unet"]
    before.save_pretrained(str(shop.student / "unet"))
    stage = Denoising.model_validate(sizes | {"warm": True, "inpaint": True}).begin(shop)
    unet, rows = stage.results["unet"], np.arange(4)
    batch = stage.batch(rows)
    assert stage.pipeline == "StableDiffusionInpaintPipeline" and unet.config.in_channels == 9
    assert not unet.conv_in.weight[:, 4:].any()
    x, t, text = torch.randn(batch["x_0"].shape), torch.arange(4) * 100, batch["c"][:, :16]
    seen = batch["c"][:, 16:].flatten(1)[:, : 5 * 32 * 32].view(4, 5, 32, 32)
    with torch.no_grad():
        assert torch.allclose(unet(x, t, batch["c"]).sample, before(x, t, text).sample, atol=1e-5)
    np.testing.assert_array_equal(seen[:, 0], painted(rows, 64)[:, 0, ::2, ::2])
    holed = shop.store.pictures(rows) * ~torch.from_numpy(painted(rows, 64))
    vae = shop.load(shop.student, "vae")
    with torch.no_grad():
        wanted = vae.encode(holed).latent_dist.mean * vae.config.scaling_factor
    assert torch.allclose(seen[:, 1:], wanted, atol=5e-3)

    sum(stage.players["unet"].loss(unet, batch, torch.Generator()).values()).backward()
    assert unet.conv_in.weight.grad[:, 4:].flatten(2).abs().amax((0, 2)).min() > 0


def test_a_network_is_shown_what_travels_with_the_captions(inpainter: Path) -> None:
    student = Student.open(inpainter)
    plain = student.family.load(student, "unet")
    listening = student.family.listening(student, plain.network)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 400]), torch.randn(2, 16, 32)
    seen = torch.randn(2, 5, 8, 8)
    c = torch.cat([text, as_rows(seen.flatten(1), 32)], 1)
    with torch.no_grad():
        found = listening(x, t, c).sample
        fresh = student.family.load(student, "unet")
        wanted = fresh(torch.cat([x, seen], 1), t, text)
    assert torch.allclose(found, wanted, atol=1e-6)


def inpainting_recipe(tmp_path: Path, teacher: Path, **stage: Any) -> Any:
    data = {"kind": "folder", "path": str(tmp_path / "in"), "samples": 4, "size_px": 16}
    if not (tmp_path / "in").exists():
        picture_folder(tmp_path / "in", 4, 16)
    stage = {"steps": 2, "batch_size": 2} | stage
    plain = {"name": "small", "teacher": str(teacher), "data": data, "stage": [stage]}
    return recipe_of(plain, "test")


METHODS = {name: shelf.find(Method, name, check=False) for name in shelf.names(Method)}
SHAPED: dict[str, dict[str, Any]] = {
    "decoder": {"width": 8, "blocks": [1, 1], "own_steps": 1},
    "blocks": {"rule": "small"},
}


@pytest.mark.slow
@pytest.mark.parametrize("by", [n for n, m in METHODS.items() if m.conditioned])
def test_methods_that_say_so_teach_networks_that_see_more(
    by: str, inpainter: Path, tmp_path: Path
) -> None:
    if by == "denoising":
        pytest.skip("makes one of its own")
    recipe = inpainting_recipe(tmp_path, inpainter, by=by, **SHAPED.get(by, {}))
    out = distill(recipe, tmp_path / by)
    student = Student.open(out)
    assert student.family.conditions(student) == inpainting(4)
    seen = student.family.load(student, "unet").network.conv_in.weight[:, 4:]
    before = Student.open(inpainter).family.load(Student.open(inpainter), "unet").network
    moved = (seen - before.conv_in.weight[:, 4:]).abs().amax((0, 2, 3))
    assert (moved > 0).all() or by == "decoder"


@pytest.mark.slow
def test_students_of_networks_that_enlarge_see_as_much(tmp_path: Path) -> None:
    teacher = write_student(
        tmp_path / "t", tiny_decoder=False, scheduler="DDIMScheduler", task="InstructPix2Pix"
    )
    enlarging(teacher, 4)
    small = inpainting_recipe(tmp_path, teacher, by="blocks", rule="small")
    pruned = distill(small, tmp_path / "pruned")
    few = inpainting_recipe(tmp_path, teacher, by="lcm").model_copy(update={"base": str(pruned)})
    student = Student.open(distill(few, tmp_path / "few"))
    assert student.family.conditions(student) == of_image(4, 4)
    assert student.config("unet")["mid_block_type"] is None


def enlarging(folder: Path, times: int) -> None:
    config = json.loads((folder / "unet/config.json").read_text()) | {"enlarges": times}
    (folder / "unet/config.json").write_text(json.dumps(config))


def test_methods_that_do_not_are_refused(inpainter: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="sees a picture beside x_t, which method 'gan' does"):
        distill(inpainting_recipe(tmp_path, inpainter, by="gan"), tmp_path / "student")
    for more, refused in (({"inpaint": True}, True), ({"enlarge": 2}, True), ({}, False)):
        stages = [{"by": "denoising"} | more, {"by": "lcm"}, {"by": "gan"}]
        made = recipe_of({"name": "x", "stage": stages}, "x")
        line = "^method 'denoising': its denoiser sees .* 'gan' does not"
        with pytest.raises(EdgeflashError, match=line) if refused else nullcontext():
            check_kind(made, [])


@pytest.mark.slow
def test_the_recipes_scaled_down(tmp_path: Path) -> None:
    """From the embedded teacher to a student of few steps, which diffusers paints with."""
    from diffusers import StableDiffusionInpaintPipeline

    small = {"steps": 1, "batch_size": 2, "data.samples": 4}
    made = tmp_path / "teacher"
    distill(changed(read_recipe(find_recipe("shapes-inpainting-teacher")), small), made)
    recipe = read_recipe(find_recipe("shapes-inpainting"))
    out = distill(changed(recipe, small | {"teacher": str(made)}), tmp_path / "student")
    student = Student.open(out)
    assert student.family.conditions(student) == inpainting(student.family.latent(student).channels)
    assert student.manifest and list(student.manifest.schedules) == [1, 2, 4]
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(str(out), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture, mask = example(0, (64, 64))
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    painted = pipeline(
        "star",
        image=torch.from_numpy(picture.transpose(2, 0, 1)[None] / 127.5 - 1).float(),
        mask_image=torch.from_numpy(mask[None, None]).float(),
        num_inference_steps=1,
        guidance_scale=0,
        output_type="np",
    ).images
    assert painted.shape == (1, 64, 64, 3) and np.isfinite(painted).all()


def test_pictures_are_enlarged_as_diffusers_changes_them(tmp_path: Path) -> None:
    """A small picture, its pixels repeated, is what its pipeline is given at full size."""
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    folder = tmp_path / "student"
    write_student(folder, scheduler="DDIMScheduler", task="InstructPix2Pix")
    enlarging(folder, 4)
    bundle = export_student(
        Student.open(folder),
        shelf.make(Target, "onnx", {}),
        tmp_path / "bundle",
        ExportOptions(steps=(2,), guidance=Guidance(), prompts=(PROMPT,)),
        console=QUIET,
    )
    (seen,) = bundle.manifest.conditions
    assert (seen.kind, seen.channels, seen.enlarges) == ("image", 4, 4)
    small = PICTURE[:4, :4]
    with TextToImage(bundle, runtime_for(bundle)) as pipeline:
        ours = pipeline.generate(Request(PROMPT, seed=SEED, image=small)).images[0]
        with pytest.raises(EdgeflashError, match="3x4 px, of which 16x16 is no whole multiple"):
            pipeline.check(Request(PROMPT, image=small[:3]))
        with pytest.raises(EdgeflashError, match="give --image, and no more of it"):
            pipeline.check(Request(PROMPT, image=PICTURE, mask=MASK))
        changed = pipeline.generate(Request(PROMPT, seed=SEED, image=255 - small)).images[0]
    theirs = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        PROMPT,
        image=Image.fromarray(small.repeat(4, 0).repeat(4, 1)),
        num_inference_steps=2,
        guidance_scale=1.0,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        output_type="np",
    ).images[0]
    assert np.abs(ours / 255 - wanted).max() < 1 / 255
    assert np.abs(changed.astype(int) - ours).max() > 8


def test_a_network_learns_to_enlarge_of_small_pictures(shop: Workshop) -> None:
    stage = Denoising(widths=(16, 16), layers_per_block=1, enlarge=4).begin(shop)
    unet, batch = stage.results["unet"], stage.batch(np.arange(2))
    assert stage.pipeline == "StableDiffusionInstructPix2PixPipeline"
    assert unet.config.in_channels == 8 and unet.config["enlarges"] == 4
    seen = batch["c"][:, 16:].flatten(1)[:, : 4 * 32 * 32].view(2, 4, 32, 32)
    small = shop.store.pictures(np.arange(2)).view(2, 3, 16, 4, 16, 4).mean((3, 5))
    vae = shop.load(shop.student, "vae")
    with torch.no_grad():
        wanted = vae.encode(small.repeat_interleave(4, 2).repeat_interleave(4, 3)).latent_dist.mean
    assert torch.allclose(seen, wanted, atol=2e-2)
    with pytest.raises(EdgeflashError, match=r"denoising\.enlarge: 64 px is no multiple of 3"):
        Denoising(widths=(16, 16), enlarge=3).begin(shop)


def test_networks_that_change_pictures_teach_nobody(tmp_path: Path) -> None:
    teacher = write_student(tmp_path / "t", scheduler="DDIMScheduler", task="InstructPix2Pix")
    with pytest.raises(EdgeflashError, match="can be exported and run, but teaches nobody so far"):
        distill(inpainting_recipe(tmp_path, teacher, by="lcm"), tmp_path / "student")
