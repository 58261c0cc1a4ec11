"""How a teacher is trained from nothing: at which times, and on whose mistakes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distill import small_recipe
from torch import Tensor

from edgeflash import shapes
from edgeflash.distill.by_denoising import Denoising
from edgeflash.distill.data import open_store
from edgeflash.distill.encoded import cached_conditioning
from edgeflash.distill.ends import join
from edgeflash.distill.process import Process
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.schedule import lower_schedule

CPU = torch.device("cpu")


def test_denoising_looks_more_at_noisy_times_when_asked() -> None:
    def mean(power: float) -> float:
        options = Denoising(timestep_power=power)
        t = options.times(20_000, 1000, torch.Generator().manual_seed(0))
        assert t.min() >= 0 and t.max() == 999
        return float(t.float().mean())

    assert mean(1) == pytest.approx(499.5, abs=6) and mean(0.5) == pytest.approx(666, abs=6)


def test_a_stochastic_sampler_is_ddim_of_eta_1() -> None:
    """arXiv 2010.02502, eq. 16; but for the rounding of diffusers at the end."""
    ddim, ddpm = (Denoising(stochastic=on, betas="linear").scheduler() for on in (False, True))
    abar = ddim.alphas_cumprod.double()
    assert torch.equal(ddpm.alphas_cumprod.double(), abar)
    straight, wandering = (lower_schedule(sampler, 25) for sampler in (ddim, ddpm))
    assert [s.t for s in straight.steps] == [s.t for s in wandering.steps]
    for step, later in pairwise(wandering.steps):
        here, there = abar[int(step.t)], abar[int(later.t)]
        sigma = ((1 - there) / (1 - here) * (1 - here / there)).sqrt()
        assert step.c == pytest.approx(float(sigma), rel=1e-4)
    assert wandering.steps[-1].c < 1e-9 and not any(step.c for step in straight.steps)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    recipe = small_recipe(tmp_path, data={"kind": "shapes", "samples": 32}, seed=3)
    store = open_store(recipe.data, recipe.seed, tmp_path / "cache")
    return Workshop(None, tmp_path / "teacher", store, tmp_path, CPU)


class Told(torch.nn.Module):
    """A network that remembers what it is shown, and answers as it was told to."""

    def __init__(self, process: Process, x_0: Tensor) -> None:
        super().__init__()
        self.process, self.x_0 = process, x_0

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Told:
        self.x_t, self.t, self.c = x_t, t, c
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        self.sample = (alpha * x_t - self.x_0) / sigma  # v
        return self


def test_mistakes_are_in_what_is_shown_and_not_in_what_is_wanted(shop: Workshop) -> None:
    def shown(mistakes: float) -> tuple[Told, dict[str, Tensor], float]:
        stage = Denoising(widths=(16, 16), mistakes=mistakes).begin(shop)
        batch = stage.batch(np.arange(32))
        told = Told(Process.of(shop.folder, CPU), batch["x_0"])
        terms = stage.players["unet"].loss(told, batch, torch.Generator().manual_seed(0))
        return told, batch, float(terms["denoising"])

    plain, _, loss = shown(0)
    assert loss < 1e-5
    told, batch, loss = shown(1)
    assert loss < 1e-5
    alpha, sigma = (of(plain.t) for of in (told.process.alpha, told.process.sigma))
    wrong = alpha * sigma * (batch["mistaken"] - batch["x_0"])
    moved, size = told.x_t - plain.x_t, wrong.square().sum((1, 2, 3))
    parts = (moved * wrong).sum((1, 2, 3)) / size.clamp(min=1e-9)
    assert torch.equal(plain.t, told.t) and torch.equal(plain.c, told.c)
    assert (moved - parts[:, None, None, None] * wrong).abs().max() < 1e-4
    _, nothing = cached_conditioning(shop)
    empty = (told.c == nothing).all(2).all(1)
    assert empty.any() and not parts[empty].any()
    some = parts[~empty & (size > 0)]
    assert some.min() > 0 and some.max() < 1 and some.std() > 0.1


def test_a_warm_stage_goes_on_from_the_unet_that_is_there(shop: Workshop) -> None:
    sizes = {"widths": (16, 16), "layers_per_block": 1}
    before = Denoising.model_validate(sizes).begin(shop).results["unet"]
    torch.nn.init.constant_(before.conv_in.bias, 3)
    before.save_pretrained(str(shop.student / "unet"))
    cold, warm = (
        Denoising.model_validate(sizes | {"warm": on}).begin(shop).results["unet"]
        for on in (False, True)
    )
    weights = before.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in warm.state_dict().items())
    assert not torch.equal(cold.conv_in.bias, before.conv_in.bias)
    assert warm.training

    with pytest.raises(EdgeflashError, match=r"another network .*differs: block_out_channels\)"):
        Denoising.model_validate(sizes | {"widths": (32, 32), "warm": True}).begin(shop)
    shutil.rmtree(shop.student / "unet")
    with pytest.raises(EdgeflashError, match="no earlier stage has made a UNet"):
        Denoising.model_validate(sizes | {"warm": True}).begin(shop)


def test_the_mean_of_the_ends_of_stages_is_saved(shop: Workshop, tmp_path: Path) -> None:
    sizes = {"widths": (16, 16), "layers_per_block": 1}
    work, values = tmp_path / "run", {"2-denoising": 1.0, "3-denoising": 3.0}
    for name, value in values.items():
        unet = Denoising.model_validate(sizes).begin(shop).results["unet"]
        torch.nn.init.constant_(unet.conv_in.bias, value)
        shutil.copytree(shop.student, work / name / "student")
        unet.save_pretrained(str(work / name / "student" / "unet"))
    last = replace(shop, student=work / "3-denoising" / "student", folder=work / "4-denoising")

    def saved(ends: int) -> set[float]:
        stage = Denoising.model_validate(sizes | {"warm": True, "ema": 0.9}).begin(last)
        join(stage, "denoising", ends, last)
        average = stage.averages["unet"].module
        torch.nn.init.constant_(average.conv_in.bias, 8)
        stage.finish(stage.final())
        return {*stage.final()["unet"].conv_in.bias.tolist()}

    assert (saved(1), saved(2), saved(3)) == ({8.0}, {5.5}, {4.0})
    with pytest.raises(EdgeflashError, match=r"denoising.ends = 4: there are not so many stages"):
        saved(4)
    with pytest.raises(EdgeflashError, match=r"denoising.ends: .*2-denoising.* another network"):
        shutil.rmtree(work / "2-denoising" / "student" / "unet")
        wide = Denoising.model_validate(sizes | {"widths": (32, 32)}).begin(shop).results["unet"]
        wide.save_pretrained(str(work / "2-denoising" / "student" / "unet"))
        saved(3)


def test_mistaken_scenes_stand_where_the_right_ones_do(shop: Workshop) -> None:
    right, wrong = shop.store.pictures(np.arange(32)), shop.store.mistaken(np.arange(32))
    scenes = [shapes.scene(3, i) for i in range(32)]
    others = [shapes.mistaken(scene, 3, i) for i, scene in enumerate(scenes)]
    same = [scene == other for scene, other in zip(scenes, others, strict=True)]
    assert 0 < sum(same) < 16
    assert [torch.equal(a, b) for a, b in zip(right, wrong, strict=True)] == same
    hues = list(shapes.COLOURS)
    for scene, other in zip(scenes, others, strict=True):
        assert (scene.arrangement, scene.background) == (other.arrangement, other.background)
        for thing, shown in zip(scene.things, other.things, strict=True):
            away = (hues.index(thing.colour) - hues.index(shown.colour)) % len(hues)
            assert thing.size == shown.size and away in (0, 1, len(hues) - 1)
