"""Heads on frozen features: scores, losses, gradient penalty, and the feature networks."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL
from gaussian import seeded
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from edgeflash.distill.by_add import ADD
from edgeflash.distill.features import encoder_features, vision_features
from edgeflash.distill.heads import Head, Heads, LocalBatchNorm, fooling, hinge, r1
from edgeflash.errors import EdgeflashError

CPU = torch.device("cpu")


def write_vision_transformer(folder: Path) -> str:
    """DINOv2 with two blocks and four patches, and the file that tells how it wants pictures."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    told = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return str(folder)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("condition", [0, 5])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_a_head_scores_every_place_of_any_map(
    dims: Literal[1, 2], condition: int, size: tuple[int, int]
) -> None:
    head = Head(12, condition, 8, dims)
    told = random(3, condition, seed=1) if condition else None
    scores = head(random(3, 12, *size), told)
    assert scores.shape == (3, size[0] * size[1])
    if told is not None:
        assert (head(random(3, 12, *size), 2 * told) - scores).abs().max() > 1e-3


def test_local_batch_norm_sees_eight_samples_at_the_most() -> None:
    x = random(11, 4, 6) * 3 + 1
    norm = LocalBatchNorm(4).requires_grad_(False)
    alike = torch.cat([norm(x[:6]), norm(x[6:])])
    assert torch.allclose(norm(x), alike) and norm(x)[:6].mean().abs() < 1e-6
    assert float(norm(x)[:6].square().mean()) == pytest.approx(1, abs=1e-4)


def test_scores_beyond_the_margin_cost_a_critic_nothing() -> None:
    sure = [torch.ones(2, 3), torch.ones(2, 5)]
    other = [-s for s in sure]
    assert float(hinge(sure, other)) == 0 and float(hinge(other, sure)) == 8
    assert float(fooling(sure)) == -2


def test_r1_is_on_what_the_heads_are_given() -> None:
    a, maps = random(12), [random(4, 3, 2, 2).requires_grad_()]
    linear = [maps[0].flatten(1) @ a[:, None]]
    assert float(r1(linear, maps).detach()) == pytest.approx(float(a.square().sum()), rel=1e-5)
    constant = [0 * maps[0].flatten(1)]
    assert float(r1(constant, maps).detach()) == 0

    head, x = Head(3, 0, 8, 1).double(), random(2, 3, 3, 3).double().requires_grad_()
    for _ in range(20):
        head(x, None)  # until the power iterations stand still
    head.eval()
    ours = float(r1([head(x, None)], [x]).detach())
    steps = 1e-5 * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    slopes = [float((head(x + h, None) - head(x - h, None)).sum()) / 2e-5 for h in steps]
    assert ours == pytest.approx(sum(slope**2 for slope in slopes) / len(x), rel=1e-3)


def test_heads_learn_to_tell_two_sorts_of_features_apart() -> None:
    torch.manual_seed(0)
    heads = Heads([Head(4, 2, 8, 1), Head(6, 2, 8, 2)])
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    told = random(8, 2)
    real = [random(8, 4, 4, 4), random(8, 6, 4, 4)]
    fake = [features[:, :1].expand_as(features) for features in real]
    losses = []
    for _ in range(30):
        loss = hinge(heads(real, told), heads(fake, told))
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert fooling(heads(real, told)) < fooling(heads(fake, told))


def sees(name: str, tmp_path: Path) -> Any:
    if name == "encoder":
        blocks = ("DownEncoderBlock2D",) * 2
        sizes = {"block_out_channels": (8, 8), "down_block_types": blocks, "norm_num_groups": 4}
        vae = AutoencoderKL(**sizes, up_block_types=("UpDecoderBlock2D",) * 2)
        return encoder_features(vae.requires_grad_(False))
    if name == "vision":
        return vision_features(write_vision_transformer(tmp_path / "dino"), CPU)
    shop: Any = SimpleNamespace(teacher=tmp_path, device=CPU, store=SimpleNamespace(labels=[0]))
    return ADD(features="judge").feature_network(shop)


@pytest.mark.parametrize(
    ("name", "widths", "embedding"),
    [
        ("encoder", [8, 8, 8], 8),
        ("judge", [32, 64, 96, 128, 128], 128),
        ("vision", [16] * 5, 16),
    ],
)
def test_feature_networks_are_frozen_and_hand_gradients_on(
    tmp_path: Path, name: str, widths: list[int], embedding: int
) -> None:
    see, pictures = sees(name, tmp_path), random(2, 3, 64, 64).tanh().requires_grad_()
    maps, whole = see(pictures)
    assert [m.shape[:2] for m in maps] == [(2, width) for width in widths]
    assert whole.shape == (2, embedding)
    torch.stack([m.square().mean() for m in maps]).sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0
    other, _ = see(pictures.detach().roll(1, 0))
    assert not torch.equal(other[0], maps[0]), "what was seen before is kept"


def test_an_encoder_that_judges_keeps_no_decoder() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    judges, decoder = encoder_features(vae), weakref.ref(vae.decoder)
    del vae
    gc.collect()
    assert decoder() is None and judges(torch.zeros(1, 3, 8, 8))[1].shape == (1, 8)


def test_pictures_are_told_as_the_vision_transformer_was_trained(tmp_path: Path) -> None:
    folder = write_vision_transformer(tmp_path / "dino")
    network, see = Dinov2Model.from_pretrained(folder).eval(), vision_features(folder, CPU)
    pictures = random(1, 3, 28, 28).tanh()
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        told = network((pictures * 0.5 + 0.5 - mean) / std, output_hidden_states=True)
        maps, embedding = see(pictures)
    assert torch.allclose(embedding, told.last_hidden_state[:, 0], atol=1e-5)
    assert torch.allclose(maps[-1], told.hidden_states[-1][:, 1:].mT, atol=1e-5)
    assert torch.allclose(maps[0], told.hidden_states[0][:, 1:].mT, atol=1e-5)


def test_a_feature_network_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match=r"nowhere' is no vision transformer .*dinov2-small"):
        vision_features(str(tmp_path / "nowhere"), CPU)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    shop: Any = SimpleNamespace(teacher=tmp_path, device=CPU, store=SimpleNamespace(labels=None))
    with pytest.raises(EdgeflashError, match="'encoder' is no AutoencoderTiny's"):
        ADD().feature_network(shop)
    with pytest.raises(EdgeflashError, match="'judge' knows the shapes alone"):
        ADD(features="judge").feature_network(shop)
