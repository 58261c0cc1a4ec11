"""What keeps stages of an export right: whose folder it is, what made them, how much fits."""

from __future__ import annotations

import io
import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exported import QUIET
from forked import forked
from rich.console import Console

from edgeflash import shelf, talk
from edgeflash.bundle import Bundle
from edgeflash.disk import MANIFEST
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.export import apart, memory, pack
from edgeflash.export.journal import LOCK, Stage, run_folder
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.golden import Sampler
from edgeflash.lora import Lora
from edgeflash.machine import available_bytes, installed_bytes
from edgeflash.recipe import find_recipe, read_recipe
from edgeflash.roles import Target
from edgeflash.schedule import Guidance
from edgeflash.student import Student

PARTS = ("text_encoder", "unet", "vae_decoder")
STAGES = [f"{stage}-{part}" for part in PARTS for stage in ("record", "lower")]
HALF = {"precision": "fp16"}
FLOAT: dict[str, Any] = {}


def export(student: Path, out: Path, asked: dict[str, Any], **options: Any) -> Bundle:
    target, told = shelf.make(Target, "onnx", asked), ExportOptions(**options)
    return export_student(Student.open(student), target, out, told, console=QUIET)


def test_folders_that_exports_have_not_made_stay_as_they_are(
    one_step_student: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.run/lower-unet").mkdir(parents=True)
    (tmp_path / "out.run/lower-unet/thesis.txt").write_text("a person's own")
    with pytest.raises(EdgeflashError, match=r"out\.run: holds something else.*choose another"):
        export(one_step_student, tmp_path / "out", FLOAT)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["out.run", "thesis.txt"]
    with pytest.raises(EdgeflashError, match="holds something else"), run_folder(tmp_path / "out"):
        raise AssertionError
    (tmp_path / "other.run/record-unet").mkdir(parents=True)
    (tmp_path / "other.run/export.lock").touch()  # of one that was killed in its first stage
    with run_folder(tmp_path / "other") as run:
        assert (run / "record-unet").is_dir()


def test_two_exports_to_one_place_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def other(killed: bool) -> None:
        with run_folder(out):
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)

    with run_folder(out) as run:
        (run / "record-unet.json").write_text("{}")
        with pytest.raises(EdgeflashError, match=r"^another export to .*out is at work"):
            other(killed=False)
        assert forked(lambda: other(killed=False)) == [1]
        assert (run / "record-unet.json").exists()
        assert forked(lambda: run_folder(tmp_path / "beside").__enter__()) == [0]
    assert forked(lambda: other(killed=True)) == [-signal.SIGKILL]
    assert forked(lambda: other(killed=False)) == [0], "a lock dies with its process"


