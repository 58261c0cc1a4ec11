"""Consistency distillation and training against closed forms."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from gaussian import (
    BETAS,
    NOTHING,
    M,
    S,
    exact,
    normal,
    posterior,
    process,
    says,
    seeded,
)
from gaussian import batch as plain_batch
from test_distill import small_recipe
from tiny_student import write_student
from torch import Tensor, nn

from edgeflash.distill.by_consistency import Consistency, Lesson, karras
from edgeflash.distill.consistency import consistency
from edgeflash.distill.run import distill
from edgeflash.distill.stage import average
from edgeflash.distill.teacher import asked
from edgeflash.errors import EdgeflashError


def loss(options: Consistency, student: Any, *, step: int = 0, **nets: Any) -> float:
    it = process()
    networks = {"teacher": posterior(it), "target": student} | nets
    lesson = Lesson(options=options, process=it, nothing=NOTHING, **networks)
    data = plain_batch(2000) | {"step": torch.tensor(step)}
    return float(lesson.loss(student, data, seeded())["consistency"])


def test_karras_grid_has_the_papers_numbers() -> None:
    found = karras(40, 0.002, 80).flip(0).tolist()
    assert found[:4] == pytest.approx([80, 69.451, 60.117, 51.880], rel=1e-4)
    assert found[-3:] == pytest.approx([0.00644, 0.00368, 0.002], rel=2e-3)
    assert karras(18, 0.002, 80).flip(0)[:4].tolist() == pytest.approx(
        [80, 57.586, 40.786, 28.375], rel=1e-4
    )


def test_the_grid_goes_from_end_to_end_by_distinct_timesteps() -> None:
    it, options = process(), Consistency(scales=40)
    grid = options.grid(it, 0)
    assert (int(grid[0]), int(grid[-1])) == (0, 999) and (grid.diff() > 0).all()
    wanted = karras(40, 0.02917, 14.61464)
    nearest = it.ratio(grid[-10:]).flatten() / wanted[-10:]
    assert len(grid) > 35 and nearest.tolist() == pytest.approx([1.0] * 10, abs=0.01)
    assert Consistency(scales=2).grid(it, 0).tolist() == [0, 999]


@pytest.mark.parametrize(
    ("step", "entries", "decay"),
    [
        (0, 2, 0.9025),
        (100, 4, 0.966383),
        (1000, 8, 0.985452),
        (10000, 23, 0.995348),
        (100000, 72, 0.998556),
        (400000, 143, 0.999278),
        (800000, 201, 0.999487),
    ],
)
def test_training_refines_its_grid_as_the_code_does(step: int, entries: int, decay: float) -> None:
    options = Consistency(kind="training", steps=800_000, scales_max=200)
    assert options.intervals(step) + 1 == entries
    assert options.mu(step) == pytest.approx(decay, abs=1e-6)


def test_the_exact_map_is_consistent_and_others_are_not() -> None:
    found = [loss(Consistency(), student(process())) for student in (exact, posterior)]
    assert found[0] < 1e-6 and found[1] == pytest.approx(2.56e-4, rel=0.15)  # s^2 E[(d cos)^2]


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_at_the_boundary_nothing_is_changed(predicts: str) -> None:
    it, x = process(predicts), normal(3)
    assert torch.allclose(consistency(posterior(it), it, x, torch.zeros(3).long(), x), x)


def test_training_takes_the_same_picture_with_the_same_noise() -> None:
    """A student that keeps x_t's noise apart has no loss but where noise differs."""
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(x: Tensor, t: Tensor, c: Tensor) -> Any:
        seen.append((x, t))
        return posterior(process())(x, t, c)

    options = Consistency(kind="training", steps=10, scales_max=20)
    loss(options, noted, step=9, teacher=None)
    (x_s, s), (x_t, t) = seen
    it, x_0 = process(), plain_batch(2000)["x_0"]
    grid = options.grid(it, 9)
    assert set(t.tolist()) == set(grid[1:].tolist()) and set(s.tolist()) == set(grid[:-1].tolist())
    eps, same = ((x - it.alpha(at) * x_0) / it.sigma(at) for x, at in ((x_t, t), (x_s, s)))
    assert torch.allclose(eps, same, atol=1e-3) and float(eps.std()) == pytest.approx(1, rel=0.05)


