"""T2I-Adapters: beside which UNets, how they are trained, and that one call a picture suffices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_controlnet import PICTURE, PROMPT, SCALE, SEED, drawn, exported, spoilt
from test_denoising import shop as shop  # a fixture
from test_inpainting import inpainting_recipe
from tiny_sdxl import write_sdxl
from tiny_student import adapter_of, write_student

from edgeflash import adapter, control, shelf
from edgeflash.bundle import EACH_STEP, Bundle
from edgeflash.conditions import example
from edgeflash.disk import MANIFEST
from edgeflash.distill.by_adapter import Adapter
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student, rehearsal
from edgeflash.export_options import ExportOptions
from edgeflash.golden import load_tensors, save_tensors
from edgeflash.networks_control import adapter_beside, apart
from edgeflash.networks_sd import load_network
from edgeflash.noise import randn
from edgeflash.recipe import changed, find_recipe, read_recipe
from edgeflash.roles import Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.student import INDEX, Student
from edgeflash.verify import runtime_for, verify
from edgeflash.work import gflops

CROSSED, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "openvino")]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "adapted"
    return write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler", task="Adapter")


@pytest.fixture(scope="module", params=["onnx", *SLOW])
def steered(
    request: pytest.FixtureRequest, adapted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return exported(adapted, tmp_path_factory.mktemp("bundles") / request.param, request.param)


def unet_of(kinds: tuple[str, ...], middle: bool) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=tuple(8 * (i + 1) for i in range(len(kinds))),
        layers_per_block=1,
        down_block_types=kinds,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in kinds[::-1]),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.mark.parametrize(
    ("kinds", "middle", "kind", "maps"),
    [  # Stable Diffusion's, SDXL's and the embedded models', and what pruning leaves of them
        ((CROSSED, CROSSED, CROSSED, PLAIN), True, "full_adapter", 4),
        ((CROSSED, CROSSED, CROSSED), False, "full_adapter", 3),
        ((PLAIN, CROSSED, CROSSED), True, "full_adapter_xl", 4),
        ((PLAIN, CROSSED, CROSSED, PLAIN), False, "full_adapter_xl", 3),
        ((PLAIN, PLAIN, CROSSED), False, "full_adapter", 2),
    ],
)
def test_a_new_one_goes_with_the_stages(
    kinds: tuple[str, ...], middle: bool, kind: str, maps: int
) -> None:
    torch.manual_seed(0)
    unet, size = unet_of(kinds, middle), (2 * 24, 2 * 8)  # px; an odd number of cells on the way
    made = adapter_beside(unet, 2)
    assert (made.config.adapter_type, len(made.config.channels)) == (kind, maps)
    with torch.no_grad():
        found = made(torch.rand(1, 3, *size))
    assert [tuple(each.shape) for each in found] == adapter.shapes(made.config, 1, size)

    def answer(given: list[torch.Tensor]) -> torch.Tensor:
        named = {"down_intrablock_additional_residuals": given, "return_dict": False}
        with torch.no_grad():
            out: torch.Tensor = unet(torch.ones(1, 4, 24, 8), 500, torch.ones(1, 3, 8), **named)[0]
        assert not given, "there was no place for it"
        return out

    plain = answer([torch.zeros_like(each) for each in found])
    for i in range(len(found)):
        one = [each + (j == i) * torch.randn_like(each) for j, each in enumerate(found)]
        assert not torch.allclose(answer(one), plain, atol=1e-4), f"map {i} has no say"


def test_the_embedded_models_take_one_too() -> None:
    student = Student.open("shapes-student")
    unit_px = student.family.latent(student).downsampling
    made = adapter.fitting(student.config("unet"), unit_px)
    assert made["adapter_type"] == "full_adapter_xl" and made["channels"] == [64, 96, 96, 96]
    assert made["downscale_factor"] == 2 * unit_px == 8
    with pytest.raises(EdgeflashError, match="has a AttnDownBlock2D, where T2I-Adapters add to"):
        adapter.fitting(student.config("unet") | {"down_block_types": ["AttnDownBlock2D"] * 3}, 4)


def test_noisy_times_come_more_often() -> None:
    """P(t < s) = 1 - (1 - s / T)^(1 / 3), and a mean of 3 T / 4."""
    t = Adapter().times(20_000, 1000, torch.Generator().manual_seed(0))
    assert 0 <= t.min() < 5 and t.max() == 999
    assert float(t.float().mean()) == pytest.approx(749.5, abs=6)
    assert float((t < 500).float().mean()) == pytest.approx(1 - 0.5 ** (1 / 3), abs=0.01)
    even = Adapter(timestep_power=1).times(20_000, 1000, torch.Generator().manual_seed(0))
    assert float(even.float().mean()) == pytest.approx(499.5, abs=8)


def test_an_adapter_alone_learns_from_edges(adapted: Path, shop: Workshop) -> None:
    from test_control import with_unet

    with_unet(shop)
    stage = Adapter().begin(shop)
    (player,) = stage.players.values()
    unet, batch = player.network, stage.batch(np.arange(2))
    assert stage.pipeline == "StableDiffusionAdapterPipeline"
    assert stage.results["adapter"] is unet.adapter
    x, t = torch.randn(batch["x_0"].shape), torch.full((2,), 500)
    seen = torch.from_numpy(control.edges(shop.store.pictures(np.arange(2)).numpy()))
    before = shop.load(shop.student, "unet")
    with torch.no_grad():
        given = {"down_intrablock_additional_residuals": unet.adapter(seen)}
        wanted = before(x, t, batch["c"][:, :16], **given).sample
        assert torch.allclose(unet(x, t, batch["c"]).sample, wanted, atol=1e-5)
    player.loss(unet, batch, torch.Generator())["denoising"].backward()
    moved = {name for name, each in unet.named_parameters() if each.grad is not None}
    assert moved == {f"adapter.{name}" for name, _ in unet.adapter.named_parameters()}
    made = apart(stage.final())
    assert made == stage.results, "a T2IAdapter is saved whole, though a part of it has its name"
    assert list(apart({"unet": unet})) == ["unet", "adapter"]


def by_diffusers(folder: Path, scale: float, size: int = 16) -> Any:
    """[16, 16, 3] in [0, 1], as diffusers' own pipeline of the folder draws."""
    from diffusers import DiffusionPipeline
    from PIL import Image

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert "Adapter" in type(pipeline).__name__
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        image=Image.fromarray(PICTURE),
        num_inference_steps=2,
        guidance_scale=SCALE,
        adapter_conditioning_scale=scale,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        output_type="np",
        height=size,
        width=size,
    ).images[0]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_it_draws_as_diffusers_does(steered: Bundle, adapted: Path, scale: float) -> None:
    ours = drawn(steered, control_scale=scale, low_memory=scale == 0.5)[0]
    assert np.abs(ours / 255 - by_diffusers(adapted, scale)).max() < 1 / 255
    other = drawn(steered, control_scale=scale, control=255 - PICTURE)[0]
    assert np.abs(other.astype(int) - ours).max() > 8


