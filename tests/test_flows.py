"""Methods on flows from picture to noise, as Stable Diffusion 3 is one, against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from gaussian import (
    BETAS,
    NOTHING,
    M,
    Shift,
    batch,
    exact,
    normal,
    posterior,
    process,
    sampled,
    seeded,
    variance,
)
from torch import Tensor

from edgeflash import even_steps
from edgeflash.distill import by_dmd, by_lcm, by_tcd
from edgeflash.distill.by_dmd import DMD
from edgeflash.distill.by_imagine import Imagine
from edgeflash.distill.by_imagine import Lesson as ImagineLesson
from edgeflash.distill.by_ladd import LADD
from edgeflash.distill.by_lcm import LCM
from edgeflash.distill.by_progressive import halved
from edgeflash.distill.by_scm import SCM, trigflow
from edgeflash.distill.by_scm import Lesson as ScmLesson
from edgeflash.distill.by_tcd import TCD, trajectory
from edgeflash.distill.consistency import consistency
from edgeflash.distill.few_steps import ddim_scheduler, few_step_scheduler, ladder, trailing
from edgeflash.distill.inner import across
from edgeflash.distill.process import Flow, Process
from edgeflash.distill.rollout import ddim, denoised, multistep, renoised
from edgeflash.distill.teacher import asked
from edgeflash.errors import EdgeflashError
from edgeflash.noise_correction import corrected
from edgeflash.schedule import Schedule, lower_schedule

CPU = torch.device("cpu")
SHIFTED = [1000, 900, 750, 500]  # four even steps at SD 3's shift of 3


def flow(shift: float = 3.0) -> Flow:
    return Flow.until(1000, CPU, shift)


def flow_folder(home: Path, **config: Any) -> Path:
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)
    scheduler.save_pretrained(str(home / "scheduler"))
    return home


def table(scheduler: Any, steps: int) -> Schedule:
    """As `Student.schedules` lowers a scheduler that a student was saved with."""
    return lower_schedule(scheduler, steps, **even_steps.timing(scheduler.config, steps))


def asks(it: Process, network: Any, count: int) -> Any:
    return asked(network, it, torch.zeros(count, 1, 1), NOTHING)


def test_levels_are_where_the_teachers_own_sampler_begins(tmp_path: Path) -> None:
    it = Process.of(flow_folder(tmp_path), CPU)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # before anyone asks for fewer steps
    levels = torch.arange(999, -1, -1)
    torch.testing.assert_close(it.at(levels), scheduler.timesteps)
    assert it.at(torch.tensor([-1])).tolist() == [0], "the clean sample"
    torch.testing.assert_close(it.sigma(it.at(levels)).flatten(), scheduler.sigmas)
    vp = it.abar[levels]
    ratio = ((1 - vp) / vp).sqrt()[1:]  # without noise alone, where it is infinite
    torch.testing.assert_close(ratio, it.ratio(it.at(levels)).flatten()[1:], rtol=1e-4, atol=1e-4)
    assert float(it.abar[-1]) == 0


def test_the_shift_is_read_from_every_kind_of_sampler(tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)
    scheduler.save_pretrained(str(tmp_path / "scheduler"))
    it = Process.of(tmp_path, CPU)
    assert isinstance(it, Flow) and it.shift == 5
    with pytest.raises(EdgeflashError, match=r"use_dynamic_shifting.* set that to false"):
        Process.of(flow_folder(tmp_path / "dynamic", use_dynamic_shifting=True), CPU)


@pytest.mark.parametrize(
    ("steps", "times"), [(1, [1000]), (2, [1000, 750]), (3, [1000, 900, 750]), (4, SHIFTED)]
)
def test_tables_stop_where_students_are_trained(
    tmp_path: Path, steps: int, times: list[float]
) -> None:
    scheduler = few_step_scheduler(flow_folder(tmp_path), 4)
    scheduler.save_pretrained(str(tmp_path / "student"))
    loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(str(tmp_path / "student"))
    rows = table(loaded, steps).steps
    assert [row.t for row in rows] == pytest.approx(times)
    assert set(times) <= set(ladder(flow(), 4, "").tolist())
    for row, after in zip(rows, [*times[1:], 0], strict=True):
        now, then = row.t / 1000, after / 1000  # x_0, then fresh noise on it
        wanted = (1 - then, -(1 - then) * now, then)
        assert (row.a, row.b, row.c) == pytest.approx(wanted, abs=1e-6)


def test_steps_that_a_flow_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = flow_folder(tmp_path)
    with pytest.raises(EdgeflashError, match="5 steps: the student was trained at 4 alone"):
        table(few_step_scheduler(folder, 4), 5)
    with pytest.raises(EdgeflashError, match="3 steps do not divide its flow of 1000"):
        few_step_scheduler(folder, 3)
    with pytest.raises(EdgeflashError, match=r"last timestep, not at 400: say 1000"):
        DMD(denoising_steps=1, denoising_timestep=400).scheduler(folder)


def test_a_rollout_is_the_stochastic_sampler_that_ships(tmp_path: Path) -> None:
    it, net, x = flow(), posterior(flow()), normal(6)
    schedule = table(few_step_scheduler(flow_folder(tmp_path), 4), 4)
    times = [t.expand(6) for t in ladder(it, 4, "")]
    found = renoised(asks(it, net, 6), it, x, times, seeded())
    generator = seeded()
    for step in schedule.steps[:3]:
        fresh = torch.randn(x.shape, generator=generator)
        output = net(x, torch.full((6,), step.t), NOTHING).sample
        x = step.a * x + step.b * output + step.c * fresh
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_exact_consistency_map_has_no_lcm_loss() -> None:
    it = flow()
    options = LCM(w_min=0, w_max=0, huber_c=1e-6)

    def loss(student: Any) -> float:
        lesson = by_lcm.Lesson(options, posterior(it), student, it, NOTHING, [], None)
        return float(lesson.loss(student, batch(500), seeded())["consistency"])

    assert loss(exact(it)) < 0.003  # the solver's own error at 50 steps
    assert loss(posterior(it)) > 5 * loss(exact(it))


def test_a_consistency_function_of_a_flow_is_clean_at_the_picture() -> None:
    it, x = flow(), normal(3)
    t = torch.tensor([0.0, 3.0, 1000.0])
    net = Shift(3.0, 2.0)
    f = consistency(net, it, x, t, NOTHING)
    torch.testing.assert_close(f[0], x[0])
    torch.testing.assert_close(f, it.x_0(net(x, t, NOTHING).sample, x, t))


def test_an_lcm_student_is_met_where_its_own_sampler_stands() -> None:
    it, options = flow(), LCM(ddim_steps=20, own_steps=4)
    lesson = by_lcm.Lesson(options, None, None, it, NOTHING, options.ways(), None)
    noise = normal(4000)
    with torch.no_grad():
        x = lesson.own(exact(it), noise, torch.tensor([19, 14, 4]), noise, seeded())
    t = it.at(torch.tensor([249]))
    assert float(x.mean()) == pytest.approx(float(it.alpha(t)) * M, rel=0.05)
    assert float(x.var()) == pytest.approx(float(variance(it, t)), rel=0.05)


def test_a_tcd_student_samples_by_the_steps_it_learns(tmp_path: Path) -> None:
    it, net, x = flow(), posterior(flow()), normal(5)
    rows = table(TCD(ddim_steps=4).scheduler(flow_folder(tmp_path)), 4).steps
    assert not any(row.needs_noise for row in rows)
    stops = [t.expand(5) for t in [*ladder(it, 4, ""), torch.tensor(0.0)]]
    found = x
    for row, t, s in zip(rows, stops, stops[1:], strict=False):
        assert row.t == pytest.approx(float(t[0]))
        found = row.a * found + row.b * net(found, t, NOTHING).sample
        x = trajectory(net, it, x, t, s, NOTHING)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    t = stops[1]
    torch.testing.assert_close(trajectory(net, it, x, t, t, NOTHING), x)


def test_tcd_compares_at_levels_of_the_flow() -> None:
    it, seen = flow(), []
    answer = posterior(it)

    def teacher(x: Tensor, t: Tensor, c: Tensor) -> Any:
        seen.append(t)
        return answer(x, t, c)

    lesson = by_tcd.Lesson(TCD(ddim_steps=4), teacher, answer, it, NOTHING)
    assert float(lesson.loss(answer, batch(64), seeded())["trajectory"]) < 0.02
    assert {round(t) for t in seen[0].tolist()} == set(SHIFTED)


def game(**networks: Any) -> by_dmd.Duel:
    it = flow()
    given = {"teacher": posterior(it), "fake": posterior(it), "student": posterior(it)} | networks
    options = DMD(real_guidance=1)
    return by_dmd.Duel(options=options, process=it, nothing=NOTHING, **given)


def test_dmd_stands_still_where_student_and_data_are_alike() -> None:
    x = batch(50)["x_0"].requires_grad_()
    game().matching(x, torch.zeros(50, 1, 1), seeded()).backward()
    assert x.grad is not None and float(x.grad.abs().max()) < 1e-9


def test_dmd_leads_a_flows_samples_to_its_data() -> None:
    """Of N(m + 1, s^2) the fake score sees an x_0 that is sigma^2 / V too great, everywhere."""
    it, count = flow(), 400
    other = game(fake=posterior(it, M + 1))
    x = (batch(count)["x_0"] + 1).requires_grad_()
    other.matching(x, torch.zeros(count, 1, 1), seeded()).backward()
    assert x.grad is not None
    generator = seeded()
    t = it.at(torch.randint(20, 981, (count,), generator=generator))
    x_t = it.noised(x.detach(), torch.randn(x.shape, generator=generator), t)
    real = it.x_0(posterior(it)(x_t, t, NOTHING).sample, x_t, t)
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    wanted = it.sigma(t) ** 2 / variance(it, t) / scale / x.numel()
    torch.testing.assert_close(x.grad, wanted.expand_as(x), rtol=1e-3, atol=1e-7)


def test_dmds_student_is_given_what_its_own_sampler_leads_to() -> None:
    student, lengths = Shift(0.0, 0.0), set()
    duel = game(student=student)
    for seed in range(20):
        student.seen.clear()
        _, t = duel.given(normal(4), torch.zeros(4, 1, 1), seeded(seed))
        walked = [float(times[0]) for times in student.seen]
        assert [*walked, float(t[0])] == pytest.approx(SHIFTED[: len(walked) + 1])
        lengths.add(len(walked))
    assert lengths == {0, 1, 2, 3}


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 3])
def test_the_multistep_solver_is_that_of_diffusers(first: int) -> None:
    it, steps, x = process(), 16, normal(4)
    solver = DPMSolverMultistepScheduler(
        **BETAS, prediction_type="sample", timestep_spacing="trailing"
    )
    solver.set_timesteps(steps)
    solver.set_begin_index(first)
    stops, ask = trailing(1000, steps)[first:], asks(it, posterior(it), 4)
    assert solver.timesteps[first:].tolist() == stops[:-1].tolist()
    theirs = x
    for t in solver.timesteps[first:]:
        theirs = solver.step(ask(theirs, t.expand(4))[0], t, theirs).prev_sample
    found = multistep(ask, it, x, [t.expand(4) for t in stops])
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_multistep_solver_walks_a_flow_better_than_euler() -> None:
    it, x = flow(), normal(50)
    ask = asks(it, posterior(it), 50)
    times = [t.expand(50) for t in it.at(trailing(1000, 32))]
    wanted = it.x_0(exact(it)(x, times[0], NOTHING).sample, x, times[0])
    gaps = [float((f(ask, it, x, times) - wanted).abs().max()) for f in (multistep, ddim)]
    assert gaps[0] < 0.02 < gaps[1]


def test_a_teacher_makes_latents_at_its_own_shifted_steps() -> None:
    it, seen = flow(), []

    def ask(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(float(t[0]))
        return x, x

    denoised(ask, it, normal(2), torch.tensor([999, 999]), 4)
    assert seen == pytest.approx(SHIFTED)


def test_noise_correction_is_nothing_new_to_a_flow(tmp_path: Path) -> None:
    """Where it begins there is no signal, so x is the noise that the network's output means."""
    plain = lower_schedule(ddim_scheduler(flow_folder(tmp_path), 4), 4)
    assert [row.t for row in plain.steps] == [999, 899, 749, 499]
    mended = corrected(plain)
    assert mended.steps[1:] == plain.steps[1:]
    for key in ("a", "b"):
        found = getattr(mended.steps[0], key)
        assert found == pytest.approx(getattr(plain.steps[0], key), abs=1e-3)


