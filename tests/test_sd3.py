"""Stable Diffusion 3 through the whole line: small ones draw what diffusers' own pipeline draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from exported import Exported, export
from PIL import Image
from safetensors.torch import load_file
from tiny_sd3 import CHANNELS, JOINT, POOLED, WIDTHS, write_sd3
from tiny_student import LENGTH

from edgeflash import shelf
from edgeflash.distill.by_perflow import PeRFlow, line
from edgeflash.distill.encoded import _encoder
from edgeflash.distill.process import Flow, Process
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.family_sd3 import T5_LENGTH
from edgeflash.noise import randn
from edgeflash.recipe import recipe_of
from edgeflash.roles import Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.runtimes.prompts import Prompts
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for

PROMPT, SEED, STEPS = "a red star", 5, 2
MEDIUM: dict[str, Any] = {  # stable-diffusion-3-medium-diffusers, transformer/config.json
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd3(tmp_path_factory.mktemp("sd3") / "small")


@pytest.fixture(scope="module")
def diffusers_pipeline(folder: Path) -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def onnx(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        return export(
            patch,
            folder,
            tmp_path_factory.mktemp("bundles") / "onnx",
            shelf.make(Target, "onnx", {}),
            steps=(STEPS,),
            guidance=Guidance(kind="cfg", scale=4.0),
            prompts=(PROMPT,),
        )


def test_pictures_are_those_that_diffusers_draws(onnx: Exported, diffusers_pipeline: Any) -> None:
    manifest = onnx.bundle.manifest
    refuse_below(manifest.parity, onnx.bundle.folder)
    assert manifest.latent.shift == 0.0609 and manifest.schedules[STEPS].steps[0].t == 1000
    with TextToImage(onnx.bundle, runtime_for(onnx.bundle)) as pipeline:
        for scale, negative in ((4.0, ""), (1.0, ""), (4.0, "blue ring")):
            request = Request(PROMPT, seed=SEED, guidance=scale, negative=negative)
            drawn = pipeline.generate(request).images.transpose(0, 3, 1, 2)
            theirs = _drawn(diffusers_pipeline, scale, negative)
            assert np.abs(theirs * 255 - drawn).max() < 1
            assert theirs.std() > 0.05, "it is no even grey"


def _drawn(pipeline: Any, scale: float, negative: str) -> Any:
    """By diffusers: [1, 3, h, w], 0 to 1."""
    size = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "pt"}
    noise = torch.from_numpy(randn((1, CHANNELS, 8, 8), SEED))
    told = pipeline(PROMPT, negative_prompt=negative, guidance_scale=scale, latents=noise, **size)
    return told.images.numpy()


def test_tensors_are_named_as_optimum_names_them(onnx: Exported) -> None:
    names = {
        component.name: (
            [spec.name for spec in component.inputs],
            [spec.name for spec in component.outputs],
        )
        for component in onnx.bundle.manifest.components
    }
    first, second, third, transformer, _ = names.values()
    before = "hidden_states.0"
    assert first == second == (["input_ids"], ["text_embeds", "last_hidden_state", before])
    assert third == (["input_ids"], ["last_hidden_state"])
    told = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert transformer == (told, ["out_hidden_states"])
    index = json.loads((onnx.bundle.folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "OnnxRuntimeModel"]


@pytest.mark.parametrize("t5", [True, False], ids=["with-t5", "without-t5"])
def test_methods_and_pipeline_hear_the_same(t5: bool, tmp_path: Path) -> None:
    """One tensor c is what the pipeline hands over in two; T5 may be left out, for zeros."""
    student = Student.open(write_sd3(tmp_path / "s", t5=t5))
    none = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "s", **none)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")[: 3 if t5 else 2]
    assert student.family.text_encoders == names
    texts, transformer = ["a red star", "blue ring"], pipeline.transformer.eval()
    x, t = torch.randn(2, CHANNELS, 8, 4), torch.tensor([500.0, 20.5])
    with torch.no_grad():
        ids = [
            torch.from_numpy(student.family.tokenize(student.folder / name, texts))
            for name in ("tokenizer", "tokenizer_2", "tokenizer_3")[: len(names)]
        ]
        c = student.family.encode_prompt([getattr(pipeline, name) for name in names], ids)
        assert c.shape == (
            (2, LENGTH + T5_LENGTH + 1, JOINT) if t5 else (2, LENGTH + 1, sum(WIDTHS))
        )
        text, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, device=CPU, do_classifier_free_guidance=False
        )
        wanted = transformer(x, text, pooled, t).sample
        heard = student.family.listening(student, transformer)
        torch.testing.assert_close(heard(x, t, c).sample, wanted)


def test_a_prompt_is_cut_where_no_text_encoder_reads_on(onnx: Exported) -> None:
    """CLIP's have room for fewer words than T5."""
    prompts = Prompts(onnx.bundle)
    long, longer = "ring " * 2 * LENGTH, "ring " * 2 * T5_LENGTH
    assert all(prompts.tokenizers[name](long).cut for name in ("text_encoder", "text_encoder_2"))
    assert prompts.unread(long) == "" and prompts.unread(longer).startswith("ring")
    with TextToImage(onnx.bundle, runtime_for(onnx.bundle)) as pipeline:
        assert pipeline.generate(Request((long, longer), guidance=1.0)).cut == (
            "",
            prompts.unread(longer),
        )


