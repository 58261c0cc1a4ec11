"""Searching students under a budget: what can go, what it takes, and what is proposed."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from exported import Exported
from rich.console import Console
from test_price import SD21, skeleton
from tiny_student import write_student

from edgeflash.architecture import smaller, spelled
from edgeflash.blueprints import SD15, UNETS, Blueprint
from edgeflash.devices import Device
from edgeflash.distill.by_blocks import Blocks, feature_pairs, prune_to
from edgeflash.errors import EdgeflashError
from edgeflash.export.plan import FILE, Quantizing, read_plan
from edgeflash.price import Way
from edgeflash.roles import Target
from edgeflash.search import SHARE, found_tables, search
from edgeflash.search_blocks import Anatomist, Block, gflop_of
from edgeflash.search_times import Estimated, MeasuredTimes, Times, alone
from edgeflash.search_walk import Proposal, Walker, Wish
from edgeflash.shelf import make
from edgeflash.student import Student
from edgeflash.work import gflops

QUIET = Console(file=io.StringIO())
DOWN, PAIRS = "DownBlock2D", [f"a pair of stage {i}" for i in (1, 2, 3, 4)]


def without(config: dict[str, Any], *removed: str) -> dict[str, Any]:
    config = spelled(config)
    for what in removed:
        (config,) = (each.config for each in smaller(config) if each.removed == what)
    return config


def parameters(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return int(UNet2DConditionModel.from_config(config).num_parameters())


@pytest.mark.parametrize(
    ("config", "removed", "count"),
    [
        (SD15, PAIRS, 579_384_964),
        (SD15, [*PAIRS, "the mid block"], 482_346_884),
        (SD15, [*PAIRS, "the mid block", "stage 4"], 323_384_964),
        (SD21, [*PAIRS, "the mid block", "stage 4", "transformers of stage 1"], 318_695_364),
    ],
    ids=["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "sdxs-512"],
)
def test_removals_lead_to_the_published_students(
    config: dict[str, Any], removed: list[str], count: int
) -> None:
    assert parameters(without(config, *removed)) == count


def test_every_removal_takes_something_and_leaves_a_unet_that_runs(tmp_path: Path) -> None:
    for name in ("bk-sdm-base", "sdxs-512", "koala-700m"):
        anatomist = Anatomist(skeleton(Blueprint.of(name, "tiny"), tmp_path / name), (512, 512))
        whole = anatomist.apart(spelled(UNETS[name]))
        left = {s.removed: anatomist.apart(s.config) for s in smaller(spelled(UNETS[name]))}
        assert all(each.parameters < whole.parameters for each in left.values())
        work = sum(map(gflop_of, whole.blocks))
        assert all(sum(map(gflop_of, each.blocks)) < work for each in left.values())
    assert {"transformers of stage 3 to depth 3", "the mid block"} & left.keys() == {
        "transformers of stage 3 to depth 3"
    }


def test_channels_keep_whole_groups_and_heads() -> None:
    narrow = without(UNETS["sdxs-512"], "channels of stage 2 to 512")
    assert narrow["attention_head_dim"] == [5, 8, 20]  # heads of 64, as before
    narrow = without(SD15, "channels of stage 1 to 256")
    assert narrow["attention_head_dim"] == 8 and narrow["time_embedding_dim"] == 1280
    told = [each.removed for each in smaller(spelled(SD15), blocks=False, least=(300, 600))]
    assert told == ["channels of stage 3 to 1024", "channels of stage 4 to 1024"]
    assert not any("channels" in each.removed for each in smaller(spelled(SD15), widths=False))
    with pytest.raises(ValueError):
        without(UNETS["sdxs-512"], "transformers of stage 2", "transformers of stage 3")


def test_blocks_are_the_whole_unet(guided_student: Path) -> None:
    student = Student.open(guided_student)
    anatomist = Anatomist(student, (16, 16))
    config = spelled(student.config("unet"))
    whole = anatomist.apart(config)
    assert sum(map(gflop_of, whole.blocks)) == pytest.approx(gflops(student, (16, 16))["unet"])
    assert whole.parameters == parameters(config)
    assert len(set(whole.blocks)) == anatomist.distinct < len(whole.blocks)
    met = anatomist.distinct
    assert anatomist.apart(config) == whole and anatomist.distinct == met


def test_a_block_runs_alone_as_it_does_in_the_unet(guided_student: Path) -> None:
    student = Student.open(guided_student)
    for block in Anatomist(student, (16, 16)).apart(spelled(student.config("unet"))).blocks:
        network = alone(block)
        given = [torch.randn(1, *map(int, spec.shape[1:])) for spec in network.inputs]
        made = network.module(*given)
        assert made.isfinite().all() and made.std() > 0
        assert list(made.shape)[1:] == list(network.outputs[0].shape)[1:]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_blocks_are_measured_once(guided_student: Path, precision: str) -> None:
    student = Student.open(guided_student)
    times = MeasuredTimes(Way("onnx", precision), QUIET)
    blocks = Anatomist(student, (16, 16)).apart(spelled(student.config("unet"))).blocks
    embedding, conv = blocks[0], blocks[1]
    assert embedding.name.startswith("TimestepEmbedding")  # which int8 leaves alone
    taken = [times.block_ms(block) for block in (embedding, conv, embedding, conv)]
    assert taken[:2] == taken[2:] and times.blocks == 2 and min(taken) > 0


def test_int8_takes_of_blocks_what_it_takes_of_the_whole_unet(
    one_step: Exported, one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends, the timestep's path, conditioning and the shortcuts of skips stay float in both."""
    monkeypatch.setattr("edgeflash.export.quantize.quantize", lambda path, *_, **__: path)
    times, whole = (
        MeasuredTimes(Way("onnx", "int8"), QUIET),
        read_plan(one_step.bundle.folder / FILE),
    )
    student = Student.open(one_step_student)
    blocks = Anatomist(student, (16, 16)).apart(spelled(student.config("unet"))).blocks

    def lowered(block: Block) -> tuple[set[str], str]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        precision = times._lowered(times._captured(alone(block)), folder)[1]
        names = read_plan(folder / FILE).names if (folder / FILE).is_file() else {}
        return {name.removeprefix("unet/layer.") for name in names}, precision

    for kind, joined, place in (
        ("Downsample2D", False, ".downsamplers.0."),
        ("Transformer2DModel", False, ".attentions.0."),
        ("ResnetBlock2D", True, "up_blocks.0.resnets.0."),
    ):
        block = next(b for b in blocks if b.built.startswith(kind) and b.joined == joined)
        path = next(n.partition(place)[0] + place for n in whole.names if place in n)
        wanted = {n.removeprefix(path) for n in whole.names if n.startswith(path)}
        assert lowered(block) == (wanted, "int8"), kind
    assert lowered(blocks[-1]) == (set(), "fp32"), "the last convolution"
    assert [block.roles for block in blocks[:2]] == [("timestep", ""), ("sample", "")]


