"""The TensorRT runtime on a simulated GPU: memory, streams, rows, engines that are kept.

What it calls is simulated: that the real GPU does as the simulated one, this cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import QUIET, Exported
from simulated_gpu import TensorRt, simulate

from edgeflash import shelf
from edgeflash.bundle import Bundle, Component, Engine, File, describe_file
from edgeflash.cli import main
from edgeflash.engine import shape_of
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student
from edgeflash.export.pack import write_manifest
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.engine_cache import folder_of
from edgeflash.runtimes.engine_choice import onnx_file
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.student import Student
from edgeflash.verify import runtime_for, verify

pytest.importorskip(
    "cuda.bindings", reason="cuda-python is not installed: pip install 'edgeflash[tensorrt]'"
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TensorRt]:
    """Plain TensorRT on a GPU, and nothing left on it afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trt = simulate(monkeypatch, "tensorrt")
    yield trt
    assert not trt.cuda.blocks and not trt.cuda.streams and not trt.cuda.graphs
    assert not trt.cuda.queue, "all was waited for"
    assert not trt.cuda.templates, "graphs are freed once they are instantiated"


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TensorRt:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trt = simulate(monkeypatch, "tensorrt_rtx")
    trt.__version__ = "1.7.0"
    trt.CudaGraphStrategy = type("Strategy", (), {"WHOLE_GRAPH_CAPTURE": 1})
    return trt


def on(**options: Any) -> Runtime:
    return shelf.make(Runtime, "tensorrt", options)


def typed(exported: Exported, name: str = "unet", **engine: Any) -> Component:
    """A component of an ONNX bundle, as `to_tensorrt` would have written it."""
    plan = Engine.model_validate({"vendor": "tensorrt", "rows": (1, 1, 1)} | engine)
    return exported.bundle.component(name).model_copy(update={"engine": plan})


def fed(component: Component, rows: int) -> dict[str, Any]:
    """Random inputs, a different one in each row."""
    draw = np.random.default_rng(rows)
    return {
        spec.name: np.asarray(draw.normal(size=shape_of(spec, rows)) * 10, spec.dtype)
        for spec in component.inputs
    }


def reference(exported: Exported, name: str, inputs: dict[str, Any]) -> Any:
    runtime = shelf.make(Runtime, "onnx", {"provider": "cpu"})
    return runtime.open(exported.bundle.folder, exported.bundle.component(name))(inputs)


@pytest.mark.usefixtures("replay")
def test_where_the_gpu_is_the_ladder_runs_on_it(
    one_step_student: Path, tmp_path: Path, plain: TensorRt
) -> None:
    student = Student.open(one_step_student)
    target = shelf.make(Target, "tensorrt", {"vendor": "tensorrt"})
    bundle = export_student(student, target, tmp_path / "out", console=QUIET)
    assert bundle.manifest.unproven is None
    assert all(figure.passed for figure in bundle.manifest.parity)
    assert len(plain.builds) == 3 and plain.cuda.uploads
    verify(bundle)
    assert len(plain.builds) == 3, "engines are kept"
    figure = next(f for f in bundle.manifest.parity if (f.rung, f.metric) == ("L4", "psnr_db"))
    assert figure.floor == 80 and figure.value > 100


def test_onnx_bundles_run_too(guided: Exported, plain: TensorRt) -> None:
    pictures = []
    for runtime in (on(), runtime_for(guided.bundle)):
        with TextToImage(guided.bundle, runtime) as pipeline:
            pictures.append(pipeline.generate(Request(("a red star", "blue ring"), seed=5)))
    assert psnr_db(pictures[1].latent, pictures[0].latent) > 100
    assert pipeline.device == "cpu" and plain.builds


