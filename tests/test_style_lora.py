"""SDXS learns a LoRA's style: it is in the teacher whose scores are followed, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gaussian import seeded
from safetensors.torch import load_file, save_file
from test_distill import small_recipe
from test_lora import lora_file

from edgeflash.distill.by_sdxs import SDXS, Lesson
from edgeflash.distill.data import open_store
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.lora import Lora
from edgeflash.networks_sd import load_network
from edgeflash.student import Student

STYLED: dict[str, Any] = {"feature_share": 0, "solver_steps": 1}


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    recipe = small_recipe(tmp_path)
    store = open_store(recipe.data, 0, tmp_path / "cache")
    teacher = tmp_path / "teacher"
    return Workshop(teacher, teacher, store, tmp_path, torch.device("cpu"))


def same(network: Any, other: Any) -> bool:
    ours, theirs = network.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_style_is_in_the_teacher_alone(shop: Workshop, tmp_path: Path) -> None:
    assert shop.teacher
    path = lora_file(tmp_path / "style", shop.teacher)
    stage = SDXS(style_lora=str(path), style_scale=0.6, **STYLED).begin(shop)
    taught = stage.players["student"].loss.__self__  # type: ignore[attr-defined]
    assert isinstance(taught, Lesson)
    plain = load_network(Student.open(shop.teacher), "unet")
    styled = load_network(Student.open(shop.teacher, [Lora(path, 0.6)]), "unet")
    assert not same(plain, styled) and same(taught.teacher, styled)
    assert same(taught.online, plain) and same(taught.student, plain)
    assert not any(weight.requires_grad for weight in taught.teacher.parameters())
    given = stage.batch(np.array([1, 2])) | {"step": torch.tensor(0)}
    terms = taught.student_loss(taught.student, given, seeded())
    assert set(terms) == {"features", "scores"}  # no warm-up: the scores count from step 0 on
    terms["scores"].backward()  # which differ by the style alone, as the online network is plain
    assert taught.student.conv_out.weight.grad.any()


def test_what_is_no_style_is_refused(shop: Workshop, tmp_path: Path) -> None:
    assert shop.teacher
    path = lora_file(tmp_path / "style", shop.teacher)
    reading = {k: v for k, v in load_file(path).items() if k.startswith("text_encoder.")}
    save_file(reading, tmp_path / "reading.safetensors")
    with pytest.raises(
        EdgeflashError, match=r"^sdxs\.style_lora: .* is for the text_encoder alone"
    ):
        SDXS(style_lora=str(tmp_path / "reading.safetensors"), **STYLED).begin(shop)
    with pytest.raises(EdgeflashError, match=r"nothing\.safetensors: diffusers reads no LoRA"):
        SDXS(style_lora=str(tmp_path / "nothing.safetensors"), **STYLED).begin(shop)
    with pytest.raises(ValueError, match="style_lora is learnt without the warm-up"):
        SDXS(style_lora=str(path))
