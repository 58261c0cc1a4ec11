"""The benchmark of methods: what is trained, what is kept, and the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_distill import small_recipe

from edgeflash import benchmark as bench
from edgeflash.benchmark import benchmark
from edgeflash.benchmark_table import Drawn, Entry, result, strip
from edgeflash.disk import read_json
from edgeflash.distill.run import _check_steps, distill
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine
from edgeflash.recipe import Recipe
from edgeflash.roles import Method
from edgeflash.sheet import GAP, HEADER, MARGIN, SIDE
from edgeflash.shelf import make, names

COSTS: dict[str, Any] = {
    "steps": 1200,
    "seconds": 1230.0,
    "cached_seconds": 90.0,
    "samples_per_s": 32.0,
    "peak_rss_mib": 1500.4,
}


def drawn(accuracy: float) -> Drawn:
    return Drawn(prompt_accuracy=accuracy, one_object=1, two_objects=0, fd=91.2, diversity=3.25)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that were trained, by a training that takes no time."""
    done: list[str] = []

    def judge(name: str, folder: Path, out: Path, counts: Sequence[int]) -> dict[int, Drawn]:
        grey = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(bench.SHOWN)]
        strip(grey, result(out, name).with_suffix(".png"))
        return {count: drawn(0.25) for count in counts}

    def entry(name: str, options: Any, start: Path, out: Path, minutes: float, seed: int) -> Entry:
        done.append(f"{name}{seed or ''}")
        if name == "scm":
            raise EdgeflashError("loss term 'consistency' is nan")
        found = judge(name, start, out, (1, 4)) | {4: drawn(0.762 + seed / 100)}
        asked = bench._asked(name, options, minutes)
        there = {"recipe_sha256": "0", "asked": asked, "machine": Machine.here()} | COSTS
        return Entry(name=name, seed=seed, drawn=found, **there)

    monkeypatch.setattr(bench, "_train", lambda recipe, student, out: 0.0)
    monkeypatch.setattr(bench, "_judge", judge)
    monkeypatch.setattr(bench, "_entry", entry)
    return done


def test_what_is_finished_is_kept_and_a_failure_holds_nobody_up(
    tmp_path: Path, trained: list[str]
) -> None:
    with pytest.raises(EdgeflashError, match=r"^scm: loss term 'consistency' is nan$"):
        benchmark(tmp_path, ("scm", "lcm"))
    entries = benchmark(tmp_path, ("lcm", "tcd"))
    assert trained == ["scm", "lcm", "tcd"]
    assert [e.name for e in entries][:2] == ["teacher", "start, not distilled"]
    assert {e.name for e in entries[2:]} == {"lcm", "tcd"}


