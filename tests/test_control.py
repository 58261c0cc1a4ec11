"""How a ControlNet is made beside a UNet, trained, and carried along by other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_controlnet import controlled as controlled  # a fixture
from test_denoising import shop as shop  # another
from test_inpainting import METHODS, SHAPED, inpainting_recipe
from tiny_student import write_student

from edgeflash import control
from edgeflash.conditions import example
from edgeflash.distill.by_control import Control
from edgeflash.distill.by_sdxs import SDXS
from edgeflash.distill.data import open_store
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.golden import load_tensors
from edgeflash.latent_diffusion import as_rows
from edgeflash.networks_control import apart, beside
from edgeflash.networks_sd import load_network
from edgeflash.recipe import changed, find_recipe, read_recipe
from edgeflash.student import Student


def test_a_new_one_gives_zeros_and_begins_as_the_unet() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    made = beside(unet, 4)
    theirs = unet.state_dict()
    same = [name for name, each in made.state_dict().items() if name in theirs]
    assert any(name.startswith("down_blocks.1.attentions") for name in same)
    assert all(torch.equal(made.state_dict()[name], theirs[name]) for name in same)
    with torch.no_grad():
        down, mid = made(
            torch.randn(1, 4, 8, 8),
            torch.tensor(9),
            torch.randn(1, 5, 32),
            torch.rand(1, 3, 32, 32),
            return_dict=False,
        )
    wanted = control.shapes(dict(unet.config), (1, 4, 8, 8))
    assert [tuple(each.shape) for each in (*down, mid)] == wanted
    assert not any(each.any() for each in (*down, mid))


def test_a_network_is_steered_by_what_travels_with_the_captions(controlled: Path) -> None:
    student = Student.open(controlled)
    plain = student.family.load(student, "unet")
    listening = student.family.listening(
        student, student.family.load(student, "unet").network.network
    )
    controlnet = student.family.load(student, "controlnet")
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 400]), torch.randn(2, 16, 32)
    picture = torch.rand(2, 3, 16, 16)
    c = torch.cat([text, as_rows(picture.flatten(1), 32)], 1)
    with torch.no_grad():
        wanted = plain(x, t, text, *controlnet(x, t, text, picture))
        assert torch.allclose(listening(x, t, c).sample, wanted, atol=1e-5)
    made = apart({"unet": listening})
    assert list(made) == ["unet", "controlnet"]
    assert not any(name.startswith("controlnet") for name in made["unet"].state_dict())


def test_a_controlnet_alone_learns_from_edges(shop: Workshop) -> None:
    """It begins with zeros, which say nothing; the first step moves what they come from."""
    with_unet(shop)
    stage = Control(caption_dropout=0).begin(shop)
    (player,) = stage.players.values()
    unet, rows = player.network, np.arange(4)
    batch = stage.batch(rows)
    assert stage.pipeline == "StableDiffusionControlNetPipeline"
    assert stage.results["controlnet"] is unet.controlnet
    wide = batch["c"].shape[-1]
    seen = batch["c"][:, 16:].flatten(1)[:, : 3 * 64 * 64].view(4, 3, 64, 64)
    wanted = control.edges(shop.store.pictures(rows).numpy())
    np.testing.assert_array_equal(seen, wanted)
    before = shop.load(shop.student, "unet")
    x, t = torch.randn(batch["x_0"].shape), torch.arange(4) * 100
    with torch.no_grad():
        assert torch.allclose(
            unet(x, t, batch["c"]).sample, before(x, t, batch["c"][:, :16]).sample, atol=1e-5
        )
    assert wide == before.config.cross_attention_dim
    sum(player.loss(unet, batch, torch.Generator()).values()).backward()
    moved = {name for name, each in unet.named_parameters() if each.grad is not None}
    assert all(name.startswith("controlnet.") for name in moved)
    assert unet.controlnet.controlnet_mid_block.weight.grad.any()


def test_a_smaller_one_learns_from_the_teachers(controlled: Path, tmp_path: Path) -> None:
    """Its UNet lacks the middle, which the terms of the teacher see, as they see its picture."""
    base = write_student(
        tmp_path / "base", tiny_decoder=False, mid_block=False, scheduler="DDIMScheduler"
    )
    shop = workshop(tmp_path, controlled, base)
    stage = Control(caption_dropout=0, output_weight=2, feature_weight=3).begin(shop)
    (player,) = stage.players.values()
    terms, unet = player.loss, player.network
    batch = stage.batch(np.arange(2))
    found = terms(unet, batch, torch.Generator().manual_seed(0))
    assert list(found) == ["denoising", "output", "features.0", "features.1"]
    teacher = shop.load(controlled, "unet")
    again = terms(unet, otherwise(batch), torch.Generator().manual_seed(0))  # ours gives zeros yet
    assert torch.equal(found["denoising"], again["denoising"])
    assert all(found[name] != again[name] for name in list(found)[1:])
    attached = Control(output_weight=1, feature_weight=1)
    itself = attached.taught(shop, teacher)
    x, t = torch.randn(batch["x_0"].shape), torch.tensor([9, 400])
    with torch.no_grad():
        output = teacher(x, t, batch["c"]).sample
        assert all(float(each) < 1e-8 for each in itself(output, x, t, batch["c"]).values())
    sum(found.values()).backward()
    assert unet.controlnet.controlnet_down_blocks[0].weight.grad.any()


def test_a_teacher_without_one_has_nothing_to_say_of_it(tmp_path: Path) -> None:
    plain = write_student(tmp_path / "plain", tiny_decoder=False, scheduler="DDIMScheduler")
    with pytest.raises(EdgeflashError, match="plain has no ControlNet to learn from: name a teach"):
        Control(feature_weight=1).begin(workshop(tmp_path, plain, plain))


def test_teachers_that_are_shaped_otherwise_are_refused(controlled: Path, tmp_path: Path) -> None:
    def refused(name: str, widths: tuple[int, ...]) -> str:
        base = write_student(
            tmp_path / name, tiny_decoder=False, widths=widths, scheduler="DDIMScheduler"
        )
        with pytest.raises(EdgeflashError) as caught:
            Control(feature_weight=1).begin(workshop(tmp_path, controlled, base))
        return str(caught.value)

    assert "has 2 stages, the student 3: name a base" in refused("deeper", (16, 32, 32))
    assert "feature_weight: no block of" in refused("narrower", (8, 24))


def test_sdxs_teaches_a_controlnet_alone(controlled: Path, tmp_path: Path) -> None:
    """Beside a UNet that stays as it is, under scores whose own ControlNet stays the teacher's."""
    stage = SDXS(control_alone=True, feature_share=0, guidance=2).begin(
        workshop(tmp_path, controlled, controlled)
    )
    student, online = (stage.players[name].network for name in ("student", "online"))
    assert stage.results["controlnet"] is student.controlnet and "unet" not in stage.results
    learns = {name for name, each in student.named_parameters() if each.requires_grad}
    assert learns and all(name.startswith("controlnet.") for name in learns)
    learns = {name for name, each in online.named_parameters() if each.requires_grad}
    assert learns and not any(name.startswith("controlnet.") for name in learns)
    batch = stage.batch(np.arange(2)) | {"step": torch.tensor(0)}
    loss = stage.players["student"].loss
    found = loss(student, batch, torch.Generator().manual_seed(0))
    sum(found.values()).backward()
    assert student.controlnet.controlnet_mid_block.weight.grad.any()
    assert student.conv_in.weight.grad is None
    other = loss(student, otherwise(batch), torch.Generator().manual_seed(0))
    assert all(found[name] != other[name] for name in ("features", "scores"))
    plain = write_student(tmp_path / "plain", tiny_decoder=False, scheduler="DDIMScheduler")
    straight = SDXS(straight_teacher=str(plain))
    with pytest.raises(EdgeflashError, match="plain has no ControlNet, the student ControlNet: n"):
        straight.begin(workshop(tmp_path, controlled, controlled))
    with pytest.raises(EdgeflashError, match="plain has no ControlNet and no adapter: let 'c"):
        SDXS(control_alone=True).begin(workshop(tmp_path, plain, plain))


