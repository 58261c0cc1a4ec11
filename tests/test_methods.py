"""The formulas of the methods, against closed forms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    LCMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from edgeflash import shapes
from edgeflash.architecture import spelled
from edgeflash.blueprints import SDXL
from edgeflash.distill.by_blocks import (
    Blocks,
    feature_pairs,
    prune,
    pruned_config,
    teacher_name,
)
from edgeflash.distill.by_lcm import LCM, Lesson
from edgeflash.distill.by_reading import as_named
from edgeflash.distill.consistency import TIMESTEP_SCALING, consistency
from edgeflash.distill.discriminators import hinge_critic, least_squares_critic
from edgeflash.distill.features import Taps
from edgeflash.distill.losses import pseudo_huber
from edgeflash.distill.process import Process
from edgeflash.distill.teacher import guided
from edgeflash.distill.witness import Witness
from edgeflash.errors import EdgeflashError

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = SD15 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SMALL = SD15 | {
    "sample_size": 16,
    "block_out_channels": [8, 16, 24, 24],
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def process(predicts: Any = "epsilon") -> Process:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Process(DDPMScheduler(**betas).alphas_cumprod, predicts)


def test_the_process_has_stable_diffusions_numbers() -> None:
    t = torch.tensor([0, 499, 999])
    assert process().abar[t].tolist() == pytest.approx([0.999150, 0.277670, 0.004660], rel=1e-3)
    assert process().sigma(t).flatten().tolist() == pytest.approx([0.02915, 0.84990, 0.99767], 1e-3)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_output_gives_back_sample_and_noise(predicts: str) -> None:
    torch.manual_seed(0)
    x_0, eps, t = (
        torch.randn(5, 4, 2, 2),
        torch.randn(5, 4, 2, 2),
        torch.tensor([1, 9, 99, 500, 999]),
    )
    it = process(predicts)
    x_t, output = it.noised(x_0, eps, t), it.target(x_0, eps, t)
    assert torch.allclose(it.x_0(output, x_t, t), x_0, atol=2e-4)
    assert torch.allclose(it.eps(output, x_t, t), eps, atol=2e-4)
    assert torch.allclose(it.ddim(x_0, eps, t), x_t, atol=1e-6)


def test_below_the_first_timestep_a_sample_is_clean() -> None:
    x_0, eps, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([-1, -1])
    assert torch.equal(process().ddim(x_0, eps, t), x_0)


def test_noise_that_ends_without_signal_is_no_epsilon_predictors(tmp_path: Path) -> None:
    for predicts in ("epsilon", "v_prediction"):
        config = {"prediction_type": predicts, "rescale_betas_zero_snr": True}
        DDPMScheduler(**config).save_pretrained(str(tmp_path / predicts / "scheduler"))
    assert Process.of(tmp_path / "v_prediction", torch.device("cpu")).abar[-1] == 0
    with pytest.raises(EdgeflashError, match=r"ends without signal .* says epsilon: mend"):
        Process.of(tmp_path / "epsilon", torch.device("cpu"))


def test_a_prediction_that_methods_do_not_know_is_refused(tmp_path: Path) -> None:
    UniPCMultistepScheduler(prediction_type="flow_prediction").save_pretrained(
        str(tmp_path / "scheduler")
    )
    with pytest.raises(EdgeflashError, match=r"prediction_type 'flow_prediction', but .* epsilon"):
        Process.of(tmp_path, torch.device("cpu"))


def test_without_terminal_signal_the_noise_is_rescaled_as_published(tmp_path: Path) -> None:
    """arXiv 2305.08891, alg. 1, on Stable Diffusion's betas."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    DDPMScheduler.from_config(scheduler.config, **config).save_pretrained(
        str(tmp_path / "scheduler")
    )
    it = Process.of(tmp_path, torch.device("cpu"))
    found = it.abar[torch.tensor([249, 499, 749, 999])].tolist()
    assert found == pytest.approx([0.65419, 0.24236, 0.03317, 0], abs=1e-5)


def test_v_is_the_velocity_diffusers_computes() -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    x_0, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([3, 400, 950])
    theirs = DDPMScheduler(**betas).get_velocity(x_0, eps, t)
    assert torch.allclose(process("v_prediction").target(x_0, eps, t), theirs, atol=1e-5)


