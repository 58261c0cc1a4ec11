"""MeanFlow against closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from gaussian import (
    NOTHING,
    M,
    batch,
    normal,
    posterior,
    process,
    sampled,
    seeded,
    teacher_folder,
    variance,
)
from test_distill import small_recipe
from test_scm import unet
from tiny_student import WIDTH, write_student
from torch import Tensor, nn

from edgeflash.distill import by_meanflow
from edgeflash.distill.by_meanflow import (
    WAVES,
    Lesson,
    MeanFlow,
    as_seen,
    fold,
    level,
    listen,
    mean_velocity,
)
from edgeflash.distill.by_perflow import line
from edgeflash.distill.few_steps import ddim_scheduler
from edgeflash.distill.process import Process
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.schedule import lower_schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def flowing(it: Process) -> Any:
    """The perfect student: what it means leads, in one step, along the exact ODE of N(m, s^2)."""

    def network(x: Tensor, t: Tensor, c: Tensor, timestep_cond: Tensor | None = None) -> Any:
        assert timestep_cond is not None
        length = timestep_cond[:, 0].asin() * it.timesteps  # the fastest sine is of the share
        end = t - length.clamp(min=1.0)
        growth = (variance(it, end) / variance(it, t)).sqrt()
        x_end = it.alpha(end) * M + growth * (x - it.alpha(t) * M)
        step = it.target(*line(it, x, x_end, t, end), t)
        instant = posterior(it)(x, t, c).sample
        return SimpleNamespace(sample=torch.where(length[:, None, None, None] < 1, instant, step))

    return network


def deaf(it: Process) -> Any:
    """The perfect teacher as a student: it does not listen to a step's length."""
    return lambda x, t, c, timestep_cond: posterior(it)(x, t, c)


class Offset(nn.Module):
    """A closed form as a student; ``added``, a zero, tells the gradient by its output."""

    def __init__(self, closed: Any) -> None:
        super().__init__()
        self.closed, self.added = closed, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, c: Tensor, timestep_cond: Tensor) -> Any:
        return SimpleNamespace(sample=self.closed(x, t, c, timestep_cond).sample + self.added)


def told(it: Process, closed: Any, **options: Any) -> tuple[float, float]:
    """The loss of a closed form on 400 samples, and its gradient by an offset of the output."""
    lesson = Lesson(MeanFlow(**options), posterior(it), it, NOTHING)
    student = Offset(closed)
    loss = lesson.loss(student, batch(400), seeded())["flow"]
    loss.backward()
    return loss.item(), abs(student.added.grad.item())


def test_times_are_the_level_of_noise() -> None:
    it, t = process(), torch.tensor([0.1, 0.5, 0.9])
    x_0, eps, wide = normal(3, 1), normal(3, 2), t[:, None, None, None]
    x, timesteps = as_seen(it, (1 - wide) * x_0 + wide * eps, t)
    assert torch.allclose(x, it.noised(x_0, eps, timesteps), atol=1e-5)
    assert torch.allclose(level(it.angle(timesteps)), t, atol=1e-5)


