"""Critics of transformers: where they look, and what the methods that have one do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from gaussian import seeded
from PIL import Image
from tiny_pixart import write_pixart
from tiny_sd3 import write_sd3
from torch import Tensor

from edgeflash.distill.by_dmd import DMD
from edgeflash.distill.by_flash import Flash
from edgeflash.distill.by_gan import Diffusion2GAN
from edgeflash.distill.by_imagine import Imagine
from edgeflash.distill.by_ufogen import UFOGen
from edgeflash.distill.data import open_store
from edgeflash.distill.discriminators import DenoiserCritic, EncoderCritic, FrozenCritic
from edgeflash.distill.encoded import cached_conditioning
from edgeflash.distill.inner import EncoderHalf
from edgeflash.distill.stage import Workshop
from edgeflash.recipe import Data
from edgeflash.roles import Method

ROWS = np.arange(2)


def teacher(family: str, home: Path) -> Path:
    """A small one of three blocks, so that there is one behind the middle."""
    folder = write_pixart(home) if family == "pixart" else write_sd3(home, t5=False)
    config = json.loads((folder / "transformer/config.json").read_text())
    kind = getattr(diffusers, config["_class_name"])
    torch.manual_seed(0)
    kind.from_config(config | {"num_layers": 3}).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module", params=["pixart", "sd3"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    home = tmp_path_factory.mktemp(request.param)
    folder, pictures = teacher(request.param, home / "teacher"), home / "in"
    pictures.mkdir()
    for i, caption in enumerate(("a red star", "blue ring")):
        Image.new("RGB", (16, 16), (60 * i, 99, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(caption)
    store = open_store(Data(kind="folder", path=str(pictures), size_px=16), 0, home / "cache")
    return Workshop(folder, folder, store, home, torch.device("cpu"))


@pytest.fixture
def whole(shop: Workshop) -> Any:
    return shop.load(shop.student, shop.denoiser)


@pytest.fixture
def given(shop: Workshop, whole: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and c; four rows of two patches each."""
    conditioning, _ = cached_conditioning(shop)
    x_t = torch.randn(2, whole.config.in_channels, 8, 4, generator=seeded(), requires_grad=True)
    return x_t, torch.tensor([20.0, 700.0]), conditioning(ROWS).float()


def test_a_half_is_the_whole_up_to_its_middle_block(whole: Any, given: Any) -> None:
    ran: list[str] = []
    seen: list[Tensor] = []
    for name, module in whole.named_modules():
        if name.rpartition(".")[0] == "transformer_blocks" or name in ("norm_out", "proj_out"):

            def note(_: Any, __: Any, output: Any, name: str = name) -> None:
                ran.append(name)
                seen.append(output if isinstance(output, Tensor) else output[-1])

            module.register_forward_hook(note)
    whole(*given)
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    assert ran == [*blocks, "norm_out", "proj_out"]
    ran.clear()
    found = EncoderHalf(whole)(*given)
    assert ran == blocks[:2] and found.shape == (2, 24, 4, 2)
    assert torch.equal(found.flatten(2).mT, seen[1])
    found.square().sum().backward()
    assert given[0].grad.abs().sum() > 0


def test_a_denoiser_that_judges_still_denoises(whole: Any, given: Any) -> None:
    wanted, features = whole(*given).sample, EncoderHalf(whole)(*given)
    critic = DenoiserCritic(whole)
    told = critic(*given)
    assert torch.equal(told.sample, wanted) and told.logits.shape == (2, 1)
    assert torch.equal(told.logits, critic.head(features))
    told.logits.square().sum().backward()
    assert whole.pos_embed.proj.weight.grad.abs().sum() > 0
    assert whole.proj_out.weight.grad is None and given[0].grad.abs().sum() > 0


def test_frozen_halves_judge_patches_and_trained_ones_learn_all_they_have(
    whole: Any, given: Any
) -> None:
    trained = EncoderCritic(whole)
    assert (trained(*given) == 0).all()
    for weight in trained.head[-1].parameters():
        torch.nn.init.ones_(weight)
    trained(*given).sum().backward()
    idle = {name for name, weight in trained.named_parameters() if weight.grad is None}
    text = {name for name in idle if "transformer_blocks.1" in name}  # SD 3's, for a later block
    assert idle == text and bool(text) == (whole.config.get("joint_attention_dim") is not None)
    frozen = FrozenCritic(whole.requires_grad_(False))
    assert all(name.startswith("head.") for name in frozen.state_dict())
    (x_t, t, c), given[0].grad = given, None
    assert frozen(x_t, t, c).shape == (2, 1, 2, 1)
    frozen(x_t, t, c).square().sum().backward()
    assert x_t.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "method",
    [
        DMD(denoising_steps=2, gan_weight=1e-3),
        Flash(teacher_steps=2, modes=((1, 0),), dmd_weights=(0.3,), gan_weights=(0.1,)),
        Imagine(denoising_steps=2, teacher_steps=1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_students_are_taught_by_critics_of_transformers(shop: Workshop, method: Method) -> None:
    a_turn_each(shop, method)


@pytest.mark.parametrize("shop", ["pixart"], indirect=True)  # the other is a flow
@pytest.mark.parametrize(
    "method", [UFOGen(logit_clamp=100), Diffusion2GAN(solver_steps=2)], ids=("ufo", "gan")
)
def test_gans_of_noise_take_transformers_too(shop: Workshop, method: Method) -> None:
    a_turn_each(shop, method)


def a_turn_each(shop: Workshop, method: Method) -> None:
    """Student and critic are moved by what the critic says, and all of them learns something."""
    stage = method.begin(shop)
    batch = stage.batch(ROWS) | {"step": torch.tensor(1)}
    for player in stage.players.values():
        for weight in player.network.parameters():
            if not weight.any():  # such as those that have UFOGen's critic say nothing at first
                torch.nn.init.constant_(weight, 0.1)
    for name, player in stage.players.items():
        terms = player.loss(player.network, batch, seeded())
        weights = list(player.network.parameters())
        judged = terms["adversarial" if name == "student" else "critic"]
        moves = torch.autograd.grad(judged, weights, retain_graph=True, allow_unused=True)
        assert sum(float(move.abs().sum()) for move in moves if move is not None) > 0
        whole = torch.stack(list(terms.values())).sum()
        assert all(move.isfinite().all() for move in torch.autograd.grad(whole, weights))
