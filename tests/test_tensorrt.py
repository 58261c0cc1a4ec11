"""TensorRT without a GPU: its networks, the engines that tensorrt_rtx builds ahead, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import QUIET, Exported, attempt
from onnx import TensorProto, numpy_helper
from simulated_gpu import Cuda

from edgeflash import engine, inspect, shelf
from edgeflash.bundle import Bundle, Component, Engine, File
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student
from edgeflash.export.quantize_symmetric import keep_positive
from edgeflash.export.stand_in import StandIn
from edgeflash.gpu import NO_GPU
from edgeflash.roles import Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.student import Student
from edgeflash.verify import runtime_for, verify

INSTALL = "is not installed: pip install 'edgeflash[tensorrt-rtx]'"
trt = pytest.importorskip("tensorrt_rtx", reason=f"tensorrt_rtx {INSTALL}")
bindings = pytest.importorskip("cuda.bindings", reason=f"cuda-python {INSTALL}")

LATER = {"vendor": "tensorrt"}  # engines are built where the bundle runs
QDQ = {"QuantizeLinear", "DequantizeLinear"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Also on machines that have one."""
    cuda = Cuda()
    cuda.devices = 0
    monkeypatch.setattr(bindings, "runtime", cuda, raising=False)
    return cuda


def target(**options: Any) -> Target:
    return shelf.make(Target, "tensorrt", options)


def lowered(exported: Exported, name: str, out: Path, **options: Any) -> Any:
    """The ONNX graph of a component, and its files."""
    files = target(**options).lower(exported.captured[name], out)
    path = next(path for path in files if path.suffix == ".onnx")
    return onnx.load(path).graph, files


def weights(graph: Any) -> dict[str, Any]:
    return {each.name: each for each in graph.initializer}


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])  # fp16: with its engines, below
def test_what_a_gpu_is_for_passes_the_ladder_on_a_stand_in(
    precision: str, one_step_student: Path, tmp_path: Path
) -> None:
    student = Student.open(one_step_student)
    made = target(precision=precision, **LATER)
    bundle = export_student(student, made, tmp_path / "out", console=QUIET)
    manifest = bundle.manifest
    assert manifest.parity and all(figure.passed for figure in manifest.parity)
    assert manifest.unproven and "engines were not run: no CUDA driver or GPU" in manifest.unproven
    assert "run edgeflash verify on the device" in manifest.unproven
    assert manifest.unproven in str(json.loads((bundle.folder / MANIFEST).read_text()))
    assert unet_db(bundle) < {"bf16": 65, "int8": 60, "fp8": 45}[precision], "it shows"
    with pytest.raises(EdgeflashError, match=r"^rung L0, text_encoder: .* no CUDA driver"):
        verify(bundle)


def unet_db(bundle: Bundle) -> float:
    figures = bundle.manifest.parity
    return next(f.value for f in figures if (f.rung, f.component) == ("L1", "unet"))


def test_int8_is_as_tensorrt_takes_it(guided: Exported, tmp_path: Path) -> None:
    graph, _ = lowered(guided, "unet", tmp_path, precision="int8", **LATER)
    initializers = weights(graph)
    makers = {name: node for node in graph.node for name in node.output}
    pairs = [node for node in graph.node if node.op_type in QDQ]
    assert len(pairs) > 40
    for node in pairs:
        zero = initializers[node.input[2]]
        assert zero.data_type == TensorProto.INT8 and not numpy_helper.to_array(zero).any()
        assert initializers[node.input[1]].data_type == TensorProto.FLOAT16
    inner = [node for node in graph.node if node.op_type == "Conv"][1:-1]  # without the edges
    for node in inner:
        made_by = [makers[name].op_type if name in makers else "weight" for name in node.input]
        shortcut = made_by == ["Concat", "weight", "weight"]
        assert shortcut or made_by == ["DequantizeLinear", "DequantizeLinear", "weight"]
    given = {node.output[0] for node in pairs if node.op_type == "DequantizeLinear"}
    users = {node.op_type for node in graph.node if given.intersection(node.input)}
    assert users == {"Conv", "MatMul"}, "skip connections and norms take the values themselves"
    inputs = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert set(inputs.values()) == {TensorProto.FLOAT}


