"""Imagine Flash against closed forms, and the noise correction of its tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from gaussian import (
    BETAS,
    NOTHING,
    M,
    S,
    batch,
    exact,
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
from torch import Tensor, nn

from edgeflash.distill.by_imagine import Imagine, Lesson
from edgeflash.distill.process import Process
from edgeflash.distill.run import distill
from edgeflash.noise_correction import corrected
from edgeflash.schedule import lower_schedule
from edgeflash.student import Student

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PLAIN = {"guidance": 1, "gan_weight": 0}


def lesson(options: Imagine, it: Process | None = None, **others: Any) -> Lesson:
    it = it or process()
    networks = {"teacher": posterior(it), "student": posterior(it), "critic": None}
    return Lesson(options=options, process=it, nothing=NOTHING, **networks | others)


def table(**config: Any) -> tuple[Any, Any]:
    """Four DDIM steps, plain and corrected."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing", **config)
    plain = lower_schedule(scheduler, 4)
    return plain, corrected(plain)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_first_step_takes_x_for_its_own_noise(predicts: str) -> None:
    it, noise, (t, s) = process(predicts), normal(50), torch.tensor([[999], [749]])
    plain, mended = table(prediction_type=predicts)
    assert mended.steps[1:] == plain.steps[1:] and mended.sampler == "ddim, noise-corrected"
    net = posterior(it)
    x_0 = it.x_0(net(noise, t, NOTHING).sample, noise, t)
    only_first = mended.model_copy(update={"steps": mended.steps[:1]})
    wanted = it.alpha(s) * x_0 + it.sigma(s) * noise
    assert torch.allclose(sampled(only_first, net, noise), wanted, atol=1e-5)


def test_what_a_wrong_eps_does_to_the_first_step() -> None:
    it, (plain, mended) = process(), table()
    now, then = torch.tensor([999]), torch.tensor([749])
    magnified = float(it.alpha(then) * it.sigma(now) / it.alpha(now))
    assert mended.steps[0].b == pytest.approx(-magnified, rel=1e-5)
    assert plain.steps[0].b == pytest.approx(float(it.sigma(then)) - magnified, rel=1e-4)


