"""What a student will cost: the work is counted right, and every way is really run."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from exported import QUIET
from tiny_bundle import tiny
from typer.testing import CliRunner

from edgeflash.arguments import read_options
from edgeflash.blueprints import DECODERS, SD15, UNETS, Blueprint
from edgeflash.bundle import Bundle
from edgeflash.cli import app
from edgeflash.devices import DEVICES, Device
from edgeflash.distill.by_decoder import Decoder
from edgeflash.errors import EdgeflashError
from edgeflash.export.stand_in import StandIn
from edgeflash.peaks import peaks, sums_of
from edgeflash.price import (
    Way,
    _bench,
    _with_work,
    asked_for,
    check_ways,
    estimates_table,
    price,
    price_table,
    price_tables,
)
from edgeflash.recipe import changed, find_recipe, read_recipe
from edgeflash.report import System, read_report
from edgeflash.roles import Target
from edgeflash.runtimes import bench
from edgeflash.runtimes.graph import Graph, Operator, Tensor
from edgeflash.runtimes.measure import Job, measure
from edgeflash.runtimes.moved import moved_mib, results_bytes
from edgeflash.search_times import MeasuredTimes
from edgeflash.student import Student
from edgeflash.work import gflops

SYSTEM = {
    "name": "tiny",
    "steps": 3,
    "latency_ms_p50": 1000,
    "latency_ms_p90": 1000,
    "size_mib": 1,
    "conditions": {"runtime": "onnx", "height": 8, "width": 8},
}
STAGES = ("text_encoder", "unet", "vae_decoder")
PARAMETERS = {  # arXiv 2305.15798, tab. 1, and 2403.16627, to the last one
    "sd15": 859_520_964,
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "sdxs-512": 318_695_364,
    "sdxl": 2_567_463_684,  # published in billions: 2.57, 1.3 and 0.78
    "ssd-1b": 1_331_334_404,
    "koala-700m": 782_822_724,
}

SD21 = SD15 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


@pytest.mark.parametrize("name", UNETS)
def test_blueprints_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        assert UNet2DConditionModel(**UNETS[name]).num_parameters() == PARAMETERS[name]


def skeleton(blueprint: Blueprint, folder: Path) -> Student:
    """The folder without its weights."""
    blueprint.write_configs(folder)
    return Student.unfinished(folder)


@pytest.mark.parametrize(("decoder", "wanted"), [("kl", 2514), ("tiny", 141.35), ("lite", 14.96)])
def test_the_work_of_full_size_networks_is_counted_without_weights(
    tmp_path: Path, decoder: str, wanted: float
) -> None:
    student = skeleton(Blueprint.of("sdxs-512", decoder), tmp_path)
    found, quarter = gflops(student, (512, 512)), gflops(student, (256, 256))
    assert found["vae_decoder"] == pytest.approx(wanted, rel=0.01)
    attention = 4 * sum(n * (n + 77) * width * 3 for n, width in ((1024, 640), (256, 1280))) / 1e9
    assert found["unet"] - attention == pytest.approx(360, rel=0.001)
    if decoder != "kl":  # its attention grows with the square
        assert quarter["vae_decoder"] == pytest.approx(wanted / 4, rel=0.01)


def test_the_work_of_sdxl_is_the_published_one(tmp_path: Path) -> None:
    """149.4 T multiply-adds in 25 steps of two calls, T-GATE's authors say: all but attention's."""
    found = gflops(skeleton(Blueprint.of("sdxl", "tiny"), tmp_path))
    layers = ((10, 4096, 640), (60, 1024, 1280))
    attention = 4 * sum(count * n * (n + 77) * width for count, n, width in layers) / 1e9
    assert (found["unet"] - attention) / 2 * 50 / 1000 == pytest.approx(149.4, rel=0.001)
    assert list(found) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]


def test_devices_name_the_work_as_it_is_counted(tmp_path: Path) -> None:
    work = {"sd15": gflops(skeleton(Blueprint.of("sd15"), tmp_path / "sd15"), (512, 512))}
    work["sd21"] = gflops(skeleton(Blueprint("sd21", SD21, "kl"), tmp_path / "sd21"), (512, 512))
    for name in tomllib.loads(DEVICES.read_text())["device"]:
        for entry in Device.of(name).published:
            counted = work["sd21" if "2.1" in entry.network else "sd15"]
            assert entry.gflop == pytest.approx(counted[entry.component], abs=0.06), (name, entry)


def test_estimates_scale_published_figures_and_tell_how_far_they_are_off() -> None:
    device = Device.of("galaxy-s24")
    assert device.estimate_ms("unet", 803.3 / 2) == pytest.approx(79.1 / 2)
    assert device.estimate_ms("vae_decoder", 2514.5) == pytest.approx(203.2)
    assert device.estimate_ms("controlnet", 803.3) == pytest.approx(79.1)
    work = {"text_encoder": 13.3, "unet": 803.3, "vae_decoder": 2514.5}
    assert device.image_ms(work, 4) == pytest.approx(2.28 + 4 * 79.1 + 203.2)
    errors = device.errors()
    assert errors["SD 2.1 UNet"] == pytest.approx(79.1 / 69.7 * 804.3 / 803.3 - 1)
    assert errors["SD 1.5 decoder by the UNet's rate"] == pytest.approx(247.6 / 203.2 - 1, abs=1e-3)
    assert "SD 2.1 UNet +14%" in device.told()
    with pytest.raises(EdgeflashError, match="did you mean 'galaxy-s25'"):
        Device.of("galaxy-s26")
    with pytest.raises(EdgeflashError, match="device web: no times of it are known"):
        Device.timed("web")


def test_every_way_is_run_and_priced(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in this process: that it is a fresh one is `bench`'s, and tested there."""
    monkeypatch.setattr(bench, "run_apart", measure)
    monkeypatch.setattr("edgeflash.peaks.SIDE", 256)
    monkeypatch.setattr("edgeflash.peaks.BLOCK", 2**20)
    ways = [Way("onnx", "fp32"), Way("onnx", "int8")]
    opened = Student.open(one_step_student)
    device = Device.of("iphone-14")
    made = price(opened, ways, tmp_path / "out", steps=(1, 4), runs=1, devices=[device])
    assert read_report(tmp_path / "out") == made and device.told() in made.notes
    found = [(system.extra["precision"], system.steps) for system in made.systems]
    assert found == [("fp32", 1), ("fp32", 4), ("int8", 1), ("int8", 4)]
    assert made.systems[2].size_mib < made.systems[0].size_mib
    one, four = (system.extra for system in made.systems[:2])
    work = {key: float(value) for key, value in one.items() if key != "precision"}
    assert float(four["iphone-14, estimated ms"]) == pytest.approx(
        device.image_ms({name: work[f"GFLOP of {name}"] for name in STAGES}, 4), abs=0.06
    )
    assert work["GFLOP"] == pytest.approx(
        sum(work[f"GFLOP of {name}"] for name in STAGES), abs=2e-3
    )
    more = float(four["GFLOP"]) - work["GFLOP"]
    assert more == pytest.approx(3 * work["GFLOP of unet"], abs=5e-3)
    assert 0 < work["share of roof"] < 1
    assert 0 < work["MiB moved"] < float(four["MiB moved"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
    ]
    assert price_table(made).row_count == 4
    assert estimates_table(made, [device]).row_count == 1
    assert len(price_tables(made, [device]).renderables) == 3


def test_a_way_that_fails_leaves_the_others(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, ways = Student.open(one_step_student), [Way("onnx", "fp32"), Way("onnx", "int8")]
    made = System.model_validate(SYSTEM)

    def bench(bundle: Any, way: Way, *_: Any) -> System:
        if way.precision in refused:
            raise EdgeflashError("no memory left")
        return made

    monkeypatch.setattr("edgeflash.price._export", lambda *_: None)
    monkeypatch.setattr("edgeflash.price._bench", bench)
    monkeypatch.setattr("edgeflash.price._with_work", lambda system, *_: system)
    monkeypatch.setattr("edgeflash.price.peaks", lambda _: {})
    refused = {"int8", "fp32"}
    with pytest.raises(EdgeflashError, match=r"^onnx fp32: no memory left; onnx int8: no memory"):
        price(opened, ways, tmp_path / "out", steps=(1,), console=QUIET)
    assert not (tmp_path / "out").exists()
    refused = {"fp32"}
    with pytest.raises(EdgeflashError, match=r"out has the others: onnx fp32: no memory left$"):
        price(opened, ways, tmp_path / "out", steps=(1,), console=QUIET)
    assert read_report(tmp_path / "out").systems == (made,)


@pytest.mark.slow
def test_guided_students_cost_two_calls_a_step(guided_student: Path, tmp_path: Path) -> None:
    opened = Student.open(guided_student)
    made = price(opened, [Way("onnx", "fp32")], tmp_path / "out", steps=(2,), runs=1)
    (extra,) = (system.extra for system in made.systems)
    assert extra["GFLOP of unet"] == pytest.approx(2 * gflops(opened)["unet"], abs=1e-3)


def test_options_of_a_runtime_are_priced_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Job] = []

    def run(job: Job, tell: Any) -> Any:
        seen.append(job)
        raise EdgeflashError("enough")

    monkeypatch.setattr(bench, "run_apart", run)
    asked = SimpleNamespace(call=None)
    monkeypatch.setattr("edgeflash.price.price", lambda *args, **_: setattr(asked, "call", args))
    monkeypatch.setattr("edgeflash.price.price_tables", lambda *_: "")
    words = "price --student sdxs-512 --on openvino --precision fp32,int8"
    told = ["--set", "inference_precision=bf16", "--set", "threads=1"]
    assert CliRunner().invoke(app, [*words.split(), *told]).exit_code == 0
    _, ways, _ = asked.call
    assert [way.precision for way in ways] == ["fp32", "int8"]
    check_ways(ways)
    with pytest.raises(EdgeflashError, match="enough"):
        _bench(Bundle.open(tiny(tmp_path / "b")), ways[0], "it", 1, 1, QUIET)
    assert seen[0].options == {"inference_precision": "bf16", "threads": 1}
    assert ways[0].told == "inference_precision=bf16, threads=1"
    with pytest.raises(EdgeflashError, match="did you mean 'inference_precision'"):
        check_ways([Way("openvino", "fp32", {"inference_precisio": "bf16"})])
    monkeypatch.setattr(Target, "prover", lambda _: StandIn(reason="no GPU here"))
    with pytest.raises(EdgeflashError, match=r"^--on onnx: is not timed here, .*: no GPU here"):
        check_ways([Way("onnx", "fp32", {})])


def test_an_evaluator_is_neither_priced_nor_searched_on(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    way, opened = Way("coreml", "fp16"), Student.open(one_step_student)
    with pytest.raises(EdgeflashError, match=r"--on coreml: .*evaluator in numpy.* on a Mac"):
        price(opened, [Way("onnx", "fp32"), way], tmp_path / "out", steps=(1,), runs=1)
    with pytest.raises(EdgeflashError, match=r"--on coreml: .*evaluator in numpy"):
        MeasuredTimes(way, QUIET)
    monkeypatch.setattr(sys, "platform", "darwin")
    check_ways([way])


def test_the_roof_is_the_lower_one_of_sums_and_memory(tmp_path: Path) -> None:
    """Closed form, of a decoder that the memory limits and a UNet that its int8 sums do."""
    bundle = Bundle.open(tiny(tmp_path / "b"))
    parts = tuple(
        c.model_copy(update={"precision": "int8" if c.name == "unet" else "fp16"})
        for c in bundle.manifest.components
    )
    bundle = Bundle(bundle.folder, bundle.manifest.model_copy(update={"components": parts}))
    # Three indices and four factors, and what Slice and Resize make: written once, read once.
    decoder_mib = (3 * 8 + 4 * 4 + 2 * 4 * (3 * 4 * 4 + 3 * 8 * 8)) / 2**20
    assert moved_mib(bundle)["vae_decoder"] == pytest.approx(decoder_mib)
    more_mib = 2 * 4 * (3 * 4 * 4 + 3 * 8 * 8) / 2**20
    assert moved_mib(bundle, 2)["vae_decoder"] == pytest.approx(decoder_mib + more_mib)
    system = System.model_validate(SYSTEM)
    work = {"text_encoder": 0.0, "unet": 4.0, "vae_decoder": 2.0}
    slow = decoder_mib * 2**20 / 1e9 / 0.5  # GB/s for which it takes half a second
    top = {"fp32": 10.0, "int8": 80.0, "GB/s": slow}
    extra = _with_work(system, bundle, Way("onnx", "int8"), work, top, ()).extra
    text_s, unet_s = (moved_mib(bundle)[n] * 2**20 / 1e9 / slow for n in ("text_encoder", "unet"))
    assert extra["GFLOP"] == 14
    assert extra["share of roof"] == pytest.approx(text_s + 3 * max(unet_s, 4 / 80) + 0.5, abs=1e-4)
    fast = top | {"GB/s": 1e9}
    extra = _with_work(system, bundle, Way("onnx", "int8"), work, fast, ()).extra
    assert extra["share of roof"] == pytest.approx(3 * 4 / 80 + 2 / 10)
    in_bf16 = Way("openvino", "fp16", {"inference_precision": "bf16"})
    extra = _with_work(system, bundle, in_bf16, work, fast | {"bf16": 40.0}, ()).extra
    assert extra["share of roof"] == pytest.approx(3 * 4 / 80 + 2 / 40)


def test_quantization_moves_no_bytes_of_its_own() -> None:
    """Conv -> QuantizeLinear -> DequantizeLinear -> Conv: a byte a number between, four after."""
    wide = {name: Tensor(name, (100,), "float32", 32) for name in ("x", "a", "c", "y")}
    narrow = {"b": Tensor("b", (100,), "uint8", 8)}
    chain = (
        Operator("Conv", "", ("x",), ("a",)),
        Operator("QuantizeLinear", "", ("a", "scale"), ("b",)),
        Operator("DequantizeLinear", "", ("b", "scale"), ("c",)),
        Operator("Conv", "", ("c",), ("y",)),
    )
    weights = {"scale": Tensor("scale", (), "float32", 32)}
    graph = Graph(chain, weights, wide | narrow, ("x",), ("y",))
    assert results_bytes(graph) == 100 + 400
    skip = Operator("Add", "", ("a", "c"), ("d",))  # which wants the wide one too
    assert results_bytes(replace(graph, operators=(*chain, skip))) == 400 + 100 + 400


def test_peaks_are_told_of_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeflash.peaks.SIDE", 64)
    monkeypatch.setattr("edgeflash.peaks.BLOCK", 2**16)
    monkeypatch.setattr("edgeflash.peaks.TRIES", 1)
    assert all(peaks().values()) and list(peaks()) == ["fp32", "bf16", "int8", "GB/s"]
    assert list(peaks({"int8"})) == ["int8", "GB/s"]
    assert [sums_of(p) for p in ("fp16", "int8", "int8-weights")] == ["fp32", "int8", "fp32"]
    assert sums_of("fp32", "bf16") == "bf16" and sums_of("int8", "bf16") == "int8"


def test_a_unet_of_ones_own_is_priced_from_its_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel"} | UNETS["sdxs-512"]))
    mine = Blueprint.of(str(path), "lite")
    assert (mine.name, mine.decoder) == ("mine", "lite") and "_class_name" not in mine.unet
    path.write_text(json.dumps(UNETS["sdxs-512"] | {"cross_attention_dim": 2048}))
    with pytest.raises(EdgeflashError, match=r"mine\.json: cross_attention_dim is 2048"):
        Blueprint.of(str(path))
    path.write_text(json.dumps(UNETS["sdxs-512"] | {"cross_attention_dim": [768, 768, 1024]}))
    with pytest.raises(EdgeflashError, match=r"cross_attention_dim is \[768, 768, 1024\]"):
        Blueprint.of(str(path))
    for wrong in ({"block_out_channels": [320, 640]}, {"colour": "red"}, {"in_channels": "four"}):
        path.write_text(json.dumps(UNETS["sdxs-512"] | wrong))
        with pytest.raises(
            EdgeflashError, match=r"mine\.json: diffusers makes no UNet of it: [^\n]+$"
        ):
            Blueprint.of(str(path))


def test_a_folder_has_its_decoder(one_step_student: Path) -> None:
    assert isinstance(asked_for(str(one_step_student), None), Student)
    assert isinstance(asked_for("shapes-student", None), Student)
    assert isinstance(asked_for("sdxs-512", None), Blueprint)
    with pytest.raises(EdgeflashError, match="did you mean 'sdxs-512'"):
        asked_for("sdxs-51", None)
    with pytest.raises(EdgeflashError, match="leave --decoder out"):
        asked_for(str(one_step_student), "tiny")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sdxs",), "sdxs-512"),
        (("sdxs-512", "tiney"), "tiny"),
        (("nowhere.json",), r"nowhere\.json"),
    ],
)
def test_what_is_no_blueprint(args: Any, message: str) -> None:
    with pytest.raises(EdgeflashError, match=message):
        Blueprint.of(*args)


def test_what_is_priced_as_lite_is_what_the_page_says_to_train() -> None:
    page = (Path(__file__).parents[1] / "runtimes/README.md").read_text("utf-8")
    (told,) = re.findall(r"`edgeflash distill (tiny-decoder .*) --out student`", page)
    name, *words = shlex.split(told)
    assert words[::2] == ["--set", "--set"]
    recipe = changed(read_recipe(find_recipe(name)), read_options(words[1::2]))
    (method,) = recipe.methods()
    assert isinstance(method, Decoder)
    with torch.device("meta"):
        built, priced = method.build(4), AutoencoderTiny(**DECODERS["lite"])
    shapes, wanted = (
        {name: weight.shape for name, weight in network.state_dict().items()}
        for network in (built, priced)
    )
    assert shapes == wanted and str(built) == str(priced)


def test_the_lite_decoder_is_as_small_as_its_name_says() -> None:
    lite, tiny = (AutoencoderTiny(**DECODERS[name]).decoder for name in ("lite", "tiny"))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (lite, tiny)]
    assert sizes == [279_395, 1_222_531]
