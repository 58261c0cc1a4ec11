"""LADD against closed forms, the latents it takes for real, and its two players in a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from gaussian import BETAS, M, S, Shift, normal, process, seeded
from test_distill import small_recipe
from torch import Tensor

from edgeflash.distill import encoded
from edgeflash.distill.by_ladd import LADD, Duel, told, transformers
from edgeflash.distill.data import open_store
from edgeflash.distill.encoded import cached_conditioning, cached_latents
from edgeflash.distill.few_steps import ladder
from edgeflash.distill.process import Process
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError

CPU = torch.device("cpu")


class Watched:
    """A teacher whose features are the noised latents that it was last shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> None:
        self.shown.append((x, t))

    @property
    def outputs(self) -> list[Tensor]:
        return [self.shown[-1][0]]


def threefold(maps: list[Tensor], condition: Tensor) -> list[Tensor]:
    return [3 * features.flatten(1) for features in maps]


def duel(it: Process, watched: Watched, student: Any, options: LADD | None = None) -> Duel:
    options = options or LADD()
    return Duel(options, watched, watched, student, threefold, it, ladder(it, 4, ""))  # type: ignore[arg-type]


def rows(count: int, step: int = 0) -> dict[str, Tensor]:
    c = torch.zeros(count, 1, 1)
    return {"x_0": M + S * normal(count), "c": c, "step": torch.tensor(step)}


@pytest.mark.parametrize(("m", "s"), [(0.0, 0.5), (1.0, 0.4)])
def test_noise_levels_are_logit_normal(m: float, s: float) -> None:
    it, options = process(), LADD(noise_mean=m, noise_std=s)
    t = options.levels(20_000, it, seeded())
    level = (it.sigma(t) / (it.alpha(t) + it.sigma(t))).flatten().logit()
    assert float(level.mean()) == pytest.approx(m, abs=0.02)
    assert float(level.std()) == pytest.approx(s, abs=0.02)


def test_no_level_lies_beyond_the_last_timestep() -> None:
    t = LADD(noise_mean=9).levels(50, process(), seeded())
    assert (t == 999).all()


@pytest.mark.parametrize(
    ("step", "shares"),
    [(0, [0, 0, 0.5, 0.5]), (499, [0, 0, 0.5, 0.5]), (500, [0.7, 0.1, 0.1, 0.1])],
)
def test_the_easy_timesteps_come_first(step: int, shares: list[float]) -> None:
    student = Shift(M, S)
    duel(process(), Watched(), student).made(student, rows(20_000, step), seeded())
    found = [float((student.seen[0] == t).float().mean()) for t in (999, 749, 499, 249)]
    assert found == pytest.approx(shares, abs=0.02)


def test_the_teacher_is_shown_real_and_made_latents_at_one_level() -> None:
    it, watched, batch = process(), Watched(), rows(2000)
    heard: list[int] = []

    def heads(maps: list[Tensor], condition: Tensor) -> list[Tensor]:
        heard.append(len(maps[0]))
        return threefold(maps, condition)

    duel(it, watched, Shift(M + 1, 0)).critic_loss(heads, batch, seeded())
    ((x_t, t),) = watched.shown
    assert torch.equal(t[:2000], t[2000:]) and heard == [2000, 2000]
    clean = torch.cat([batch["x_0"], torch.full_like(batch["x_0"], M + 1)])
    eps = (x_t - it.alpha(t) * clean) / it.sigma(t)
    for half in eps.split(2000):
        assert float(half.mean()) == pytest.approx(0, abs=0.05)
        assert float(half.std()) == pytest.approx(1, abs=0.05)
    assert (eps[:2000] - eps[2000:]).abs().mean() > 0.5, "the same noise on both"


def test_heads_learn_that_the_teachers_latents_are_the_real_ones() -> None:
    it, weight = process(), torch.tensor(0.01, requires_grad=True)

    def heads(maps: list[Tensor], condition: Tensor) -> list[Tensor]:
        return [weight * features.flatten(1) for features in maps]

    game = duel(it, Watched(), Shift(M - 5, 0))
    game.critic_loss(heads, rows(50), seeded())["hinge"].backward()
    assert weight.grad is not None and float(weight.grad) < 0


