"""`--precision auto`: what is kept has earned its place, and the bundle says so."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exported import QUIET
from rich.console import Console
from tiny_bundle import tiny

from edgeflash import choice
from edgeflash.bundle import Bundle, Figure, describe_file
from edgeflash.choice import (
    Candidate,
    choice_table,
    export_best,
    judged,
    plain,
    precisions,
    suited,
)
from edgeflash.elsewhere import Elsewhere
from edgeflash.errors import EdgeflashError, Stopped
from edgeflash.export.line import export_student
from edgeflash.export.pack import write_manifest
from edgeflash.export_options import ExportOptions
from edgeflash.floors import floor_of
from edgeflash.machine import Machine
from edgeflash.report import Report, System
from edgeflash.roles import Target
from edgeflash.runtimes import bench
from edgeflash.student import Student

WHOLE = Candidate(name="fp32", mib=20.0, latency_ms=20.0, image_db=99.0)


def candidate(name: str, mib: float, ms: float) -> Candidate:
    return Candidate(name=name, mib=mib, latency_ms=ms)


def kept(*others: Candidate, prefer: str = "speed") -> str:
    found = judged((WHOLE, *others), prefer)
    names = [each.name for each in found if each.kept]
    assert len(names) == 1 and len(found) == 1 + len(others)
    assert all(each.kept or each.why for each in found), "what is rejected says why"
    return names[0]


def test_the_float_one_stays_where_nothing_is_better_by_more_than_chance() -> None:
    assert kept(candidate("int8", 5, 12), candidate("int4-weights", 4, 22)) == "int8"
    assert kept(candidate("int8", 5, 19.5), candidate("int4-weights", 4, 22)) == "fp32"
    assert kept(candidate("int8", 5, 12), candidate("int4", 4, 22), prefer="size") == "int4"
    assert kept(candidate("int8", 20, 12), prefer="size") == "fp32"
    assert kept() == "fp32"
    refused = Candidate(name="int4", why="rung L4, pipeline: psnr_db 12 misses its floor 20")
    assert kept(refused) == kept(refused, prefer="size") == "fp32"
    broken = Candidate(name="int8", mib=5.0, why="does not run here: no such operator")
    assert kept(broken, prefer="size") == "fp32"
    near = judged((WHOLE, candidate("int8", 5, 19.5)), "speed")
    assert near[1].why == "19.5 ms, where fp32 has 20.0: not better by 5 %"
    found = judged((WHOLE, candidate("int8", 5, 12), refused), "speed")
    assert found[0].why == "20.0 ms, where int8 has 12.0" and found[2].why == refused.why
    with pytest.raises(EdgeflashError, match="--precision auto: fp32: no such thing"):
        judged((Candidate(name="fp32", why="no such thing"), candidate("int8", 5, 12)), "speed")


TIMES = {"fp32": 20.0, "int8": 10.0, "int8-weights": 19.0, "int4-weights": 1.0}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the measured process: as long as the precision of the UNet is given."""

    def run(job: Any, tell: Any) -> Any:
        took = TIMES[Bundle.open(job.bundle).component("unet").precision]
        return SimpleNamespace(runs_ms=(took, took * 3, took))

    monkeypatch.setattr("edgeflash.runtimes.bench.run_apart", run)
    monkeypatch.setattr(choice, "precisions", lambda to: tuple(TIMES))


def lower(target: Target, folder: Path) -> Bundle:
    """A small bundle that says it has the target's precision; one is below its floor."""
    if target.precision == "int4-weights":
        raise EdgeflashError(f"{folder}: rung L4, pipeline: psnr_db 12 misses its floor 18")
    bundle = Bundle.open(tiny(folder))
    parts = [
        c.model_copy(update={"precision": target.precision}) for c in bundle.manifest.components
    ]
    write_manifest(bundle.manifest.model_copy(update={"components": tuple(parts)}), folder)
    return Bundle.open(folder)


@pytest.mark.usefixtures("timed")
def test_the_bundle_that_is_kept_says_what_was_tried(tmp_path: Path) -> None:
    out = tmp_path / "deep/bundle"
    made = export_best("onnx", {}, lower, out, "speed", QUIET)
    opened = Bundle.open(out, check="sha256")
    assert opened.component("unet").precision == "int8"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    text = (out / "choice.json").read_text()
    told = json.loads(text)["candidates"]
    assert "choice.json" in {file.path for file in opened.manifest.files}
    assert [each["name"] for each in told if each["kept"]] == ["int8"]
    assert told[3]["why"] == "rung L4, pipeline: psnr_db 12 misses its floor 18"
    assert str(tmp_path) not in text, "no path of this machine"
    assert choice.Choice.model_validate_json(text) == made
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(choice_table(made))
    assert "19.0 ms, where int8 has 10.0" in console.export_text()


