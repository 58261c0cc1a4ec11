"""TCD and PeRFlow, which follow the teacher's paths, against closed forms."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussian import (
    NOTHING,
    M,
    S,
    batch,
    exact_process,
    network,
    normal,
    posterior,
    process,
    sampled,
    seeded,
    teacher_folder,
    unrounded,
    variance,
)
from test_distill import small_recipe
from torch import Tensor, nn

from edgeflash.distill import by_lcm, by_perflow, by_tcd
from edgeflash.distill.by_lcm import LCM
from edgeflash.distill.by_perflow import PeRFlow, line
from edgeflash.distill.by_tcd import TCD, trajectory
from edgeflash.distill.data import open_store
from edgeflash.distill.few_steps import trailing
from edgeflash.distill.process import Flow, Process
from edgeflash.distill.rollout import ddim
from edgeflash.distill.stage import Workshop
from edgeflash.schedule import lower_schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def straight(it: Process, flow: PeRFlow) -> Any:
    """The perfect PeRFlow student: on the line whose ends the exact ODE joins."""

    def sees(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        start, end = flow.window(t, it.timesteps)
        growth = (variance(it, end) / variance(it, start)).sqrt()
        a, b = line(it, torch.ones_like(growth), growth, start, end)
        gap = (x - it.alpha(t) * M) / (it.alpha(t) * a + it.sigma(t) * b)
        return M + a * gap, b * gap

    return network(it, sees)


def test_tcd_aims_at_any_entry_up_to_its_target() -> None:
    tcd = TCD()
    t, u, s = tcd.times(torch.tensor([0, 1, 49, 49]), torch.tensor([0, 1, 0, 49]), 1000)
    assert (t.tolist(), u.tolist()) == ([19, 39, 999, 999], [0, 19, 979, 979])
    assert s.tolist() == [0, 19, 0, 979]
    n, m = tcd.draws(20_000, seeded())
    assert (m <= n).all() and (n.min(), n.max(), m.min()) == (0, 49, 0) and m.max() > 45
    assert float(m.float().mean()) == pytest.approx(24.5 / 2, abs=0.3)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_trajectory_of_no_length_ends_where_it_began(predicts: str) -> None:
    x, t = normal(3), torch.tensor([19, 499, 999])

    def anything(x: Tensor, t: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=torch.tanh(x + 1))

    assert torch.allclose(trajectory(anything, process(predicts), x, t, t, x), x, atol=1e-4)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_exact_trajectory_to_a_point_has_no_tcd_loss(predicts: str) -> None:
    """All data are one point m, where a DDIM step is exact for any network that sees it."""
    it = process(predicts)

    def loss(student: Any) -> float:
        lesson = by_tcd.Lesson(TCD(), posterior(it, M, 0), student, it, NOTHING)
        data = batch(400) | {"x_0": torch.full((400, 1, 2, 2), M)}
        return float(lesson.loss(student, data, seeded())["trajectory"])

    assert loss(posterior(it, M, 0)) < 1e-8 < 1e-5 < loss(posterior(it, M + 0.1, 0))


class Conv(nn.Module):
    """A student with a weight that autocast casts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=self.conv(x))


@pytest.mark.parametrize("by", ["lcm", "tcd"])
def test_a_target_that_is_the_student_teaches_what_a_copy_would(by: str) -> None:
    it, net = process(), Conv()

    def gradient(target: Any) -> Tensor:
        net.zero_grad()
        lesson: Any = by_tcd.Lesson(TCD(), posterior(it), target, it, NOTHING)
        if by == "lcm":
            lesson = by_lcm.Lesson(LCM(), posterior(it), target, it, NOTHING, [], None)
        with torch.autocast("cpu", torch.bfloat16):
            (loss,) = lesson.loss(net, batch(8), seeded()).values()
        loss.backward()
        assert net.conv.weight.grad is not None
        return net.conv.weight.grad.clone()

    own = gradient(net)
    assert own.abs().sum() > 0 and torch.equal(own, gradient(deepcopy(net)))


def test_without_a_decay_no_copy_is_kept_as_target(tmp_path: Path) -> None:
    store = open_store(small_recipe(tmp_path).data, 0, tmp_path / "cache")
    teacher = tmp_path / "teacher"
    shop = Workshop(teacher, teacher, store, tmp_path, torch.device("cpu"))
    assert [len(LCM(target_ema=e).begin(shop).targets) for e in (0, 0.9)] == [0, 1]
    assert [len(TCD(target_ema=e).begin(shop).targets) for e in (0, 0.9)] == [0, 1]


