"""Core ML: the ladder on its packages, Apple's contract, fewer bits, chunks and sizes."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exported import Exported, export

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.export import coreml_resources
from edgeflash.export.coreml_networks import SCALE
from edgeflash.export.quantize_coreml import compress
from edgeflash.export.to_coreml import PACKAGES
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.mil_program import Program, data_folder
from edgeflash.runtimes.mil_weights import SENTINEL
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for, verify

INSTALL = "is not installed: pip install 'edgeflash[coreml-export]'"
ct = pytest.importorskip("coremltools", reason=f"coremltools {INSTALL}")
pytest.importorskip("sklearn", reason=f"scikit-learn {INSTALL}")


PROMPTS = ("a red star", "blue ring")


def to(**options: Any) -> Target:
    return shelf.make(Target, "coreml", options)


def on(**options: Any) -> Runtime:
    return shelf.make(Runtime, "coreml", options)


@pytest.fixture(scope="module")
def drawn(guided_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """fp16 packages of the guided student, otherwise like `guided`."""
    with pytest.MonkeyPatch.context() as patch:
        return export(
            patch,
            guided_student,
            tmp_path_factory.mktemp("bundles") / "coreml",
            to(precision="fp16"),
            steps=(2, 3),
            guidance=Guidance(kind="cfg", scale=3.0),
            prompts=PROMPTS,
            image_to_image=True,
        )


# --- bundles --------------------------------------------------------------------------------------


def test_the_ladder_is_climbed_on_the_evaluator(drawn: Exported) -> None:
    figures = drawn.bundle.manifest.parity
    assert all(f.passed for f in figures)
    measured = {(f.rung, f.component) for f in figures}
    assert {("L1", "vae_encoder"), ("L2", "unet"), ("L4", "pipeline")} <= measured
    assert all(f.floor == 45 for f in figures if (f.rung, f.metric) == ("L1", "psnr_db"))
    assert {"coremltools"} <= set(drawn.bundle.manifest.lineage.tools)
    refuse_below(verify(Bundle.open(drawn.bundle.folder, check="sha256")), "x")


def test_it_draws_what_onnx_runtime_draws(drawn: Exported, guided: Exported) -> None:
    results = []
    for bundle in (guided.bundle, drawn.bundle):
        with TextToImage(bundle, runtime_for(bundle)) as pipeline:
            results.append(pipeline.generate(Request(PROMPTS, seed=5)))
    assert results[1].images.shape == (2, 16, 16, 3)
    assert psnr_db(results[0].latent, results[1].latent) > 45
    picture = np.full((16, 16, 3), 90, np.uint8)
    for i, bundle in enumerate((guided.bundle, drawn.bundle)):
        with TextToImage(bundle, runtime_for(bundle)) as pipeline:
            results[i] = pipeline.generate(Request("a red star", image=picture, strength=0.5))
    assert psnr_db(results[0].latent, results[1].latent) > 45, "the encoder's latent"


def test_names_shapes_and_types_are_apple_s(drawn: Exported) -> None:
    folder = drawn.bundle.folder
    expected = {
        "TextEncoder": (
            {"input_ids": ((1, 16), "float32")},
            {"last_hidden_state": (1, 16, 32), "pooled_outputs": (1, 32)},
        ),
        "Unet": (
            {
                "sample": ((1, 4, 8, 8), "float16"),
                "timestep": ((1,), "float16"),
                "encoder_hidden_states": ((1, 32, 1, 16), "float16"),
            },
            {"noise_pred": (1, 4, 8, 8)},
        ),
        "VAEDecoder": ({"z": ((1, 4, 8, 8), "float16")}, {"image": (1, 3, 16, 16)}),
        "VAEEncoder": ({"x": ((1, 3, 16, 16), "float16")}, {"latent": (1, 8, 8, 8)}),
    }
    types = {65552: "float16", 65568: "float32"}
    for name, (taken, given) in expected.items():
        told = ct.models.utils.load_spec(str(folder / f"{name}.mlpackage")).description
        found = {
            port.name: (
                tuple(port.type.multiArrayType.shape),
                types[port.type.multiArrayType.dataType],
            )
            for port in (*told.input, *told.output)
        }
        assert found == taken | {key: (shape, "float32") for key, shape in given.items()}
    for component in drawn.bundle.manifest.components:
        told = expected[Path(component.files[0].path).parts[0].removesuffix(".mlpackage")]
        assert {spec.name: (spec.shape, spec.dtype) for spec in component.inputs} == told[0]
        assert {spec.name: spec.shape for spec in component.outputs} == told[1]
    assert drawn.bundle.component("unet").input("conditioning").layout == "NC1S"  # type: ignore[union-attr]
    assert (drawn.bundle.manifest.latent.scale, drawn.bundle.manifest.latent.shift) == (SCALE, 0)


def test_resources_hold_what_can_be_made_here(drawn: Exported) -> None:
    folder = drawn.bundle.folder / "Resources"
    for name in ("vocab.json", "merges.txt"):
        same = drawn.bundle.folder / "tokenizer" / name
        assert (folder / name).read_bytes() == same.read_bytes()
    assert list(coreml_resources.lacks(drawn.bundle.folder)) == []


def test_what_apple_s_package_misses_is_told(
    drawn: Exported, guided_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    folder = Path(shutil.copytree(drawn.bundle.folder, tmp_path / "b"))
    shutil.rmtree(folder / "Resources")
    shutil.copytree(guided_student, tmp_path / "s")
    sampler = tmp_path / "s/scheduler/scheduler_config.json"
    config = json.loads(sampler.read_text()) | {"prediction_type": "v_prediction"}
    sampler.write_text(json.dumps(config))
    said = coreml_resources.write_resources(Student.open(tmp_path / "s"), folder)
    assert said.startswith("Resources: Swift's samplers take epsilon") and "\n" not in said
    assert "v_prediction; compile it with Xcode" in said
    shutil.rmtree(folder / "Unet.mlpackage")
    shutil.copytree(folder / "TextEncoder.mlpackage", folder / "Unet.mlpackage")
    told = " ".join(coreml_resources.lacks(folder))
    assert "--keep-timestep" in told and "only output" in told and "[1, d, 1, s]" in told


def test_xcode_compiles_where_it_is(
    drawn: Exported, guided_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(drawn.bundle.folder, tmp_path / "b"))
    shutil.rmtree(folder / "Resources")
    status = 0

    def compiler(words: list[Any], **_: Any) -> Any:
        if words[1] == "--find":
            return SimpleNamespace(returncode=72 if status == 72 else 0)
        assert words[:3] == ["xcrun", "coremlcompiler", "compile"]
        if status == 0:
            (Path(words[4]) / f"{Path(words[3]).stem}.mlmodelc").mkdir()
        return SimpleNamespace(returncode=status, stdout="", stderr="error:\n no")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", compiler)
    student = Student.open(guided_student)
    assert coreml_resources.write_resources(student, folder) == ""
    assert (folder / "Resources/Unet.mlmodelc").is_dir()
    shutil.rmtree(folder / "Resources")
    status = 1
    with pytest.raises(EdgeflashError, match=r"coremlcompiler does not compile it: error: no$"):
        coreml_resources.write_resources(student, folder)
    shutil.rmtree(folder / "Resources")
    status = 72  # as xcrun says where only Xcode's command line tools are
    assert "compile it with Xcode" in coreml_resources.write_resources(student, folder)


def test_verify_needs_no_torch(drawn: Exported) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'sklearn'])\n"
        "from edgeflash.bundle import Bundle\n"
        "from edgeflash.verify import refuse_below, verify\n"
        f"refuse_below(verify(Bundle.open({str(drawn.bundle.folder)!r})), 'x')"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout + told.stderr == ""


# --- faults ---------------------------------------------------------------------------------------


def test_swapped_weights_are_caught(drawn: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn.bundle.folder, tmp_path / "b"))
    blob = data_folder(folder / "Unet.mlpackage") / "weights/weight.bin"
    data = np.fromfile(blob, np.uint8)
    heads = [struct.unpack_from("<IIQQ", data, at) for at in range(0, len(data) - 24, 64)]
    length, start = max(head[2:] for head in heads if head[0] == SENTINEL)
    largest = data[start : start + length].view(np.float16)
    largest[:] = largest[::-1].copy()
    data.tofile(blob)
    with pytest.raises(EdgeflashError, match="sha256"):
        Bundle.open(folder, check="sha256")
    with pytest.raises(EdgeflashError, match="rung L1, unet: psnr_db"):
        refuse_below(verify(Bundle.open(folder, check="size")), folder)


def operations(package: Path) -> list[Any]:
    function = ct.models.utils.load_spec(str(package)).mlProgram.functions["main"]
    return list(function.block_specializations[function.opset].operations)


def change_blobs(package: Path, starts: list[int], change: Any) -> None:
    """Gives the numbers of some blobs of the weight file to a function, to be changed in place."""
    path = data_folder(package) / "weights/weight.bin"
    data = np.fromfile(path, np.uint8)
    for start in starts:
        length, begin = struct.unpack_from("<QQ", data, start + 8)
        change(data[begin : begin + length].view(np.float16))
    data.tofile(path)


def test_an_overflow_of_halves_is_caught(drawn: Exported, tmp_path: Path) -> None:
    """Before a norm, which takes any factor out again: wrong for what halves can hold alone."""
    package = tmp_path / "b/VAEDecoder.mlpackage"
    call = drawn.captured["vae_decoder"].samples[0]

    def decoded(**halves: bool) -> Any:
        return Program(package, **halves)(call.inputs)["image"]

    made = operations(drawn.bundle.folder / package.name)
    starts = {op.outputs[0].name: op.attributes["val"] for op in made if op.type == "const"}
    wanted = Program(drawn.bundle.folder / package.name)(call.inputs)["image"]
    for op in (op for op in made if op.type == "conv"):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(drawn.bundle.folder, tmp_path / "b")
        held = [op.inputs[name].arguments[0].name for name in ("weight", "bias")]
        blobs = [starts[name].blobFileValue.offset for name in held]
        change_blobs(package, blobs, lambda w: np.copyto(w, w.astype(float) * 2**17, "same_kind"))
        if psnr_db(wanted, decoded(halves=False)) > 60:
            break
    else:
        raise AssertionError("no convolution has a norm behind it")
    with pytest.raises(EdgeflashError, match=r"rung L1, vae_decoder: psnr_db 0 misses its floor 4"):
        refuse_below(verify(Bundle(tmp_path / "b", drawn.bundle.manifest)), "b")


def palettized(drawn: Exported, folder: Path, name: str, change: Any) -> Bundle:
    """A copy with what becomes of one package's model in its place."""
    shutil.copytree(drawn.bundle.folder, folder)
    package = folder / f"{PACKAGES[name]}.mlpackage"
    model = change(ct.models.MLModel(str(package), skip_model_load=True))
    shutil.rmtree(package)
    model.save(str(package))
    parts = [
        part.model_copy(update={"precision": "lut6"}) if part.name == name else part
        for part in drawn.bundle.manifest.components
    ]
    changes = {"components": tuple(parts), "parity": ()}
    return Bundle(folder, drawn.bundle.manifest.model_copy(update=changes))