def test_on_the_mean_training_sees_the_teachers_step() -> None:
    """E[x_s | x_t] of one picture and one noise is an Euler step of the perfect teacher."""
    it, t, s = process(), torch.tensor([499]), torch.tensor([399])
    x_0, eps = M + S * normal(200_000), normal(200_000, 3)
    x_t, x_s = it.noised(x_0, eps, t).flatten(), it.noised(x_0, eps, s).flatten()
    slope = float(torch.cov(torch.stack([x_t, x_s]))[0, 1] / x_t.var())
    near, far = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    stepped = [it.ddim(*asked(posterior(it), it, NOTHING, NOTHING)(x, t), s) for x in (near, far)]
    assert slope == pytest.approx(float(stepped[1] - stepped[0]), rel=5e-3)


def test_guidance_is_folded_in() -> None:
    nothing = torch.full((1, 1, 1), 5.0)  # where batches have c = 0
    student, data = says(lambda c: c + 1), plain_batch(500) | {"step": torch.tensor(0)}
    options = Consistency(guidance=3.0, scales=2)  # one interval, down to the boundary
    lesson = Lesson(options, student, student, process(), nothing)
    ahead = says(lambda c: c + 6 + 3.0 * (1 - 6))
    found = [float(lesson.loss(net, data, seeded())["consistency"]) for net in (student, ahead)]
    assert found == pytest.approx([100, 0], rel=0.02, abs=0.01)


def test_distances() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    found = {d: float(Consistency(distance=d).between(a, b)) for d in ("l2", "l1", "huber")}
    assert found == pytest.approx({"l2": 9, "l1": 3, "huber": 3}, rel=1e-3)


def test_an_average_follows_by_the_decay_of_the_step() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0)
    copy = average(network, lambda step: step / 10)
    for value in (1.0, 2.0, 3.0):
        network.weight.data.fill_(value)
        copy.update_parameters(network)
    assert float(copy.module.weight) == pytest.approx(0.2 * (0.1 * 1 + 0.9 * 2) + 0.8 * 3)
    assert exp(2 * log(0.95)) == pytest.approx(Consistency(kind="training").mu(0))


@pytest.mark.parametrize(("warm", "kept"), [(True, 0.0), (False, 0.996**249)])
def test_a_short_training_keeps_nothing_of_its_start(warm: bool, kept: float) -> None:
    """250 steps of 0.996: a third of what the first one left, were it not warm."""
    network = nn.Linear(1, 1, bias=False)
    copy = average(network, 0.996, warm=warm)
    for value in (1.0, *[0.0] * 249):
        network.weight.data.fill_(value)
        copy.update_parameters(network)
    assert float(copy.module.weight) == pytest.approx(kept, abs=1e-6)


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance 3.0: training has no teacher"):
        Consistency(kind="training", guidance=3)
    with pytest.raises(ValueError, match=r"scales_min 200 is greater than scales_max 150"):
        Consistency(scales_min=200)
    base = write_student(tmp_path / "base", tiny_decoder=False, scheduler="DDIMScheduler")
    only_base = {"teacher": None, "base": str(base), "sampling": None}
    stage = {"by": "consistency", "steps": 1, "batch_size": 2}
    recipe = small_recipe(tmp_path, stage=[stage], **only_base)
    with pytest.raises(EdgeflashError, match=r"needs a teacher .* set kind = 'training'"):
        distill(recipe, tmp_path / "a")
    recipe = small_recipe(tmp_path, stage=[stage | {"kind": "training"}], **only_base)
    assert (distill(recipe, tmp_path / "b") / "edgeflash.json").exists()
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    DDIMScheduler(**BETAS, **config).save_pretrained(str(base / "scheduler"))
    with pytest.raises(EdgeflashError, match=r"the grid ends nowhere"):
        distill(recipe, tmp_path / "c")
