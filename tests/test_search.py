"""The search for a plan: sensitivities of layers, the front of plans, one within a budget."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from exported import QUIET
from onnx import helper
from rich.console import Console
from small_onnx import network

from edgeflash import planning, shelf
from edgeflash.choice import Candidate, Tried
from edgeflash.errors import EdgeflashError
from edgeflash.export import fake
from edgeflash.export.capture import Network, Tape
from edgeflash.export.front import Point, front, spread, within
from edgeflash.export.line import rehearsal
from edgeflash.export.plan import Plan, Quantizing, read_plan
from edgeflash.export.quantize_weights import to_int4, to_int8
from edgeflash.export.sensitivity import Layer, Sensitivity, sensitivity
from edgeflash.export_options import ExportOptions
from edgeflash.planning import Budget, Exported, Wish, best, words_for
from edgeflash.planning_report import plans_table
from edgeflash.report import IMAGE_DB, read_report
from edgeflash.roles import Target
from edgeflash.runtimes.measure import Measured
from edgeflash.schedule import Guidance
from edgeflash.student import Student

LIGHT = ("int8-weights", "int4-weights")


def onnx_target(**options: Any) -> Quantizing:
    target = shelf.make(Target, "onnx", {"precision": "int8"} | options)
    assert isinstance(target, Quantizing)
    return target


# --- what words do to a layer ---------------------------------------------------------------------


def stored(path: Path, *nodes: Any, sample: Any, weight: Any, word: str) -> Any:
    """What ONNX Runtime makes of the sample, the weight of the last node in so many bits."""
    whole, names = network(path / "m.onnx", *nodes, w=weight), [nodes[-1].name]
    made = to_int8(whole, names) if word == "int8-weights" else to_int4(whole, names)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # as `on_onnx.py` has it
    session = ort.InferenceSession(str(made), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"sample": sample})[0]


@pytest.mark.parametrize("word", LIGHT)
def test_matrices_are_rounded_as_the_file_has_them(word: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 64, bias=False)  # 40: the last block is not full
    layer.weight.data[:, 3] *= 9
    sample = torch.randn(1, 4, 4, 4).numpy()
    nodes = (
        helper.make_node("Concat", ["sample"] * 10, ["wide"], axis=-1),
        helper.make_node("MatMul", ["wide", "w"], ["y"], name="product"),
    )
    weight, wide = layer.weight.detach().T.contiguous().numpy(), np.tile(sample, 10)
    found = stored(tmp_path, *nodes, sample=sample, weight=weight, word=word)
    wanted = wide @ fake.weight(layer, word).T.numpy()
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted - wide @ weight).max()


def test_convolutions_are_rounded_as_the_file_has_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 8, 3, bias=False)
    layer.weight.data[2] *= 50  # a scale of its own
    layer.weight.data[5] = 0
    layer.requires_grad_(False)
    sample = torch.randn(1, 4, 4, 4)
    node = helper.make_node("Conv", ["sample", "w"], ["y"], name="product")
    weight = layer.weight.detach().numpy()
    found = stored(tmp_path, node, sample=sample.numpy(), weight=weight, word="int8-weights")
    wanted = torch.nn.functional.conv2d(sample, fake.weight(layer, "int8-weights"))
    assert np.abs(found - wanted.numpy()).max() < 1e-4
    assert float((wanted - layer(sample)).abs().max()) > 1e-2


def test_scales_are_of_output_channels_however_the_weight_lies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 8, bias=False).requires_grad_(False)
    layer.weight.data[2] *= 50
    sample = torch.randn(1, 4, 4, 4)
    wanted = sample.reshape(16, 4) @ fake.weight(layer, "int8-weights").T
    for flipped in (1, 0):
        weight = (layer.weight if flipped else layer.weight.T).contiguous().numpy()
        nodes = (
            helper.make_node("Flatten", ["sample"], ["flat"], axis=3),
            helper.make_node("Gemm", ["flat", "w"], ["y"], name="product", transB=flipped),
        )
        found = stored(tmp_path, *nodes, sample=sample.numpy(), weight=weight, word="int8-weights")
        assert np.abs(found - wanted.numpy()).max() < 1e-4


def test_int8_rounds_what_goes_in_and_comes_out_too() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    taken, made = fake.Range(), fake.Range()
    taken.see(torch.tensor([0.0, 2.55]))
    made.see(torch.tensor([-1.0, 4.1]))
    given = torch.tensor([[0.016], [9.0]])
    layer.requires_grad_(False)
    found = given + fake.change(layer, "int8", given, taken, made)
    assert found.flatten().tolist() == pytest.approx([0.02, 2.56], abs=1e-5)
    assert float(fake.change(layer, "int8-weights", given, taken, made).abs().max()) < 1e-6


# --- sensitivities --------------------------------------------------------------------------------


def pictures(tape: Tape, layer: Layer, word: str, amount: float) -> list[Any]:
    """Drawn for real, with the weight of one layer so much of the way to where a word brings it."""
    component, _, path = layer.name.partition("/")

    def see(seen: Network) -> None:
        if seen.component == component:
            for name, module in seen.module.named_modules():
                if name.endswith(f"network.{path}"):
                    module.weight.data.lerp_(fake.weight(module, word), amount)

    for name in tape.student.family.components():
        tape.record(name, see)
    return [golden["image"] for golden in tape.goldens]


def test_one_way_back_tells_what_each_layer_does_to_the_picture(one_step_student: Path) -> None:
    student, target = Student.open(one_step_student), onnx_target()

    def tape() -> Tape:
        guidance = Guidance(kind="cfg", scale=2.0)
        prompts = ("a red star", "blue ring")
        return rehearsal(
            student, target, ExportOptions(prompts=prompts, steps=(2,), guidance=guidance)
        )

    whole, words, amount = tape(), ("int8-weights", "int8", "int4-weights"), 0.1
    found = sensitivity(whole, target, student.family.components(), words, rounds=1)
    layers = {layer.name: layer for layer in found.layers}
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn((1, 3, 16, 16), generator=generator).numpy() for _ in whole.goldens]
    assert found.pixels == 3 * 16 * 16 and len(draws) == 2
    for name, word in (
        ("vae_decoder/decoder.layers.2.conv.0", "int8-weights"),
        ("unet/conv_out", "int8-weights"),
        ("unet/time_embedding.linear_1", "int8-weights"),
        ("unet/up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "int4-weights"),
        ("text_encoder/encoder.layers.0.mlp.fc1", "int8-weights"),
    ):
        drawn = pictures(tape(), layers[name], word, amount)
        pairs = zip(draws, drawn, whole.goldens, strict=True)
        real = [float((v * (image - told["image"])).sum()) / amount for v, image, told in pairs]
        most = max(map(abs, real))
        assert layers[name].draws[word] == pytest.approx(real, abs=0.2 * most) and most, name
    embedding = layers["unet/time_embedding.linear_1"]
    assert embedding.words == ("int8-weights", "int8"), "a Gemm, which takes no 4 bits"
    assert layers["unet/conv_in"].products == 2 * 2 * 2 * 64 * (4 * 8 * 9), "prompt, step, guidance"


# --- the front ------------------------------------------------------------------------------------


def known(name: str, weights: int, products: int = 1, **errors: float) -> Layer:
    words = tuple(errors)
    layer = Layer(name, "linear", weights, 1, tuple(w.replace("_", "-") for w in words))
    layer.products = products
    layer.draws = {w.replace("_", "-"): [error**0.5] for w, error in errors.items()}
    return layer


def searched(*layers: Layer, **numbers: int) -> Sensitivity:
    return Sensitivity(layers, numbers, pixels=1)


def test_a_front_takes_what_costs_least_for_its_bytes() -> None:
    found = searched(
        known("unet/a", 3200, int8_weights=1.0, int4_weights=5.0),
        known("unet/b", 3200, int8_weights=0.5, int4_weights=400.0),
        known("unet/c", 320, int8_weights=9.0),
        unet=7000,
    )
    points = front(found, onnx_target(rest="fp32"), LIGHT)
    words = [point.words for point in points]
    assert words[0] == {} and points[0].bytes == 28000 and points[0].psnr_db == 200
    assert words[1] == {"unet/b": "int8-weights"}
    assert words[2] == {"unet/a": "int8-weights", "unet/b": "int8-weights"}
    assert words[3] == words[2] | {"unet/a": "int4-weights"}
    assert words[4] == words[3] | {"unet/c": "int8-weights"}
    assert words[5] == words[4] | {"unet/b": "int4-weights"}
    assert points[2].bytes == 28000 - 2 * (3 * 3200 - 4 - 400) and points[2].error == 1.5
    assert points[3].error == pytest.approx(5.5)
    assert within(points, points[2].bytes) is points[2]
    with pytest.raises(EdgeflashError, match=r"^--budget-mib: weights of 0\.00 MiB.* allow more"):
        within(points, 100)
    assert points[2].plan() == Plan(default="none", names=words[2])
    for options, held, floats in (
        ({}, LIGHT, 2),
        ({}, ("int8",), 4),
        ({}, ("int8-weights", "int8"), 4),
        ({"vendor": "tensorrt"}, ("int8",), 2),
    ):
        to = "tensorrt" if options else "onnx"
        target = planning.quantizing(to, {"precision": held[0], **options})
        assert front(found, target, held)[0].bytes == 7000 * floats, "beside these words"


def test_words_off_the_hull_are_passed_over() -> None:
    layer = known("unet/a", 3200, int8_weights=10.0, int4_weights=11.0)
    points = front(searched(layer, unet=3200), onnx_target(rest="fp32"), LIGHT)
    assert [point.words for point in points] == [{}, {"unet/a": "int4-weights"}]


def test_a_front_of_time_counts_multiplications() -> None:
    small = known("unet/small", 32, products=900, int8=1.0)
    large = known("unet/large", 32000, products=100, int8=1.0)
    points = front(searched(small, large, unet=32032), onnx_target(), ("int8",))
    assert list(points[1].words) == ["unet/small"] and points[1].products == 0.9
    assert [point.products for point in spread(points, 4)] == [0.9, 1.0]


# --- the command ----------------------------------------------------------------------------------


def exported(name: str, plan: Point | None, why: str = "", **found: float) -> Exported:
    class Known(Tried):
        def candidate(self) -> Candidate:
            return Candidate(name=name, why=why, **found)

    return Exported(Known(name, None), plan)


def test_the_best_picture_within_the_budget_is_kept() -> None:
    point = Point({}, 1.0, 1.0, 0.0)
    done = [
        exported("fp32", None, mib=9.0, latency_ms=9.0, image_db=99.0),
        exported("big", point, mib=8.0, latency_ms=5.0, image_db=50.0),
        exported("good", point, mib=6.0, latency_ms=6.0, image_db=40.0),
        exported("poor", point, mib=5.0, latency_ms=5.0, image_db=30.0),
        exported("refused", point, why="L4 misses its floor"),
    ]

    def kept(**budget: float) -> str:
        return best(done, Budget(**budget)).tried.name

    assert kept(mib=7) == "good" and kept(mib=8) == "big"
    assert kept(ms=5) == "big" and kept(ms=5, mib=7) == "poor" and kept(ms=9, mib=8) == "big"
    for budget in ({"mib": 9}, {"ms": 9}, {"mib": 9, "ms": 9}):
        with pytest.raises(EdgeflashError, match=r"^fp32: 9\.00 MiB, .* nothing to quantize$"):
            kept(**budget)
    with pytest.raises(EdgeflashError, match=r"big: 8\.00 MiB, 5\.00 ms.*; .*refused: L4 misses"):
        kept(mib=4)
    with pytest.raises(EdgeflashError, match="say a budget"):
        Budget()


def test_words_follow_the_budget() -> None:
    def words(*asked: str, to: str = "onnx", **budget: float) -> Sequence[str]:
        target = planning.quantizing(to, {"precision": "int8"})
        return words_for(target, Wish(to, {}, Budget(**budget), asked))

    assert words(mib=6) == LIGHT and words(ms=6) == ("int8",)
    assert words(mib=6, ms=6) == ("int8",)
    assert words("int4-weights", "int8", mib=6) == ("int8", "int4-weights")
    with pytest.raises(EdgeflashError, match="int4-weights: makes no picture faster"):
        words("int4-weights", "int8", ms=6)
    with pytest.raises(EdgeflashError, match=r"^--words fp8: .* among int8-weights, int8, int4-w"):
        words("fp8", mib=6)
    with pytest.raises(EdgeflashError, match="--to torch: takes no plan; choose onnx"):
        planning.quantizing("torch", {})


def measured(tried: Sequence[Tried], console: Any) -> None:
    """In the place of processes that draw."""
    told: dict[str, Any] = {"device": "cpu", "options": {}, "steps": 1, "guidance_scale": 1.0}
    told |= {"height": 16, "width": 16, "cold_load_ms": 9.0, "warm_load_ms": 5.0}
    told |= {"first_image_ms": 4.0, "runs_ms": (3.0, 2.0, 4.0), "stages_ms": {"unet": (2.0,)}}
    for each in tried:
        each.measured.append(Measured(**told, peak_rss_mib=None, images=()))


@pytest.fixture
def known_plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Exports that take no time: of 5 MiB in floats, of 4 by a plan. Their names."""
    names: list[str] = []

    def export(search: Any, name: str, point: Point | None, precision: str) -> Exported:
        names.append(name)
        size_mib = 4 if point else 5
        bundle: Any = SimpleNamespace(
            bytes=size_mib * planning.MIB, manifest=SimpleNamespace(parity=())
        )
        return Exported(Tried(name, bundle), point)

    def sensitive(search: Any) -> Sensitivity:
        names.append("sensitivity")
        return searched(known("unet/a", planning.MIB, int8=1.0), unet=planning.MIB)

    monkeypatch.setattr(planning._Search, "export", export)
    monkeypatch.setattr(planning, "_sensitivity", sensitive)
    return names