def test_it_is_asked_once_for_all_steps_and_all_images(
    steered: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, tuple[int, ...]]] = []
    with TextToImage(steered, runtime_for(steered)) as pipeline:
        part = pipeline.parts["adapter"]
        answers = part.answers

        def told(**by_role: Any) -> Any:
            asked.append({role: array.shape for role, array in by_role.items()})
            return answers(**by_role)

        monkeypatch.setattr(part, "answers", told)
        request = Request(("blue ring", PROMPT), seed=SEED - 1, control=PICTURE)
        events = list(pipeline.stream(request))
    assert asked == [{"control": (1, 3, 16, 16)}]
    stages = [event.stage for event in events]
    assert stages == ["text_encoder", "adapter", "unet", "unet", "vae_decoder"]
    assert events[-1].result
    two = events[-1].result.images
    assert np.abs(two[1].astype(int) - drawn(steered)[0]).max() <= 1


def test_the_bundle_tells_of_it(steered: Bundle) -> None:
    told = json.loads((steered.folder / MANIFEST).read_text())
    names = ["text_encoder", "adapter", "unet", "vae_decoder"]
    assert told["format_version"] == 4 and [c["name"] for c in told["components"]] == names
    own, takes = steered.component("adapter"), steered.denoiser.inputs
    assert [spec.role for spec in own.inputs] == ["control"]
    assert own.inputs[0].range == (0, 1) and own.inputs[0].shape[1:] == (3, 16, 16)
    gives = [spec for spec in takes if spec.role.startswith("residual.")]
    head = "down_intrablock_additional_residual"
    assert [spec.name for spec in gives] == [f"{head}_{i}" for i in range(2)]
    assert [spec.shape[1:] for spec in own.outputs] == [spec.shape[1:] for spec in gives]
    proved = {(figure.rung, figure.component) for figure in steered.manifest.parity}
    assert {("L0", "adapter"), ("L1", "adapter"), ("L2", "unet")} <= proved
    golden = load_tensors(steered.folder / steered.manifest.goldens[0].tensors)
    seen = control.edges_of(example(0, (16, 16))[0]).transpose(2, 0, 1)[None] / 255
    np.testing.assert_array_equal(golden["control"], seen.astype(np.float32))


