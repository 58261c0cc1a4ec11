"""Student folders: what is read, what is written, and what is said about broken ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.families import families, find_family
from edgeflash.schedule import Guidance
from edgeflash.student import Student, folder_sha256, write_manifest


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


@pytest.fixture
def folder(guided_student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guided_student, tmp_path / "guided"))


def test_a_folder_without_manifest_samples_as_diffusers_would(guided_student: Path) -> None:
    student = Student.open(guided_student)
    assert student.guidance() == Guidance(kind="cfg", scale=7.5)
    assert list(student.schedules()) == [25]
    assert list(student.schedules([2, 4])) == [2, 4]
    assert student.family.size(student) == (16, 16)
    assert student.family.latent(student).scale == 0.18215


def test_few_step_samplers_and_embedded_guidance_are_recognised(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    assert list(Student.open(folder).schedules()) == [1, 2, 4]
    assert Student.open(folder).guidance() == Guidance()
    edit(folder / "unet/config.json", time_cond_proj_dim=16)
    found = Student.open(folder).guidance()
    assert (found.kind, found.channels) == ("embedded", 16)
    with pytest.raises(EdgeflashError, match="ask for guidance embedded"):
        student = Student.open(folder)
        student.family.check_guidance(student, Guidance())


def test_guidance_can_be_asked_for(folder: Path) -> None:
    assert Student.open(folder).guidance(1) == Guidance()
    assert Student.open(folder).guidance(3) == Guidance(kind="cfg", scale=3)
    edit(folder / "unet/config.json", time_cond_proj_dim=16)
    assert Student.open(folder).guidance(3) == Guidance(kind="embedded", scale=3, channels=16)


def test_a_config_that_lacks_a_key_is_named(folder: Path) -> None:
    path = folder / "text_encoder/config.json"
    told = json.loads(path.read_text())
    del told["hidden_size"]
    path.write_text(json.dumps(told))
    with pytest.raises(EdgeflashError, match=r"text_encoder/config\.json: lacks 'hidden_size'"):
        Student.open(folder)


def test_pndm_is_lowered_as_a_two_step_solver(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    schedule = Student.open(folder).schedules([5])[5]
    assert schedule.sampler == "dpmsolver-multistep" and len(schedule.steps) == 5


def test_the_manifest_comes_back_as_written(folder: Path) -> None:
    written = write_manifest(folder, steps=(1, 3), guidance=Guidance(kind="cfg", scale=2.0))
    student = Student.open(folder)
    assert student.manifest == written
    assert student.guidance().scale == 2.0 and written.default_steps == 3
    assert student.schedules() == written.schedules
    assert list(student.schedules([3, 5])) == [3, 5], "lowered where the manifest lacks it"
    assert student.default_steps([1, 5]) == 5


def break_(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def empty(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x10" + bytes(7) + b"x" * 40)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "index": (break_("model_index.json"), "no diffusers folder"),
    "config": (break_("unet/config.json"), r"unet/config.json: missing"),
    "weights": (break_("text_encoder/model.safetensors"), "weights are missing"),
    "component": (lambda f: shutil.rmtree(f / "vae"), "vae: missing"),
    "truncated": (truncate, r"unet/diff.*bytes where its header says .*truncated"),
    "empty": (empty, "truncated"),
    "garbage": (garbage, "unreadable header"),
    "json": (lambda f: (f / "vae/config.json").write_text("{"), "not readable as JSON"),
    "pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipelines"),
        "did you mean 'StableDiffusionPipeline'",
    ),
    "class": (
        lambda f: edit(f / "model_index.json", vae=["diffusers", "VQModel"]),
        "vae is a VQModel",
    ),
    "latents": (lambda f: edit(f / "vae/config.json", latent_channels=8), "latents have 8"),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=9), "inpainting"),
    "side": (lambda f: edit(f / "unet/config.json", sample_size="8"), "sample_size = '8'"),
    "number": (lambda f: edit(f / "unet/config.json", in_channels="4"), "."),
    "width": (lambda f: edit(f / "unet/config.json", cross_attention_dim=64), "of width 64"),
    "sdxl": (
        lambda f: edit(f / "unet/config.json", addition_embed_type="text_time"),
        "cannot feed",
    ),
    "newer": (
        lambda f: (f / MANIFEST).write_text('{"kind": "student", "format_version": 99}'),
        "format 99 is newer",
    ),
    "bundle": (
        lambda f: (f / MANIFEST).write_text('{"kind": "bundle", "format_version": 1}'),
        "is a bundle, not a student",
    ),
    "field": (
        lambda f: (f / MANIFEST).write_text('{"kind": "student", "format_version": 1}'),
        "family: is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said_in_one_line(folder: Path, name: str) -> None:
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(EdgeflashError, match=message) as caught:
        Student.open(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="no such folder"):
        Student.open(tmp_path / "nowhere")
    with pytest.raises(EdgeflashError, match="no diffusers folder"):
        Student.open(tmp_path)


def test_variants_and_shards_are_read_where_diffusers_reads_them(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = Student.open(folder).weights("unet")
    assert (len(found.files), found.variant) == (1, "fp16")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="400KB", variant="fp16")
    student = Student.open(folder)
    found = student.weights("unet")
    assert len(found.files) > 1 and found.variant == "fp16"
    again = student.family.load(student, "unet")
    assert sum(p.numel() for p in again.parameters()) == unet.num_parameters()
    found.files[0].unlink()
    with pytest.raises(EdgeflashError, match=r"00001-of-.*missing"):
        Student.open(folder)


def test_weights_that_lack_a_layer_are_refused(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, path)
    student = Student.open(folder)
    with pytest.raises(EdgeflashError, match=r"missing keys.*decoder\.conv_out\.bias"):
        student.family.load(student, "vae_decoder")


def test_folder_hash_knows_names_and_bytes(folder: Path) -> None:
    first = folder_sha256(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("hidden")
    (folder / "README.md").write_text("a card")
    assert folder_sha256(folder) == first
    (folder / "unet/config.json").rename(folder / "unet/confih.json")
    assert folder_sha256(folder) != first


def test_tokens_are_those_of_transformers(guided_student: Path) -> None:
    from transformers import CLIPTokenizer

    family = find_family(guided_student, "StableDiffusionPipeline")
    texts = ["a red star", "", "Blue  RING!", "r e d " * 20]
    theirs = CLIPTokenizer.from_pretrained(guided_student / "tokenizer")(
        texts, padding="max_length", truncation=True
    )
    np.testing.assert_array_equal(
        family.tokenize(guided_student / "tokenizer", texts), theirs["input_ids"]
    )


def test_a_folded_timestep_changes_nothing_but_the_size(one_step_student: Path) -> None:
    import torch

    student = Student.open(one_step_student)
    whole = student.family.load(student, "unet")
    folded = student.family.load(student, "unet", timestep=749.0)
    x, c = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    torch.testing.assert_close(folded(x, c), whole(x, torch.tensor(749.0), c))
    assert not torch.allclose(folded(x, c), whole(x, torch.tensor(999.0), c), atol=1e-3)
    names = {name for name, _ in folded.named_parameters()}
    assert names and not any("time_emb" in name for name in names)


def test_every_family_says_what_it_is(one_step_student: Path) -> None:
    for family in families():
        assert family.name and family.pipelines and family.denoiser in family.folders
    student = Student.open(one_step_student)
    with pytest.raises(EdgeflashError, match="multiples of 2 px"):
        student.family.signature(student, "unet", (16, 15))


def test_opening_a_student_loads_no_torch(one_step_student: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from edgeflash.student import Student\n"
        f"s = Student.open({str(one_step_student)!r}); s.schedules(); s.guidance()\n"
        "s.family.signature(s, 'unet', (16, 16)); s.family.tokenizer(s)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("guided", [False, True], ids=["", "embedded-guidance"])
@pytest.mark.parametrize("pooled", [False, True], ids=["", "pooled-text"])
def test_a_folded_timestep_still_hears_prompt_and_guidance(pooled: bool, guided: bool) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    from edgeflash.networks_sd import wrap

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text" if pooled else None,
        addition_embed_type_num_heads=2,
        time_cond_proj_dim=8 if guided else None,
    ).eval()
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    scale = {"timestep_cond": torch.randn(2, 8)} if guided else {}
    with torch.no_grad():
        wanted = wrap(unet, "unet", None)(sample, torch.tensor(499), text, **scale)
        found = wrap(unet, "unet", 499.0)(sample, text, **scale)
    assert torch.allclose(found, wanted, atol=1e-6)