def test_the_table_has_a_row_a_method(tmp_path: Path, trained: list[str]) -> None:
    benchmark(tmp_path, ("lcm",))
    told = (tmp_path / "RESULTS.md").read_text().splitlines()
    *_, heads, line, with_25, _, _, lcm, _, machine, _, picture = told
    here = Machine.here()
    assert machine.startswith(f"Trained on {here.cores} cores of {here.gpu or here.cpu}; torch ")
    assert picture.endswith("](RESULTS.png)")
    assert heads.count("|") == line.count("|") == lcm.count("|") == 13
    assert with_25.startswith("| teacher, 25 steps | 25.0 | 100 | 0 | 91 | 3.2 | - |")
    assert lcm == (
        "| lcm | 25.0 / - / 76.2 | 100 / - / 100 | 0 / - / 0 | 91 / - / 91 | 3.2 / - / 3.2 "
        "| 1 | 20.5 | 1.5 | 1,200 | 32.0 | 1,500 |"
    )
    with Image.open(tmp_path / "RESULTS.png") as sheet:
        assert sheet.height == HEADER + 3 * (SIDE + GAP)
        for column in range(bench.SHOWN):
            at = MARGIN + column * (SIDE + GAP) + SIDE // 2
            assert sheet.getpixel((at, sheet.height - SIDE // 2)) == (20 * column,) * 3


def test_seeds_come_in_turns_and_the_table_tells_their_spread(
    tmp_path: Path, trained: list[str]
) -> None:
    benchmark(tmp_path, ("lcm",))
    entries = benchmark(tmp_path, ("lcm", "tcd"), seeds=4)
    assert trained == ["lcm", "tcd", "lcm1", "tcd1", "lcm2", "tcd2", "lcm3", "tcd3"]
    assert [e.label for e in entries if e.name == "tcd"][1:] == [
        f"tcd, seed {s}" for s in (1, 2, 3)
    ]
    last = (tmp_path / "RESULTS.md").read_text().splitlines()[-5]
    assert "| 25.0±0.0 / - / 77.7±1.5 |" in last and "| 4 | 20.5 | 1.5 |" in last
    assert "seed" not in {path.name for path in tmp_path.iterdir()}


def test_what_was_begun_otherwise_is_refused(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is not asked for now: it would stand in the same table."""
    with pytest.raises(EdgeflashError):  # nothing of it is finished, and yet it was begun
        benchmark(tmp_path, ("scm",), minutes=5)
    benchmark(tmp_path, ("lcm",), minutes=5)
    with pytest.raises(
        EdgeflashError, match=r"lcm was begun otherwise \(changed: minutes\); choose"
    ):
        benchmark(tmp_path, ("tcd",), minutes=20)
    options = bench._options()
    with monkeypatch.context() as patch:
        changed = options | {"scm": options["scm"] | {"guidance": 3.0}}
        patch.setattr(bench, "_options", lambda: changed)
        with pytest.raises(EdgeflashError, match=r"scm was .* \(changed: scm.guidance\)"):
            benchmark(tmp_path, ("tcd",), minutes=5)
    with monkeypatch.context() as patch:
        now = bench._models() | {"the start": "another"}
        patch.setattr(bench, "_models", lambda: now)
        with pytest.raises(EdgeflashError, match=r"\(changed: the start\)"):
            benchmark(tmp_path, ("tcd",), minutes=5)
    assert trained == ["scm", "lcm"]
    note = tmp_path / "asked/lcm.json"  # as of a version that had fewer options
    told = read_json(note)
    assert told.pop("lcm.huber_c") == 1e-3
    note.write_text(json.dumps(told))
    benchmark(tmp_path, ("tcd",), minutes=5)
    assert told.pop("lcm.ddim_steps") == 20, "no default of the method"
    note.write_text(json.dumps(told))
    with pytest.raises(EdgeflashError, match=r"\(changed: lcm.ddim_steps\)"):
        benchmark(tmp_path, ("tcd",), minutes=5)


def test_results_of_another_machine_are_gone_on_with(tmp_path: Path, trained: list[str]) -> None:
    """They need nothing beside them, and are held to what is asked for as those made here are."""
    benchmark(tmp_path / "there", ("lcm",), minutes=5)
    shutil.copytree(tmp_path / "there/results", tmp_path / "here/results")
    entries = benchmark(tmp_path / "here", ("lcm", "tcd"), minutes=5)
    assert trained == ["lcm", "tcd"] and len(entries) == 4
    shutil.rmtree(tmp_path / "here/asked")
    with pytest.raises(EdgeflashError, match=r"lcm was begun otherwise \(changed: minutes\)"):
        benchmark(tmp_path / "here", ("scm",), minutes=20)
    kept = tmp_path / "here/results/lcm.json"
    told = read_json(kept)
    del told["asked"]
    kept.write_text(json.dumps(told))
    with pytest.raises(EdgeflashError, match=r"lcm.json: does not tell what it was asked with"):
        benchmark(tmp_path / "here", ("tcd",), minutes=5)


def test_a_seed_is_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are measured once, and every seed has a student of its own."""
    asked: list[tuple[str, int, int]] = []
    lineage = SimpleNamespace(seconds=15.0, stages=[{"cached_seconds": 2280.0}])
    manifest = SimpleNamespace(lineage=lineage, schedules={1: None, 4: None, 8: None})

    def train(recipe: Recipe, student: Path, out: Path) -> float:
        asked.append((student.name, recipe.seed, recipe.stage[0].options["steps"]))
        return 1.0

    monkeypatch.setattr(bench, "_train", train)
    monkeypatch.setattr(
        bench, "_judge", lambda name, folder, out, counts: dict.fromkeys(counts, drawn(0))
    )
    monkeypatch.setattr(bench.Student, "open", lambda _: SimpleNamespace(manifest=manifest))
    (tmp_path / "students").mkdir()
    entries = [bench._entry("ladd", {}, tmp_path, tmp_path, 1, seed) for seed in (0, 2)]
    assert asked == [("ladd.probe", 0, 30), ("ladd", 0, 120), ("ladd-seed-2", 2, 120)]
    assert [(e.cached_seconds, *e.drawn) for e in entries] == [(2280.0, 1, 4)] * 2


def test_every_few_step_method_has_options_that_fit() -> None:
    options = bench._options()
    for name, chosen in options.items():
        counts = make(Method, name, chosen).step_counts()
        assert counts is None or set(counts) & set(bench.COUNTS), name
    rule = {"blocks": {"rule": "base"}}
    few = {name for name in names(Method) if make(Method, name, rule.get(name, {})).step_counts()}
    assert few <= set(options), few - set(options)


SAID = {  # what each is without, as the issue of a paper's ablations has it
    "imagine-no-backward": {"backward": False},
    "imagine-no-shift": {"shift": 1.0},
    "imagine-no-critic": {"gan_weight": 0},
    "imagine-no-correction": {"noise_correction": False},
    "add-critic-alone": {"distill_weight": 0},
    "add-teacher-alone": {"adversarial_weight": 0},
    "flash-no-matching": {"dmd_weights": (0,) * 4},
    "flash-no-critic": {"gan_weights": (0,) * 4},
    "sdxs-no-scores": {"feature_share": 1},
    "blocks-no-features": {"feature_weight": 0},
    "lcm-of-itself": {},
}


def test_ablations_are_a_method_of_the_benchmark_less_something(tmp_path: Path) -> None:
    """A dry run of each: the recipe stands, and differs from its method's by what is said."""
    methods, ablations = bench._options(), bench._ablations()
    assert not methods.keys() & ablations.keys()
    for name, own in ablations.items():
        recipe = bench._recipe(name, own, tmp_path, 7)
        _check_steps(recipe)
        (made,) = recipe.methods()
        whole = methods.get(own["by"]) or ablations[own["by"]]
        plain = bench._recipe(own["by"], whole, tmp_path, 7)
        (full,) = plain.methods()
        less = {k: v for k, v in made if v != getattr(full, k)}
        assert (made.steps, made.batch_size) == (7, 32) and less.keys() <= own.keys()
        assert less or name in ("blocks", "lcm-of-itself")
        assert SAID.get(name, {}).items() <= less.items(), name
        assert (recipe.teacher, recipe.base) == {
            "blocks": ("embedded", "embedded"),
            "lcm-of-itself": (str(tmp_path), str(tmp_path)),
        }.get(name.removesuffix("-no-features"), ("embedded", str(tmp_path)))
        counts = made.step_counts()
        drawn = recipe.sampling.steps if recipe.sampling else counts
        assert drawn and set(drawn) & set(bench.COUNTS), name
        assert bool(recipe.sampling) == (own["by"] == "blocks")
    assert SAID.keys() <= ablations.keys()


def test_an_ablation_is_trained_when_it_is_asked_for(tmp_path: Path, trained: list[str]) -> None:
    benchmark(tmp_path, ("sdxs-no-scores",))
    assert trained == ["sdxs-no-scores"]
    with pytest.raises(EdgeflashError, match=r"did you mean 'sdxs-no-scores'\?"):
        benchmark(tmp_path, ("sdxs-no-score",))


@pytest.mark.slow
@pytest.mark.parametrize("name", bench._ablations())
def test_ablations_train(name: str, tmp_path: Path) -> None:
    """Two steps of small networks, as many parts of the loss as are left."""
    own = bench._ablations()[name]
    options = {k: v for k, v in own.items() if k not in ("teacher", "base")}
    small = {"steps": 2, "batch_size": 2, "warmup_steps": 0}
    small |= {"rule": "small"} if own["by"] == "blocks" else {}  # base leaves as much as there is
    sampling = {"steps": [1], "default_steps": 1} if own["by"] == "blocks" else None
    recipe = small_recipe(tmp_path, stage=[options | small], sampling=sampling)
    (told,) = read_json(distill(recipe, tmp_path / "student") / "edgeflash.json")["lineage"][
        "stages"
    ]
    gone = {
        "imagine-no-critic": "critic/critic",
        "add-critic-alone": "student/distillation",
        "add-teacher-alone": "critic/hinge",
        "flash-no-critic": "critic/critic",
        "sdxs-no-scores": "student/scores",
    }
    assert gone.get(name, "-") not in told and told["steps"] == 2
    assert told["samples_per_s"] > 0 < told["peak_rss_mib"]


def test_a_method_without_options_is_told(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match=r"'lmc'.*did you mean 'lcm'\?"):
        benchmark(tmp_path, ("lmc",))
    assert not any(tmp_path.iterdir())


def test_steps_are_those_that_fit_into_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 steps in 15 s: 40 in a third of a minute; asked again, they are not measured again."""
    asked: list[int] = []

    manifest = SimpleNamespace(lineage=SimpleNamespace(seconds=15.0))

    def train(recipe: Recipe, *_: Any) -> None:
        asked.append(recipe.stage[0].options["steps"])

    monkeypatch.setattr(bench, "_train", train)
    monkeypatch.setattr(bench.Student, "open", lambda _: SimpleNamespace(manifest=manifest))
    (tmp_path / "students").mkdir()
    for _ in range(2):
        assert bench._fitting("lcm", {}, tmp_path / "start", tmp_path, 1 / 3) == 40
    assert asked == [bench.PROBE_STEPS]