def test_without_t5_the_joint_conditioning_ends_in_zeros(tmp_path: Path) -> None:
    from edgeflash.conditioning import joined

    student = Student.open(write_sd3(tmp_path / "s", t5=False))
    inputs = student.family.signature(student, "transformer", (16, 16))[0]
    answers = [
        {"conditioning": np.full((2, LENGTH, w), w), "pooled": np.ones((2, p))}
        for w, p in zip(WIDTHS, POOLED, strict=True)
    ]
    told = joined(answers, inputs, (16, 16))
    assert told["pooled"].shape == (2, sum(POOLED))
    assert told["joint"].shape == (2, LENGTH + T5_LENGTH, JOINT)
    assert (told["joint"][:, :LENGTH, : WIDTHS[0]] == WIDTHS[0]).all()
    assert (told["joint"][:, :LENGTH, WIDTHS[0] : sum(WIDTHS)] == WIDTHS[1]).all()
    assert not told["joint"][:, LENGTH:].any() and not told["joint"][..., sum(WIDTHS) :].any()


def test_flow_is_read_forth_and_back(folder: Path) -> None:
    it = Process.of(folder, CPU)
    assert isinstance(it, Flow) and it.timesteps == 1000
    x_0, eps, t = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2), torch.tensor([-1, 250, 1000])
    x_t, output = it.noised(x_0, eps, t), it.target(x_0, eps, t)
    torch.testing.assert_close(x_t, torch.stack([x_0[0], 0.75 * x_0[1] + 0.25 * eps[1], eps[2]]))
    torch.testing.assert_close(it.x_0(output, x_t, t), x_0)
    torch.testing.assert_close(it.eps(output, x_t, t), eps)
    s = torch.tensor([-1, 100, 600])  # Euler's step is along the flow
    moved = x_t + (s.clamp(min=0) - t.clamp(min=0))[:, None, None, None] / 1000 * output
    torch.testing.assert_close(it.ddim(x_0, eps, s), moved)