def test_what_a_precision_leaves_alone_is_as_in_a_whole_unet() -> None:
    for precision, floats in (("int8", "fp32"), ("int8-weights", "fp16"), ("fp16", "fp16")):
        assert MeasuredTimes(Way("onnx", precision), QUIET)._floats("unet") == floats
    for rest in ("fp32", "bf16"):
        options = {"vendor": "tensorrt", "precision": "int8", "rest": rest}
        target = make(Target, "tensorrt", options)
        assert isinstance(target, Quantizing) and target.halves("unet") == (rest == "bf16")


class ByWork(Times):
    """A ms for every so many GFLOP."""

    told = "made up"

    def block_ms(self, block: Block) -> float:
        return gflop_of(block)

    def part_ms(self, student: Student, component: str, size: tuple[int, int]) -> float:
        return 0.0


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    folder = tmp_path_factory.mktemp("search") / "small"
    student = Student.open(write_student(folder, widths=(16, 32, 32), tiny_decoder=True))
    wish = Wish(1, on=Way("onnx", "fp32"))
    anatomist = Anatomist(student, (16, 16))
    return Walker(anatomist, ByWork(), lambda config, anatomy: 0.0, 1, wish, 0.0, QUIET)


def begin(walker: Walker, share: float, value: Any, **changes: Any) -> tuple[Walker, Proposal]:
    """A walk to that share of what the teacher takes."""
    config = spelled(walker.anatomist.student.config("unet"))
    walker = replace(walker, value=value, _values={}, **changes)
    start = walker.valued(walker.look("teacher", config, ()))
    wish = replace(walker.wish, budget_ms=start.image_ms * share)
    return replace(walker, wish=wish), start


