"""From student to bundle: every target passes the ladder, and every fault is caught by a rung."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import QUIET, Exported, figure

from edgeflash import shelf
from edgeflash.bundle import Bundle, Component, TensorSpec
from edgeflash.calls import Part, feeds
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Captured
from edgeflash.export.line import export_student
from edgeflash.golden import Sampler, load_tensors
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for, verify


def test_every_rung_is_climbed_and_told(guided: Exported) -> None:
    rungs = {(f.rung, f.component, f.metric) for f in guided.bundle.manifest.parity}
    assert {
        ("L0", "tokenizer", "equal"),
        ("L0", "noise", "equal"),
        ("L0", "unet", "loads"),
        ("L1", "text_encoder", "psnr_db"),
        ("L1", "vae_encoder", "cosine"),
        ("L2", "unet", "delta_ratio"),
        ("L2", "unet", "timestep_ratio"),
        ("L3", "pipeline", "psnr_db"),
        ("L4", "pipeline", "ssim"),
    } <= rungs
    assert all(f.passed for f in guided.bundle.manifest.parity)
    assert figure(guided.bundle, "L1", "unet", "psnr_db").floor == 80


def test_the_golden_image_is_what_diffusers_draws(guided: Exported, guided_student: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from edgeflash.noise import randn

    golden = guided.bundle.manifest.goldens[0]
    pipeline = StableDiffusionPipeline.from_pretrained(guided_student, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        golden.prompt,
        num_inference_steps=golden.steps,
        guidance_scale=3.0,
        latents=torch.from_numpy(randn((1, 4, 8, 8), golden.seed)),
        output_type="pt",
    ).images.numpy()
    ours = load_tensors(guided.bundle.folder / golden.tensors)["image"]
    np.testing.assert_allclose((ours.clip(-1, 1) + 1) / 2, theirs, atol=2e-5)


@pytest.mark.parametrize("name", ["guided", "one_step"])
def test_the_pipeline_draws_the_goldens(name: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(name).bundle
    close = 1 if name == "guided" else 60
    with TextToImage(bundle, runtime_for(bundle)) as pipeline:
        for golden in bundle.manifest.goldens:
            drawn = pipeline.generate(Request(golden.prompt, seed=golden.seed, steps=golden.steps))
            told = load_tensors(bundle.folder / golden.tensors)["image"][0].transpose(1, 2, 0)
            pixels = np.rint((told.clip(-1, 1) + 1) * 127.5)
            assert np.abs(drawn.images[0] - pixels).max() <= close
            assert drawn.tokens[0].tolist() == list(golden.token_ids)


def test_the_batch_is_free(guided: Exported) -> None:
    bundle = guided.bundle
    with TextToImage(bundle, runtime_for(bundle)) as pipeline:
        many = pipeline.generate(Request(("a red star", "blue ring", "a"), seed=5)).images
        one = pipeline.generate(Request("a", seed=7)).images
    assert many.shape == (3, 16, 16, 3)
    assert np.abs(many[2].astype(int) - one[0]).max() <= 1


def test_one_step_students_lose_their_time_embedding(one_step: Exported) -> None:
    unet = one_step.bundle.component("unet")
    assert unet.input("timestep") is None
    model = onnx.load(one_step.bundle.folder / unet.files[0].path)
    assert [value.name for value in model.graph.input] == ["sample", "encoder_hidden_states"]
    weights = " ".join(tensor.name for tensor in model.graph.initializer)
    assert "conv1" in weights
    assert not any(gone in weights for gone in ("time_embedding", "time_emb_proj.weight"))
    assert not {"Sin", "Cos"} & {node.op_type for node in model.graph.node}


def test_int8_weights_are_int8_where_it_pays(one_step: Exported) -> None:
    bundle = one_step.bundle
    precisions = {c.name: c.precision for c in bundle.manifest.components}
    assert precisions == {"text_encoder": "fp16", "unet": "int8", "vae_decoder": "int8"}
    graph = onnx.load(bundle.folder / "unet/model.onnx").graph
    sizes = {t.name: (t.data_type, int(np.prod(t.dims))) for t in graph.initializer}
    int8 = sum(n for kind, n in sizes.values() if kind == onnx.TensorProto.INT8)
    rest = sum(n for kind, n in sizes.values() if kind == onnx.TensorProto.FLOAT)
    assert int8 > 5 * rest
    makers = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    floats = [node for node in convolutions if node.input[1] not in makers]
    assert floats[0] == convolutions[0] and floats[-1] == convolutions[-1]
    between = {makers[node.input[0]].op_type for node in floats[1:-1]}
    assert between == {"Concat"}, "first, last and shortcuts stay in float"


def test_nothing_is_named_that_does_not_ship(
    guided: Exported, guided_student: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(guided_student, tmp_path / "guided")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "unet/config.json").read_text())
    config["_name_or_path"] = "/data/somebody/sd15"
    (folder / "unet/config.json").write_text(json.dumps(config))
    for name in ("unet", "text_encoder", "vae_decoder"):
        (tmp_path / "out" / name).mkdir(parents=True)
    components = guided.bundle.manifest.components
    shelf.make(Target, "onnx", {}).furnish(Student.open(folder), components, tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["unet"] == ["diffusers", "OnnxRuntimeModel"] and index["scheduler"][0]
    assert "somebody" not in (tmp_path / "out/unet/config.json").read_text()


def test_a_run_that_fails_names_the_component(guided: Exported) -> None:
    decoder = guided.bundle.component("vae_decoder")
    session = shelf.make(Runtime, "onnx", {}).open(guided.bundle.folder, decoder)
    with pytest.raises(EdgeflashError, match="vae_decoder: ONNX Runtime failed in a run: "):
        session({"latent_sample": np.zeros((1, 3, 8, 8), np.float32)})


def test_the_folder_is_laid_out_as_optimum_reads_it(guided: Exported) -> None:
    folder = guided.bundle.folder
    index = json.loads((folder / "model_index.json").read_text())
    assert (
        index["_class_name"] == "StableDiffusionPipeline" and index["unet"] and "vae" not in index
    )
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        assert (folder / name / "model.onnx").is_file() and (
            folder / name / "config.json"
        ).is_file()
    names = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    for name, expected in names.items():
        graph = onnx.load(folder / name / "model.onnx", load_external_data=False).graph
        assert ([v.name for v in graph.input], [v.name for v in graph.output]) == expected
        first = graph.input[0].type.tensor_type.shape.dim[0]
        assert first.dim_param == "batch_size"
    timestep = onnx.load(folder / "unet/model.onnx").graph.input[1]
    assert len(timestep.type.tensor_type.shape.dim) == 0
    assert (folder / "scheduler/scheduler_config.json").is_file()
    assert {"vocab.json", "merges.txt"} <= {p.name for p in (folder / "tokenizer").iterdir()}


def test_a_tiny_decoder_passes_for_a_kl_one(one_step: Exported) -> None:
    config = json.loads((one_step.bundle.folder / "vae_decoder/config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 1.0)
    assert len(config["block_out_channels"]) == 2 and config["latent_channels"] == 4


def test_lineage_says_where_it_comes_from(one_step: Exported) -> None:
    lineage = one_step.bundle.manifest.lineage
    assert len(lineage.student_sha256 or "") == 64
    assert {"torch", "diffusers", "onnx", "onnxruntime", "edgeflash"} <= set(lineage.tools)
    assert "/" not in one_step.bundle.manifest.name
    text = (one_step.bundle.folder / MANIFEST).read_text()
    assert str(one_step.bundle.folder.parent) not in text, "no absolute path"


def test_torch_bundles_tell_nothing_of_the_machine(one_step: Exported, tmp_path: Path) -> None:
    import zipfile

    from edgeflash.export.to_torch import TorchTarget

    (path,) = TorchTarget().lower(one_step.captured["unet"], tmp_path)
    with zipfile.ZipFile(path) as archive:
        read = b"".join(archive.read(name) for name in archive.namelist())
    assert b"site-packages" not in read and b".py" not in read


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("torch", {}),
        ("onnx", {"precision": "fp32", "external_mib": 0}),
        ("onnx", {"precision": "fp16"}),
        (
            "onnx",
            {"precision": "int8", "activations": "int8", "rest": "fp32", "attention": True}
            | {"quantized": ["unet"], "keep": ["node_conv2d_1*"]},
        ),
    ],
)
def test_every_target_and_precision_passes_the_ladder(
    target: str, options: dict[str, Any], one_step_student: Path, tmp_path: Path
) -> None:
    lowered = shelf.make(Target, target, options)
    student = Student.open(one_step_student)
    bundle = export_student(student, lowered, tmp_path / "out", console=QUIET)
    assert all(f.passed for f in bundle.manifest.parity) and bundle.manifest.parity
    data = [file.path for file in bundle.files() if file.path.endswith("_data")]
    assert len(data) == (3 if options.get("external_mib") == 0 else 0)
    assert not list(tmp_path.rglob("*.bin"))
    refuse_below(verify(Bundle.open(tmp_path / "out", check="sha256")), tmp_path)


def test_verify_needs_no_torch(guided: Exported) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from edgeflash.bundle import Bundle\n"
        "from edgeflash.verify import refuse_below, verify\n"
        f"refuse_below(verify(Bundle.open({str(guided.bundle.folder)!r})), 'x')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reference_loop_is_the_pipeline_s(tmp_path: Path) -> None:
    """Fresh noise, memory of the step before and guidance, over the same sessions."""
    from tiny_bundle import tiny

    for kind, scale, channels in (("none", 1.0, 0), ("cfg", 2.5, 0), ("embedded", 2.5, 6)):
        guidance = Guidance(kind=kind, scale=scale, channels=channels)
        folder = tiny(tmp_path / kind, guidance=guidance.model_dump())
        bundle, prompt, seed = Bundle.open(folder), "a red star", 11
        runtime = runtime_for(bundle)
        with TextToImage(bundle, runtime) as pipeline:
            drawn = pipeline.generate(Request(prompt, seed=seed)).latent
            ids = [np.array([pipeline.tokenizer(text).ids]) for text in (prompt, "")]
        parts = {c.name: Part(runtime.open(folder, c), c) for c in bundle.manifest.components}
        both = [{"conditioning": parts["text_encoder"](tokens=tokens)} for tokens in ids]
        schedule = bundle.manifest.schedules[bundle.manifest.default_steps]
        found = Sampler(schedule, guidance, drawn.shape).loop(parts["unet"], *both, seed)
        np.testing.assert_allclose(found, drawn, rtol=1e-5, atol=1e-6)


def test_half_precision_leaves_angles_alone(guided: Exported, tmp_path: Path) -> None:
    unet = guided.captured["unet"]
    path = shelf.make(Target, "onnx", {"precision": "fp16"}).lower(unet, tmp_path)[0]
    session = onnxruntime.InferenceSession(path)
    assert {value.type for value in session.get_inputs()} == {"tensor(float)"}
    for sample in unet.samples:
        (found,) = session.run(None, sample.inputs)
        assert found.dtype == np.float32
        assert psnr_db(sample.outputs["out_sample"], found) > 60
    weights = onnx.load(path).graph.initializer
    halves = sum(w.data_type == onnx.TensorProto.FLOAT16 for w in weights)
    assert halves > 100, "the weights are float16"


def test_what_half_precision_cannot_hold() -> None:
    from edgeflash.export.onnx_graph import clipped_half

    lowest = float(np.finfo(np.float32).min)
    found = clipped_half(np.array([lowest, -lowest, -np.inf, 0.1], np.float32))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[:3], [-65504, 65504, -np.inf])


def test_what_int8_leaves_alone(guided: Exported, tmp_path: Path) -> None:
    from edgeflash.export.quantize import TAKES, decide

    path = guided.bundle.folder / "unet/model.onnx"
    kinds = {node.name: node.op_type for node in onnx.load(path).graph.node}
    unet = guided.captured["unet"]

    def left(**options: Any) -> list[str]:
        target = shelf.make(Target, "onnx", {"precision": "int8"} | options)
        words = decide(path, unet, target, TAKES, tmp_path)  # type: ignore[arg-type]
        return sorted(kinds[name] for name, word in words.items() if word == "none")

    gemms = sum(kind == "Gemm" for kind in kinds.values())
    shortcuts = 4  # one of each up block's resnets
    convolutions = 2 + shortcuts
    attention = 2 * 2 * 4  # scores and sums, self and cross, in four transformers
    context = 2 * 4  # keys and values of the prompt
    expected = ["Conv"] * convolutions + ["Gemm"] * gemms + ["MatMul"] * (attention + context)
    assert left() == expected
    everything = {"attention": True, "edges": True, "shortcuts": True}
    assert left(**everything) == ["Gemm"] * gemms
    assert left(**everything | {"shortcuts": False}) == ["Conv"] * shortcuts + ["Gemm"] * gemms
    assert left(**everything, keep=["node_conv2d_5"]) == ["Conv"] + ["Gemm"] * gemms


def test_programs_that_need_decomposing_are_translated_too(tmp_path: Path) -> None:
    import torch

    from edgeflash.export import onnx_graph
    from edgeflash.export.capture import Sample
    from edgeflash.export.program import to_program

    class WritesInPlace(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled = x.clone()
            doubled.add_(x)
            return doubled

    spec = TensorSpec(name="x", role="sample", shape=("batch_size", 3), dtype="float32")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    program = to_program(WritesInPlace(), [spec], Sample({"x": x[:1]}, {}))
    output = spec.model_copy(update={"name": "y", "role": "prediction"})
    captured = Captured("unet", program, (spec,), (output,), ())
    assert onnx_graph._export_plain(captured) is None
    path = onnx_graph.save(onnx_graph.translate(captured), tmp_path / "m.onnx", 2**20)[0]
    (found,) = onnxruntime.InferenceSession(path).run(["y"], {"x": x})
    np.testing.assert_array_equal(found, 2 * x)


def test_what_does_nothing_is_taken_out_even_at_the_end(tmp_path: Path) -> None:
    """A squeeze of a side that is longer is none; ONNX's would fail."""
    import torch

    from edgeflash.export.capture import Sample
    from edgeflash.export.program import to_program

    class Ends(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = (x + 1).squeeze(1)
            return torch.nn.functional.dropout(y, training=False), (y * 2).to(torch.float32)

    spec = TensorSpec(name="x", role="sample", shape=("batch_size", 3), dtype="float32")
    x = np.ones((1, 3), np.float32)
    program = to_program(Ends(), [spec], Sample({"x": x}, {}))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.add.Tensor", "aten.mul.Tensor"}
    torch.export.save(program, tmp_path / "p.pt2")  # which compares outputs with their names
    assert [y.tolist() for y in program.module()(torch.ones(2, 3))] == [
        [[2.0] * 3] * 2,
        [[4.0] * 3] * 2,
    ]


def test_a_fixed_batch_and_a_timestep_per_row_are_fed() -> None:
    specs = (
        TensorSpec(name="z", role="sample", shape=(2, 4, 1, 1), dtype="float16"),
        TensorSpec(name="t", role="timestep", shape=(2,), dtype="int64"),
    )
    component = Component(
        name="unet", target="x", precision="fp16", files=(), inputs=specs, outputs=()
    )
    fed = feeds(component, {"sample": np.ones((1, 4, 1, 1)), "timestep": np.array(7.0)})
    assert fed["z"].shape == (2, 4, 1, 1) and fed["z"].dtype == np.float16
    assert fed["t"].tolist() == [7, 7] and fed["t"].dtype == np.int64


def test_apps_get_vocabulary_and_merges_whatever_the_student_has(tmp_path: Path) -> None:
    from tiny_student import write_tokenizer
    from transformers import CLIPTokenizer

    from edgeflash.export.pack import copy_tokenizer
    from edgeflash.family_sd import tokenizer_spec
    from edgeflash.tokenizer import read_tokenizer

    write_tokenizer(tmp_path / "old")
    CLIPTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new/vocab.json").exists(), "what transformers 5 writes"
    copy_tokenizer(tmp_path / "new", tmp_path / "copy")
    (tmp_path / "copy/tokenizer.json").unlink()
    for text in ("a red star", "blue ring?"):
        ids = [
            read_tokenizer(tmp_path, tokenizer_spec(tmp_path / name))(text).ids
            for name in ("old", "new", "copy")
        ]
        assert ids[0] == ids[1] == ids[2]


# --- injected faults ------------------------------------------------------------------------------