def test_imagines_student_walks_as_its_sampler_does(tmp_path: Path) -> None:
    it, net = flow(), posterior(flow())
    options = Imagine(denoising_steps=4, guidance=1, gan_weight=0, shift=1, teacher_steps=1)
    schedule = lower_schedule(options.scheduler(flow_folder(tmp_path)), 4)
    lesson = ImagineLesson(options, net, net, None, it, NOTHING)
    for seed in range(6):
        x_t, k = lesson.start(normal(9), torch.zeros(9, 1, 1), seeded(seed))
        walked = 3 - (int(k[0]) + 1) // 250 + 1
        generator = seeded(seed)
        torch.randint(4, (1,), generator=generator)
        noise = torch.randn(x_t.shape, generator=generator)
        part = schedule.model_copy(update={"steps": schedule.steps[:walked]})
        assert float((x_t - sampled(part, net, noise)).abs().max()) < 0.01  # 999 is not quite 1000
    told = lesson.student_loss(net, batch(64), seeded())["reconstruction"]
    assert float(told) < 1e-8, "a teacher at the student's own place has nothing to say"


@pytest.mark.parametrize(("t", "s"), [(1000.0, 900.0), (900.0, 500.0), (500.0, 0.0)])
def test_a_halved_step_ends_where_two_did(t: float, s: float) -> None:
    it, x_0, eps = flow(), normal(3, 1), normal(3, 2)
    now, then = torch.full((3,), t), torch.full((3,), s)
    x_t, x_s = it.noised(x_0, eps, now), it.ddim(x_0, eps, then)
    torch.testing.assert_close(halved(it, x_t, x_s, now, then), x_0, rtol=1e-4, atol=1e-4)