def test_what_loses_least_for_its_time_goes_first(walker: Walker) -> None:
    def value(config: dict[str, Any], _: Any) -> float:
        narrow = config["block_out_channels"] != [16, 32, 32]
        fewer = config["mid_block_type"] is None or config["down_block_types"].count(DOWN) > 1
        return -float(fewer) - 1e-6 * float(narrow)

    walk, start = begin(walker, 0.9, value)
    found = walk.walk(start, "both")
    assert found and found.removed and all(r.startswith("channels") for r in found.removed)
    assert found.image_ms <= walk.wish.budget_ms < start.image_ms
    walk, start = begin(walker, 0.9, lambda config, anatomy: -value(config, anatomy))
    found = walk.walk(start, "both")
    assert found and not any(r.startswith("channels") for r in found.removed)


def test_what_was_not_needed_comes_back(walker: Walker) -> None:
    walk, start = begin(walker, 0.95, lambda config, anatomy: anatomy.parameters)
    both = walk._replayed(start, "both", ("channels of stage 2 to 24", "the mid block"))
    assert both
    found = walk._given_back(start, walk.valued(both))
    assert len(found.removed) == 1 and found.value > walk.valued(both).value
    assert found.image_ms <= walk.wish.budget_ms


def test_a_way_that_ends_before_the_budget_leads_nowhere(walker: Walker) -> None:
    walk, start = begin(walker, 1e-3, lambda config, anatomy: anatomy.parameters)
    assert walk.walk(start, "blocks", widths=False) is None


def test_a_step_is_called_twice_with_guidance_and_corrected_by_a_whole_one(walker: Walker) -> None:
    _, once = begin(walker, 1, lambda config, anatomy: 0.0)
    _, twice = begin(walker, 1, lambda config, anatomy: 0.0, calls=2, scale=1.5, beside_ms=7.0)
    assert twice.step_ms == pytest.approx(3 * once.step_ms)
    assert twice.image_ms == pytest.approx(7 + twice.step_ms)


def test_a_search_by_estimates_writes_what_price_and_blocks_read(
    guided_student: Path, tmp_path: Path
) -> None:
    device, student = Device.timed("iphone-14"), Student.open(guided_student)
    work = gflops(student)
    parts = sum(device.estimate_ms(name, work[name]) for name in work if name != "unet")
    whole = parts + 2 * 2 * device.estimate_ms("unet", work["unet"])  # steps, and guidance
    wish = Wish(parts + (whole - parts) * 0.8, steps=2, device=device)
    found = search(student, wish, tmp_path / "out", console=QUIET, command="edgeflash search")
    start, *ends = found.proposals
    assert start.image_ms == pytest.approx(whole) and start.value == pytest.approx(0, abs=1e-9)
    assert ends and all(e.image_ms <= wish.budget_ms and e.value < 0 for e in ends)
    assert found.kept.value == max(e.value for e in ends)
    told = json.loads((tmp_path / "out" / "search.json").read_text())
    assert told["times"] == "estimated" and told["kept"] == found.kept.name
    assert told["whole"] == [] and "|T - S|^2" in told["value"]
    path = str(tmp_path / "out" / "student.json")
    left = Blocks(architecture=path).left_of(dict(student.config("unet")))
    assert parameters(left) == found.kept.anatomy.parameters
    console = Console(file=io.StringIO(), width=200)
    console.print(found_tables(found))
    assert isinstance(console.file, io.StringIO)
    assert "estimates, not measured" in console.file.getvalue()
    with pytest.raises(EdgeflashError, match="nothing needs to go"):
        search(student, replace(wish, budget_ms=whole + 1), tmp_path / "out", console=QUIET)
    with pytest.raises(EdgeflashError, match="decoder alone take"):
        search(student, replace(wish, budget_ms=parts / 2), tmp_path / "out", console=QUIET)
    with pytest.raises(EdgeflashError, match="say where"):
        Wish(5)


def test_without_a_teacher_parameters_stand_in(tmp_path: Path) -> None:
    device = Device.timed("galaxy-s24")
    wish = Wish(61, device=device)
    found = search(Blueprint.of("bk-sdm-base", "tiny"), wish, tmp_path / "out", console=QUIET)
    assert found.value == SHARE and 0 < found.kept.value < found.proposals[0].value == 1
    assert Blueprint.of(str(tmp_path / "out" / "student.json"), "tiny").unet["in_channels"] == 4


