"""ADD against closed forms, and its two players in recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import NOTHING, M, S, Shift, normal, posterior, process, says, seeded
from test_distill import small_recipe
from test_heads import write_vision_transformer
from torch import Tensor

from edgeflash.distill.by_add import ADD, Duel
from edgeflash.distill.few_steps import ladder
from edgeflash.distill.process import Process
from edgeflash.distill.rollout import denoised
from edgeflash.distill.run import distill
from edgeflash.distill.teacher import plain


def flat_sees(pictures: Tensor) -> tuple[list[Tensor], Tensor]:
    return [pictures.flatten(2)], pictures.mean((2, 3))


def duel(options: ADD, it: Process, **others: Any) -> Duel:
    given = {
        "teacher": posterior(it),
        "student": Shift(M, S),
        "heads": lambda maps, told: [3 * features.flatten(1) for features in maps],
        "sees": flat_sees,
        "decode": lambda z: z,
        "times": ladder(it, options.student_steps, ""),
        "nothing": NOTHING,
        "negative": NOTHING,
    }
    return Duel(options=options, process=it, **(given | others))


def rows(count: int, c: float = 0.0) -> dict[str, Tensor]:
    x_0 = M + S * normal(count)
    return {"x_0": x_0, "c": torch.full((count, 1, 1), c), "pictures": x_0}


def noised(it: Process, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The timesteps, noise and x_t that `Duel.distillation` draws with seed 0."""
    generator = seeded()
    t = torch.randint(it.timesteps, (len(x),), generator=generator)
    eps = torch.randn(x.shape, generator=generator)
    return t, eps, it.noised(x, eps, t)


