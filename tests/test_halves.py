"""Half precision: it is proved as it is typed, and what its range does not hold stays float32."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exported import QUIET, Exported, export
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from tiny_sdxl import write_sdxl

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.export import line, ranges
from edgeflash.export.line import export_student, planned
from edgeflash.export.onnx_graph import layers, load
from edgeflash.export_options import AS_USUAL
from edgeflash.parity import psnr_db
from edgeflash.roles import Target
from edgeflash.rounding import FOLDER, rounded
from edgeflash.student import Student
from edgeflash.verify import refuse_below, runtime_for, verify

LAYER = "down_blocks.0.resnets.0"
HALF = TensorProto.FLOAT16


def to(target: str = "onnx", **options: Any) -> Any:
    return shelf.make(Target, target, {"precision": "fp16"} | options)


@dataclass(frozen=True)
class Overflown:
    """A UNet with a convolution of some 1e5, and the norm behind it; no scan kept it wide."""

    student: Path
    made: Exported
    said: list[str]  # of its ladder

    @property
    def bundle(self) -> Bundle:
        return self.made.bundle


@pytest.fixture(scope="module")
def overflown(one_step_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Overflown:
    from diffusers import UNet2DConditionModel

    folder, said = tmp_path_factory.mktemp("overflown"), list[str]()
    student = Path(shutil.copytree(one_step_student, folder / "student"))
    unet = UNet2DConditionModel.from_pretrained(student / "unet")
    conv1 = unet.get_submodule(f"{LAYER}.conv1")
    conv1.weight.data.mul_(4e5)
    assert conv1.weight.abs().max() < ranges.LARGEST_HALF, "it is the sums that do not fit"
    unet.save_pretrained(student / "unet")

    def climb(*args: Any, **options: Any) -> Any:
        figures = verify(*args, **options)
        with pytest.raises(EdgeflashError) as caught:
            refuse_below(figures, "out")
        said.append(str(caught.value))
        return tuple(f for f in figures if f.metric != "relative_l2")  # infinite, as no JSON is

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "large", lambda captured: set())
        patch.setattr(line, "verify", climb)
        patch.setattr(line, "refuse_below", lambda figures, out: None)
        made = export(patch, student, folder / "out", to())
    return Overflown(student, made, said)


def test_an_overflow_fails_its_rung_wherever_it_is_proved(overflown: Overflown) -> None:
    wanted = r"rung L1, unet: psnr_db 0 misses its floor 45"
    assert len(overflown.said) == 1 and overflown.said[0].endswith(wanted)
    with pytest.raises(EdgeflashError, match=wanted):
        refuse_below(verify(overflown.bundle), "out")


def test_what_runs_is_what_it_was(overflown: Overflown) -> None:
    """The CPU computes it in float32: only the ladder rounds, and what is open says so."""
    bundle, sample = overflown.bundle, overflown.made.captured["unet"].samples[0]
    runtime, unet = runtime_for(bundle), bundle.component("unet")
    wanted = sample.outputs["out_sample"]
    plain, exact = (
        each.open(bundle.folder, unet)(sample.inputs)["out_sample"]
        for each in (runtime, runtime.exact())
    )
    assert psnr_db(wanted, plain) > 45 and not np.isfinite(exact).all()


def test_layers_that_are_named_stay_in_float32(overflown: Overflown, tmp_path: Path) -> None:
    captured = overflown.made.captured["unet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "large", lambda captured: set())
        path = to(keep=[f"unet/{LAYER}*"]).lower(captured, tmp_path)[0]
        with pytest.raises(EdgeflashError, match=r"^keep: no operator of unet is called 'unet/x'"):
            to(keep=["unet/x"]).lower(captured, tmp_path)
    assert exact_db(path, captured) > 45
    found, weights = layers(load(path)), kinds(path)
    model = onnx.load(path)
    convs = {found[n.name]: weights[n.input[1]] for n in model.graph.node if n.op_type == "Conv"}
    assert convs[f"{LAYER}.conv1"] == convs[f"{LAYER}.conv2"] == TensorProto.FLOAT
    assert convs["conv_in"] == HALF


def test_what_leaves_the_range_stays_in_float32(overflown: Overflown, tmp_path: Path) -> None:
    captured = overflown.made.captured["unet"]
    assert 1 <= len(ranges.large(captured)) <= 6, "the convolution, and up to its norm"
    path = to().lower(captured, tmp_path)[0]
    assert exact_db(path, captured) > 45
    found, weights = layers(load(path)), kinds(path)
    wide = {
        found[n.name]
        for n in onnx.load(path).graph.node
        if n.op_type == "Conv" and weights[n.input[1]] == TensorProto.FLOAT
    }
    assert wide == {f"{LAYER}.conv1"}


def test_plain_networks_have_no_such_island(guided: Exported) -> None:
    """Nor do masks count, of which text encoders have one."""
    assert not any(ranges.large(captured) for captured in guided.captured.values())


def kinds(path: Path) -> dict[str, int]:
    return {weight.name: weight.data_type for weight in onnx.load(path).graph.initializer}


def exact_db(path: Path, captured: Any) -> float:
    session = ort.InferenceSession(rounded(path.read_bytes()))
    pairs = [(s.outputs["out_sample"], session.run(None, s.inputs)[0]) for s in captured.samples]
    return min(psnr_db(wanted, found) for wanted, found in pairs)


# --- the rounding ---------------------------------------------------------------------------------


def graph_of(path: Path, *nodes: Any, inner: str, weights: dict[str, Any]) -> Path:
    """From x [2, 3] to y, both float32; ``inner``: tensors on the way, halves."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **more) for kind, ins, outs, more in nodes],
        "g",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
        value_info=[helper.make_tensor_value_info(n, HALF, [2, 3]) for n in inner.split()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def small(path: Path) -> Path:
    """y = relu(x + w) * c + 0.1, transposed there and back; c made by ConstantOfShape."""
    c = helper.make_tensor("v", HALF, [1], [3.0])
    return graph_of(
        path,
        ("Cast", ["x"], ["h"], {"to": HALF}),
        ("Add", ["h", "w"], ["a"], {}),
        ("Relu", ["a"], ["r"], {}),
        ("Transpose", ["r"], ["t"], {"perm": [1, 0]}),
        ("Transpose", ["t"], ["b"], {"perm": [1, 0]}),
        ("ConstantOfShape", ["shape"], ["c"], {"value": c}),
        ("Mul", ["b", "c"], ["m"], {}),
        ("Add", ["m", "tenth"], ["s"], {}),
        ("Cast", ["s"], ["y"], {"to": TensorProto.FLOAT}),
        inner="h a r b m s",  # of t and c it is not told
        weights={
            "w": np.array([[1e-3, 40000, 1], [2, 3, 4]], np.float16),
            "shape": np.array([2, 3]),
            "tenth": np.float16(0.1),
        },
    )


def test_every_result_is_rounded(tmp_path: Path) -> None:
    x = np.array([[1, 40000, np.pi], [-9, 1 / 3, 1000.3]], np.float32)
    path = small(tmp_path / "m.onnx")
    (found,) = ort.InferenceSession(rounded(path.read_bytes())).run(None, {"x": x})
    with np.errstate(over="ignore"):
        w = np.array([[1e-3, 40000, 1], [2, 3, 4]], np.float16)
        wanted = np.maximum(x.astype(np.float16) + w, 0) * np.float16(3) + np.float16(0.1)
    assert wanted.dtype == np.float16 and np.isinf(wanted[0, 1])
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    model = onnx.load(small(tmp_path / "m.onnx"))
    before = rounded((tmp_path / "m.onnx").read_bytes())
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "w.data")
    onnx.save(model, tmp_path / "e.onnx")
    assert (tmp_path / "w.data").stat().st_size == 6 * 2
    options = ort.SessionOptions()
    options.add_session_config_entry(FOLDER, str(tmp_path))
    x = {"x": np.ones((2, 3), np.float32)}
    found = ort.InferenceSession(rounded((tmp_path / "e.onnx").read_bytes()), options).run(None, x)
    np.testing.assert_array_equal(found, ort.InferenceSession(before).run(None, x))


