"""Published and computed numbers of Gaussian data, to the digits they are known to."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussian import (
    NOTHING,
    S,
    exact,
    exact_process,
    normal,
    posterior,
    process,
    teacher_folder,
    unrounded,
    variance,
)
from torch import Tensor

from edgeflash.distill.by_consistency import karras
from edgeflash.distill.by_progressive import Progressive, halved
from edgeflash.distill.few_steps import few_step_scheduler, trailing
from edgeflash.distill.process import Process
from edgeflash.distill.rollout import Asked, ddim, heun
from edgeflash.distill.teacher import guided, plain
from edgeflash.schedule import Guidance, lower_schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")
NOISE = {  # Stable Diffusion's: t -> abar, alpha, sigma, sigma / alpha, SNR
    0: (0.999150, 0.99957, 0.02915, 0.02917, 1175.5),
    19: (0.982244, 0.99108, 0.13325, 0.13445, 55.32),
    249: (0.675432, 0.82185, 0.56971, 0.69320, 2.081),
    259: (0.658976, 0.81177, 0.58397, 0.71938, 1.932),
    499: (0.277670, 0.52694, 0.84990, 1.61289, 0.38441),
    749: (0.056623, 0.23796, 0.97128, 4.08173, 0.06002),
    759: (0.052213, 0.22850, 0.97354, 4.26056, 0.05509),
    999: (0.004660, 0.06826, 0.99767, 14.61464, 0.004682),
}
DEVIATIONS = (0.5, 1.0, 0.2)
LEFT = {  # of each, after N steps of DDIM
    1: (0.03419, 0.06826, 0.01368),
    2: (0.28566, 0.46576, 0.12232),
    4: (0.54358, 0.70625, 0.27285),
    8: (0.72586, 0.83968, 0.43794),
    16: (0.84142, 0.91383, 0.59933),
    32: (0.91016, 0.95413, 0.73381),
    50: (0.93809, 0.96951, 0.80109),
    100: (0.96584, 0.98395, 0.87920),
    1000: (0.99557, 0.99814, 0.98126),
}


def stops(steps: int) -> list[Tensor]:
    return list(trailing(1000, steps)[:, None])


@pytest.mark.parametrize("it", [process(), exact_process()], ids=["float32", "float64"])
def test_the_process_has_stable_diffusions_numbers(it: Process) -> None:
    t = torch.tensor([*NOISE])
    alpha, sigma = it.alpha(t).flatten(), it.sigma(t).flatten()
    found = zip(it.abar[t].tolist(), alpha.tolist(), sigma.tolist(), strict=True)
    ratios = zip(it.ratio(t).flatten().tolist(), (alpha / sigma).square().tolist(), strict=True)
    for known, (*levels, ratio, snr) in zip(
        NOISE.values(), [a + b for a, b in zip(found, ratios, strict=True)], strict=True
    ):
        assert [*levels, ratio] == pytest.approx(known[:4], abs=1e-5)
        assert snr == pytest.approx(known[4], rel=3e-4)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_nothing_is_lost_between_predictions(predicts: str) -> None:
    it, t = exact_process(predicts), torch.tensor([*NOISE])
    x_0, eps = normal(len(t), 1).double(), normal(len(t), 2).double()
    x_t, output = it.noised(x_0, eps, t), it.target(x_0, eps, t)
    assert (it.x_0(output, x_t, t) - x_0).abs().max() < 1e-12
    assert (it.eps(output, x_t, t) - eps).abs().max() < 1e-12


def test_seen_as_added_noise_it_is_the_same_process() -> None:
    """VP -> EDM -> VP (arXiv 2206.00364): x / alpha is x_0 and noise of deviation sigma / alpha."""
    it, t = exact_process(), torch.arange(1000)
    x_0, eps = normal(1000, 1).double(), normal(1000, 2).double()
    added = it.noised(x_0, eps, t) / it.alpha(t)
    assert (added - (x_0 + it.ratio(t) * eps)).abs().max() < 1e-12
    back = Process(1 / (1 + it.ratio(t).flatten().square()), "sample")
    assert (back.abar - it.abar).abs().max() < 1e-12
    assert (back.alpha(t) * added - it.noised(x_0, eps, t)).abs().max() < 1e-12


def test_ddim_shrinks_a_gaussian_by_27_known_factors() -> None:
    it, first = exact_process(), torch.tensor([999])
    s: Any = torch.tensor(DEVIATIONS, dtype=torch.float64).view(3, 1, 1, 1)
    ask = unrounded(it, posterior(it, 0.0, s))
    for steps, known in LEFT.items():
        end = ddim(ask, it, variance(it, first, s).sqrt(), stops(steps))
        assert (end / s).flatten().tolist() == pytest.approx(known, abs=1e-5), steps


def test_ddim_goes_one_way_whatever_the_network_predicts() -> None:
    x = normal(4).double()
    its = [exact_process(predicts) for predicts in PREDICTIONS]
    ends = [ddim(unrounded(it, posterior(it)), it, x, stops(8)) for it in its]
    assert max(float((end - ends[0]).abs().max()) for end in ends) < 1e-10


def test_heun_is_of_second_order() -> None:
    """Over Karras' grid from 80 to 0.002, on the exact score of N(1, s^2)."""
    errors = []
    for count in (10, 20, 40, 80, 160):
        sigmas = karras(count, 0.002, 80)
        it = Process(1 / (1 + sigmas**2), "sample")
        times = [torch.tensor([i]) for i in reversed(range(count))]
        first, last = times[0], times[-1]
        x = it.alpha(first) * (1 + 80 * torch.ones(1, 1, 1, 1, dtype=torch.float64))
        found = heun(unrounded(it, posterior(it, 1.0)), it, x, times)
        growth = (variance(it, last) / variance(it, first)).sqrt()
        exactly = it.alpha(last) + growth * (x - it.alpha(first))
        errors.append(float((found - exactly).abs()))
    assert errors == pytest.approx([0.110, 0.0218, 0.00489, 0.00116, 0.000282], rel=5e-3)
    ratios = [before / after for before, after in pairwise(errors)]
    assert ratios == pytest.approx([5.0, 4.5, 4.2, 4.1], abs=0.06)


