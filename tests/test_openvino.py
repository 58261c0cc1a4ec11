"""OpenVINO: the ladder on its files, their layout, and the runtime beside ONNX Runtime."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import QUIET, Exported, export
from test_bisect import remade
from this_cpu import overflows_int8

from edgeflash import shelf
from edgeflash.bundle import Bundle, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.export.bisect import bisect_bundles, check_pair
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.noise import randn
from edgeflash.openvino_core import core
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.pipeline import Request, Result, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for, verify

INSTALL = "is not installed: pip install 'edgeflash[openvino-export]'"
openvino = pytest.importorskip("openvino", reason=f"openvino {INSTALL}")
pytest.importorskip("nncf", reason=f"nncf {INSTALL}")

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a red star", "blue ring")


@pytest.fixture(scope="module")
def drawn(guided_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """fp32 IR of the guided student, otherwise like `guided`: two DDIM steps, encoder included."""
    with pytest.MonkeyPatch.context() as patch:
        return export(
            patch,
            guided_student,
            tmp_path_factory.mktemp("bundles") / "openvino",
            shelf.make(Target, "openvino", {}),
            steps=(2, 3),
            guidance=Guidance(kind="cfg", scale=3.0),
            prompts=PROMPTS,
            image_to_image=True,
        )


def on(**options: Any) -> Runtime:
    return shelf.make(Runtime, "openvino", options)


def draw(bundle: Bundle, runtime: Runtime, prompts: tuple[str, ...] = PROMPTS) -> Result:
    with TextToImage(bundle, runtime) as pipeline:
        return pipeline.generate(Request(prompts, seed=5))


def read(path: Path) -> Any:
    return core().read_model(str(path))


# --- the target -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param("fp16", marks=pytest.mark.slow),
        "int8",
        pytest.param("int8-weights", marks=pytest.mark.slow),
    ],
)
def test_every_precision_passes_the_ladder(
    precision: str, one_step_student: Path, tmp_path: Path
) -> None:
    narrow = {"narrow": True} if precision == "int8" and overflows_int8() else {}
    target = shelf.make(Target, "openvino", {"precision": precision} | narrow)
    student = Student.open(one_step_student)
    asked = ExportOptions()
    bundle = export_student(student, target, tmp_path / "out", asked, console=QUIET)
    assert bundle.manifest.parity and all(f.passed for f in bundle.manifest.parity)
    assert {path.name for path in (bundle.folder / "unet").iterdir()} == {
        "openvino_model.xml",
        "openvino_model.bin",
        "config.json",
    }
    assert {"openvino", "nncf"} <= set(bundle.manifest.lineage.tools)
    refuse_below(verify(Bundle.open(tmp_path / "out", check="sha256")), tmp_path)


def test_with_timestep_and_guidance_it_passes_too(drawn: Exported) -> None:
    assert all(f.passed for f in drawn.bundle.manifest.parity)
    measured = {(f.rung, f.component) for f in drawn.bundle.manifest.parity}
    assert {("L1", "vae_encoder"), ("L2", "unet"), ("L4", "pipeline")} <= measured


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_half_precision_and_int8_leave_angles_alone(
    precision: str, drawn: Exported, tmp_path: Path
) -> None:
    unet = drawn.captured["unet"]
    target = shelf.make(Target, "openvino", {"precision": precision})
    xml, weights = target.lower(unet, tmp_path)
    whole = drawn.bundle.folder / "unet/openvino_model.bin"
    assert weights.stat().st_size < 0.8 * whole.stat().st_size
    floor_db = 60 if precision == "fp16" else 25
    model = core().compile_model(str(xml), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for sample in unet.samples:
        found = model(dict(sample.inputs))["out_sample"]
        assert found.dtype == np.float32
        assert psnr_db(sample.outputs["out_sample"], found) > floor_db
    text = xml.read_text()
    whole_numbers = 'type="FakeQuantize"' in text and 'element_type="i8"' in text
    assert whole_numbers == (precision == "int8")


def test_int8_weights_are_in_the_file(drawn: Exported, tmp_path: Path) -> None:
    target = shelf.make(Target, "openvino", {"precision": "int8-weights"})
    weights = target.lower(drawn.captured["unet"], tmp_path)[0].read_text()
    assert 'type="FakeQuantize"' not in weights and re.search(r'element_type="[iu]8"', weights)


def test_what_int8_leaves_alone(drawn: Exported, guided: Exported, tmp_path: Path) -> None:
    from edgeflash.export import quantize_openvino as q
    from edgeflash.export.onnx_graph import layers, load

    path = guided.bundle.folder / "unet/model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    gemms = sum(node.op_type == "Gemm" for node in graph.node)
    model, unet = read(drawn.bundle.folder / "unet/openvino_model.xml"), drawn.captured["unet"]
    kinds = {step.name: step.kind for step in q.steps_of(model)}

    def decided(**options: Any) -> dict[str, str]:
        target = shelf.make(Target, "openvino", {"precision": "int8"} | options)
        return q.decide(model, unet, target, layers(load(path)), tmp_path)  # type: ignore[arg-type]

    def left(**options: Any) -> list[str]:
        return sorted(kinds[n] for n, word in decided(**options).items() if word == "none")

    attention = ["ScaledDotProductAttention"] * 2 * 4  # self and cross, in four transformers
    context = 2 * 4  # keys and values of the prompt
    shortcuts = 4  # one of each up block's resnets
    outer = ["Convolution"] * (2 + shortcuts)
    assert left() == outer + ["MatMul"] * (gemms + context) + attention
    everything = {"edges": True, "shortcuts": True}
    assert left(**everything) == ["MatMul"] * gemms + attention
    assert left(**everything, attention=True) == ["MatMul"] * gemms
    inner = next(n for n, word in decided().items() if kinds[n] == "Convolution" and word != "none")
    kept = left(**everything, keep=[inner])
    assert kept == ["Convolution"] + ["MatMul"] * gemms + attention
    with pytest.raises(EdgeflashError, match="no operator of unet is called 'conv_99"):
        left(keep=["conv_99*"])


def test_whole_timesteps_are_int64_as_genai_feeds_them(drawn: Exported) -> None:
    target = shelf.make(Target, "openvino", {})
    spec = TensorSpec(name="timestep", role="timestep", shape=(), dtype="float32")
    other = TensorSpec(name="sample", role="sample", shape=("n", 4), dtype="float32")
    assert target.takes(spec, whole=False) == spec
    assert target.takes(other, whole=True) == other
    taken = target.takes(spec, whole=True)
    assert (taken.dtype, taken.shape) == ("int64", (1,))
    assert drawn.bundle.component("unet").input("timestep") == taken


def test_the_folder_is_laid_out_as_genai_reads_it(drawn: Exported) -> None:
    folder = drawn.bundle.folder
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert (index["text_encoder"][1], index["unet"][1]) == ("CLIPTextModel", "UNet2DConditionModel")
    assert index["vae"][1] == "AutoencoderKL" and index["safety_checker"] == [None, None]
    names = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    for name, expected in names.items():
        model = read(folder / name / "openvino_model.xml")
        found = [[port.get_any_name() for port in ports] for ports in (model.inputs, model.outputs)]
        assert (found[0], found[1]) == expected
        assert model.inputs[0].get_partial_shape()[0].is_dynamic
        text = (folder / name / "openvino_model.xml").read_text()
        assert str(folder.parent) not in text, "no absolute path"
        config = json.loads((folder / name / "config.json").read_text())
        assert "scaling_factor" in config or not name.startswith("vae")
    timestep = read(folder / "unet/openvino_model.xml").input("timestep")
    assert timestep.get_element_type() == openvino.Type.i64
    assert str(timestep.get_partial_shape()) == "[1]"
    settings = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert settings["_class_name"] == "DDIMScheduler"
    assert (settings["steps_offset"], settings["clip_sample"]) == (1, False)  # as diffusers runs it


@pytest.mark.usefixtures("replay")
def test_a_tiny_decoder_passes_for_a_kl_one(one_step_student: Path, tmp_path: Path) -> None:
    student = Student.open(one_step_student)
    target = shelf.make(Target, "openvino", {"precision": "fp16"})
    folder = export_student(student, target, tmp_path / "out", console=QUIET).folder
    index = json.loads((folder / "model_index.json").read_text())
    config = json.loads((folder / "vae_decoder/config.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 1.0)


def test_genai_s_tokenizer_gives_our_ids(drawn: Exported) -> None:
    pytest.importorskip("openvino_tokenizers", reason=f"openvino_tokenizers {INSTALL}")
    folder = drawn.bundle.folder / "tokenizer"
    assert (folder / "openvino_detokenizer.xml").is_file()
    extended = openvino.Core()  # which knows their operators
    tokenizer = extended.compile_model(str(folder / "openvino_tokenizer.xml"), "CPU")
    for golden in drawn.bundle.manifest.goldens:
        ids = tokenizer([golden.prompt])["input_ids"][0]
        assert ids.dtype == np.int64
        assert ids.tolist() == list(golden.token_ids)[: len(ids)]


def test_without_its_tokenizers_it_says_what_is_missing(
    guided: Exported, guided_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    for name in ("unet", "text_encoder", "vae_decoder"):
        (tmp_path / name).mkdir()
    student, components = Student.open(guided_student), guided.bundle.manifest.components
    said = shelf.make(Target, "openvino", {}).furnish(student, components, tmp_path)
    assert "no openvino_tokenizer.xml" in said and "pip install openvino-tokenizers" in said
    assert "\n" not in said


# --- the runtime ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"static": True}], ids=str)
def test_it_draws_what_onnx_runtime_draws(
    options: dict[str, Any], drawn: Exported, guided: Exported
) -> None:
    theirs = draw(guided.bundle, runtime_for(guided.bundle))
    ours = draw(drawn.bundle, on(**options))
    assert ours.images.shape == (2, 16, 16, 3)
    assert psnr_db(theirs.latent, ours.latent) > 80
    assert psnr_db(theirs.images.astype(float), ours.images.astype(float), 255) > 50


@pytest.mark.parametrize("name", ["guided", "one_step"])
def test_it_opens_onnx_bundles_too(name: str, request: pytest.FixtureRequest) -> None:
    if name == "one_step" and overflows_int8():
        pytest.skip("here OpenVINO adds products of 8 bits in 16, and its int8 has no other form")
    bundle = request.getfixturevalue(name).bundle
    figures = verify(bundle, on())
    assert all(f.passed for f in figures), [f for f in figures if not f.passed]
    assert shelf.opener("onnx") == "onnx", "ONNX Runtime stays the first choice"


def test_sums_may_run_in_bf16(drawn: Exported) -> None:
    exact, rough = (draw(drawn.bundle, on(inference_precision=p)) for p in ("f32", "bf16"))
    assert psnr_db(exact.latent, rough.latent) > 20


def test_compiled_models_are_kept_where_asked(drawn: Exported, tmp_path: Path) -> None:
    kept = tmp_path / "cache"
    first = draw(drawn.bundle, on(cache_dir=str(kept)))
    files = sorted(kept.rglob("*"))
    assert files
    again = draw(drawn.bundle, on(cache_dir=str(kept)))
    assert sorted(kept.rglob("*")) == files
    np.testing.assert_array_equal(first.images, again.images)


def test_verify_needs_no_torch(drawn: Exported) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = None\n"
        "from edgeflash.bundle import Bundle\n"
        "from edgeflash.verify import refuse_below, verify\n"
        f"refuse_below(verify(Bundle.open({str(drawn.bundle.folder)!r})), 'x')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_one_line(drawn: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn.bundle.folder, tmp_path / "b"))
    unet = drawn.bundle.component("unet")
    renamed = unet.inputs[0].model_copy(update={"name": "x"})
    other = unet.model_copy(update={"inputs": (renamed, *unet.inputs[1:])})
    with pytest.raises(EdgeflashError, match=r"components.unet: the model has no tensor 'x'"):
        on().open(folder, other)
    session = on().open(folder, drawn.bundle.component("vae_decoder"))
    with pytest.raises(EdgeflashError, match="vae_decoder: OpenVINO failed in a run: ") as failed:
        session({"latent_sample": np.zeros((1, 3, 8, 8), np.float32)})
    path = folder / "unet/openvino_model.xml"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(EdgeflashError, match=r"rung L0, unet: .*OpenVINO does not load") as broken:
        verify(Bundle.open(folder, check="size"))
    assert "\n" not in str(failed.value) + str(broken.value)


def test_a_device_that_is_not_here_is_told(drawn: Exported) -> None:
    here = " ".join(core().available_devices).lower()
    away = next((name for name in ("npu", "gpu") if name not in here), None)
    if away is None:
        pytest.skip("this machine has both a GPU and an NPU for OpenVINO")
    with pytest.raises(EdgeflashError, match=f"device {away}: OpenVINO finds cpu.*device=cpu"):
        on(device=away).open(drawn.bundle.folder, drawn.bundle.component("unet"))


# --- OpenVINO GenAI -------------------------------------------------------------------------------

GENAI = """
import sys
import numpy as np, openvino, openvino_genai
folder, noise, prompt, steps, out = sys.argv[1:]

