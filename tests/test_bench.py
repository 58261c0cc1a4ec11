"""The bench: what it measures, what it writes, and how it tells of trouble."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import tiny

from edgeflash.bundle import Bundle
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine
from edgeflash.report import Conditions, read_report
from edgeflash.runtimes import bench
from edgeflash.runtimes.measure import Job, measure
from edgeflash.runtimes.on_coreml import CoreMlRuntime
from edgeflash.runtimes.on_onnx import OnnxRuntime
from edgeflash.runtimes.pipeline import Request, TextToImage


def job(folder: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {"runtime": "onnx", "options": {"provider": "cpu", "threads": 1}}
    fields |= {"prompts": ("a red star", "blue ring"), "runs": 3, "warmup_runs": 1}
    return Job(bundle=str(folder), **fields | changes)


def test_bench_writes_figures_pictures_and_a_page(tmp_path: Path) -> None:
    folder, out, ballast = tiny(tmp_path / "b"), tmp_path / "out", np.ones(50_000_000)
    told: list[tuple[int, int]] = []
    made = bench.bench(job(folder, batch=3), out, tell=lambda name, i, n: told.append((i, n)))
    assert read_report(out) == made and told == [(i, 7) for i in range(1, 8)]
    (found,) = made.systems
    assert found.name == "tiny fp32, 3 steps on onnx" and found.steps == 3
    assert found.extra == {"precision": "fp32"}
    assert list(found.stages) == ["text_encoder", "unet", "vae_decoder"]
    assert found.conditions == Conditions(
        runtime="onnx",
        options={"provider": "cpu", "threads": 1},
        height=8,
        width=8,
        batch=3,
        warmup_runs=1,
        runs=3,
    )
    parts = found.stages["text_encoder"].p50_ms + 3 * found.stages["unet"].p50_ms
    assert 0 < parts < found.latency_ms_p90
    assert found.images_per_s == pytest.approx(3000 / found.latency_ms_p50)
    assert found.cold_load_ms and found.warm_load_ms and found.cold_load_ms > found.warm_load_ms
    assert found.size_mib == pytest.approx(Bundle.open(folder).bytes / 2**20)
    assert found.peak_rss_mib and 20 < found.peak_rss_mib < ballast.nbytes / 2**20  # not ours
    pictures = [np.array(Image.open(out / name)) for name in found.images]
    assert [p.shape for p in pictures] == [(8, 8, 3)] * 2
    alone = TextToImage(Bundle.open(folder), OnnxRuntime()).generate(Request("blue ring"))
    np.testing.assert_array_equal(pictures[1], alone.images[0])
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 2


def test_each_sample_is_a_counted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OnnxRuntime.open

    def slowly(self: OnnxRuntime, *where: Any) -> Any:
        time.sleep(0.03)
        return opened(self, *where)

    monkeypatch.setattr(OnnxRuntime, "open", slowly)
    found = measure(job(tiny(tmp_path / "b")), lambda *_: None)
    assert len(found.runs_ms) == 3 and found.first_image_ms not in found.runs_ms
    assert {stage: len(samples) for stage, samples in found.stages_ms.items()} == {
        "text_encoder": 3,
        "unet": 9,
        "vae_decoder": 3,
    }
    assert found.cold_load_ms and found.cold_load_ms > 90  # all three components
    assert found.warm_load_ms and found.warm_load_ms > 90


def test_drawing_goes_on_without_a_pause(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = bench.bench(job(tiny(tmp_path / "b"), minutes=0.01), out, tell=lambda *_: None)
    (found,) = made.systems
    assert found.sustained and found.sustained.ended_s[-1] == pytest.approx(0.6, abs=0.3)
    assert found.conditions.minutes == 0.01
    assert "Without a pause" in (out / "report.html").read_text()
    manifest = (tmp_path / "b" / MANIFEST).read_bytes()
    assert found.manifest_sha256 == hashlib.sha256(manifest).hexdigest()


def test_bench_takes_several_step_counts_and_low_memory(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b")
    manifest = json.loads((folder / "edgeflash.json").read_text())
    one = dict(manifest["schedules"]["3"], entries=[])
    manifest["schedules"]["1"] = one | {"steps": one["steps"][:1]}
    (folder / "edgeflash.json").write_text(json.dumps(manifest))
    frugal = job(folder, low_memory=True, runs=1)
    made = bench.bench(frugal, tmp_path / "out", steps=(1, 3), tell=lambda *_: None)
    assert [s.steps for s in made.systems] == [1, 3]
    assert [s.name for s in made.systems] == [
        "tiny fp32, 1 step on onnx",
        "tiny fp32, 3 steps on onnx",
    ]
    assert all(s.cold_load_ms is None and s.conditions.low_memory for s in made.systems)
    assert made.systems[0].images[0] != made.systems[1].images[0]


def test_what_goes_wrong_in_the_measured_process_is_told(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b")
    with pytest.raises(EdgeflashError, match="cannot draw in 9 steps: its schedules are for 3"):
        bench.run_apart(job(folder, steps=9), lambda *_: None)
    with pytest.raises(
        EdgeflashError, match=r"json/images/0\.png: not written \(Not a directory\)"
    ):
        bench.run_apart(job(folder, images=str(folder / "edgeflash.json/images")), lambda *_: None)
    with pytest.raises(EdgeflashError, match=r"ended with code 1: ValueError: embedded null"):
        bench.run_apart(job(folder, images="\0"), lambda *_: None)
    assert "out of memory" in bench._why(-9, "")
    with pytest.raises(RuntimeError, match="stop"):
        bench.run_apart(
            job(folder, runs=10_000), lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
        )


def test_what_a_vendor_prints_is_no_message() -> None:
    told: list[tuple[int, int]] = []
    noise = ["{a brace\n", '{"level": "warning"}\n', "[1]\n", "\n"]
    lines = [*noise, '{"done": 1, "of": 2}\n', *noise]
    assert bench._listen(lines, lambda *progress: told.append(progress)) is None
    assert told == [(1, 2)]
    with pytest.raises(EdgeflashError, match="no such runtime"):
        bench._listen([*noise, '{"error": "no such runtime"}\n'], lambda *_: None)


def test_what_can_be_refused_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, told = tiny(tmp_path / "b"), tmp_path / "out", []

    def refusal(**changes: Any) -> str:
        steps = changes.pop("steps", (3,))
        with pytest.raises(EdgeflashError) as caught:
            bench.bench(job(folder, **changes), out, steps=steps, tell=lambda *t: told.append(t))
        return str(caught.value)

    assert "cannot draw in 9 steps: its schedules are for 3" in refusal(steps=(3, 9))
    assert "cannot take the guidance scale 3" in refusal(guidance=3.0)
    unet = folder / "unet/model.onnx"
    unet.write_bytes(b"x" * unet.stat().st_size)
    assert "unet/model.onnx: altered: sha256 expected" in refusal()
    monkeypatch.setattr("edgeflash.bundle.QUICK_BYTES", 0)  # as large bundles are looked at
    assert "ONNX Runtime does not load it" in refusal()
    assert not told and not out.exists()
    out.write_text("a person's own")
    assert "out: is a file; choose another --out" in refusal()


def test_times_of_an_evaluator_are_told_to_be_no_device_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    bundle, here = Bundle.open(tiny(tmp_path / "b")), Machine.here()
    for units, told in (("auto", True), ("evaluator", True), ("cpu", False)):
        notes = bench._notes(bundle, CoreMlRuntime(units=units), here, ())
        assert any("times are those of no device" in note for note in notes) is told


def test_the_report_tells_of_prompts_that_were_cut(tmp_path: Path) -> None:
    folder, out = tiny(tmp_path / "b"), tmp_path / "out"
    prompts = ("a red star", "a red star blue ring")
    made = bench.bench(job(folder, prompts=prompts, runs=1), out, tell=lambda *_: None)
    said = "Prompts longer than this bundle reads: 1; not seen of the first: 'blue ring'."
    assert said in made.notes
    made = bench.bench(job(folder, prompts=prompts[:1], runs=1), out, tell=lambda *_: None)
    assert not any("Prompts" in note for note in made.notes)