def test_scales_that_fp16_cannot_hold_are_raised() -> None:
    weight = np.array([[100, -128], [100, -128]], np.int8)
    values = {"w": weight, "s": np.float32([1e-9, 0.5]), "z": np.zeros(2, np.int8)}
    node = onnx.helper.make_node("DequantizeLinear", list(values), ["y"], axis=0)
    end = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    arrays = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = onnx.helper.make_graph([node], "g", [], [end], arrays)
    model = ir.from_proto(onnx.helper.make_model(graph))
    keep_positive(model)
    raised, kept = (model.graph.initializers[n].const_value.numpy() for n in "sw")
    assert (raised.astype(np.float16) > 0).all() and raised[1] == 0.5
    np.testing.assert_array_equal(kept, [[2, -2], [100, -128]])


def test_fp8_is_that_of_the_weights_themselves(guided: Exported, tmp_path: Path) -> None:
    options = {"precision": "fp8", "rest": "fp32"}
    graph, _ = lowered(guided, "unet", tmp_path / "a", **options, **LATER)
    whole = weights(lowered(guided, "unet", tmp_path / "b", **LATER)[0])
    found = weights(graph)
    kinds = {each.data_type for each in found.values()}
    assert TensorProto.FLOAT8E4M3FN in kinds and TensorProto.INT8 not in kinds
    checked = 0
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in found:
            weight, scale = (numpy_helper.to_array(found[name]) for name in node.input[:2])
            wanted = numpy_helper.to_array(whole[node.input[0].removesuffix("_quantized")])
            axis = node.attribute[0].i
            along = [-1 if i == axis else 1 for i in range(wanted.ndim)]
            given = weight.astype(np.float32) * scale.reshape(along)
            assert np.abs(given - wanted).max() <= np.abs(wanted).max() / 28  # 2**-4 of each, + ulp
            assert np.abs(weight.astype(np.float32)).max() == 448
            checked += 1
    assert checked > 20


def test_fp8_leaves_convolutions_to_tensorrt(guided: Exported, tmp_path: Path) -> None:
    made = target(precision="fp8", compute_capabilities=[])
    assert made._unfit == ("Gemm", "Conv")  # type: ignore[attr-defined]
    assert target(precision="int8", **LATER)._unfit == ()  # type: ignore[attr-defined]
    assert [made.precision_of(name) for name in ("unet", "vae_decoder")] == ["fp8", "fp16"]
    everywhere = made.model_copy(update={"quantized": ("vae_encoder",), "keep": ("*",)})
    with pytest.raises(EdgeflashError, match="vae_encoder has nothing that fp8 applies to"):
        everywhere.lower(guided.captured["vae_encoder"], tmp_path)


def test_bf16_is_valid_onnx_but_for_the_angles(guided: Exported, tmp_path: Path) -> None:
    _, files = lowered(guided, "unet", tmp_path, precision="bf16", **LATER)
    model = onnx.load(files[0])
    onnx.checker.check_model(model, full_check=True)
    kinds = [each.data_type for each in model.graph.initializer]
    assert kinds.count(TensorProto.BFLOAT16) > 100 and TensorProto.FLOAT16 not in kinds
    angles = {node.input[0] for node in model.graph.node if node.op_type in ("Sin", "Cos")}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert {types[name] for name in angles} == {TensorProto.FLOAT}


# --- the stand-in ---------------------------------------------------------------------------------


def product(folder: Path, kind: int) -> Component:
    """y = x * 256 * 256 / 65536 in a type of 16 bits."""
    make = onnx.helper.make_tensor
    values = {"a": 256.0, "b": 256.0, "c": 2.0**-16}
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["h"], to=kind),
        onnx.helper.make_node("Mul", ["h", "a"], ["ha"]),
        onnx.helper.make_node("Mul", ["ha", "b"], ["hab"]),
        onnx.helper.make_node("Mul", ["hab", "c"], ["habc"]),
        onnx.helper.make_node("Cast", ["habc"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy"]
    graph = onnx.helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [make(n, kind, [], [v]) for n, v in values.items()]
    )
    inner = [onnx.helper.make_tensor_value_info(n, kind, [3]) for n in ("h", "ha", "hab", "habc")]
    graph.value_info.extend(inner)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, folder / "m.onnx")
    spec = {"role": "", "shape": (3,), "dtype": "float32"}
    return Component.model_validate(
        {
            "name": "unet",
            "target": "tensorrt",
            "precision": "fp16",
            "files": (File(path="m.onnx", bytes=0, sha256=""),),
            "inputs": ({"name": "x", **spec},),
            "outputs": ({"name": "y", **spec},),
        }
    )


