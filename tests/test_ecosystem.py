"""What stock pipelines are told of a bundle, and what an export says where they cannot use it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from exported import Exported

from edgeflash import shelf
from edgeflash.bundle import Component, TensorSpec
from edgeflash.export.coreml_resources import other_noise
from edgeflash.roles import Target
from edgeflash.student import Student

FOLDED = "export with --keep-timestep"


def furnished(
    to: str, student: Path, components: tuple[Component, ...], out: Path
) -> tuple[str, Any]:
    """What is said, and the UNet's config."""
    for name in ("unet", "text_encoder", "vae_decoder"):
        (out / name).mkdir(parents=True)
    said = shelf.make(Target, to, {}).furnish(Student.open(student), components, out)
    assert "\n" not in said
    return said, json.loads((out / "unet/config.json").read_text())


def with_input(bundle: Exported, spec: TensorSpec) -> tuple[Component, ...]:
    """The components, of which the UNet takes that in the place of its own in the same role."""
    unet = bundle.bundle.component("unet")
    rest = [other for other in unet.inputs if other.role != spec.role]
    return (unet.model_copy(update={"inputs": (*rest, spec)}),)


@pytest.mark.parametrize(("cells", "told"), [((8, 8), 8), ((16, 16), 16), ((16, 8), [16, 8])])
def test_stock_pipelines_draw_at_the_size_it_was_exported_at(
    cells: tuple[int, int], told: object, guided: Exported, guided_student: Path, tmp_path: Path
) -> None:
    sample = guided.bundle.component("unet").input("sample")
    assert sample and sample.shape[2:] == (8, 8)
    components = with_input(guided, sample.model_copy(update={"shape": (1, 4, *cells)}))
    _, config = furnished("onnx", guided_student, components, tmp_path)
    assert config["sample_size"] == told


def test_a_folded_timestep_is_told_of(
    one_step: Exported, guided: Exported, one_step_student: Path, guided_student: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    folded, whole = (each.bundle.manifest.components for each in (one_step, guided))
    assert FOLDED in furnished("onnx", one_step_student, folded, tmp_path / "a")[0]
    assert furnished("onnx", guided_student, whole, tmp_path / "b")[0] == ""
    said, _ = furnished("openvino", one_step_student, folded, tmp_path / "c")
    assert said.startswith("no openvino_tokenizer.xml") and FOLDED in said


def test_what_genai_cannot_sample_is_told(
    guided: Exported, guided_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    target, spec = (
        shelf.make(Target, "openvino", {}),
        guided.bundle.component("unet").input("timestep"),
    )
    assert spec
    told = {}
    for whole in (True, False):
        components = with_input(guided, target.takes(spec, whole=whole))
        told[whole], _ = furnished("openvino", guided_student, components, tmp_path / str(whole))
    assert "whole timesteps" in told[False] and "whole timesteps" not in told[True]
    assert "GenAI knows no" not in told[True]
    other = Path(shutil.copytree(guided_student, tmp_path / "other"))
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"][1] = "UniPCMultistepScheduler"
    (other / "model_index.json").write_text(json.dumps(index))
    said, _ = furnished("openvino", other, guided.bundle.manifest.components, tmp_path / "x")
    assert said.endswith("GenAI knows no UniPCMultistepScheduler")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"beta_schedule": "linear"}, "this student has beta_schedule linear, they scaled_linear"),
        ({"beta_end": None}, "this student has beta_end 0.02, they 0.012"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500, they 1000"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True, they False"),
    ],
    ids=str,
)
def test_swift_is_told_to_count_other_noise(
    change: dict[str, Any], said: str, guided_student: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(guided_student, tmp_path / "student"))
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    told = "; ".join(other_noise(Student.open(folder)))
    assert told.endswith(said) and bool(told) == bool(said)