def test_guidance_follows_lcms_convention_and_makes_one_call() -> None:
    """w = 0 is the conditional branch; CFG with scale s is w = s - 1."""
    calls = []

    def unet(x: Tensor, t: Tensor, c: Tensor) -> Any:
        calls.append(len(x))
        return SimpleNamespace(sample=x * 0 + c.mean((1, 2))[:, None, None, None])

    x, t = torch.zeros(2, 4, 2, 2), torch.tensor([500, 500])
    c, nothing = torch.full((2, 3, 5), 3.0), torch.ones(1, 3, 5)
    w = torch.tensor([0.0, 6.5])
    _, eps = guided(unet, process(), x, t, c, nothing, w)
    assert calls == [4]
    assert eps[:, 0, 0, 0].tolist() == pytest.approx([3.0, 1 + 7.5 * (3 - 1)])


def test_lcms_boundary_scalings_and_grid() -> None:
    lcm = LCM()
    c_skip, c_out = process().scalings(torch.tensor([0, 19, 999]), TIMESTEP_SCALING)
    assert c_skip.flatten().tolist() == pytest.approx([1, 6.925e-6, 2.5e-9], rel=1e-2)
    assert c_out.flatten().tolist() == pytest.approx([0, 1, 1], abs=1e-5)
    t, s = lcm.times(torch.arange(50), 1000)
    assert t.tolist() == list(range(19, 1000, 20)) and s.tolist() == [0, *range(19, 980, 20)]
    theirs = LCMScheduler().get_scalings_for_boundary_condition_discrete(torch.tensor(19))
    assert [float(v) for v in theirs] == pytest.approx([float(c_skip[1]), float(c_out[1])])


def test_the_huber_distance_is_zero_at_zero_and_l1_far_away() -> None:
    a = torch.randn(4, 4)
    assert float(pseudo_huber(a, a, 1e-3)) == pytest.approx(0, abs=1e-9)
    assert float(pseudo_huber(a, a + 5, 1e-3)) == pytest.approx(5, rel=1e-3)