@pytest.mark.usefixtures("timed", "replay")
def test_precisions_share_what_does_not_depend_on_them(
    one_step_student: Path, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loop for all of them, and the text encoder in halves once, though int8 calibrates."""
    monkeypatch.setattr(choice, "precisions", lambda to: ("fp32", "fp16", "int8"))
    monkeypatch.setitem(TIMES, "fp16", 15.0)
    asked, student = ExportOptions(record_all=True), Student.open(one_step_student)
    lower = partial(export_student, student, options=asked, console=QUIET, lasting=False)
    export_best("onnx", {}, lower, tmp_path / "bundle", "speed", QUIET)
    parts = ("text_encoder", "unet", "vae_decoder")
    both = [f"{stage}-{part}" for part in parts for stage in ("record", "lower")]
    lowered = [f"lower-{part}" for part in parts]
    assert begun == [*both, "verify", *lowered, "verify", *lowered[1:], "verify"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_mistakes_are_told_before_the_work(tmp_path: Path) -> None:
    def never(target: Target, folder: Path) -> Bundle:
        raise AssertionError

    best = partial(export_best, "onnx", {}, never)
    with pytest.raises(EdgeflashError, match=r"no --prefer 'sped' .*did you mean 'speed'\?"):
        best(tmp_path / "b", "sped", QUIET)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/diary").write_text("mine")
    with pytest.raises(EdgeflashError, match="holds something else"):
        best(tmp_path / "b", "speed", QUIET)
    with pytest.raises(EdgeflashError, match="leave --set precision out"):
        export_best("onnx", {"precision": "int8"}, never, tmp_path / "c", "speed", QUIET)
    with pytest.raises(EdgeflashError, match=r"would replace .*, which it is made from"):
        best(tmp_path / "c", "speed", QUIET, tmp_path / "c/student")
    assert precisions("onnx")[0] == "fp32" and "int8-weights" in precisions("onnx")


@pytest.mark.usefixtures("timed")
def test_an_interruption_is_no_refusal(tmp_path: Path) -> None:
    def cut_off(target: Target, folder: Path) -> Bundle:
        if target.precision == "int8":
            raise Stopped("interrupted")
        return lower(target, folder)

    with pytest.raises(Stopped, match="interrupted"):
        export_best("onnx", {}, cut_off, tmp_path / "b", "speed", QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("timed")
def test_what_is_timed_with_options_climbs_the_ladder_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float ones of OpenVINO do in bfloat16 sums, whose floor is theirs then."""
    found_db, jobs, run = {"fp32": 40.0, "int8": 12.0}, list[Any](), bench.run_apart

    def noted(job: Any, tell: Any) -> Any:
        jobs.append(job)
        return run(job, tell)

    def climb(bundle: Bundle, runtime: Any, floors: Any, *, usual: Any) -> tuple[Figure, ...]:
        assert runtime.inference_precision == "bf16" and runtime.threads == 2
        precision = bundle.component("unet").precision
        floor = floor_of(floors, precision, "L4", "psnr_db")
        floor = floor or floor_of(usual, precision, "L4", "psnr_db") or 25
        told = {"rung": "L4", "component": "pipeline", "metric": "psnr_db", "floor": floor}
        return (Figure.model_validate(told | {"value": found_db[precision]}),)

    monkeypatch.setattr(bench, "run_apart", noted)
    monkeypatch.setattr("edgeflash.verify.verify", climb)
    monkeypatch.setattr("edgeflash.shelf.opener", lambda target: "openvino")
    monkeypatch.setattr(choice, "precisions", lambda to: tuple(found_db))
    options = {"inference_precision": "bf16", "threads": 2}
    best = partial(export_best, "onnx", {}, lower, tmp_path / "b", "speed", QUIET)
    made = best(timed_with=options)
    assert made.options == options and all(job.options == options for job in jobs) and jobs
    assert [(each.kept, each.image_db) for each in made.candidates] == [(True, 40), (False, 12)]
    assert made.candidates[1].why.startswith("inference_precision=bf16, threads=2: rung L4")
    with pytest.raises(EdgeflashError, match=r"fp32: .* psnr_db 40 misses its floor 41"):
        best(timed_with=options, floors={"psnr_db": 41.0})
    with pytest.raises(EdgeflashError, match="did you mean 'threads'"):
        best(timed_with={"thread": 2})


def test_an_evaluator_s_speed_earns_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core ML off a Mac; its sizes are real all the same."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(choice, "precisions", lambda to: ("fp32", "int8"))
    lowered: list[str] = []

    def smaller(target: Target, folder: Path) -> Bundle:
        lowered.append(target.precision)
        bundle = lower(target, folder)
        if target.precision == "int8":
            return bundle
        (folder / "more.bin").write_bytes(bytes(2**20))
        files = (*bundle.manifest.files, describe_file(folder, "more.bin"))
        write_manifest(bundle.manifest.model_copy(update={"files": files}), folder)
        return Bundle.open(folder)

    with pytest.raises(EdgeflashError, match=r"evaluator in numpy.* or choose --prefer size"):
        export_best("coreml", {}, smaller, tmp_path / "b", "speed", QUIET)
    assert not lowered, "told before the work"
    made = export_best("coreml", {}, smaller, tmp_path / "b", "size", QUIET)
    assert [each.kept for each in made.candidates] == [False, True]
    assert all(each.latency_ms is None for each in made.candidates)


def benched(folder: Path, precision: str, ms: float, **changes: Any) -> Path:
    """A report of a device, as bench writes one there of `lower`'s bundle."""
    unet = Bundle.open(tiny(folder / "bundle")).component("unet")
    mib = sum(file.bytes for file in unet.files) / 2**20
    conditions = {"runtime": "onnx", "device": "cpu", "height": 8, "width": 8, "runs": 10}
    found = {
        "name": f"tiny {precision}",
        "steps": 3,
        "latency_ms_p50": ms,
        "latency_ms_p90": ms,
        "size_mib": 1.0,
        "sizes_mib": {"unet": changes.pop("mib", mib)},
        "conditions": conditions | changes.pop("conditions", {}),
        "extra": {"precision": precision},
    }
    device = changes.pop("machine", PHONE)
    system = System.model_validate(found | changes)
    Report(title="there", machine=device, systems=(system,)).save(folder / "report.json")
    return folder


PHONE = Machine(cpu="of a phone", cores=8, ram_mib=4096, os="Android", python="3.11")


def test_times_of_a_device_decide_where_its_report_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(bench, "run_apart", never)
    monkeypatch.setattr(choice, "precisions", lambda to: tuple(TIMES))
    options = {"options": {"threads": 4}}
    times = {"fp32": 20.0, "int8": 30.0, "int8-weights": 11.0}
    paths = [benched(tmp_path / n, n, ms, conditions=options) for n, ms in times.items()]
    report = Elsewhere.read(paths, "onnx")
    made = export_best("onnx", {}, lower, tmp_path / "b", "speed", QUIET, report=report)
    assert [each.latency_ms for each in made.candidates] == [20, 30, 11, None]
    assert [each.kept for each in made.candidates] == [False, False, True, False]
    assert made.candidates[3].why == "the report has no time of it"
    assert made.machine["cpu"] == "of a phone" and made.options == {"threads": 4}
    assert Bundle.open(tmp_path / "b").component("unet").precision == "int8-weights"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4}, r"int8 has 0 figures of 3 steps \(there are: 4\)"),
        ({"machine": PHONE.model_copy(update={"cores": 2})}, "machine cores: 8 against 2"),
        ({"conditions": {"device": "gpu"}}, "not measured as fp32 was .device: cpu against gpu"),
        ({"mib": 9.0}, r"tiny int8 is something else \(unet of 9.00 MiB, here 0.00\)"),
    ],
)
def test_a_report_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(choice, "precisions", lambda to: ("fp32", "int8"))
    paths = [benched(tmp_path / "a", "fp32", 20), benched(tmp_path / "i", "int8", 9, **changes)]
    report = Elsewhere.read(paths, "onnx")
    with pytest.raises(EdgeflashError, match=said):
        export_best("onnx", {}, lower, tmp_path / "b", "speed", QUIET, report=report)
    assert not (tmp_path / "b").exists()