class Drawn(openvino_genai.Generator):
    def next(self):
        raise AssertionError("single numbers are not asked for")
    def randn_tensor(self, shape):
        return openvino.Tensor(np.load(noise))
    def seed(self, new_seed):
        pass

pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
picture = pipeline.generate(prompt, num_inference_steps=int(steps), guidance_scale=3.0,
                            height=16, width=16, generator=Drawn())
np.save(out, picture.data)
"""


@pytest.mark.slow
def test_genai_draws_the_same(drawn: Exported, tmp_path: Path) -> None:
    """The bundle, unmodified, in OpenVINO GenAI's own pipeline, in an environment of its own."""
    if not (drawn.bundle.folder / "tokenizer/openvino_tokenizer.xml").is_file():
        pytest.skip(f"openvino_tokenizers {INSTALL}")
    python = tmp_path / "venv/bin/python"
    constraints = str(ROOT / ".ci/constraints.txt")
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([*pip, "openvino", "openvino-genai", "numpy"], check=True)
    script, noise, out = (tmp_path / name for name in ("genai.py", "noise.npy", "out.npy"))
    script.write_text(GENAI)
    golden = drawn.bundle.manifest.goldens[0]
    np.save(noise, randn((1, 4, 8, 8), golden.seed))
    words = [drawn.bundle.folder, noise, golden.prompt, golden.steps, out]
    subprocess.run(
        [str(word) for word in (python, script, *words)],
        check=True,
        env=os.environ | {"PYTHONNOUSERSITE": "1"},
    )
    with TextToImage(drawn.bundle, on()) as pipeline:
        request = Request(golden.prompt, seed=golden.seed, steps=golden.steps)
        ours = pipeline.generate(request).images.astype(float)
    assert psnr_db(ours, np.load(out).astype(float), 255) >= 40


@pytest.mark.slow
def test_an_int8_network_leads_to_a_layer_of_its_plan(drawn: Exported, tmp_path: Path) -> None:
    unet = drawn.captured["unet"]
    target: Any = shelf.make(Target, "openvino", {"precision": "int8"})
    target.lower(unet, tmp_path)
    line = target.diverged("unet", lambda: unet, tmp_path, 55.0)
    name = line.partition('keep=["')[2].partition('"')[0]
    assert name.startswith("unet/") and f'"{name}" = "int8"' in (tmp_path / "plan.toml").read_text()
    assert target.diverged("unet", lambda: unet, tmp_path, 5.0) == ""


def test_bundles_are_bisected_too(drawn: Exported, tmp_path: Path) -> None:
    bundle: Bundle = drawn.bundle
    assert bisect_bundles(bundle, bundle, "unet", 90.0) is None
    check_pair(remade(bundle, update={"precision": "int8"}), bundle)
