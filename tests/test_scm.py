"""Continuous-time consistency models against closed forms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
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
    seeded,
    teacher_folder,
    variance,
)
from test_distill import small_recipe
from tiny_student import WIDTH, write_student
from torch import Tensor, nn

from edgeflash.distill.by_scm import SCM, Lesson, parts, tangent, trigflow
from edgeflash.distill.few_steps import few_step_scheduler
from edgeflash.distill.process import Process
from edgeflash.distill.rates import differentiable, rate
from edgeflash.distill.rollout import ddim
from edgeflash.distill.run import distill
from edgeflash.distill.teacher import asked
from edgeflash.embedded import embedded
from edgeflash.errors import EdgeflashError
from edgeflash.schedule import lower_schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")
ALL = SCM(tangent_warmup=0)  # r is 1 from the first step on


class Offset(nn.Module):
    """A closed form as a student; ``added``, zeros, tells the gradient by its output."""

    def __init__(self, closed: Any, count: int) -> None:
        super().__init__()
        self.closed, self.added = closed, nn.Parameter(torch.zeros(count, 1, 2, 2))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=self.closed(x, t, c).sample + self.added)


def taught(it: Process, closed: Any, options: SCM = ALL, *, step: int = 0) -> tuple[Offset, float]:
    """A closed form with its gradient after one loss on 300 samples, and that loss."""
    student = Offset(closed, 300)
    lesson = Lesson(options, posterior(it), it, NOTHING)
    terms = lesson.loss(student, batch(300) | {"step": torch.tensor(step)}, seeded())
    terms["consistency"].backward()
    return student, terms["consistency"].item()


def exactly(it: Process, net: Any, x: Tensor, angle: Tensor) -> Tensor:
    """`trigflow` in float64."""
    t = it.timestep(angle)
    output = net(x, t, NOTHING).sample
    return it.v(it.x_0(output, x, t), it.eps(output, x, t), t)


def test_timesteps_between_two_are_angles_between_theirs() -> None:
    it, whole = process(), torch.tensor([-1, 0, 19, 500, 999])
    for part in (it.alpha, it.sigma):
        assert torch.allclose(part(whole.float()), part(whole), atol=1e-6)
    t = torch.tensor([-0.5, 0.25, 499.75, 998.5])
    angles = it.angle(torch.tensor([-1.0, 0.0, 1.0, 499.0, 500.0]))
    assert torch.equal(angles[0], torch.tensor(0.0))
    mixed = [angles[1] / 2, angles[1:3] @ torch.tensor([0.75, 0.25])]
    assert torch.allclose(it.angle(t)[:2], torch.stack(mixed))
    assert float(it.angle(t)[2]) == pytest.approx(float(angles[3:] @ torch.tensor([0.25, 0.75])))
    assert torch.allclose(it.timestep(it.angle(t)), t, atol=2e-3)
    assert torch.allclose(it.timestep(it.angle(whole)), whole.float(), atol=2e-3)


def test_trigflow_is_the_process_by_its_angle() -> None:
    it, x_0, eps = process(), normal(4, 1), normal(4, 2)
    angle = torch.tensor([0.03, 0.4, 1.1, 1.5])
    t, wide = it.timestep(angle), angle[:, None, None, None]
    x = it.noised(x_0, eps, t)
    assert torch.allclose(x, wide.cos() * x_0 + wide.sin() * eps, atol=1e-5)
    for got, wanted in zip(parts(x, angle, it.v(x_0, eps, t)), (x_0, eps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_network_of_any_kind_means_one_velocity(predicts: str) -> None:
    it, angle = process(predicts), torch.tensor([0.05, 0.7, 1.4])
    x, of_v = normal(3), process("v_prediction")
    wanted = posterior(of_v)(x, of_v.timestep(angle), NOTHING).sample
    assert torch.allclose(trigflow(posterior(it), it, x, angle, NOTHING), wanted, atol=1e-4)


def test_the_tangent_is_the_consistency_functions_own() -> None:
    """g = cos(t) df/dt of f = cos(t) x - sin(t) F, for any F and any way to go."""
    x, dx = normal(5, 1).double(), normal(5, 2).double()
    angle = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)

    def some(x: Tensor, angle: Tensor) -> Tensor:
        return torch.tanh(2 * x + 3 * angle[:, None, None, None])

    def f(x: Tensor, angle: Tensor) -> Tensor:
        return parts(x, angle, some(x, angle))[0]

    ends = (torch.tensor(0.0), torch.tensor(1.6))
    v, dv = some(x, angle), rate(some, x, angle, dx, 0, ends)
    df = rate(f, x, angle, dx, 0, ends)
    got = tangent(x, angle, v, dv, dx, 1.0)
    assert torch.allclose(got, angle.cos()[:, None, None, None] * df, atol=1e-12)
    cold = tangent(x, angle, v, dv, dx, 0.0)
    assert torch.allclose(cold, angle.cos()[:, None, None, None] ** 2 * (dx - v), atol=1e-12)


def test_along_the_exact_ode_the_exact_map_does_not_change() -> None:
    it = Process(process().abar.double(), "sample")
    x, angle = normal(50).double(), torch.linspace(0.05, 1.4, 50, dtype=torch.float64)
    dx = exactly(it, posterior(it), x, angle)

    def g(net: Any, step: float) -> Tensor:
        def v(x: Tensor, angle: Tensor) -> Tensor:
            return exactly(it, net, x, angle)

        dv = rate(v, x, angle, dx, step, (it.angles[1], it.angles[-1]))
        return tangent(x, angle, v(x, angle), dv, dx, 1.0).abs().max()

    assert g(exact(it), 0) < 1e-8 < 0.1 < g(posterior(it), 0)
    assert float(g(exact(it), 0.02) / g(exact(it), 0.01)) == pytest.approx(4, rel=0.1)
    assert g(exact(it), 0.05) < 5e-3


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_the_exact_map_is_left_alone_and_the_teacher_is_not(
    predicts: str, difference: float
) -> None:
    it, options = process(predicts), ALL.model_copy(update={"difference": difference})
    (left, _), (moved, _) = (taught(it, net(it), options) for net in (exact, posterior))
    assert left.added.grad.norm() < 0.05 * moved.added.grad.norm()
    if difference == 0:
        assert left.added.grad.norm() < 1e-4 * moved.added.grad.norm()


def test_networks_of_all_kinds_are_moved_alike() -> None:
    """By the velocity that they mean, to F + g with |g| below 1."""
    found, errors = {}, {}
    for predicts in PREDICTIONS:
        it = process(predicts)
        student, errors[predicts] = taught(it, posterior(it))
        t, x = it.timestep(ALL.times(it, 300, after_noise())), torch.zeros(300, 1, 2, 2)
        step = -student.added.grad * student.added.numel() / 2
        found[predicts] = it.v(it.x_0(step, x, t), it.eps(step, x, t), t)
    of_v = found["v_prediction"]
    assert torch.allclose(found["epsilon"], of_v, atol=2e-3)
    assert torch.allclose(found["sample"], of_v, atol=2e-3)
    assert errors["v_prediction"] == pytest.approx(float(of_v.square().mean()), rel=1e-3)
    length = of_v.square().mean((1, 2, 3)).sqrt()
    assert length.max() < 1 and length.median() > 0.2


def after_noise() -> torch.Generator:
    """The loss's generator when its noise has been drawn."""
    generator = seeded()
    torch.randn(300, 1, 2, 2, generator=generator)
    return generator