def test_the_stand_in_overflows_and_rounds_as_the_types_do(tmp_path: Path) -> None:
    import ml_dtypes

    x = np.array([0.5, 3.14159, -2.0], np.float32)
    found = {
        kind: StandIn().open(tmp_path, product(tmp_path, kind))({"x": x})["y"]
        for kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    }
    assert np.isinf(found[TensorProto.FLOAT16][1:]).all() and found[TensorProto.FLOAT16][0] == 0.5
    wanted = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found[TensorProto.BFLOAT16], wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


# --- engines ahead of time ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8"])
def test_tensorrt_rtx_builds_every_precision(
    precision: str, one_step: Exported, tmp_path: Path
) -> None:
    name = "text_encoder" if precision == "fp8" else "vae_decoder"
    options: dict[str, Any] = {"precision": precision, "compute_capabilities": "8.9"}
    options |= {"quantized": [name]} if precision in ("int8", "fp8") else {}
    _, files = lowered(one_step, name, tmp_path, **options)
    assert [path.name for path in files] == ["model.engine", "model.onnx"]
    assert malformed(files[0]) == 0
    files[0].write_bytes(b"x" * 1000)
    assert malformed(files[0])


def malformed(path: Path) -> int:
    """What tensorrt_rtx itself finds wrong with an engine's header, but for the missing GPU."""
    runtime = trt.Runtime(engine.logger(trt))
    _, flags = runtime.get_engine_validity(path.read_bytes()[: runtime.engine_header_size])
    kinds = trt.EngineInvalidityDiagnostics
    return int(flags) & (int(kinds.MALFORMED_ENGINE) | int(kinds.VERSION_MISMATCH))


@pytest.mark.usefixtures("replay")
def test_a_bundle_with_engines_tells_what_they_are_for(
    one_step_student: Path, tmp_path: Path
) -> None:
    student = Student.open(one_step_student)
    made = target(precision="fp16", compute_capabilities=["8.6", "8.9"], most_rows=4)
    bundle = export_student(student, made, tmp_path / "out", console=QUIET)
    assert unet_db(bundle) < 90, "fp16 shows"
    for component in bundle.manifest.components:
        told = component.engine
        assert told and (told.vendor, told.built_with) == ("tensorrt_rtx", trt.__version__)
        assert (told.rows, told.built_for) == ((1, 1, 4), ("8.6", "8.9"))
        assert [file.path.rpartition("/")[2] for file in component.files] == [
            "model.engine",
            "model.onnx",
        ]
    assert "unproven" in shown(bundle.folder) and "for 8.6, 8.9" in shown(bundle.folder)
    with pytest.raises(EdgeflashError) as caught, TextToImage(bundle, runtime_for(bundle)) as app:
        app.generate(Request(("a red star",), seed=1))
    assert str(caught.value) == (
        "text_encoder: its engine was built for tensorrt_rtx "
        f"{trt.__version__}, compute capability 8.6, 8.9; this machine: no CUDA driver or GPU here "
        "(cudaErrorNoDevice): without one, export --to onnx"
    )


def shown(folder: Path) -> str:
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as capture:
        console.print(inspect.tell(folder))
    return capture.get()