def linear(it: Process, slopes: Tensor) -> Asked:
    """A network whose x_0 is a multiple [T] of x_t: all that there is of a mean of 0."""

    def ask(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = slopes[t][:, None, None, None] * x
        return x_0, (x - it.alpha(t) * x_0) / it.sigma(t)

    return ask


@pytest.mark.parametrize(
    # 1000 halves to 125 and no further: what goes down to 1 begins at 512.
    ("steps", "halvings", "left"),
    [(1000, (500, 250, 125), 0.99557), (512, (256, 128, 64, 32, 16, 8, 4, 2, 1), None)],
)
def test_halving_again_and_again_loses_nothing(
    steps: int, halvings: tuple[int, ...], left: float | None
) -> None:
    it, every, first = exact_process(), torch.arange(1000), torch.tensor([999])
    slopes = (it.alpha(every) * S**2 / variance(it, every)).flatten()
    path = torch.cat(stops(steps))
    angles = torch.atan2(it.sigma(path), S * it.alpha(path)).flatten()
    wanted = prod(angles.diff().cos().tolist())
    assert left is None or wanted == pytest.approx(left, abs=1e-5)
    for count in halvings:
        t, u, s = Progressive(denoising_steps=count).times(torch.arange(count), 1000)
        x = torch.ones(count, 1, 1, 1, dtype=torch.float64)
        x_s = ddim(linear(it, slopes), it, x, [t, u, s])
        x_0 = halved(it, x, x_s, t, s)
        alone = it.ddim(x_0, (x - it.alpha(t) * x_0) / it.sigma(t), s)
        assert (alone - x_s).abs().max() < 1e-10
        slopes = torch.full_like(slopes, torch.nan)  # the student knows its own stops alone
        slopes[t] = x_0.flatten()
        end = ddim(linear(it, slopes), it, variance(it, first).sqrt(), stops(count))
        assert float(end) / S == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "stops"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 679, 339]),
        (4, [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_an_lcm_student_stops_where_the_published_ones_do(
    tmp_path: Path, steps: int, stops: list[int]
) -> None:
    table = lower_schedule(few_step_scheduler(teacher_folder(tmp_path), 50), steps)
    assert [step.t for step in table.steps] == stops


def test_the_guidance_weight_is_heard_as_published_waves() -> None:
    """w = 7.5, which is a scale of 8.5 (arXiv 2310.04378): sines, then cosines."""
    (waves,) = Guidance(kind="embedded", scale=8.5, channels=256).embedding().tolist()
    assert len(waves) == 256
    assert waves[:3] == pytest.approx([-0.85124, 0.84223, 0.01182], abs=1e-5)
    assert waves[128:131] == pytest.approx([-0.52478, 0.53912, -0.99993], abs=1e-5)


def test_a_guided_step_on_three_classes_goes_by_the_guided_score() -> None:
    """(1 + w) of the class's score less w of the mixture's, by differentiating their densities."""
    it, means = process("epsilon"), torch.tensor([-2.0, 0.0, 2.0])
    t = torch.tensor([999, 759, 499, 259, 19])
    s, w, x = (t - 20).clamp(min=0), torch.tensor([0.0, 2.0, 7.5, 7.5, 14.0]), normal(5)
    labels = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0]).view(5, 1, 1)

    def gaps(x: Tensor, t: Tensor) -> Tensor:  # to each class, behind all others
        return x[..., None] - it.alpha(t)[..., None] * means

    def network(x: Tensor, t: Tensor, c: Tensor) -> Any:
        spread = variance(it, t)[..., None]
        every = it.sigma(t)[..., None] * gaps(x, t) / spread
        shares = (-gaps(x, t).square() / (2 * spread)).softmax(-1)
        own = every.gather(-1, c.long().clamp(min=0)[..., None, None].expand_as(x[..., None]))
        mixed = (shares * every).sum(-1)
        return SimpleNamespace(sample=torch.where(c[..., None] < 0, mixed, own[..., 0]))

    def score(x: Tensor, density: Any) -> Tensor:
        x = x.double().requires_grad_()
        logs = -gaps(x, t).square() / (2 * variance(it, t)[..., None])
        (gradient,) = torch.autograd.grad(density(logs).sum(), x)
        return gradient.float()

    chosen = labels.long()[..., None, None].expand_as(x[..., None])
    told = (1 + w).view(5, 1, 1, 1) * score(x, lambda logs: logs.gather(-1, chosen))
    told = told - w.view(5, 1, 1, 1) * score(x, lambda logs: logs.logsumexp(-1))
    x_0 = (x + it.sigma(t).square() * told) / it.alpha(t)
    wanted = it.alpha(s) * x_0 - it.sigma(s) * it.sigma(t) * told
    nothing = torch.full((1, 1, 1), -1.0)
    found = it.ddim(*guided(network, it, x, t, labels, nothing, w), s)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("s", "steps", "leaks"),
    [
        (0.5, 4, [-0.034192, -0.003985, -0.001180, -0.000673]),
        (1.0, 1, [-0.068265]),
    ],
)
def test_noise_alone_is_not_what_stable_diffusion_ends_in(
    tmp_path: Path, s: float, steps: int, leaks: list[float]
) -> None:
    """By how much, at each step, samples of the exact consistency map miss a mean of 1."""
    for zero_snr in (False, True):
        config = {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
        folder = teacher_folder(tmp_path / str(zero_snr), **config)
        it = Process.of(folder, torch.device("cpu")) if zero_snr else exact_process("v_prediction")
        x, missed = torch.zeros(1, 1, 1, 1).double(), []  # noise, on average
        for step in lower_schedule(few_step_scheduler(folder, 50), steps).steps:
            t = torch.tensor([int(step.t)])
            output = exact(it, 1.0, s)(x, t, NOTHING).sample
            missed.append(float(it.x_0(output, x, t)) - 1)
            x = step.a * x + step.b * output
        assert missed == pytest.approx([0.0] * steps if zero_snr else leaks, abs=1e-6)
        assert float(x) - 1 == pytest.approx(missed[-1], abs=1e-6)


def test_x_0_is_not_computed_in_half_precision() -> None:
    """At t = 999 what eps is rounded by is 14.6 times as much of x_0."""
    it, t = process("epsilon"), torch.full((500,), 999)
    x_0, eps = normal(500, 1), normal(500, 2)
    x_t = it.noised(x_0, eps, t)
    halves = it.x_0(eps.half(), x_t.half(), t)
    by_half = ((x_t.half() - it.sigma(t).half() * eps.half()) / it.alpha(t).half()).float()
    assert (by_half - x_0).abs().max() > 1e-2 and (halves.float() - x_0).abs().max() > 1e-2
    found, _ = plain(lambda x, t, c: SimpleNamespace(sample=eps), it, x_t, t, NOTHING)
    assert found.dtype == torch.float32 and (found - x_0).abs().max() < 1e-4