def otherwise(batch: Any) -> Any:
    """With edges where there were none, and none where there were."""
    text, edges = batch["c"][:, :16], batch["c"][:, 16:]
    return {**batch, "c": torch.cat([text, 1 - edges], 1)}


def workshop(tmp_path: Path, teacher: Path, student: Path) -> Workshop:
    """Of four pictures of 16 px."""
    recipe = inpainting_recipe(tmp_path, teacher, by="lcm")
    store = open_store(recipe.data, 0, tmp_path / "cache")
    return Workshop(teacher, student, store, tmp_path, torch.device("cpu"))


def with_unet(shop: Workshop) -> None:
    """A UNet and its noise, for a folder that has no more than autoencoder and text encoder."""
    from edgeflash.distill.by_denoising import Denoising

    method = Denoising(widths=(16, 16), layers_per_block=1)
    stage = method.begin(shop)
    stage.results["unet"].save_pretrained(str(shop.student / "unet"))
    stage.results["scheduler"].save_pretrained(str(shop.student / "scheduler"))


@pytest.mark.slow
def test_the_recipes_run_for_two_steps(tmp_path: Path) -> None:
    """From the embedded teacher to a student of few steps, which diffusers draws with."""
    from diffusers import DiffusionPipeline

    small = {"steps": 2, "batch_size": 2, "data.samples": 4}
    made = tmp_path / "teacher"
    distill(changed(read_recipe(find_recipe("shapes-controlnet-teacher")), small), made)
    teacher, base = Student.open(made), Student.open("shapes-teacher")
    assert "controlnet" in teacher.family.components()
    one, other = (load_network(s, "unet").state_dict() for s in (teacher, base))
    assert all(torch.equal(one[name], each) for name, each in other.items())
    recipe = read_recipe(find_recipe("shapes-controlnet"))
    out = distill(changed(recipe, small | {"teacher": str(made)}), tmp_path / "student")
    student = Student.open(out)
    assert student.manifest and list(student.manifest.schedules) == [1, 2, 4]
    files = [folder / "controlnet" for folder in (made, out)]
    first, second = (sorted(path.glob("*.safetensors"))[0].read_bytes() for path in files)
    assert first != second, "it is distilled along with the UNet"
    pipeline = DiffusionPipeline.from_pretrained(str(out))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionControlNetPipeline"
    shown = torch.from_numpy(control.edges_of(example(0, (64, 64))[0]).transpose(2, 0, 1)[None])
    picture = pipeline(
        "star", image=shown / 255, num_inference_steps=1, guidance_scale=0, output_type="np"
    ).images
    assert picture.shape == (1, 64, 64, 3) and np.isfinite(picture).all()


