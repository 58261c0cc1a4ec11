"""The tiny decoder: what it is shown, what it should make of it, and how it begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_distill import small_recipe
from tiny_student import write_student
from torch import Tensor

from edgeflash.distill import by_decoder, data, encoded
from edgeflash.distill.by_decoder import Decoder, mixed, see_whitened, whitening
from edgeflash.distill.data import open_store
from edgeflash.distill.encoded import drawn_latents
from edgeflash.distill.stage import Player, Workshop

CPU = torch.device("cpu")


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    recipe = small_recipe(tmp_path)
    store = open_store(recipe.data, 0, tmp_path / "cache")
    student = write_student(tmp_path / "student", scheduler="LCMScheduler")
    return Workshop(tmp_path / "teacher", student, store, tmp_path, CPU)


@torch.no_grad()
def test_a_decoder_begins_by_seeing_all_directions_of_latents_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    skew = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # standard deviations 1.9 and 0.1
    latents = mixed(skew, torch.randn(64, 2, 8, 8, generator=generator))
    white = whitening(latents)
    spread = torch.cov(mixed(white, latents).transpose(0, 1).flatten(1))
    assert torch.allclose(spread, torch.eye(2), atol=1e-3)
    layer = torch.nn.Conv2d(2, 8, 3, padding=1)
    wanted = layer(mixed(white, latents))
    see_whitened(layer, white)
    assert torch.allclose(layer(latents), wanted, atol=1e-5)
    assert whitening(mixed(torch.ones(2, 2), latents)).isfinite().all()  # no second direction


def test_a_decoder_is_shown_latents_through_noise_up_to_a_strength(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def latents(indices: np.ndarray) -> Tensor:
        return torch.randn(len(indices), 4, 8, 8, generator=torch.Generator().manual_seed(0))

    config = SimpleNamespace(latent_channels=4, scaling_factor=1.0)
    monkeypatch.setattr(by_decoder, "cached_latents", lambda shop: latents)
    monkeypatch.setattr(Decoder, "teacher", lambda *_: SimpleNamespace(config=config))
    shop: Any = SimpleNamespace(teacher=Path("there"), device=torch.device("cpu"), store=range(8))
    options = Decoder(width=8, blocks=(1, 1), target="pictures", latent_noise=0.5)
    player: Player = options.begin(shop).players["tiny"]
    seen: list[Tensor] = []

    def network(z: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(z)
        return pictures, torch.zeros_like(z)

    batch = {"z": torch.zeros(256, 4, 8, 8), "pictures": torch.zeros(256, 3, 16, 16)}
    terms = player.loss(network, batch, torch.Generator().manual_seed(0))
    strength = seen[0].flatten(1).std(1)
    assert strength.min() < 0.02 and float(strength.max()) == pytest.approx(0.5, abs=0.06)
    assert float(terms["encoder"]) == 0  # which is held to the latents as they are


def test_own_drawings_are_those_that_diffusers_makes(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(encoded, "at_once", lambda size_px: 2)  # a row's noise is its own
    monkeypatch.setattr(data, "ROWS", 3)  # the last rows hold none of one step count
    found = drawn_latents(shop, 3)(np.arange(8))
    pipeline = StableDiffusionPipeline.from_pretrained(str(shop.student), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for row, steps in ((0, 1), (4, 2), (5, 3), (7, 2)):
        generator = torch.Generator().manual_seed(row)
        drawn = pipeline(
            shop.store.captions[row],
            latents=torch.randn(1, 4, 8, 8, generator=generator),
            num_inference_steps=steps,
            guidance_scale=1,
            generator=generator,
            output_type="latent",
        ).images[0]
        assert (found[row] - drawn).abs().max() < 2e-3 * drawn.abs().max()  # kept as float16


def test_own_drawings_become_what_the_teacher_decodes(shop: Workshop) -> None:
    options = Decoder(width=8, blocks=(1, 1), target="pictures", own_steps=2, encoder_weight=0)
    stage = options.begin(shop)
    batch = stage.batch(np.arange(4))
    assert torch.equal(batch["own"], drawn_latents(shop, 2)(np.array([2, 3])))
    assert shop.teacher
    teacher = shop.load(shop.teacher, "vae")
    with torch.no_grad():
        own = teacher.decode(batch["own"] / teacher.config.scaling_factor).sample.clamp(-1, 1)

    def perfect(z: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(z[:2], batch["z"][:2]) and torch.equal(z[2:], batch["own"])
        return torch.cat([pictures[:2], own]), batch["z"]

    terms = stage.players["tiny"].loss(perfect, batch, torch.Generator())
    assert max(float(term) for term in terms.values()) < 1e-6


def test_the_encoder_can_be_narrower_than_the_decoder() -> None:
    tiny = Decoder(width=16, blocks=(3, 2, 1), encoder_width=8).build(latent_channels=4)
    assert tiny.config.encoder_block_out_channels == (8, 8, 8)
    assert tiny.config.decoder_block_out_channels == (16, 16, 16)


def test_its_layers_are_taesds() -> None:
    """Parameter counts of the published ones, of 4 and of 16 channels."""
    for channels, counts in ((4, (1_222_532, 1_222_531)), (16, (1_229_456, 1_229_443))):
        with torch.device("meta"):
            tiny = Decoder().build(channels)
        found = [sum(p.numel() for p in part.parameters()) for part in (tiny.encoder, tiny.decoder)]
        assert tuple(found) == counts


@torch.no_grad()
def test_latents_are_held_to_three_and_kept_in_bytes_to_a_hundredth() -> None:
    """3 tanh(z / 3) before its first layer; diffusers' way of latents as pictures, and back."""
    tiny, seen = Decoder(width=16, blocks=(1, 1, 1)).build(latent_channels=4), []
    tiny.decoder.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    z = torch.linspace(-20, 20, 256).view(1, 4, 8, 8)
    tiny.decode(z)
    assert torch.allclose(seen[0], 3 * torch.tanh(z / 3), atol=1e-6)
    held = z.clamp(-3, 3)
    kept = (tiny.scale_latents(z) * 255).round() / 255
    assert float((tiny.unscale_latents(kept) - held).abs().max()) <= 0.01177


