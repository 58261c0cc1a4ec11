"""Exports that go on where they were cut off, and what of them a changed option redoes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from exported import QUIET
from forked import forked

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.export import apart, hashing, line, pack, plan
from edgeflash.export.hashing import homes_of
from edgeflash.export.journal import Outcome, Stage
from edgeflash.export.line import export_student, planned
from edgeflash.export.plan import Plan
from edgeflash.export.stages import Run, lower_stage, record_stage
from edgeflash.export_options import ExportOptions
from edgeflash.no_memory import memory_named
from edgeflash.roles import Target
from edgeflash.schedule import Guidance
from edgeflash.student import Student, hashes_in

PARTS = ("text_encoder", "unet", "vae_decoder")
STAGES = [f"{stage}-{part}" for part in PARTS for stage in ("record", "lower")]
HALF = {"precision": "fp16"}
FLOAT: dict[str, Any] = {}
BESIDE: dict[str, Any] = {"external_mib": 0}  # all weights beside the graphs, as large ones are


def export(student: Path, out: Path, asked: dict[str, Any], **options: Any) -> Bundle:
    target, told = shelf.make(Target, "onnx", asked), ExportOptions(**options)
    return export_student(Student.open(student), target, out, told, console=QUIET)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(home: Any, name: str) -> None:
    real = getattr(home, name)
    setattr(home, name, lambda *given, **named: dies() or real(*given, **named))


@pytest.mark.usefixtures("replay")
def test_kill_9_in_every_stage_and_the_same_command_again(
    one_step_student: Path, tmp_path: Path, begun: list[str]
) -> None:
    """Each life finishes the stage that the one before died in, and dies in the next."""
    whole = export(one_step_student, tmp_path / "whole", BESIDE)
    assert begun == [*STAGES, "verify"]
    out, log = tmp_path / "cut", tmp_path / "log"
    real = Stage.begin

    def life(ends: Callable[[], None]) -> None:
        ends()
        export(one_step_student, out, BESIDE)

    def in_stage(name: str) -> None:
        def begin(stage: Stage) -> Path:
            with log.open("a") as stream:
                stream.write(f"{stage.name} ")
            folder = real(stage)
            if stage.name == name:
                (folder / "half").write_text("half a network")
                dies()
            return folder

        setattr(Stage, "begin", begin)  # noqa: B010

    ends: dict[str, Callable[[], None]] = {n: lambda n=n: in_stage(n) for n in STAGES}  # type: ignore[misc]
    ends |= {"pack": lambda: (in_stage(""), deadly(pack, "gather"))[0]}
    ends |= {"verify": lambda: (in_stage(""), deadly(line, "verify"))[0]}
    ends |= {"place": lambda: (in_stage(""), deadly(pack, "write_manifest"))[0]}
    seen = []
    for end in ends.values():
        log.write_text("")
        assert forked(lambda end=end: life(end)) == [-signal.SIGKILL]  # type: ignore[misc]
        assert not out.exists()
        seen.append(log.read_text().split())
    pairs = [STAGES[:1], *map(list, pairwise(STAGES))]
    assert seen == [*pairs, STAGES[-1:], [], ["verify"]]
    begun.clear()
    made = export(one_step_student, out, BESIDE)
    assert begun == []
    assert (out / MANIFEST).read_bytes() == (whole.folder / MANIFEST).read_bytes()
    assert Bundle.open(out, check="sha256").manifest == made.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *["cut", "cut.run", "log", "whole", "whole.run"]
    ]
    graph, weights = out / "unet/model.onnx", out / "unet/model.onnx_data"
    assert graph.stat().st_nlink == 2, "the same bytes on the disk, once"
    assert weights.stat().st_nlink == 1, "of which onnx wants no second name"
    assert not (tmp_path / "cut.run/lower-unet/unet/model.onnx_data").exists()


@pytest.mark.usefixtures("replay")
def test_weights_that_a_bundle_was_given(
    one_step_student: Path, tmp_path: Path, begun: list[str]
) -> None:
    """They come back from it, in the making or in its place, whatever becomes of it."""
    out, kept = tmp_path / "out", tmp_path / "out.run/lower-unet/unet/model.onnx_data"
    export(one_step_student, out, BESIDE)
    manifest = (out / MANIFEST).read_bytes()
    begun.clear()
    for _ in range(2):
        export(one_step_student, out, BESIDE)
        assert begun == [] and not kept.exists()
    with pytest.raises(EdgeflashError, match="misses its floor"):
        export(one_step_student, out, BESIDE, floors={"L3.psnr_db": 999.0})
    assert begun == [] and kept.exists() and (out / MANIFEST).read_bytes() == manifest

    shutil.rmtree(out)
    os.truncate(kept, 99)
    export(one_step_student, out, BESIDE)
    assert begun == ["lower-unet"] and (out / MANIFEST).read_bytes() == manifest
    assert Bundle.open(out, check="sha256")
    begun.clear()
    export(one_step_student, out, BESIDE, floors={"L3.psnr_db": 20.0})
    assert begun == ["verify"]
    begun.clear()
    (out / "unet/model.onnx_data").write_bytes(bytes((out / "unet/model.onnx_data").stat().st_size))
    shutil.rmtree(out / "vae_decoder")
    export(one_step_student, out, BESIDE)
    assert begun == ["lower-unet", "lower-vae_decoder", "verify"]
    assert Bundle.open(out, check="sha256")


def test_a_finished_stage_is_taken_up_as_it_was_left(tmp_path: Path) -> None:
    def stage(**inputs: object) -> Stage:
        return Stage(tmp_path, "lower-unet", lambda: inputs)

    assert stage(precision="fp16").outcome() is None
    (stage().begin() / "unet").mkdir()
    path = tmp_path / "lower-unet/unet/model"
    path.write_bytes(b"network")
    made = stage(precision="fp16", shape=(1, 2)).finish(found=3)
    assert [file.path for file in made.files] == ["unet/model"] and made.told == {"found": 3}
    assert stage(precision="fp16", shape=(1, 2)).outcome() == made
    assert stage(precision="fp32", shape=(1, 2)).outcome() is None
    for altered in (b"network\0", b"networ", b"netwerk"):
        path.write_bytes(altered)
        assert stage(precision="fp16", shape=(1, 2)).outcome() is None
    path.write_bytes(b"network")
    again = stage(precision="fp16", shape=(1, 2))
    assert again.outcome() == made and list(again.begin().iterdir()) == []
    assert again.outcome() is None, "it is no longer done"


def test_plans_that_components_left_are_joined(tmp_path: Path) -> None:
    for name, word in (("text_encoder", "int8"), ("unet", "int8-weights")):
        left = Plan.model_validate({"default": "none", "names": {f"{name}/a": word}})
        (tmp_path / name).mkdir()
        (tmp_path / name / plan.FILE).write_text(left.toml())
    folders = [tmp_path / name for name in PARTS]
    outcomes = [Outcome(inputs={}, files=(), told={})] * 3
    pack.gather(folders, outcomes, tmp_path, lasting=True)
    joined = plan.read_plan(tmp_path / plan.FILE)
    assert joined.default == "none"
    assert [*joined.names.items()] == [("text_encoder/a", "int8"), ("unet/a", "int8-weights")]


def inputs_of(
    student: Path, asked: dict[str, Any], options: dict[str, Any], to: str = "onnx"
) -> dict[str, Any]:
    """What each stage is made from."""
    opened, target = Student.open(student), shelf.make(Target, to, asked)
    plan = planned(opened, target, ExportOptions(**options))
    homes = [homes_of(opened, name) for name in plan.components]
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as pool:
        run = Run(Path(), hashing.begin(student, homes, pool), {}, {})
        tape, calls = plan.tape, Outcome(inputs={}, files=())
        for name in plan.components:
            for stage in (record_stage(tape, name, run, ""), lower_stage(tape, name, run, calls)):
                found[stage.name] = json.loads(json.dumps(stage.inputs()))
    return found


HOMES = [("text_encoder", "tokenizer"), ("unet",)]
ALL = {f"{stage}-{part}" for part in PARTS for stage in ("record", "lower")}
RECORDS = {name for name in ALL if name.startswith("record")}
RECORDED = RECORDS | {"record-unet_cached"}
UNET, DECODER = {"record-unet", "lower-unet"}, {"record-vae_decoder", "lower-vae_decoder"}
INT8: dict[str, Any] = {"precision": "int8"}
BOTH = UNET | {"record-unet_cached", "lower-unet_cached"}
SOME: dict[str, Any] = {"steps": (4,), "deep_cache": 2}


def planned_words(word: str) -> dict[str, Any]:
    """Of a target: a plan that gives the UNet this word."""
    names = {"text_encoder/*": "int8-weights", "unet/*": word}
    return {"precision": "int8-weights", "plan": {"default": "none", "names": names}}


@pytest.mark.parametrize(
    ("before", "after", "redone"),
    [
        (({}, {}), ({}, {}), set()),
        (({}, {}), ({}, {"floors": {"ssim": 0.5}}), set()),
        (({}, {}), ({"fused": 1}, {}), set()),
        (({}, {}), (HALF, {}), ALL - RECORDS),
        ((HALF, {}), ({"external_mib": 1} | HALF, {}), ALL - RECORDS),
        (({}, {}), ({}, {"guidance": Guidance(kind="cfg", scale=2.0)}), {"record-unet"}),
        (({}, {}), ({}, {"prompts": ("ring",)}), RECORDS),
        (({}, {}), ({}, {"merge_tokens": 0.5}), UNET),
        (({}, {}), ({}, {"fold_timestep": False}), UNET),
        (({}, {"steps": (4,)}), ({}, SOME), UNET),
        (({}, SOME), ({}, SOME | {"deep_cache": 3}), BOTH & RECORDED),
        (({}, SOME), ({}, SOME | {"cache_branch": 1}), BOTH),
        (({}, {"steps": (4,), "gate": 1}), ({}, {"steps": (4,), "gate": 2}), BOTH & RECORDED),
        (({}, SOME), ({}, {"steps": (4,), "gate": 2}), BOTH),
        (({}, {}), ({}, {"record_all": True}), set()),
        (({}, {}), (INT8, {}), ALL - RECORDS),
        (
            (INT8, {"prompts": (*"abcd",)}),
            (INT8, {"prompts": (*"abcdef",)}),
            ALL - {"lower-text_encoder"},
        ),
        ((planned_words("int8-weights"), {}), (planned_words("int4-weights"), {}), {"lower-unet"}),
        ((INT8, SOME), (INT8 | {"attention": True}, SOME), {*BOTH, *DECODER} - RECORDED),
        (({}, {}), ({}, {"size": (32, 16)}), UNET | DECODER),
        ((INT8, {}), (INT8 | {"attention": True}, {}), {"lower-unet", "lower-vae_decoder"}),
        ((INT8, {}), ({"precision": "int8-dynamic"}, {}), {"lower-unet", "lower-vae_decoder"}),
    ],
)
def test_a_changed_option_redoes_what_it_shapes(
    before: Any, after: Any, redone: set[str], one_step_student: Path
) -> None:
    was, now = (inputs_of(one_step_student, *each) for each in (before, after))
    assert {name for name in was if was[name] != now[name]} == redone


def test_a_changed_file_redoes_its_component(one_step_student: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(one_step_student, tmp_path / "other"))
    was = inputs_of(other, {}, {})
    (other / "vae/config.json").write_text((other / "vae/config.json").read_text() + "\n")
    (other / "scheduler/scheduler_config.json").touch()
    now = inputs_of(other, {}, {})
    assert {name for name in was if was[name] != now[name]} == DECODER
    (other / "tokenizer/merges.txt").write_text((other / "tokenizer/merges.txt").read_text() + "\n")
    last = inputs_of(other, {}, {})
    text = {"record-text_encoder", "lower-text_encoder"}
    assert {name for name in was if last[name] != now[name]} == text


def test_a_component_waits_for_the_hashes_of_its_own_files(one_step_student: Path) -> None:
    """The first one is done while the others are still being read."""
    go_on = threading.Event()

    def hashed(folder: Path, homes: tuple[str, ...]) -> dict[str, str]:
        assert homes == HOMES[0] or go_on.wait(60)
        return hashes_in(folder, homes)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(hashing, "hashes_in", hashed)
        found = hashing.begin(one_step_student, [HOMES[0], HOMES[1], HOMES[0]], pool)
        first = found.of(HOMES[0])
        assert {path.partition("/")[0] for path in first} == set(HOMES[0])
        assert not found.parts[HOMES[1]].done()
        go_on.set()
        assert [*found.all().items()] == [*hashes_in(one_step_student).items()]


def test_core_ml_lowers_with_what_it_learned_as_it_recorded(one_step_student: Path) -> None:
    """Its norms are rescaled by what they saw: recorded anew, lowered anew."""
    was, now = (
        inputs_of(one_step_student, {"precision": "fp16"}, {}, "coreml"),
        inputs_of(one_step_student, {"precision": "fp16", "ios": 17}, {}, "coreml"),
    )
    assert {name for name in was if was[name] != now[name]} == ALL


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> apart.Child:
    """One that does not make anything."""
    monkeypatch.setattr(apart, "COMMAND", [sys.executable, "-S", "-c", code])
    request = apart.Request(
        student="s", loras=(), to="onnx", target={}, options=ExportOptions(), run="r",
        component="unet",
    )  # fmt: skip
    hashes: Any = apart.Future()
    made = apart.Child(request, hashes, lambda message: None)
    assert made.recorded.wait(60)
    hashes.set_result({})  # nobody hears it any more
    return made


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", EdgeflashError, "unet: out of memory"),
        ('print(\'{"error": "no ONNX for it", "stopped": false}\')', EdgeflashError, "no ONNX"),
        ("import os; os.kill(os.getpid(), 2)", KeyboardInterrupt, None),
        ("print('a vendor speaks'); 1 / 0", RuntimeError, "ZeroDivisionError"),
        ("print('{a brace'); print('{}'); 1 / 0", RuntimeError, "ZeroDivisionError"),
    ],
)
def test_how_a_child_ends_is_told(
    code: str, kind: type[BaseException], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = child(monkeypatch, code)
    with pytest.raises(kind, match=message):
        made.result()
    made.end()


def test_an_allocator_that_gives_up_is_named() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 B")):
        with (
            pytest.raises(EdgeflashError, match="unet: out of memory"),
            memory_named("unet", "fp32"),
        ):
            raise error
    with pytest.raises(ValueError, match="else"), memory_named("unet", "fp32"):
        raise ValueError("something else")


def test_a_training_keeps_its_folder(one_step_student: Path, tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/recipe.json").write_text("{}")
    with pytest.raises(EdgeflashError, match="holds a training; choose another --out"):
        export(one_step_student, tmp_path / "out", {})


def command(student: Path, out: Path, seed: int) -> subprocess.Popen[str]:
    words = ["export", student, "--to", "onnx", "--precision", "fp16", "--out", out]
    code = "from edgeflash.export import memory; memory.APART_NUMBERS = 0\n"
    code += "from edgeflash.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": str(seed)},
    )


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@pytest.mark.slow
def test_in_processes_of_their_own_and_killed_there(one_step_student: Path, tmp_path: Path) -> None:
    """Bytes do not depend on the process; a child that is killed is named, and ends with it."""
    inside = export(one_step_student, tmp_path / "inside", HALF)
    running = command(one_step_student, tmp_path / "out", 1)
    told = running.communicate()[0]
    assert running.returncode == 0, told
    assert (tmp_path / "out/edgeflash.json").read_bytes() == (inside.folder / MANIFEST).read_bytes()
    for victim, code in (("child", 2), ("parent", -signal.SIGKILL)):
        running, mark = command(one_step_student, tmp_path / victim, 2), "record-unet.json"
        while not (tmp_path / f"{victim}.run" / mark).exists():
            time.sleep(0.01)
        (imports,) = children(running.pid)
        tree = [imports, *children(imports)]
        assert len(tree) > 1, "they are forks of a process that has imported all"
        for pid in tree[1:] if victim == "child" else [running.pid]:
            os.kill(pid, signal.SIGKILL)
        told = running.communicate()[0]
        assert running.returncode == code and ("out of memory" in told) == (victim == "child"), told
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in tree) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in tree), "it ends with its parent"
        again = command(one_step_student, tmp_path / victim, 3)
        assert again.wait() == 0
        assert (tmp_path / victim / MANIFEST).read_bytes() == (
            inside.folder / MANIFEST
        ).read_bytes()