@pytest.mark.parametrize(
    ("eta", "times", "aims"),
    [
        (None, [999, 499], [349, 0]),
        (None, [999, 759, 499, 259], [531, 349, 181, 0]),
        (
            None,
            [999, 879, 759, 639, 499, 379, 259, 139],
            [615, 531, 447, 349, 265, 181, 97, 0],
        ),
        (0.0, [999, 759, 499, 259], [759, 499, 259, 0]),  # DDIM
        (1.0, [999, 759, 499, 259], [0, 0, 0, 0]),  # x_0 noised anew, as LCM, but for abar_0
    ],
)
def test_tcds_tables_go_on_to_their_aims_and_back(
    tmp_path: Path, eta: float | None, times: list[int], aims: list[int]
) -> None:
    """gamma is 0.3 where nobody says another. In float64, which diffusers' own tables are not."""
    it, scheduler = exact_process("epsilon"), TCD().scheduler(teacher_folder(tmp_path))
    scheduler.alphas_cumprod = it.abar
    schedule = lower_schedule(scheduler, len(times), eta=eta)
    assert [step.t for step in schedule.steps] == times and schedule.prediction == "epsilon"
    every = it.abar.tolist()
    for step, t, s, after in zip(schedule.steps, times, aims, [*times[1:], 0], strict=True):
        abar, aimed, next_ = every[t], every[s], every[after]
        back = next_ / aimed
        step_to_aim = sqrt(1 - aimed) - sqrt(aimed / abar) * sqrt(1 - abar)
        assert step.a == pytest.approx(sqrt(next_ / abar), abs=1e-12)
        assert step.b == pytest.approx(sqrt(back) * step_to_aim, abs=1e-12)
        assert step.c == pytest.approx(sqrt(1 - back), abs=1e-12)
        noise = step.a * sqrt(1 - abar) + step.b  # that is left of x_t's, beside the fresh one
        assert noise**2 + step.c**2 == pytest.approx(1 - next_, abs=1e-12)
        assert noise**2 == pytest.approx(back * (1 - aimed), abs=1e-12)


@pytest.mark.parametrize(
    ("windows", "t", "start", "end"),
    [
        (4, [999, 750, 749, 250], [999, 999, 749, 499], [749, 749, 499, 249]),
        (4, [249, 0], [249, 249], [0, 0]),
        (1, [999, 500, 0], [999, 999, 999], [0, 0, 0]),
    ],
)
def test_windows_end_where_the_next_begin(
    windows: int, t: list[int], start: list[int], end: list[int]
) -> None:
    flow = PeRFlow(windows=windows)
    found = flow.window(torch.tensor(t), 1000)
    assert [edge.tolist() for edge in found] == [start, end]
    times = flow.times(*found)
    assert len(times) == 9 and torch.equal(times[0], found[0]) and torch.equal(times[8], found[1])
    assert all((before > after).all() for before, after in pairwise(times))


def test_the_line_has_the_papers_eps_and_goes_through_both_ends() -> None:
    it, start = process(), torch.tensor([999, 749, 499, 249])
    end = torch.tensor([749, 499, 249, 0])
    _, eps = line(it, torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1), start, end)
    eta = [-2.50638, -1.30094, -0.75584, -0.66376]  # z_e = lam_s z_s + eta_s eps
    assert (1 / eps).flatten().tolist() == pytest.approx(eta, rel=1e-4)
    z_s, z_e = normal(4, 1), normal(4, 2)
    x_0, eps = line(it, z_s, z_e, start, end)
    assert torch.allclose(it.noised(x_0, eps, start), z_s, atol=1e-5)
    assert torch.allclose(it.noised(x_0, eps, end), z_e, atol=1e-5)