def test_the_exact_consistency_map_of_a_gaussian_has_no_lcm_loss() -> None:
    """x_0 ~ N(m, s^2): teacher E[x_0|x_t], student f* = m + s (x - alpha m) / sqrt(V)."""
    m, s, it, lcm = 0.7, 0.5, process("sample"), LCM()

    def parts(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, variance = it.alpha(t), it.alpha(t) ** 2 * s**2 + it.sigma(t) ** 2
        return alpha, variance, x - alpha * m

    def posterior(x: Tensor, t: Tensor, c: Tensor) -> Any:
        alpha, variance, gap = parts(x, t)
        return SimpleNamespace(sample=m + alpha * s**2 / variance * gap)

    def exact(x: Tensor, t: Tensor, c: Tensor) -> Any:
        _, variance, gap = parts(x, t)
        return SimpleNamespace(sample=m + s * gap / variance.sqrt())

    def loss(student: Any) -> float:
        torch.manual_seed(0)
        x_0, eps = m + s * torch.randn(500, 1, 2, 2), torch.randn(500, 1, 2, 2)
        t, below = lcm.times(torch.randint(2, 50, (500,)), 1000)
        x_t, c = it.noised(x_0, eps, t), torch.zeros(500, 1, 1)
        clean, noise = guided(posterior, it, x_t, t, c, c[:1], torch.zeros(500))
        x_s = it.ddim(clean, noise, below)
        ours = consistency(student, it, x_t, t, c)
        return float(pseudo_huber(ours, consistency(student, it, x_s, below, c), 1e-6))

    assert loss(exact) < 0.002  # the solver's own error at 50 steps
    assert loss(posterior) > 5 * loss(exact)


@torch.no_grad()
def test_an_lcm_student_is_met_where_its_own_sampler_stands() -> None:
    """With the exact map of x_0 ~ N(m, s^2), x at t is N(alpha m, alpha^2 s^2 + sigma^2)."""
    m, s, it, lcm = 0.7, 0.2, process("sample"), LCM(ddim_steps=20, own_steps=4)

    def exact(x: Tensor, t: Tensor, c: Tensor) -> Any:
        spread = (it.alpha(t) ** 2 * s**2 + it.sigma(t) ** 2).sqrt()
        return SimpleNamespace(sample=m + s * (x - it.alpha(t) * m) / spread)

    scheduler = LCMScheduler(original_inference_steps=20)
    ways = [way.tolist() for way in lcm.ways()]
    scheduler.set_timesteps(3)
    three = [(int(t) + 1) // 50 - 1 for t in scheduler.timesteps]
    assert ways[0] == [19] and ways[3:] == [
        three[:1], three[:2], three, [19], [19, 14], [19, 14, 9], [19, 14, 9, 4]
    ]  # fmt: skip
    lesson = Lesson(lcm, None, None, it, torch.zeros(1), [], None)
    noise, generator = torch.randn(4000, 1, 2, 2), torch.Generator().manual_seed(0)
    x = lesson.own(exact, noise, torch.tensor([19, 14, 4]), noise, generator)
    t = torch.tensor([249])
    assert float(x.mean()) == pytest.approx(float(it.alpha(t)) * m, rel=0.03)
    spread = (it.alpha(t) ** 2 * s**2 + it.sigma(t) ** 2).sqrt()
    assert float(x.std()) == pytest.approx(float(spread), rel=0.03)
    assert lesson.own(exact, noise, torch.tensor([19]), noise, generator) is noise


@torch.no_grad()
def test_an_auxiliary_classifier_doubts_wrong_objects_and_nothing_else() -> None:
    torch.manual_seed(0)
    betas = torch.linspace(1e-4, 0.02, 1000)
    witness = Witness(4, 16, Process((1 - betas).cumprod(0), "v_prediction"))
    x_0, labels = torch.randn(6, 4, 16, 16), torch.from_numpy(shapes.batch(0, range(6))[2])
    t = None
    labels[3:, 5:] = -1  # one object

    def doubt(labels: torch.Tensor) -> torch.Tensor:
        return witness.doubt(x_0, labels, torch.Generator().manual_seed(1), t)

    def changed(column: int) -> torch.Tensor:
        other = labels.clone()
        other[:, column] = torch.where(other[:, column] < 0, -1, 1 - other[:, column].clamp(max=1))
        return doubt(other) != doubt(labels)

    assert not any(changed(column).any() for column in (0, 1))  # place, background
    assert all(changed(column).all() for column in (2, 3, 4))
    assert all(changed(column).tolist() == [True] * 3 + [False] * 3 for column in (5, 6, 7))
    nothing_known = 4 * np.log(6) + 2 * np.log(2)
    assert doubt(labels)[:3].mean() == pytest.approx(nothing_known, rel=0.1)
    t = torch.full((6,), 1000)  # no shape can be told
    assert not changed(2).any() and changed(3).all()


def test_the_critics_margin() -> None:
    assert float(hinge_critic(torch.ones(3), -torch.ones(3))) == 0
    assert float(hinge_critic(torch.zeros(3), torch.zeros(3))) == 2


def test_least_squares_part_real_from_made() -> None:
    assert float(least_squares_critic(torch.zeros(3), torch.zeros(3))) == 0.25
    sure = torch.full((3,), 9.0)
    assert (
        float(least_squares_critic(sure, -sure)) < 1e-6 < float(least_squares_critic(-sure, sure))
    )


@pytest.mark.parametrize(
    ("config", "rule", "count"),
    [
        (SD15, "base", 579_384_964),
        (SD15, "small", 482_346_884),
        (SD15, "tiny", 323_384_964),
        (SD21, "base", 583_480_964),
        (SD21, "small", 485_787_524),
        (SD21, "tiny", 326_825_604),
        (SD21, "sdxs", 318_695_364),
        (SD21, "sdxs-0.9", 328_177_284),  # SDXS-512-0.9
        (SD15, "sdxs", 315_746_244),  # SDXS-512-DreamShaper
        (spelled(SDXL), "vega", 745_225_604),  # Segmind-Vega, where SDXS-1024 starts
    ],
)
def test_rules_reproduce_the_published_parameter_counts(
    config: dict[str, Any], rule: Any, count: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pruned_config(config, rule))
    assert sum(p.numel() for p in unet.parameters()) == count


@pytest.mark.parametrize(
    ("name", "dropped", "source"),
    [
        ("up_blocks.1.resnets.0.conv1.weight", 0, "up_blocks.1.resnets.0.conv1.weight"),
        ("up_blocks.1.resnets.1.conv1.weight", 0, "up_blocks.1.resnets.2.conv1.weight"),
        ("up_blocks.1.attentions.1.norm.bias", 0, "up_blocks.1.attentions.2.norm.bias"),
        ("up_blocks.0.resnets.1.conv1.bias", 1, "up_blocks.1.resnets.2.conv1.bias"),
        ("up_blocks.0.upsamplers.0.conv.bias", 1, "up_blocks.1.upsamplers.0.conv.bias"),
        ("down_blocks.1.resnets.0.conv1.bias", 1, "down_blocks.1.resnets.0.conv1.bias"),
        ("conv_in.weight", 1, "conv_in.weight"),
    ],
)
def test_weights_come_from_where_bk_sdm_takes_them(name: str, dropped: int, source: str) -> None:
    assert teacher_name(name, dropped, [(1, 2)] * 4) == source


POOLED = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}


@pytest.mark.parametrize("extra", [{}, POOLED], ids=["plain", "pooled"])
@pytest.mark.parametrize("rule", ["base", "small", "tiny", "sdxs"])
def test_a_pruned_unet_copies_what_it_keeps_and_its_features_line_up(
    rule: Any, extra: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(SMALL | extra)
    student, copied = prune(teacher, rule)
    assert student.config.addition_embed_type == extra.get("addition_embed_type")
    assert copied > 0.99  # all that remains has a source when the two innermost widths agree
    last = student.up_blocks[0].resnets[1].conv1.weight
    dropped = len(teacher.up_blocks) - len(student.up_blocks)
    assert torch.equal(last, teacher.up_blocks[dropped].resnets[2].conv1.weight)
    pairs = feature_pairs(teacher, student)
    taught, learnt = Taps([t for t, _ in pairs]), Taps([s for _, s in pairs])
    x, t, c = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 3, 12)
    teacher(x, t, c), student(x, t, c)
    assert [o.shape for o in taught.outputs] == [o.shape for o in learnt.outputs]
    assert len(pairs) == 2 * len(student.up_blocks)


def neutral(teacher: UNet2DConditionModel, mid: bool) -> None:
    """Blocks that "base" removes hand on what they get, and with ``mid`` those of "small"."""
    lost: list[nn.Module] = []
    for block in (*teacher.down_blocks, *teacher.up_blocks):
        lost += [block.resnets[1].conv2]
        lost += [block.attentions[1].proj_out] if hasattr(block, "attentions") else []
    if mid:
        lost += [*(r.conv2 for r in teacher.mid_block.resnets)]
        lost += [a.proj_out for a in teacher.mid_block.attentions]
    for layer in lost:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in teacher.up_blocks:  # what comes from below goes on, what comes across does not
        shortcut = block.resnets[1].conv_shortcut
        nn.init.dirac_(shortcut.weight)
        nn.init.zeros_(shortcut.bias)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["base", "small"])
