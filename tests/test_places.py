"""What is written for people: whole or not at all, asked for before the work, told in one line."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_bundle import tiny

from edgeflash import cli
from edgeflash.bundle import Bundle
from edgeflash.disk import check_replaceable, check_writable, drafted, read_json, write_for_people
from edgeflash.errors import EdgeflashError, Stopped, ended_as_by_ctrl_c, in_one_line
from edgeflash.export_options import ExportOptions
from edgeflash.manifest import read_manifest
from edgeflash.planning import Budget, Wish, _check_places
from edgeflash.png import check_png, save_png
from edgeflash.report import Report, read_report
from edgeflash.report_html import write_html
from edgeflash.runtimes import bench, measure, room
from edgeflash.runtimes.measure import Job

SYSTEM: dict[str, Any] = {
    "latency_ms_p50": 1,
    "latency_ms_p90": 1,
    "size_mib": 1,
    "name": "a",
    "steps": 1,
}
SYSTEM |= {"conditions": {"runtime": "onnx", "height": 8, "width": 8}}
MACHINE = {"cpu": "a", "cores": 1, "ram_mib": 1, "os": "a", "python": "3"}
REPORT = Report.model_validate({"title": "a", "machine": MACHINE, "systems": [SYSTEM]})
WRITERS: dict[str, Callable[[Path], object]] = {
    "report.json": REPORT.save,
    "report.html": lambda path: write_html(REPORT, path),
    "a.png": lambda path: save_png(Image.new("RGB", (8, 8)), path),
    "plan.toml": lambda path: write_for_people(path, "a = 1"),
}


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of every file."""

    def half(path: Path, *_: object, **__: object) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def save(_: Image.Image, path: Path) -> None:
        half(Path(path))

    monkeypatch.setattr(Path, "write_text", half)
    monkeypatch.setattr(Image.Image, "save", save)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    before = path.read_bytes()
    full(monkeypatch)
    with pytest.raises(Stopped, match=rf"{name}: not written \(No space left on device\); make"):
        WRITERS[name](path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_bench_tells_of_a_full_disk_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(bundle=str(tiny(tmp_path / "b")), runtime="onnx", prompts=("red",), runs=1)
    job = job.model_copy(update={"warmup_runs": 0, "images": str(tmp_path / "out")})
    full(monkeypatch)
    with pytest.raises(EdgeflashError, match=r"out/0\.png: not written"):
        measure.measure(job, lambda *_: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_words_for_a_full_disk_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device")

    assert in_one_line(command) == 2
    assert capsys.readouterr().err.startswith("edgeflash: disk full: free some space")


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "file/a", tmp_path / "astray/a/b", Path("/proc/a/b")):
        for ask in (check_writable, lambda path: check_png(path / "a.png"), check_replaceable):
            with pytest.raises(EdgeflashError, match=rf"^{out}.*; choose another --out$"):
                ask(out)
    with pytest.raises(EdgeflashError, match="file: is a file; choose another --report"):
        check_writable(tmp_path / "file", flag="--report")
    with pytest.raises(EdgeflashError, match="is a folder"):
        (tmp_path / "a.png").mkdir()
        check_png(tmp_path / "a.png")
    check_writable(tmp_path / "new/deep")
    check_writable(tmp_path / "file", file=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "astray", "file"]


def test_a_full_disk_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: Path("/dev/full").open("wb"))
    for ask in (check_writable, lambda path: check_png(path / "a.png"), check_replaceable):
        with pytest.raises(Stopped, match=r"\(No space left on device\); choose another --out$"):
            ask(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run", "{b}", "--prompt", "x", "--out", "/proc/a.png"], "/proc/a.png: nothing can be"),
        (["bench", "{b}", "--out", "/proc/a"], "/proc/a: nothing can be"),
        (["verify", "{b}", "--bisect", "nosuch"], "nosuch: no bundle folder"),
        (["score", "{b}", "--steps", "3,9"], "{b}: this bundle cannot draw in 9 steps"),
    ],
)
def test_nothing_is_run_before(
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edgeflash.runtimes.on_onnx import OnnxRuntime

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(OnnxRuntime, "open", begun)
    monkeypatch.setattr(bench, "run_apart", begun)
    monkeypatch.setattr("edgeflash.score.score", begun)
    monkeypatch.setattr("edgeflash.shapes.SIZE_PX", 8)
    bundle = tiny(tmp_path / "b")
    given = [word.format(b=bundle) for word in words]
    monkeypatch.setattr(sys, "argv", ["edgeflash", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith(f"edgeflash: {line.format(b=bundle)}")


def test_batches_beyond_all_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny(tmp_path / "b"))
    job = Job(bundle=str(bundle.folder), runtime="onnx", prompts=("red",), batch=100_000)
    monkeypatch.setattr(room, "installed_bytes", lambda: 2**28)
    with pytest.raises(EdgeflashError, match=r"100,000 pictures at a time .*a smaller --batch"):
        bench.bench(job, tmp_path / "out", tell=lambda *_: None)
    assert not (tmp_path / "out").exists()
    pictures = 2 * 4 * 3 * 8 * 8 * 100_000
    monkeypatch.setattr(room, "installed_bytes", lambda: pictures + 1)
    with pytest.raises(EdgeflashError):  # what is alive in a network counts too
        room.check_batch(bundle, 100_000)
    room.check_batch(bundle, 1000)


def test_a_draft_is_never_taken_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), drafted(tmp_path / "a.json") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_plan_replaces_plans_alone(tmp_path: Path) -> None:
    notes, plan = tmp_path / "notes.txt", tmp_path / "plan.toml"
    notes.write_text("buy milk")
    plan.write_text('default = "int8"')
    wish = Wish("onnx", {}, Budget(1.0, None), (), ExportOptions())
    _check_places(plan, tmp_path / "report", wish)
    with pytest.raises(EdgeflashError, match=r"notes\.txt: holds no plan, and would be lost"):
        _check_places(notes, tmp_path / "report", wish)


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_a_command_as_ctrl_c_does(
    ctrl_c: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Scratch folders go with it, also where Ctrl-C is ignored; a copy of the process just goes."""
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, ctrl_c)
    before = signal.getsignal(signal.SIGTERM)
    with ended_as_by_ctrl_c():
        with pytest.raises(KeyboardInterrupt), tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not [*tmp_path.iterdir()] and signal.getsignal(signal.SIGTERM) is before


def test_json_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "edgeflash.json").write_text("[" * 200_000)
    for read in (read_json, read_report):
        with pytest.raises(EdgeflashError, match="JSON"):
            read(tmp_path / "edgeflash.json")
    with pytest.raises(EdgeflashError, match="JSON"):
        read_manifest(tmp_path, "bundle")
