"""UFOGen against closed forms, and its two players in a recipe."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from gaussian import M, S, Shift, batch, normal, process, seeded
from test_distill import small_recipe
from test_ladd import unet
from torch import Tensor, nn

from edgeflash.distill.by_ufogen import Duel, UFOGen
from edgeflash.distill.discriminators import DenoiserCritic, EncoderCritic
from edgeflash.distill.loop import _Turn
from edgeflash.distill.process import Process
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Player


class Scores:
    """A critic with given logits, first of the real samples; notes what it was shown."""

    def __init__(self, *logits: float) -> None:
        self.logits = torch.tensor(logits, requires_grad=True)
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.shown.append((x, t))
        logits = self.logits.repeat_interleave(len(x) // len(self.logits))[:, None]
        return logits + 0 * x.flatten(1)[:, :1]


def duel(it: Process, critic: Any, student: Any, **options: Any) -> Duel:
    return Duel(UFOGen(**options), student, critic, it)


def test_the_critic_sees_a_segment_less_noise() -> None:
    t, u = UFOGen().draws(process(), 20_000, seeded())
    assert (int(t.min()), int(t.max()), int(u.max())) == (1, 999, 749)
    assert torch.equal(u, (t - 250).clamp(min=0)) and float((u == 0).float().mean()) > 0.24


def test_samples_are_noised_by_the_forward_process_and_not_by_a_posterior() -> None:
    """A student that always says m' has x'_u of mean alpha_u m' and deviation sigma_u."""
    it, critic, rows = process(), Scores(0.0, 0.0), batch(4000)
    duel(it, critic, Shift(M + 1, 0)).critic_loss(critic, rows, seeded())
    ((x_u, u),) = critic.shown
    assert torch.equal(u[:4000], u[4000:])
    clean = torch.cat([rows["x_0"], torch.full_like(rows["x_0"], M + 1)])
    eps = (x_u - it.alpha(u) * clean) / it.sigma(u)
    for half in eps.split(4000):
        assert float(half.mean()) == pytest.approx(0, abs=0.03)
        assert float(half.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((eps[:4000] * eps[4000:]).mean())) < 0.05, "the same noise on both"


def test_the_student_is_asked_at_t_and_judged_at_u() -> None:
    it, critic, student = process(), Scores(0.0), Shift(M, 0)
    duel(it, critic, student).student_loss(student, batch(50), seeded())
    ((x_u, u),) = critic.shown
    assert torch.equal(u, (student.seen[0] - 250).clamp(min=0))
    assert (x_u - student.given[0]).abs().mean() > 0.5, "the noise it was given"


def test_kl_weighs_as_siddms_divergence_does() -> None:
    """(1 - beta) |x'_u - x_u|^2 / (2 beta) where both have the same noise."""
    it, (x_0, x, eps) = process(), (normal(4, seed) for seed in range(3))
    t, u = torch.tensor([1, 250, 600, 999]), torch.tensor([0, 0, 350, 749])
    kept = (it.abar[t] / it.abar[u])[:, None, None, None]
    gaps = it.noised(x, eps, u) - it.noised(x_0, eps, u)
    divergence = kept * gaps.square() / (2 * (1 - kept))
    ours = UFOGen(gamma="kl").weight(it, t, u) * (x - x_0).square()
    assert torch.allclose(ours, divergence, rtol=1e-3)
    assert (UFOGen().weight(it, t, u) == 1).all()


@pytest.mark.parametrize("gamma", ["constant", "kl"])
def test_reconstruction_is_of_the_clean_sample(gamma: Any) -> None:
    it, student, rows = process(), Shift(M, 0), batch(3000)
    game = duel(it, Scores(0.0), student, gamma=gamma, reconstruction_weight=3)
    terms = game.student_loss(student, rows, seeded())
    t, u = student.seen[0], (student.seen[0] - 250).clamp(min=0)
    weight = float(UFOGen(gamma=gamma).weight(it, t, u).mean())
    assert float(terms["reconstruction"]) == pytest.approx(3 * weight * S**2, rel=0.1)
    assert float(terms["adversarial"]) == pytest.approx(log(2))
    alone = duel(it, Scores(0.0), student, reconstruction_weight=0)
    assert list(alone.student_loss(student, rows, seeded())) == ["adversarial"]


@pytest.mark.parametrize(
    ("logits", "slopes"),
    [((0.0, 0.0), (-0.5, 0.5)), ((0.6, -0.6), (0, 0)), ((-0.6, 0.6), (-0.6457, 0.6457))],
)
def test_logits_on_the_right_side_teach_the_critic_nothing(
    logits: tuple[float, float], slopes: tuple[float, float]
) -> None:
    critic = Scores(*logits)
    terms = duel(process(), critic, Shift(M, 0)).critic_loss(critic, batch(6), seeded())
    terms["critic"].backward()
    assert critic.logits.grad is not None
    assert critic.logits.grad.tolist() == pytest.approx(list(slopes), abs=1e-3)


@pytest.mark.parametrize(("logit", "slope"), [(0.0, -0.5), (0.6, 0.0), (-0.6, -0.6457)])
def test_a_student_that_fools_the_critic_is_left_alone(logit: float, slope: float) -> None:
    critic, student = Scores(logit), Shift(M, S)
    game = duel(process(), critic, student, adversarial_weight=2)
    game.student_loss(student, batch(6), seeded())["adversarial"].backward()
    assert critic.logits.grad is not None
    assert critic.logits.grad.tolist() == pytest.approx([2 * slope], abs=1e-3)


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", None])
def test_the_critic_is_the_encoder_half_and_knows_nothing_at_first(mid: str | None) -> None:
    torch.manual_seed(0)
    whole = unet(mid_block_type=mid, attention_head_dim=4)
    asked = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 5, 12)
    both, half = DenoiserCritic(copy.deepcopy(whole)), EncoderCritic(whole)
    assert (half(*asked) == 0).all()
    half.head = both.head
    assert torch.allclose(half(*asked), both(*asked).logits, atol=1e-6)
    assert not any("up_blocks" in name for name, _ in half.named_parameters())
    half(*asked).sum().backward()
    assert all(p.grad is not None for p in half.parameters())


def test_a_player_may_have_betas_of_its_own() -> None:
    for betas in ((0.0, 0.999), (0.9, 0.999)):
        player = Player(nn.Linear(1, 1), lambda *_: {}, betas=betas)
        turn = _Turn(player, UFOGen(), Accelerator(cpu=True))
        assert turn.optimizer.param_groups[0]["betas"] == betas


def test_the_critic_takes_every_second_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        before = getattr(Duel, name)
        return lambda *given: turns.append(name) or before(*given)

    for name in ("critic_loss", "student_loss"):
        monkeypatch.setattr(Duel, name, noted(name))
    stage = {"by": "ufogen", "gamma": "kl", "steps": 3, "batch_size": 2}
    out = distill(small_recipe(tmp_path, stage=[stage]), tmp_path / "student")
    assert turns == ["critic_loss", "student_loss", "student_loss", "critic_loss", "student_loss"]
    (told,) = json.loads((out / "edgeflash.json").read_text())["lineage"]["stages"]
    assert {"critic/critic", "student/adversarial", "student/reconstruction"} < set(told)
