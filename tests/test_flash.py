"""Flash Diffusion against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import (
    NOTHING,
    M,
    S,
    exact,
    normal,
    posterior,
    process,
    says,
    seeded,
    teacher_folder,
)
from gaussian import batch as plain_batch
from torch import Tensor

from edgeflash.distill import by_flash
from edgeflash.distill.by_flash import Flash, Lesson
from edgeflash.distill.few_steps import few_step_scheduler
from edgeflash.distill.process import Process
from edgeflash.schedule import lower_schedule

ONE = {"modes": ((1.0, 0, 0, 0),), "dmd_weights": (0.0,), "gan_weights": (0.0,)}
UNGUIDED = {"guidance_min": 1, "guidance_max": 1}


def batch(count: int, step: int = 0) -> dict[str, Tensor]:
    return plain_batch(count) | {"step": torch.tensor(step)}


def lesson(options: Flash, it: Process | None = None, **others: Any) -> Lesson:
    it = it or process()
    networks = {"teacher": posterior(it), "student": posterior(it), "critic": None}
    given = {"nothing": NOTHING} | networks | others
    return Lesson(options=options, process=it, **given)


def test_starts_are_drawn_around_the_students_steps() -> None:
    options = Flash()
    tables = [
        {15: 0.0532, 16: 0.3933, 17: 0.0532, 23: 0.0532, 24: 0.3933, 25: 0.0532},
        {0: 0.0795, 8: 0.2385, 16: 0.2385, 24: 0.2385},
        {0: 0.2020, 1: 0.0273, 8: 0.2020, 16: 0.2020, 24: 0.2020},
        {0: 0.3287, 1: 0.0445, 7: 0.0222, 8: 0.1643, 9: 0.0222},
    ]
    for phase, table in enumerate(tables):
        shares = options.shares(phase)
        assert float(shares.sum()) == pytest.approx(1)
        assert {i: float(shares[i]) for i in table} == pytest.approx(table, abs=1e-4)
    stops = lesson(options).stops
    assert [int(stops[i]) for i in (0, 8, 16, 24, 32)] == [999, 749, 499, 249, -1]


def test_phases_last_as_long_and_go_by_steps() -> None:
    options = Flash(steps=20000)
    steps = (0, 4999, 5000, 9999, 10000, 15000, 19999)
    assert [options.phase(step) for step in steps] == [0, 0, 1, 1, 2, 3, 3]


def test_a_batch_starts_at_one_place_and_from_pure_noise_at_the_first() -> None:
    taught = lesson(Flash(**ONE))
    seen = set()
    for seed in range(40):
        far = batch(4000) | {"x_0": torch.full((4000, 1, 1, 1), 20.0)}
        x_t, t, first = taught.start(far, seeded(seed))
        assert (t == t[0]).all() and int(t[0]) == (999, 968)[first]
        wanted = 20 * float(taught.process.alpha(t)[0]) if first else 0
        assert float(x_t.mean()) == pytest.approx(wanted, abs=0.08)
        seen.add(first)
    assert seen == {0, 1}


@pytest.mark.parametrize(("first", "error"), [(0, 0.08), (8, 0.08), (24, 0.12)])
def test_the_teacher_walks_to_the_end_of_its_path(first: int, error: float) -> None:
    it, calls = process(), []
    answer = posterior(it)

    def teacher(x: Tensor, t: Tensor, c: Tensor) -> Any:
        calls.append(int(t[0]))
        return answer(x, t, c)

    taught, x = lesson(Flash(), teacher=teacher), normal(50)
    for _ in range(2):  # nothing is left of the walk before
        calls.clear()
        found = taught.sample(x, first, torch.zeros(50, 1, 1), 1.0)
        assert calls == taught.stops[first:-1].tolist()
        wanted = exact(it)(x, torch.tensor([calls[0]]), NOTHING).sample
        assert float((found - wanted).abs().max()) < error  # of DDIM from pure noise: 0.15


def test_the_teacher_walks_once_a_batch() -> None:
    """However many terms and players there are: one call a step that is left of its path."""
    calls: list[int] = []
    answer = posterior(process())

    def teacher(x: Tensor, t: Tensor, c: Tensor) -> Any:
        calls.append(int(t[0]))
        return answer(x, t, c)

    critic = lambda x, t, c: 0 * x + 1  # noqa: E731
    options = Flash(**ONE | UNGUIDED | {"gan_weights": (0.3,)})
    taught = lesson(options, teacher=teacher, critic=critic)
    for seed in range(5):
        _, t, _ = taught.start(batch(2, 1), seeded(seed))
        calls.clear()
        assert "adversarial" in taught.student_loss(taught.student, batch(2, 1), seeded(seed))
        stops = taught.stops.tolist()
        assert calls == stops[stops.index(int(t[0])) : -1]
        taught.critic_loss(critic, batch(2, 1), seeded(seed))
        assert len(calls) == len(stops) - 1 - stops.index(int(t[0]))


def test_guidance_is_drawn_between_its_bounds() -> None:
    options = Flash(guidance_min=3, guidance_max=13)
    scales = [options.scale(seeded(seed)) for seed in range(300)]
    assert 3 <= min(scales) < 3.3 and 12.7 < max(scales) <= 13
    taught = lesson(options, teacher=says(lambda c: c), nothing=NOTHING + 1)
    c = torch.full((2, 1, 1), 3.0)
    assert torch.allclose(taught.sample(normal(2), 24, c, 4.0), torch.tensor(1 + 4.0 * 2))


@pytest.mark.parametrize(("distance", "wanted"), [("l2", 0.25), ("l1", 0.5)])
def test_the_student_is_told_the_teachers_sample(distance: Any, wanted: float) -> None:
    options = Flash(**ONE, **UNGUIDED, distance=distance)
    taught = lesson(options, teacher=says(lambda c: c + 2))
    right, off = (says(lambda c, v=v: c + v) for v in (2.0, 2.5))
    terms = [taught.student_loss(student, batch(8), seeded()) for student in (right, off)]
    assert all(list(told) == ["distillation"] for told in terms)
    found = [float(told["distillation"]) for told in terms]
    assert found == pytest.approx([0, wanted], abs=1e-4)  # c_out of the boundary is not quite 1


@pytest.mark.parametrize(
    ("t", "bias"), [(999, 0.484), (749, 0.449), (499, 0.396), (249, 0.295), (19, 0.033)]
)
def test_a_student_for_a_fake_score_is_biased_as_computed(
    t: int, bias: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """f* for the fake score: (s / sqrt V) (1 - alpha s / sqrt V) of x_t - alpha m is left."""
    it = process()
    taught = lesson(Flash(**UNGUIDED), student=exact(it))
    monkeypatch.setattr(by_flash, "randint", lambda low, high, count, _: torch.full((count,), t))
    x = (M + S * normal(6)).requires_grad_()
    (gradient,) = torch.autograd.grad(taught.matching(x, torch.zeros(6, 1, 1), seeded()), x)
    times, generator = torch.full((6,), t), seeded()
    taught.options.scale(generator)  # drawn before the noise
    x_t = it.noised(x.detach(), torch.randn(x.shape, generator=generator), times)
    real = posterior(it)(x_t, times, NOTHING).sample
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    wanted = 2 * bias * (x_t - it.alpha(times) * M) / scale / x.numel()
    assert torch.allclose(gradient, wanted, atol=2e-2 * float(wanted.abs().max()))


def test_the_critic_looks_at_four_noise_levels() -> None:
    taught = lesson(Flash())
    x_t, t = taught.noised(torch.full((8000, 1, 2, 2), 3.0), seeded())
    assert sorted(set(t.tolist())) == [10, 250, 500, 750]
    for stop in (10, 250, 500, 750):
        part, at = x_t[t == stop], torch.tensor([stop])
        assert float(part.mean()) == pytest.approx(3 * float(taught.process.alpha(at)), abs=0.05)
        assert float(part.std()) == pytest.approx(float(taught.process.sigma(at)), rel=0.05)


def test_terms_join_by_phase_and_critic_and_adversarial_take_turns() -> None:
    critic = lambda x, t, c: 0 * x + 1  # noqa: E731
    options = Flash(steps=40, **UNGUIDED)
    taught = lesson(options, critic=critic)

    def terms(step: int) -> dict[str, Tensor]:
        return taught.student_loss(taught.student, batch(2, step), seeded())

    assert list(terms(9)) == ["distillation"]
    assert list(terms(10)) == ["distillation", "matching"]
    told = terms(39)
    assert list(told) == ["distillation", "matching", "adversarial"]
    fooled = 1 - float(torch.tensor(1.0).sigmoid())
    assert float(told["adversarial"]) == pytest.approx(0.3 * fooled**2)
    lost = taught.critic_loss(critic, batch(2, 0), seeded())["critic"]
    assert float(lost) == pytest.approx(0.5 * (fooled**2 + (1 - fooled) ** 2))


def test_the_critic_is_shown_data_first() -> None:
    taught = lesson(Flash(), student=says(lambda c: c - 40))
    data = batch(400) | {"x_0": torch.full((400, 1, 1, 1), 40.0)}
    loss = taught.critic_loss(lambda x, t, c: x, data, seeded())["critic"]
    assert float(loss) < 1e-3


def test_the_students_tables_stop_at_the_modes(tmp_path: Path) -> None:
    scheduler = few_step_scheduler(teacher_folder(tmp_path), Flash().denoising_steps)
    ladders = {n: [s.t for s in lower_schedule(scheduler, n).steps] for n in (1, 2, 4)}
    assert ladders == {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modes": ((1.0,),)}, "must name as many phases"),
        ({"modes": ((1.0,), (0.5, 0.5), (1.0,), (1.0,))}, "rows of one length"),
        ({"modes": ((0.0, 0.0),) * 4}, "one above it"),
        ({"modes": ((), (), (), ())}, "modes: 0 a row do not divide"),
        ({"teacher_steps": 30}, "modes: 4 a row do not divide teacher_steps 30"),
        ({"guidance_min": 14}, r"guidance_min 14.0 is greater than guidance_max 13.0"),
    ],
)
def test_options_that_do_not_fit_are_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Flash(**options)
