"""Whole recipes of few-step methods, and the step counts that their samplers have."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distill import small_recipe

from edgeflash.distill.by_lcm import LCM
from edgeflash.distill.loop import Outcome
from edgeflash.distill.run import _check_steps, distill
from edgeflash.distill.stage import Stage, Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import recipe_of

FOUR_STEPS = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}
ONE_STEP = {"denoising_steps": 1, "denoising_timestep": 400}
CASES: dict[str, tuple[dict[str, Any], str, dict[int, list[int]]]] = {
    "lcm": ({"by": "lcm", "own_steps": 4, "ddim_steps": 20}, "LCMScheduler", FOUR_STEPS),
    "tcd": ({"by": "tcd"}, "TCDScheduler", {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]}),
    "perflow": ({"by": "perflow", "windows": 2}, "DDIMScheduler", {2: [999, 499]}),
    "reflow": ({"by": "perflow", "windows": 1}, "DDIMScheduler", {25: []}),
    "dmd": ({"by": "dmd"}, "LCMScheduler", FOUR_STEPS),
    "dmd at 399": ({"by": "dmd"} | ONE_STEP, "LCMScheduler", {1: [399]}),
    "progressive": (
        {"by": "progressive", "denoising_steps": 3, "cfg_share": 1, "denoising_weight": 0.2},
        "DPMSolverMultistepScheduler",
        {3: [999, 666, 332]},
    ),
    "progressive, folded": (
        {"by": "progressive", "denoising_steps": 2, "guidance": 3},
        "DDIMScheduler",
        {2: [999, 499]},
    ),
    "consistency": (
        {"by": "consistency"},
        "LCMScheduler",
        {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]},
    ),
    "consistency, training": (
        {"by": "consistency", "kind": "training", "inference_steps": 1},
        "LCMScheduler",
        {1: [999]},
    ),
    "flash": (
        {"by": "flash", "teacher_steps": 4, "modes": [[0, 1, 0, 0]], "dmd_weights": [0.7]}
        | {"gan_weights": [0.3]},
        "LCMScheduler",
        FOUR_STEPS,
    ),
    "imagine": ({"by": "imagine"}, "DPMSolverMultistepScheduler", {3: [999, 666, 332]}),
    "add": ({"by": "add"}, "LCMScheduler", FOUR_STEPS),
    "ufogen": ({"by": "ufogen"}, "LCMScheduler", FOUR_STEPS),
    "ladd": ({"by": "ladd", "solver_steps": 2}, "LCMScheduler", FOUR_STEPS),
    "sdxs": ({"by": "sdxs", "solver_steps": 2}, "LCMScheduler", {1: [999]}),
    "gan": ({"by": "gan", "solver_steps": 2}, "LCMScheduler", {1: [999]}),
    "scm": (
        {"by": "scm", "guidance": 4.5},
        "LCMScheduler",
        {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]},
    ),
    "meanflow": ({"by": "meanflow", "guidance": 3}, "DDIMScheduler", {1: [999]}),
    "meanflow, training": (
        {"by": "meanflow", "kind": "training", "guidance": 3, "denoising_steps": 3}
        | {"difference": 0},
        "DPMSolverMultistepScheduler",
        {3: [999, 666, 332]},
    ),
}
GUIDED = {"perflow", "reflow", "progressive"}  # those that are sampled with guidance


@pytest.mark.parametrize("case", CASES)
def test_a_student_ships_the_steps_its_sampler_has_and_diffusers_draws(
    tmp_path: Path, case: str
) -> None:
    from diffusers import StableDiffusionPipeline

    stage, scheduler, ladders = CASES[case]
    recipe = small_recipe(tmp_path, stage=[stage | {"steps": 2, "batch_size": 2}], sampling=None)
    out = distill(recipe, tmp_path / "student")
    told = json.loads((out / "edgeflash.json").read_text())
    tables = told["schedules"].items()
    found = {int(n): [step["t"] for step in table["steps"]] for n, table in tables}
    assert found.keys() == ladders.keys() and told["default_steps"] == max(ladders)
    assert all(found[n] == ladder for n, ladder in ladders.items() if ladder)
    guided = case in GUIDED
    assert told["guidance"]["kind"] == ("cfg" if guided else "none")
    pipeline = StableDiffusionPipeline.from_pretrained(str(out), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == scheduler
    asked = {"num_inference_steps": min(ladders), "guidance_scale": 2 if guided else 0}
    image = pipeline("star", **asked, eta=0.3, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()


def test_step_counts_are_those_of_the_last_sampler() -> None:
    def check(*stages: dict[str, Any]) -> None:
        asked = {"steps": [3], "default_steps": 3}
        _check_steps(recipe_of({"name": "x", "stage": list(stages), "sampling": asked}, "x"))

    check({"by": "perflow"}, {"by": "lcm"}, {"by": "decoder"})
    with pytest.raises(EdgeflashError, match=r"steps: 3, but 'perflow' makes multiples of 4"):
        check({"by": "lcm"}, {"by": "perflow"})
    with pytest.raises(EdgeflashError, match=r"steps: 3, but 'dmd' makes at most 2"):
        check({"by": "perflow"}, {"by": "dmd", "denoising_steps": 2})
    with pytest.raises(EdgeflashError, match=r"steps: 3, but 'progressive' makes 4 alone"):
        check({"by": "lcm"}, {"by": "progressive"})


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"by": "perflow", "windows": 3}, r"perflow\.windows: 3 do not divide"),
        ({"by": "dmd", "denoising_timestep": 2000}, r"dmd\.denoising_timestep: at most 1000"),
        ({"by": "add", "student_steps": 3}, r"add\.student_steps: 3 do not divide"),
        ({"by": "ladd", "shares": [1] * 3, "first_shares": [1] * 3}, r"ladd\.shares: 3 do not"),
        ({"by": "ufogen", "segments": 3}, r"ufogen\.segments: 3 do not divide"),
        ({"by": "tcd", "ddim_steps": 2000}, r"tcd\.ddim_steps: at most 1000"),
        (
            {"by": "consistency", "inference_steps": 1001},
            r"consistency\.inference_steps: at most 1000",
        ),
        ({"by": "flash", "teacher_steps": 1004}, r"flash\.teacher_steps: at most 1000"),
        ({"by": "scm", "inference_steps": 1001}, r"scm\.inference_steps: at most 1000"),
        ({"by": "meanflow", "denoising_steps": 1001}, r"meanflow\.denoising_steps: at most 1000"),
        ({"by": "imagine", "denoising_steps": 1001}, r"imagine\.denoising_steps: at most 1000"),
        (
            {"by": "progressive", "denoising_steps": 501},
            r"progressive\.denoising_steps: at most 500",
        ),
    ],
)
def test_what_a_teachers_timesteps_do_not_allow_is_said(
    tmp_path: Path, stage: dict[str, Any], said: str
) -> None:
    with pytest.raises(EdgeflashError, match=said):
        distill(small_recipe(tmp_path, stage=[stage], sampling=None), tmp_path / "student")


@pytest.mark.parametrize(
    ("by", "option"),
    [
        ("denoising", "attribute_weight"),
        ("blocks", "attribute_weight"),
        ("lcm", "attribute_weight"),
        ("dmd", "attribute_weight"),
        ("denoising", "mistakes"),
    ],
)
def test_what_looks_at_attributes_needs_labels(tmp_path: Path, by: str, option: str) -> None:
    rule = {"rule": "small"} if by == "blocks" else {}
    stage = {"by": by, option: 1, "steps": 1} | rule
    recipe = small_recipe(tmp_path, stage=[stage])
    with pytest.raises(EdgeflashError, match=rf"^{by}\.{option} needs .* 'shapes'"):
        distill(recipe, tmp_path / "s")


@pytest.mark.parametrize(
    "stage",
    [{"by": "blocks", "rule": "small"}, {"by": "lcm"}, {"by": "dmd", "fake_updates": 1}],
    ids=itemgetter("by"),
)
def test_an_auxiliary_classifier_moves_the_student(tmp_path: Path, stage: dict[str, Any]) -> None:
    def trained(weight: float) -> dict[str, torch.Tensor]:
        told = stage | {"steps": 1, "batch_size": 2, "attribute_weight": weight, "ema": 0}
        data, out = {"kind": "shapes", "samples": 4}, tmp_path / f"weight {weight}"
        distill(small_recipe(tmp_path, stage=[told], data=data), out)
        log = Path(f"{out}.run/1-{stage['by']}/metrics.jsonl").read_text().splitlines()
        assert "student/attributes" in json.loads(log[0])
        return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")

    little, much = trained(0.1), trained(10)  # the same draws; with 0 there would be fewer
    moved = {name for name in little if not torch.equal(little[name], much[name])}
    assert "conv_out.weight" in moved


def test_every_method_can_save_the_mean_of_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter((1.0, 4.0))

    def train(stage: Stage, *_: Any, **__: Any) -> Outcome:
        torch.nn.init.constant_(stage.final()["unet"].conv_in.bias, next(values))
        return Outcome(1, 0.0, {}, {}, stage.finish(stage.final()))

    monkeypatch.setattr("edgeflash.distill.run.train", train)
    stages: list[dict[str, Any]] = [{"by": "lcm"}, {"by": "lcm", "ends": 2}]
    out = distill(small_recipe(tmp_path, stage=stages, sampling=None), tmp_path / "student")
    weights = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert (weights["conv_in.bias"] == 2.5).all()
    with pytest.raises(ValueError, match="ends is of whole networks"):
        LCM(ends=2, lora_rank=4)
    stages[0] = {"by": "tcd"}
    recipe = small_recipe(tmp_path, stage=stages, sampling=None)
    values = iter((1.0, 4.0))
    with pytest.raises(EdgeflashError, match=r"lcm.ends = 2: there are not so many stages of lcm"):
        distill(recipe, tmp_path / "mixed")


@pytest.mark.parametrize("by", ["lcm", "scm"])
def test_a_student_that_predicts_something_else_than_its_teacher_is_refused(
    tmp_path: Path, by: str
) -> None:
    recipe = small_recipe(tmp_path, stage=[{"by": by, "steps": 1}], base=str(tmp_path / "base"))
    copytree(tmp_path / "teacher", tmp_path / "base")
    config = tmp_path / "base/scheduler/scheduler_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"prediction_type": "v_prediction"}))
    said = r"base: prediction_type is v_prediction, but the teacher's is epsilon, and neither"
    with pytest.raises(EdgeflashError, match=said):
        distill(recipe, tmp_path / "student")


def test_a_student_of_other_latents_than_its_teachers_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    store: Any = None
    shop = Workshop(tmp_path / "teacher", tmp_path / "base", store, tmp_path, torch.device("cpu"))
    copytree(tmp_path / "teacher", shop.student)
    assert shop.process().predicts == "epsilon" and recipe.base is None
    for key, other in (("in_channels", 16), ("cross_attention_dim", 64)):
        config = tmp_path / "base/unet/config.json"
        before = config.read_text()
        config.write_text(json.dumps(json.loads(before) | {key: other}))
        with pytest.raises(EdgeflashError, match=rf"base: {key} is \[?{other}\]?, but the teacher"):
            shop.process()
        config.write_text(before)
