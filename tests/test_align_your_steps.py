"""Align Your Steps, against diffusers' schedulers called with the same timesteps."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from rich.console import Console
from test_lower_schedule import SD, diffusers_loop, relative, table_loop
from tiny_sdxl import write_sdxl

from edgeflash import align_your_steps as ays
from edgeflash.errors import EdgeflashError
from edgeflash.export.remarks import _tell_sampler
from edgeflash.student import Student, StudentLineage, write_manifest

# diffusers hands torch tensors to numpy.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIGMAS = {  # as published beside the timesteps
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
}


def sampled_by(folder: Path, name: str, **changes: Any) -> Student:
    """The student in ``folder``, from now on with another scheduler."""
    index, config = folder / "model_index.json", folder / "scheduler/scheduler_config.json"
    told = json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}
    index.write_text(json.dumps(told))
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return Student.open(folder)


@pytest.fixture
def folder(guided_student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guided_student, tmp_path / "guided"))


@pytest.mark.parametrize("family", SIGMAS)
def test_timesteps_and_sigmas_are_two_views_of_one_table(family: str) -> None:
    times = ays.grid(family, 10)
    assert times == list(ays.TIMESTEPS[family][:10])
    assert ays.sigmas()[times] == pytest.approx(SIGMAS[family], abs=0.005)
    theirs = DPMSolverMultistepScheduler(**SD).alphas_cumprod.double().numpy()
    assert ays.sigmas() == pytest.approx(np.sqrt(1 / theirs - 1), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 20, 50])
def test_other_counts_interpolate_log_sigma(steps: int) -> None:
    times = ays.grid("sd", steps)
    assert len(times) == steps and times[0] == 999
    assert all(a > b for a, b in itertools.pairwise(times))
    # The grid of 20 goes through that of 10; the last of its steps has one more behind 24.
    published = ays.sigmas()[[*ays.TIMESTEPS["sd"]]]
    if steps == 20:
        between = np.sqrt(published[:-1] * published[1:])  # the mean of the logarithms
        assert times[::2] == ays.grid("sd", 10)
        assert ays.sigmas()[times[1::2]] == pytest.approx(between, rel=0.02)


@pytest.mark.parametrize("steps", [4, 10, 15])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_the_loop_is_that_of_diffusers(
    folder: Path, sampler: Callable[..., Any], spacing: str, steps: int
) -> None:
    settings = {"timestep_spacing": spacing, "steps_offset": 1}
    student = sampled_by(folder, sampler.__name__, use_karras_sigmas=True, **settings)
    (table,) = student.schedules([steps], ays.NAME).values()
    assert len(table.steps) == steps and table.sampler.endswith(", align-your-steps")
    theirs = sampler(**SD, **settings)
    expected = diffusers_loop(theirs, None, timesteps=ays.grid("sd", steps))
    assert relative(table_loop(table), expected) < 1e-5


@pytest.mark.parametrize("family", SIGMAS)
def test_euler_of_timesteps_is_euler_of_the_published_sigmas(family: str) -> None:
    euler = EulerDiscreteScheduler(**SD)
    by_sigmas = diffusers_loop(euler, None, sigmas=[*ays.sigmas()[ays.grid(family, 10)], 0])
    by_times = diffusers_loop(euler, None, timesteps=ays.grid(family, 10))
    assert relative(by_times, by_sigmas) < 1e-3  # their sigmas are float32 of float32 sums
    rounded = diffusers_loop(euler, None, sigmas=[*SIGMAS[family], 0])
    assert relative(by_times, rounded) < 1e-2


def test_sdxl_has_its_own(tmp_path: Path) -> None:
    student = sampled_by(write_sdxl(tmp_path / "xl"), "EulerDiscreteScheduler")
    (table,) = student.schedules(None, ays.NAME).values()
    assert [step.t for step in table.steps] == list(ays.TIMESTEPS["sdxl"][:10])


def test_samplers_that_take_no_timesteps_are_replaced_and_that_is_told(folder: Path) -> None:
    student = sampled_by(folder, "DDIMScheduler")
    assert student.schedules(None, ays.NAME)[10].sampler == "dpmsolver-multistep, align-your-steps"
    said = Console(width=200, record=True, file=StringIO())
    _tell_sampler(student, ays.NAME, said)
    _tell_sampler(sampled_by(folder, "EulerDiscreteScheduler"), ays.NAME, said)
    told = said.export_text()
    assert told == (
        "DDIMScheduler is not for align-your-steps: "
        "sampled by DPMSolverMultistepScheduler instead\n"
    )


def test_the_manifests_own_tables_are_not_taken_for_it(folder: Path) -> None:
    write_manifest(folder, steps=(10,))
    student = Student.open(folder)
    assert student.schedules([10])[10].sampler == "ddim"
    assert student.schedules([10], ays.NAME)[10].steps[1].t == 850


def by_dmd(folder: Path) -> Student:
    write_manifest(folder, steps=(4,), lineage=StudentLineage(own_timesteps="dmd"))
    return Student.open(folder)


REFUSED: dict[str, tuple[Callable[[Path], Student], str]] = {
    "lcm": (lambda f: sampled_by(f, "LCMScheduler"), r"timesteps of its own \(LCMScheduler\)"),
    "tcd": (lambda f: sampled_by(f, "TCDScheduler"), r"timesteps of its own \(TCDScheduler\)"),
    "dmd": (by_dmd, r"timesteps of its own \(by dmd\)"),
    "linear": (
        lambda f: sampled_by(f, "DDIMScheduler", beta_schedule="linear"),
        "has beta_schedule 'linear', but align-your-steps was fitted on 'scaled_linear'",
    ),
    "betas": (lambda f: sampled_by(f, "DDIMScheduler", beta_end=0.02), "has beta_end 0.02"),
    "zero snr": (
        lambda f: sampled_by(f, "DDIMScheduler", rescale_betas_zero_snr=True),
        "has rescale_betas_zero_snr True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_they_were_not_fitted_on_is_refused(folder: Path, case: str) -> None:
    make, reason = REFUSED[case]
    student = make(folder)
    with pytest.raises(EdgeflashError, match=reason) as refused:
        student.schedules([10], ays.NAME)
    assert re.search("leave --timesteps out$", str(refused.value))
    assert "\n" not in str(refused.value)


def test_other_names_and_counts_are_refused(folder: Path) -> None:
    student = Student.open(folder)
    with pytest.raises(EdgeflashError, match=r"no --timesteps 'align-steps' .*mean 'align-your"):
        student.schedules([10], "align-steps")
    with pytest.raises(EdgeflashError, match="steps is 0: give 1 or more"):
        student.schedules([0], ays.NAME)