def test_the_line_has_the_gammas_of_the_papers_other_loss_and_its_way_to_the_end() -> None:
    """sqrt(abar_s / abar_e); and z_e of z_t and eps at any t, as the authors' scheduler has it."""
    it, flow = exact_process(), PeRFlow()
    start, end = flow.window(torch.tensor([999, 749, 499, 249]), 1000)
    one, zero = torch.ones(4, 1, 1, 1, dtype=torch.float64), torch.zeros(4, 1, 1, 1).double()
    (_, of_end), (_, of_start) = line(it, zero, one, start, end), line(it, one, zero, start, end)
    gamma = [0.28688, 0.45158, 0.64117, 0.82220]
    assert (-of_end / of_start).flatten().tolist() == pytest.approx(gamma, abs=1e-5)
    z_s, z_e = normal(4, 1).double(), normal(4, 2).double()
    _, eps = line(it, z_s, z_e, start, end)
    lam = it.alpha(end) / it.alpha(start)
    eta = it.sigma(end) - lam * it.sigma(start)
    for gone in (0.0, 0.3, 0.9):  # of the window
        z_t = torch.lerp(z_s, z_e, gone)
        found = (lam * z_t + eta * (1 - gone) * eps) / (lam * gone + (1 - gone))
        assert (found - z_e).abs().max() < 1e-12


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize(("windows", "times"), [(4, [999, 749, 499, 249, 0]), (1, [999, 0])])
def test_a_step_a_window_is_the_exact_ode(windows: int, times: list[int], predicts: str) -> None:
    """To rounding, where DDIM in four steps leaves 0.5436 of the spread."""
    it, flow, noise = exact_process(predicts), PeRFlow(windows=windows), normal(50).double()
    stops = list(torch.tensor(times)[:, None])
    first, last = stops[0], stops[-1]
    growth = (variance(it, last) / variance(it, first)).sqrt()
    wanted = it.alpha(last) * M + growth * (noise - it.alpha(first) * M)
    found = ddim(unrounded(it, straight(it, flow)), it, noise, stops)
    assert (found - wanted).abs().max() < 1e-12
    own = ddim(unrounded(it, posterior(it)), it, noise, list(trailing(1000, 4)[:, None]))
    spread = S / variance(it, first).sqrt()
    assert float(own.std() / (spread * noise).std()) == pytest.approx(0.54358, abs=1e-5)


def test_reflow_the_wrong_way_round_misses_by_twice_what_lies_between() -> None:
    """Pairs z_e = m + s z_s are on straight lines already: one step is exact, if not backwards."""
    it, z_s = Flow.until(1000, torch.device("cpu")), normal(500).double()
    z_e = M + S * z_s
    start, end = PeRFlow(windows=1).window(torch.tensor([700.0], dtype=torch.float64), 1000)
    right, wrong = (
        z_s - it.target(*line(it, *ends, start, end), start) for ends in ((z_s, z_e), (z_e, z_s))
    )
    assert (right - z_e).abs().max() < 1e-10
    assert float(wrong.mean() - z_s.mean()) == pytest.approx(float(z_s.mean() - z_e.mean()))


@pytest.mark.parametrize(("windows", "steps"), [(4, 4), (4, 8), (1, 1)])
def test_straight_windows_are_sampled_exactly(tmp_path: Path, windows: int, steps: int) -> None:
    """The student's table leads to the ODE's end, of which the teacher's own falls short."""
    flow, it, noise = PeRFlow(windows=windows), process("v_prediction"), normal(500)
    scheduler = flow.scheduler(teacher_folder(tmp_path, prediction_type="v_prediction"))
    schedule = lower_schedule(scheduler, steps)
    first, last = torch.tensor([999]), torch.tensor([0])
    growth = (variance(it, last) / variance(it, first)).sqrt()
    wanted = it.alpha(last) * M + growth * (noise - it.alpha(first) * M)
    assert torch.allclose(sampled(schedule, straight(it, flow), noise), wanted, atol=1e-4)
    assert sampled(schedule, posterior(it), noise).std() < 0.85 * wanted.std()


def test_the_straight_flow_has_no_perflow_loss() -> None:
    it, flow = process("v_prediction"), PeRFlow()
    lesson = by_perflow.Lesson(flow, posterior(it), it, NOTHING)

    def loss(student: Any) -> float:
        return float(lesson.loss(student, batch(2000), seeded())["flow"])

    assert loss(straight(it, flow)) < 0.005  # the solver's own error at 8 steps a window
    assert loss(posterior(it)) > 10 * loss(straight(it, flow))


@pytest.mark.parametrize(("guidance", "size"), [(1.0, 3), (7.5, 6)])
def test_perflows_teacher_makes_one_call_a_step(guidance: float, size: int) -> None:
    calls = []

    def same(x: Tensor, t: Tensor, c: Tensor) -> Any:
        calls.append(len(x))
        return SimpleNamespace(sample=x)

    flow = PeRFlow(guidance=guidance, solver_steps=5)
    lesson = by_perflow.Lesson(flow, same, process(), NOTHING)
    lesson.loss(posterior(process()), batch(3), seeded())
    assert calls == [size] * 5