KEEPING = [name for name, method in METHODS.items() if method.conditioned and method.keeps_control]
KEEPING += ["control"]


@pytest.mark.slow
@pytest.mark.parametrize("by", KEEPING)
def test_methods_that_say_so_keep_it(by: str, controlled: Path, tmp_path: Path) -> None:
    recipe = inpainting_recipe(tmp_path, controlled, by=by, **SHAPED.get(by, {}))
    student = Student.open(distill(recipe, tmp_path / by))
    before, after = (s.family.load(s, "controlnet") for s in (Student.open(controlled), student))
    moved = after.network.conv_in.weight - before.network.conv_in.weight
    assert moved.any() or by == "decoder"


@pytest.mark.slow
def test_lora_leaves_it_as_it_is(controlled: Path, tmp_path: Path) -> None:
    recipe = inpainting_recipe(tmp_path, controlled, by="lcm", lora_rank=2)
    out = distill(recipe, tmp_path / "student")
    name = "controlnet/diffusion_pytorch_model.safetensors"
    one, other = (load_tensors(folder / name) for folder in (controlled, out))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_methods_that_do_not_are_refused(controlled: Path, tmp_path: Path) -> None:
    for by in ("gan", "blocks"):
        recipe = inpainting_recipe(tmp_path, controlled, by=by)
        with pytest.raises(EdgeflashError, match=f"method '{by}': teaches no denoiser that a Con"):
            distill(recipe, tmp_path / "student")
    plain = write_student(tmp_path / "plain", tiny_decoder=False, scheduler="DDIMScheduler")
    recipe = inpainting_recipe(tmp_path, controlled, by="lcm")
    with pytest.raises(EdgeflashError, match="controlnet is missing, but the teacher's is there"):
        distill(recipe.model_copy(update={"base": str(plain)}), tmp_path / "student")