def test_another_palette_is_caught(drawn: Exported, tmp_path: Path) -> None:
    target, captured = to(precision="lut6", smallest=500), drawn.captured["vae_decoder"]
    bundle = palettized(
        drawn, tmp_path / "b", "vae_decoder", lambda m: compress(m, captured, "lut6", target)
    )
    assert all(f.passed for f in verify(bundle)), "as it should be"
    package = bundle.folder / "VAEDecoder.mlpackage"
    made = [op for op in operations(package) if op.type == "constexpr_lut_to_dense"]
    palettes = [op.attributes["lut"].blobFileValue.offset for op in made]
    change_blobs(package, palettes[:1], lambda palette: palette.sort())
    change_blobs(package, palettes[:1], lambda palette: np.copyto(palette, palette[::-1].copy()))
    with pytest.raises(EdgeflashError, match=r"rung L1, vae_decoder: psnr_db \d.* its floor 25"):
        refuse_below(verify(bundle), bundle.folder)


def test_no_embedding_is_palettized_and_one_that_is_is_caught(
    drawn: Exported, tmp_path: Path
) -> None:
    from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig
    from coremltools.optimize.coreml import palettize_weights as palettize

    def table(bundle: Bundle) -> str:
        """By what kind of operator the embedding's numbers are held."""
        made = operations(bundle.folder / "TextEncoder.mlpackage")
        makers = {output.name: op.type for op in made for output in op.outputs}
        tables = [op.inputs["x"].arguments[0].name for op in made if op.type == "gather"]
        return max(makers[name] for name in tables)

    target, captured = to(precision="lut6", smallest=0), drawn.captured["text_encoder"]
    ours = palettized(
        drawn, tmp_path / "a", "text_encoder", lambda m: compress(m, captured, "lut6", target)
    )
    assert table(ours) == "const"
    few = OpPalettizerConfig(nbits=2, weight_threshold=0)
    config = OptimizationConfig(op_type_configs={"gather": few})
    bundle = palettized(drawn, tmp_path / "b", "text_encoder", lambda m: palettize(m, config))
    assert table(bundle) == "constexpr_lut_to_dense"
    with pytest.raises(EdgeflashError, match=r"rung L1, text_encoder: psnr_db \d.* its floor 25"):
        refuse_below(verify(bundle), bundle.folder)


