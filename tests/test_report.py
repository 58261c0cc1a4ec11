"""Reports: figures, comparisons and the page."""

from __future__ import annotations

import doctest
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from edgeflash import machine, report, report_svg, shelf
from edgeflash.comparison import compare, comparison_table
from edgeflash.errors import EdgeflashError
from edgeflash.inspect import verdicts
from edgeflash.machine import PACKAGES, Machine
from edgeflash.report import Percentiles, Report, Sustained, System, read_report
from edgeflash.roles import Runtime

MACHINE = Machine(cpu="Imaginary 9", cores=4, ram_mib=8192, os="Linux", python="3.11")


def system(name: str = "student", **changes: Any) -> System:
    conditions = {"runtime": "onnx", "height": 64, "width": 64, "options": {"threads": 2}}
    conditions |= {"runs": 10}
    fields: dict[str, Any] = {
        "steps": 4,
        "latency_ms_p50": 60.0,
        "latency_ms_p90": 66.0,
        "size_mib": 12.0,
        "conditions": conditions | changes.pop("conditions", {}),
    }
    return System.model_validate({"name": name} | fields | changes)


def report_of(*systems: System, **changes: Any) -> Report:
    return Report(**{"title": "test", "machine": MACHINE, "systems": systems} | changes)


def png(colour: int = 0, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(stream, "png")
    return stream.getvalue()


def shown(table: Any, width: int = 250) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


# --- figures and files ------------------------------------------------------------------------


def test_examples_in_the_docstrings() -> None:
    for module in (report, report_svg, machine):
        assert doctest.testmod(module).failed == 0


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    stages = {"unet": Percentiles(p50_ms=1.5, p90_ms=2)}
    whole = report_of(system(prompt_accuracy=0.9, stages=stages, extra={"per colour": 0.97}))
    whole.save(tmp_path / "deep/report.json")
    assert read_report(tmp_path / "deep") == whole == read_report(tmp_path / "deep/report.json")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.json"]
    written = json.loads((tmp_path / "deep/report.json").read_text())["systems"][0]
    promised = "name steps prompt_accuracy fd latency_ms_p50 size_mib peak_rss_mib"
    assert set(promised.split()) <= written.keys()


def test_what_is_no_report_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match=r"report\.json: no such report"):
        read_report(tmp_path)
    path = tmp_path / "report.json"
    for text, said in (
        ("{", "not even JSON"),
        ("[]", "no report but a list"),
        ('{"kind": "bundle"}', "no report but bundle"),
        ('{"kind": "report", "title": 3}', "title = 3: must be text"),
        ('{"kind": "report", "titel": "a"}', "no key in .*'titel' .*did you mean 'title'"),
    ):
        path.write_text(text)
        with pytest.raises(EdgeflashError, match=said) as caught:
            read_report(path)
        assert "\n" not in str(caught.value)


def test_percentiles() -> None:
    assert Percentiles.of(range(101)) == Percentiles(p50_ms=50, p90_ms=90)


def test_drift_is_that_of_the_last_span() -> None:
    """40 runs of 100 ms that end at 150: spans of two."""
    found = Sustained.of([*np.full(20, 100.0), *np.linspace(102.5, 150, 20)], spans=20)
    assert len(found.ended_s) == 20 and found.ended_s[:2] == (0.2, 0.4)
    assert found.p50_ms[0] == 100 and found.p50_ms[-1] == pytest.approx(148.75)
    assert found.drift == pytest.approx(0.4875)
    table = report.SystemsTable(report_of(system(sustained=found)))
    assert "min without a pause: 100 ms at first, 149 at last (+48.8%)" in shown(table)
    alone = Sustained.of([80.0])
    assert alone.p50_ms == (80,) and alone.drift == 0


def test_the_schema_is_that_of_the_reports() -> None:
    """Write it anew: python -m edgeflash.report"""
    published = Path(report.__file__).with_name("report.schema.json").read_text("utf-8")
    assert published == report.schema()