def test_blocks_that_did_nothing_are_not_missed(rule: Any) -> None:
    """Catches every slip of an index when weights are copied, and when outputs are paired."""
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(SMALL)
    neutral(teacher, mid=rule == "small")
    student = prune(teacher, rule)[0].double()
    pairs = feature_pairs(teacher.double(), student)
    taught, learnt = Taps([t for t, _ in pairs]), Taps([s for _, s in pairs])
    x, t, c = torch.randn(1, 4, 16, 16).double(), torch.tensor([7]), torch.randn(1, 3, 12).double()
    assert torch.equal(teacher(x, t, c).sample, student(x, t, c).sample)
    assert all(map(torch.equal, taught.outputs, learnt.outputs))


def test_relative_features_count_the_same_at_every_size() -> None:
    learnt, taught = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    relative, plain = Blocks(relative_features=True), Blocks()
    small, large = ([learnt * k, taught * k] for k in (1.0, 50.0))
    assert float(relative.distance(*large)) == pytest.approx(float(relative.distance(*small)))
    assert float(plain.distance(*large)) == pytest.approx(2500 * float(plain.distance(*small)))


def test_nothing_left_to_prune_is_said() -> None:
    base = pruned_config(SMALL, "base")
    with pytest.raises(EdgeflashError, match="nothing to remove"):
        pruned_config(base, "base")
    one = {k: v[:1] if isinstance(v, list) else v for k, v in SMALL.items()}
    with pytest.raises(EdgeflashError, match="one stage"):
        pruned_config(one, "tiny")


def test_objects_count_as_named_where_no_relation_is_told() -> None:
    scene = shapes.Scene(
        (shapes.Thing("star", "red", "small"), shapes.Thing("ring", "blue", "large")),
        "horizontal",
        "white",
    )
    told = ["a blue ring and a red star", "a red star with a blue ring"]
    told += ["a large blue ring right of a red star", "a red star"]
    labels = np.stack([scene.labels()] * 4)
    labels[3, 5:] = -1
    swapped = labels.copy()
    swapped[0] = [*labels[0, :2], *labels[0, 5:], *labels[0, 2:5]]
    assert (as_named(told, labels) == swapped).all()
