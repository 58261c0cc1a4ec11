"""What a workshop hands to methods."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from test_distill import small_recipe
from torch import nn

from edgeflash.distill.data import open_store
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError


def test_a_frozen_teacher_in_bf16_answers_as_autocast_would_have_it(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    store = open_store(recipe.data, recipe.seed, tmp_path / "cache")
    teacher = tmp_path / "teacher"
    whole, half = (
        Workshop(teacher, teacher, store, tmp_path, torch.device("cpu"), on) for on in (False, True)
    )
    kinds = {
        type(m): m.weight.dtype for m in half.frozen(teacher).modules() if hasattr(m, "weight")
    }
    assert kinds == {
        nn.Conv2d: torch.bfloat16,
        nn.Linear: torch.bfloat16,
        nn.GroupNorm: torch.float32,
        nn.LayerNorm: torch.float32,
    }
    assert {p.dtype for p in whole.frozen(teacher).parameters()} == {torch.float32}
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([999, 3]), torch.randn(2, 16, 32))
    with torch.no_grad(), half.autocast():
        wanted, found = (shop.frozen(teacher)(*inputs).sample for shop in (whole, half))
    assert torch.equal(wanted, found)
    assert not any(p.requires_grad for p in half.frozen(teacher).parameters())
    with whole.autocast():
        assert whole.frozen(teacher)(*inputs).sample.dtype == torch.float32


def test_a_teacher_of_another_family_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """Its UNet may have the same widths, and wants to be told sizes all the same."""
    small_recipe(tmp_path)
    teacher, other = tmp_path / "teacher", tmp_path / "other"
    copytree(teacher, other)
    index = other / "model_index.json"
    kinds = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    index.write_text(index.read_text().replace(*kinds))
    store: Any = None
    shop = Workshop(teacher, teacher, store, tmp_path, torch.device("cpu"))
    with pytest.raises(EdgeflashError, match=r"other: is of the family sdxl, the student of sd,"):
        shop.frozen(other)
