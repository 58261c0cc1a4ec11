"""The benchmark on two-dimensional densities: it starts, comes to its end, and goes on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflash.roles import Method
from edgeflash.shelf import make, names

SCRIPT = Path(__file__).parent / "benchmarks" / "toy_densities.py"
RULE = {"blocks": {"rule": "base"}}
SHORT = ("--steps", "2", "--teacher-steps", "2")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a few points and small networks."""
    spec = importlib.util.spec_from_file_location("toy_densities", SCRIPT)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # which the script adds to
        spec.loader.exec_module(module)
    module.SAMPLES = module.DRAWN = 64
    module.TEACHER |= {"widths": (32,), "batch_size": 8}
    module.COMMON |= {"batch_size": 8, "warmup_steps": 0}
    return module


def table(out: Path) -> list[list[str]]:
    """Its rows, cell by cell."""
    lines = (out / "RESULTS.md").read_text().splitlines()
    return [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x.startswith("|")]


@pytest.mark.parametrize(("density", "count"), [("ring", 8), ("grid", 25)])
def test_samples_are_told_by_their_modes(toy: Any, density: str, count: int) -> None:
    """1 - exp(-2) of a Gaussian in the plane are within two standard deviations."""
    found = toy.told(toy.points(density, 40_000, seed=0), density)
    assert found["within"] == pytest.approx(0.8647, abs=0.01) and found["modes"] == count
    centres, spread = toy.modes(density)
    assert len(centres) == count and {"ring": 0.2, "grid": 0.05}[density] == spread
    one = np.repeat(centres[:1], 100, 0)
    assert toy.told(one, density) == {"within": 1.0, "modes": 1}
    assert toy.told(one + 2.1 * spread, density) == {"within": 0.0, "modes": 0}


def test_every_few_step_method_is_there_but_the_one_that_judges_pictures(toy: Any) -> None:
    few = {name for name in names(Method) if make(Method, name, RULE.get(name, {})).step_counts()}
    assert few - {"add"} == {*toy.METHODS}
    for name, options in toy.METHODS.items():
        runs = make(Method, name, options).step_counts()
        assert runs and {*runs} & {*toy.COUNTS}, name


def test_it_runs_to_its_end_and_goes_on_from_there(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.main([str(tmp_path), "lcm", "--density", "ring", *SHORT])
    heads, line, teacher, student, lcm = table(tmp_path)
    assert heads == ["method", "1 call", "2 calls", "4 calls", "s"] and len(line) == 5
    assert [row[0] for row in (teacher, student, lcm)] == [
        "teacher, its own sampler",
        "student, not trained",
        "lcm",
    ]
    assert all("%, " in cell for row in (teacher, student, lcm) for cell in row[1:4])

    def twice(*_: Any, **__: Any) -> None:
        raise AssertionError("what is there is made once more")

    with monkeypatch.context() as patch:
        patch.setattr(toy, "distill", twice)
        patch.setattr(toy, "draw", twice)
        toy.main([str(tmp_path), "lcm", "--density", "ring", *SHORT])
        assert table(tmp_path)[2:] == [teacher, student, lcm]
    toy.main([str(tmp_path), "lcm", "--density", "ring", "--steps", "3", "--teacher-steps", "2"])
    *_, refused = table(tmp_path)
    assert "was begun with another recipe (changed: lcm.steps)" in refused[1]
    with pytest.raises(SystemExit, match=r"another recipe \(changed: denoising.steps\)"):
        toy.main([str(tmp_path), "lcm", "--density", "ring", "--steps", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("density", ["ring", "grid"])
def test_every_method_has_its_figures(toy: Any, tmp_path: Path, density: str) -> None:
    toy.main([str(tmp_path), "--density", density, *SHORT])
    rows = {name: cells for name, *cells in table(tmp_path)[2:]}
    assert [*rows][2:] == [*toy.METHODS]
    for name, options in toy.METHODS.items():
        runs = make(Method, name, options).step_counts()
        there = ["%, " in cell for cell in rows[name][:3]]
        assert runs and there == [count in runs for count in toy.COUNTS], rows[name]
