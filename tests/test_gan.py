"""Diffusion2GAN: what is compared, what the critic is shown, and a recipe of it."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussian import Shift, process, seeded
from test_ladd import unet
from torch import Tensor

from edgeflash import shapes
from edgeflash.distill.by_gan import (
    Diffusion2GAN,
    Lesson,
    PairCritic,
    Sight,
    affine,
    augmented,
    r1,
    window,
)
from edgeflash.distill.encoded import conditioning_of
from edgeflash.distill.stage import Workshop
from edgeflash.embedded import embedded

NOTHING = torch.zeros(1, 5, 12)


def batch(count: int = 4, step: int = 1) -> dict[str, Tensor]:
    x, z = torch.randn(2, count, 1, 8, 8, generator=seeded())
    c = torch.arange(count, dtype=torch.float32)[:, None, None]
    return {"x": x, "z": z, "c": c, "step": torch.tensor(step)}


class Scores:
    """A critic that says what its arguments are on average; notes them."""

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        self.shown.append((x, z, c))
        return 0 * x.flatten(1)


def lesson(critic: Any = None, student: Any = None, **options: Any) -> Lesson:
    distance = SimpleNamespace(distance=lambda a, b: (a - b).square().mean())
    chosen = Diffusion2GAN(**{"augmented": False} | options)
    return Lesson(chosen, student or Shift(0.0, 0), critic, distance, process())  # type: ignore[arg-type]


def test_a_student_is_asked_at_the_last_timestep_for_the_picture_of_its_noise() -> None:
    student, rows, critic = Shift(2.0, 0), batch(), Scores()
    terms = lesson(critic, student).student_loss(student, rows, seeded())
    assert torch.equal(student.given[0], rows["z"]) and (student.seen[0] == 999).all()
    wanted = (2.0 - rows["x"]).square().mean()
    assert float(terms["distance"]) == pytest.approx(float(wanted), rel=1e-4)
    assert float(terms["adversarial"]) == pytest.approx(0.5 * log(2))
    alone = lesson(None, student).student_loss(student, rows, seeded())
    assert list(alone) == ["distance"]


def test_the_critic_learns_pairs_and_captions() -> None:
    critic, rows = Scores(), batch(4, step=1)
    terms = lesson(critic, Shift(2.0, 0)).critic_loss(critic, rows, seeded())
    real, fake, other = critic.shown
    for x, z, _ in critic.shown:
        assert torch.equal(z, rows["z"]) and x.shape == z.shape
    assert torch.equal(real[0], rows["x"]) and torch.equal(other[0], rows["x"])
    assert torch.allclose(fake[0], torch.full_like(fake[0], 2.0), atol=1e-4)
    assert torch.equal(real[2], fake[2]) and (other[2] != real[2]).all()
    assert float(terms["critic"]) == pytest.approx(2 * log(2))
    assert float(terms["captions"]) == pytest.approx(log(2))


def test_r1_is_of_one_sample_and_comes_at_every_so_many_steps() -> None:
    def linear(x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        asked.append(len(x))
        return 3 * x.flatten(1).sum(1, keepdim=True)

    asked: list[int] = []
    for step, there in ((0, True), (1, False), (15, False), (16, True)):
        asked.clear()
        terms = lesson(linear, r1_weight=2.0).critic_loss(linear, batch(4, step), seeded())
        assert ("r1" in terms) == there and asked == [4, 4, 4] + [1] * there
        if there:
            assert float(terms["r1"]) == pytest.approx(2 * 9 * 64)
    x = torch.randn(2, 1, 2, 2)
    squares = r1(lambda x, z, c: x.square().flatten(1), x, x, x)  # the mean of four squares
    assert float(squares) == pytest.approx(float((x / 2).square().flatten(1).sum(1).mean()))


def test_features_are_compared_by_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sight = Sight(unet(attention_head_dim=4), NOTHING)
    x, y = torch.randn(2, 3, 4, 8, 8)
    assert float(sight.distance(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(sight.distance(x, y)) > 0.1
    latents, *blocks = sight(x)
    assert latents is x and [b.shape[-1] for b in blocks] == [4, 4, 4]
    x.requires_grad_()
    sight.distance(x, y).backward()
    assert x.grad is not None and x.grad.abs().mean() > 0
    monkeypatch.setattr(Sight, "__call__", lambda self, x: [x])
    assert float(sight.distance(5 * x.detach(), x)) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_what_is_shifted_by_a_cell_is_nearer_than_squares_say() -> None:
    """To the embedded teacher's eye, held against how far the next picture is; augmented, more."""
    folder = embedded("shapes-teacher")
    pictures, _, _ = shapes.batch(shapes.HELD_OUT_SEED, range(8))
    shop = Workshop(folder, folder, None, folder, torch.device("cpu"))  # type: ignore[arg-type]
    seen = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = shop.load(folder, "vae").encode(seen).latent_dist.mean
    sight = Sight(shop.frozen(folder), conditioning_of(shop, ""))

    def share(distance: Callable[[Tensor, Tensor], Tensor]) -> float:
        return float(distance(x, x.roll(1, 3)) / distance(x, x.roll(1, 0)))

    def averaged(a: Tensor, b: Tensor) -> Tensor:
        pairs = [augmented(torch.cat([a, b]), seeded(i)).chunk(2) for i in range(4)]
        return torch.stack([sight.distance(*pair) for pair in pairs]).mean()

    squares = share(lambda a, b: (a - b).square().mean())
    assert share(averaged) < 0.9 * share(sight.distance) < 0.9 * 0.75 * squares


def test_the_critic_hears_of_the_noise_only_once_it_has_learnt_to() -> None:
    torch.manual_seed(0)
    critic = PairCritic(unet(attention_head_dim=4), 8)
    x, z, other = torch.randn(3, 2, 4, 8, 8)
    c = torch.randn(2, 5, 12)
    critic.eval()  # so that spectral norms stay as they are
    assert torch.equal(critic(x, z, c), critic(x, other, c))
    torch.nn.init.ones_(critic.noise.weight)
    assert not torch.allclose(critic(x, z, c), critic(x, other, c))
    critic(x, z, c).sum().backward()
    assert all(p.grad is not None for p in critic.parameters())


def test_both_are_augmented_alike() -> None:
    x = torch.randn(6, 4, 16, 16, generator=seeded(1))
    one, other = augmented(torch.cat([x, x]), seeded()).chunk(2)
    assert torch.equal(one, other) and not torch.allclose(one, x)
    assert not torch.allclose(one[0], augmented(x[[1, 1]], seeded())[0])


def test_augmentations_are_those_named() -> None:
    ways = affine(20_000, seeded())
    area = torch.det(ways[:, :, :2])
    assert float((area < 0).float().mean()) == pytest.approx(0.5, abs=0.02)  # mirrored
    assert float(area.abs().log2().std()) == pytest.approx(0.4, rel=0.03)  # 2 x SCALE_STD
    assert float(ways[:, :, 2].std()) == pytest.approx(0.25, rel=0.03)  # pictures are 2 wide
    turned = torch.atan2(ways[:, 1, 1], -ways[:, 0, 1])
    assert float(turned.cos().mean()) == pytest.approx(0, abs=0.03)
    cut = window(2000, torch.Size((16, 16)), seeded())
    assert cut.shape == (2000, 1, 16, 16)
    assert float(1 - cut.mean()) == pytest.approx((7 / 16) ** 2, abs=0.01)  # less beyond the edges