def test_the_terminal_table_shows_what_was_measured() -> None:
    two = report_of(system(prompt_accuracy=0.914), system("[b]bold[/b]", fd=3.14159))
    text = shown(report.SystemsTable(two))
    assert "[b]bold[/b]" in text
    assert "prompt accuracy [%]" in text and "91.4" in text and "3.14" in text
    assert "peak RSS" not in text  # no system has it


def test_a_narrow_terminal_loses_no_column() -> None:
    every = dict.fromkeys((field for field, _, _ in report.FIGURES), 123.456)
    every["prompt_accuracy"] = 0.999
    made = report_of(system("a student with a rather long name", **every), system("other"))
    for width in (80, 200):
        text = shown(report.SystemsTable(made), width=width)
        assert "…" not in text and "a student with a rather long name" in text
        words = {word for _, heading, _ in report.FIGURES for word in heading.split()}
        assert all(word in text for word in words), text


def test_verdicts_fit_a_narrow_terminal() -> None:
    attributes = dict.fromkeys(["count", "shape", "background"], 0.25)
    one: Any = SimpleNamespace(
        prompt_accuracy=0.5, by_count={1: 0.75, 2: 0.125}, by_attribute=attributes, fd=None
    )
    text = shown(verdicts(dict.fromkeys((1, 2, 4, 8), one)), width=80)
    rows = [line.split() for line in text.splitlines()]
    assert ["two", "objects", *["12.5%"] * 4] in rows and ["background", *["25.0%"] * 4] in rows
    assert ["1", "step", "2", "steps", "4", "steps", "8", "steps"] in rows


def test_the_machine_tells_itself() -> None:
    here = Machine.here()
    assert here.cpu and here.cores >= 1 and here.ram_mib > 100 and "numpy" in here.packages
    assert MACHINE.model_copy(update={"load_1min": 1.5}).busy
    assert not MACHINE.model_copy(update={"load_1min": 0.5}).busy


# --- compare ----------------------------------------------------------------------------------


def test_compare_ranks_by_what_is_better_for_each_figure() -> None:
    a = report_of(system("fp32", prompt_accuracy=0.8, images_per_s=16, peak_rss_mib=200))
    faster = {"latency_ms_p50": 30.0, "latency_ms_p90": 33.0, "images_per_s": 33}
    b = report_of(system("int8", prompt_accuracy=0.6, peak_rss_mib=200.5, **faster))
    found = {row.figure: row for row in compare(a, b).rows}
    assert compare(a, b).differences == ()
    assert found["latency p50"].ratio == 0.5 and found["latency p50"].better == "b"
    assert found["prompt accuracy"].ratio == pytest.approx(0.75)
    assert found["prompt accuracy"].better == "a" and found["images/s"].better == "b"
    assert found["peak RSS"].better is None  # within 1 %
    assert "FD" not in found
    text = shown(comparison_table(compare(a, b), "old.json", "new[1].json"))
    assert "0.500" in text and "a old.json" in text and "b new[1].json" in text


def test_latencies_within_their_own_spread_are_equal() -> None:
    a = report_of(system(latency_ms_p50=60.0, latency_ms_p90=80.0))
    b = report_of(system(latency_ms_p50=50.0, latency_ms_p90=52.0))
    assert compare(a, b).rows[0].better is None
    c = report_of(system(latency_ms_p50=39.0, latency_ms_p90=40.0))
    assert compare(a, c).rows[0].better == "b"


