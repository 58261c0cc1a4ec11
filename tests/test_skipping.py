"""Blocks left out at random: what is left of a UNet, and of its gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from gaussian import seeded
from test_distill import small_recipe
from test_scm import unet
from tiny_student import WIDTH
from torch import Tensor, nn

from edgeflash.distill.by_blocks import Blocks
from edgeflash.distill.by_denoising import Denoising
from edgeflash.distill.data import open_store
from edgeflash.distill.draws import Part
from edgeflash.distill.skipping import Skipping
from edgeflash.distill.stage import Stage, Workshop

X, C, T = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH), torch.tensor([900, 20])


def call(network: Any) -> Tensor:
    told: Tensor = network(X, T, C).sample
    return told


def only(skipping: Skipping, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Has every draw leave out this block and no other."""
    drawn = torch.ones(len(skipping.blocks)).scatter(0, torch.tensor(block), 0.0)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)


def test_a_share_of_nothing_draws_nothing_and_touches_nothing() -> None:
    network, generator = unet(), seeded()
    before, state = call(network), generator.get_state()
    skipping = Skipping(network, 0.0)
    with skipping(generator):
        assert torch.equal(call(network), before)
    assert torch.equal(generator.get_state(), state)
    assert not any(module._forward_hooks for module in network.modules())


def test_every_resnet_and_transformer_can_go() -> None:
    """Of one layer a stage, a layer more a way up and 2 and 1 in the middle: all of them."""
    kinds = [type(block).__name__ for block in Skipping(unet(), 0.5).blocks]
    assert (kinds.count("ResnetBlock2D"), kinds.count("Transformer2DModel")) == (8, 4)
    resizes = ResnetBlock2D(in_channels=8, temb_channels=8, groups=4, down=True)
    assert not Skipping(resizes, 0.5).blocks


@pytest.mark.parametrize("block", range(12))
def test_a_block_left_out_is_the_network_with_nothing_in_its_branch(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros in a branch's last layer say the same by another way; its own weights learn nothing."""
    network = unet()
    whole, skipping = call(network), Skipping(network, 0.5)
    gone = skipping.blocks[block]
    last = "proj_out" if isinstance(gone, Transformer2DModel) else "conv2"
    emptied = unet()
    named = {id(module): name for name, module in network.named_modules()}
    layer = emptied.get_submodule(f"{named[id(gone)]}.{last}")
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    only(skipping, monkeypatch, block)
    with skipping(seeded()):
        left = call(network)
    assert torch.equal(left, call(emptied)) and not torch.allclose(left, whole, atol=1e-5)
    assert torch.equal(call(network), whole)
    left.sum().backward()
    shortcut = set(gone.conv_shortcut.parameters()) if getattr(gone, "conv_shortcut", None) else ()
    for weight in gone.parameters():
        assert weight.grad is not None and weight.grad.any() == (weight in shortcut)
    learns = [each for each in skipping.blocks if each is not gone]
    assert all(any(w.grad.any() for w in each.parameters()) for each in learns)


def test_an_average_is_whole_while_its_network_is_not() -> None:
    network = unet()
    skipping = Skipping(network, 0.999)
    average = copy.deepcopy(network)
    with skipping(seeded()):
        assert len(skipping.gone) == 12
        assert not torch.allclose(call(network), call(average), atol=1e-3)
    assert torch.equal(call(network), call(average))


def test_the_share_is_drawn_once_for_all_parts_of_a_step() -> None:
    skipping, counts = Skipping(unet(), 0.25), []
    for step in range(500):
        parts = []
        for index in range(2):
            with skipping(Part(0, step, index, 2, 8)):
                parts.append([id(block) for block in skipping.gone])
        assert parts[0] == parts[1]
        counts.append(len(parts[0]))
    assert np.mean(counts) / 12 == pytest.approx(0.25, abs=0.02) and len(set(counts)) > 3


@pytest.mark.parametrize("method", [Blocks, Denoising])
def test_methods_train_without_the_blocks_of_a_step(tmp_path: Path, method: Any) -> None:
    """With nearly all gone, the branches of the student's own blocks have gradients of zeros."""
    recipe = small_recipe(tmp_path)
    store, teacher = open_store(recipe.data, 0, tmp_path / "cache"), tmp_path / "teacher"
    shop = Workshop(teacher, teacher, store, tmp_path, torch.device("cpu"))
    small = {"widths": (16, 32), "layers_per_block": 1} if method is Denoising else {}
    small |= {"rule": "small"} if method is Blocks else {}

    def learnt(share: float) -> list[bool]:
        stage: Stage = method(skip=share, **small).begin(shop)
        (player,) = stage.players.values()
        terms = player.loss(player.network, stage.batch(np.arange(4)), seeded())
        torch.stack(list(terms.values())).sum().backward()
        return [
            bool(weight.grad.any())
            for name, weight in player.network.named_parameters()
            if name.endswith(("conv2.weight", "proj_out.weight")) and weight.grad is not None
        ]

    assert all(learnt(0.0)) and not any(learnt(0.999))
