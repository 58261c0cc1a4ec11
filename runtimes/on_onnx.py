"""ONNX Runtime, on the CPU, a CUDA device, TensorRT or Core ML."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from edgeflash.bundle import Component
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Array, Runtime, Session
from edgeflash.rounding import FOLDER, rounded

from .engine_cache import folder_of

if TYPE_CHECKING:
    import onnxruntime as ort

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "coreml", "coreml-ne", "coreml-gpu"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "coreml-ne": "CoreMLExecutionProvider",
    "coreml-gpu": "CoreMLExecutionProvider",
}
UNITS = {"coreml": "ALL", "coreml-ne": "CPUAndNeuralEngine", "coreml-gpu": "CPUAndGPU"}
ON_THE_GPU = ("cuda", "tensorrt")  # whose tensors lie in a CUDA device's memory
GET = {
    "cuda": "pip uninstall onnxruntime, then pip install 'edgeflash[onnx-gpu]'",
    "tensorrt": "pip uninstall onnxruntime, then pip install 'edgeflash[onnx-gpu]' tensorrt",
}
MEND = {
    "cuda": "CUDA or cuDNN is missing or too old for it: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "TensorRT's libraries are missing or of another version than it was built with: "
    "pip install tensorrt, of the version that ONNX Runtime's table of them names",
}


class OnnxRuntime(Runtime):
    """Runs what `to_onnx` writes.

    With ``provider = "tensorrt"`` TensorRT builds what it can of a graph at the first call of each
    shape, which takes minutes, and keeps it in the user's cache; with "coreml" Core ML compiles it
    when it loads, and so does "coreml-ne" for Neural Engine and CPU, "coreml-gpu" for GPU and CPU.
    The rest stays on CUDA, or the CPU. Neither has run yet.
    """

    needs: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    opens: ClassVar[tuple[str, ...]] = ("onnx",)

    provider: Provider = Field(
        "auto", description="where to run; auto: cuda where this onnxruntime has it, else cpu"
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads inside an operator; 0: one per core"
    )
    _exact: bool = PrivateAttr(False)  # see `exact`

    def exact(self) -> OnnxRuntime:
        """On the CPU every result is rounded to its type, which takes longer; see `rounding`."""
        found = self.model_copy()
        found._exact = True
        return found

    def open(self, folder: Path, component: Component) -> OnnxSession:
        """Loads the component's model file.

        Raises:
            EdgeflashError: the provider is not in this onnxruntime, or the file does not load.
        """
        import onnxruntime as ort

        name = self._provider(ort.get_available_providers())
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # its warnings are about itself; errors are raised below
        # CPUs with AVX2 and without VNNI else add int8 products in 16 bits, which overflow.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if component.precision.endswith("-weights"):
            # Else it widens the weights anew in every run, and convolutions lose their layout.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        path = folder / component.files[0].path
        names = (name, *["cuda"] * (name == "tensorrt"), *["cpu"] * (name != "cpu"))
        providers = [(PROVIDERS[each], _options(each, component)) for each in names]
        model: str | bytes = str(path)
        if self._exact and name == "cpu" and component.precision != "fp32":
            model = _rounded(path)
            options.add_session_config_entry(FOLDER, str(path.parent))
        try:
            session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{path}: ONNX Runtime does not load it: {said}") from None
        found = session.get_providers()[0]
        if found != PROVIDERS[name] and self.provider != "auto":
            raise EdgeflashError(
                f"provider {name}: ONNX Runtime fell back to {found}, so {_mend(name)}, or use "
                "provider=cpu"
            )
        if self._exact and (name, found) == ("cuda", PROVIDERS["cpu"]):  # which auto fell back to
            return self.model_copy(update={"provider": "cpu"}).open(folder, component)
        return OnnxSession(session, component, name)

    def _provider(self, have: list[str]) -> str:
        """The one to ask for, of those that this onnxruntime has."""
        if self.provider == "auto":
            return "cuda" if PROVIDERS["cuda"] in have else "cpu"
        if PROVIDERS[self.provider] in have:
            return self.provider
        raise EdgeflashError(
            f"provider {self.provider}: this onnxruntime has {', '.join(have)}: "
            f"{GET.get(self.provider, 'only those for macOS have it')}"
        )


def _rounded(path: Path) -> str | bytes:
    """The model that rounds as it is typed; the path alone of what ONNX Runtime may say more of."""
    try:
        return rounded(path.read_bytes())
    except (OSError, ValueError):
        return str(path)


def _mend(name: str) -> str:
    return MEND.get(name, "this system is too old for its ML programs")


def _options(name: str, component: Component) -> dict[str, str]:
    """Of a provider, as ONNX Runtime takes them.

    What is kept lies under the hash of the model: TensorRT's provider tells models apart by their
    names, which are the same in every bundle.
    """
    if name in ("cpu", "cuda"):
        return {}
    hashes = "".join(file.sha256 for file in component.files)
    key = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    kept = folder_of("") / f"onnxruntime-{name}" / key
    kept.mkdir(parents=True, exist_ok=True)
    if name in UNITS:
        units = {"ModelFormat": "MLProgram", "MLComputeUnits": UNITS[name]}
        return units | {"ModelCacheDirectory": str(kept)}
    both = {"trt_engine_cache_path": str(kept), "trt_timing_cache_path": str(kept)}
    both |= {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
    narrow = {"fp16": "trt_fp16_enable", "int8": "trt_int8_enable"}
    return both | {flag: "1" for word, flag in narrow.items() if component.precision == word}


class OnnxSession(Session):
    """One model, its tensors bound to the device it runs on.

    Inputs are handed over by address on the CPU and copied once to a CUDA device. There, an array
    that comes again and cannot have changed (it is read-only) is not copied again: the conditioning
    crosses the bus once an image, not once a step.
    """

    def __init__(self, session: ort.InferenceSession, component: Component, asked: str) -> None:
        found = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
        for spec in (*component.inputs, *component.outputs):
            if spec.name not in found:
                raise EdgeflashError(
                    f"components.{component.name}: the model has no tensor {spec.name!r} "
                    f"(has: {', '.join(sorted(found))}); export it again"
                )
        provider = session.get_providers()[0]  # several names go by one: of units of one vendor
        names = (asked, *PROVIDERS)
        self.device = next(name for name in names if PROVIDERS[name] == provider)
        self._bound = self.device in ON_THE_GPU
        self._memory = "cuda" if self._bound else "cpu"
        self._name = component.name
        self._session = session
        self._binding = session.io_binding()
        self._outputs = [spec.name for spec in component.outputs if spec.role != "unused"]
        self._held: dict[str, tuple[Array, Any]] = {}  # name -> array, its copy on the device

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self._run(inputs)
        except Exception as error:  # onnxruntime's exceptions share no base class
            said = " ".join(str(error).split())
            raise EdgeflashError(f"{self._name}: ONNX Runtime failed in a run: {said}") from None

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if not self._bound:
            # run() itself takes and gives arrays by address on the CPU; a binding would copy.
            values = self._session.run(self._outputs, dict(inputs))
            return dict(zip(self._outputs, values, strict=True))
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._on_device(name, array))
        for name in self._outputs:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        values = self._binding.copy_outputs_to_cpu()
        return dict(zip(self._outputs, values, strict=True))

    def _on_device(self, name: str, array: Array) -> Any:
        import onnxruntime as ort

        held = self._held.get(name)
        if held is not None and held[0] is array:
            return held[1]
        value = ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), self._memory, 0)
        if not array.flags.writeable:
            self._held[name] = (array, value)
        return value

    def close(self) -> None:
        self._held.clear()
        del self._binding, self._session
