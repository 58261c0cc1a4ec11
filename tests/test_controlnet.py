"""ControlNets: students that have one, their exports, and pictures drawn along edges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import QUIET
from simulated_gpu import simulate
from tiny_sdxl import write_sdxl
from tiny_student import controlnet_of, write_student
from typer.testing import CliRunner

from edgeflash import control, shapes, shelf
from edgeflash.bundle import Bundle
from edgeflash.conditions import example
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.golden import load_tensors, save_tensors
from edgeflash.noise import randn
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.feed import Part
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import INDEX, Student
from edgeflash.verify import runtime_for, verify

PROMPT, SEED, SCALE = "a red star", 5, 2.0
PICTURE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "controlled"
    return write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler", task="ControlNet")


def exported(
    student: Path, out: Path, to: str | Target = "onnx", steps: int = 2, **more: Any
) -> Bundle:
    guidance = Guidance(kind="cfg", scale=SCALE)
    options = ExportOptions(steps=(steps,), guidance=guidance, prompts=(PROMPT,), **more)
    target = to if isinstance(to, Target) else shelf.make(Target, to, {})
    return export_student(Student.open(student), target, out, options, console=QUIET)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "openvino", "coreml")]


@pytest.fixture(scope="module", params=["onnx", *SLOW])
def steered(
    request: pytest.FixtureRequest, controlled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return exported(controlled, tmp_path_factory.mktemp("bundles") / request.param, request.param)


def by_diffusers(folder: Path, scale: float, steps: int = 2, size: int = 16) -> Any:
    """[16, 16, 3] in [0, 1], as diffusers' own pipeline of the folder draws."""
    from diffusers import DiffusionPipeline
    from PIL import Image

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        image=Image.fromarray(PICTURE),
        num_inference_steps=steps,
        guidance_scale=SCALE,
        controlnet_conditioning_scale=scale,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        output_type="np",
        height=size,
        width=size,
    ).images[0]


def drawn(bundle: Bundle, *, low_memory: bool = False, **asked: Any) -> Any:
    told: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "control": PICTURE} | asked
    with TextToImage(bundle, runtime_for(bundle), low_memory=low_memory) as pipeline:
        images = pipeline.generate(Request(**told)).images
        left = {name for name, part in pipeline.parts.items() if part._session is not None}
        assert left == (set() if low_memory else {*pipeline.parts})
    return images


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_it_draws_as_diffusers_does(steered: Bundle, controlled: Path, scale: float) -> None:
    ours = drawn(steered, control_scale=scale, low_memory=scale == 0.5)[0]
    assert np.abs(ours / 255 - by_diffusers(controlled, scale)).max() < 1 / 255
    other = drawn(steered, control_scale=scale, control=255 - PICTURE)[0]
    assert np.abs(other.astype(int) - ours).max() > 8


def test_the_picture_is_seen_by_every_image_of_a_batch(steered: Bundle) -> None:
    """With guidance a call has the prompts behind the empty ones: 2 n rows of one picture."""
    two = drawn(steered, prompt=("blue ring", PROMPT), seed=SEED - 1)
    assert np.abs(two[1].astype(int) - drawn(steered)[0]).max() <= 1


