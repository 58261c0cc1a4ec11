"""SDXS against closed forms, and its players and its recipe on small networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gaussian import (
    NOTHING,
    M,
    S,
    Shift,
    network,
    normal,
    posterior,
    process,
    says,
    seeded,
    teacher_folder,
    variance,
)
from test_distill import picture_folder, small_recipe
from tiny_student import write_student
from torch import Tensor, nn

from edgeflash.distill import by_sdxs
from edgeflash.distill.by_sdxs import SDXS, Lesson, encoder_maps, ssim
from edgeflash.distill.data import open_store
from edgeflash.distill.encoded import cached_conditioning
from edgeflash.distill.process import Process
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import changed, find_recipe, read_recipe

UNGUIDED: dict[str, Any] = {"guidance": 1}


def lesson(options: SDXS, **others: Any) -> Lesson:
    """Of a Gaussian: the teacher knows its score, the solver ends where x_0 = m + s noise."""
    it = process()
    given = {"teacher": posterior(it), "online": posterior(it), "student": Shift(M, S)}
    given |= {"solve": lambda noise, c: M + S * noise, "sees": lambda x, c: [x]}
    given |= {"process": it, "nothing": NOTHING, "shape": (1, 2, 2)}
    return Lesson(options=options, **given | others)


def rows(count: int, step: int = 0) -> dict[str, Tensor]:
    return {"c": torch.zeros(count, 1, 1), "step": torch.tensor(step)}


def direct_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Over every map by itself, with numpy's own covariance."""
    terms = []
    for a, b in zip(x.reshape(-1, x[0, 0].size), y.reshape(-1, y[0, 0].size), strict=True):
        (var_a, both), (_, var_b) = np.cov(a, b, bias=True)
        terms.append((2 * a.mean() * b.mean() + 1e-6) / (a.mean() ** 2 + b.mean() ** 2 + 1e-6))
        terms.append((2 * both + 1e-6) / (var_a + var_b + 1e-6))
    return float(np.mean(terms))


def test_ssim_is_the_direct_formula() -> None:
    x, y = (3 + k * torch.randn(2, 3, 5, 4, generator=seeded(k)) for k in (1, 2))
    assert float(ssim(x, y)) == pytest.approx(direct_ssim(x.numpy(), y.numpy()), abs=1e-6)
    assert float(ssim(x, y)) == pytest.approx(float(ssim(y, x)), abs=1e-7)
    assert float(1 - ssim(x, x)) == pytest.approx(0, abs=1e-7)
    assert float(ssim(x, -x)) == pytest.approx(-1, abs=1e-4)
    still = torch.ones(1, 2, 1, 1)
    assert float(ssim(still, still)) == 1 and abs(float(ssim(still, 0 * still))) < 1


@pytest.mark.parametrize("spoil", ["shifted", "blurred", "paler", "brighter"])
def test_ssim_sees_what_is_wrong(spoil: str) -> None:
    x = 2 + torch.randn(2, 3, 8, 8, generator=seeded())
    spoilt = {
        "shifted": x.roll(1, 3),
        "blurred": nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "paler": 2 + 0.3 * (x - 2),
        "brighter": x + 3,
    }
    assert float(ssim(x, spoilt[spoil])) < 0.9


def test_structure_counts_the_right_way_round_where_means_differ_in_sign() -> None:
    pattern = torch.randn(1, 1, 6, 6, generator=seeded())
    assert float(ssim(1 + pattern, pattern - 1)) > float(ssim(1 + pattern, -pattern - 1))


def test_the_teachers_encoder_sees_clean_latents(tmp_path: Path) -> None:
    write_student(tmp_path / "teacher", widths=(8, 16))
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "teacher/unet").requires_grad_(False)
    x, c = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 3, 32)
    maps = encoder_maps(unet)(x, c)
    assert [m.shape[1:] for m in maps] == [(4, 8, 8), (8, 4, 4), (16, 4, 4), (16, 4, 4)]
    seen: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda *told: seen.append(told[-1]))
    unet(x, 0, c)
    assert maps[0] is x and torch.equal(maps[-1], seen[0])
    maps[-1].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_sample_is_held_to_the_solvers_from_the_same_noise() -> None:
    taught = lesson(SDXS())
    told = taught.student_loss(taught.student, rows(8), seeded())
    assert list(told) == ["features"] and told["features"].item() == pytest.approx(0, abs=1e-6)
    assert (taught.student.seen[0] == 999).all()
    student = Shift(M + 1, S)
    loss = lesson(SDXS(), student=student).student_loss(student, rows(8), seeded())["features"]
    loss.backward()
    assert loss.item() > 1e-2 and student.m.grad is not None and student.m.grad > 0