def test_a_teacher_meets_itself_until_the_tangent_is_warm() -> None:
    it, options = process("v_prediction"), SCM(steps=100, tangent_warmup=0.2, difference=0)
    assert [options.warmth(step) for step in (0, 5, 20, 99)] == [0, 0.25, 1, 1]
    cold, half, warm = (
        taught(it, posterior(it), options, step=step)[0].added.grad.norm() for step in (0, 10, 20)
    )
    assert cold < 1e-6 and 0.3 * warm < half < warm


def test_times_are_log_normal_between_the_ends_of_the_process() -> None:
    it, options = process(), SCM(noise_mean=0.5, noise_std=0.7)
    t = options.times(it, 20_000, seeded())
    logs = t.tan().log()
    assert float(logs.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logs.std()) == pytest.approx(0.7, abs=0.02)
    wide = SCM(noise_std=9).times(it, 1000, seeded())
    assert float(wide.min()) == it.angles[1] and float(wide.max()) == it.angles[-1]


def test_training_goes_by_picture_and_noise() -> None:
    """All data are one point, where that is the teacher's own velocity."""
    it, point = process("v_prediction"), {"x_0": torch.full((300, 1, 2, 2), M)}

    def moved(teacher: Any) -> Tensor:
        student = Offset(posterior(it, 0.2), 300)
        lesson = Lesson(ALL, teacher, it, NOTHING)
        lesson.loss(student, batch(300) | point | {"step": torch.tensor(0)}, seeded())[
            "consistency"
        ].backward()
        return student.added.grad

    assert torch.allclose(moved(None), moved(posterior(it, M, 0)), atol=1e-6)
    assert moved(None).norm() > 1e-3


