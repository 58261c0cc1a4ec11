"""Timesteps named by number, against diffusers' schedulers that are told the same ones."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pytest
from diffusers import LCMScheduler, TCDScheduler
from rich.console import Console
from test_align_your_steps import sampled_by
from test_lower_schedule import SD, diffusers_loop, relative, table_loop

from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.export.remarks import _tell_sampler, _tell_timesteps
from edgeflash.named_timesteps import unusual
from edgeflash.noise_correction import MARK
from edgeflash.recipe import Sampling, find_recipe, read_recipe, recipe_of
from edgeflash.student import Student, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def folder(guided_student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guided_student, tmp_path / "guided"))


@pytest.mark.parametrize("text", ["399", "999,749,499,249", "999, 20"])
@pytest.mark.parametrize("sampler", [LCMScheduler, TCDScheduler])
def test_the_loop_is_that_of_diffusers_told_the_same(
    sampler: type, text: str, folder: Path
) -> None:
    student, timesteps = sampled_by(folder, sampler.__name__), [int(t) for t in text.split(",")]
    (table,) = student.schedules(None, text).values()
    assert [step.t for step in table.steps] == timesteps
    expected = diffusers_loop(sampler(**SD), None, timesteps=timesteps)
    assert relative(table_loop(table), expected) < 1e-5


def test_other_counts_are_spaced_as_usual(folder: Path) -> None:
    student = sampled_by(folder, "LCMScheduler")
    write_manifest(folder, steps=(1, 2, 4))
    usual = student.schedules([1, 2, 4])
    tables = student.schedules([1, 2, 4], "999,749,499,374")
    assert [step.t for step in tables[4].steps] == [999, 749, 499, 374]
    assert usual[4] != tables[4]
    assert {n: tables[n] for n in (1, 2)} == {n: usual[n] for n in (1, 2)}
    assert list(student.schedules(None, "399")) == [1]


@pytest.mark.parametrize(
    ("sampler", "text", "said"),
    [
        ("LCMScheduler", "1000", "1000: LCMScheduler has 0 to 999: choose among those"),
        ("LCMScheduler", "999,-1", "999,-1: LCMScheduler has 0 to 999"),
        ("LCMScheduler", "249,499", "249,499: name the noisiest first, each of them once"),
        ("LCMScheduler", "499,499", "each of them once"),
        ("FlowMatchEulerDiscreteScheduler", "900", "a flow's steps are told by their noise"),
        ("DDIMScheduler", "399", "guided: DDIMScheduler takes no timesteps: leave it out"),
    ],
)
def test_what_no_sampler_takes_is_refused(folder: Path, sampler: str, text: str, said: str) -> None:
    with pytest.raises(EdgeflashError, match=said) as refused:
        sampled_by(folder, sampler).schedules(None, text)
    assert str(refused.value).startswith(f"--timesteps {text}: ")


def test_a_recipe_names_them_and_exports_tell_them(folder: Path) -> None:
    sampled_by(folder, "LCMScheduler")
    grid = (999, 749, 624, 499)
    manifest = write_manifest(folder, steps=(2, 4), timesteps=[grid])
    assert tuple(step.t for step in manifest.schedules[4].steps) == grid
    assert [step.t for step in manifest.schedules[2].steps] == [999, 499]
    with pytest.raises(EdgeflashError, match=r"^timesteps \[1000\]: LCMScheduler has 0 to 999"):
        write_manifest(folder, steps=(1,), timesteps=[[1000]])
    write_manifest(folder, steps=(2, 4), timesteps=[grid])
    student, said = Student.open(folder), Console(width=200, record=True, file=StringIO())
    _tell_timesteps(student, student.schedules(), None, said)
    _tell_sampler(student, "399", said)
    line = (
        "4 steps: stock pipelines stop elsewhere: tell diffusers' and optimum's "
        "timesteps=[999, 749, 624, 499]; GenAI and Apple's package take none\n"
    )
    assert said.export_text() == line
    more = student.schedules(None, "999,899,799,699,599")
    assert unusual(student, more) == {5: [999, 899, 799, 699, 599]}
    plain = {"name": "x", "stage": [{"by": "lcm"}]}
    wrong = {"steps": [1, 4], "timesteps": [[999, 499]]}
    twice = {"steps": [2], "default_steps": 2, "timesteps": [[999, 499], [999, 749]]}
    with pytest.raises(EdgeflashError, match=r"two grids of as many steps"):
        recipe_of(plain | {"sampling": twice}, "test")
    with pytest.raises(EdgeflashError, match=r"timesteps \[999, 499\]: 2 is not one of \(1, 4\)"):
        recipe_of(plain | {"sampling": wrong}, "test")


def test_a_recipe_with_timesteps_that_no_noise_has_is_refused_at_once(tmp_path: Path) -> None:
    sampling = {"steps": [1], "default_steps": 1, "timesteps": [[1000]]}
    recipe = read_recipe(find_recipe("shapes")).model_copy(
        update={"sampling": Sampling.model_validate(sampling)}
    )
    with pytest.raises(EdgeflashError, match=r"^\[sampling\] timesteps \[1000\]: .* has 0 to 999"):
        distill(recipe, tmp_path / "out")


def test_noise_stays_corrected_at_them(folder: Path) -> None:
    student = sampled_by(folder, "DPMSolverMultistepScheduler", solver_order=1, **{MARK: True})
    (table,) = student.schedules(None, "999,666,332").values()
    assert table.sampler.endswith("noise-corrected")