def test_the_ladder_sees_an_adapter_that_went_astray(steered: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(steered.folder, folder)
    name = steered.manifest.goldens[0].tensors
    told = load_tensors(folder / name)

    def below(**other: Any) -> set[tuple[str, str]]:
        save_tensors(folder / name, told | other)
        found = verify(Bundle(folder, steered.manifest))
        return {(f.rung, f.component) for f in found if not f.passed}

    assert not below()
    astray = below(**{"residual.1": told["residual.1"] + 1})  # the loop goes by its own
    assert {("L1", "adapter"), ("L1", "unet")} <= astray and ("L3", "pipeline") not in astray
    astray = below(control=1 - told["control"])
    assert {("L1", "adapter"), ("L3", "pipeline")} <= astray and ("L1", "unet") not in astray


def test_what_cannot_be_drawn_after_is_said(steered: Bundle) -> None:
    pipeline = TextToImage(steered, runtime_for(steered))
    with pytest.raises(EdgeflashError, match="its T2I-Adapter sees a picture too: give --control"):
        pipeline.check(Request(PROMPT))
    components = [c for c in steered.manifest.components if c.name != "adapter"]
    fewer = steered.manifest.model_copy(update={"components": tuple(components)})
    with pytest.raises(EdgeflashError, match="unet asks for a controlnet or adapter, but there is"):
        TextToImage(Bundle(steered.folder, fewer), runtime_for(steered))
    own = steered.component("adapter")
    other = own.model_copy(
        update={"name": "controlnet", "inputs": (*steered.denoiser.inputs[:3], own.inputs[0])}
    )
    components = [*steered.manifest.components, other]
    more = steered.manifest.model_copy(update={"components": tuple(components)})
    with pytest.raises(EdgeflashError, match="adapter and controlnet both steer, where one is"):
        TextToImage(Bundle(steered.folder, more), runtime_for(steered))


def test_adapters_of_other_bases_are_refused(adapted: Path, tmp_path: Path) -> None:
    said = spoilt(adapted, "adapter", tmp_path / "a", adapter_type="full_adapter")
    assert "gives maps of 16@4px, 32@8px (channels@cell), where this unet takes 16@4px, " in said
    assert "16@8px" in spoilt(adapted, "adapter", tmp_path / "b", downscale_factor=8)
    assert "pictures of 1 channels, where 3" in spoilt(
        adapted, "adapter", tmp_path / "c", in_channels=1
    )
    folder = tmp_path / "d"
    shutil.copytree(adapted, folder)
    index = json.loads((folder / INDEX).read_text()) | {"_class_name": "StableDiffusionPipeline"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EdgeflashError, match=r'adapter to \["diffusers", "T2IAdapter"\], or take'):
        Student.open(folder)


def test_ways_targets_and_methods_that_cannot_refuse(adapted: Path, tmp_path: Path) -> None:
    student, options = Student.open(adapted), {"steps": (4,), "prompts": (PROMPT,)}
    for asked, target, said in (
        ({"gate": 2}, {}, "--gate 2: cuts no UNets that a T2I-Adapter steers so far"),
        ({}, {"fused": 1}, "sees a picture beside x_t, and --to onnx takes no pictures into"),
        ({"size": (18, 16)}, {}, "size 18x16: both sides must be multiples of 4 px"),
    ):
        told = ExportOptions(**options, **asked)
        with pytest.raises(EdgeflashError, match=said):
            made = shelf.make(Target, "onnx", target)
            export_student(student, made, tmp_path / "no", told)
    with pytest.raises(EdgeflashError, match="no plans are searched with a T2I-Adapter so far"):
        rehearsal(student, shelf.make(Target, "onnx", {"precision": "int8"}))
    for by, said in (
        ("blocks", "method 'blocks': teaches no denoiser that a T2I-Adapter steers so far"),
        ("control", "makes a ControlNet, but a T2I-Adapter steers the denoiser already"),
    ):
        with pytest.raises(EdgeflashError, match=said):
            distill(inpainting_recipe(tmp_path, adapted, by=by), tmp_path / "student")


@pytest.mark.slow
def test_sdxl_has_it_too(tmp_path: Path) -> None:
    folder = write_sdxl(tmp_path / "xl")
    unet = load_network(Student.unfinished(folder), "unet")
    adapter_of(unet).save_pretrained(folder / "adapter")
    index = json.loads((folder / INDEX).read_text())
    index |= {"_class_name": "StableDiffusionXLAdapterPipeline"}
    index |= {"adapter": ["diffusers", "T2IAdapter"]}
    (folder / INDEX).write_text(json.dumps(index))
    bundle = exported(folder, tmp_path / "bundle")
    assert [spec.role for spec in bundle.component("adapter").inputs] == ["control"]
    ours = drawn(bundle, control_scale=0.5)[0]
    assert np.abs(ours / 255 - by_diffusers(folder, 0.5)).max() < 1 / 255


@pytest.mark.slow
@pytest.mark.parametrize("by", ["adapter", "lcm", "dmd", "perflow", "flash"])
def test_methods_that_say_so_keep_it(by: str, adapted: Path, tmp_path: Path) -> None:
    student = Student.open(distill(inpainting_recipe(tmp_path, adapted, by=by), tmp_path / by))
    before, after = (load_network(s, "adapter") for s in (Student.open(adapted), student))
    assert (after.adapter.conv_in.weight - before.adapter.conv_in.weight).any()


@pytest.mark.slow
def test_lora_leaves_it_as_it_is(adapted: Path, tmp_path: Path) -> None:
    recipe = inpainting_recipe(tmp_path, adapted, by="lcm", lora_rank=2)
    out = distill(recipe, tmp_path / "student")
    name = "adapter/diffusion_pytorch_model.safetensors"
    one, other = (load_tensors(folder / name) for folder in (adapted, out))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_the_recipes_run_for_two_steps(tmp_path: Path) -> None:
    """From the embedded teacher to a student of few steps, which diffusers draws with."""
    from diffusers import DiffusionPipeline

    small = {"steps": 2, "batch_size": 2, "data.samples": 4}
    made = tmp_path / "teacher"
    distill(changed(read_recipe(find_recipe("shapes-adapter-teacher")), small), made)
    teacher, base = Student.open(made), Student.open("shapes-teacher")
    one, other = (load_network(s, "unet").state_dict() for s in (teacher, base))
    assert all(torch.equal(one[name], each) for name, each in other.items())
    recipe = changed(read_recipe(find_recipe("shapes-adapter")), small | {"teacher": str(made)})
    student = Student.open(distill(recipe, tmp_path / "student"))
    assert student.manifest and list(student.manifest.schedules) == [1, 2, 4]
    pipeline = DiffusionPipeline.from_pretrained(str(student.folder))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionAdapterPipeline"
    shown = torch.from_numpy(control.edges_of(example(0, (64, 64))[0]).transpose(2, 0, 1)[None])
    picture = pipeline(
        "star", image=shown / 255, num_inference_steps=1, guidance_scale=0, output_type="np"
    ).images
    assert picture.shape == (1, 64, 64, 3) and np.isfinite(picture).all()


def test_its_work_is_counted_once(adapted: Path) -> None:
    work = gflops(Student.open(adapted))
    assert list(work) == ["text_encoder", "adapter", "unet", "vae_decoder"]
    assert 0 < work["adapter"] and "adapter" not in EACH_STEP