def test_what_follows_from_equal_latencies_is_equal_too() -> None:
    """And a load or a first image was taken once: it names no winner."""
    once: dict[str, Any] = {"first_image_ms": 900.0, "cold_load_ms": 900.0, "warm_load_ms": 90.0}
    slow = system(latency_ms_p50=100.0, latency_ms_p90=110.0, images_per_s=10, **once)
    near: dict[str, Any] = {
        "latency_ms_p50": 103.0,
        "latency_ms_p90": 118.0,
        "images_per_s": 1000 / 103,
    }
    found = compare(
        report_of(slow), report_of(system(**near, **{name: ms / 3 for name, ms in once.items()}))
    )
    assert len(found.rows) == 7 and all(row.better is None for row in found.rows)
    fast: dict[str, Any] = {"latency_ms_p50": 50, "latency_ms_p90": 51, "images_per_s": 20}
    ranked = compare(report_of(slow), report_of(system(**fast))).rows
    assert [row.better for row in ranked] == ["b", "b", "b", None]
    alone = report_of(system(**fast, conditions={"runs": 1}))
    assert not any(row.better for row in compare(report_of(slow.model_copy()), alone).rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 1}, "steps: 4 against 1"),
        ({"conditions": {"batch": 8}}, "batch: 1 against 8"),
        ({"conditions": {"device": "cuda"}}, "device: cpu against cuda"),
        ({"conditions": {"options": {"threads": 4}}}, r"options: {'threads': 2} against"),
    ],
)
def test_nothing_is_ranked_under_other_conditions(changes: dict[str, Any], said: str) -> None:
    slower: dict[str, Any] = {"latency_ms_p50": 600.0, "latency_ms_p90": 601.0}
    found = compare(report_of(system()), report_of(system(**slower, **changes)))
    assert len(found.differences) == 1 and re.search(said, found.differences[0])
    assert all(row.better is None for row in found.rows)
    assert found.rows[0].ratio == 10  # shown all the same
    text = " ".join(shown(comparison_table(found)).split())
    assert "not ranked, conditions differ: " + found.differences[0] in text


def test_another_machine_is_another_condition() -> None:
    assert differences({"cpu": "Imaginary 10"}) == ("cpu: Imaginary 9 against Imaginary 10",)
    assert differences({"os": "Darwin"}) == ("os: Linux against Darwin",)
    assert differences({"python": "3.12.1"}) == ("python: 3.11 against 3.12",)
    assert not differences({"python": "3.11.9", "ram_mib": 1})
    idle = {"load_1min": 0.1}
    assert differences({"load_1min": 2.5}, idle) == ("load: 0.1 against 2.5",)
    assert not differences({"load_1min": 0.9}, idle)
    busy = {"load_1min": 2.5}
    assert differences({"load_1min": 60}, busy) == ("load: 2.5 against 60",)
    assert not differences({"load_1min": 3.0}, busy)


def test_versions_of_the_runtime_that_ran_are_conditions() -> None:
    old, new = ({"packages": {"onnxruntime": v, "torch": v}} for v in ("1.20", "1.31"))
    assert differences(new, old) == ("onnxruntime: 1.20 against 1.31",)
    assert differences(new, old, runtime="torch") == ("torch: 1.20 against 1.31",)
    gone = {"packages": {"onnxruntime-gpu": "1.20"}}
    assert "onnxruntime: 1.20 against None" in differences(gone, old)
    assert set(shelf.names(Runtime)) == {name for moved in PACKAGES.values() for name in moved}


def differences(
    there: dict[str, Any], here: dict[str, Any] | None = None, runtime: str = "onnx"
) -> tuple[str, ...]:
    """What is told of two machines, and whether it keeps the figures from being ranked."""
    machines = [MACHINE.model_copy(update=changes) for changes in (here or {}, there)]
    slow, fast = (system(size_mib=mib, conditions={"runtime": runtime}) for mib in (9, 3))
    a, b = (report_of(s, machine=m) for s, m in zip((slow, fast), machines, strict=True))
    found = compare(a, b)
    assert any(row.better for row in found.rows) is not bool(found.differences)
    return tuple(line.removeprefix("machine ") for line in found.differences)


def test_systems_are_paired_by_name() -> None:
    a = report_of(system("x"), system("y", latency_ms_p50=10))
    b = report_of(system("y", latency_ms_p50=20), system("z"))
    found = compare(a, b)
    rows = found.rows
    assert {row.system for row in rows} == {"y"} and rows[0].ratio == 2
    assert found.remarks == ("only in a: x", "only in b: z") and not found.differences
    assert "only in b: z" in shown(comparison_table(found))
    other = b.model_copy(update={"prompts": ("a ring",)})
    assert compare(a, other).remarks[0] == "prompts differ"
    with pytest.raises(
        EdgeflashError, match=r"no system is in both reports \(a has: x, y; b has: z"
    ):
        compare(a, report_of(system("z"), system("w")))


# --- the page ---------------------------------------------------------------------------------
