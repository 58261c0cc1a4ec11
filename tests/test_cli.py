"""The command line: every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import tiny

from edgeflash import cli
from edgeflash.disk import read_json
from edgeflash.embedded import embedded
from edgeflash.schedule import Guidance


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["edgeflash", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        return Said(int(left.value.code or 0), told.out, told.err)

    return run


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["distil"], r"No such command 'distil'. Did you mean 'distill'"),
        (["run", "b", "--promt", "x"], r"No such option: --promt"),
        (["distill"], "say either a recipe or --by METHOD"),
        (["distill", "shape"], r"no recipe file or shipped recipe 'shape' .*mean 'shapes'\?"),
        (["distill", "--by", "lmc"], r"no method 'lmc' .*did you mean 'lcm'\?"),
        (["distill", "--by", "lcm", "--set", "stps=3"], r"no option in method 'lcm': 'stps'"),
        (
            ["distill", "--by", "lcm", "--set", "lmc.steps=3"],
            r"no table or stage .* 'lmc' \(have: data, floors, lcm, .*\); did you mean 'lcm'\?",
        ),
        (["distill", "--by", "lcm", "--set", "teachr=x"], r"'teachr' .*did you mean 'teacher'\?"),
        (["distill", "--by", "lcm", "--set", "steps"], r"write it as NAME=VALUE"),
        (["export", "nowhere", "--to", "onx"], r"no target 'onx' .*did you mean 'onnx'\?"),
        (["export", "nowhere", "--to", "onnx"], r"nowhere: no such folder"),
        (
            ["export", "shapes-student", "--to", "torch", "--timesteps", "align-your-step"],
            r"no --timesteps 'align-your-step' .*did you mean 'align-your-steps'\?",
        ),
        (
            ["export", "shapes-student", "--to", "torch", "--merge-tokens", "0.9"],
            r"--merge-tokens 0\.9: give a share from 0 to 0\.75",
        ),
        (
            ["export", "nowhere", "--to", "onnx", "--device", "iphone-15"],
            r"does not run onnx: --to c",
        ),
        (
            ["export", "nowhere", "--to", "onnx", "--precision", "in8"],
            r"no --precision 'in8' \(have: auto, fp16, .*\); did you mean 'int8'\?",
        ),
        (
            ["export", "nowhere", "--to", "onnx", "--precision", "atuo"],
            r"no --precision 'atuo' .*; did you mean 'auto'\?",
        ),
        (
            ["export", "x", "--to", "onnx", "--precision", "fp16", "--set", "precision=int8"],
            r"--precision fp16 and --set precision=int8: leave one of them out",
        ),
        (["export", "shapes-studnt", "--to", "onnx"], r"folder; did you mean 'shapes-student'\?"),
        (["export", "shapes-judge", "--to", "onnx"], r"classifier .* such as shapes-student"),
        (
            ["export", "shapes-student", "--to", "onnx", "--out", "/proc/x"],
            r"^edgeflash: /proc/x: ",
        ),
        (
            ["export", "shapes-student", "--to", "onnx", "--steps", "1,1000000"],
            r"cannot draw in 1000000 steps: .*ask for 1000 steps at most",
        ),
        (
            [
                "export",
                "shapes-student",
                "--to",
                "onnx",
                "--deep-cache",
                "2",
                "--cache-branch",
                "99",
            ],
            r"--cache-branch 99: this unet has the branches 0 to \d+",
        ),
        (["price", "--student", "shapes-studnt"], r"did you mean 'shapes-student'\?"),
        (["price", "--student", "sdxs-512", "--steps", "99999"], r"LCMScheduler refuses"),
        (["export", "nowhere", "--to", "onnx", "--size", "axb"], r"--size axb: write"),
        (["run", "nowhere", "--prompt", "x"], r"nowhere: no bundle folder"),
        (["verify", "nowhere"], r"nowhere: no bundle folder"),
        (["run", "shapes-student", "--prompt", "x"], r"export it first: edgeflash export shapes-"),
        (["run", "README.md", "--prompt", "x"], r"README\.md: no bundle folder \(is a file\)$"),
        (["run", "nowhere", "--prompt", "x", "--seed", "-1"], r"'--seed': .* 0 or more"),
        (["inspect", "nowhere"], r"nowhere: neither a bundle nor a diffusers folder"),
        (["list", "lmc"], r"no plug-in 'lmc' .*did you mean 'lcm'\?"),
        (["compare", "a.json", "b.json"], r"a\.json: no such report"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(say, words: list[str], line: str) -> None:
    said = say(*words)
    assert said.code == 2 and re.search(line, said.err), said.err
    assert said.err.count("\n") == 1 and said.err.startswith("edgeflash: ")


@pytest.mark.parametrize(
    "words", [["score", "b"], ["search", "--budget-ms", "9", "--on", "onnx"], ["benchmark-methods"]]
)
def test_a_missing_package_is_told_with_the_line_that_installs_it(
    say, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeflash.shelf.absent", lambda names: [n for n in names if n == "torch"])
    said = say(*words)
    assert said.code == 2
    assert said.err.startswith(f"edgeflash: {words[0]} needs torch: pip install 'edgeflash[")


def test_ctrl_c_is_one_line_too(say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeflash.inspect.tell", press)
    said = say("inspect", tmp_path)
    assert said.code == 2 and said.err.count("\n") == 1 and "run the same command again" in said.err


def test_a_dry_run_prints_the_recipe_as_it_would_run(say) -> None:
    sets = ["--set", "lcm.steps=9", "--set", "data.samples=5"]
    said = say("distill", "shapes", "--teacher", "my/model", *sets, "--dry-run")
    told = tomllib.loads(said.out)
    assert said.code == 0 and told["teacher"] == "my/model" and told["data"]["samples"] == 5
    steps = {stage["by"]: stage["steps"] for stage in told["stage"]}
    assert steps["lcm"] == 9 and steps["blocks"] != 9


def test_a_dry_run_tells_the_size_of_pictures(say, tmp_path: Path) -> None:
    """That of the teacher, if it lies here; said or not, the run takes no other."""
    words = ["--by", "lcm", "--data", tmp_path, "--dry-run", "--teacher"]
    assert tomllib.loads(say("distill", *words, "embedded").out)["data"]["size_px"] == 64
    large = tmp_path / "large"
    shutil.copytree(embedded("shapes-teacher"), large)
    config = large / "unet/config.json"
    config.write_text(json.dumps(read_json(config) | {"sample_size": 64}))
    assert tomllib.loads(say("distill", *words, large).out)["data"]["size_px"] == 256
    assert "size_px" not in tomllib.loads(say("distill", *words, "some/model").out)["data"]
    said = say("distill", *words, "some/model", "--set", "data.size_px=64")
    assert tomllib.loads(said.out)["data"]["size_px"] == 64


def test_methods_without_a_recipe(say, tmp_path: Path) -> None:
    words = ["--by", "blocks", "--by", "lcm", "--data", tmp_path, "--set", "steps=4", "--dry-run"]
    told = tomllib.loads(say("distill", *words).out)
    assert [stage["by"] for stage in told["stage"]] == ["blocks", "lcm"]
    assert {stage["steps"] for stage in told["stage"]} == {4}
    assert told["data"]["kind"] == "folder" and told["data"]["path"] == str(tmp_path)
    for name in ("{000..009}.tar", "one.tar"):
        shards = ["--by", "lcm", "--data", tmp_path / name, "--dry-run"]
        assert tomllib.loads(say("distill", *shards).out)["data"]["kind"] == "shards"


def test_run_writes_the_picture_and_tells_what_was_cut(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b")
    said = say("run", bundle, "--prompt", "red star " * 40, "--out", tmp_path / "deep/a.png")
    assert said.code == 0, said.err
    assert "too long" in said.err
    picture = np.asarray(Image.open(tmp_path / "deep/a.png"))
    assert picture.ndim == 3 and picture.dtype == np.uint8
    refused = say("run", bundle, "--prompt", "red", "--out", tmp_path / "a.jpg")
    assert refused.code == 2 and "name it a.png" in refused.err


def test_brackets_are_not_taken_for_markup(say, tmp_path: Path) -> None:
    place = tmp_path / "a[fp16].png"
    said = say("run", tiny(tmp_path / "b"), "--prompt", "a [red] star [/ring]", "--out", place)
    assert said.code == 0 and said.out == f"wrote {place}  (a [red] star [/ring])\n"


def test_guidance_is_a_number_that_images_can_take(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b", guidance={"kind": "cfg", "scale": 4})
    for scale, line in (("-1", "scales are 0 or more"), ("nan", "'--guidance': nan is no finite")):
        said = say("run", bundle, "--prompt", "red", "--guidance", scale)
        assert said.code == 2 and line in said.err


def test_a_negative_prompt_steers_where_there_is_guidance(say, tmp_path: Path) -> None:
    bundle, asked = tiny(tmp_path / "b", guidance={"kind": "cfg", "scale": 4}), ["--seed", "1"]

    def picture(*more: str) -> bytes:
        place = tmp_path / f"drawn{''.join(more)}.png"
        assert say("run", bundle, "--prompt", "red", *asked, *more, "--out", place).code == 0
        return place.read_bytes()

    assert picture() == picture("--negative", "") != picture("--negative", "blue ring")
    said = say("run", bundle, "--prompt", "red", "--negative", "blue", "--guidance", "1")
    assert said.code == 2 and "guidance scale 1 asks for none: raise it" in said.err


def test_export_is_told_the_guidance(
    say, one_step_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "edgeflash.export.line.export_student", lambda *_, **told: asked.update(told)
    )
    say("export", one_step_student, "--to", "onnx", "--guidance", "3")
    assert asked["options"].guidance == Guidance(kind="cfg", scale=3.0)


def test_a_device_sets_what_the_person_does_not_and_is_judged(
    say, one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, judged = [], []
    monkeypatch.setattr(
        "edgeflash.export.line.export_student", lambda _, target, *__, **___: targets.append(target)
    )
    monkeypatch.setattr(cli, "lint", lambda *words: judged.append(words))
    words = ("export", one_step_student, "--to", "coreml", "--device", "iphone-15", "--out")
    say(*words, tmp_path / "b", "--set", "ios=17")
    say(*words, tmp_path / "b", "--set", "attention=original")
    assert [(target.attention, target.ios) for target in targets] == [
        ("split_einsum", 17),
        ("original", 16),
    ]
    assert judged == [(tmp_path / "b", ["iphone-15"])] * 2


def test_two_prompts_make_two_pictures(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b")
    said = say("run", bundle, "--prompt", "red", "--prompt", "star", "--out", tmp_path / "a.png")
    assert said.code == 0, said.err
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["a-0.png", "a-1.png"]


def test_an_altered_bundle_is_refused_with_both_hashes(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b")
    told = json.loads((bundle / "edgeflash.json").read_text())
    path = bundle / told["components"][0]["files"][0]["path"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for words in (["verify"], ["run", "--prompt", "a"]):
        said = say(words[0], bundle, *words[1:])
        assert said.code == 2 and re.search(r"sha256 expected \w{64}, found \w{64}", said.err)
    path.write_bytes(data[:-5])
    assert "truncated" in say("inspect", bundle).err


def test_floors_are_numbers_of_known_metrics(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b")
    assert "must be a number" in say("verify", bundle, "--floor", "L4.psnr_db=high").err
    assert "did you mean 'L4.psnr_db'?" in say("verify", bundle, "--floor", "L4.psnr=30").err


def test_a_newer_manifest_asks_for_a_newer_edgeflash(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b")
    manifest = bundle / "edgeflash.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    said = say("run", bundle, "--prompt", "x")
    assert said.code == 2 and "format 99 is newer" in said.err and "pip install -U" in said.err


def test_inspect_list_and_doctor_tell(say, tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b")
    assert "vae_decoder" in say("inspect", bundle).out
    assert "huber_c" in say("list", "lcm").out
    shelf = say("list").out
    assert all(name in shelf for name in ("blocks", "decoder", "lcm", "onnx", "torch"))
    assert "usable here" in say("doctor").out