@pytest.mark.parametrize("rows", [(1, 1, 1), (2, 2, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_any_number_of_rows_runs_in_turns(
    rows: tuple[int, int, int], n: int, guided: Exported, plain: TensorRt
) -> None:
    component = typed(guided, rows=rows)
    inputs = fed(component, n)
    session = on().open(guided.bundle.folder, component)
    found = session(inputs)
    wanted = reference(guided, "unet", inputs)
    np.testing.assert_allclose(found["out_sample"], wanted["out_sample"], atol=1e-5)
    session.close()
    assert sum(len(config.profile) for config in plain.builds) == 2 * (rows[0] != rows[2])


def test_what_cannot_have_changed_is_copied_once(guided: Exported, plain: TensorRt) -> None:
    component = typed(guided)
    session = on().open(guided.bundle.folder, component)
    inputs = fed(component, 1)
    inputs["encoder_hidden_states"].flags.writeable = False
    for _ in range(3):
        session(inputs)
    assert sorted(map(plain.cuda.uploads.count, set(plain.cuda.uploads))) == [1, 3, 3]
    other = fed(component, 1) | {"encoder_hidden_states": np.ones((1, 16, 32), np.float32)}
    np.testing.assert_allclose(
        session(other)["out_sample"], reference(guided, "unet", other)["out_sample"], atol=1e-5
    )
    session(inputs)
    assert sorted(map(plain.cuda.uploads.count, set(plain.cuda.uploads))) == [3, 5, 5]
    session.close()


def test_a_cuda_graph_is_captured_once_for_each_number_of_rows(
    guided: Exported, plain: TensorRt
) -> None:
    component = typed(guided, rows=(1, 1, 2))
    session = on(cuda_graph=True).open(guided.bundle.folder, component)
    cuda = plain.cuda
    for n, captures, launches in [(1, 0, 0), (1, 1, 1), (1, 1, 2), (2, 1, 2), (2, 2, 3), (1, 2, 3)]:
        inputs = fed(component, n)
        found = session(inputs)["out_sample"]
        np.testing.assert_allclose(
            found, reference(guided, "unet", inputs)["out_sample"], atol=1e-5
        )
        assert (cuda.captures, cuda.launches) == (captures, launches)
    session.close()


def test_the_flags_reach_the_builder(guided: Exported, plain: TensorRt) -> None:
    def flags(**options: Any) -> set[str]:
        on().build(guided.bundle.folder, typed(guided, "vae_decoder", **options))
        return plain.builds[-1].flags

    assert flags() == set(), "TF32 is on by default, and three digits off"
    assert flags(tf32=True) == {"TF32"}
    assert flags(refit=True, weight_streaming=True) == {"REFIT", "WEIGHT_STREAMING"}
    assert flags(version_compatible=True) == {"VERSION_COMPATIBLE"}
    flags(hardware="ampere_plus", optimization_level=5)
    config: Any = plain.builds[-1]
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert config.builder_optimization_level == 5
    with pytest.raises(EdgeflashError, match="no same_compute_capability: pip install -U tensorrt"):
        flags(hardware="same_capability")  # which the simulated one is too old for


# --- engines that are kept ------------------------------------------------------------------------


def test_an_engine_is_built_again_when_what_it_is_bound_to_changes(
    guided: Exported, plain: TensorRt, capsys: pytest.CaptureFixture[str]
) -> None:
    def builds(component: Component) -> int:
        before = len(plain.builds)
        on().open(guided.bundle.folder, component).close()
        return len(plain.builds) - before

    component = typed(guided)
    assert builds(component) == 1 and builds(component) == 0
    assert "unet: building an engine for tensorrt 10.13.0, Imaginary 9" in capsys.readouterr().err
    other = component.files[0].model_copy(update={"sha256": "0" * 64})
    assert builds(component.model_copy(update={"files": (other,)})) == 1
    assert builds(component.model_copy(update={"precision": "fp16"})) == 1
    assert builds(typed(guided, rows=(2, 2, 2))) == 1
    assert builds(typed(guided, tf32=True)) == 1
    assert "there is one for" in capsys.readouterr().err
    for name, value in [
        ("driver", 13010),
        ("capability", (8, 6)),
        ("name", "Imaginary 10"),
    ]:
        setattr(plain.cuda, name, value)
        assert builds(component) == 1, name
    plain.__version__ = "10.14.0"
    assert builds(component) == 1 and builds(component) == 0


def test_compatible_engines_stay(guided: Exported, plain: TensorRt) -> None:
    component = typed(guided, "vae_decoder", version_compatible=True, hardware="ampere_plus")
    on().build(guided.bundle.folder, component)
    plain.__version__, plain.cuda.capability, plain.cuda.name = "10.14.0", (8, 6), "Imaginary 10"
    assert "is there already" in on().build(guided.bundle.folder, component)
    plain.__version__ = "11.0.0"
    assert "built for" in on().build(guided.bundle.folder, component)


def test_where_nothing_may_be_built_it_says_what_there_was(
    guided: Exported, plain: TensorRt
) -> None:
    component, folder = typed(guided, "vae_decoder"), guided.bundle.folder
    plain.cuda.devices = 2
    with pytest.raises(EdgeflashError, match=r"no machine yet;.* --set gpu=1 --set cache_dir=x$"):
        on(build_at_load=False, gpu=1, cache_dir="x").open(folder, component)
    on().build(folder, component)
    plain.cuda.capability, plain.__version__ = (8, 6), "10.14.0"
    with pytest.raises(EdgeflashError) as caught:
        on(build_at_load=False).open(folder, component)
    assert str(caught.value) == (
        "vae_decoder: its engine was built for tensorrt 10.13.0, Imaginary 9, compute capability "
        "8.9, CUDA driver 13.0; this machine has tensorrt 10.14.0, Imaginary 9, compute "
        f"capability 8.6, CUDA driver 13.0: edgeflash build {folder} --on tensorrt"
    )


def with_engines(exported: Exported, rtx: TensorRt, tmp_path: Path) -> Bundle:
    """A bundle as `to_tensorrt` writes it ahead of time, of the decoder alone."""
    component = typed(exported, "vae_decoder", vendor="tensorrt_rtx")
    on().open(exported.bundle.folder, component).close()
    kept = next((tmp_path / "cache").rglob("*.engine"))
    folder = tmp_path / "shipped"
    (folder / "vae_decoder").mkdir(parents=True)
    for source, name in [
        (kept, "model.engine"),
        (exported.bundle.folder / component.files[0].path, "model.onnx"),
    ]:
        (folder / "vae_decoder" / name).write_bytes(source.read_bytes())
    kept.unlink()
    names = ("vae_decoder/model.engine", "vae_decoder/model.onnx")
    assert component.engine
    made = {"built_with": "1.7.0", "built_for": ("8.6", "8.9")}
    engine = component.engine.model_copy(update=made)
    files = tuple(describe_file(folder, name) for name in names)
    told = {"target": "tensorrt", "files": files, "engine": engine}
    shipped = component.model_copy(update=told)
    manifest = exported.bundle.manifest.model_copy(update={"components": (shipped,), "files": ()})
    write_manifest(manifest, folder)
    return Bundle.open(folder)


def test_an_engine_that_ships_runs_or_says_what_it_is_for(
    guided: Exported, rtx: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bundle = with_engines(guided, rtx, tmp_path)
    component, before = bundle.component("vae_decoder"), len(rtx.builds)
    inputs = fed(component, 1)
    session = on(cuda_graph=True).open(bundle.folder, component)
    np.testing.assert_array_equal(
        session(inputs)["sample"], reference(guided, "vae_decoder", inputs)["sample"]
    )
    session.close()
    assert len(rtx.builds) == before and not rtx.cuda.captures, "it captures by itself"
    assert [path.read_bytes() for path in (tmp_path / "cache").rglob("*.kernels")] == [b"kernels"]

    rtx.__version__, rtx.invalid, rtx.cuda.capability = "1.8.0", 3, (12, 0)
    with pytest.raises(EdgeflashError) as caught:
        on().open(bundle.folder, component)
    assert str(caught.value) == (
        "vae_decoder: its engine was built for tensorrt_rtx 1.7.0, compute capability 8.6, 8.9; "
        "this machine has tensorrt_rtx 1.8.0, Imaginary 9, compute capability 12.0, CUDA driver "
        f"13.0 (version mismatch, unsupported cc): edgeflash build {bundle.folder}"
    )
    monkeypatch.setattr("sys.argv", ["edgeflash", "build", str(bundle.folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "vae_decoder: built for tensorrt_rtx 1.8.0" in capsys.readouterr().out
    assert rtx.builds[-1].capabilities == [rtx.ComputeCapability.CURRENT]
    session = on().open(bundle.folder, component)
    assert session(inputs)["sample"].shape == (1, 3, 16, 16)
    session.close()


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_run_that_fails_names_component_and_cause(guided: Exported, plain: TensorRt) -> None:
    component = typed(guided)
    session = on().open(guided.bundle.folder, component)
    plain.engines[-1].fails = True
    with pytest.raises(EdgeflashError, match=r"^unet: TensorRT failed in a run: ran out of luck$"):
        session(fed(component, 1))
    plain.cuda.cudaStreamSynchronize(1)
    session.close()


def test_a_capture_that_fails_leaves_no_graph(guided: Exported, plain: TensorRt) -> None:
    component = typed(guided, "vae_decoder")
    session = on(cuda_graph=True).open(guided.bundle.folder, component)
    session(fed(component, 1))
    plain.engines[-1].fails = True
    with pytest.raises(EdgeflashError, match=r"^vae_decoder: TensorRT failed in a run: ran out"):
        session(fed(component, 1))
    plain.engines[-1].fails = False
    session(fed(component, 1))
    assert plain.cuda.launches == 1
    session.close()


def test_other_shapes_are_refused_before_they_reach_the_gpu(
    guided: Exported, plain: TensorRt
) -> None:
    component = typed(guided)
    session = on().open(guided.bundle.folder, component)
    inputs = fed(component, 1) | {"encoder_hidden_states": np.ones((1, 17, 32), np.float32)}
    with pytest.raises(EdgeflashError, match=r"^unet: encoder_hidden_states has the shape \(1, 17"):
        session(inputs)
    plain.cuda.cudaStreamSynchronize(1)
    session.close()


def test_each_session_runs_on_its_own_gpu(guided: Exported, plain: TensorRt) -> None:
    plain.cuda.devices = 2
    component, folder = typed(guided, "vae_decoder"), guided.bundle.folder
    sessions = [on(gpu=number).open(folder, component) for number in (0, 1)]
    for session in sessions:
        session(fed(component, 1))
        session.close()


def test_broken_files_of_the_cache(guided: Exported, plain: TensorRt) -> None:
    component, folder = typed(guided, "vae_decoder"), guided.bundle.folder
    on().build(folder, component)
    timings, kept = (next(folder_of("").glob(f"*.{kind}")) for kind in ("timings", "engine"))
    timings.write_bytes(b"broken")
    kept.write_bytes(b"")
    with pytest.raises(EdgeflashError, match="does not load it: it says nothing: delete it"):
        on().open(folder, component)
    kept.unlink()
    on().open(folder, component).close()
    assert timings.read_bytes() == b"t", "measured anew"


def test_too_little_memory_leaves_none_taken(guided: Exported, plain: TensorRt) -> None:
    plain.cuda.memory_bytes = 2000
    with pytest.raises(EdgeflashError, match="cudaMalloc failed with cudaErrorMemoryAllocation"):
        on().open(guided.bundle.folder, typed(guided))


def test_another_engine_is_refused(guided: Exported, plain: TensorRt) -> None:
    component, folder = typed(guided), guided.bundle.folder
    on().build(folder, component)
    decoder = typed(guided, "vae_decoder")
    on().build(folder, decoder)
    unet, vae = (next(folder_of("").glob(f"{name}-*.engine")) for name in ("unet", "vae_decoder"))
    unet.write_bytes(vae.read_bytes())
    with pytest.raises(EdgeflashError, match=r"no tensor timestep float32 .*export it again"):
        on().open(folder, component)


def test_other_weights_go_into_engines_made_for_it(
    guided: Exported, plain: TensorRt, tmp_path: Path
) -> None:
    folder, here = guided.bundle.folder, str(guided.bundle.folder)
    with pytest.raises(EdgeflashError, match=r"engine of unet takes no other .*refit=true"):
        on(refit_from=here).open(folder, typed(guided))
    files = (File(path="unet/openvino_model.xml", bytes=0, sha256=""),)
    alien = guided.bundle.component("unet").model_copy(update={"files": files})
    with pytest.raises(EdgeflashError, match=r"its unet, onnx, is no ONNX file: export it --to"):
        onnx_file(folder, alien)
    component = typed(guided, refit=True, weight_streaming=True)
    session = on(refit_from=here, weights_mib=3).open(folder, component)
    assert plain.engines[-1].weight_streaming_budget_v2 == 3 * 2**20
    session.close()
    on().open(folder, component).close()
    assert plain.engines[-1].weight_streaming_budget_v2 == 12345, "the vendor's own"
    plain.OnnxParserRefitter = lambda *_: type("P", (), {"refit_from_file": lambda *_: False})()
    with pytest.raises(EdgeflashError, match="its weights do not fit unet"):
        on(refit_from=here).open(folder, component)


def test_gpus_are_numbered(guided: Exported, plain: TensorRt) -> None:
    with pytest.raises(EdgeflashError, match="no GPU 1 here: they are numbered 0 to 0"):
        on(gpu=1).open(guided.bundle.folder, typed(guided))


def test_the_runtime_is_the_bundle_s_own() -> None:
    assert shelf.opener("tensorrt") == "tensorrt"
    assert shelf.opener("onnx") == "onnx", "ONNX Runtime stays the first choice"
    assert shelf.make(Runtime, "tensorrt", {}).opens == ("tensorrt", "onnx")
