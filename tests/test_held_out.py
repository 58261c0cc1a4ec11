"""On which prompts the ladder is climbed, and that ranges are not measured on those that prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import QUIET, Exported
from onnx import helper
from small_onnx import network

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.export import pack
from edgeflash.export.capture import Captured, Sample
from edgeflash.export.line import export_student, planned
from edgeflash.export.quantize import quantize_static
from edgeflash.export_options import ExportOptions
from edgeflash.golden import Tensors, load_tensors
from edgeflash.inspect import ladder
from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.verify import refuse_below, verify


def to(precision: str) -> Target:
    return shelf.make(Target, "onnx", {"precision": precision})


@pytest.mark.parametrize(
    ("precision", "prompts", "small", "big"),
    [
        ("fp32", 8, (3, 0, 8, 8), (3, 0, 3, 3)),
        ("fp32", 2, (2, 0, 2, 2), (2, 0, 2, 2)),
        ("int8", 8, (3, 3, 8, 8), (3, 3, 3, 8)),
        ("int8", 4, (2, 2, 4, 4), (2, 2, 2, 4)),
        ("int8", 1, (1, 0, 1, 1), (1, 0, 1, 1)),
    ],
)
def test_how_many_prompts_ship_are_held_out_climbed_and_recorded(
    precision: str,
    prompts: int,
    small: tuple[int, ...],
    big: tuple[int, ...],
    one_step_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, asked = Student.open(one_step_student), ExportOptions(prompts=(*"abcdefgh"[:prompts],))
    for found in (small, big):
        plan = planned(student, to(precision), asked)
        tape = plan.tape
        assert (plan.goldens, tape.held_out, plan.climbed, len(tape.prompts)) == found
        monkeypatch.setattr(pack, "BIG_BYTES", 0)


def test_ranges_do_not_come_from_prompts_that_prove(one_step: Exported, tmp_path: Path) -> None:
    found = [(c.held_out, len(c.samples), len(c.calibration)) for c in one_step.captured.values()]
    assert found == [(2, 5, 3), (4, 8, 4), (2, 4, 2)], "the empty prompt is known beforehand"

    def quantized(loud: int) -> bytes:
        """A convolution that saw four calls, one of them a hundred times as large."""
        folder = tmp_path / str(loud)
        folder.mkdir()
        conv = helper.make_node("Conv", ["sample", "w"], ["y"], name="conv")
        path = network(folder / "float.onnx", conv, w=np.ones((4, 4, 1, 1), np.float32))
        calls = [np.full((1, 4, 4, 4), 100 if i == loud else 1, np.float32) for i in range(4)]
        samples = tuple(Sample({"sample": call}, {}) for call in calls)
        program: Any = None
        captured = Captured("unet", program, (), (), samples, held_out=2)
        return quantize_static(path, captured, ["conv"], "minmax").read_bytes()

    assert quantized(0) == quantized(1) != quantized(2)


def test_every_figure_says_of_how_many_prompts_it_is(one_step: Exported, guided: Exported) -> None:
    def told(figures: object) -> set[int | None]:
        return {f.prompts for f in figures if f.metric != "loads"}  # type: ignore[attr-defined]

    assert len(one_step.bundle.manifest.goldens) == 2
    assert told(one_step.bundle.manifest.parity) == {4} and told(verify(one_step.bundle)) == {2}
    golden = guided.bundle.manifest.goldens[0]
    beside: Tensors = load_tensors(guided.bundle.folder / golden.tensors)
    untimed = {k: v for k, v in beside.items() if k not in ("times", "output_shifted")}
    untimed |= {"rows": beside["rows"][:1], "encoded": -beside["encoded"]}
    figures = verify(guided.bundle, beside=[(golden, untimed)])
    assert {f.metric: f.prompts for f in figures if f.rung == "L2"} == {
        "delta_ratio": 3, "timestep_ratio": 2
    }  # fmt: skip
    table: Any = ladder(figures)
    told_there = dict(zip(table.columns[2].cells, table.columns[5].cells, strict=True))
    assert (told_there["loads"], told_there["ssim"]) == ("", "3")
    failed = {(f.rung, f.component) for f in figures if not f.passed}
    assert failed == {("L1", "vae_encoder")}, "it counts, though it is no file"


@pytest.mark.parametrize("steps", [1, 2])
def test_prompts_that_prove_nothing_are_only_drawn(
    steps: int, one_step_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large denoiser: neither without a prompt nor at other times, and the count is right."""
    monkeypatch.setattr(pack, "BIG_BYTES", 0)
    asked = ExportOptions(prompts=(*"abcdefgh",), steps=(steps,))
    tape = planned(Student.open(one_step_student), to("int8"), asked).tape
    tape.record("text_encoder")
    captured = tape.capture("unet")
    proofs = 1 if steps == 1 else steps + 1
    assert len(captured.samples) == 8 * steps + 3 * proofs
    assert captured.held_out == 3 * (steps + proofs)
    assert "output_empty.0" in tape.goldens[2] and "output_empty.0" not in tape.goldens[3]
    tape.record("vae_decoder")
    assert "image" in tape.goldens[7]


@pytest.mark.usefixtures("replay")
def test_other_prompts_are_proved_anew_though_they_do_not_ship(
    one_step_student: Path, tmp_path: Path, begun: list[str]
) -> None:
    def export(*prompts: str) -> Bundle:
        asked, student = ExportOptions(prompts=prompts), Student.open(one_step_student)
        return export_student(student, to("fp32"), tmp_path / "out", asked, console=QUIET)

    export("a red star", "blue ring", "a star", "red ring")
    begun.clear()
    bundle = export("a red star", "blue ring", "a star", "ring")
    assert begun[-1] == "verify" and all(name.startswith("record") for name in begun[:-1])
    assert len(bundle.manifest.goldens) == 3
    refuse_below(verify(bundle), bundle.folder)
    assert {f.prompts for f in bundle.manifest.parity if f.rung == "L4"} == {4}