def test_guidance_is_folded_in() -> None:
    it, nothing = process("v_prediction"), torch.full((1, 1, 1), 5.0)  # where batches have c = 0

    def says(x: Tensor, t: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=x + c[..., None])

    def cold(value: float) -> float:
        student = Offset(lambda x, t, c: SimpleNamespace(sample=x + value), 300)
        lesson = Lesson(SCM(guidance=3.0), says, it, nothing)
        data = batch(300) | {"step": torch.tensor(0)}
        return lesson.loss(student, data, seeded())["consistency"].item()

    assert cold(5 + 3 * (0 - 5)) < 1e-8 < 0.1 < cold(0)


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    options = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1}
    options |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    options |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    options |= {"cross_attention_dim": WIDTH, "attention_head_dim": 4, "norm_num_groups": 8}
    return UNet2DConditionModel(**options | changes).to(memory_format=torch.channels_last)


def test_forward_mode_and_differences_agree_through_a_unet_with_attention() -> None:
    network, c = unet(), torch.randn(2, 5, WIDTH)
    x, dx = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t, ends = torch.tensor([40.0, 60.0]), (torch.tensor(0.0), torch.tensor(999.0))

    def says(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, c).sample

    near = rate(says, x, t, dx, 2e-4, ends)
    differentiable(network)
    exact = rate(says, x, t, dx, 0, ends)
    assert not exact.requires_grad and exact.norm() > 0.1
    assert (near - exact).norm() < 0.01 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(rate(says, x, t, dx, 0, ends), exact, atol=1e-5)


def test_differences_stay_between_the_ends() -> None:
    asked_at: list[float] = []

    def square(x: Tensor, t: Tensor) -> Tensor:
        asked_at.extend(t.tolist())
        return x * t[:, None, None, None] ** 2

    t, ends = torch.tensor([1.0, 2.0]), (torch.tensor(0.95), torch.tensor([3.0, 2.0]))
    found = rate(square, torch.ones(2, 1, 1, 1), t, torch.zeros(2, 1, 1, 1), 0.1, ends)
    assert asked_at == pytest.approx([0.95, 1.8, 1.1, 2.0])
    assert found.flatten().tolist() == pytest.approx([0.95 + 1.1, 1.8 + 2.0], rel=1e-5)