@torch.no_grad()
def test_pairs_that_did_nothing_are_not_missed_stage_by_stage() -> None:
    """As in `test_methods.py`, where every stage loses a pair."""
    torch.manual_seed(0)
    config = spelled({"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 3,
                      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                      "attention_head_dim": 4, "cross_attention_dim": 12})  # fmt: skip
    teacher = UNet2DConditionModel.from_config(config)
    down, up = teacher.down_blocks[0], teacher.up_blocks[1]
    for block, lost in ((down, 2), (up, 1)):  # what stays has the skips it had
        for layer in (block.resnets[lost].conv2, block.attentions[lost].proj_out):
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    torch.nn.init.dirac_(up.resnets[1].conv_shortcut.weight)
    torch.nn.init.zeros_(up.resnets[1].conv_shortcut.bias)
    left = without(config, "a pair of stage 1")
    student, copied = prune_to(teacher, left)
    x, t, c = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 3, 12)
    seen, wanted = student(x, t, c).sample, teacher(x, t, c).sample
    assert copied == 1 and len(feature_pairs(teacher, student)) == 4
    assert torch.allclose(seen, wanted, atol=1e-5)


def test_features_of_another_width_are_not_compared() -> None:
    config = spelled({"block_out_channels": (16, 32), "norm_num_groups": 8,
                      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                      "attention_head_dim": 4, "cross_attention_dim": 12})  # fmt: skip
    teacher = UNet2DConditionModel.from_config(config)
    student, copied = prune_to(teacher, without(config, "channels of stage 2 to 24"))
    assert 0 < copied < 1
    assert feature_pairs(teacher, student) == [
        (teacher.down_blocks[0], student.down_blocks[0]),
        (teacher.up_blocks[1], student.up_blocks[1]),
    ]


def test_an_architecture_of_another_teacher_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.json"
    for config, message in (
        (SD15 | {"cross_attention_dim": 1024}, "cross_attention_dim is 1024, the teacher's is 768"),
        (SD15, "nothing to remove"),
    ):
        path.write_text(json.dumps(spelled(config)))
        with pytest.raises(EdgeflashError, match=message):
            Blocks(architecture=str(path)).left_of(spelled(SD15))
    with pytest.raises(EdgeflashError, match="leave one of them out"):
        Blocks(architecture=str(path), depths=(1,)).left_of(spelled(SD15))


@pytest.mark.slow
@pytest.mark.parametrize("ms", [1e6, 1e-6], ids=["slower than it is", "quicker than it is"])
def test_a_proposal_is_run_as_a_whole(
    guided_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ms: float
) -> None:
    """Whatever its blocks were said to take."""
    monkeypatch.setattr(MeasuredTimes, "block_ms", lambda times, block: ms * gflop_of(block))
    monkeypatch.setattr(MeasuredTimes, "part_ms", lambda *_: 0.0)
    student = Student.open(guided_student)
    whole = 2 * ms * gflops(student)["unet"]
    wish = Wish(0.8 * whole, on=Way("onnx", "fp32"))
    found = search(student, wish, tmp_path / "out", runs=2, console=QUIET)
    assert found.kept is found.checks[-1].proposal and len(found.checks) == 1
    console = Console(file=io.StringIO(), width=200)
    console.print(found_tables(found))
    assert isinstance(console.file, io.StringIO)
    assert ("over the budget" in console.file.getvalue()) == (ms < 1)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["report.html", "report.json", "search.json", "student.json"]


def test_estimates_are_of_the_device(guided_student: Path) -> None:
    student = Student.open(guided_student)
    device = Device.timed("iphone-14")
    times, blocks = Estimated(device), Anatomist(student, (16, 16))
    found = sum(map(times.block_ms, blocks.apart(spelled(student.config("unet"))).blocks))
    assert found == pytest.approx(device.estimate_ms("unet", gflops(student)["unet"]))
    decode = times.part_ms(student, "vae_decoder", (16, 16))
    assert decode == pytest.approx(
        device.estimate_ms("vae_decoder", gflops(student)["vae_decoder"])
    )