def test_latents_are_scaled_as_the_pipeline_unscales_them(folder: Path) -> None:
    vae, pictures = AutoencoderKL.from_pretrained(folder / "vae"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        told, mean = _encoder(vae)(pictures), vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(told / 1.5305 + 0.0609, mean)


def test_perflow_s_windows_of_a_flow_are_those_its_sampler_walks(folder: Path) -> None:
    options, it = PeRFlow(windows=4), Process.of(folder, CPU)
    scheduler = options.scheduler(folder)
    scheduler.set_timesteps(8)
    start, end = options.window(scheduler.timesteps.double(), it.timesteps)
    assert start.tolist() == [1000, 1000, 750, 750, 500, 500, 250, 250]
    assert (start - end == 250).all()
    z_s, z_e = torch.randn(2, 8, 2, 2, 2).double()
    x_0, eps = line(it, z_s, z_e, start, end)
    torch.testing.assert_close(it.noised(x_0, eps, start), z_s)
    torch.testing.assert_close(it.noised(x_0, eps, end), z_e)


def pictures(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    for i, caption in enumerate(("a red star", "blue ring")):
        Image.new("RGB", (16, 16), (60 * i, 99, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return {"kind": "folder", "path": str(folder), "size_px": 16}


def test_a_recipe_gives_a_student_that_diffusers_loads(folder: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "in")
    stage = {"by": "perflow", "windows": 2, "solver_steps": 2, "guidance": 4.0}
    stage |= {"steps": 2, "batch_size": 2}
    plain = {"name": "small", "teacher": str(folder), "data": data, "stage": [stage]}
    out = distill(recipe_of(plain, "test"), tmp_path / "student")
    student, pipeline = Student.open(out), StableDiffusion3Pipeline.from_pretrained(str(out))
    assert student.family.name == "sd3" and student.guidance() == Guidance()
    assert [step.t for step in student.schedules()[2].steps] == [999, 499]
    taught = SD3Transformer2DModel.from_pretrained(folder / "transformer").state_dict()
    ours = pipeline.transformer.state_dict()
    assert set(ours) == set(taught)
    assert not torch.equal(ours["proj_out.weight"], taught["proj_out.weight"])
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(randn((1, CHANNELS, 8, 8), SEED))
    told = pipeline(
        PROMPT, num_inference_steps=2, guidance_scale=1, latents=noise, output_type="pt"
    )
    assert told.images.shape == (1, 3, 16, 16) and told.images.isfinite().all()
    for by, said in (
        ("consistency", r"is a flow from .* does not learn so far: choose .*lcm or perflow"),
        ("sdxs", r"makes parts of sd, sdxl alone.*; sd3 is taken by .*lcm, perflow"),
    ):
        plain["stage"] = [{"by": by, "steps": 1, "batch_size": 1}]
        with pytest.raises(EdgeflashError, match=said):
            distill(recipe_of(plain, "test"), tmp_path / "other")
        assert not (tmp_path / "other.run/cache").exists(), "before any work"


QUICK: list[dict[str, Any]] = [  # of the last stage the whole student is looked at
    {"by": "ladd", "solver_steps": 2, "critic_updates": 1, "head_width": 8},
    {"by": "lcm", "own_steps": 2, "ema": 0.5},
]
SLOW: list[dict[str, Any]] = [
    {"by": "progressive", "denoising_steps": 2, "denoising_weight": 0.2},
    {"by": "imagine", "denoising_steps": 2, "teacher_steps": 2},
    {"by": "flash", "teacher_steps": 4, "modes": [[0, 1]], "dmd_weights": [0.7]}
    | {"gan_weights": [0.1]},
    {"by": "add", "student_steps": 2},
    {"by": "dmd", "fake_updates": 1, "gan_weight": 1e-3},
    {"by": "scm"},
    {"by": "tcd"},
    {"by": "lcm"},
]
EVEN = {1: [1000], 2: [1000, 750]}
WALKS = {"progressive": {2: [999, 749]}, "imagine": {2: [999, 749]}}


@pytest.mark.parametrize("few", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=len)
def test_methods_teach_a_small_sd3_and_every_student_has_tables(
    tmp_path: Path, few: list[dict[str, Any]]
) -> None:
    folder = write_sd3(tmp_path / "sd3", t5=False)
    stages = [stage | {"steps": 2, "batch_size": 2} for stage in few]
    plain = {"name": "small", "teacher": str(folder), "stage": stages}
    out = distill(recipe_of(plain | {"data": pictures(tmp_path / "in")}, "test"), tmp_path / "out")
    before, weights = folder, "transformer/diffusion_pytorch_model.safetensors"
    for number, by in enumerate((stage["by"] for stage in few), 1):
        home = tmp_path / f"out.run/{number}-{by}/student"
        tables = Student.open(home).schedules(list(wanted := WALKS.get(by, EVEN)))
        for count, times in wanted.items():
            assert [row.t for row in tables[count].steps] == pytest.approx(times), by
        ours, theirs = (load_file(each / weights) for each in (home, before))
        assert not torch.equal(ours["proj_out.weight"], theirs["proj_out.weight"]), by
        before = home
    student = Student.open(out)
    tables = student.schedules()
    assert list(tables) == [1, 2, 4] and student.guidance() == Guidance()
    times = [1000, 904.7619, 750, 513.1579]  # 50, 38, 25 and 13 of 50, shifted
    assert [row.t for row in tables[4].steps] == pytest.approx(times)
    (out / "edgeflash.json").unlink()  # the folder alone tells as much
    bare = Student.open(out)
    assert bare.step_counts() == (1, 2, 4) and bare.guidance() == Guidance()


def test_pictures_larger_than_its_places_reach_are_refused(folder: Path) -> None:
    student = Student.open(folder)
    assert student.family.signature(student, "transformer", (64, 64))
    with pytest.raises(EdgeflashError, match=r"68x16: .* of at most 64 px a side"):
        student.family.signature(student, "transformer", (68, 16))


def test_full_size_networks_have_the_published_parameters() -> None:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**MEDIUM)
    assert transformer.num_parameters() == 2_028_328_000
    names = transformer.state_dict()
    assert names["context_embedder.weight"].shape == (1536, 4096)
    assert names["proj_out.weight"].shape == (64, 1536)


def test_what_does_not_fit_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    broken = write_sd3(tmp_path / "broken")
    for component, changes, told in (
        ("transformer", {"pooled_projection_dim": 77}, "takes 77 numbers .* give 32"),
        ("transformer", {"joint_attention_dim": 77}, "width 77 .*give 40 and 48"),
        ("transformer", {"in_channels": 4}, "takes 4 and gives 16 channels"),
    ):
        path = broken / component / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(EdgeflashError, match=told) as caught:
            Student.open(broken)
        assert "\n" not in str(caught.value)
        path.write_text(before)
    (broken / "tokenizer_3").rename(tmp_path / "away")
    with pytest.raises(
        EdgeflashError,
        match=r"tokenizer_3: missing; .*, or say \[null, null\] of tokenizer_3 and text_encoder_3",
    ):
        Student.open(broken)