@pytest.mark.usefixtures("replay")
def test_changed_code_redoes_all_and_is_not_told(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, real = list[str](), Stage.begin

    def begin(stage: Stage) -> Path:
        begun.append(stage.name)
        return real(stage)

    monkeypatch.setattr(Stage, "begin", begin)
    out = tmp_path / "out"
    export(one_step_student, out, FLOAT)
    before = (out / MANIFEST).read_bytes()
    begun.clear()
    monkeypatch.setattr(pack, "code_sha256", lambda: "of other code")
    export(one_step_student, out, FLOAT)
    assert begun == [*STAGES, "verify"] and (out / MANIFEST).read_bytes() == before


def test_what_stages_are_made_by(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student.open(one_step_student)
    made = pack.made_by(student, shelf.make(Target, "onnx", {}))
    assert {"edgeflash", "torch", "onnx", "numpy", "onnx_ir", "code"} <= made.keys()
    assert "peft" not in made
    monkeypatch.setattr(student, "loras", (Lora(tmp_path / "a.safetensors", 1.0),))
    assert "peft" in pack.made_by(student, shelf.make(Target, "onnx", {}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pack, "CODE", ("code_of_a_test",))
    (tmp_path / "code_of_a_test").mkdir()
    seen = set()
    for name, text in (("a", "1"), ("a", "2"), ("b", "2"), ("b", "1")):
        (tmp_path / f"code_of_a_test/{name}.py").write_text(text)
        seen.add(pack.code_sha256.__wrapped__())
    assert len(seen) == 4


def test_what_does_not_fit_is_refused_before_the_work(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = memory.numbers_of(Student.open(one_step_student), "unet")
    assert (
        numbers * 4 < (one_step_student / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    )
    monkeypatch.setattr(memory, "numbers_of", lambda *_: 2_567_463_684)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 * 2**30)
    monkeypatch.setattr(memory, "installed_bytes", lambda: 16 * 2**30)
    with pytest.raises(EdgeflashError, match=r"some 31.7 GiB .* choose --precision fp32 or fp16"):
        export(one_step_student, tmp_path / "out", {"precision": "int8", "ranges": "entropy"})
    with pytest.raises(EdgeflashError, match=r"some 16.1 GiB .* choose --precision fp32 or fp16"):
        export(one_step_student, tmp_path / "out", {"precision": "int8"})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory, "installed_bytes", lambda: 8 * 2**30)
    with pytest.raises(
        EdgeflashError, match=r"8.0 GiB is all there is: free some memory, or export on"
    ):
        export(one_step_student, tmp_path / "out", HALF)
    student, target = Student.open(one_step_student), shelf.make(Target, "onnx", HALF)
    assert memory.less(student, target, "unet").startswith("choose --precision fp32, or free")
    monkeypatch.setattr(memory, "installed_bytes", lambda: 64 * 2**30)
    for have, at_once in ((None, 1), (20, 1), (28, 2)):
        monkeypatch.setattr(memory, "available_bytes", lambda have=have: have and have * 2**30)
        told = Console(record=True, file=io.StringIO(), width=999)
        assert memory.check(student, target, PARTS, told) == at_once
        assert not told.export_text()
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * 2**30)
    assert memory.check(student, target, PARTS, told) == 1
    assert "8.0 GiB are free: free some memory" in told.export_text()
    assert memory.check(student, target, [], told) == 1 and not told.export_text()


@pytest.mark.usefixtures("replay")
def test_finished_stages_ask_for_no_memory_and_others_go(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()
    real = memory.check

    def check(*given: Any) -> int:
        asked.append(list(given[2]))
        return real(*given)

    monkeypatch.setattr(memory, "check", check)
    out, run = tmp_path / "out", tmp_path / "out.run"
    export(one_step_student, out, FLOAT)
    for stage in ("record-unet_cached", "lower-unet_cached", "lower-vae_encoder"):
        (run / stage).mkdir()
        (run / f"{stage}.json").write_text("{}")
    (run / "lower-unet.json").unlink()
    export(one_step_student, out, FLOAT)
    export(one_step_student, out, FLOAT)
    (run / "record-unet.json").unlink()
    monkeypatch.setattr(memory, "installed_bytes", lambda: 0)
    with pytest.raises(EdgeflashError, match="unet would take"):
        export(one_step_student, out, FLOAT)
    assert asked == [[*PARTS], ["unet"], [], ["unet", "vae_decoder"]]
    kept = {*STAGES, *(f"{stage}.json" for stage in STAGES), "verify", "verify.json", LOCK}
    assert {path.name for path in run.iterdir()} == kept - {"record-unet.json"}


def test_a_training_leaves_stages_of_an_export(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/lower-unet.json").write_text("{}")
    with pytest.raises(EdgeflashError, match=r"out\.run: holds stages of an export"):
        distill(read_recipe(find_recipe("demo")), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.run").iterdir()] == ["lower-unet.json"]


def test_a_child_speaks_apart_from_what_libraries_print(capfd: pytest.CaptureFixture[str]) -> None:
    def speaks() -> None:
        say = talk.speaker()
        os.write(1, b"{a vendor")
        say({"begin": "x"})

    assert forked(speaks) == [0]
    told = capfd.readouterr()
    assert told.out == '{"begin": "x"}\n' and "{a vendor" in told.err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_listener_that_dies_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: talk.Message) -> None:
        raise OSError("a closed terminal")

    code = 'print(\'{"begin": "x"}\', flush=True); import time; time.sleep(60)'
    monkeypatch.setattr(apart, "COMMAND", [sys.executable, "-S", "-c", code])
    request = apart.Request(
        student="s", loras=(), to="onnx", target={}, options=ExportOptions(), run="r"
    )
    made = apart.Child(request, Future(), fails)
    assert made.recorded.wait(30)
    made.end()


def test_how_many_goldens_ship(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student.open(one_step_student)

    def most(**guidance: Any) -> list[int]:
        tables = student.schedules([1, 2, 4, 25]).values()
        samplers = [Sampler(table, Guidance(**guidance), (1, 4, 8, 8)) for table in tables]
        return [pack.most_goldens(student, sampler) for sampler in samplers]

    assert most() == [3, 3, 3, 3]
    size = sum(path.stat().st_size for path in student.weights("unet").files)
    monkeypatch.setattr(pack, "BIG_BYTES", size)
    samplers = [Sampler(t, Guidance(), (1, 4, 8, 8)) for t in student.schedules([8, 9]).values()]
    assert [pack.climbs_all(student, sampler) for sampler in samplers] == [True, False]
    monkeypatch.setattr(pack, "BIG_BYTES", size - 1)
    assert not pack.climbs_all(
        student, Sampler(student.schedules([1])[1], Guidance(), (1, 4, 8, 8))
    )
    monkeypatch.setattr(pack, "BIG_BYTES", 0)
    assert most() == [3, 3, 2, 1] and most(kind="cfg", scale=2.0) == [3, 2, 1, 1]
    monkeypatch.setattr(pack, "GOLDENS_BYTES", 1000)
    monkeypatch.setattr(pack, "_write_golden", lambda tape, number, folder: number)
    tape: Any = SimpleNamespace(goldens=[{"a": np.zeros(50), "b": np.zeros(25)}] * 4)
    for i, (networks_bytes, written) in enumerate(((0, 1), (59_999, 1), (60_000, 2), (10**9, 3))):
        (tmp_path / str(i)).mkdir()
        found = pack.write_goldens(tape, 3, tmp_path / str(i), networks_bytes)
        assert found == (*range(written),)


def test_limits_of_containers_count(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_bytes(tmp_path) is None
    write(
        "proc/meminfo",
        "MemTotal: 9900 kB\nSwapTotal: 100 kB\nMemAvailable:  8000 kB\nSwapFree: 1000 kB\n",
    )
    assert available_bytes(tmp_path) == 9000 * 1024
    assert installed_bytes(tmp_path) == 10_000 * 1024
    write("proc/self/cgroup", "0::/pod/box\n")
    write("sys/fs/cgroup/pod/memory.max", "5000000\n")
    write("sys/fs/cgroup/pod/memory.current", "3000000\n")
    write("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 300000\nactive_file 200000\n")
    write("sys/fs/cgroup/pod/box/memory.max", "max\n")
    assert available_bytes(tmp_path) == 2_500_000
    assert installed_bytes(tmp_path) == 5_000_000
    write("proc/self/cgroup", "4:memory:/box\n3:cpu:/\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "400")
    assert available_bytes(tmp_path) == 600


def test_engines_are_not_taken_up_for_other_gpus() -> None:
    made = [shelf.make(Target, "tensorrt", {"precision": word}) for word in ("fp8", "int8")]
    shapes = [each.shaped_by("text_encoder") for each in made]
    assert shapes[0] != shapes[1]