def test_a_report_of_no_device_is_refused(tmp_path: Path) -> None:
    evaluated = {"runtime": "coreml", "device": "numpy"}
    path = benched(tmp_path / "a", "fp32", 20, conditions=evaluated)
    for to in ("coreml", "onnx"):
        with pytest.raises(EdgeflashError, match=f"no --to {to} was measured there on a device"):
            Elsewhere.read([path], to)
    mac = benched(tmp_path / "m", "fp32", 20, conditions=evaluated | {"device": "Core ML ALL"})
    assert "fp32" in Elsewhere.read([mac], "coreml")


def test_a_float_bundle_that_does_not_run_here_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: Any, tell: Any) -> Any:
        raise EdgeflashError("no GPU")

    monkeypatch.setattr("edgeflash.runtimes.bench.run_apart", fails)
    monkeypatch.setattr(choice, "precisions", lambda to: ("fp32",))

    with pytest.raises(EdgeflashError, match="fp32: does not run here: no GPU"):
        export_best("onnx", {}, lower, tmp_path / "b", "speed", QUIET)
    assert not list(tmp_path.iterdir())


def test_auto_takes_options_that_one_of_its_precisions_heeds() -> None:
    """The others do without, as `export_best` sees to."""
    assert plain("onnx", {"activations": "int8", "keep": ["unet/conv_in"]}).precision == "fp32"
    for options, line in (
        ({"activations": "int9"}, r"activations = 'int9': must be one of"),
        ({"rests": "fp16"}, r"did you mean 'rest'\?"),
    ):
        with pytest.raises(EdgeflashError, match=line):
            plain("onnx", options)


def test_what_suits_a_device_does_something_at_the_precision() -> None:
    """Jetsons want symmetric activations: of what is quantized."""
    assert suited("onnx", "jetson-orin", {}, auto=False) == {"precision": "fp32"}
    quantized = {"precision": "int8"}
    told = {"activations": "int8"}
    assert suited("onnx", "jetson-orin", quantized, auto=False) == quantized | told
    assert suited("onnx", "jetson-orin", {}, auto=True) == told
    assert suited("onnx", "jetson-orin", {"activations": "uint8"}, auto=True) != told
