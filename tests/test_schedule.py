"""The sampler as data: what a table may say, how it runs, how it is kept."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeflash.errors import EdgeflashError
from edgeflash.schedule import Entry, Guidance, Schedule, Step, advance


def toml(schedule: Schedule) -> str:
    data = schedule.model_dump(exclude_none=True)
    lines = [f'{key} = "{data.pop(key)}"' for key in ("sampler", "prediction")]
    lines.append(f"init = {data['init']!r}")
    for step in data["steps"]:
        lines += ["[[steps]]", *(f"{key} = {value!r}" for key, value in step.items())]
    return "\n".join(lines)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(FINITE, st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE, FINITE), min_size=1))
def test_a_schedule_survives_json_and_toml_bit_for_bit(
    init: float, rows: list[tuple[float, ...]]
) -> None:
    names = ("t", "in_scale", "a", "b", "c")
    steps = tuple(Step(**dict(zip(names, row, strict=True))) for row in rows)
    schedule = Schedule(sampler="s", prediction="epsilon", init=init, steps=steps)
    assert repr(Schedule.model_validate_json(schedule.model_dump_json())) == repr(schedule)
    assert repr(Schedule.model_validate(tomllib.loads(toml(schedule)))) == repr(schedule)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": []},
        {"steps": [{"t": 1, "in_scale": 1, "a": 1, "b": float("nan")}]},
        {"steps": [{"t": 1, "in_scale": 1, "a": 1, "b": 1, "d": 0.5}]},
        {"entries": [{"start": 1, "p": 1, "q": 1}]},
        {"gamma": 1},
    ],
)
def test_a_table_that_cannot_run_is_refused(change: dict[str, Any]) -> None:
    sound = {"sampler": "s", "prediction": "epsilon", "init": 1.0}
    sound["steps"] = [{"t": 1, "in_scale": 1, "a": 1, "b": 1}]
    Schedule.model_validate(sound)
    with pytest.raises(ValidationError):
        Schedule.model_validate(sound | change)


def test_advance_uses_every_column() -> None:
    step = Step(t=0, in_scale=1, a=2, b=3, c=5, d=7, e=11)
    x, output, noise, x_before, output_before = np.eye(5, dtype=np.float32)
    following = advance(step, x, output, noise=noise, previous=(x_before, output_before))
    assert following.tolist() == [2, 3, 5, 11, 7] and following.dtype == np.float32
    with pytest.raises(AssertionError, match="needs noise"):
        advance(step, x, output)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.floats(0, 1))
def test_strength_counts_as_diffusers_does(n: int, strength: float) -> None:
    entries = tuple(Entry(start=i, p=1, q=1) for i in range(n))
    steps = (Step(t=0, in_scale=1, a=1, b=1),) * n
    schedule = Schedule(sampler="s", prediction="sample", init=1, steps=steps, entries=entries)
    start = max(n - min(int(n * strength), n), 0)
    if start == n:
        with pytest.raises(EdgeflashError, match="leaves none to run") as refused:
            schedule.entry(strength)
        least = float(str(refused.value).rsplit(" ", 1)[1])
        assert schedule.entry(least).start == n - 1
    else:
        assert schedule.entry(strength).start == start


def test_classifier_free_guidance_joins_two_outputs() -> None:
    low, high = np.float32([1, 2]), np.float32([2, 0])
    joined = Guidance(kind="cfg", scale=3).guide(low, high)
    assert joined.tolist() == [4, -4] and joined.dtype == np.float32


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "none", "scale": 2},
        {"kind": "embedded", "scale": 2},
        {"kind": "embedded", "scale": 2, "channels": 3},
        {"kind": "cfg", "scale": 2, "channels": 2},
        {"kind": "cfg", "scale": -1},
    ],
)
def test_guidance_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Guidance.model_validate(wrong)


def test_reading_a_schedule_loads_no_torch() -> None:
    code = (
        "import sys, edgeflash.noise, edgeflash.schedule as s\n"
        "s.Schedule.model_validate_json(sys.argv[1])\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    steps = (Step(t=999, in_scale=1, a=0.5, b=-0.5),)
    text = Schedule(sampler="s", prediction="epsilon", init=1, steps=steps).model_dump_json()
    subprocess.run([sys.executable, "-c", code, text], check=True, timeout=60)
