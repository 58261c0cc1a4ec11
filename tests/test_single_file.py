"""Single-file checkpoints: converted once, to the very networks they were made of, or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import SD1, SD2, checkpoint, write_hub
from tiny_student import write_student

from edgeflash import cli
from edgeflash.disk import read_json
from edgeflash.errors import EdgeflashError
from edgeflash.single_file import UNET
from edgeflash.student import Student

WEIGHTS = {name: "diffusion_pytorch_model.safetensors" for name in ("unet", "vae")}
WEIGHTS |= {"text_encoder": "model.safetensors"}


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that says of its sampler what the real one says."""
    folder = tmp_path_factory.mktemp("single-file") / "sd1"
    write_student(folder, tiny_decoder=False, scheduler="PNDMScheduler")
    return sampler(folder, steps_offset=1)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tells a Stable Diffusion 2: attention in the second layer, of width 1024."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("single-file") / "sd2"
    write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler")
    told = read_json(folder / "text_encoder/config.json")
    wide = {"hidden_size": 1024, "num_hidden_layers": 1, "hidden_act": "gelu"}
    config = CLIPTextConfig(**told | wide)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(folder / "unet"),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    unet.save_pretrained(folder / "unet")
    return sampler(folder, steps_offset=1, clip_sample=False, prediction_type="v_prediction")


def sampler(folder: Path, **changes: Any) -> Path:
    """Changes what a folder says of its sampler."""
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(read_json(path) | changes))
    return folder