def test_pairs_of_times_are_logit_normal_ordered_and_mostly_equal() -> None:
    it, options = process(), MeanFlow(noise_mean=-0.4, noise_std=1.0, equal_share=0.75)
    t, r = options.times(it, 20_000, seeded())
    assert torch.equal(r[:15_000], t[:15_000]) and (r[15_000:] < t[15_000:]).all()
    both = torch.cat([t[15_000:], r[15_000:]]).logit()
    assert float(both.mean()) == pytest.approx(-0.4, abs=0.05)
    assert float(both.std()) == pytest.approx(1.0, abs=0.05)
    wide, _ = MeanFlow(noise_std=9).times(it, 1000, seeded())
    ends = level(it.angles[[1, -1]])
    assert [float(wide.min()), float(wide.max())] == ends.tolist()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches_have_as_many_equal_times(count: int) -> None:
    it, options, generator = process(), MeanFlow(equal_share=0.75), seeded()
    pairs = (options.times(it, count, generator) for _ in range(500))
    counts = torch.stack([(t == r).sum() for t, r in pairs])
    assert float(counts.double().mean()) == pytest.approx(0.75 * count, abs=0.06)
    assert int(counts.max() - counts.min()) == 1  # both are met


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_mean_velocity_of_a_step_is_the_integral_of_the_flow(predicts: str) -> None:
    """u = (z_t - z_r) / (t - r), and z_r = m (1 - r) + sqrt(V_r / V_t) (z_t - m (1 - t)) there."""
    it, z = process(predicts), normal(3)
    t, r = torch.tensor([0.9, 0.7, 0.3]), torch.tensor([0.1, 0.6, 0.05])

    def spread(t: Tensor) -> Tensor:
        return ((1 - t).square() * 0.5**2 + t.square()).sqrt()

    wide_t, wide_r = t[:, None, None, None], r[:, None, None, None]
    z_r = (1 - wide_r) * M + spread(wide_r) / spread(wide_t) * (z - (1 - wide_t) * M)
    found = mean_velocity(flowing(it), it, z, t, r, NOTHING)
    assert torch.allclose(found, (z - z_r) / (wide_t - wide_r), atol=2e-3)
    v = mean_velocity(flowing(it), it, z, t, t, NOTHING)
    assert torch.equal(v, mean_velocity(deaf(it), it, z, t, t, NOTHING))


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_the_mean_velocity_has_no_loss_and_the_velocity_has(
    predicts: str, difference: float
) -> None:
    it, options = process(predicts), {"difference": difference, "equal_share": 0.25}
    (left, pull), (moved, _) = (told(it, net(it), **options) for net in (flowing, deaf))
    assert left < (2e-3 if difference == 0 else 0.02) and moved > 0.1 and pull < 0.05


def test_all_samples_with_equal_times_are_plain_flow_matching() -> None:
    it = process("v_prediction")
    assert told(it, deaf(it), equal_share=0.999)[0] < 0.01  # of the one that is left


def says(value: float, empty: float) -> Any:
    """A student whose velocity is ``value``, and ``empty`` for the caption whose c is 5."""
    it = process("v_prediction")

    def network(x: Tensor, t: Tensor, c: Tensor, timestep_cond: Tensor | None = None) -> Any:
        u = torch.where(c[..., None] == 5, empty, value).expand_as(x)
        cos, sin = it.alpha(t), it.sigma(t)  # eps - x_0 = u, alpha x_0 + sigma eps = x
        return SimpleNamespace(sample=(u - (sin - cos) * x) / (cos + sin))

    return network


