"""What is told of plug-ins and extras, also where packages are missing."""

from __future__ import annotations

import doctest
import importlib.util
import io
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from rich.console import Console, RenderableType
from safetensors.numpy import load_file
from tiny_student import write_student

from edgeflash import inspect, shelf
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method, Target

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
Lacking = Callable[..., None]


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Lacking:
    """Makes packages as good as not installed."""

    def without(*packages: str) -> None:
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return without


def shown(told: RenderableType) -> str:
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(told)
    return console.export_text()


def row(text: str, first: str) -> str:
    return next(line for line in text.splitlines() if re.match(rf"{re.escape(first)}\s", line))


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(shelf).failed == 0


def test_extras_are_those_of_the_project() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        extra: tuple(re.split(r"[<>=]", line)[0] for line in lines)
        for extra, lines in told["optional-dependencies"].items()
        if extra not in ("all", "dev")
    }
    assert extras == shelf.EXTRAS
    rtx = "edgeflash[tensorrt-rtx]; sys_platform == 'linux' and platform_machine == 'x86_64'"
    assert all(rtx in told["optional-dependencies"][extra] for extra in ("all", "dev"))


def test_every_package_a_plugin_needs_is_in_an_extra() -> None:
    brought = {shelf.imported_as(name) for names in shelf.EXTRAS.values() for name in names}
    for role in inspect.ROLES:
        for name in shelf.names(role):
            assert set(shelf.find(role, name, check=False).needs) <= brought, name


def test_rates_are_those_of_the_papers_or_said_to_be_ours() -> None:
    papers = {"blocks": 5e-5, "decoder": 3e-4, "lcm": 8e-6, "perflow": 8e-5, "flash": 1e-5}
    papers |= {"dmd": 1e-5, "consistency": 1e-5, "ufogen": 1e-4}
    for name in shelf.names(Method):
        method = shelf.find(Method, name, check=False)
        field = method.model_fields["learning_rate"]
        if name in papers:
            assert field.default == papers[name], name
        else:
            told = f"{method.__doc__} {field.description}"
            assert re.search("default is ours|not found|Not published", told), name
    lora = {"lora_rank": 4}
    assert shelf.make(Method, "lcm", lora).learning_rate == 1e-4
    assert shelf.make(Method, "lcm", lora | {"learning_rate": 2e-5}).learning_rate == 2e-5
    assert shelf.make(Method, "perflow", {}).warmup_steps == 500


def test_few_step_methods_tell_cost_memory_and_what_was_published() -> None:
    for name in shelf.names(Method):
        method = shelf.find(Method, name, check=False)
        if name in ("blocks", "decoder") or method().step_counts():
            told = " ".join((method.__doc__ or "").split())
            for wanted in (r"\bstep\b[^.]*\basks\b", "memory", "Published"):
                assert re.search(wanted, told), f"{name}: no {wanted}"


@pytest.mark.parametrize(
    ("packages", "line"),
    [
        (["torch", "diffusers", "transformers", "onnx", "onnxruntime"], "'edgeflash[export]'"),
        (["onnxruntime"], "'edgeflash[onnx]'"),
        (["accelerate", "torch"], "'edgeflash[distill]'"),
        (["accelerate", "onnxscript", "onnxruntime"], "'edgeflash[distill,export]'"),
        (["onnxscript", "unheard"], "'edgeflash[export]' unheard"),
        (["unheard"], "unheard"),
    ],
)
def test_the_fewest_extras_are_named(packages: list[str], line: str) -> None:
    assert shelf.pip_line(packages) == f"pip install {line}"


def test_export_asks_for_one_extra(lacking: Lacking) -> None:
    lacking("torch", "diffusers", "onnxscript")
    said = r"target 'onnx' needs torch, diffusers, onnxscript: pip install 'edgeflash\[export\]'$"
    with pytest.raises(EdgeflashError, match=said):
        shelf.make(Target, "onnx", {})


def test_options_are_listed_without_the_packages(lacking: Lacking) -> None:
    lacking("torch", "onnxscript")
    told = shown(inspect.one_plugin("onnx"))
    assert "external_mib" in told and "provider" in told  # the target's and the runtime's
    assert "needs torch, onnxscript to run: pip install 'edgeflash[export]'" in told
    with pytest.raises(EdgeflashError, match="method 'lcm' needs torch"):
        inspect.one_plugin("lcm")
    assert re.search(r"distill by\s+lcm\s.*needs torch", shown(inspect.the_shelf()))


