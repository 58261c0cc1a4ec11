"""Recipes: what is written is what runs, and a mistake is one line with the nearest name."""

import json
from pathlib import Path

import pytest
from test_distill import small_recipe

from edgeflash.disk import TRAINING, read_json
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import changed, find_recipe, read_recipe, recipe_of, recipes_folder, sized

SMALL = {"name": "r", "teacher": "embedded", "stage": [{"by": "lcm", "steps": 7}]}


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_resolves_and_is_found_by_name(path: Path) -> None:
    recipe = read_recipe(find_recipe(path.stem))
    resolved = recipe.resolved()
    assert recipe_of(resolved, "resolved").resolved() == resolved
    assert all("steps" in stage for stage in resolved["stage"])


def test_resolving_fills_in_the_methods_own_defaults() -> None:
    (stage,) = recipe_of(SMALL, "here").resolved()["stage"]
    assert (stage["steps"], stage["ddim_steps"], stage["huber_c"]) == (7, 50, 1e-3)


def test_the_hash_follows_what_is_asked_not_how_it_is_written() -> None:
    same = recipe_of(SMALL | {"seed": 0}, "here")
    other = recipe_of(SMALL | {"seed": 1}, "here")
    assert recipe_of(SMALL, "here").sha256 == same.sha256 != other.sha256


def test_keys_are_set_where_their_names_point() -> None:
    two = SMALL | {"stage": [{"by": "lcm", "steps": 7}, {"by": "blocks", "steps": 7}]}
    given = {"teacher": "x", "data.samples": 9, "steps": 5, "lcm.ddim_steps": 10}
    made = changed(recipe_of(two, "here"), given)
    assert (made.teacher, made.data.samples, made.name) == ("x", 9, "r")
    assert [s.options for s in made.stage] == [{"steps": 5, "ddim_steps": 10}, {"steps": 5}]
    with pytest.raises(EdgeflashError, match=r"no table or stage in this recipe.* 'add'"):
        changed(recipe_of(two, "here"), {"add.steps": 5})
    with pytest.raises(EdgeflashError, match=r"--set data: is a table; .* data\.KEY"):
        changed(recipe_of(two, "here"), {"data": 5})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"teachr": "x"}, r"no key in here: 'teachr' .*did you mean 'teacher'\?"),
        ({"data": {"sampls": 3}}, r"no key in here \[data\]: 'sampls' .*did you mean 'samples'\?"),
        ({"data": {"samples": 0}}, r"here: data\.samples = 0: must be 1 or more"),
        ({"sampling": {"steps": [1, 2]}}, r"sampling: .*default_steps 4 is not one of \(1, 2\)"),
        ({"sampling": {"guidance_scale": 2}}, r"sampling: .*needs guidance = 'cfg'"),
        ({"sampling": {"steps": [2000]}}, r"sampling\.steps\.0 = 2000: must be 1000 or less"),
        ({"stage": []}, r"here: stage = \[\]: must be a list of at least 1"),
        ({"stage": {"by": "lcm"}}, r"stage = .*: must be a list of tables, \[\["),
        ({"sampling": {"steps": 4}}, r"sampling\.steps = 4: must be a list, as in \[4\]"),
        ({"data": 3}, r"here: data = 3: must be a table"),
        ({"seed": "x"}, r"here: seed = 'x': must be a whole number"),
        ({"weights": "fp61"}, r"weights = 'fp61': must be one of fp32, fp16; .*mean 'fp16'\?"),
        ({"name": 3}, r"here: name = 3: must be text"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(change: dict[str, object], line: str) -> None:
    with pytest.raises(EdgeflashError, match=line) as caught:
        recipe_of(SMALL | change, "here")
    assert "\n" not in str(caught.value)


def test_a_mistyped_key_is_told_before_the_one_it_left_out() -> None:
    with pytest.raises(EdgeflashError, match=r"no key in here: 'stages' .*did you mean 'stage'"):
        recipe_of({"name": "x", "stages": [{"by": "lcm"}]}, "here")


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ({"by": "lmc"}, r"no method 'lmc' .*did you mean 'lcm'\?"),
        ({"by": "lcm", "hubr_c": 1}, r"no option in method 'lcm': 'hubr_c' .*mean 'huber_c'\?"),
        ({"by": "lcm", "ema": 1.5}, r"method 'lcm': ema = 1\.5: must be less than 1"),
        ({"by": "lcm", "w_min": 9, "w_max": 2}, r"method 'lcm': .*w_min 9\.0 is greater"),
    ],
)
def test_a_mistake_in_a_stage_names_the_method(stage: dict[str, object], line: str) -> None:
    with pytest.raises(EdgeflashError, match=line) as caught:
        recipe_of(SMALL | {"stage": [stage]}, "here").methods()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match=r"did you mean 'shapes'\?"):
        find_recipe("shape")
    (tmp_path / "a.toml").write_text("name = = 3")
    with pytest.raises(EdgeflashError, match=r"a\.toml: not TOML"):
        read_recipe(tmp_path / "a.toml")


def test_pictures_are_as_large_as_the_teachers_where_nothing_is_said(tmp_path: Path) -> None:
    unsaid = small_recipe(tmp_path, data={"kind": "folder", "path": str(tmp_path / "in")})
    distill(unsaid, tmp_path / "student")
    noted = read_json(tmp_path / "student.run" / TRAINING)
    teacher = tmp_path / "teacher"
    assert noted["data"]["size_px"] == sized(unsaid, teacher).data.size_px == 16
    for said in (changed(unsaid, {"data.size_px": 64}), changed(unsaid, {"data.samples": 3})):
        again = changed(said, {"seed": 2})
        assert sized(again, teacher).data.size_px == (16 if said.data.samples else 64)
    shapes = changed(unsaid, {"data.kind": "shapes", "data.path": None})
    assert sized(shapes, teacher) == shapes and shapes.data.size_px == 64
    assert sized(unsaid, None) == unsaid
    config = read_json(teacher / "unet/config.json") | {"sample_size": [8, 16]}
    (teacher / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(EdgeflashError, match=r"draws 32 x 16, and .* square: say \[data\] size_px"):
        sized(unsaid, teacher)