def test_guidance_in_training_mixes_three_velocities() -> None:
    """omega = 0.5 * 3 of v, kappa = 0.5 of u(c), the rest of u; dropped captions go unguided."""
    it, z, t = process("v_prediction"), normal(2000), torch.full((2000,), 0.5)
    options = MeanFlow(kind="training", guidance=3, kappa=0.5, caption_dropout=0.2)
    lesson = Lesson(options, None, it, torch.full((1, 1, 1), 5.0))
    calls: list[int] = []

    def student(x: Tensor, *told: Tensor, **kw: Tensor) -> Any:
        calls.append(len(x))
        return says(2.0, 7.0)(x, *told, **kw)

    v, c = lesson.velocity(
        student, z, t, torch.full_like(z, 1.0), torch.zeros(2000, 1, 1), seeded()
    )
    assert calls == [4000]
    dropped = (c == 5).flatten()
    assert float(dropped.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.allclose(v[dropped], torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(v[~dropped], torch.tensor(1.5 * 1 + 0.5 * 2 - 1 * 7), atol=1e-4)
    plain = Lesson(MeanFlow(kind="training"), None, it, NOTHING)
    v, c = plain.velocity(None, z, t, 3 * z, torch.zeros(2000, 1, 1), seeded())
    assert torch.equal(v, 3 * z) and not c.any()


def test_guidance_in_distillation_is_the_teachers() -> None:
    it, z, t = process("v_prediction"), normal(9), torch.full((9,), 0.5)
    lesson = Lesson(MeanFlow(guidance=3), says(2.0, 7.0), it, torch.full((1, 1, 1), 5.0))
    v, _ = lesson.velocity(None, z, t, z, torch.zeros(9, 1, 1), seeded())
    assert torch.allclose(v, torch.tensor(7 + 3 * (2.0 - 7)), atol=1e-4)


def test_a_steps_length_is_heard_then_folded_in() -> None:
    network, plain = unet(), unet()
    x, c, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH), torch.tensor([999, 499])
    before, names = network(x, t, c).sample, set(network.state_dict())
    listen(network)
    waves = get_timestep_embedding(torch.tensor([0.5, 0.5]), WAVES)
    assert torch.equal(network(x, t, c, timestep_cond=waves).sample, before)
    nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1)
    heard = network(x, t, c, timestep_cond=waves).sample
    assert not torch.allclose(heard, before, atol=1e-2)
    fold(network, 0.5)
    assert torch.allclose(network(x, t, c).sample, heard, atol=1e-4)
    assert set(network.state_dict()) == names and network.config == plain.config


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_so_many_steps_end_where_the_flow_does(tmp_path: Path, steps: int, predicts: Any) -> None:
    it, noise = process(predicts), normal(300)
    folder = teacher_folder(tmp_path, prediction_type=predicts)
    schedule = lower_schedule(ddim_scheduler(folder, steps), steps)
    waves = get_timestep_embedding(torch.full((300,), 1 / steps), WAVES)

    def folded(x: Tensor, t: Tensor, c: Tensor) -> Any:
        return flowing(it)(x, t, c, waves)

    t = torch.tensor([999])
    wanted = M + 0.5 * (noise - it.alpha(t) * M) / variance(it, t).sqrt()
    assert torch.allclose(sampled(schedule, folded, noise), wanted, atol=5e-3)
    assert sampled(schedule, posterior(it), noise).std() < 0.85 * wanted.std()


def test_a_student_that_was_told_lengths_is_saved_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: list[float] = []

    def noted(network: Any, length: float) -> dict[str, float]:
        folded.append(length)
        return fold(network, length)

    monkeypatch.setattr(by_meanflow, "fold", noted)
    common = {"steps": 3, "batch_size": 2, "equal_share": 0, "learning_rate": 0.1}
    stage = {"by": "meanflow", "denoising_steps": 2, "ema": 0, **common}
    out = distill(small_recipe(tmp_path, stage=[stage], sampling=None), tmp_path / "student")
    assert folded == [0.5]
    config = json.loads((out / "unet" / "config.json").read_text())
    teacher = json.loads((tmp_path / "teacher" / "unet" / "config.json").read_text())
    assert config.get("time_cond_proj_dim") is None
    assert {k: config[k] for k in teacher if k[0] != "_"} == {
        k: v for k, v in teacher.items() if k[0] != "_"
    }
    told = json.loads((out / "edgeflash.json").read_text())
    assert list(told["schedules"]) == ["2"] and told["guidance"]["kind"] == "none"


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    stage = {"by": "meanflow", "steps": 1, "batch_size": 2}
    base = write_student(tmp_path / "base", tiny_decoder=False, scheduler="DDIMScheduler")
    only_base = {"teacher": None, "base": str(base), "sampling": None}
    with pytest.raises(EdgeflashError, match=r"needs a teacher .* set kind = 'training'"):
        distill(small_recipe(tmp_path, stage=[stage], **only_base), tmp_path / "a")
    with pytest.raises(EdgeflashError, match=r"where this one takes guidance"):
        listen(unet(time_cond_proj_dim=8))
