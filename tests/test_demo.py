"""The demo: what it takes the place of, and, in minutes, the whole of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgeflash import demo
from edgeflash.demo import run_demo
from edgeflash.disk import MANIFEST
from edgeflash.embedded import embedded
from edgeflash.errors import EdgeflashError
from edgeflash.student import Student

FIELDS = {"name", "steps", "prompt_accuracy", "fd", "latency_ms_p50", "size_mib", "peak_rss_mib"}


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    run_demo(tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())
    systems = {(s["name"].partition(",")[0], s["steps"]): s for s in told["systems"]}
    assert all(s.keys() >= FIELDS and s["prompt_accuracy"] is not None for s in told["systems"])
    teacher, one = systems["teacher", 25], systems["shipped student", 1]
    assert one["latency_ms_p50"] <= teacher["latency_ms_p50"] / 10
    named = [(s["name"].rpartition(",")[0], s) for s in told["systems"]]  # without ", 4 steps"
    right = {(name, s["steps"]): s["prompt_accuracy"] for name, s in named}
    whole, best = "shipped student, fp32", right["teacher", 25]
    assert right[whole, 2] >= 0.7 * best and right[whole, 4] >= 0.85 * best
    assert all(right["shipped student, int8", n] >= 0.97 * right[whole, n] for n in (1, 2, 4))
    assert (tmp_path / "student/model_index.json").is_file()
    assert {p.name for p in tmp_path.glob("bundle-*")} >= {"bundle-onnx-fp32", "bundle-onnx-int8"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") >= 8 * len(told["systems"]) and "http" not in page.split("<body>")[1]


def told_of(folder: Path, **lineage: Any) -> None:
    """Changes what a student tells of its making."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["lineage"] |= lineage
    path.write_text(json.dumps(manifest))


def refusal(out: Path, *, full: bool) -> str:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(EdgeflashError) as caught:
        run_demo(out, full=full)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    return str(caught.value)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo breaks off where its work would begin, or right after the shipped student."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_brief", stop)
    monkeypatch.setattr("edgeflash.distill.run.distill", stop)


@pytest.mark.usefixtures("stops")
@pytest.mark.parametrize("full", [False, True])
def test_a_folder_that_holds_other_things_is_not_touched(full: bool, tmp_path: Path) -> None:
    shutil.copytree(embedded("shapes-student"), tmp_path / "student")
    said = refusal(tmp_path, full=full)
    assert "holds what edgeflash demo has not made; choose another --out" in said


@pytest.mark.usefixtures("stops")
def test_the_demo_runs_again_over_its_own_output(tmp_path: Path) -> None:
    for full in (False, True, False):
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path / "demo", full=full)
    assert Student.open(tmp_path / "demo/student").manifest


@pytest.mark.usefixtures("stops")
def test_a_student_that_was_trained_gives_way_only_to_its_like(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path)
    told_of(tmp_path / "student", seconds=1.5)  # as demo --full leaves it
    assert "student: is another student than this demo puts there" in refusal(tmp_path, full=False)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, full=True)
    told_of(tmp_path / "student", recipe_sha256="0" * 64)
    for full in (False, True):
        assert "student: is another student" in refusal(tmp_path, full=full)
    shutil.rmtree(tmp_path / "student")
    shutil.copytree(embedded("shapes-student"), tmp_path / "student-brief")
    assert "student-brief: is another student" in refusal(tmp_path, full=False)


@pytest.mark.usefixtures("stops")
def test_the_demo_asks_for_all_its_packages_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = refusal(tmp_path, full=True)
    assert said == "demo needs onnxscript: pip install 'edgeflash[export]'"
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "'edgeflash[distill,export]'" in refusal(tmp_path, full=True)


def test_the_pruned_teacher_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    own = tmp_path / "student-pruned/notes.txt"
    own.parent.mkdir()
    own.write_text("a person's own")
    monkeypatch.setattr(demo, "_export", stop)
    with pytest.raises(KeyboardInterrupt):
        demo._brief(tmp_path, Console(stderr=True))
    assert list(tmp_path.rglob("*.*")) == [own]
