"""One plan of quantization for all targets: its levels, its names, what targets make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import QUIET, Exported
from onnx import TensorProto
from small_onnx import network

from edgeflash import shelf
from edgeflash.arguments import read_options
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student
from edgeflash.export.plan import FILE, Operator, Plan, Quantizing, layer_of, read_plan
from edgeflash.roles import Target
from edgeflash.student import Student

ALL = frozenset(("int8", "int8-dynamic", "int4-weights"))
UNET = (
    Operator("node_conv2d", "conv_in", "conv", ALL),
    Operator("node_conv2d_1", "mid_block.resnets.0.conv1", "conv", ALL),
    Operator("node_linear_1", "mid_block.attn1.to_q", "linear", ALL),
    Operator("node_MatMul_9", "mid_block.attn1", "attention", frozenset(("int8",))),
    Operator("node_MatMul_11", "mid_block.attn1", "attention", frozenset(("int8",))),
    Operator("node_conv2d_2", "", "conv", ALL),
)


def quantizing(**options: Any) -> Quantizing:
    target = shelf.make(Target, "onnx", {"precision": "int8"} | options)
    assert isinstance(target, Quantizing)
    return target


def words(away: tuple[str, ...] = (), **options: Any) -> list[str]:
    """In the order of UNET."""
    return list(quantizing(**options).decided("unet", UNET, away).values())


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    names = {"unet/*": "int4-weights", "unet/up_blocks.0.resnets.1.conv1": "none"}
    whole = Plan.model_validate({"default": "int8", "kinds": {"attention": "int8"}, "names": names})
    for plan in (Plan(), whole):
        (tmp_path / "p.toml").write_text(plan.toml())
        again = read_plan(tmp_path / "p.toml")
        assert again == plan and again.toml() == plan.toml()
    with pytest.raises(ValueError, match="frozen"):
        whole.default = "none"  # type: ignore[misc]


def test_the_most_specific_level_wins() -> None:
    assert words() == ["int8", "int8", "int8", "none", "none", "int8"]
    assert words(attention=True) == ["int8"] * 6
    everything: dict[str, Any] = {"default": "int8-dynamic", "kinds": {"conv": "none"}}
    assert words(plan=everything) == ["none", "none", "int8-dynamic", "none", "none", "none"]
    everything["names"] = {"unet/mid*": "int4-weights", "unet/mid_block.resnets.*": "int8"}
    assert words(plan=everything)[:3] == ["none", "int8", "int4-weights"]
    everything["names"] |= {"unet/mid_block.resnets.0.conv1": "int8-dynamic", "node_conv2d": "int8"}
    assert words(plan=everything)[:3] == ["int8", "int8-dynamic", "int4-weights"]
    assert words(plan=everything, keep=["unet/mid_block.res*"])[:2] == ["int8", "none"]
    assert words(plan={"kinds": {"attention": "int8"}})[3:5] == ["int8", "int8"]


def test_what_is_left_alone_unasked_yields_to_names_alone() -> None:
    away = ("node_conv2d",)
    assert words(away)[0] == words(away, plan={"kinds": {"conv": "int8"}})[0] == "none"
    assert words(away, plan={"names": {"unet/conv_in": "int8"}})[0] == "int8"
    assert words(away, precision="int4-weights")[0] == "int4-weights", "no activation is rounded"


def test_operators_of_a_layer_share_its_fate_and_keep_to_what_they_can() -> None:
    alike = {"plan": {"names": {"unet/mid_block.attn1": "int8"}}}
    assert words(**alike)[3:5] == ["int8", "int8"]
    assert words(**alike, keep=["node_MatMul_11"])[3:5] == ["none", "none"]
    assert words(plan={"names": {"unet/*": "int4-weights"}})[2:5] == [
        "int4-weights",
        "none",
        "none",
    ]


def test_components_take_part_when_they_are_named() -> None:
    def precisions(**options: Any) -> list[str]:
        made = quantizing(**options)
        return [made.precision_of(name) for name in ("text_encoder", "unet", "vae_decoder")]

    assert precisions() == ["fp16", "int8", "int8"]
    assert precisions(precision="int4-weights") == ["int4-weights", "int4-weights", "fp16"]
    assert precisions(quantized=["unet"], rest="fp32") == ["fp32", "int8", "fp32"]
    named = {"names": {"text_encoder/*": "int4-weights", "vae_decoder/*": "none"}}
    assert precisions(plan=named) == ["int4-weights", "int8", "int8"]
    assert precisions(plan=named | {"default": "none"}) == ["int4-weights", "fp16", "fp16"]
    mixed = quantizing(plan={"names": {"unet/mid_block.*": "int4-weights"}})
    assert mixed.precision_of("unet") == "int4-weights" and mixed.calibrates("unet")
    assert not quantizing(precision="int8-dynamic").calibrates("unet")
    assert not quantizing(precision="fp16").calibrates("unet")


def test_layers_are_named_as_diffusers_names_them(guided: Exported) -> None:
    import edgeflash
    from edgeflash.export.onnx_graph import layers, load

    path = guided.bundle.folder / "unet/model.onnx"
    found = layers(load(path))
    assert found["node_conv2d"] == "conv_in" and "mid_block.attentions.0.proj_out" in found.values()
    assert "decoder.conv_in" in layers(load(path.parents[1] / "vae_decoder/model.onnx")).values()
    assert layer_of("network.network.decoder.conv_in") == "decoder.conv_in"
    assert layer_of("network") == layer_of("") == ""
    for told in ("stack_trace", str(Path(edgeflash.__file__).parent)):
        assert told.encode() not in path.read_bytes(), "nothing else of the exporter's remarks"


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("default = 8", "default = 8: must be one of none, int8"),
        ("names = {a = 'int3'}", "names.a = 'int3': must be one of .*; did you mean 'int8'"),
        ("kinds = {con = 'int8'}", r"no key in .* \[kinds\]: 'con' .*did you mean 'conv'"),
        ("defalt = 'int8'", "no key in .*: 'defalt' .*did you mean 'default'"),
        ("default = ", "not TOML"),
    ],
)
def test_a_file_that_is_no_plan_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(EdgeflashError, match=said) as caught:
        quantizing(**read_options([f"plan={path}"]))
    assert f"plan: {path}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EdgeflashError, match=r"^plan: nowhere\.toml: no such file$"):
        quantizing(plan="nowhere.toml")


def test_plans_that_fit_nothing_are_refused() -> None:
    def said(**options: Any) -> str:
        with pytest.raises(EdgeflashError) as caught:
            words(**options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    told = said(plan={"names": {"unet/mid_blok.*": "int8"}})
    assert told.startswith("plan: no operator of unet is called 'unet/mid_blok.*'")
    assert told.endswith("their names are like unet/conv_in, unet/mid_block.resnets.0.conv1")
    assert "called 'unett/conv_in'" in said(plan={"names": {"unett/conv_in": "int8"}})
    assert words(plan={"names": {"vae_decoder/anything": "int8"}})[0] == "int8", "not this one's"
    assert said(keep=["*"]) == "quantized: unet has nothing that int8 applies to"
    assert "'fp8' is not among int8, int8-dynamic, int8-weights, int4-weights" in said(
        plan={"default": "fp8"}
    )
    assert "goes with a precision that" in said(precision="fp16", plan={"default": "int8"})
    assert "; unet/*.attn9.* is of one" in said(plan={"names": {"*.attn9.*": "int8"}})


def test_plans_for_other_components_are_refused_before_the_work() -> None:
    components = ("text_encoder", "unet", "vae_decoder")
    for plan, line in (
        (
            {"names": {"text_encoder_2/*": "int8"}},
            r"plan: 'text_encoder_2/\*': text_encoder_2 is none",
        ),
        ({"default": "none"}, r"quantized: none of .* would be in int8"),
    ):
        with pytest.raises(EdgeflashError, match=line):
            quantizing(plan=plan).check_components(components)
    quantizing(plan={"names": {"vae_encoder/*": "int8"}}).check_components(components)


def test_options_shape_the_components_they_are_about() -> None:
    def shaped(**options: Any) -> list[Any]:
        made = quantizing(**options)
        return [made.shaped_by(name) for name in ("unet", "vae_decoder")]

    for options, moved in (
        ({"keep": ["unet/conv_in"]}, [True, False]),
        ({"keep": ["conv_in"]}, [True, True]),
        ({"quantized": ["unet", "vae_decoder", "text_encoder"]}, [False, False]),
        ({"quantized": ["unet"]}, [False, True]),
        ({"edges": True}, [True, True]),
    ):
        pairs = zip(shaped(), shaped(**options), strict=True)
        assert [before != after for before, after in pairs] == moved, options


# --- what targets make of it ----------------------------------------------------------------------


def lowered(exported: Exported, out: Path, name: str = "unet", **options: Any) -> Any:
    out.mkdir(exist_ok=True)
    path = quantizing(**options).lower(exported.captured[name], out)[0]
    return onnx.load(path).graph


@pytest.mark.usefixtures("replay")
@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-weights", "int4-weights"])
def test_every_word_passes_the_ladder(
    precision: str, one_step_student: Path, tmp_path: Path
) -> None:
    made = quantizing(precision=precision, external_mib=0)
    bundle = export_student(Student.open(one_step_student), made, tmp_path / "out", console=QUIET)
    assert bundle.manifest.parity and all(figure.passed for figure in bundle.manifest.parity)
    db = next(f.value for f in bundle.manifest.parity if (f.rung, f.component) == ("L1", "unet"))
    assert db < 75, "it shows"
    kinds = {node.op_type for node in onnx.load(bundle.folder / "unet/model.onnx").graph.node}
    wanted = {"int8-dynamic": {"ConvInteger", "MatMulInteger"}, "int4-weights": {"MatMulNBits"}}
    wanted["int8-weights"] = {"DequantizeLinear"}
    assert wanted[precision] <= kinds
    assert {path.name for path in (bundle.folder / "unet").iterdir()} == {
        "model.onnx",
        "model.onnx_data",
        "config.json",
    }


def test_a_plan_is_told_and_reads_back_as_the_same_network(
    one_step: Exported, tmp_path: Path
) -> None:
    shipped = read_plan(one_step.bundle.folder / FILE)
    assert shipped.default == "none" and set(shipped.names.values()) == {"int8"}
    assert "unet/down_blocks.0.resnets.0.conv1" in shipped.names
    assert not {"unet/conv_in", "unet/conv_out"} & set(shipped.names), "edges"
    assert {name.partition("/")[0] for name in shipped.names} == {"unet", "vae_decoder"}
    path = one_step.bundle.folder / "unet/model.onnx"
    again = quantizing(plan=str(one_step.bundle.folder / FILE)).lower(
        one_step.captured["unet"], tmp_path
    )
    assert again[0].read_bytes() == path.read_bytes()


def test_one_network_holds_several_words(one_step: Exported, tmp_path: Path) -> None:
    names = {"unet/*.ff.net.*": "int4-weights"}
    graph = lowered(one_step, tmp_path, plan={"names": names})
    kinds = [node.op_type for node in graph.node]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(kinds)
    told = list(read_plan(tmp_path / FILE).names.values())
    assert told.count("int4-weights") == kinds.count("MatMulNBits") > 0
    with pytest.raises(EdgeflashError, match="unet cannot hold both int8 and int8-dynamic"):
        lowered(one_step, tmp_path, plan={"names": names | {"unet/*.to_q": "int8-dynamic"}})


def test_four_bits_are_of_matrix_products_and_the_rest_is_halved(
    guided: Exported, tmp_path: Path
) -> None:
    graph = lowered(guided, tmp_path, precision="int4-weights")
    weights = {weight.name: weight for weight in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            packed = weights[node.input[1]]
            assert packed.data_type == TensorProto.UINT8 and packed.dims[2] * 2 == 32
    halves = {weights[n.input[1]].data_type for n in graph.node if n.op_type in ("Conv", "Gemm")}
    assert halves == {TensorProto.FLOAT16}
    whole = lowered(guided, tmp_path / "b", precision="int4-weights", rest="fp32")
    assert all(weight.data_type != TensorProto.FLOAT16 for weight in whole.initializer)
    with pytest.raises(EdgeflashError, match="vae_decoder has nothing that int4-weights applies"):
        options = {"precision": "int4-weights", "quantized": ["vae_decoder"], "keep": ["*"]}
        lowered(guided, tmp_path, "vae_decoder", **options)


def test_a_plan_of_one_target_is_followed_by_the_others(guided: Exported, tmp_path: Path) -> None:
    names = {"unet/mid_block.resnets.1.conv2": "int8", "unet/*.attn1.to_q": "int8"}
    plan = {"default": "none", "names": names}
    unet = guided.captured["unet"]
    quantizing(plan=plan).lower(unet, tmp_path)
    decided = read_plan(tmp_path / FILE)
    assert len(decided.names) == 5, "one in each of four transformers"
    for name in ("tensorrt", "openvino"):
        if name == "openvino":
            pytest.importorskip("nncf", reason="nncf is not installed")
        later = {"vendor": "tensorrt"} if name == "tensorrt" else {}
        options = {"precision": "int8", "plan": str(tmp_path / FILE)} | later
        shelf.make(Target, name, options).lower(unet, tmp_path / name)
        assert read_plan(tmp_path / name / FILE) == decided


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_ranges_are_of_all_recorded_calls_and_one_is_in_memory(
    ranges: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    from edgeflash.export.capture import Captured, Sample
    from edgeflash.export.quantize import quantize_static

    at_once: list[int] = []
    real = HistogramCollector.collect

    def collect(collector: Any, values: dict[str, Any]) -> Any:
        at_once.extend(map(len, values.values()))
        return real(collector, values)

    monkeypatch.setattr(HistogramCollector, "collect", collect)
    draws = np.random.default_rng(0)
    node = onnx.helper.make_node("Conv", ["sample", "w"], ["y"], name="product")
    weight = draws.standard_normal((8, 4, 3, 3)).astype(np.float32)
    calls = [draws.standard_normal((1, 4, 4, 4)).astype(np.float32) for _ in range(6)]
    calls[4] *= 3
    samples = tuple(Sample({"sample": call}, {}) for call in calls)
    program: Any = None
    captured = Captured("unet", program, (), (), samples)
    path = network(tmp_path / "m.onnx", node, w=weight)
    graph = onnx.load(quantize_static(path, captured, ["product"], ranges)).graph
    scales = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    whole = np.ptp(np.stack(calls))
    assert float(scales["sample_scale"]) * 255 == pytest.approx(
        whole, rel=0.4 if ranges == "entropy" else 1e-3
    )
    assert set(at_once) == (set() if ranges == "minmax" else {1})


def test_weights_above_the_limit_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    import onnx_ir as ir

    from edgeflash.export.onnx_graph import save

    with pytest.raises(EdgeflashError, match=r"external_mib = 1537"):
        quantizing(external_mib=1537)
    big = ir.LazyTensor(
        lambda: ir.tensor(np.zeros((3, 2**18), np.float32)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape((3, 2**18)),
        name="w",
    )
    value = ir.Value(name="w", shape=big.shape, type=ir.TensorType(big.dtype), const_value=big)
    graph = ir.Graph([], [value], nodes=[], initializers=[value], opset_imports={"": 20})
    for limit, names in ((2**20, {"m.onnx", "m.onnx_data"}), (2**22, {"m.onnx"})):
        folder = tmp_path / str(limit)
        found = save(ir.Model(graph, ir_version=10), folder / "m.onnx", limit)
        assert {path.name for path in folder.iterdir()} == {path.name for path in found} == names
