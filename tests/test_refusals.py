"""What an export refuses, and what it leaves behind when it breaks off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from exported import Exported, attempt
from onnx import numpy_helper

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.disk import MANIFEST, check_replaceable, fresh_folder
from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Captured, Keep, Tape
from edgeflash.export.line import export_student
from edgeflash.roles import Runtime, Target
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import verify


@pytest.mark.usefixtures("replay")
def test_a_missed_floor_fails_the_export(one_step_student: Path, tmp_path: Path) -> None:
    target = shelf.make(Target, "torch", {})
    said = attempt(one_step_student, tmp_path / "out", target, floors={"L3.psnr_db": 250.0})
    assert "rung L3, pipeline: psnr_db" in said and "misses its floor 250" in said
    assert f"finished stages are kept in {tmp_path / 'out.run'}" in said


def test_a_floor_of_no_metric_is_refused_first(one_step_student: Path, tmp_path: Path) -> None:
    target = shelf.make(Target, "torch", {})
    said = attempt(one_step_student, tmp_path / "out", target, floors={"L3.psnr": 30.0})
    assert "no floor 'L3.psnr'" in said and "did you mean 'L3.psnr_db'?" in said


@pytest.mark.usefixtures("replay")
def test_a_bad_quantization_names_the_operator(one_step_student: Path, tmp_path: Path) -> None:
    from edgeflash.export import quantize

    def crush(graph: Any) -> None:
        scale = next(t for t in graph.initializer if t.name.endswith("conv2d_3_scale"))
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 50, scale.name))

    target = shelf.make(Target, "onnx", {"precision": "int8"})
    real, capture, passed = quantize.quantize_static, Tape.capture, list[str]()

    def runs(tape: Tape, name: str, keep: Keep) -> Captured:
        passed.append(name)
        return capture(tape, name, keep)

    def quantized(path: Path, captured: Captured, *rest: Any, **more: Any) -> Path:
        found = real(path, captured, *rest, **more)
        if captured.component == "unet":
            model = onnx.load(found)
            crush(model.graph)
            onnx.save(model, found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "quantize_static", quantized)
        patch.setattr(Tape, "capture", runs)
        said = attempt(one_step_student, tmp_path / "out", target)
    assert "rung L1, unet: psnr_db" in said
    assert "first astray: " in said and """; leave it alone: --set 'keep=["unet/""" in said
    assert passed == ["text_encoder", "unet", "vae_decoder"], "the loop does not run again"


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (KeyboardInterrupt(), "run the same command again"),
        (OSError(28, "No space"), "disk full"),
        (RuntimeError("I/O error: No space left on device"), "disk full"),  # as safetensors says
    ],
)
def test_an_export_that_breaks_off_leaves_nothing(
    raised: BaseException, message: str, one_step_student: Path, tmp_path: Path
) -> None:
    from edgeflash.export.to_onnx import OnnxTarget

    class Breaks(OnnxTarget):
        def lower(self, captured: Captured, out: Path) -> list[Path]:
            (out / "half.onnx").write_text("half a network")
            raise raised

    assert message in attempt(one_step_student, tmp_path / "out", Breaks())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("a person's own")
    said = attempt(one_step_student, tmp_path / "out", shelf.make(Target, "onnx", {}))
    assert "out: holds something else" in said
    (tmp_path / "out/edgeflash.json").write_text("an older bundle")
    attempt(one_step_student, tmp_path / "out", Breaks())
    assert (tmp_path / "out/notes.txt").exists(), "it gives way only to a finished one"


def test_an_export_does_not_replace_its_student(one_step_student: Path) -> None:
    for out in (one_step_student, one_step_student.parent):
        with pytest.raises(EdgeflashError, match=r"which it is made from|holds something else"):
            export_student(Student.open(one_step_student), shelf.make(Target, "torch", {}), out)
    assert (one_step_student / "unet").is_dir()


def test_folders_that_must_stay_are_refused(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(one_step_student, tmp_path / "trained")
    said = attempt(one_step_student, tmp_path / "trained", shelf.make(Target, "torch", {}))
    assert "trained: holds a student; choose another --out for the bundle" in said
    (tmp_path / "trained/edgeflash.json").unlink()  # now anybody's diffusers folder
    (tmp_path / "trained.run").mkdir()  # as a training leaves it that was refused
    (tmp_path / "trained.run/recipe.json").write_text("{}")
    with pytest.raises(EdgeflashError, match="holds something else"):
        check_replaceable(tmp_path / "trained")
    shutil.rmtree(tmp_path / "trained.run")
    said = attempt(one_step_student, tmp_path / "trained", shelf.make(Target, "torch", {}))
    assert "trained: holds something else" in said
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path("/proc")):
        with pytest.raises(EdgeflashError, match="cannot be replaced as a whole; name a folder"):
            check_replaceable(out)


def test_a_folder_that_cannot_give_way_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/edgeflash.json").write_text("an older bundle")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target == tmp_path / "out" and path.name != "out":
            raise OSError("busy")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="busy"), fresh_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/edgeflash.json").read_text() == "an older bundle"


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (15, 16)}, "multiples of 2 px"),
        ({"guidance": Guidance(kind="embedded", channels=8)}, "ask for guidance none or cfg"),
        ({"steps": (0,)}, "steps is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_first(
    options: dict[str, Any], message: str, one_step_student: Path, tmp_path: Path
) -> None:
    target = shelf.make(Target, "onnx", {})
    assert message in attempt(one_step_student, tmp_path / "out", target, **options)


@pytest.mark.parametrize("fold", [True, False])
def test_the_timestep_is_kept_where_asked(
    fold: bool, one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []

    def capture(tape: Tape, name: str, keep: Keep) -> Captured:
        seen.append(tape.timestep)
        raise KeyboardInterrupt

    monkeypatch.setattr(Tape, "capture", capture)
    attempt(one_step_student, tmp_path / "out", shelf.make(Target, "onnx", {}), fold_timestep=fold)
    assert seen == [999.0 if fold else None]


@pytest.mark.usefixtures("replay")
def test_a_pattern_that_fits_nothing_is_refused(one_step_student: Path, tmp_path: Path) -> None:
    options = {"precision": "int8", "keep": ["conv_99*"], "quantized": ["text_encoder"]}
    target = shelf.make(Target, "onnx", options)
    said = attempt(one_step_student, tmp_path / "out", target)
    assert "no operator of text_encoder is called 'conv_99*'" in said


def test_damaged_bundles_are_refused(guided: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(guided.bundle.folder, tmp_path / "b"))
    path = folder / "unet/model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(EdgeflashError, match=r"unet/model\.onnx: .*truncated"):
        Bundle.open(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EdgeflashError, match=r"sha256 expected .*, found"):
        Bundle.open(folder)
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(EdgeflashError, match=r"rung L0, unet: .*does not load"):
        verify(Bundle.open(folder, check="size"))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 5}))
    with pytest.raises(EdgeflashError, match="format 5 is newer"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", shelf.names(Target))
def test_every_target_has_a_runtime_that_opens_it(name: str) -> None:
    target = shelf.find(Target, name, check=False)
    assert name in shelf.find(Runtime, target.runtime, check=False).opens
