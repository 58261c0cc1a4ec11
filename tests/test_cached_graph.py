"""A second graph of the denoiser over hand-made ONNX networks: who runs it, and what it gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError
from rich.console import Console
from tiny_bundle import ENTRY, ROWS, Spy, mean_of, tiny

from edgeflash import manifest, noise
from edgeflash.bundle import Bundle, Manifest, describe_file
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.inspect import tell
from edgeflash.report import Percentiles
from edgeflash.runtimes.bench import _calls
from edgeflash.runtimes.lint import _shapes, look
from edgeflash.runtimes.measure import Measured
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Entry, Schedule, Step

GRAPHS = (None, "cached", "cached")
CACHED_ROWS: Any = tuple(
    row | ({"graph": graph} if graph else {}) for row, graph in zip(ROWS, GRAPHS, strict=True)
)
CFG = {"kind": "cfg", "scale": 3.0}


def with_cached(folder: Path, *, gated: bool = False, **options: Any) -> Path:
    """A tiny bundle whose UNet leaves k = sample / 2 + mean(conditioning), for a cached graph.

    That gives sample / 4 + k + timestep / 1000.
    """
    tiny(folder, rows=CACHED_ROWS, **options)
    path, shape = folder / "unet/model.onnx", ["n", 4, 4, 4]
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("v1", TensorProto.FLOAT, shape))
    onnx.save(model, path)
    nodes = [
        helper.make_node("Mul", ["sample", "quarter"], ["x4"]),
        helper.make_node("Mul", ["timestep", "milli"], ["tm"]),
        helper.make_node("Add", ["x4", "cache"], ["sum"]),
        helper.make_node("Add", ["sum", "tm"], ["out_sample"]),
    ]
    given = {"sample": shape, "cache": shape, "timestep": []}
    values = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in given.items()]
    out = [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)]
    numbers = {"quarter": np.float32(0.25), "milli": np.float32(1e-3)}
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in numbers.items()]
    graph = helper.make_graph(nodes, "cached", values, out, constants)
    home = folder / "unet_cached/model.onnx"
    home.parent.mkdir()
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), home)
    roles = {"sample": "sample", "cache": "cache.0", "timestep": "timestep"}
    manifest = json.loads((folder / MANIFEST).read_text())
    text, unet, *others = manifest["components"]
    unet["outputs"].append({"name": "v1", "role": "cache.0", "shape": shape, "dtype": "float32"})
    unet["files"] = [describe_file(folder, "unet/model.onnx").model_dump()]
    cached = unet | {
        "name": "unet_cached",
        "files": [describe_file(folder, "unet_cached/model.onnx").model_dump()],
        "inputs": [
            {"name": k, "role": roles[k], "shape": v, "dtype": "float32"} for k, v in given.items()
        ],
        "outputs": unet["outputs"][:1],
    }
    method = {"method": "t-gate", "gate": 1} if gated else {"method": "deep-cache", "interval": 3}
    manifest |= {
        "format_version": 2,
        "components": [text, unet, cached, *others],
        "caching": method | {"image_psnr_db": 30.0},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def expected(seed: int, prompt: str, *, guided: float = 1, gated: bool = False) -> Any:
    """The loop in float64, each call written out."""
    draw = [noise.randn((4, 4, 4), seed, k).astype(np.float64) for k in range(4)]
    x, before, kept = 1.5 * draw[0], (0.0, 0.0), np.zeros(2)
    for i, row in enumerate(ROWS):
        seen, outputs = row["in_scale"] * x, []
        means = [mean_of(""), mean_of(prompt)]
        if i == 0:
            kept = np.array([seen / 2 + mean for mean in means])
            outputs = [k + row["t"] / 1000 for k in kept]
        elif gated:
            outputs = [seen / 4 + kept.mean(0) + row["t"] / 1000] * 2
        else:
            outputs = [seen / 4 + k + row["t"] / 1000 for k in kept]
        output = outputs[0] + guided * (outputs[1] - outputs[0])
        after = row["a"] * x + row["b"] * output + row.get("c", 0) * draw[i + 1]
        after = after + row.get("d", 0) * before[1] + row.get("e", 0) * before[0]
        x, before = after, (x, output)
    return x


@pytest.mark.parametrize("gated", [False, True], ids=["deep-cache", "t-gate"])
def test_rows_take_what_the_last_whole_row_left_guided_or_not(tmp_path: Path, gated: bool) -> None:
    folder, spy = with_cached(tmp_path / "b", gated=gated, guidance=CFG), Spy(provider="cpu")
    with TextToImage(Bundle.open(folder), spy) as pipeline:
        prompts = ("a red star", "blue ring")
        events = list(pipeline.stream(Request(prompts, seed=7)))
        found = events[-1].latent
        assert found is not None
        for j, prompt in enumerate(prompts):
            wanted = expected(7 + j, prompt, guided=3.0, gated=gated)
            np.testing.assert_allclose(found[j], wanted, rtol=0, atol=3e-6)
        stages = [event.stage for event in events]
        assert stages == ["text_encoder", "unet", "unet_cached", "unet_cached", "vae_decoder"]
        first, second = spy.calls("unet_cached")
        assert len(first["sample"]) == (2 if gated else 4)
        assert np.shares_memory(first["cache"], second["cache"]), "nobody copies it"


def test_an_unguided_request_of_a_gated_bundle_joins_nothing(tmp_path: Path) -> None:
    folder = with_cached(tmp_path / "b", gated=True, guidance=CFG)
    with TextToImage(Bundle.open(folder), Spy(provider="cpu")) as pipeline:
        found = pipeline.generate(Request("a red star", seed=2, guidance=1)).latent
    np.testing.assert_allclose(found[0], expected(2, "a red star"), rtol=0, atol=2e-6)


def test_low_memory_closes_each_graph_behind_its_last_row(tmp_path: Path) -> None:
    spy = Spy(provider="cpu")
    pipeline = TextToImage(Bundle.open(with_cached(tmp_path / "b")), spy, low_memory=True)
    pipeline.generate(Request("a red star"))
    life = [what for what in spy.life() if "unet" in what]
    assert life == ["open unet", "close unet", "open unet_cached", "close unet_cached"]
    assert spy.life()[-1] == "close vae_decoder"


def test_closing_early_leaves_no_graph_open(tmp_path: Path) -> None:
    spy = Spy(provider="cpu")
    pipeline = TextToImage(Bundle.open(with_cached(tmp_path / "b")), spy, low_memory=True)
    stream = pipeline.stream(Request("a red star"))
    while next(stream).stage != "unet_cached":
        pass
    stream.close()
    assert spy.life()[-1] == "close unet_cached"


def test_image_to_image_runs_the_whole_network_where_it_enters() -> None:
    entries = (Entry(start=2, p=1, q=1), Entry.model_validate(ENTRY))
    steps = tuple(Step.model_validate(row) for row in CACHED_ROWS)
    table = Schedule(sampler="s", prediction="epsilon", init=1, steps=steps, entries=entries)
    assert [row.graph for row in table.rows(table.entries[0])] == [None]
    assert [row.graph for row in table.rows(table.entries[1])] == [None, "cached"]
    assert table.rows(table.entries[0])[0].t == ROWS[2]["t"]


def test_schedules_tell_of_graphs_only_where_there_are_some() -> None:
    plain = Step(t=1, in_scale=1, a=1, b=1)
    assert "graph" not in plain.model_dump() and "graph" not in plain.model_dump_json()
    cached = plain.model_copy(update={"graph": "cached"})
    table = Schedule(sampler="s", prediction="epsilon", init=1, steps=(plain, cached))
    assert Schedule.model_validate_json(table.model_dump_json()) == table
    with pytest.raises(ValidationError, match="no step before it has cached"):
        Schedule(sampler="s", prediction="epsilon", init=1, steps=(cached, plain))


def test_an_older_reader_asks_for_a_newer_edgeflash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_cached(tmp_path / "b")
    assert Manifest.model_fields["format_version"].default == 1, "others stay readable"
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 1)
    with pytest.raises(EdgeflashError, match="format 2 is newer than this edgeflash reads"):
        Bundle.open(folder)


def test_graphs_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = with_cached(tmp_path / "b")
    manifest = json.loads((folder / MANIFEST).read_text())
    for change, said in (
        (lambda m: m["components"].pop(2), "rows run a cached graph, but components has none"),
        (lambda m: m["components"][1]["outputs"].pop(), r"takes \[4, 4, 4\], but .*leaves \[\]"),
        (
            lambda m: m["components"][2]["inputs"][0].update(role="depth"),
            "'depth' is not known here",
        ),
    ):
        altered = json.loads(json.dumps(manifest))
        change(altered)
        (folder / MANIFEST).write_text(json.dumps(altered))
        with pytest.raises(EdgeflashError, match=said):
            TextToImage(Bundle.open(folder), Spy(provider="cpu"))


def test_lint_counts_the_graphs_together_where_they_take_turns(tmp_path: Path) -> None:
    for gated in (False, True):
        _, whole, cached, _ = look(Bundle.open(with_cached(tmp_path / str(gated), gated=gated)))
        assert cached.weight_bytes > 0
        assert whole.beside_bytes == (0 if gated else cached.weight_bytes)
        assert whole.bytes == whole.weight_bytes + whole.beside_bytes + whole.peak.bytes


def test_lint_counts_both_rows_of_guided_graphs(tmp_path: Path) -> None:
    for gated, rows in ((False, 2), (True, 1)):
        bundle = Bundle.open(with_cached(tmp_path / str(gated), gated=gated, guidance=CFG))
        found = [
            _shapes(each, bundle.manifest) for each in (bundle.denoiser, bundle.cached) if each
        ]
        assert [shapes["sample"][0] for shapes in found] == [2, rows]


def test_what_there_is_is_told(tmp_path: Path) -> None:

    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))
    console.print(tell(with_cached(tmp_path / "b")))
    said = console.export_text()
    assert "deep-cache" in said and "30 dB from the student" in said and "unet_cached" in said


def test_reports_count_the_calls_of_both_graphs() -> None:
    times = {"unet": (4.0,) * 6, "unet_cached": (1.0,) * 4, "vae_decoder": (2.0,) * 2}
    measured = Measured(
        device="cpu",
        options={},
        steps=5,
        guidance_scale=1,
        height=8,
        width=8,
        cold_load_ms=None,
        first_image_ms=1,
        warm_load_ms=None,
        runs_ms=(20.0, 20.0),
        stages_ms=times,
        peak_rss_mib=None,
        images=(),
    )
    assert _calls(measured) == {"unet": 3, "unet_cached": 2, "vae_decoder": 1}
    assert Percentiles.of(times["unet"]).p50_ms == 4