def test_what_is_not_narrow_is_not_touched(guided: Exported) -> None:
    whole = (guided.bundle.folder / "unet/model.onnx").read_bytes()
    assert rounded(whole) == whole
    for broken in (whole[:-7], b"\x3a\xff\xff\xff\xff\xff", b"\x3b"):
        with pytest.raises(ValueError, match="no ONNX model"):
            rounded(broken)


def test_rounding_needs_no_package(tmp_path: Path) -> None:
    path = small(tmp_path / "m.onnx")
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'google', 'numpy'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from edgeflash.rounding import rounded\n"
        f"path = Path({str(path)!r})\n"
        "path.write_bytes(rounded(path.read_bytes()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Cast") == 2 + 3 + 2 * 4, "weights and c; x, a, m and s; none of moves"


# --- options --------------------------------------------------------------------------------------

QUANTIZES = "goes with a precision that quantizes, such as int8, and does nothing in"


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("onnx", {"precision": "int8", "quantized": ["unte"]}, "no component 'unte' .*'unet'"),
        ("openvino", {"precision": "int8", "quantized": ["vae"]}, "no component 'vae'"),
        ("onnx", {"quantized": ["unet"]}, f"quantized: {QUANTIZES} fp16"),
        ("onnx", {"attention": True}, f"attention: {QUANTIZES} fp16"),
        ("onnx", {"ranges": "entropy", "precision": "fp32"}, f"ranges: {QUANTIZES} fp32"),
        ("onnx", {"activations": "int8"}, f"activations: {QUANTIZES} fp16"),
        ("openvino", {"shortcuts": True}, f"shortcuts: {QUANTIZES} fp16"),
        ("tensorrt", {"edges": True, "precision": "bf16"}, f"edges: {QUANTIZES} bf16"),
        ("onnx", {"rest": "fp32"}, f"rest: {QUANTIZES} fp16"),
        ("onnx", {"keep": ["unet/x"], "precision": "fp32"}, "keep: goes with a .* not fp32"),
        ("openvino", {"keep": ["unet/x"]}, f"keep: {QUANTIZES} fp16"),
        ("onnx", {"keep": ["x*"]}, r"keep: 'x\*' names no component, as unet/x\* does"),
        ("coreml", {"precision": "int8", "group": 8, "ios": 18}, "group: goes with palettes"),
        ("coreml", {"keep": ["x"]}, "keep: goes with a precision of fewer bits"),
    ],
)
def test_options_that_do_nothing_are_refused(
    target: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(EdgeflashError, match=said) as caught:
        to(target, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("onnx", {"precision": "int8", "quantized": ["transformer"]}, "^quantized: none of text_"),
        ("onnx", {"precision": "int8", "quantized": []}, "would be in int8: name one"),
        ("coreml", {"precision": "int8", "quantized": ["vae_encoder"]}, "^quantized: none of text"),
        ("onnx", {"keep": ["transformer/x"]}, "^keep: 'transformer/x': transformer is none of"),
    ],
)
def test_what_means_no_component_is_refused_before_the_work(
    target: str, options: dict[str, Any], said: str, one_step_student: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeflashError, match=said) as caught:
        student = Student.open(one_step_student)
        export_student(student, to(target, **options), tmp_path / "out", console=QUIET)
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_a_search_among_precisions_leaves_them_out() -> None:
    from edgeflash.choice import at_precision

    asked = {"quantized": ["unet"], "external_mib": 1, "keep": ["unet/conv_in"]}
    assert at_precision("onnx", "fp32", asked) == {"external_mib": 1, "precision": "fp32"}
    assert set(at_precision("onnx", "fp16", asked)) == {"external_mib", "keep", "precision"}
    assert at_precision("onnx", "int8", asked) == asked | {"precision": "int8"}


