"""The demo as a person runs it, whole. Minutes, so it is slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeflash.demo import run_demo

FIELDS = {"name", "steps", "prompt_accuracy", "fd", "latency_ms_p50", "size_mib", "peak_rss_mib"}


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    run_demo(tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())
    systems = {(s["name"].partition(",")[0], s["steps"]): s for s in told["systems"]}
    assert all(s.keys() >= FIELDS and s["prompt_accuracy"] is not None for s in told["systems"])
    teacher, one = systems["teacher", 25], systems["shipped student", 1]
    assert one["latency_ms_p50"] <= teacher["latency_ms_p50"] / 10
    assert (tmp_path / "student/model_index.json").is_file()
    assert {p.name for p in tmp_path.glob("bundle-*")} >= {"bundle-onnx-fp32", "bundle-onnx-int8"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") >= 8 * len(told["systems"]) and "http" not in page.split("<body>")[1]
