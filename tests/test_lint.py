"""Known-bad networks are flagged without the device, each by the rule that knows."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from small_onnx import network
from tiny_bundle import tiny

from edgeflash import cli, shelf
from edgeflash.bundle import Bundle, Component, Engine, File, TensorSpec, describe_file
from edgeflash.devices import DEVICES, Device
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Target
from edgeflash.runtimes import lint
from edgeflash.runtimes.graph import Graph, Peak
from edgeflash.runtimes.lint import Finding, Judgement, Seen, judge, look

node = helper.make_node


def bundle_of(folder: Path, *nodes: Any, **data: Any) -> Bundle:
    """The tiny bundle with that network in the place of its UNet."""
    tiny(folder, timestep=None)
    network(folder / "unet/model.onnx", *nodes, **data)
    told = json.loads((folder / MANIFEST).read_text())
    told["components"][1]["files"] = [describe_file(folder, "unet/model.onnx").model_dump()]
    (folder / MANIFEST).write_text(json.dumps(told))
    return Bundle.open(folder)


def caught(judged: Judgement, rule: str) -> Finding:
    """The one finding of a rule."""
    (found,) = (finding for finding in judged.findings if finding.rule == rule)
    return found


def judged(bundle: Bundle, device: str) -> Judgement:
    return judge(look(bundle), Device.of(device))


RESHAPE, TILE = (node(kind, ["sample", "told"], ["y"]) for kind in ("Reshape", "Tile"))
LOOK_UP = [
    node("Cast", ["sample"], ["ids"], to=TensorProto.INT64),
    node("Gather", ["table", "ids"], ["y"]),
]
TO_BYTES = node("QuantizeLinear", ["sample", "scale", "zero"], ["y"], name="to_bytes")
DET = node("Det", ["sample"], ["y"], name="volume")
CLIP = TensorProto(
    name="table", dims=(49408, 768), data_type=TensorProto.FLOAT
)  # its numbers are not needed
HALF = np.float32(0.5)
KNOWN_BAD: dict[str, tuple[list[Any], dict[str, Any], str, str, str, str]] = {
    "rank 6": (
        [RESHAPE],
        {"told": [1, 2, 2, 4, 2, 2]},
        "iphone-14",
        "rank",
        "unsupported",
        r"y \[1, 2, 2, 4, 2, 2\] float32.*rank 6.*at most 5",
    ),
    "rank 9": (
        [RESHAPE],
        {"told": [1, 1, 1, 1, 1, 4, 4, 2, 2]},
        "jetson-orin",
        "rank",
        "unsupported",
        "rank 9.*at most 8",
    ),
    "a result of 128 MiB and 32 KiB": (
        [TILE],
        {"told": [1, 1, 512, 1025]},
        "web",
        "buffer",
        "unsupported",
        r"y \[1, 4, 2048, 4100\] float32.*128\.1 MiB.*at most 128\.0 MiB",
    ),
    "the embedding that a browser refused": (
        LOOK_UP,
        {"table": CLIP},
        "web",
        "buffer",
        "unsupported",
        r"table \[49408, 768\] float32.*144\.8 MiB",
    ),
    "4 GiB at once": (
        [TILE],
        {"told": [1, 1, 4096, 4096]},
        "iphone-13",
        "memory",
        "will be killed",
        r"Tile .*y \[1, 4, 16384, 16384\].*4,096\.0 MiB one at a time.*at most 2,048\.0 MiB",
    ),
    "an operator without a kernel": (
        [DET],
        {},
        "jetson-orin",
        "operators",
        "unsupported",
        "Det volume.*Det: 1 of 1 operators",
    ),
    "an operator for the CPU": ([DET], {}, "web", "operators", "tight", "Det volume"),
    "uint8 with a zero point": (
        [TO_BYTES],
        {"scale": HALF, "zero": np.uint8(128)},
        "jetson-orin",
        "zero_points",
        "unsupported",
        "QuantizeLinear to_bytes",
    ),
    "uint8 though its zero point is 0": (
        [TO_BYTES],
        {"scale": HALF, "zero": np.uint8(0)},
        "jetson-orin",
        "zero_points",
        "unsupported",
        "QuantizeLinear to_bytes",
    ),
    "int8 with a zero point": (
        [TO_BYTES],
        {"scale": HALF, "zero": np.int8(3)},
        "jetson-orin",
        "zero_points",
        "unsupported",
        "QuantizeLinear to_bytes",
    ),
}


@pytest.mark.parametrize("name", KNOWN_BAD)
def test_what_is_known_to_be_bad_is_named_by_its_rule(name: str, tmp_path: Path) -> None:
    nodes, data, device, rule, verdict, told = KNOWN_BAD[name]
    found = caught(judged(bundle_of(tmp_path / "b", *nodes, **data), device), rule)
    assert (found.component, found.verdict) == ("unet", verdict)
    assert re.search(told, f"{found.where}; {found.found}; {found.limit}"), found
    assert found.source and found.advice


@pytest.mark.parametrize(
    ("device", "nodes", "data"),
    [
        ("jetson-orin", [RESHAPE], {"told": [1, 1, 1, 4, 4, 2, 2, 1]}),
        ("jetson-orin", [TO_BYTES], {"scale": HALF, "zero": np.int8(0)}),
        ("web", [TILE], {"told": [1, 1, 512, 1024]}),
    ],
)
def test_what_just_keeps_to_a_limit_fits(
    device: str, nodes: list[Any], data: dict[str, Any], tmp_path: Path
) -> None:
    assert judged(bundle_of(tmp_path / "b", *nodes, **data), device).findings == ()


def test_rank_5_passes_though_the_target_does_not(tmp_path: Path) -> None:
    found = judged(bundle_of(tmp_path / "b", RESHAPE, told=[1, 2, 2, 4, 4]), "iphone-14")
    assert {finding.rule for finding in found.findings} == {"target"}
    assert found.verdict == "unsupported" and "--to coreml" in found.findings[0].advice


def test_free_sides_are_told_where_sides_must_be_fixed(tmp_path: Path) -> None:
    found = judged(Bundle.open(tiny(tmp_path / "b")), "galaxy-s24")
    (sample,) = (f for f in found.findings if f.rule == "static" and f.component == "unet")
    assert sample.where == "sample [n, 4, 4, 4]" and sample.verdict == found.verdict == "tight"
    assert "memory was not judged" in found.left_open[-1]


def test_guidance_doubles_the_rows(tmp_path: Path) -> None:
    def results(guidance: dict[str, Any]) -> dict[str, int]:
        folder = tiny(tmp_path / str(guidance["kind"]), guidance=guidance, timestep=None)
        return {part.component.name: part.peak.bytes for part in look(Bundle.open(folder))}

    one, two = results({"kind": "none"}), results({"kind": "cfg", "scale": 4})
    assert two == {"text_encoder": 2 * one["text_encoder"], "unet": 2 * one["unet"]} | {
        "vae_decoder": one["vae_decoder"]
    }
    assert one["text_encoder"] == 5 * 8 + 5 * 2 * 4  # ids and conditioning
    assert one["vae_decoder"] == 4 * (64 + 48 + 192)  # latent, three channels of it, image


def part(name: str = "unet", **told: Any) -> Seen:
    """A component of which 100 bytes are weights and 20 are alive at once."""
    file = File(path=f"{name}.bin", bytes=100, sha256="")
    usual = {"target": "coreml", "precision": "fp16", "files": (file,), "inputs": (), "outputs": ()}
    component = Component.model_validate({"name": name} | usual | told)
    return Seen(component, Graph(), 100, Peak(20))


@pytest.mark.parametrize(
    ("most", "verdict", "advice"),
    [
        (294, "fits", None),
        (293, "tight", "one component at a time"),
        (160, "tight", "one component at a time"),
        (159, "tight", "--precision int8"),
        (120, "tight", "--precision int8"),
        (119, "will be killed", "--precision int8"),
    ],
)
def test_memory_is_judged_with_all_loaded_and_one_at_a_time(
    most: int, verdict: str, advice: str | None
) -> None:
    """220 bytes with both loaded, 120 alone; from three quarters of the limit on it is tight."""
    device = Device.of("iphone-14")
    limits = [limit for limit in device.limits if limit.rule == "memory"]
    device = device.model_copy(update={"limits": (limits[0].model_copy(update={"most": most}),)})
    found = judge((part("unet"), part("vae_decoder")), device)
    assert found.verdict == verdict and found.bytes == (220, 120)
    assert [advice in f.advice for f in found.findings] == [True] * (advice is not None)


def test_core_ml_components_are_judged_by_what_the_manifest_tells() -> None:
    def found(**told: Any) -> dict[str, Finding]:
        judged = judge((part(**told),), Device.of("iphone-14"))
        return {finding.rule: finding for finding in judged.findings}

    latent = TensorSpec(name="z", role="latent", shape=(1, 4, 64, 64), dtype="float16")
    text = TensorSpec(name="text", role="conditioning", shape=(1, 768, 1, 77), dtype="float16")
    assert found(inputs=(latent,)) == {}
    axis = found(inputs=(latent, text))["axis"]
    assert axis.verdict == "fits" and axis.found == f"{768 * 38:,} bytes of padding"
    assert found(precision="fp32")["precision"].verdict == "tight"
    big = File(path="weights/weight.bin", bytes=2_000_000_001, sha256="")
    assert found(files=(big,))["file"].where == "weights/weight.bin"
    assert list(found(target="onnx", inputs=(text,), files=(big,))) == ["target"]


def test_the_worst_comes_first() -> None:
    text = TensorSpec(name="text", role="conditioning", shape=(1, 768, 1, 77), dtype="float16")
    heavy = replace(part(precision="fp32", inputs=(text,)), weight_bytes=2**32)
    found = judge((heavy,), Device.of("iphone-13"))
    assert [finding.rule for finding in found.findings] == ["memory", "precision", "axis"]
    assert found.verdict == "will be killed"


def test_engines_of_tensorrt_for_rtx_are_not_for_orin() -> None:
    for vendor, verdict in (("tensorrt_rtx", "unsupported"), ("tensorrt", "fits")):
        told = part(target="tensorrt", engine=Engine(vendor=vendor, rows=(1, 1, 1)))
        assert judge((told,), Device.of("jetson-orin")).verdict == verdict


def test_without_the_package_that_reads_it_nothing_plainly_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path / "b", DET)
    assert judged(bundle, "jetson-orin").told == "unsupported"
    monkeypatch.setattr(lint, "absent", list)
    found = judged(bundle, "jetson-orin")
    assert found.findings == () and found.seen[1].peak == Peak()
    assert found.seen[1].weight_bytes == bundle.component("unet").files[0].bytes
    unseen = "buffer, rank, operators, zero_points, memory of results"
    assert found.told == "fits, as far as could be read"
    assert found.left_open[0].startswith("text_encoder, unet, vae_decoder: not looked at: ")
    assert set(found.unseen) <= set(unseen.split(", ")) and "operators" in found.unseen
    assert found.left_open[0].endswith("reading it needs onnx: pip install onnx")


def test_every_limit_names_its_source_and_what_its_rule_needs() -> None:
    told = tomllib.loads(DEVICES.read_text())
    used = {limit.name: limit for name in told["device"] for limit in Device.of(name).limits}
    assert set(used) == set(told["limit"])
    needs = {"most": ("memory", "buffer", "file", "rank"), "multiple": ("axis",)}
    needs["takes"] = ("precision", "engine", "operators")
    for limit in used.values():
        assert limit.rule == "memory" or (limit.rule in lint.RULES and limit.advice), limit.name
        assert limit.source, limit.name
        for field, rules in needs.items():
            assert (field in told["limit"][limit.name]) == (limit.rule in rules), limit.name


def test_what_suits_a_device_is_an_option_of_a_target_that_runs_there() -> None:
    devices = [Device.of(name) for name in tomllib.loads(DEVICES.read_text())["device"]]
    for device in devices:
        for target, options in device.options.items():
            assert device.suited(target) == options
            assert set(options) <= set(shelf.find(Target, target).model_fields), device.name
    suited = Device.of("iphone-15").suited("coreml")
    assert suited == {"attention": "split_einsum"} and Device.of("web").suited("onnx") == {}
    with pytest.raises(EdgeflashError, match="iphone-15: does not run onnx: --to coreml"):
        Device.of("iphone-15").suited("onnx")


def test_the_command_tells_all_and_leaves_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle_of(tmp_path / "b", DET).folder
    monkeypatch.setenv("COLUMNS", "200")

    def run(*devices: str) -> tuple[int, str, str]:
        words = [word for device in devices for word in ("--device", device)]
        monkeypatch.setattr(sys, "argv", ["edgeflash", "lint", str(folder), *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, err = run("web")
    assert code == 0 and "web: tight" in out and "Det volume" in out and not err
    assert "onnxruntime-web 1.30.0" in out and "estimate: 0.0 MiB with all loaded" in out
    code, out, err = run("web", "jetson-orin")
    assert code == 2 and "web: tight" in out and "jetson-orin: unsupported" in out
    assert err.count("\n") == 1 and "unsupported: operators: unet: Det volume" in err
    code, _, err = run("jetson-nano")
    assert code == 2 and "no device 'jetson-nano'" in err
