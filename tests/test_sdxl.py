"""SDXL through the whole line: small ones draw what diffusers' own pipeline draws with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from exported import QUIET, Exported, export
from onnxruntime import InferenceSession
from PIL import Image
from tiny_sdxl import POOLED, WIDTHS, write_sdxl
from tiny_student import LENGTH

from edgeflash import shelf
from edgeflash.blueprints import SDXL
from edgeflash.bundle import Bundle, describe_file
from edgeflash.distill.by_blocks import prune, teacher_name
from edgeflash.distill.encoded import token_ids
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.export import onnx_graph
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.noise import randn
from edgeflash.parity import psnr_db
from edgeflash.recipe import recipe_of
from edgeflash.roles import Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for, verify

PROMPT, SEED, STEPS = "a red star", 5, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "small")


@pytest.fixture(scope="module")
def diffusers_pipeline(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
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


def lowered_again(onnx: Exported, target: Target, folder: Path) -> Bundle:
    """The same bundle, its components lowered to another target."""
    components = []
    for component in onnx.bundle.manifest.components:
        files = target.lower(onnx.captured[component.name], folder)
        told = [describe_file(folder, path.relative_to(folder).as_posix()) for path in files]
        changes = {"target": target.runtime, "files": tuple(told)}
        components.append(component.model_copy(update=changes))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(onnx.bundle.folder / name, folder / name)
    changes = {"components": tuple(components)}
    return Bundle(folder, onnx.bundle.manifest.model_copy(update=changes))


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_pictures_are_those_that_diffusers_draws(
    target: str, onnx: Exported, diffusers_pipeline: Any, tmp_path: Path
) -> None:
    bundle = onnx.bundle
    if target == "torch":
        bundle = lowered_again(onnx, shelf.make(Target, "torch", {}), tmp_path)
    with TextToImage(bundle, runtime_for(bundle)) as pipeline:
        for scale, negative in ((4.0, ""), (1.0, ""), (4.0, "blue")):
            request = Request(PROMPT, seed=SEED, guidance=scale, negative=negative)
            drawn = pipeline.generate(request)
            latent = drawn.latent / bundle.manifest.latent.scale
            image = pipeline.parts["vae_decoder"](latent=latent)
            theirs = _drawn(diffusers_pipeline, scale, negative or None)
            assert psnr_db(theirs, (image / 2 + 0.5).clip(0, 1), 1.0) >= 80
            assert np.abs(theirs * 255 - drawn.images.transpose(0, 3, 1, 2)).max() < 1
            assert theirs.std() > 0.05, "it is no even grey"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "asked"),
    [
        ("openvino", {}),
        ("openvino", {"precision": "int8-weights"}),
        ("tensorrt", {"vendor": "tensorrt"}),
        ("tensorrt", {"vendor": "tensorrt", "precision": "fp16"}),
    ],
    ids=str,
)
def test_other_targets_pass_the_ladder(
    to: str, asked: dict[str, Any], folder: Path, onnx: Exported, tmp_path: Path
) -> None:
    """Of TensorRT its ONNX files alone, on the stand-in; floors are those of each precision."""
    if to == "openvino":
        pytest.importorskip("openvino", reason="pip install 'edgeflash[openvino-export]'")
    target, guidance = shelf.make(Target, to, asked), Guidance(kind="cfg", scale=4.0)
    options = ExportOptions(steps=(STEPS,), guidance=guidance, prompts=(PROMPT, "blue ring"))
    bundle = export_student(Student.open(folder), target, tmp_path / "b", options, console=QUIET)
    manifest = bundle.manifest
    proved = {f.component for f in manifest.parity if f.rung == "L1" and f.passed}
    assert proved == {component.name for component in onnx.bundle.manifest.components}
    assert bool(manifest.unproven) == (to == "tensorrt")
    drawn = []
    for each in (onnx.bundle, bundle) if to == "openvino" else ():
        with TextToImage(each, runtime_for(each)) as pipeline:
            drawn.append(pipeline.generate(Request(PROMPT, seed=SEED)).latent)
    assert not drawn or psnr_db(*drawn) > 25


def _drawn(pipeline: Any, scale: float, negative: str | None) -> Any:
    """By diffusers: [1, 3, h, w], 0 to 1."""
    size = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "pt"}
    noise = torch.from_numpy(randn((1, 4, 8, 8), SEED))
    told = pipeline(PROMPT, negative_prompt=negative, guidance_scale=scale, latents=noise, **size)
    return told.images.numpy()


def test_no_prompt_is_read_where_the_model_was_trained_so(
    onnx: Exported, diffusers_pipeline: Any
) -> None:
    """force_zeros_for_empty_prompt = false: "" goes through the text encoders."""
    bundle = onnx.bundle
    assert bundle.manifest.no_prompt == "zeros"
    read = Bundle(bundle.folder, bundle.manifest.model_copy(update={"no_prompt": None}))
    with TextToImage(read, runtime_for(read)) as pipeline:
        drawn = pipeline.generate(Request(PROMPT, seed=SEED)).images.transpose(0, 3, 1, 2)
    assert np.abs(_drawn(diffusers_pipeline, 4.0, "") * 255 - drawn).max() < 1
    assert np.abs(_drawn(diffusers_pipeline, 4.0, None) * 255 - drawn).max() > 1


def test_a_batch_hears_each_prompt(onnx: Exported) -> None:
    with TextToImage(onnx.bundle, runtime_for(onnx.bundle)) as pipeline:
        both = pipeline.generate(Request(("blue ring", PROMPT), seed=SEED - 1)).latent
        alone = pipeline.generate(Request(PROMPT, seed=SEED)).latent
    np.testing.assert_allclose(both[1:], alone, atol=1e-4)


def test_tensors_are_named_as_optimum_names_them(onnx: Exported) -> None:
    names = {
        component.name: (
            [spec.name for spec in component.inputs],
            [spec.name for spec in component.outputs],
        )
        for component in onnx.bundle.manifest.components
    }
    before = [f"hidden_states.{i}" for i in range(2)]
    first, second, unet, _ = names.values()
    assert first == (["input_ids"], ["last_hidden_state", "pooler_output", *before])
    assert second == (["input_ids"], ["text_embeds", "last_hidden_state", *before])
    told = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert unet == (told, ["out_sample"])
    index = json.loads((onnx.bundle.folder / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["diffusers", "OnnxRuntimeModel"]
    assert index["force_zeros_for_empty_prompt"] is True
    assert (onnx.bundle.folder / "tokenizer_2/vocab.json").is_file()
    assert (onnx.bundle.folder / "text_encoder_2/config.json").is_file()


def test_the_ladder_knows_both_text_encoders(onnx: Exported) -> None:
    refuse_below(onnx.bundle.manifest.parity, onnx.bundle.folder)
    held = {f.component for f in onnx.bundle.manifest.parity if f.rung == "L1"}
    assert {"text_encoder", "text_encoder_2", "unet", "vae_decoder"} == held
    manifest = onnx.bundle.manifest
    first, second, *others = manifest.components
    assert second.tokenizer and second.tokenizer.pad_id == 0 != manifest.tokenizer.pad_id
    same = (first, second.model_copy(update={"tokenizer": None}), *others)
    mixed = Bundle(onnx.bundle.folder, manifest.model_copy(update={"components": same}))
    with TextToImage(mixed, runtime_for(mixed)) as pipeline:  # the padding tells them apart
        wrong = pipeline.generate(Request(PROMPT, seed=SEED)).latent
    with TextToImage(onnx.bundle, runtime_for(onnx.bundle)) as pipeline:
        right = pipeline.generate(Request(PROMPT, seed=SEED)).latent
    assert psnr_db(right, wrong) < 80
    padded = second.tokenizer.model_copy(update={"pad_id": 7})
    other = (first, second.model_copy(update={"tokenizer": padded}), *others)
    changed = Bundle(onnx.bundle.folder, manifest.model_copy(update={"components": other}))
    found = next(f for f in verify(changed) if f.component == "tokenizer")
    assert found.value == 0


def test_half_precision_leaves_sizes_alone(onnx: Exported, tmp_path: Path) -> None:
    """1024 px as an angle of up to 1024 radians."""
    whole = onnx.bundle.folder / "unet/model.onnx"
    model = onnx_graph.load(whole)
    onnx_graph.to_half(model)
    (path,) = onnx_graph.save(model, tmp_path / "model.onnx", 2**30)
    given = dict(onnx.captured["unet"].samples[0].inputs)
    given["time_ids"] = np.array([[1023, 771, 5, 3, 1019, 769]], np.float32)
    wanted, found = (InferenceSession(p).run(None, given)[0] for p in (whole, path))
    assert psnr_db(wanted, found) > 60


def test_a_bundle_whose_text_encoders_tell_too_little_is_refused(onnx: Exported) -> None:
    manifest = onnx.bundle.manifest
    fewer = tuple(c for c in manifest.components if c.name != "text_encoder_2")
    lame = Bundle(onnx.bundle.folder, manifest.model_copy(update={"components": fewer}))
    with pytest.raises(EdgeflashError, match=r"takes 56 .*'conditioning', but .* give 32"):
        TextToImage(lame, runtime_for(lame))


@pytest.mark.parametrize("channels", [None, 8], ids=["", "embedded-guidance"])
def test_a_folded_timestep_still_hears_prompt_size_and_guidance(
    channels: int | None, tmp_path: Path
) -> None:
    student = Student.open(write_sdxl(tmp_path / "s", guidance_channels=channels))
    family = student.family
    names = [spec.name for spec in family.signature(student, "unet", (16, 16), folded=True)[0]]
    assert names[1:] == ["encoder_hidden_states", "text_embeds", "time_ids"] + (
        ["timestep_cond"] if channels else []
    )
    given = [torch.randn(2, 4, 8, 8), torch.randn(2, LENGTH, sum(WIDTHS)), torch.randn(2, POOLED)]
    given += [torch.tensor([[16.0, 16, 0, 0, 16, 16], [32, 16, 4, 0, 32, 16]])]
    given += [torch.randn(2, channels)] if channels else []
    whole = family.load(student, "unet")
    folded = family.load(student, "unet", timestep=749.0)
    with torch.no_grad():
        found = folded(*given)
        torch.testing.assert_close(found, whole(given[0], torch.tensor(749.0), *given[1:]))
        for place in range(1, len(given)):
            other = [*given[:place], given[place] + 1, *given[place + 1 :]]
            assert not torch.allclose(found, folded(*other), atol=1e-5), names[place]


def test_methods_and_pipeline_hear_the_same(folder: Path, diffusers_pipeline: Any) -> None:
    """One tensor c is what the pipeline hands over in three."""
    student, pipeline = Student.open(folder), diffusers_pipeline
    ids = [token_ids(t, [PROMPT, "star"]) for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    x, t = torch.randn(2, 4, 8, 4), torch.tensor([500, 20])
    with torch.no_grad():
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        c = student.family.encode_prompt(encoders, ids)
        assert c.shape == (2, LENGTH + 1, sum(WIDTHS))
        text, _, pooled, _ = pipeline.encode_prompt(
            [PROMPT, "star"], device=x.device, do_classifier_free_guidance=False
        )
        sizes = pipeline._get_add_time_ids((16, 8), (0, 0), (16, 8), x.dtype, POOLED)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(2, 1)}
        wanted = unet(x, t, text, added_cond_kwargs=added).sample
        torch.testing.assert_close(student.family.listening(student, unet)(x, t, c).sample, wanted)


def test_a_recipe_gives_a_student_that_diffusers_loads(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, caption in enumerate(("a red star", "blue ring", "", "a star")):
        Image.new("RGB", (16, 16), (60 * i, 99, 0)).save(tmp_path / f"in/{i}.png")
        (tmp_path / f"in/{i}.txt").write_text(caption)
    common = {"steps": 2, "batch_size": 2}
    stages = [
        {"by": "blocks", "rule": "small", **common},
        {"by": "lcm", "w_min": 1, "w_max": 2, **common},
        {"by": "decoder", "width": 8, "blocks": [1, 1], "own_steps": 1, **common},
    ]
    data = {"kind": "folder", "path": str(tmp_path / "in"), "size_px": 16}
    plain = {"name": "small", "teacher": str(folder), "data": data, "stage": stages}
    out = distill(recipe_of(plain, "test"), tmp_path / "student")
    student, pipeline = Student.open(out), StableDiffusionXLPipeline.from_pretrained(str(out))
    assert student.family.name == "sdxl" and student.guidance() == Guidance()
    assert student.family.latent(student).scale == 1, "a tiny decoder takes scaled latents"
    assert pipeline.unet.mid_block is None
    taught = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    ours = pipeline.unet.state_dict()
    assert set(ours) < set(taught)
    assert not torch.equal(
        ours["add_embedding.linear_1.weight"], taught["add_embedding.linear_1.weight"]
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(randn((1, 4, 8, 8), SEED))
    told = pipeline(
        PROMPT, num_inference_steps=1, guidance_scale=1, latents=noise, output_type="pt"
    )
    assert told.images.shape == (1, 3, 16, 16) and told.images.isfinite().all()


@pytest.mark.parametrize(
    ("rule", "depths", "count"),
    [("base", (1, 2, 6), 1_161_184_324), ("small", (1, 2, 5), 782_822_724)],
    ids=["koala-1b", "koala-700m"],
)
def test_pruning_keeps_the_teacher_s_tensors(rule: Any, depths: Any, count: int) -> None:
    """UNets of 1,161 and 782 million: KOALA (arXiv 2312.04005)."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**SDXL)
        student, copied = prune(teacher, rule, depths)
    assert teacher.num_parameters() == 2_567_463_684
    assert student.num_parameters() == count and copied == 1
    kept = {teacher_name(name, 0, [(1, 2)] * 3) for name in student.state_dict()}
    gone = {name for name in teacher.state_dict() if name not in kept}
    assert all(
        name.startswith(("down_blocks.", "up_blocks.")) or "mid_block" in name for name in gone
    )
    assert {"add_embedding.linear_1.weight", "up_blocks.0.attentions.2.proj_in.weight"} <= kept
    assert f"down_blocks.2.attentions.0.transformer_blocks.{depths[-1]}.norm1.weight" in gone