@torch.no_grad()
def test_between_timesteps_a_trained_networks_derivative_is_noise() -> None:
    """Why the tangent is a difference: the exact one is several times as long, at random."""
    folder, device = embedded("shapes-teacher"), torch.device("cpu")
    it = Process.of(folder, device)
    network = differentiable(UNet2DConditionModel.from_pretrained(folder / "unet").eval())
    c = torch.zeros(2, 4, network.config.cross_attention_dim)
    side, ask = network.config.sample_size, asked(network, it, c, c[:1])
    x = torch.randn(2, network.config.in_channels, side, side, generator=seeded())
    x = ddim(ask, it, x, [torch.tensor([t, t]) for t in (999, 849, 699, 549, 399)])
    angle = it.angle(torch.tensor([399.0, 399.0]))
    dx = trigflow(network, it, x, angle, c)

    def length(step: float) -> float:
        dv = rate(
            lambda x, angle: trigflow(network, it, x, angle, c),
            x, angle, dx, step, (it.angles[1], it.angles[-1]),
        )  # fmt: skip
        return float(dv.square().mean().sqrt())

    assert length(0) > 2.5 * length(0.05)
    assert length(0.05) == pytest.approx(length(0.1), rel=0.5)


class Learner(nn.Module):
    """The perfect teacher, and a small network of x and the angle beside it, at first silent."""

    def __init__(self, it: Process) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.it, self.teacher = it, posterior(it)
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
        angle = self.it.angle(t)[:, None, None, None].expand_as(x)
        more = self.layers(torch.stack([x, angle.cos(), angle.sin()], -1))[..., 0]
        return SimpleNamespace(sample=self.teacher(x, t, c).sample + more)


def test_a_student_learns_to_take_one_step() -> None:
    """x_0 ~ N(m, s^2): from the posterior mean to where the exact ODE ends."""
    it, steps = process("v_prediction"), 150
    options, learner = SCM(steps=steps, tangent_warmup=0.2), Learner(it)
    lesson = Lesson(options, posterior(it), it, NOTHING)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    t = torch.full((500,), 999)
    x = normal(500, 3)
    wanted = M + S * (x - it.alpha(t) * M) / variance(it, t).sqrt()

    @torch.no_grad()
    def error() -> float:
        told = it.x_0(learner(x, t, NOTHING).sample, x, t)
        return float((told - wanted).square().mean().sqrt())

    before, generator = error(), seeded()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        x_0 = M + S * torch.randn(128, 1, 2, 2, generator=generator)
        data = {"x_0": x_0, "c": torch.zeros(128, 1, 1), "step": torch.tensor(step)}
        optimizer.zero_grad()
        lesson.loss(learner, data, generator)["consistency"].backward()
        optimizer.step()
    assert error() < before / 4


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_exact_student_is_sampled_in_one_step(tmp_path: Path, predicts: Any) -> None:
    it, folder = process(predicts), teacher_folder(tmp_path, prediction_type=predicts)
    schedule = lower_schedule(few_step_scheduler(folder, 50), 1)
    t, noise = torch.tensor([999]), normal(300)
    wanted = M + S * (noise - it.alpha(t) * M) / variance(it, t).sqrt()
    assert torch.allclose(sampled(schedule, exact(it), noise), wanted, atol=1e-3)


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance 3.0: training has no teacher"):
        SCM(kind="training", guidance=3)
    base = write_student(tmp_path / "base", tiny_decoder=False, scheduler="DDIMScheduler")
    only_base = {"teacher": None, "base": str(base), "sampling": None}
    stage = {"by": "scm", "steps": 1, "batch_size": 2}
    with pytest.raises(EdgeflashError, match=r"needs a teacher .* set kind = 'training'"):
        distill(small_recipe(tmp_path, stage=[stage], **only_base), tmp_path / "a")
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    DDIMScheduler(**BETAS, **config).save_pretrained(str(base / "scheduler"))
    stage |= {"kind": "training", "difference": 0, "noise_mean": 9}
    recipe = small_recipe(tmp_path, stage=[stage], **only_base)
    assert (distill(recipe, tmp_path / "b") / "edgeflash.json").exists()
