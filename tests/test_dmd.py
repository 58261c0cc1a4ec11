"""DMD2 against closed forms, and its two players in a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from gaussian import (
    BETAS,
    NOTHING,
    M,
    S,
    Shift,
    batch,
    normal,
    posterior,
    process,
    says,
    seeded,
    teacher_folder,
    variance,
)
from test_distill import small_recipe
from torch import Tensor, nn

from edgeflash.distill.by_dmd import DMD, Duel
from edgeflash.distill.discriminators import DenoiserCritic, FrozenCritic, softplus_critic
from edgeflash.distill.inner import EncoderHalf
from edgeflash.distill.run import distill
from edgeflash.schedule import lower_schedule


def duel(options: DMD, **others: Any) -> Duel:
    it = process()
    networks = {"teacher": posterior(it), "fake": posterior(it), "student": Shift(M, S)}
    return Duel(options=options, process=it, **({"nothing": NOTHING} | networks | others))


@pytest.mark.parametrize(
    ("t", "gap"), [(999, 0.99883), (749, 0.98522), (499, 0.91232), (249, 0.65778), (19, 0.06743)]
)
def test_the_gradient_is_what_the_scores_differ_by(t: int, gap: float) -> None:
    """For samples of N(m + 1, s^2): sigma^2 / V, over the mean of |x - x_0 of the teacher|."""
    it = process()
    options = DMD(t_min=t / 1000, t_max=t / 1000, real_guidance=1)
    x, c = (M + 1 + S * normal(6)).requires_grad_(), torch.zeros(6, 1, 1)
    loss = duel(options, fake=posterior(it, M + 1)).matching(x, c, seeded())
    (gradient,) = torch.autograd.grad(loss, x)
    generator = seeded()
    times = torch.randint(t, t + 1, (6,), generator=generator)
    x_t = it.noised(x.detach(), torch.randn(x.shape, generator=generator), times)
    real = posterior(it)(x_t, times, c).sample
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(gradient, (gap / scale / x.numel()).expand_as(x), rtol=2e-3)


def test_a_fake_score_that_is_the_teachers_moves_nothing() -> None:
    student = Shift(M + 3, S)
    options = DMD(real_guidance=1)
    loss = duel(options, student=student).student_loss(student, batch(8), seeded())["matching"]
    loss.backward()
    assert student.m.grad is not None and abs(float(student.m.grad)) < 1e-6


def test_the_teacher_is_guided_by_cfgs_scale() -> None:
    x, c = torch.ones(2, 1, 2, 2, requires_grad=True), torch.full((2, 1, 1), 3.0)
    others = {"teacher": says(lambda c: c), "fake": says(torch.zeros_like)}
    game = duel(DMD(real_guidance=1.75), nothing=torch.ones(1, 1, 1), **others)
    game.matching(x, c, seeded()).backward()
    real = 1 + 1.75 * (3 - 1)
    assert x.grad is not None
    assert (8 * x.grad).flatten().tolist() == pytest.approx([-real / (real - 1)] * 8)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_tables_stop_where_the_student_was_trained(tmp_path: Path, zero_snr: bool) -> None:
    config = {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    folder, one = teacher_folder(tmp_path, **config), {"denoising_steps": 1}
    abar = DDPMScheduler(**BETAS, **config).alphas_cumprod
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [999, 749, 499, 249]),
        (one, [999]),
        (one | {"denoising_timestep": 400}, [399]),
    ]
    for given, ladder in cases:
        options = DMD(**given)
        schedule = lower_schedule(options.scheduler(folder), len(ladder))
        assert list(options.timesteps()) == [step.t for step in schedule.steps] == ladder
        last, at = schedule.steps[-1], float(abar[ladder[-1]])
        assert (last.a, last.b) == pytest.approx((sqrt(at), -sqrt(1 - at)), abs=1e-5)
    with pytest.raises(ValueError, match="denoising_steps 3 does not divide"):
        DMD(denoising_steps=3)


def test_the_student_is_given_what_its_own_sampler_leads_to() -> None:
    it, student, lengths = process(), Shift(M, 0), set()
    game, c = duel(DMD(), student=student), torch.zeros(500, 1, 1)
    for seed in range(40):
        student.seen.clear()
        x_t, t = game.given(normal(500), c, seeded(seed))
        walked = [int(times[0]) for times in student.seen]
        assert not x_t.requires_grad and (t == t[0]).all()
        assert [*walked, int(t[0])] == [999, 749, 499, 249][: len(walked) + 1]
        mean, std = (float(it.alpha(t)[0]) * M, float(it.sigma(t)[0])) if walked else (0, 1)
        assert float(x_t.mean()) == pytest.approx(mean, abs=0.1)
        assert float(x_t.std()) == pytest.approx(std, rel=0.1)
        lengths.add(len(walked))
    assert lengths == {0, 1, 2, 3}


def test_weights_that_a_rollout_cast_still_learn() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
            return SimpleNamespace(sample=self.conv(x))

    student = Student()
    game = duel(DMD(), student=student, fake=posterior(process(), M + 1))
    for seed in range(8):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = game.student_loss(student, batch(4), seeded(seed))["matching"]
        loss.backward()
        assert student.conv.weight.grad is not None and student.conv.weight.grad.abs().sum() > 0


def test_the_fake_score_learns_what_the_student_makes() -> None:
    """The teacher's answer is off by (m_g - m) sigma^2 / V on samples of N(m_g, s^2)."""
    it = process()
    game = duel(DMD(denoising_steps=1), student=Shift(M + 1, S))

    def loss(fake: Any) -> float:
        return float(game.fake_loss(fake, batch(4000), seeded())["denoising"])

    t = torch.arange(1000)
    wanted = float((it.sigma(t) ** 2 / variance(it, t)).square().mean())
    assert loss(posterior(it)) - loss(posterior(it, M + 1)) == pytest.approx(wanted, rel=0.1)