@pytest.fixture
def hub(tmp_path: Path, sd1: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without network, whose hub cache has the configs of Stable Diffusion 1.5."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_hub(tmp_path / "hub", sd1)
    return tmp_path / "hub"


@pytest.fixture
def file(hub: Path, sd1: Path, tmp_path: Path) -> Path:
    save_file(checkpoint(sd1), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def assert_same(found: Path, folder: Path) -> None:
    """The same weights, tokens, sampler, and output of the UNet."""
    for component, name in WEIGHTS.items():
        wanted, there = load_file(folder / component / name), load_file(found / component / name)
        assert wanted.keys() == there.keys()
        assert all(torch.equal(wanted[key], there[key]) for key in wanted), component
    ours, theirs = Student.open(found), Student.open(folder)
    prompts = ["a red star", "Blue RING!"]
    tokens = [s.family.tokenize(s.folder / "tokenizer", prompts) for s in (ours, theirs)]
    np.testing.assert_array_equal(*tokens)
    assert ours.schedules([4]) == theirs.schedules([4])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    c = torch.randn(2, 16, theirs.config("text_encoder")["hidden_size"])
    with torch.no_grad():
        outputs = [s.family.load(s, "unet")(x, t, c) for s in (ours, theirs)]
    assert torch.equal(*outputs) and outputs[0].std() > 0.01


def test_a_file_is_the_folder_it_was_made_of(
    file: Path, sd1: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = Student.open(file)
    assert_same(student.folder, sd1)
    assert student.index["safety_checker"] == student.index["feature_extractor"] == [None, None]
    assert (student.folder / "tokenizer/vocab.json").is_file()
    said = capsys.readouterr().err
    assert said == (
        f"converted {file}, taken to predict epsilon at 16x16 px, to {student.folder}\n"
    )


def test_a_second_use_opens_the_folder(
    file: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Student.open(file).folder
    assert first.is_relative_to(tmp_path / "cache/edgeflash") and first.name == "tiny"
    shutil.rmtree(hub)
    capsys.readouterr()
    moved = (tmp_path / "elsewhere").joinpath(file.name)
    moved.parent.mkdir()
    assert Student.open(file.rename(moved)).folder == first
    assert capsys.readouterr().err == ""
    save_file({k: v + 1 for k, v in load_file(moved).items()}, moved)
    with pytest.raises(EdgeflashError, match="neither in"):  # another file by the same name
        Student.open(moved)


def test_a_pickle_is_opened_too(file: Path, sd1: Path) -> None:
    pickle = file.with_suffix(".ckpt")
    torch.save({"global_step": 7, "state_dict": load_file(file)}, pickle)
    assert_same(Student.open(pickle).folder, sd1)


def test_stable_diffusion_2_is_recognised(
    hub: Path, sd2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hub(hub, sd2, SD2)
    save_file(checkpoint(sd2, "v2"), tmp_path / "two.safetensors")
    assert_same(Student.open(tmp_path / "two.safetensors").folder, sd2)
    assert "taken to predict v_prediction" in capsys.readouterr().err


def test_averaged_weights_come_first(file: Path, sd1: Path) -> None:
    tensors = load_file(file)
    raw = {k: v for k, v in tensors.items() if k.startswith(UNET)}
    averaged = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": raw[k] for k in raw}
    save_file(tensors | averaged | {k: v + 1 for k, v in raw.items()}, file)
    assert_same(Student.open(file).folder, sd1)


def test_half_precision_is_widened(file: Path) -> None:
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    weights = load_file(Student.open(file).folder / "unet" / WEIGHTS["unet"])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_every_command_takes_a_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeflash.distill.run import locate_teacher
    from edgeflash.export import line

    def say(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["edgeflash", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        assert not left.value.code, told.err
        return told.out

    exported: list[Path] = []
    monkeypatch.setattr(line, "export_student", lambda s, *_, **__: exported.append(s.folder))
    assert re.search(r"unet +UNet2DConditionModel", say("inspect", file))
    say("export", file, "--to", "torch")
    assert exported == [Student.open(file).folder] == [locate_teacher(str(file))]


def without(*prefixes: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda told: {k: v for k, v in told.items() if not k.startswith(prefixes)}


def more(**tensors: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda told: told | named


XL = "conditioner__embedders__1__model__transformer__resblocks__9__mlp__c_proj__bias"
IN, OUT = (
    "model__diffusion_model__input_blocks__0__0__weight",
    "model__diffusion_model__out__2__bias",
)
TEXT_BIAS = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "xl": (more(**{XL: torch.ones(2)}), r"kind 'xl_base'.*they take: v1, v2"),
    "inpainting": (more(**{IN: torch.ones(16, 9, 3, 3)}), "kind 'inpainting'"),
    "lora": (lambda _: {"lora_unet.alpha": torch.ones(1)}, "no whole Stable Diffusion model"),
    "no-unet": (without(UNET), "no whole Stable Diffusion model"),
    "no-vae": (without("first_stage_model"), "Failed to load AutoencoderKL"),
    "no-text": (without("cond_stage_model"), "Failed to load CLIPTextModel"),
    "unet-lacks": (without(f"{UNET}out.2.bias"), rf"{SD1}.*\(it lacks weights\)"),
    "text-lacks": (without(TEXT_BIAS), r"text_encoder lacks .*final_layer_norm\.bias; take a file"),
    "wider": (more(**{OUT: torch.ones(9)}), "conv_out.bias expected shape"),
    "more": (more(model__diffusion_model__cond_proj=torch.ones(2)), "209 tensors where .* has 208"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_convert_is_said_in_one_line(name: str, file: Path, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    save_file(change(load_file(file)), file)
    with pytest.raises(EdgeflashError, match=message) as caught:
        Student.open(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "cache").exists()


class Harm:
    """Runs a command where a pickle is loaded trustingly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(file: Path, tmp_path: Path, zipped: bool) -> None:
    pickle = file.with_suffix(".ckpt")
    held = {"state_dict": load_file(file), "callbacks": Harm(tmp_path / "harm")}
    torch.save(held, pickle, _use_new_zipfile_serialization=zipped)
    with pytest.raises(EdgeflashError, match=r"more than weights in it \(posix\.mkdir\)"):
        Student.open(pickle)
    assert not (tmp_path / "harm").exists()
    torch.load(pickle, weights_only=False)
    assert (tmp_path / "harm").exists(), "the pickle was harmless"


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        ("cut.safetensors", b"", "truncated"),
        ("cut.ckpt", b"PK\x03\x04" + bytes(99), "not readable as a checkpoint"),
        ("junk.ckpt", b"junk" * 99, "not readable as a checkpoint"),
        ("empty.ckpt", b"", r"not readable as a checkpoint \(EOFError\)"),
        ("recipe.toml", b"", r"neither a folder nor a checkpoint \(\.safetensors or \.ckpt\)"),
    ],
)
def test_what_is_no_checkpoint(name: str, held: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(held)
    with pytest.raises(EdgeflashError, match=message) as caught:
        Student.open(tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_configs_that_are_not_to_be_had(file: Path, hub: Path) -> None:
    (vae,) = hub.glob("*/snapshots/*/vae")
    shutil.rmtree(vae)
    with pytest.raises(EdgeflashError, match=r"the copy here lacks vae\): connect once"):
        Student.open(file)
    shutil.rmtree(hub)
    with pytest.raises(EdgeflashError, match=rf"tokenizer of {SD1} are neither in {hub}") as caught:
        Student.open(file)
    assert "\n" not in str(caught.value) and "connect once" in str(caught.value)


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "diffusers", "transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EdgeflashError, match=r"single-file checkpoint needs torch.*\[distill\]"):
        Student.open(file)


def test_a_full_disk_leaves_nothing(
    file: Path, sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    def full(_: Any, folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "save_pretrained", full)
        with pytest.raises(EdgeflashError, match="disk full"):
            Student.open(file)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert_same(Student.open(file).folder, sd1)
