"""Floors: what their names mean, and who says what counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from exported import Exported, attempt

from edgeflash import shelf
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.floors import FLOORS, check_floors, floor_of
from edgeflash.recipe import Recipe, changed, read_recipe, recipe_of
from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.verify import verify

TOML = """
name = "r"
stage = [{by = "lcm"}]
[floors]
psnr_db = 30
L4.psnr_db = 20
[floors.int8]
psnr_db = 22
"L4.psnr_db" = 18
"""
TOLD = {"psnr_db": 30.0, "L4.psnr_db": 20.0, "int8.psnr_db": 22.0, "int8.L4.psnr_db": 18.0}


def recipe(tmp_path: Path, text: str = TOML) -> Recipe:
    (tmp_path / "r.toml").write_text(text)
    return read_recipe(tmp_path / "r.toml")


def test_the_closest_name_counts() -> None:
    asked = (("int8", "L4"), ("int8", "L1"), ("fp16", "L4"), ("fp16", "L1"))
    assert [floor_of(TOLD, *where, "psnr_db") for where in asked] == [18, 22, 20, 30]
    assert floor_of({"L4.psnr_db": 20, "int8.psnr_db": 22}, "int8", "L4", "psnr_db") == 22
    assert floor_of(TOLD, "int8", "L2", "delta_ratio") is None
    for floors in FLOORS.values():
        check_floors(floors)


def test_a_recipe_has_a_table_of_floors(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    assert made.floors == TOLD == recipe_of(made.resolved(), "resolved").floors
    made = changed(made, {"floors.L4.psnr_db": 25, "floors.fp16.L1.psnr_db": 50})
    assert made.floors == TOLD | {"L4.psnr_db": 25, "fp16.L1.psnr_db": 50}
    bare = recipe(tmp_path, 'name = "r"\nstage = [{by = "lcm"}]\n')
    assert '"floors"' not in bare.model_dump_json(exclude_defaults=True), "its hash stays"
    assert bare.sha256 != made.sha256


@pytest.mark.parametrize(
    ("floors", "line"),
    [
        ({"psnr": 3}, r"^here: floors: no floor 'psnr' .*; did you mean 'psnr_db'\?"),
        ({"itn8": {"psnr_db": 3}}, r"no floor 'itn8\.psnr_db' .*; did you mean 'int8\.psnr_db'\?"),
        ({"L2.psnr_db": 3}, r"no floor 'L2\.psnr_db'"),
        ({"L4": {"ssim": "x"}}, r"here: floors\.L4\.ssim = 'x': must be a number"),
        ({"ssim": float("inf")}, r"here: floors\.ssim = inf: must be a finite number"),
        (3, r"here: floors = 3: must be a table"),
    ],
)
def test_a_mistake_in_them_is_one_line(floors: Any, line: str) -> None:
    with pytest.raises(EdgeflashError, match=line) as caught:
        recipe_of({"name": "r", "stage": [{"by": "lcm"}], "floors": floors}, "here")
    assert "\n" not in str(caught.value)


def test_what_is_asked_counts_before_what_is_usual(guided: Exported) -> None:
    def floors(given: dict[str, float], usual: dict[str, float]) -> list[float | None]:
        found = verify(guided.bundle, floors=given, usual=usual)
        asked = (("L3", "psnr_db"), ("L4", "psnr_db"), ("L4", "ssim"))
        return [
            next(f.floor for f in found if f.component == "pipeline" and (f.rung, f.metric) == each)
            for each in asked
        ]

    usual = {"fp32.L3.psnr_db": 70.0, "int8.psnr_db": 9.0, "ssim": 0.5}
    assert floors({}, usual) == [70, 80, 0.5]
    assert floors({"psnr_db": 60.0}, usual) == [60, 60, 0.5]


@pytest.mark.usefixtures("replay")
def test_an_export_goes_by_its_students_floors(one_step_student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(one_step_student, tmp_path / "student")
    told = json.loads((folder / MANIFEST).read_text())
    assert "floors" not in told
    (folder / MANIFEST).write_text(json.dumps(told | {"floors": {"int8": {"L4": {"ssim": 2}}}}))
    assert Student.open(folder).floors == {"int8.L4.ssim": 2}
    target = shelf.make(Target, "onnx", {"precision": "int8"})
    said = attempt(folder, tmp_path / "out", target)
    assert "rung L4, pipeline: ssim" in said and "misses its floor 2;" in said
    (folder / MANIFEST).write_text(json.dumps(told | {"floors": {"ssmi": 2}}))
    with pytest.raises(EdgeflashError, match=r"edgeflash\.json: floors: .*did you mean 'ssim'"):
        Student.open(folder)