@pytest.mark.parametrize(
    ("t", "gap"), [(999, 0.99883), (749, 0.98522), (499, 0.91232), (249, 0.65778), (19, 0.06743)]
)
def test_the_gradient_is_what_the_scores_differ_by(
    t: int, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For samples of N(m + 1, s^2): sigma^2 / V, over the mean of |x - x_0 of the teacher|."""
    it = process()
    monkeypatch.setattr(by_sdxs, "randint", lambda low, high, count, _: torch.full((count,), t))
    x, c = (M + 1 + S * normal(6)).requires_grad_(), torch.zeros(6, 1, 1)
    taught = lesson(SDXS(**UNGUIDED), online=posterior(it, M + 1))
    (gradient,) = torch.autograd.grad(taught.score_distillation(x, c, 1.0, seeded()), x)
    times = torch.full((6,), t)
    x_t = it.noised(x.detach(), torch.randn(x.shape, generator=seeded()), times)
    real = posterior(it)(x_t, times, c).sample
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(gradient, (gap / scale / x.numel()).expand_as(x), rtol=2e-3)


def test_at_matched_distributions_nothing_moves() -> None:
    taught = lesson(SDXS(**UNGUIDED, feature_share=0, feature_weight=(0, 0)))
    terms = taught.student_loss(taught.student, rows(64), seeded())
    terms["scores"].backward()
    assert list(terms) == ["scores"] and taught.student.m.grad.abs() < 1e-10


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.25])
def test_scores_beyond_the_segment_do_not_count(alpha: float) -> None:
    """The online network is wrong at alpha T and above, and right below."""
    it, asked = process(), []

    def online(x: Tensor, t: Tensor, c: Tensor) -> Any:
        asked.append(t)
        right, wrong = posterior(it)(x, t, c), posterior(it, M + 9)(x, t, c)
        beyond = (t >= alpha * 1000)[:, None, None, None]
        return SimpleNamespace(sample=torch.where(beyond, wrong.sample, right.sample))

    x, c = (M + S * normal(4000)).requires_grad_(), torch.zeros(4000, 1, 1)
    taught = lesson(SDXS(**UNGUIDED), online=online)

    def moved(share: float) -> float:
        (gradient,) = torch.autograd.grad(taught.score_distillation(x, c, share, seeded()), x)
        return float(gradient.abs().max())

    assert moved(alpha) == 0 < moved(alpha + 0.01)
    assert int(asked[0].min()) < 10 and 1000 * alpha - 10 < int(asked[0].max()) < 1000 * alpha


def test_the_teacher_is_guided_by_cfgs_scale() -> None:
    x, c = torch.ones(2, 1, 2, 2, requires_grad=True), torch.full((2, 1, 1), 3.0)
    others = {"teacher": says(lambda c: c), "online": says(torch.zeros_like)}
    taught = lesson(SDXS(guidance=1.75), nothing=NOTHING + 1, **others)
    taught.score_distillation(x, c, 0.5, seeded()).backward()
    real = 1 + 1.75 * (3 - 1)
    assert x.grad is not None
    assert (8 * x.grad).flatten().tolist() == pytest.approx([-real / (real - 1)] * 8)


def test_alpha_and_the_weight_of_features_fall_after_the_warm_up() -> None:
    options = SDXS(steps=11, feature_share=0.55, alpha=(0.9, 0.5), feature_weight=(2, 1))
    told = [options.course(step) for step in range(11)]
    assert told[:6] == [(0, 2)] * 6
    assert [a for a, _ in told[6:]] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert [w for _, w in told[6:]] == pytest.approx([2, 1.75, 1.5, 1.25, 1])
    assert SDXS(steps=1, feature_share=0).course(0) == (0.98, 1)
    assert SDXS(steps=3, feature_share=1).course(2) == (0, 1)


def test_terms_are_weighed_by_the_course() -> None:
    options = SDXS(steps=11, feature_share=0.5, alpha=(0.8, 0.4), feature_weight=(2, 1), guidance=1)
    student = Shift(M + 1, S)
    taught = lesson(options, student=student, online=says(lambda c: c - 1))
    terms = [taught.student_loss(student, rows(500, step), seeded()) for step in (0, 6, 10)]
    assert [list(told) for told in terms] == [["features"]] + [["features", "scores"]] * 2
    features = [told["features"].item() for told in terms]
    assert features[0] > 0 and features[2] == pytest.approx(features[0] / 2)
    generator = seeded()
    x = taught.sample(student, taught.noise(rows(500), generator), rows(500)["c"])
    alone = taught.score_distillation(x, rows(500)["c"], 0.4, generator).item()
    assert terms[2]["scores"].item() == pytest.approx(0.4 * alone)


@pytest.mark.parametrize("predicts", ["sample", "v_prediction", "epsilon"])
def test_the_online_network_learns_what_the_student_makes(predicts: str) -> None:
    """The teacher's x_0 is off by (m_g - m) sigma^2 / V on samples of N(m_g, s^2)."""
    it, t = process(predicts), torch.arange(1000)

    def makes(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = M + 1 + S * x
        return x_0, (x - it.alpha(t) * x_0) / it.sigma(t)

    taught = lesson(SDXS(), student=network(it, makes), process=it)

    def loss(online: Any) -> float:
        return float(taught.online_loss(online, rows(4000), seeded())["denoising"])

    told = {"sample": 1, "v_prediction": 1 / it.sigma(t), "epsilon": it.alpha(t) / it.sigma(t)}
    wanted = float((told[predicts] * it.sigma(t) ** 2 / variance(it, t)).square().mean())
    assert loss(posterior(it)) - loss(posterior(it, M + 1)) == pytest.approx(wanted, rel=0.1)


def test_student_and_online_network_walk_to_the_data_together() -> None:
    it = process()

    class Online(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Parameter(torch.tensor(M))

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
            return posterior(it, self.m)(x, t, c)

    online, student = Online(), Shift(M + 2, S)
    options = SDXS(**UNGUIDED, steps=300, feature_share=0, feature_weight=(0, 0))
    taught = lesson(options, student=student, online=online)
    optimizers = [
        (online, taught.online_loss, torch.optim.SGD(online.parameters(), 0.3)),
        (student, taught.student_loss, torch.optim.SGD(student.parameters(), 0.1)),
    ]
    for step in range(options.steps):
        for player, loss, optimizer in optimizers:
            optimizer.zero_grad()
            sum(loss(player, rows(64, step), seeded(step)).values()).backward()
            optimizer.step()
    assert student.m.item() == pytest.approx(M, abs=0.1)
    assert online.m.item() == pytest.approx(M, abs=0.1)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    recipe = small_recipe(tmp_path, stage=[{"by": "sdxs"}])
    store = open_store(recipe.data, 0, tmp_path / "cache")
    teacher = tmp_path / "teacher"
    return Workshop(teacher, teacher, store, tmp_path, torch.device("cpu"))


def begun(shop: Workshop, **options: Any) -> Lesson:
    found = SDXS(**options).begin(shop).players["student"].loss.__self__
    assert isinstance(found, Lesson)
    return found


@torch.no_grad()
@pytest.mark.parametrize("straight", [False, True])
def test_psi_is_where_the_solver_gets_to_from_noise(
    shop: Workshop, tmp_path: Path, straight: bool
) -> None:
    """In one step: x_0 by the guided teacher, or by a straight one that predicts otherwise."""
    other = write_student(tmp_path / "other", widths=(8, 16), seed=1)
    teacher_folder(other, prediction_type="v_prediction")
    named = {"straight_teacher": str(other)} if straight else {}
    taught = begun(shop, solver_steps=1, guidance=3, **named)
    noise, (conditioning, nothing) = torch.randn(2, 4, 8, 8), cached_conditioning(shop)
    c, t = conditioning(np.array([6, 2])), torch.tensor([999, 999])
    unet = shop.load(other if straight else tmp_path / "teacher", "unet")
    it = Process.of(other if straight else tmp_path / "teacher", torch.device("cpu"))
    with_c, without = (unet(noise, t, told.expand_as(c)).sample for told in (c, nothing))
    output = with_c if straight else without + 3 * (with_c - without)
    assert it.predicts == ("v_prediction" if straight else "epsilon")
    psi = taught.solve(noise, c)
    assert torch.allclose(psi, it.x_0(output, noise, t), rtol=1e-3, atol=1e-3)
    assert taught.shape == noise.shape[1:]


def test_a_straight_teacher_of_another_family_is_refused(shop: Workshop, tmp_path: Path) -> None:
    other = write_student(tmp_path / "other")
    config = json.loads((other / "unet/config.json").read_text()) | {"cross_attention_dim": 24}
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_config(config).save_pretrained(other / "unet")
    with pytest.raises(EdgeflashError, match=r"^sdxs\.straight_teacher: cross_attention_dim 24 of"):
        begun(shop, straight_teacher=str(other))


def test_captions_are_all_it_takes(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = Workshop.load
    monkeypatch.setattr(Workshop, "load", lambda *a: loaded.append(a[2]) or load(*a))
    assert list(SDXS().begin(shop).batch(np.array([0]))) == ["c"]
    assert sorted(loaded) == ["text_encoder", "unet", "unet", "unet"]
    loaded.clear()
    assert list(SDXS(feature_share=1).begin(shop).players) == ["student"]
    assert loaded.count("unet") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": (0.5, 0.9)}, r"alpha \(0\.5, 0\.9\): from at most 1 it falls"),
        ({"alpha": (1.5, 0.9)}, r"from at most 1"),
        ({"alpha": (0.5, 0)}, r"but not to 0"),
        ({"feature_weight": (0.5, 1)}, r"feature_weight \(0\.5, 1\.0\): it falls"),
        ({"feature_weight": (1, -1)}, r"to 0 at the least"),
        ({"feature_weight": (0, 0)}, r"leaves the warm-up without a loss"),
    ],
)
def test_courses_that_rise_or_end_in_nothing_are_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        SDXS(**options)


def test_the_online_network_takes_more_turns_and_begins_in_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        before = getattr(Lesson, name)
        return lambda *given: turns.append(name) or before(*given)

    for name in ("online_loss", "student_loss"):
        monkeypatch.setattr(Lesson, name, noted(name))
    stage = {"by": "sdxs", "steps": 5, "batch_size": 2, "feature_share": 0.5, "solver_steps": 2}
    recipe = small_recipe(tmp_path, stage=[stage | {"online_updates": 2}], sampling=None)
    out = distill(recipe, tmp_path / "student")
    one, both = ["online_loss"], ["online_loss", "student_loss"]
    assert turns == both + one + both + one + both
    (told,) = json.loads((out / "edgeflash.json").read_text())["lineage"]["stages"]
    assert {"online/denoising", "student/features", "student/scores"} < told.keys()


def test_the_shipped_recipe_runs_scaled_down(tmp_path: Path) -> None:
    recipe = read_recipe(find_recipe("sdxs-512"))
    teacher = write_student(tmp_path / "teacher", tiny_decoder=False, widths=(8, 16, 16))
    turbo = write_student(tmp_path / "turbo", widths=(8, 16), seed=1)
    picture_folder(tmp_path / "in", 4, 16)
    given: dict[str, Any] = {"teacher": str(teacher), "data.path": str(tmp_path / "in")}
    given |= {"data.size_px": 16, "sdxs.straight_teacher": str(turbo)}
    given |= {"steps": 2, "batch_size": 2, "accumulate": 1, "sdxs.feature_share": 0.5}
    given |= {"decoder.width": 8, "decoder.blocks": [1, 1]}
    out = distill(changed(recipe, given), tmp_path / "student")
    told = json.loads((out / "edgeflash.json").read_text())
    assert list(told["schedules"]) == ["1"] and told["guidance"]["kind"] == "none"
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler" and scheduler["original_inference_steps"] == 1
    unet = json.loads((out / "unet/config.json").read_text())
    assert unet["mid_block_type"] is None and len(unet["down_block_types"]) == 2
    stages = {stage["by"]: stage for stage in told["lineage"]["stages"]}
    assert list(stages) == ["blocks", "sdxs", "decoder"]
    assert {"student/features", "student/scores"} < stages["sdxs"].keys()
