"""The recipes for real teachers, run from end to end on the embedded one, scaled down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeflash.distill.fit import check_kind
from edgeflash.distill.run import _check_steps, _sampler, distill
from edgeflash.embedded import embedded
from edgeflash.recipe import changed, find_recipe, read_recipe

SCENES = {"data.kind": "shapes", "data.path": None, "data.size_px": 64, "data.samples": 8}
SMALL = {"teacher": "embedded", "steps": 2, "batch_size": 2, "accumulate": 1} | SCENES
DECODER = {"decoder.width": 8, "decoder.blocks": [1, 1, 1]}
RECIPES: dict[str, tuple[dict[str, Any], list[int]]] = {  # what is smaller, and steps that ship
    "sdxs-512": (DECODER | {"sdxs.straight_teacher": "embedded"}, [1]),
    "edgefusion": ({}, [1, 2, 4]),
    "imagine-flash": ({}, [3]),
    "flash-sd": ({"flash.steps": 4, "flash.teacher_steps": 4, "flash.lora_rank": 4}, [2, 4]),
    "turbo": ({"add.features": "judge"}, [1, 4]),
    "lcm-lora": ({"lcm.lora_rank": 4}, [2, 4, 8]),
    "tiny-decoder": (DECODER, [4, 8, 25]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_real_teacher_fits_together(name: str) -> None:
    smaller, steps = RECIPES[name]
    recipe = read_recipe(find_recipe(name))
    _check_steps(recipe)
    check_kind(changed(recipe, SMALL | smaller), [embedded("shapes-teacher")])
    said, (_, runs) = recipe.sampling, _sampler(recipe)
    assert list(said.steps if said else runs or steps) == steps


def test_sdxs_decoder_learns_as_equation_5_has_it_on_the_students_own_latents() -> None:
    recipe = read_recipe(find_recipe("sdxs-512"))
    *_, student, decoder = recipe.stage
    (method,) = recipe.model_copy(update={"stage": (decoder,)}).methods()
    told = method.model_dump()
    assert (student.by, decoder.by) == ("sdxs", "decoder")
    assert told["pixel_weight"] == 0 and told["own_steps"] == 1 and told["target"] == "decodings"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_real_teacher_runs_on_the_embedded_one(tmp_path: Path, name: str) -> None:
    smaller, steps = RECIPES[name]
    recipe = read_recipe(find_recipe(name))
    assert recipe.teacher != "embedded" and recipe.data.kind == "folder"
    out = distill(changed(recipe, SMALL | smaller), tmp_path / "student")
    told = json.loads((out / "edgeflash.json").read_text())
    assert [int(n) for n in told["schedules"]] == steps
    assert [stage["by"] for stage in told["lineage"]["stages"]] == [s.by for s in recipe.stage]
    tiny = any(stage.by == "decoder" for stage in recipe.stage)
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"][1] == ("AutoencoderTiny" if tiny else "AutoencoderKL")
    lora = any("lora_rank" in stage.options for stage in recipe.stage)
    assert (out / "pytorch_lora_weights.safetensors").is_file() == lora