def test_the_main_term_sees_cells_of_eight_by_eight() -> None:
    """SDXS, eq. 5: the mean of a cell is held, and its texture is left alone."""
    options = Decoder(target="pictures", pixel_weight=0, encoder_weight=0)
    unused: Any = None
    lesson = by_decoder.Lesson(options, unused, unused, unused, torch.eye(4))
    batch = {"z": torch.zeros(2, 4, 2, 2), "pictures": torch.rand(2, 3, 16, 16)}
    halves = torch.tensor([1.0, -1.0]).repeat_interleave(4).repeat(2)  # even over 8, not over 4
    texture = halves[:, None] * halves

    def down8(y: Tensor) -> Tensor:
        def network(z: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
            return y, z

        return lesson.loss(network, batch, torch.Generator())["down8"]  # type: ignore[arg-type]

    y = (batch["pictures"] + 0.3).requires_grad_()
    assert down8(y).item() == pytest.approx(0.3, rel=1e-5)
    assert down8(y + texture).item() == pytest.approx(0.3, rel=1e-5)
    (gradient,) = torch.autograd.grad(down8(y), y)
    assert torch.allclose(gradient, torch.full_like(y, 1 / y.numel()))  # 1/64 of a cell's


@pytest.mark.parametrize("own_steps", [0, 2])
def test_the_teacher_decodes_once_a_step(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, own_steps: int
) -> None:
    counts: list[int] = []
    decoded = by_decoder.Lesson.decoded

    def noted(self: by_decoder.Lesson, z: Tensor) -> Tensor:
        counts.append(len(z))
        return decoded(self, z)

    monkeypatch.setattr(by_decoder.Lesson, "decoded", noted)
    stage = Decoder(width=8, blocks=(1, 1), adversarial_weight=1, own_steps=own_steps).begin(shop)
    batch = stage.batch(np.arange(4))
    for player in stage.players.values():
        terms = player.loss(player.network, batch, torch.Generator())
        assert all(term.isfinite() for term in terms.values())
    assert counts == [4]


def test_what_is_cached_needs_no_networks(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = Workshop.load

    def noted(shop: Workshop, folder: Path, name: str) -> Any:
        loaded.append(name)
        return load(shop, folder, name)

    monkeypatch.setattr(Workshop, "load", noted)
    first, nothing = encoded.cached_samples(shop)
    assert loaded.count("vae") == 1
    loaded.clear()
    again, nothing_again = encoded.cached_samples(shop)
    assert loaded == ["text_encoder"]  # for no caption
    assert torch.equal(nothing, nothing_again)
    before, after = first(np.arange(8)), again(np.arange(8))
    assert all(torch.equal(before[key], after[key]) for key in ("x_0", "c"))
