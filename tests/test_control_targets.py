"""ControlNets on targets with ways of their own: Core ML as Apple's package asks, TensorRT."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_coreml import kinds, to
from test_controlnet import PROMPT, SCALE, by_diffusers, drawn, exported
from test_controlnet import controlled as controlled  # a fixture
from torch import nn

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.export import coreml_resources
from edgeflash.export.capture import Captured
from edgeflash.export.line import planned
from edgeflash.export_options import ExportOptions
from edgeflash.parity import psnr_db
from edgeflash.roles import Array, Target
from edgeflash.runtimes.mil_program import Program
from edgeflash.schedule import Guidance
from edgeflash.student import Student

INSTALL = "is not installed: pip install 'edgeflash[coreml-export]'"
pytest.importorskip("coremltools", reason=f"coremltools {INSTALL}")
pytest.importorskip("sklearn", reason=f"scikit-learn {INSTALL}")

BOTH = ("unet", "controlnet")
SIDES = ((16, 8), (16, 8), (16, 4), (32, 4), (32, 4))  # channels and side of the residuals
Made = tuple[Path, dict[str, Captured], dict[str, list[float]]]


@pytest.fixture(scope="module")
def packages(controlled: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """UNet and ControlNet as Swift asks them: two rows a call, in halves, with split attention.

    With them the largest numbers that their norms saw before they were lowered.
    """
    folder = tmp_path_factory.mktemp("packages")
    target = to(precision="fp16", attention="split_einsum", rows=2)
    guidance = Guidance(kind="cfg", scale=SCALE)
    options = ExportOptions(steps=(2,), guidance=guidance, prompts=(PROMPT,))
    tape = planned(Student.open(controlled), target, options).tape
    tape.record("text_encoder")
    captured: dict[str, Captured] = {}
    seen: dict[str, list[float]] = {}
    for name in BOTH:
        network, samples = tape.record(name)
        norms = [m for m in network.module.modules() if isinstance(m, nn.GroupNorm)]
        seen[name] = [getattr(norm, "largest", 0.0) for norm in norms]
        captured[name] = tape.captured(network, samples)
        target.lower(captured[name], folder)
    return folder, captured, seen


@pytest.mark.slow
def test_names_shapes_and_types_are_apple_s(packages: Made) -> None:
    folder, captured, _ = packages
    assert sorted(path.name for path in folder.iterdir()) == [
        "ControlNet.mlpackage",
        "ControlledUnet.mlpackage",
    ]
    heard = {
        "sample": (2, 4, 8, 8),
        "timestep": (2,),
        "encoder_hidden_states": (2, 32, 1, 16),
    }
    given = {f"additional_residual_{i}": (2, c, s, s) for i, (c, s) in enumerate(SIDES)}
    wanted = {
        "unet": ("ControlledUnet", heard | given, {"noise_pred": (2, 4, 8, 8)}),
        "controlnet": ("ControlNet", heard | {"controlnet_cond": (2, 3, 16, 16)}, given),
    }
    for component, (name, takes, gives) in wanted.items():
        told = coreml_resources.description(folder / f"{name}.mlpackage")
        assert told == {"takes": takes, "gives": gives}
        made = captured[component]
        assert {spec.name: (spec.shape, spec.dtype) for spec in made.inputs} == {
            key: (shape, "float16") for key, shape in takes.items()
        }
        assert {spec.name: (spec.shape, spec.dtype) for spec in made.outputs} == {
            key: (shape, "float32") for key, shape in gives.items()
        }, "Swift adds up what several give, as floats"


@pytest.mark.slow
def test_one_package_goes_on_with_what_the_other_gives(packages: Made) -> None:
    """Two rows that differ: with the prompt and without, as one call of Swift has them."""
    folder, captured, _ = packages
    controlnet, unet = (captured[name].samples[:2] for name in reversed(BOTH))

    def rows(side: str, samples: Any, name: str) -> Array:
        return np.concatenate([getattr(sample, side)[name] for sample in samples])

    fed = {spec.name: rows("inputs", controlnet, spec.name) for spec in captured[BOTH[1]].inputs}
    assert (fed["encoder_hidden_states"][0] != fed["encoder_hidden_states"][1]).any()
    found = Program(folder / "ControlNet.mlpackage")(fed)
    for name, array in found.items():
        assert psnr_db(rows("outputs", controlnet, name), array) > 45, name
    drawn = Program(folder / "ControlledUnet.mlpackage")(fed | found)
    assert psnr_db(rows("outputs", unet, "noise_pred"), drawn["noise_pred"]) > 45


@pytest.mark.slow
def test_a_controlnet_is_made_ready_as_a_unet_is(packages: Made) -> None:
    """Attention is split in it too, and its norms know what they saw, though another copy ran."""
    folder, _, seen = packages
    for name, norms in seen.items():
        assert len(norms) > 5 and min(norms) > 0, name
    assert "einsum" in kinds(folder / "ControlNet.mlpackage")


def bundle_of(folder: Path, rows: int, **other: Any) -> dict[str, Any]:
    """Empty packages, and what they would say of themselves."""
    heard = {"sample": (rows, 4, 8, 8), "timestep": (rows,)}
    heard |= {"encoder_hidden_states": (rows, 32, 1, 16)}
    given = {"additional_residual_0": (rows, 16, 8, 8)}
    told = {
        "TextEncoder": {"takes": {}, "gives": {"last_hidden_state": (1, 16, 32)}},
        "ControlledUnet": {"takes": heard | given, "gives": {"noise_pred": (rows, 4, 8, 8)}},
        "ControlNet": {"takes": heard | {"controlnet_cond": (rows, 3, 16, 16)}, "gives": given},
    }
    for name in told:
        (folder / f"{name}.mlpackage").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).touch()
    return told | other


def test_what_swift_asks_of_controlnets_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"takes": {"sample": (1, 4, 8, 8), "depth": ()}, "gives": {"additional_residual_1": ()}}
    cases: dict[str, Any] = {"two": (2, {}), "one": (1, {}), "other": (2, {"ControlNet": one})}
    lacks = {}
    for name, (rows, other) in cases.items():
        told = bundle_of(tmp_path / name, rows, **other)
        monkeypatch.setattr(coreml_resources, "description", lambda path, t=told: t[path.stem])
        lacks[name] = list(coreml_resources.lacks(tmp_path / name))
    assert lacks["two"] == []
    (said,) = lacks["one"]
    assert "ControlNets for two rows: export with --set rows=2, and draw with a guidance" in said
    rows, names, handed = lacks["other"]
    assert rows == said and "controlnet_cond" in names and "to the UNet by name" in handed


@pytest.mark.parametrize("xcode", [True, False])
def test_it_is_compiled_to_where_swift_looks(
    xcode: bool, controlled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = bundle_of(tmp_path / "b", 2)
    monkeypatch.setattr(coreml_resources, "description", lambda path: told[path.stem])
    monkeypatch.setattr(shutil, "which", lambda name: name if xcode else None)

    def compiler(words: list[Any], **_: Any) -> Any:
        if words[1] == "coremlcompiler":
            (words[4] / f"{words[3].stem}.mlmodelc").mkdir()  # whose parent must be there
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", compiler)
    said = coreml_resources.write_resources(Student.open(controlled), tmp_path / "b")
    home = tmp_path / "b/Resources"
    if xcode:
        assert said == "" and (home / "controlnet/ControlNet.mlmodelc").is_dir()
        assert (home / "ControlledUnet.mlmodelc").is_dir()
    else:
        moved = "mv Resources/ControlNet.mlmodelc Resources/controlnet"
        assert said.endswith(f"; done; mkdir -p Resources/controlnet; {moved}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16", "rows": 2, "attention": "split_einsum", "chunk_mib": 0.32},
        {"precision": "int8", "smallest": 200},
        {"precision": "lut8", "smallest": 200, "quantized": ["unet"], "rest": "fp32"},
        {"precision": "w8a8", "ios": 17, "smallest": 200},
    ],
    ids=str,
)
def test_core_ml_draws_after_edges(options: Any, controlled: Path, tmp_path: Path) -> None:
    """Through the ladder, and then as diffusers does, as closely as the precision lets it."""
    bundle = exported(controlled, tmp_path / "out", shelf.make(Target, "coreml", options))
    rows = options.get("rows", 1)
    named = {path.stem for path in bundle.folder.glob("*.mlpackage")} - {"TextEncoder"}
    chunks = {"ControlledUnetChunk1", "ControlledUnetChunk2"}
    unet = chunks if "chunk_mib" in options else {"ControlledUnet"}
    assert named == unet | {"ControlNet", "VAEDecoder"}
    swift = list(coreml_resources.lacks(bundle.folder))
    assert len(swift) == (rows == 1) and all("--set rows=2" in said for said in swift)
    seen = bundle.component("controlnet")
    alone = options.get("quantized") == ["unet"]
    assert seen.precision == ("fp32" if alone else options["precision"])
    assert {spec.dtype for spec in seen.inputs} == {"float32" if alone else "float16"}
    ours = drawn(bundle, control_scale=0.5)[0] / 255
    assert psnr_db(by_diffusers(controlled, 0.5), ours) > (40 if rows == 2 else 20)
    two = drawn(bundle, prompt=("blue ring", PROMPT), seed=4)
    assert np.abs(two[1].astype(int) - drawn(bundle)[0]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"vendor": "tensorrt", "precision": "fp16"},
        {"vendor": "tensorrt", "precision": "int8"},
        {"compute_capabilities": "8.9"},
        {"compute_capabilities": "8.9", "precision": "fp8"},
    ],
    ids=str,
)
def test_tensorrt_has_it_too(options: Any, controlled: Path, tmp_path: Path) -> None:
    """Its ONNX files pass the ladder where no GPU is; engines are built for GPUs that are not."""
    pytest.importorskip("tensorrt_rtx")
    made = exported(controlled, tmp_path / "out", shelf.make(Target, "tensorrt", options))
    bundle = Bundle.open(made.folder, check="sha256")
    component = bundle.component("controlnet")
    ahead = "compute_capabilities" in options
    assert component.precision == options.get("precision", "fp32")
    assert component.files[0].path == f"controlnet/model.{'engine' if ahead else 'onnx'}"
    proved = {(figure.rung, figure.component) for figure in bundle.manifest.parity}
    assert {("L1", "controlnet"), ("L1", "unet"), ("L4", "pipeline")} <= proved
