"""FSDP2: two processes with halves of the weights learn what one with all of them does."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distill import small_recipe
from test_processes import CURVE, curve, run, two

from edgeflash.distill import loop
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError

FSDP = {  # as accelerate launch says it
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
UNET = "unet/diffusion_pytorch_model.safetensors"


def cut_up(do: Any, dies_at: int | None = None) -> None:
    """With FSDP; both die at the beginning of that step."""
    os.environ |= FSDP
    loop.CHECKPOINT_SECONDS = 300 if dies_at is None else 0
    step = loop._step

    def mortal(*given: Any, **named: Any) -> dict[str, float]:
        if given[-1] == dies_at:
            os._exit(9)
        return step(*given, **named)

    loop._step = mortal
    do()


@pytest.mark.slow
def test_two_halves_learn_what_one_whole_does_and_go_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages are saved; the critic and the student, of one kind, look through each other."""
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    small_recipe(tmp_path)  # writes teacher and pictures
    run(tmp_path, "whole", {"steps": 4})
    cut = {"steps": 4, "accumulate": 4}
    assert two(partial(cut_up, partial(run, tmp_path, "halves", cut))) == [0, 0]
    whole = curve(tmp_path, "whole")
    for ours, theirs in zip(curve(tmp_path, "halves"), whole, strict=True):
        assert ours == pytest.approx(theirs, abs=CURVE, rel=CURVE)
    weights, found = (load_file(tmp_path / name / UNET) for name in ("whole", "halves"))
    assert weights.keys() == found.keys()
    assert all(torch.allclose(found[k], v, atol=1e-3) for k, v in weights.items())

    resumed = partial(run, tmp_path, "resumed", cut)
    assert two(partial(cut_up, resumed, dies_at=3)) == [9, 9]
    told = json.loads((tmp_path / "resumed.run/1-dmd/checkpoint/progress.json").read_text())
    assert told["step"] == 3 and told["sharded"]
    with pytest.raises(EdgeflashError, match=r"checkpoint: was written with FSDP: launch it so"):
        resumed()
    assert two(partial(cut_up, resumed)) == [0, 0]
    assert (tmp_path / "resumed" / UNET).read_bytes() == (tmp_path / "halves" / UNET).read_bytes()
    assert curve(tmp_path, "resumed") == curve(tmp_path, "halves")


SMALL: dict[str, list[dict[str, Any]]] = {  # stages
    "lcm": [{"by": "lcm", "target_ema": 0.5}],  # a target that is cut up as its network is
    "lora": [{"by": "lcm", "lora_rank": 2, "target_ema": 0.5}],
    "blocks": [{"by": "blocks", "rule": "small"}],
    "decoder": [{"by": "decoder", "width": 8, "blocks": [1, 1]}],  # part of a player's network
    "paths": [
        {"by": "tcd"},
        {"by": "perflow", "windows": 2, "solver_steps": 2},
        {"by": "progressive", "denoising_steps": 2},
        {"by": "consistency"},
        {"by": "scm"},
        {"by": "meanflow"},  # few of whose samples ask for a rate
    ],
    "critics": [
        {"by": "ladd", "latents": "pictures", "critic_updates": 1},
        {"by": "flash", "teacher_steps": 4, "modes": [[0, 1, 0, 0]], "dmd_weights": [0.7]}
        | {"gan_weights": [0.3]},
        {"by": "imagine", "denoising_steps": 2, "teacher_steps": 2},
        {"by": "add", "r1_weight": 0},
        {"by": "ufogen"},
        {"by": "sdxs", "solver_steps": 2},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_student_that_was_cut_up_is_saved_whole(tmp_path: Path, name: str) -> None:
    common = {"steps": 2, "batch_size": 4, "accumulate": 4, "ema": 0.5}
    stages = [common | stage for stage in SMALL[name]]
    recipe = small_recipe(tmp_path, stage=stages, sampling=None)
    whole = distill(recipe, tmp_path / "whole")
    assert two(partial(cut_up, partial(distill, recipe, tmp_path / "halves"))) == [0, 0]
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert files
    for file in files:
        ours, theirs = load_file(tmp_path / "halves" / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[k], v, atol=1e-3) for k, v in theirs.items()), file


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        {"by": "gan", "solver_steps": 2},  # R1: a second derivative
        {"by": "add"},
        {"by": "decoder", "width": 8, "blocks": [1, 1], "adversarial_weight": 0.1},
    ],
    ids=lambda stage: stage["by"],
)
def test_what_weights_cut_up_do_not_stand_is_one_line(
    tmp_path: Path, stage: dict[str, Any]
) -> None:
    common = {"steps": 1, "batch_size": 4}
    recipe = small_recipe(tmp_path, stage=[stage | common], sampling=None)

    def refused() -> None:
        with pytest.raises(EdgeflashError, match=r"^FSDP: the loss of 'critic' .*launch without"):
            distill(recipe, tmp_path / "student")

    assert two(partial(cut_up, refused)) == [0, 0]
