"""Exports with a cached graph that go on where they were cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exported import QUIET
from forked import forked

from edgeflash import shelf
from edgeflash.bundle import DENOISERS, Bundle, kind_of
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Captured, Network, Sample, Tape
from edgeflash.export.journal import Stage
from edgeflash.export.line import export_student, rehearsal
from edgeflash.export.memory import numbers_of
from edgeflash.export_options import ExportOptions
from edgeflash.roles import Target
from edgeflash.schedule import Guidance
from edgeflash.student import Student

PROMPT = "a red star"
PARTS = ("text_encoder", "unet", "unet_cached", "vae_decoder")
STAGES = [f"{stage}-{part}" for part in PARTS for stage in ("record", "lower")]
CACHED = ExportOptions(
    steps=(3,), guidance=Guidance(kind="cfg", scale=3.0), prompts=(PROMPT,), deep_cache=2
)


def export(student: Path, out: Path, options: ExportOptions = CACHED) -> Bundle:
    target = shelf.make(Target, "torch", {})
    return export_student(Student.open(student), target, out, options, console=QUIET)


def traced_once(patch: pytest.MonkeyPatch) -> None:
    """Every component is captured as a program once, and taken from there afterwards."""
    programs: dict[str, Any] = {}
    real = Tape.captured

    def captured(tape: Tape, network: Network, samples: tuple[Sample, ...]) -> Captured:
        name = network.component
        if name not in programs:
            programs[name] = real(tape, network, samples).program
        return Captured(name, programs[name], network.inputs, network.outputs, samples)

    patch.setattr(Tape, "captured", captured)


@pytest.mark.slow
def test_killed_between_the_denoiser_and_its_cached_graph(
    guided_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cached graph did was recorded beside the denoiser, and is kept with that."""
    begun: list[str] = []
    real = Stage.begin

    def begin(stage: Stage) -> Path:
        begun.append(stage.name)
        return real(stage)

    def dies(stage: Stage) -> Path:
        if stage.name == "record-unet_cached":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(stage)

    def twice(*_: object) -> None:
        raise AssertionError("the loop runs twice")

    traced_once(monkeypatch)
    monkeypatch.setattr(Stage, "begin", begin)
    whole, cut = export(guided_student, tmp_path / "whole").folder, tmp_path / "cut"
    assert begun == [*STAGES, "verify"]

    monkeypatch.setattr(Stage, "begin", dies)
    assert forked(lambda: export(guided_student, cut)) == [-signal.SIGKILL]
    assert not cut.exists()

    begun.clear()
    monkeypatch.setattr(Stage, "begin", begin)
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "_run_denoiser", twice)
        export(guided_student, cut)
    assert begun == [*STAGES[4:], "verify"]
    assert (cut / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()

    begun.clear()
    export(guided_student, cut, CACHED.model_copy(update={"deep_cache": 3}))
    records = [f"record-{part}" for part in PARTS[1:]]
    assert begun == [*records, "verify"], "the graphs are the same, whenever each of them runs"


@pytest.mark.slow
def test_in_processes_of_their_own(guided_student: Path, tmp_path: Path) -> None:
    """The child of the cached graph goes on from what the denoiser's has written."""
    inside, out = export(guided_student, tmp_path / "inside"), tmp_path / "out"
    words = ["export", guided_student, "--to", "torch", "--steps", "3", "--guidance", "3"]
    words += ["--prompt", PROMPT, "--deep-cache", "2", "--out", out]
    code = "from edgeflash.export import memory; memory.APART_NUMBERS = 0\n"
    code += "from edgeflash.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (out / MANIFEST).read_bytes() == (inside.folder / MANIFEST).read_bytes()


def test_a_cached_graph_is_no_denoiser_but_weighs_as_much(guided_student: Path) -> None:
    assert DENOISERS == ("unet", "transformer")
    assert [kind_of(name) for name in ("unet", "unet_cached")] == ["denoiser", "denoiser_cached"]
    student = Student.open(guided_student)
    assert numbers_of(student, "unet_cached") == numbers_of(student, "unet")


def test_plans_are_not_searched_for_two_graphs(guided_student: Path) -> None:
    target = shelf.make(Target, "onnx", {"precision": "int8"})
    with pytest.raises(EdgeflashError, match=r"^--deep-cache 2: plans are of whole denoisers"):
        rehearsal(Student.open(guided_student), target, CACHED)
