"""Students and bundles that many tests share: written once a run, never changed by a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from exported import Exported, export
from tiny_student import write_student

from edgeflash import shelf
from edgeflash.export.capture import Captured, Keep, Network, Sample, Tape
from edgeflash.export.journal import Stage
from edgeflash.roles import Target
from edgeflash.schedule import Guidance


@pytest.fixture(scope="session")
def one_step_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny decoder, no mid block, three stages, LCM sampler, made for one step."""
    from edgeflash.student import write_manifest

    folder = tmp_path_factory.mktemp("students") / "one-step"
    write_student(folder, mid_block=False, widths=(8, 16))
    write_manifest(folder, steps=(1,), prompts=("a red star", "blue ring", "a star", "red ring"))
    return folder


@pytest.fixture(scope="session")
def guided_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`AutoencoderKL`, mid block, DDIM, no `edgeflash.json`: anybody's Stable Diffusion folder."""
    folder = tmp_path_factory.mktemp("students") / "guided"
    return write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler")


@pytest.fixture(scope="session")
def guided(guided_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """fp32 ONNX of the guided student: two DDIM steps, encoder included."""
    with pytest.MonkeyPatch.context() as patch:
        return export(
            patch,
            guided_student,
            tmp_path_factory.mktemp("bundles") / "guided",
            shelf.make(Target, "onnx", {}),
            steps=(2, 3),
            guidance=Guidance(kind="cfg", scale=3.0),
            prompts=("a red star", "blue ring"),
            image_to_image=True,
        )


@pytest.fixture(scope="session")
def one_step(one_step_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """int8 ONNX of the one-step student."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("bundles") / "one-step"
        target = shelf.make(Target, "onnx", {"precision": "int8"})
        return export(patch, one_step_student, out, target)


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch, one_step: Exported) -> None:
    """Exports of the one-step student take what was captured before, without a loop."""

    def capture(tape: Tape, name: str, keep: Keep = lambda calls: None) -> Captured:
        tape.goldens = one_step.goldens
        keep(one_step.captured[name].samples)
        return one_step.captured[name]

    def captured(tape: Tape, network: Network, samples: tuple[Sample, ...]) -> Captured:
        return replace(one_step.captured[network.component], samples=samples)

    monkeypatch.setattr(Tape, "capture", capture)
    monkeypatch.setattr(Tape, "captured", captured)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages of exports in the order in which they are begun."""
    names: list[str] = []
    real = Stage.begin

    def begin(stage: Stage) -> Path:
        names.append(stage.name)
        return real(stage)

    monkeypatch.setattr(Stage, "begin", begin)
    return names
