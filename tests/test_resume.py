"""Going on with a training: what may change, what must not, and what a student is copied from."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import forked
from safetensors.torch import load_file
from test_distill import run_toy, small_recipe, weights

from edgeflash.disk import TRAINING
from edgeflash.distill import loop
from edgeflash.distill.folders import copy_folder
from edgeflash.distill.run import _same_recipe, distill
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import recipe_of


def test_a_resumed_stage_goes_by_the_options_not_by_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="interrupted at step 5"):
        run_toy(tmp_path / "a", stop_at=5)
    path = tmp_path / "a/checkpoint/model.safetensors"
    before = load_file(path)
    run_toy(tmp_path / "a", learning_rate=1e-9)
    after = load_file(path)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_kill_9_at_any_moment_and_the_same_command_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in a step, or at each touch of the disk in turn; checkpoints fall at every step."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    folder, reached = tmp_path / "cut", 0
    for moment in range(11, 0, -1):  # downwards, for two deaths in a row within a checkpoint

        def dies(moment: int = moment) -> None:
            left = moment

            def deadly(act: Callable[..., Any]) -> Callable[..., Any]:
                def first_counts(*given: Any, **named: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return act(*given, **named)

                return first_counts

            loop._step = deadly(loop._step)
            shutil.rmtree = deadly(shutil.rmtree)
            for home, name in ((Accelerator, "save_state"), (Path, "rename"), (Path, "write_text")):
                setattr(home, name, deadly(getattr(home, name)))
            run_toy(folder)

        assert forked(dies) == [-signal.SIGKILL]
        told = (folder / f"checkpoint{tail}/progress.json" for tail in ("", ".old"))
        steps = [json.loads(path.read_text())["step"] for path in told if path.exists()]
        assert max(steps, default=0) >= reached
        reached = max(steps, default=0)
    assert 1 < reached < 8
    ours = weights(run_toy(folder))
    assert all(map(torch.equal, weights(run_toy(tmp_path / "whole")), ours))


def test_a_changed_teacher_is_noticed(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    teacher, work = Path(recipe.teacher), tmp_path / "work"
    (work / "1-decoder").mkdir(parents=True)
    _same_recipe(recipe, work, teacher, teacher)
    (work / "1-decoder/outcome.json").write_text("{}")
    _same_recipe(recipe, work, teacher, teacher)
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    _same_recipe(recipe.model_copy(update={"teacher": str(moved)}), work, moved, moved)
    (moved / "unet/config.json").write_text("{}")
    with pytest.raises(EdgeflashError, match=r"another recipe \(changed: teacher, base\)"):
        _same_recipe(recipe, work, moved, moved)


def test_what_changed_is_named_as_it_is_set(tmp_path: Path) -> None:
    step = {"by": "progressive", "steps": 1}
    stages = [step | {"denoising_steps": 4}, step | {"denoising_steps": 2}]
    plain: dict[str, Any] = {"stage": stages, "sampling": None}
    recipe = small_recipe(tmp_path, **plain)
    _same_recipe(recipe, tmp_path)
    for i in (1, 2):
        (tmp_path / f"{i}-progressive").mkdir()
        (tmp_path / f"{i}-progressive/outcome.json").write_text("{}")
    data = recipe.data.model_dump() | {"samples": 7}
    changes: dict[str, dict[str, Any]] = {
        "data.samples, progressive.denoising_steps": {
            "data": data, "stage": [stages[0] | {"denoising_steps": 8}, stages[1]]
        },
        "stage": {"stage": stages[:1]},
    }  # fmt: skip
    for said, change in changes.items():
        with pytest.raises(EdgeflashError, match=rf"\(changed: {said}\)"):
            _same_recipe(small_recipe(tmp_path, **plain | change), tmp_path)


def test_options_that_were_added_since_change_nothing_at_their_defaults(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    _same_recipe(recipe, tmp_path)
    path = tmp_path / TRAINING
    told = json.loads(path.read_text())
    del told["data"]["kind"], told["stage"][2]["huber_c"], told["stage"][0]["width"]
    for i, stage in enumerate(told["stage"], 1):
        (tmp_path / f"{i}-{stage['by']}").mkdir()
        (tmp_path / f"{i}-{stage['by']}/outcome.json").write_text("{}")
    path.write_text(json.dumps(told))
    with pytest.raises(EdgeflashError, match=r"\(changed: data\.kind, decoder\.width\)"):
        _same_recipe(recipe, tmp_path)  # neither has its default, but huber_c
    told["data"]["kind"], told["stage"][0]["width"] = "folder", 8
    path.write_text(json.dumps(told))
    stages = [stage.options | {"by": stage.by} for stage in recipe.stage]
    stages[2]["huber_c"] = 0.5
    with pytest.raises(EdgeflashError, match=r"\(changed: lcm\.huber_c\)"):
        _same_recipe(small_recipe(tmp_path, stage=stages), tmp_path)
    _same_recipe(recipe, tmp_path)


@pytest.mark.parametrize("plain_too", [False, True])
def test_variants_are_copied_under_the_plain_name(tmp_path: Path, plain_too: bool) -> None:
    from diffusers import StableDiffusionPipeline

    teacher = Path(small_recipe(tmp_path).teacher)
    for plain in [*teacher.rglob("*.safetensors")]:
        variant = plain.with_suffix(".fp16.safetensors")
        if plain_too:
            variant.write_text("another form of the same")
        else:
            plain.rename(variant)
    copy_folder(teacher, tmp_path / "copy", link=False)
    names = {path.name for path in (tmp_path / "copy").rglob("*.safetensors")}
    assert names == {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    StableDiffusionPipeline.from_pretrained(str(tmp_path / "copy"), safety_checker=None)


def test_shards_of_a_variant_keep_the_names_their_index_knows(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    teacher = Path(small_recipe(tmp_path).teacher)
    unet = UNet2DConditionModel.from_pretrained(str(teacher / "unet"))
    shutil.rmtree(teacher / "unet")
    unet.save_pretrained(str(teacher / "unet"), variant="fp16", max_shard_size="100KB")
    assert len(list((teacher / "unet").glob("*-of-*"))) > 1
    copy_folder(teacher, tmp_path / "copy", link=False)
    found = UNet2DConditionModel.from_pretrained(str(tmp_path / "copy/unet"))
    assert torch.equal(found.conv_in.weight, unet.conv_in.weight)


def test_step_counts_beyond_the_methods_sampler_are_refused_first(tmp_path: Path) -> None:
    asked = {"steps": [1, 60], "default_steps": 1}
    with pytest.raises(EdgeflashError, match=r"\[sampling\] steps: 60, but 'lcm' makes at most 50"):
        distill(small_recipe(tmp_path, sampling=asked), tmp_path / "student")
    stage = [{"by": "lcm", "steps": 1, "ddim_steps": 2000}]
    with pytest.raises(EdgeflashError, match=r"lcm\.ddim_steps: at most 1000"):
        distill(small_recipe(tmp_path, stage=stage), tmp_path / "student")


def test_a_student_does_not_take_the_place_of_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/edgeflash.json").write_text('{"kind": "bundle"}')
    with pytest.raises(EdgeflashError, match="out: holds a bundle; choose another --out"):
        distill(recipe_of({"name": "x", "stage": [{"by": "lcm"}]}, "x"), tmp_path / "out")


def test_no_memory_is_one_line_with_what_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")

    monkeypatch.setattr("edgeflash.distill.run.train", out)
    line = r"^1/\d \w+: out of memory.* raise accumulate"
    with pytest.raises(EdgeflashError, match=line) as said:
        distill(small_recipe(tmp_path), tmp_path / "out")
    assert "\n" not in str(said.value)


def test_a_teacher_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path).model_copy(update={"teacher": str(tmp_path / "nowhere/x")})
    with pytest.raises(EdgeflashError, match="no such folder or file"):
        distill(recipe, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()