def test_the_student_climbs_what_the_heads_say() -> None:
    """A score of 3 x_t has the slope 3 alpha_t by the student's sample."""
    it, watched, student = process(), Watched(), Shift(M, S)
    duel(it, watched, student).student_loss(student, rows(30), seeded())["adversarial"].backward()
    ((_, t),) = watched.shown
    assert student.m.grad is not None
    assert float(student.m.grad) == pytest.approx(-3 * float(it.alpha(t).mean()), rel=1e-5)


def test_a_step_of_four_samples_varies_a_quarter_as_much_as_of_one() -> None:
    """Each sample has a level and a noise of its own, and the loss is their mean."""

    def variance(count: int) -> float:
        slopes = []
        for seed in range(200):
            student = Shift(M, S)
            game = duel(process(), Watched(), student)
            game.student_loss(student, rows(count), seeded(seed))["adversarial"].backward()
            assert student.m.grad is not None
            slopes.append(float(student.m.grad))
        return float(torch.tensor(slopes).var())

    assert variance(1) / variance(4) == pytest.approx(4, rel=0.4)


def test_heads_are_told_level_and_caption() -> None:
    c = torch.arange(12.0).view(2, 3, 2)
    at, other = told(torch.tensor([5, 5]), c), told(torch.tensor([5, 900]), c)
    assert torch.equal(at[:, -2:], c.mean(1)) and torch.equal(at[0], other[0])
    assert (at[1] - other[1]).abs().max() > 0.5


def unet(**changes: Any) -> Any:
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    sizes |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    sizes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return UNet2DConditionModel(**sizes | {"cross_attention_dim": 12} | changes)


def test_every_transformer_of_the_teacher_gets_a_head() -> None:
    found, widths = transformers(unet())
    assert len(found) == 4 and widths == [16] * 4  # one down, two up, one in the middle
    bare = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(EdgeflashError, match="the teacher's UNet has none"):
        transformers(unet(**bare, mid_block_type=None))


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    recipe = small_recipe(tmp_path, stage=[{"by": "ladd"}])
    store = open_store(recipe.data, 0, tmp_path / "cache")
    teacher = tmp_path / "teacher"
    return Workshop(teacher, teacher, store, tmp_path, CPU)


@torch.no_grad()
def test_synthetic_latents_are_what_diffusers_ddim_makes(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "at_once", lambda size_px: 3)  # a row's noise is its own
    options = LADD(guidance=3, solver_steps=5)
    x_0 = options.begin(shop).batch(np.array([6, 2]))["x_0"]
    assert shop.teacher
    teacher, (conditioning, nothing) = shop.load(shop.teacher, "unet"), cached_conditioning(shop)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    for found, row in zip(x_0, (6, 2), strict=True):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(row))
        c = conditioning(np.array([row]))
        for t in scheduler.timesteps:
            with_c, without = (teacher(x, t, told).sample for told in (c, nothing))
            x = scheduler.step(without + 3 * (with_c - without), t, x).prev_sample
        assert (found - x[0]).abs().max() < 2e-3 * x.abs().max()  # they are kept as float16


def test_the_datas_own_latents_can_be_the_real_ones(shop: Workshop) -> None:
    x_0 = LADD(latents="pictures").begin(shop).batch(np.array([3]))["x_0"]
    assert torch.equal(x_0, cached_latents(shop)(np.array([3])))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shares": (1.0,)}, "1 shares but 4 first_shares"),
        ({"shares": (0.0, 0, 0, 0)}, "not all 0"),
        ({"first_shares": (-1.0, 1, 1, 1)}, "none below 0"),
    ],
)
def test_shares_that_cannot_be_drawn_by_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LADD(**options)


def test_the_heads_take_more_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []

    def noted(name: str) -> Callable[..., Any]:
        before = getattr(Duel, name)

        def turn(game: Duel, network: Any, batch: Any, generator: Any) -> Any:
            turns.append((name, int(batch["step"])))
            return before(game, network, batch, generator)

        return turn

    for name in ("critic_loss", "student_loss"):
        monkeypatch.setattr(Duel, name, noted(name))
    stage = {"by": "ladd", "latents": "pictures", "critic_updates": 2, "steps": 3, "batch_size": 2}
    out = distill(small_recipe(tmp_path, stage=[stage]), tmp_path / "student")
    both = ["critic_loss", "student_loss"]
    assert turns == [(n, 0) for n in both] + [(both[0], 1)] + [(n, 2) for n in both]
    (outcome,) = json.loads((out / "edgeflash.json").read_text())["lineage"]["stages"]
    assert {"critic/hinge", "student/adversarial"} < set(outcome)