def test_another_latent_scale_is_caught(drawn: Exported) -> None:
    latent = drawn.bundle.manifest.latent.model_copy(update={"scale": 1.0})
    wrong = drawn.bundle.manifest.model_copy(update={"latent": latent})
    with pytest.raises(EdgeflashError, match=r"rung L1, vae_decoder: psnr_db"):
        refuse_below(verify(Bundle(drawn.bundle.folder, wrong)), "x")


@pytest.mark.parametrize(
    ("name", "factor", "metric"),
    [("encoder_hidden_states", 1 / 19, "delta_ratio"), ("timestep", 0, "timestep_ratio")],
)
def test_weaker_inputs_are_caught(
    name: str, factor: float, metric: str, drawn: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the program did so with what it is fed: a prompt 19 times too weak, no time at all."""
    real = Program.__call__

    def weaker(program: Program, inputs: dict[str, Any]) -> Any:
        return real(program, {k: v * factor if k == name else v for k, v in inputs.items()})

    monkeypatch.setattr(Program, "__call__", weaker)
    others = {"delta_ratio", "timestep_ratio"} - {metric}
    floors = {"psnr_db": 0.0, **dict.fromkeys(others, -9.0)}
    with pytest.raises(EdgeflashError, match=f"rung L2, unet: {metric}"):
        refuse_below(verify(drawn.bundle, floors=floors), "x")


def test_angles_of_the_timestep_stay_float32(drawn: Exported) -> None:
    told = ct.models.utils.load_spec(str(drawn.bundle.folder / "Unet.mlpackage"))
    function = told.mlProgram.functions["main"]
    made = {
        op.type: op.outputs[0].type.tensorType.dataType
        for op in function.block_specializations[function.opset].operations
    }
    assert (made["sin"], made["cos"]) == (11, 11), "FLOAT32"
    assert made["conv"] == 10, "FLOAT16"


# --- on a Mac -------------------------------------------------------------------------------------


class Model:
    """Takes the place of `coremltools.models.MLModel`, as its documentation describes it."""

    def __init__(self, path: str, compute_units: Any) -> None:
        assert compute_units == ct.ComputeUnit.CPU_AND_NE
        self.program = Program(Path(path))
        self.input_description = list(self.program.inputs)
        self.output_description = list(self.program.outputs)

    def predict(self, data: dict[str, Any]) -> dict[str, Any]:
        assert set(data) == set(self.input_description), "Core ML refuses names it does not know"
        return self.program(data)

    def get_compiled_model_path(self) -> str:
        return "compiled"


def test_on_a_mac_apple_s_framework_is_asked(
    drawn: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls alone: no Mac has run them yet."""
    from coremltools.models import compute_plan

    device = type("MLNeuralEngineComputeDevice", (), {})()
    block = SimpleNamespace(operations=[1, 2, None])
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(
            program=SimpleNamespace(functions={"main": SimpleNamespace(block=block)})
        ),
        get_compute_device_usage_for_mlprogram_operation=lambda operation: (
            operation and SimpleNamespace(preferred_compute_device=device)
        ),
    )
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", lambda *_: plan)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ct.models, "MLModel", Model)
    with TextToImage(drawn.bundle, on(units="ne")) as pipeline:
        found = pipeline.generate(Request("a red star", seed=5))
        assert pipeline.device == "Core ML CPU_AND_NE (NeuralEngine 2 operators)"
    with TextToImage(drawn.bundle, on(units="evaluator")) as pipeline:
        wanted = pipeline.generate(Request("a red star", seed=5))
    np.testing.assert_array_equal(found.latent, wanted.latent)


def test_elsewhere_it_is_not(drawn: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(EdgeflashError, match="units ne: need a Mac; use units=evaluator here"):
        on(units="ne").open(drawn.bundle.folder, drawn.bundle.component("unet"))
    assert on().open(drawn.bundle.folder, drawn.bundle.component("unet")).device == "numpy"