def test_the_last_timestep_is_given_noise_alone() -> None:
    it, student = process(), Shift(M, S)
    game, batch = duel(ADD(), it, student=student), rows(400)
    for x_0 in (batch["x_0"], batch["x_0"] + 9):
        game.made(student, batch | {"x_0": x_0}, seeded())
    (x, other), (s, _) = student.given, student.seen
    times, counts = s.unique(return_counts=True)
    assert times.tolist() == [249, 499, 749, 999] and counts.min() > 70
    assert torch.equal(x[s == 999], other[s == 999])
    moved = (other - x)[s != 999] / 9
    assert torch.allclose(moved, it.alpha(s[s != 999]).expand_as(moved), atol=1e-5)
    assert float(x[s == 999].std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("weighting", ["exponential", "sds"])
def test_the_gradient_is_the_weight_of_the_score_distillation(weighting: Any) -> None:
    """SDS: w (eps_psi - eps') with w = sigma^2; exponential: 2 alpha (x - x_psi)."""
    it = process()
    options = ADD(weighting=weighting, guidance=1, distance="latents")
    x = (M + 1 + S * normal(50)).requires_grad_()
    c = torch.zeros(50, 1, 1)
    (gradient,) = torch.autograd.grad(duel(options, it).distillation(x, x, c, seeded()), x)
    t, eps, x_t = noised(it, x.detach())
    x_psi, eps_psi = plain(posterior(it), it, x_t, t, c)
    sds = it.sigma(t) ** 2 * (eps_psi - eps)
    exponential = 2 * it.alpha(t) * (x.detach() - x_psi)
    wanted = sds if weighting == "sds" else exponential
    assert torch.allclose(x.numel() * gradient, wanted, atol=1e-4)


def test_nfsd_leaves_the_noise_out() -> None:
    """delta_C = 3 - 1; delta_D = 1 where t < 200, and 1 - 5 where there is more noise."""
    it = process("epsilon")
    options = ADD(weighting="nfsd", guidance=7.5, distance="latents")
    others = {"teacher": says(lambda c: c), "nothing": torch.ones(1, 1, 1)}
    game = duel(options, it, negative=torch.full((1, 1, 1), 5.0), **others)
    x, c = normal(60).requires_grad_(), torch.full((60, 1, 1), 3.0)
    (gradient,) = torch.autograd.grad(game.distillation(x, x, c, seeded()), x)
    t, _, _ = noised(it, x.detach())
    assert 5 < int((t < 200).sum()) < 30
    delta = torch.where(t < 200, 1.0, -4.0)[:, None, None, None] + 7.5 * 2
    wanted = (it.sigma(t) ** 2 * delta).expand_as(x)
    assert torch.allclose(x.numel() * gradient, wanted, atol=1e-3)


def test_the_teacher_is_guided_by_cfgs_scale() -> None:
    it = process()
    game = duel(ADD(guidance=7.5), it, teacher=says(lambda c: c), nothing=torch.ones(1, 1, 1))
    x, t, c = normal(3), torch.tensor([19, 499, 999]), torch.full((3, 1, 1), 3.0)
    assert torch.allclose(game.wanted(x, x, t, c), torch.tensor(1 + 7.5 * (3.0 - 1)))


@pytest.mark.parametrize(
    ("t", "factor"), [(999, 0.00117), (749, 0.01478), (499, 0.08768), (249, 0.34222), (19, 0.93257)]
)
def test_distillation_alone_draws_samples_to_the_mean(t: int, factor: float) -> None:
    """alpha^2 s^2 / V of a sample's distance from the mean is left in what the teacher sees."""
    it, x = process(), torch.full((2, 1, 1, 1), M + 1)
    times, eps = torch.tensor([t, t]), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    game = duel(ADD(guidance=1), it)
    wanted = game.wanted(x, it.noised(x, eps, times), times, torch.zeros(2, 1, 1))
    assert float(wanted.mean()) - M == pytest.approx(factor, rel=1e-2)


@pytest.mark.parametrize(
    ("s", "steps", "left"),
    [(0.5, 1, 0.03419), (0.5, 4, 0.54358), (1.0, 8, 0.83968), (0.2, 50, 0.80109)],
)
def test_several_teacher_steps_shrink_a_gaussian_as_ddim_does(
    s: float, steps: int, left: float
) -> None:
    it, z, t = process(), normal(6), torch.full((6,), 999)
    start = it.alpha(t) * M + (it.alpha(t) ** 2 * s**2 + it.sigma(t) ** 2).sqrt() * z
    calls: list[Tensor] = []

    def ask(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(t)
        return plain(posterior(it, s=s), it, x, t, torch.zeros(6, 1, 1))

    end = denoised(ask, it, start, t, steps)
    assert torch.allclose(end, M + left * s * z, atol=2e-4) and len(calls) == steps
    if steps == 4:
        assert [int(t[0]) for t in calls] == [999, 749, 499, 249]


def test_the_student_climbs_what_the_heads_say_and_nothing_else() -> None:
    it, student, batch = process(), Shift(M, S), rows(20)
    game = duel(ADD(distill_weight=0, adversarial_weight=2), it, student=student)
    terms = game.student_loss(student, batch, seeded())
    terms["adversarial"].backward()
    assert list(terms) == ["adversarial"]
    assert student.m.grad is not None and float(student.m.grad) == pytest.approx(-2 * 3)


def test_lambda_weighs_the_distillation_in_decoded_pictures() -> None:
    it, x = process(), (M + 1 + S * normal(30)).requires_grad_()
    c = torch.zeros(30, 1, 1)
    plainly = duel(ADD(guidance=1, distance="latents"), it).distillation(x, x, c, seeded())
    doubled = duel(ADD(guidance=1), it, decode=lambda z: 2 * z)
    assert float(doubled.distillation(x, 2 * x, c, seeded())) == pytest.approx(4 * float(plainly))
    student, batch = Shift(M, S), rows(30)
    one, both = (
        duel(ADD(adversarial_weight=0, distill_weight=w), it).student_loss(student, batch, seeded())
        for w in (1, 2.5)
    )
    assert list(both) == ["distillation"]
    assert float(both["distillation"]) == pytest.approx(2.5 * float(one["distillation"]))


def test_heads_are_told_caption_and_picture_of_the_real_sample() -> None:
    it, batch, told = process(), rows(4, c=7.0), []

    def heads(maps: list[Tensor], condition: Tensor) -> list[Tensor]:
        told.append(condition)
        return [features.flatten(1) for features in maps]

    for condition, width in {"none": 0, "text": 1, "image": 1, "both": 2}.items():
        game = duel(ADD(condition=condition), it, heads=heads)
        game.student_loss(game.student, batch, seeded())
        game.critic_loss(heads, batch, seeded())
        a, b, c = told[-3:]
        assert (a is b is c is None) if not width else a.shape == (4, width)
        if condition == "both":
            embedding = torch.cat([batch["c"].mean(1), batch["pictures"].mean((2, 3))], 1)
            assert all(torch.equal(seen, embedding) for seen in (a, b, c))


def test_the_heads_loss_is_hinge_and_r1_on_real_features() -> None:
    """A head that multiplies by 3: R1 is 9 a place; a sample of 1 scores 3, one of -1 less."""
    it, batch = process(), rows(5)
    batch |= {"pictures": torch.ones(5, 1, 2, 2)}
    game = duel(ADD(r1_weight=0.1), it, student=Shift(-1.0, 0))
    terms = game.critic_loss(game.heads, batch, seeded())
    assert float(terms["hinge"]) == 0 and float(terms["r1"]) == pytest.approx(0.1 * 9 * 4)
    swapped = duel(ADD(r1_weight=0), it, student=Shift(1.0, 0))
    terms = swapped.critic_loss(swapped.heads, batch | {"pictures": -batch["pictures"]}, seeded())
    assert list(terms) == ["hinge"] and float(terms["hinge"]) == pytest.approx(4 + 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adversarial_weight": 0, "distill_weight": 0}, "nothing to learn"),
        ({"weighting": "nfsd"}, "set distance = 'latents'"),
        ({"weighting": "nfsd", "distance": "latents", "teacher_steps": 2}, "teacher_steps = 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ADD(**options)


def test_a_vision_transformer_judges_and_nfsd_teaches(tmp_path: Path) -> None:
    stage = {"by": "add", "features": write_vision_transformer(tmp_path / "dino")}
    stage |= {"weighting": "nfsd", "distance": "latents", "steps": 2, "batch_size": 2}
    out = distill(small_recipe(tmp_path, stage=[stage]), tmp_path / "student")
    (told,) = json.loads((out / "edgeflash.json").read_text())["lineage"]["stages"]
    assert {"critic/hinge", "critic/r1", "student/adversarial", "student/distillation"} < set(told)


def test_without_a_critic_one_player_is_left(tmp_path: Path) -> None:
    stage = {"by": "add", "adversarial_weight": 0, "teacher_steps": 2, "steps": 1, "batch_size": 2}
    out = distill(small_recipe(tmp_path, stage=[stage]), tmp_path / "student")
    (told,) = json.loads((out / "edgeflash.json").read_text())["lineage"]["stages"]
    assert "distillation" in told and not any("critic" in term for term in told)