@pytest.mark.parametrize(
    ("rows", "batch"), [((2, 2, 2), 2), ((1, 2, 4), -1)], ids=["static", "profile"]
)
def test_rows_are_fixed_or_free(rows: tuple[int, int, int], batch: int, guided: Exported) -> None:
    component = guided.bundle.component("vae_decoder")
    builder = trt.Builder(engine.logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, engine.logger(trt))
    assert parser.parse_from_file(str(guided.bundle.folder / component.files[0].path))
    config = builder.create_builder_config()
    engine._set_rows(builder, network, config, component, rows)
    assert tuple(network.get_output(0).shape) == (batch, 3, 16, 16)
    assert config.num_optimization_profiles == (batch == -1)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute_capabilities": 8.8}, "capability in tensorrt_rtx .* '8.8' .have: 12.0"),
        ({"precision": "fp8", "compute_capabilities": "8.6,8.9"}, "8.6 has no fp8 .* at 8.9"),
        ({"precision": "int8", "rest": "bf16", "compute_capabilities": "7.5"}, "7.5 has no bf16"),
    ],
)
def test_gpus_that_cannot_are_refused_before_any_work(
    options: dict[str, Any], said: str, one_step_student: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeflashError, match=said):
        raise EdgeflashError(attempt(one_step_student, tmp_path / "out", target(**options)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hardware": "ampere_plus"}, "hardware: not in tensorrt_rtx, only with vendor=tensorrt"),
        (
            {"refit": True, "compute_capabilities": "8.9"},
            "refit: .* leave compute_capabilities out",
        ),
        ({"compute_capabilities": "8.9", **LATER}, "tensorrt builds for the GPU it runs on"),
        ({"rows": 4, "most_rows": 2}, "most_rows 2 is less than rows 4"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgeflashError, match=said) as caught:
        target(**options)
    assert "\n" not in str(caught.value)


def test_capabilities_are_written_in_any_way_and_chosen_by_precision() -> None:
    for written in ("8.6,12.0", ["8.6", "12.0"], (8.6, 12.0)):
        assert target(compute_capabilities=written).built_for == ("8.6", "12.0")  # type: ignore[attr-defined]
    assert target().built_for == ("8.0", "8.6", "8.9", "12.0")  # type: ignore[attr-defined]
    assert target(precision="fp8").built_for == ("8.9", "12.0")  # type: ignore[attr-defined]
    for none in ({"compute_capabilities": ""}, {"refit": True}, LATER):
        assert target(**none).built_for == ()  # type: ignore[attr-defined, arg-type]


def test_a_missing_package_is_one_line_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, one_step_student: Path, tmp_path: Path
) -> None:
    real = shelf.absent
    monkeypatch.setattr(
        shelf, "absent", lambda names: [n for n in names if n == "tensorrt_rtx"] or real(names)
    )
    said = attempt(one_step_student, tmp_path / "out", target())
    assert said == "TensorRT needs tensorrt_rtx: pip install 'edgeflash[tensorrt-rtx]'"


def test_asymmetric_int8_is_refused_by_name(one_step: Exported, tmp_path: Path) -> None:
    unet = one_step.bundle.component("unet")
    path = one_step.bundle.folder / unet.files[0].path
    with pytest.raises(EdgeflashError, match=r"does not take DequantizeLinear .*symmetric") as said:
        build(path, unet)
    assert "\n" not in str(said.value)
    model = onnx.load(path)  # with no bias to stumble over first
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.name.endswith("bias_DequantizeLinear"):
            scale = weights(model.graph)[node.input[1]]
            bias = numpy_helper.to_array(weights(model.graph)[node.input[0]])
            wide = bias * numpy_helper.to_array(scale)
            model.graph.initializer.append(numpy_helper.from_array(wide, node.output[0]))
            model.graph.node.remove(node)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EdgeflashError, match=r"QuantizeLinear.*zero.*symmetric int8"):
        build(tmp_path / "m.onnx", unet)
    for each in model.graph.initializer:
        if each.data_type == TensorProto.UINT8:  # which tensorrt would read as int8, and say so
            each.CopyFrom(numpy_helper.from_array(np.zeros(each.dims, np.uint8), each.name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EdgeflashError, match=r"UINT8.*symmetric int8"):
        build(tmp_path / "m.onnx", unet)


def build(path: Path, component: Component, *capabilities: str) -> Any:
    plain = Engine(vendor="tensorrt_rtx", rows=(1, 1, 1))
    return engine.build(path, component, plain, capabilities or ("8.9",))


def test_what_the_vendor_says_is_one_line(guided: Exported) -> None:
    encoder = guided.bundle.component("text_encoder")
    path = guided.bundle.folder / encoder.files[0].path
    with pytest.raises(EdgeflashError, match=r"text_encoder: .* builds no engine: .*SM75"):
        build(path, encoder, "7.5")
    renamed = encoder.inputs[0].model_copy(update={"name": "ids"})
    with pytest.raises(EdgeflashError, match=r"no tensor ids int64 \(has: input_ids int64"):
        build(path, encoder.model_copy(update={"inputs": (renamed,)}))


def test_the_doctor_tells_the_same(no_gpu: Cuda) -> None:
    assert inspect._asked("tensorrt_rtx") == f"nothing: {NO_GPU} (cudaErrorNoDevice)"
    no_gpu.devices = 1
    assert inspect._asked("tensorrt_rtx").startswith("Imaginary 9, compute capability 8.9, CUDA")
    no_gpu.driver = 12020
    assert "the CUDA driver takes CUDA 12.2" in inspect._asked("tensorrt_rtx")
    assert "'cuda-python<13'" in inspect._asked("tensorrt_rtx")