def small_unet(mid: str | None) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=mid,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", None])
def test_a_unet_that_judges_does_so_by_its_inner_half(mid: str | None) -> None:
    unet = small_unet(mid)
    asked = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 5, 12)
    told = DenoiserCritic(unet)(*asked)
    assert torch.equal(told.sample, unet(*asked).sample) and told.logits.shape == (3, 1)
    told.logits.sum().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0 and unet.conv_out.weight.grad is None


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", None])
def test_a_frozen_unet_judges_through_a_head_and_runs_half_way(mid: str | None) -> None:
    unet = small_unet(mid).requires_grad_(False)
    called: list[str] = []
    unet.down_blocks[-1].register_forward_hook(lambda *_: called.append("down"))
    unet.up_blocks[0].register_forward_hook(lambda *_: called.append("up"))
    critic = FrozenCritic(unet)
    assert all(name.startswith("head.") for name in critic.state_dict())
    for side in (2, 8):
        x = torch.randn(3, 4, side, side, requires_grad=True)
        scores = critic(x, torch.tensor([1, 500, 999]), torch.randn(3, 5, 12))
        assert scores.shape == (3, 1, max(1, side // 4), max(1, side // 4))
        scores.sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
    assert called == ["down", "down"]
    asked = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 5, 12)
    inner, seen = unet.mid_block or unet.down_blocks[-1], []
    inner.register_forward_hook(lambda *told: seen.append(told[-1]))
    found = EncoderHalf(unet)(*asked)
    unet(*asked)
    assert torch.equal(found, seen[1] if mid else seen[1][0])


def test_a_critic_that_knows_nothing_and_one_that_knows() -> None:
    nothing, sure = torch.zeros(3, 1), torch.full((3, 1), 9.0)
    assert float(softplus_critic(nothing, nothing)) == pytest.approx(2 * log(2))
    assert float(softplus_critic(sure, -sure)) < 1e-3 < float(softplus_critic(-sure, sure))


def test_the_fake_score_takes_more_turns_and_also_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        before = getattr(Duel, name)
        return lambda *given: turns.append(name) or before(*given)

    for name in ("fake_loss", "student_loss"):
        monkeypatch.setattr(Duel, name, noted(name))
    stage = {"by": "dmd", "denoising_steps": 2, "gan_weight": 1e-3, "fake_updates": 2}
    recipe = small_recipe(tmp_path, stage=[stage | {"steps": 4, "batch_size": 2}])
    out = distill(recipe, tmp_path / "student")
    one, both = ["fake_loss"], ["fake_loss", "student_loss"]
    assert turns == both + one + both + one
    (told,) = json.loads((out / "edgeflash.json").read_text())["lineage"]["stages"]
    terms = {"fake/denoising", "fake/critic", "student/matching", "student/adversarial"}
    assert terms < told.keys()  # those of the player too that rested at the end