def test_the_doctor_tells_what_is_missing_and_what_is_in_use(lacking: Lacking) -> None:
    lacking("torch")
    told = shown(inspect.health())
    assert "pip install 'edgeflash[distill]'" in row(told, "distill")
    assert "torch runs on" in told and "nothing: not installed" in told


def test_the_doctor_tells_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["Imaginary", "CPU"])
    assert re.search(r"onnxruntime runs on\s+Imaginary, CPU\s", shown(inspect.health()))
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "Imaginary 9")
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
    assert inspect.DEVICES["torch"](torch) == "cuda (Imaginary 9), cpu"
    cuda.is_available = lambda: False
    assert inspect.DEVICES["torch"](torch) == "cpu; no CUDA device found"
    torch.version.cuda = None
    assert inspect.DEVICES["torch"](torch) == "cpu; built without CUDA"
    core = SimpleNamespace(available_devices=["CPU", "GPU.0"])
    assert inspect.DEVICES["openvino"](SimpleNamespace(Core=lambda: core)) == "CPU, GPU.0"

    def broken(_: object) -> str:
        raise ImportError("libcudnn is missing")

    monkeypatch.setitem(inspect.DEVICES, "onnxruntime", broken)
    assert "nothing: does not load: libcudnn is missing" in shown(inspect.health())


def test_the_two_onnxruntimes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.20"}
    monkeypatch.setattr(inspect, "_version", lambda name: versions.get(name, ""))
    told = shown(inspect.health())
    assert row(told, "onnx").split() == ["onnx", "onnxruntime", "1.20"]
    advice = "pip uninstall the other onnxruntime, then pip install 'edgeflash[onnx-gpu]'"
    assert "not here" in row(told, "onnx-gpu") and advice in row(told, "onnx-gpu")


def test_embedded_models_are_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "UNet2DConditionModel" in shown(inspect.tell(Path("shapes-student")))
    with pytest.raises(EdgeflashError, match="neither a bundle nor"):
        inspect.tell(Path("shapes-nothing"))


def test_the_example_for_contributors_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeflash.distill.run import distill
    from edgeflash.recipe import recipe_of

    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    found = re.search(r"`distill/(by_\w+)\.py`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    path, module = tmp_path / f"{found[1]}.py", f"edgeflash.distill.{found[1]}"
    path.write_text(found[2])
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec and spec.loader
    monkeypatch.setitem(sys.modules, module, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[module])
    name = found[1].removeprefix("by_")
    monkeypatch.setattr(shelf, "names", lambda role: [name] if role is Method else [])
    assert all(info.description for info in shelf.find(Method, name).model_fields.values())

    teacher = write_student(tmp_path / "teacher", tiny_decoder=False, scheduler="DDIMScheduler")
    stage = {"by": name, "steps": 1, "batch_size": 2, "weight": 2.0}
    sampling = {"steps": [2], "default_steps": 2}
    plain = {"name": "x", "teacher": str(teacher), "stage": [stage], "sampling": sampling}
    student = distill(recipe_of(plain | {"data": {"samples": 4}}, "x"), tmp_path / "student")
    before, after = (load_file(f / "vae" / WEIGHTS) for f in (teacher, student))
    assert any((before[key] != after[key]).any() for key in before)


@pytest.mark.parametrize(
    ("target", "precisions"),
    [
        ("onnx", {"int8"}),
        ("openvino", {"int8"}),
        ("tensorrt", {"int8", "fp8"}),
        ("coreml", {"w8a8"}),
        ("executorch", {"int8"}),
        ("torch", set()),
    ],
)
def test_targets_that_take_ranges_ask_for_recorded_calls(target: str, precisions: set[str]) -> None:
    """Else they would calibrate on the few calls that the ladder needs."""
    kinds = shelf.find(Target, target, check=False).model_fields["precision"].annotation
    options = {"ios": 18} if target == "coreml" else {}
    asking = {
        kind
        for kind in get_args(kinds)
        if shelf.make(Target, target, options | {"precision": kind}, check=False).calibrates("unet")
    }
    assert asking == precisions