def test_it_is_asked_before_every_call(steered: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees what the denoiser sees, at every step; a late one hardly moves a picture."""
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    real = Part.answers

    def answers(part: Part, **by_role: Any) -> dict[str, Any]:
        found = real(part, **by_role)
        calls.append((part.component.name, by_role, found))
        return found

    monkeypatch.setattr(Part, "answers", answers)
    drawn(steered)
    asked = [call for call in calls if call[0] in ("controlnet", "unet")]
    assert [name for name, *_ in asked] == ["controlnet", "unet"] * 2
    for (_, seen, given), (_, heard, _) in zip(asked[::2], asked[1::2], strict=True):
        assert heard.keys() == {"sample", "timestep", "conditioning", *given}
        told = given | {role: seen[role] for role in ("sample", "timestep", "conditioning")}
        assert all(np.array_equal(told[role], heard[role]) for role in heard)
    assert asked[0][1]["timestep"] > asked[2][1]["timestep"]


def test_an_nvidia_gpu_draws_the_same(
    steered: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A simulated one, by engines that take one row a call."""
    if steered.denoiser.target != "onnx":
        pytest.skip("TensorRT opens ONNX bundles")
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    wanted = drawn(steered, control_scale=0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trt = simulate(monkeypatch, "tensorrt")
    runtime = shelf.make(Runtime, "tensorrt", {})
    with TextToImage(steered, runtime) as pipeline:
        found = pipeline.generate(
            Request(PROMPT, seed=SEED, control=PICTURE, control_scale=0.5)
        ).images
    assert len(trt.builds) == 4 and np.abs(found.astype(int) - wanted).max() <= 1


def test_a_scale_of_0_draws_as_without_it(steered: Bundle, controlled: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(controlled)
    plain.set_progress_bar_config(disable=True)
    # This one would set the timesteps right; that of ControlNets takes them as they are.
    plain.scheduler = DDIMScheduler.from_pretrained(controlled / "scheduler")
    wanted = plain(
        PROMPT,
        num_inference_steps=2,
        guidance_scale=SCALE,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        output_type="np",
    ).images[0]
    ours = drawn(steered, control_scale=0.0)[0]
    assert np.abs(ours / 255 - wanted).max() < 1 / 255
    assert np.abs(ours.astype(int) - drawn(steered)[0]).max() > 8


def test_the_bundle_tells_of_it(steered: Bundle) -> None:
    manifest = steered.manifest
    told = json.loads((steered.folder / MANIFEST).read_text())
    names = ["text_encoder", "unet", "controlnet", "vae_decoder"]
    assert told["format_version"] == 4 and [c["name"] for c in told["components"]] == names
    controlnet, takes = steered.component("controlnet"), steered.denoiser.inputs
    gives = [spec for spec in takes if spec.role.startswith("residual.")]
    assert [spec.name for spec in gives] == [f"additional_residual_{i}" for i in range(5)]
    assert [(s.role, s.shape[1:]) for s in controlnet.outputs] == [
        (s.role, s.shape[1:]) for s in gives
    ]
    picture = controlnet.input("control")
    assert picture and picture.shape[1:] == (3, 16, 16) and picture.range == (0, 1)
    proved = {(f.rung, f.component) for f in manifest.parity}
    assert {("L0", "controlnet"), ("L1", "controlnet"), ("L1", "unet")} <= proved
    golden = load_tensors(steered.folder / manifest.goldens[0].tensors)
    shown, _ = example(0, (16, 16))
    seen = control.edges_of(shown).transpose(2, 0, 1)[None] / 255
    np.testing.assert_array_equal(golden["control"], seen.astype(np.float32))
    assert golden["residual.4"].shape == (1, 32, 4, 4) and golden["residual.4"].any()


def test_the_ladder_sees_a_controlnet_that_went_astray(steered: Bundle, tmp_path: Path) -> None:
    """Held against another answer, and asked about another picture, than was recorded."""
    folder = tmp_path / "bundle"
    shutil.copytree(steered.folder, folder)
    name = steered.manifest.goldens[0].tensors
    told = load_tensors(folder / name)

    def below(**other: Any) -> set[tuple[str, str]]:
        save_tensors(folder / name, told | other)
        found = verify(Bundle(folder, steered.manifest))
        return {(f.rung, f.component) for f in found if not f.passed}

    assert not below()
    assert below(**{"residual.4": told["residual.4"] + 1}) == {("L1", "controlnet")}
    astray = below(control=1 - told["control"])
    assert {("L1", "controlnet"), ("L1", "unet"), ("L3", "pipeline")} <= astray


def test_what_cannot_be_drawn_after_is_said(steered: Bundle) -> None:
    pipeline = TextToImage(steered, runtime_for(steered))
    for options, said in (
        ({}, "cannot do that: its ControlNet sees a picture too: give --control"),
        ({"control": PICTURE[:8]}, "a control picture of 8x16 px: it draws 16x16 px: crop or"),
        ({"control": PICTURE, "control_scale": -1.0}, "control scale -1: scales are 0 or more"),
    ):
        with pytest.raises(EdgeflashError, match=said):
            pipeline.check(Request(PROMPT, **options))
    components = [c for c in steered.manifest.components if c.name != "controlnet"]
    fewer = steered.manifest.model_copy(update={"components": tuple(components)})
    with pytest.raises(
        EdgeflashError, match="unet asks for a controlnet or adapter, but there is none"
    ):
        TextToImage(Bundle(steered.folder, fewer), runtime_for(steered))


def test_other_bundles_refuse_a_control_picture(guided: Any) -> None:
    pipeline = TextToImage(guided.bundle, runtime_for(guided.bundle))
    for options in ({"control": PICTURE}, {"control_scale": 0.5}):
        with pytest.raises(EdgeflashError, match="after a control picture: it has no ControlNet"):
            pipeline.check(Request(PROMPT, **options))


def test_the_command_draws_after_edges(steered: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    from edgeflash.cli import app

    Image.fromarray(PICTURE).save(tmp_path / "edges.png")
    asked = ["--control", str(tmp_path / "edges.png"), "--control-scale", "0.5"]
    asked += ["--prompt", PROMPT, "--seed", str(SEED), "--out", str(tmp_path / "out.png")]
    told = CliRunner().invoke(app, ["run", str(steered.folder), *asked])
    assert told.exit_code == 0, told.output
    wanted = drawn(steered, control_scale=0.5)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), wanted)


@pytest.mark.slow
def test_pruned_students_of_one_step_have_it_too(tmp_path: Path) -> None:
    """No mid block in the UNet, the timestep folded into both networks; what it costs is timed."""
    from edgeflash.runtimes.measure import Job, measure

    student = write_student(
        tmp_path / "s",
        tiny_decoder=False,
        mid_block=False,
        scheduler="DDIMScheduler",
        task="ControlNet",
    )
    bundle = exported(student, tmp_path / "bundle", steps=1)
    assert bundle.component("controlnet").input("timestep") is None
    assert bundle.denoiser.input("timestep") is None
    ours = drawn(bundle)[0]
    assert np.abs(ours / 255 - by_diffusers(student, 1.0, steps=1)).max() < 1 / 255
    job = Job(bundle=str(bundle.folder), runtime="onnx", prompts=(PROMPT,), warmup_runs=0, runs=1)
    assert measure(job, lambda done, of: None).stages_ms["unet"]


@pytest.mark.slow
def test_sdxl_has_it_too(tmp_path: Path) -> None:
    folder = controlled_sdxl(tmp_path / "xl")
    bundle = exported(folder, tmp_path / "bundle")
    takes = [spec.role for spec in bundle.component("controlnet").inputs]
    assert takes == ["sample", "timestep", "conditioning", "control", "pooled", "time_ids"]
    ours = drawn(bundle, control_scale=0.5)[0]
    assert np.abs(ours / 255 - by_diffusers(folder, 0.5)).max() < 1 / 255


def controlled_sdxl(folder: Path) -> Path:
    write_sdxl(folder)
    unet = Student.unfinished(folder)
    network = unet.family.load(unet, "unet").network
    controlnet_of(network).save_pretrained(folder / "controlnet")
    index = json.loads((folder / INDEX).read_text())
    index |= {"_class_name": "StableDiffusionXLControlNetPipeline"}
    index |= {"controlnet": ["diffusers", "ControlNetModel"]}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def spoilt(home: Path, component: str, folder: Path, **config: Any) -> str:
    """What is said of a copy of a student, in ``folder``, whose component has another config."""
    shutil.copytree(home, folder)
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(EdgeflashError) as caught:
        Student.open(folder)
    return str(caught.value)


def test_controlnets_of_other_bases_are_refused(controlled: Path, tmp_path: Path) -> None:
    said = spoilt(controlled, "controlnet", tmp_path / "a", layers_per_block=2)
    assert "has residuals of [16, 16, 16, 16, 32, 32, 32], where [16, 16, 16, 32, 32]" in said
    assert "has cross_attention_dim 64" in spoilt(
        controlled, "controlnet", tmp_path / "b", cross_attention_dim=64
    )
    assert "global_pool_conditions" in spoilt(
        controlled, "controlnet", tmp_path / "c", global_pool_conditions=True
    )
    stem = {"conditioning_embedding_out_channels": [16, 32, 96, 256]}
    assert "a picture scaled down 8, where 2 goes" in spoilt(
        controlled, "controlnet", tmp_path / "d", **stem
    )
    folder = tmp_path / "e"
    shutil.copytree(controlled, folder)
    index = json.loads((folder / INDEX).read_text()) | {"_class_name": "StableDiffusionPipeline"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EdgeflashError, match=r"model_index\.json does not ask for it: set _class"):
        Student.open(folder)


def test_targets_and_ways_that_cannot_refuse(controlled: Path, tmp_path: Path) -> None:
    student, options = Student.open(controlled), {"steps": (4,), "prompts": (PROMPT,)}
    for asked, target, said in (
        ({"deep_cache": 2}, {}, "--deep-cache 2: cuts no UNets that a ControlNet steers so far"),
        ({}, {"fused": 1}, "sees a picture beside x_t, and --to onnx takes no pictures into"),
    ):
        told = ExportOptions(**options, **asked)
        with pytest.raises(EdgeflashError, match=said):
            made = shelf.make(Target, "onnx", target)
            export_student(student, made, tmp_path / "no", told, console=QUIET)


def test_edges_are_thin_lines_around_what_is_there() -> None:
    picture = np.full((1, 3, 16, 16), -1, np.float32)
    picture[:, 1, 4:12, 6:13] = 1  # in one colour alone
    found = control.edges(picture)
    assert found.shape == picture.shape and found.dtype == np.float32
    assert (found == found[:, :1]).all() and set(np.unique(found)) == {0, 1}
    lines = found[0, 0]
    np.testing.assert_array_equal(lines[8], lines[7])
    assert lines[8].sum() == 2 and lines[:, 9].sum() == 2 and not lines[:3].any()
    assert lines[8, 5] + lines[8, 6] == 1 and lines[8, 12] + lines[8, 13] == 1
    assert not control.edges(
        np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(1, 3, 8, 8)[:, :, :, ::-1] * 0.1
    ).any()
    scenes, _, _ = shapes.batch(3, range(20))
    shown = scenes.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    share = control.edges(shown).mean((1, 2, 3))
    assert share.min() > 0.005 and share.max() < 0.2
