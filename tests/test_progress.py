"""What an export tells while it works, and what is left by earlier ones."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from edgeflash import shelf
from edgeflash.distill.telling import summed
from edgeflash.export import progress
from edgeflash.export.line import export_student
from edgeflash.export.progress import Rates, Stages
from edgeflash.roles import Target
from edgeflash.student import Student


def rates(file: Path, to: str = "onnx", unet: int = 1000, drawn: float = 10) -> Rates:
    return Rates(to, {"text_encoder": 500, "unet": unet}, drawn, file)


def test_what_is_left_is_known_from_an_earlier_export_of_like_work(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "times.json"
    first = rates(file)
    assert first.expected("lower unet to int8") is None
    first.note("lower unet to int8", 40)
    first.note("capture unet", 6)
    first.note("pack", 3)
    first.note("verify on onnx", 0.1)  # too short to matter
    first.save()
    other = rates(file, unet=2000, drawn=5)
    assert other.expected("lower unet to int8") == pytest.approx(80)  # twice the weights
    assert other.expected("capture unet") == pytest.approx(6)  # and half the pictures
    assert other.expected("pack") == pytest.approx(3 * 2500 / 1500)
    assert other.expected("verify on onnx") is None and other.expected("lower unet to fp32") is None
    assert rates(file, to="coreml").expected("lower unet to int8") is None
    assert rates(file, unet=9000).expected("lower unet to int8") is None  # of that nothing is known


def test_a_cache_that_is_broken_or_not_writable_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    for text in ("{", "[1]", '{"onnx: pack": 3}'):
        file.write_text(text)
        assert rates(file).expected("pack") is None
    below = rates(file / "times.json")
    below.note("pack", 5)
    below.save()


def recorded(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_every_half_minute_where_there_is_no_terminal(tmp_path: Path) -> None:
    known = rates(tmp_path / "times.json")
    known.note("capture unet", 150)
    known.save()
    stages, now = Stages(recorded(), known), time.monotonic()
    stages.begin("capture unet")
    stages.begin("lower text_encoder to fp32")
    assert stages.lines(now + 29) == []
    assert stages.lines(now + 40) == [
        "capture unet: 40 s so far, about 2 min left",
        "lower text_encoder to fp32: 40 s so far",
    ]
    assert stages.lines(now + 60) == []
    stages.end("lower text_encoder to fp32", 61, 2048)
    assert stages.lines(now + 200) == ["capture unet: 3 min so far, longer than the last time"]
    stages.end("capture unet", 201)
    assert stages.lines(now + 999) == []
    ended = said(stages.console).splitlines()
    assert [line.split() for line in ended] == [
        ["lower", "text_encoder", "to", "fp32", "61.0", "s", "2.00", "GiB"],
        ["capture", "unet", "201.0", "s"],
    ]


def test_a_stage_that_fails_tells_no_time(tmp_path: Path) -> None:
    stages = Stages(recorded(), rates(tmp_path / "times.json"))
    with pytest.raises(KeyError), stages.showing(), stages.told("pack"):
        raise KeyError
    assert not said(stages.console) and not (tmp_path / "times.json").exists()
    assert stages.lines(time.monotonic() + 99) == []


def test_bars_on_a_terminal_go_with_their_stages(tmp_path: Path) -> None:
    known = rates(tmp_path / "times.json")
    known.note("capture unet", 150)
    known.save()
    stages = Stages(recorded(terminal=True), known)
    with stages.showing():
        with stages.told("capture unet"), stages.told("lower text_encoder to fp32"):
            assert stages._bars is not None
            stages._bars.refresh()
        assert stages._bars is None
        with pytest.raises(KeyError), stages.told("pack"):
            raise KeyError
    assert stages._bars is None
    shown = said(stages.console)
    assert "about 2 min left" in shown and "lower text_encoder to fp32" in shown


@pytest.mark.usefixtures("replay")
def test_an_export_keeps_what_its_stages_took(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "WORTH_SECONDS", 0)
    target, console = shelf.make(Target, "onnx", {}), recorded()
    export_student(Student.open(one_step_student), target, tmp_path / "out", console=console)
    kept = json.loads((tmp_path / "cache" / "edgeflash" / "export-times.json").read_text())
    assert {"onnx: capture unet", "onnx: lower unet to fp32", "onnx: pack"} <= kept.keys()
    assert "lower unet to fp32" in said(console) and "pack" in said(console)


def test_a_line_tells_the_errors_of_all_blocks_as_one_figure() -> None:
    terms = {"student/denoising": 1.0, "student/features.down": 0.5, "student/features.up": 2.0}
    assert summed(terms) == {"student/denoising": 1.0, "student/features": 2.5}