def test_ladds_levels_are_the_papers_own_on_a_flow() -> None:
    it = flow()
    t = LADD(noise_mean=1.0, noise_std=0.5).levels(20_000, it, seeded())
    level = (t / 1000).logit()
    assert float(level.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(level.std()) == pytest.approx(0.5, abs=0.02)


def test_tokens_are_laid_out_as_the_patches_they_came_from() -> None:
    latents = torch.zeros(2, 16, 8, 4)
    tokens = torch.arange(2 * 8 * 3.0).view(2, 8, 3)  # 2 x 2 patches, 4 rows of 2
    found = across(tokens, latents)
    assert found.shape == (2, 3, 4, 2)
    assert torch.equal(found[1, :, 2, 1], tokens[1, 5])
    assert across(found, latents) is found


@torch.no_grad()
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_scm_leaves_the_exact_map_of_a_flow_alone(difference: float) -> None:
    it, options = flow(), SCM(tangent_warmup=0, difference=difference)
    lesson = ScmLesson(options, posterior(it), it, NOTHING)
    told = batch(300) | {"step": torch.tensor(0)}
    left, moved = (
        float(lesson.loss(net(it), told, seeded())["consistency"]) for net in (exact, posterior)
    )
    assert left < 0.01 * moved


def test_a_velocity_of_a_flow_is_that_of_the_same_noise() -> None:
    """Of v at cos x_0 + sin eps, or of the flow at the length that it has there."""
    it, of_v, angle = flow(), process("v_prediction"), torch.tensor([0.05, 0.7, 1.4])
    x = normal(3)
    wanted = posterior(of_v)(x, of_v.timestep(angle), NOTHING).sample
    torch.testing.assert_close(
        trigflow(posterior(it), it, x, angle, NOTHING), wanted, rtol=1e-3, atol=1e-4
    )
    t = it.timestep(angle)
    torch.testing.assert_close((it.sigma(t) / it.alpha(t)).flatten().atan(), angle)
