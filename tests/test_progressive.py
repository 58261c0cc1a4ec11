"""Progressive distillation against closed forms, and stages of it in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gaussian import (
    NOTHING,
    S,
    batch,
    network,
    normal,
    posterior,
    process,
    sampled,
    says,
    seeded,
    teacher_folder,
    variance,
)
from test_distill import small_recipe
from torch import Tensor

from edgeflash.distill.by_progressive import Lesson, Progressive, halved
from edgeflash.distill.few_steps import ddim_scheduler, trailing
from edgeflash.distill.fit import check_kind
from edgeflash.distill.process import Process
from edgeflash.distill.rollout import ddim
from edgeflash.distill.run import distill
from edgeflash.distill.teacher import asked
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Recipe, changed, recipe_of
from edgeflash.schedule import lower_schedule

STD = {1: 0.03419, 2: 0.28566, 4: 0.54358, 8: 0.72586, 16: 0.84142, 32: 0.91016}  # of N steps, / S


def half(it: Process, teacher: Any, steps: int) -> Any:
    """The perfect student of ``steps``, of a teacher that takes twice as many."""
    options = Progressive(denoising_steps=steps)
    stops = trailing(it.timesteps, steps)

    def sees(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        n = (stops == t[:, None]).int().argmax(1)
        t, u, s = options.times(n, it.timesteps)
        x_s = ddim(asked(teacher, it, NOTHING, NOTHING), it, x, [t, u, s])
        x_0 = halved(it, x, x_s, t, s)
        return x_0, (x - it.alpha(t) * x_0) / it.sigma(t)

    return network(it, sees)


def loss(options: Progressive, student: Any, teacher: Any, count: int = 400) -> float:
    lesson = Lesson(options, teacher, process(), NOTHING)
    return float(lesson.loss(student, batch(count), seeded())["halving"])


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 16, 32, 333])
def test_trailing_stops_are_diffusers(tmp_path: Path, steps: int) -> None:
    schedule = lower_schedule(ddim_scheduler(teacher_folder(tmp_path), steps), steps)
    assert [step.t for step in schedule.steps] == trailing(1000, steps)[:-1].tolist()
    assert trailing(1000, steps)[-1] == -1


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_one_step_to_the_target_ends_where_two_of_the_teacher_do(predicts: str) -> None:
    it, options = process(predicts), Progressive(denoising_steps=3)
    t, u, s = options.times(torch.tensor([0, 1, 2]), 1000)
    assert (t.tolist(), u.tolist()) == ([999, 666, 332], [832, 499, 166])
    assert s.tolist() == [666, 332, -1]
    x_t = normal(3)
    x_s = ddim(asked(posterior(it), it, NOTHING, NOTHING), it, x_t, [t, u, s])
    x_0 = halved(it, x_t, x_s, t, s)
    eps = (x_t - it.alpha(t) * x_0) / it.sigma(t)
    assert torch.allclose(it.ddim(x_0, eps, s), x_s, atol=1e-5)


def test_students_halved_again_and_again_keep_their_first_teachers_spread(tmp_path: Path) -> None:
    """N DDIM steps shrink the standard deviation by a known factor; so do all the students."""
    it, folder = process("v_prediction"), teacher_folder(tmp_path, prediction_type="v_prediction")

    def spread(net: Any, steps: int) -> float:
        schedule = lower_schedule(ddim_scheduler(folder, steps), steps)
        zero, one = (sampled(schedule, net, torch.full((1, 1, 1, 1), v)) for v in (0.0, 1.0))
        return float((one - zero) * variance(it, torch.tensor([999])).sqrt() / S)

    teacher = posterior(it)
    assert [spread(teacher, n) for n in STD] == pytest.approx(list(STD.values()), abs=1e-5)
    for steps in (16, 8, 4, 2, 1):
        teacher = half(it, teacher, steps)
        assert spread(teacher, steps) == pytest.approx(STD[32], abs=2e-4)  # float32, 32 calls


def test_the_loss_is_the_weighted_distance_to_the_perfect_student() -> None:
    it, options = process(), Progressive(denoising_steps=8)
    perfect = half(it, posterior(it), 8)
    assert (
        loss(options, perfect, posterior(it))
        < 1e-8
        < 1e-3
        < loss(options, posterior(it), posterior(it))
    )

    def off(x: Tensor, t: Tensor, c: Tensor) -> Any:
        told = perfect(x, t, c)
        told.sample = told.sample + 0.1
        return told

    generator = seeded()
    torch.randn(400, 1, 2, 2, generator=generator)
    t, _, _ = options.times(torch.randint(8, (400,), generator=generator), 1000)
    snr = it.abar[t] / (1 - it.abar[t])
    weight = float(snr.clamp(min=1).mean())
    assert loss(options, off, posterior(it)) == pytest.approx(0.01 * weight, rel=1e-3)
    plus_one = options.model_copy(update={"weighting": "snr_plus_one"})
    found = loss(plus_one, off, posterior(it))
    assert found == pytest.approx(0.01 * float(snr.mean() + 1), rel=1e-3)
    known = options.weight(it, torch.tensor([999, 19])).flatten().tolist()
    assert known == pytest.approx([1, 55.32], rel=1e-3)


def test_guidance_is_folded_in_or_kept() -> None:
    plain = {"denoising_steps": 1, "caption_dropout": 0}
    teacher = says(lambda c: 1 + c)  # batches have c = 0, where "no caption" is 5
    nothing = torch.full((1, 1, 1), 5.0)

    def guided(student: Any, **options: Any) -> float:
        lesson = Lesson(Progressive(**plain | options), teacher, process(), nothing)
        return float(lesson.loss(student, batch(4000), seeded())["halving"])

    scaled = 6 + 7.5 * (1 - 6)
    assert guided(says(lambda c: 0 * c + scaled), guidance=7.5) < 1e-8
    assert guided(teacher, guidance=7.5) == pytest.approx((scaled - 1) ** 2)
    assert guided(teacher, cfg_share=1) < 1e-8
    blind = says(lambda c: torch.ones_like(c))  # right, but for the empty caption
    assert guided(blind) < 1e-8
    wanted = 25 * (13**3 - 1**3) / (3 * 12)  # 5^2 E[(s - 1)^2], s ~ U[2, 14]
    assert guided(blind, cfg_share=1) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("options", "sizes"), [({}, [3, 3]), ({"guidance": 2}, [6, 6]), ({"cfg_share": 1}, [6, 6])]
)
def test_the_teacher_is_asked_twice(options: dict[str, Any], sizes: list[int]) -> None:
    calls: list[int] = []
    answer = posterior(process())
    loss(
        Progressive(**options),
        answer,
        lambda x, t, c: calls.append(len(x)) or answer(x, t, c),
        count=3,
    )
    assert calls == sizes


def test_the_teachers_own_loss_is_that_of_the_data() -> None:
    it = process()
    lesson = Lesson(Progressive(denoising_weight=0.2), posterior(it), it, NOTHING)
    told = lesson.loss(posterior(it), batch(4000), seeded())["denoising"]
    t = torch.arange(1000)
    least = float((S**2 * it.sigma(t) ** 2 / variance(it, t)).mean())  # E[Var(x_0 | x_t)]
    assert float(told) == pytest.approx(0.2 * least, rel=0.05)


def test_what_cannot_be_folded_and_kept_is_said() -> None:
    with pytest.raises(ValueError, match=r"guidance 7.5 is folded in.* set cfg_share"):
        Progressive(guidance=7.5, cfg_share=0.1)
    with pytest.raises(ValueError, match=r"guidance_min 20.0 is greater than guidance_max 14.0"):
        Progressive(guidance_min=20)


def test_stages_in_a_row_halve_what_there_is_and_fold_guidance_once() -> None:
    def chain(*steps: int, **first: Any) -> Recipe:
        each: list[dict[str, Any]] = [{"denoising_steps": steps[0], **first}, {"by": "decoder"}]
        each += [{"denoising_steps": n, "halves": "student"} for n in steps[1:]]
        stages = [{"by": "progressive"} | stage for stage in each]
        return recipe_of({"name": "x", "stage": stages}, "x")

    check_kind(chain(4, 2, 1, guidance=3), [])
    with pytest.raises(EdgeflashError, match=r"^stage 3, 'progressive': halves 2 .* student of 4:"):
        check_kind(chain(4, 1), [])
    with pytest.raises(EdgeflashError, match=r"^stage 4, .* halves 8 steps to 4.* student of 2:"):
        check_kind(chain(4, 2, 4), [])
    for extra in ({"guidance": 3}, {"cfg_share": 0.1}):
        stages = chain(4, 2, guidance=3).model_dump()["stage"]
        twice = [*stages[:2], stages[2] | extra]
        with pytest.raises(EdgeflashError, match=r"stage 3, .* earlier stage has folded guidance"):
            check_kind(recipe_of({"name": "x", "stage": twice}, "x"), [])
    everywhere = changed(chain(8, 4, 2, 1), {"progressive.guidance": 3})
    with pytest.raises(EdgeflashError, match="write guidance = 1"):
        check_kind(everywhere, [])
    stages = [{"by": "lcm", "ddim_steps": 2}, {"by": "progressive", "halves": "student"}]
    with pytest.raises(EdgeflashError, match=r"halves 8 steps to 4, .* student of 1 to 2:"):
        check_kind(recipe_of({"name": "x", "stage": stages}, "x"), [])


def test_a_later_stage_halves_what_the_one_before_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeflash.distill.stage import Workshop

    load, loaded = Workshop.load, []

    def noted(shop: Workshop, folder: Path, component: str, *loras: Path) -> Any:
        loaded.append(f"{folder.parent.name}/{component}")
        return load(shop, folder, component, *loras)

    monkeypatch.setattr(Workshop, "load", noted)
    every = {"by": "progressive", "steps": 2, "batch_size": 2}
    stages = [
        every | {"denoising_steps": 2, "guidance": 3.0},
        every | {"denoising_steps": 1, "halves": "student"},
    ]
    out = distill(small_recipe(tmp_path, stage=stages, sampling=None), tmp_path / "student")
    assert loaded.count("1-progressive/unet") == 2  # as student and as teacher
    told = json.loads((out / "edgeflash.json").read_text())
    assert list(told["schedules"]) == ["1"] and told["guidance"]["kind"] == "none"
    assert all(np.isfinite(stage["halving"]) for stage in told["lineage"]["stages"])