def test_noise_without_signal_and_a_single_step_need_no_correction() -> None:
    plain, mended = table(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert (plain.steps[0].a, plain.steps[0].b) == pytest.approx(
        (mended.steps[0].a, mended.steps[0].b), abs=1e-6
    )
    one = lower_schedule(DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"), 1)
    assert corrected(one) == one


@pytest.mark.parametrize("correction", [False, True])
def test_a_rollout_is_the_sampler_that_ships(tmp_path: Path, correction: bool) -> None:
    options = Imagine(denoising_steps=4, noise_correction=correction)
    folder = teacher_folder(tmp_path, prediction_type="v_prediction")
    schedule = lower_schedule(options.scheduler(folder), 4)
    schedule = corrected(schedule) if correction else schedule
    it, seen = process("v_prediction"), []
    answer = posterior(it)

    def student(x: Tensor, t: Tensor, c: Tensor) -> Any:
        seen.append(int(t[0]))
        return answer(x, t, c)

    taught, noise = lesson(options, it, student=student), normal(9)
    ends = set()
    for seed in range(20):
        seen.clear()
        x_t, t = taught.start(noise, torch.zeros(9, 1, 1), seeded(seed))
        assert [*seen, int(t[0])] == [999, 749, 499, 249][: len(seen) + 1] and (t == t[0]).all()
        generator = seeded(seed)
        torch.randint(4, (1,), generator=generator)
        drawn = torch.randn(noise.shape, generator=generator)
        part = schedule.model_copy(update={"steps": schedule.steps[: len(seen)]})
        assert torch.allclose(x_t, sampled(part, answer, drawn), atol=1e-5)
        ends.add(len(seen))
    assert ends == {0, 1, 2, 3}


def test_without_backward_distillation_it_starts_from_noised_data() -> None:
    taught = lesson(Imagine(denoising_steps=1, backward=False), student=None)
    x_t, t = taught.start(torch.full((4000, 1, 2, 2), 50.0), torch.zeros(4000, 1, 1), seeded())
    assert float(x_t.mean()) == pytest.approx(50 * 0.06826, abs=0.05) and (t == 999).all()


def test_gamma_is_shifted_but_for_its_ends() -> None:
    t = torch.tensor([999, 666, 332, 0])
    assert Imagine(shift=1).gamma(t, 1000).tolist() == t.tolist()
    assert Imagine(shift=0.5).gamma(t, 1000).tolist() == [999, 499, 199, 0]


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_teacher_at_the_students_own_place_teaches_itself_nothing(predicts: str) -> None:
    """k = 1, no shift, student and teacher alike: the target is what the student says."""
    options = Imagine(shift=1, teacher_steps=1, **PLAIN)
    taught = lesson(options, process(predicts))
    told = taught.student_loss(taught.student, batch(64), seeded())
    assert list(told) == ["reconstruction"] and float(told["reconstruction"]) < 1e-8


@pytest.mark.parametrize(
    ("t", "gamma", "ratio"),
    [(999, 749, 1.0886), (749, 499, 1.1722), (499, 249, 1.2741), (499, 499, 1)],
)
def test_own_noise_is_content_with_too_much_spread(t: int, gamma: int, ratio: float) -> None:
    """The slope, over the exact one, at which the student's x_0 is its own target."""
    it, (now, start) = process(), torch.tensor([[t], [gamma]])
    x_t = normal(20)
    gap = x_t - it.alpha(now) * M
    x = M + ratio * S * gap / variance(it, now).sqrt()
    eps = (x_t - it.alpha(now) * x) / it.sigma(now)
    taught = lesson(Imagine(teacher_steps=1, **PLAIN), it, teacher=exact(it))
    assert torch.allclose(taught.target(x, eps, start, x), x, atol=2e-4)
    assert not torch.allclose(taught.target(x + 0.1, eps, start, x), x + 0.1, atol=1e-2)


@pytest.mark.parametrize(
    ("gamma", "left"), [(999, 0.034), (749, 0.122), (499, 0.296), (249, 0.585), (19, 0.966)]
)
def test_fresh_noise_pulls_to_the_mean(gamma: int, left: float) -> None:
    it, start = process(), torch.tensor([gamma])
    taught = lesson(Imagine(teacher_steps=1, **PLAIN), it, teacher=exact(it))
    near, far = (
        taught.target(x * torch.ones(9, 1, 2, 2), normal(9), start, NOTHING) for x in (1, 2)
    )
    assert float((far - near).mean()) == pytest.approx(left, abs=1e-3)


def test_the_teacher_takes_its_steps_from_gamma_down() -> None:
    seen: list[int] = []
    answer = posterior(process())

    def teacher(x: Tensor, t: Tensor, c: Tensor) -> Any:
        seen.append(int(t[0]))
        return answer(x, t, c)

    x = normal(2)
    taught = lesson(Imagine(teacher_steps=4, **PLAIN), teacher=teacher)
    taught.target(x, x, torch.tensor([749, 749]), x)
    assert seen == [749, 561, 374, 186]


class Line(nn.Module):
    """A student or critic with one number to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=self.slope * x)


def test_gradients_reach_the_student_by_its_last_call_alone() -> None:
    student = Line()
    taught = lesson(Imagine(denoising_steps=3, **PLAIN), student=student)
    for seed in range(6):
        x_t, t = taught.start(normal(4), torch.zeros(4, 1, 1), seeded(seed))
        assert not x_t.requires_grad
        loss = taught.student_loss(student, batch(4), seeded(seed))["reconstruction"]
        (slope,) = torch.autograd.grad(loss, student.slope)
        x = student.slope.detach() * x_t
        eps = (x_t - taught.process.alpha(t) * x) / taught.process.sigma(t)
        wanted = taught.target(x, eps, taught.options.gamma(t, 1000), x)
        assert float(slope) == pytest.approx(float((2 * (x - wanted) * x_t).mean()), rel=1e-4)


def test_student_and_critic_pull_apart() -> None:
    """The critic's score is what it sees: the student is told to raise it, the critic to part."""
    options = Imagine(guidance=1, gan_weight=0.5)
    taught = lesson(options, critic=lambda x, t, c: x)
    data = {"x_0": torch.full((500, 1, 2, 2), 30.0), "c": torch.zeros(500, 1, 1)}
    high, low = (says(lambda c, v=v: c + v) for v in (3.0, 0.0))
    gains = [float(taught.student_loss(s, data, seeded())["adversarial"]) for s in (high, low)]
    mean_alpha = float(process().abar.sqrt().mean())
    assert gains[0] - gains[1] == pytest.approx(-0.5 * 3 * mean_alpha, rel=0.1)

    def loss(sign: float) -> float:
        critic = lambda x, t, c: sign * (x - 2)  # noqa: E731
        return float(taught.critic_loss(critic, data, seeded())["critic"])

    assert loss(1) < 2 < loss(-1)


def test_its_tables_are_corrected_and_stay_so(tmp_path: Path) -> None:
    stage = {"by": "imagine", "denoising_steps": 2, "steps": 2, "batch_size": 2}
    decoder = {"by": "decoder", "blocks": [1, 1], "width": 8, "steps": 1, "batch_size": 2}
    recipe = small_recipe(tmp_path, stage=[stage, decoder], sampling=None)
    out = distill(recipe, tmp_path / "student")
    told = json.loads((out / "edgeflash.json").read_text())
    assert {"student/reconstruction", "student/adversarial", "critic/critic"} < told["lineage"][
        "stages"
    ][0].keys()
    it, row = process("epsilon"), told["schedules"]["2"]["steps"][0]
    then, now = torch.tensor([[499], [999]])
    wanted = float(it.alpha(then) / it.alpha(now) + it.sigma(then))
    assert row["a"] == pytest.approx(wanted, rel=1e-4)
    fresh = Student.open(out).schedules([3])[3]
    assert fresh.sampler == "ddim, noise-corrected"
