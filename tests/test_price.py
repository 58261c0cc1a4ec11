"""What a student will cost: the work is counted right, and every way is really run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from edgeflash.blueprints import DECODERS, UNETS, Blueprint
from edgeflash.errors import EdgeflashError
from edgeflash.price import Way, gflops, price, price_table
from edgeflash.report import read_report
from edgeflash.student import Student

PARAMETERS = {  # arXiv 2305.15798, tab. 1, and 2403.16627, to the last one
    "sd15": 859_520_964,
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "sdxs-512": 318_695_364,
}


@pytest.mark.parametrize("name", UNETS)
def test_blueprints_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        assert UNet2DConditionModel(**UNETS[name]).num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(("decoder", "wanted"), [("kl", 2514), ("tiny", 141.35), ("lite", 14.96)])
def test_the_work_of_full_size_networks_is_counted_without_weights(
    tmp_path: Path, decoder: str, wanted: float
) -> None:
    blueprint = Blueprint.of("sdxs-512", decoder)
    with torch.device("meta"):
        networks = blueprint.networks()
    networks["text_encoder"].config.save_pretrained(tmp_path / "text_encoder")
    for name in ("unet", "vae"):
        networks[name].save_config(tmp_path / name)
    blueprint.write_rest(tmp_path)
    found = gflops(Student.unfinished(tmp_path), (512, 512))
    assert found["vae_decoder"] == pytest.approx(wanted, rel=0.01)
    attention = 4 * sum(n * (n + 77) * width * 3 for n, width in ((1024, 640), (256, 1280))) / 1e9
    assert found["unet"] - attention == pytest.approx(360, rel=0.001)
    quarter = gflops(Student.unfinished(tmp_path), (256, 256))
    if decoder != "kl":  # its attention grows with the square
        assert quarter["vae_decoder"] == pytest.approx(wanted / 4, rel=0.01)


def test_every_way_is_run_and_priced(one_step_student: Path, tmp_path: Path) -> None:
    ways = [Way("onnx", "fp32"), Way("onnx", "int8")]
    opened = Student.open(one_step_student)
    made = price(opened, ways, tmp_path / "out", steps=(1, 4), runs=1, command="edgeflash price")
    assert read_report(tmp_path / "out") == made and made.command == "edgeflash price"
    found = [(system.extra["precision"], system.steps) for system in made.systems]
    assert found == [("fp32", 1), ("fp32", 4), ("int8", 1), ("int8", 4)]
    assert made.systems[2].size_mib < made.systems[0].size_mib
    one, four = (system.extra for system in made.systems[:2])
    work = {key: float(value) for key, value in one.items() if key != "precision"}
    assert work["GFLOP"] == pytest.approx(
        sum(work[f"GFLOP of {name}"] for name in ("text_encoder", "unet", "vae_decoder")), abs=2e-3
    )
    more = float(four["GFLOP"]) - work["GFLOP"]
    assert more == pytest.approx(3 * work["GFLOP of unet"], abs=5e-3)
    assert 0 < work["share of fp32 peak"] < 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
    ]
    assert price_table(made).row_count == 4


def test_guided_students_cost_two_calls_a_step(guided_student: Path, tmp_path: Path) -> None:
    opened = Student.open(guided_student)
    made = price(opened, [Way("onnx", "fp32")], tmp_path / "out", steps=(2,), runs=1)
    (extra,) = (system.extra for system in made.systems)
    assert extra["GFLOP of unet"] == pytest.approx(2 * gflops(opened)["unet"], abs=1e-3)


def test_a_unet_of_ones_own_is_priced_from_its_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel"} | UNETS["sdxs-512"]))
    mine = Blueprint.of(str(path), "lite")
    assert (mine.name, mine.decoder) == ("mine", "lite") and "_class_name" not in mine.unet
    path.write_text(json.dumps(UNETS["sdxs-512"] | {"cross_attention_dim": 2048}))
    with pytest.raises(EdgeflashError, match=r"mine\.json: cross_attention_dim is 2048"):
        Blueprint.of(str(path))


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


def test_the_lite_decoder_is_as_small_as_its_name_says() -> None:
    lite, tiny = (AutoencoderTiny(**DECODERS[name]).decoder for name in ("lite", "tiny"))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (lite, tiny)]
    assert sizes == [279_395, 1_222_531]