def test_a_student_within_the_budget_needs_no_plan(
    one_step_student: Path, tmp_path: Path, known_plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure_in_turn", measured)
    student, out = Student.open(one_step_student), tmp_path / "plan.toml"
    for budget, name in ((Budget(ms=4), "fp32"), (Budget(mib=5), "fp16")):
        with pytest.raises(EdgeflashError, match=f"^{name}: 5.* within the budget; nothing to"):
            planning.search(student, Wish("onnx", {}, budget), out, tmp_path, QUIET)
        assert known_plans == [name], "said before the work"
        known_plans.clear()
    with pytest.raises(
        EdgeflashError, match=r"^no plan is within the budget \(fp32: 5.*, 3\.00 ms"
    ):
        planning.search(student, Wish("onnx", {}, Budget(ms=2)), out, tmp_path, QUIET)


def test_where_nothing_runs_plans_are_judged_by_their_size(
    one_step_student: Path, tmp_path: Path, known_plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> None:
        raise EdgeflashError("no GPU here")

    monkeypatch.setattr("edgeflash.export.to_tensorrt.find_gpu", no_gpu)
    student, out = Student.open(one_step_student), tmp_path / "plan.toml"
    options = {"vendor": "tensorrt"}
    with pytest.raises(EdgeflashError, match=r"^--budget-ms: no time is measured here.*: no GPU"):
        planning.search(student, Wish("tensorrt", options, Budget(ms=9)), out, tmp_path, QUIET)
    assert not known_plans, "said before the work"
    wish = Wish("tensorrt", options, Budget(mib=4.2))
    made = planning.search(student, wish, out, tmp_path, QUIET)
    assert (
        read_plan(out).names == {"unet/a": "int8"}
        and "# on tensorrt: 4.00 MiB, wh" in out.read_text()
    )
    assert not read_report(tmp_path).systems and "fp16: 5.00 MiB" in made.notes
    assert "engines were not run: no GPU here" in made.notes[-1]
    console = Console(file=io.StringIO(), width=200)
    console.print(plans_table(made))
    assert isinstance(console.file, io.StringIO) and "fp16: 5.00" in console.file.getvalue()


def test_pages_name_the_targets_that_take_plans() -> None:
    takes = [
        n for n in shelf.names(Target) if issubclass(shelf.find(Target, n, check=False), Quantizing)
    ]
    told = (Path(__file__).parents[1] / "export/README.md").read_text().replace("\n", " ")
    one, two, three = takes
    assert f"is one plan for `{one}`, `{two}` and `{three}`: by default" in told
    others = [name for name in shelf.names(Target) if name not in takes]
    assert others == ["coreml", "executorch", "torch"]
    assert (
        "`coreml` and `executorch` take no plan: " in told and "`torch` quantizes nothing" in told
    )
    with pytest.raises(EdgeflashError, match=f"takes no plan; choose {one}, {two} or {three}$"):
        planning.quantizing("torch", {})


@pytest.mark.usefixtures("replay")
def test_a_plan_within_its_budget_is_searched_exported_and_told(
    one_step_student: Path, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure_in_turn", measured)
    wish = Wish("onnx", {}, Budget(mib=0.325))
    student, out = Student.open(one_step_student), tmp_path / "deep/plan.toml"
    made = planning.search(student, wish, out, tmp_path / "report", QUIET)
    records = [name for name in begun if name.startswith("record")]
    assert len(records) == 3 and begun.count("lower-unet") > 1, "all go on from one loop"
    plan = read_plan(out)
    assert plan.default == "none" and set(plan.names.values()) <= {*LIGHT}
    assert read_report(tmp_path / "report") == made
    sizes = [point.size_mib for point in made.front]
    assert sizes == sorted(sizes, reverse=True)
    assert re.match(r"kept: plan \d, 0\.3", str(made.notes[0]))
    assert out.read_text().startswith("# on onnx: 0.3")
    assert "each quantized alone: " in made.notes[1]
    whole, *plans = made.systems
    assert plans[-1].size_mib <= 0.325 < whole.size_mib, "the float one, then until it fits"
    assert plans[-1].latency_ms_p50 == 3 and IMAGE_DB in plans[-1].extra
    assert "Quality against size" in (tmp_path / "report/report.html").read_text()