def test_all_of_a_component_stays_in_float32() -> None:
    def made(**options: Any) -> list[tuple[str, bool]]:
        target = to(keep=["vae_decoder/*"], **options)
        return [(target.precision_of(n), target.halves(n)) for n in ("unet", "vae_decoder")]

    assert made() == [("fp16", True), ("fp32", False)]
    assert made(precision="int8") == [("int8", False), ("fp32", False)]
    assert made(precision="int4-weights") == [("int4-weights", True), ("fp32", False)]


# --- SDXL's autoencoder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "config", "decoder"),
    [
        ("onnx", {}, {"force_upcast": True}, "fp32"),
        ("onnx", {}, {"force_upcast": False}, "fp16"),
        ("onnx", {"precision": "int8", "quantized": ["unet"]}, {}, "fp32"),
        ("onnx", {"precision": "int8"}, {}, "int8"),
        ("tensorrt", {"precision": "int8", "compute_capabilities": []}, {}, "fp32"),
        ("tensorrt", {"precision": "bf16", "compute_capabilities": []}, {}, "bf16"),
    ],
)
def test_what_a_pipeline_upcasts_stays_in_float32(
    target: str, options: dict[str, Any], config: dict[str, Any], decoder: str, sdxl: Path
) -> None:
    said, console = list[str](), Console(quiet=True)
    console.print = lambda line, **_: said.append(line)  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        student = Student.open(sdxl)
        real = type(student).config
        patch.setattr(
            type(student),
            "config",
            lambda self, name: real(self, name) | (config if name == "vae" else {}),
        )
        plan = line._upcast(planned(student, to(target, **options), AS_USUAL), console)
    assert plan.tape.target.precision_of("vae_decoder") == decoder
    assert plan.tape.target.precision_of("unet") == options.get("precision", "fp16")
    told = ["the VAE says force_upcast: it stays in fp32, as in diffusers' pipeline"]
    assert said == told * (decoder == "fp32")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "small")


def test_stable_diffusion_decodes_in_halves(guided_student: Path) -> None:
    """As its pipeline does, whatever diffusers writes down by default."""
    plan = planned(Student.open(guided_student), to(), AS_USUAL)
    assert line._upcast(plan, QUIET).tape.target.precision_of("vae_decoder") == "fp16"