def test_what_does_not_fit_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    broken = write_sdxl(tmp_path / "broken")
    for component, changes, told in (
        ("unet", {"projection_class_embeddings_input_dim": 77}, r"77 numbers .*20 \+ 48"),
        ("text_encoder_2", {"hidden_size": 40}, "width 56 .*gives 72"),
        ("unet", {"addition_embed_type": None}, "addition_embed_type None"),
    ):
        path = broken / component / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(EdgeflashError, match=told) as caught:
            Student.open(broken)
        assert "\n" not in str(caught.value)
        path.write_text(before)
    with pytest.raises(EdgeflashError, match=r"depths .*base.* leaves 2 stages"):
        prune(UNet2DConditionModel.from_pretrained(folder / "unet"), "base", (1, 2, 3))


def test_recipes_that_end_in_no_student_are_refused(
    folder: Path, one_step_student: Path, tmp_path: Path
) -> None:
    data = {"kind": "folder", "path": str(tmp_path), "size_px": 16}

    def refused(**changes: Any) -> str:
        plain = {"name": "x", "teacher": str(folder), "data": data, **changes}
        with pytest.raises(EdgeflashError) as caught:
            distill(recipe_of(plain, "test"), tmp_path / "student")
        return str(caught.value)

    assert "'denoising' makes parts of sd alone, not of sdxl" in refused(
        stage=[{"by": "denoising"}]
    )
    assert "families sd and sdxl" in refused(stage=[{"by": "lcm"}], base=str(one_step_student))


def test_guidance_is_what_its_pipeline_defaults_to(folder: Path) -> None:
    assert Student.open(folder).guidance() == Guidance(kind="cfg", scale=5.0)


@pytest.mark.parametrize(("target", "options"), [("onnx", {"fused": 1}), ("coreml", {})])
def test_targets_that_cannot_take_it_say_so_at_once(
    folder: Path, tmp_path: Path, target: str, options: dict[str, Any]
) -> None:
    asked = shelf.make(Target, target, options, check=False)
    with pytest.raises(EdgeflashError, match=rf"'sdxl', but --to {target} as asked takes sd alone"):
        export_student(Student.open(folder), asked, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
