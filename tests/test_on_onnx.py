"""Which of ONNX Runtime's providers is asked for, and with what; on one that imagines them all."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import onnxruntime as ort
import pytest
from tiny_bundle import tiny

from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.runtimes.on_onnx import PROVIDERS, OnnxRuntime


class Imagined:
    """An ONNX Runtime with every provider, which has what it was asked for, or the CPU alone."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []
    found: ClassVar[str] = ""

    def __init__(self, path: str, options: Any, providers: Any) -> None:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
        Imagined.asked = providers
        self.real = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [self.found or self.asked[0][0]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_a_provider_is_asked_for_with_its_options_and_what_takes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(tmp_path / "b")
    unet = Bundle.open(folder).component("unet")
    module = SimpleNamespace(**vars(ort) | {"InferenceSession": Imagined})
    module.get_available_providers = lambda: list(PROVIDERS.values())
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    key = hashlib.sha256("".join(f.sha256 for f in unet.files).encode()).hexdigest()[:16]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = str(tmp_path / "edgeflash/engines/onnxruntime-{}" / key)

    def asked(provider: str) -> tuple[str, list[tuple[str, dict[str, str]]]]:
        runtime = OnnxRuntime.model_validate({"provider": provider})
        session = runtime.open(folder, unet)
        return session.device, Imagined.asked

    cpu, cuda = ("CPUExecutionProvider", {}), ("CUDAExecutionProvider", {})
    both = {f"trt_{what}_cache_path": kept.format("tensorrt") for what in ("engine", "timing")}
    both |= {f"trt_{what}_cache_enable": "1" for what in ("engine", "timing")}
    core = {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine"}
    core |= {"ModelCacheDirectory": kept.format("coreml-ne")}
    assert asked("auto") == ("cuda", [cuda, cpu]) and asked("cpu") == ("cpu", [cpu])
    trt = ("TensorrtExecutionProvider", both)
    assert asked("tensorrt") == ("tensorrt", [trt, cuda, cpu])
    assert asked("coreml-ne") == ("coreml-ne", [("CoreMLExecutionProvider", core), cpu])
    assert Path(kept.format("tensorrt")).is_dir()
    retrained = unet.files[0].model_copy(update={"sha256": "0" * 64})
    unet = unet.model_copy(update={"files": (retrained,), "precision": "int8"})
    _, ((_, other), *_) = asked("tensorrt")
    assert other["trt_engine_cache_path"] not in both.values(), "same name, other weights"
    assert other["trt_int8_enable"] == "1" and "trt_fp16_enable" not in other

    monkeypatch.setattr(Imagined, "found", "CPUExecutionProvider")
    assert asked("auto")[0] == "cpu"
    with pytest.raises(EdgeflashError, match=r"provider tensorrt: .* fell back to CPUEx.*pip inst"):
        asked("tensorrt")
