"""A GPU that is not there: CUDA's runtime and TensorRT's API, over numpy and ONNX Runtime.

It holds callers to the rules of the real ones where a breach would pass unnoticed: what is put on a
stream happens when the stream is waited for, memory has owners, shapes must lie in the profile.
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
from collections.abc import Callable
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

KINDS = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(float16)": "HALF"}
DTYPES = {"FLOAT": np.float32, "INT64": np.int64, "HALF": np.float16}


class Code(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorInsufficientDriver = 35


class Cuda:
    """The functions of `cuda.bindings.runtime` that are used."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.name, self.capability, self.driver = "Imaginary 9", (8, 9), 13000
        self.devices, self.memory_bytes, self.current = 1, 2**30, 0
        self.blocks: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.streams = self.templates = 0
        self.uploads: list[int] = []
        self.captures = self.launches = 0

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return Code.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return Code.cudaSuccess, 13000

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if self.driver < 13000:
            return Code.cudaErrorInsufficientDriver, None
        return (Code.cudaSuccess if self.devices else Code.cudaErrorNoDevice), self.devices

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        major, minor = self.capability
        name = self.name.encode() + b"\0" * 8
        return Code.cudaSuccess, SimpleNamespace(name=name, major=major, minor=minor)

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        self.current = index
        return (Code.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if sum(map(len, self.blocks.values())) + size > self.memory_bytes:
            return Code.cudaErrorMemoryAllocation, 0
        block = (ctypes.c_char * size)()
        self.blocks[ctypes.addressof(block)] = block
        return Code.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, place: int) -> tuple[Any, ...]:
        del self.blocks[place]
        return (Code.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        self.streams += 1
        return Code.cudaSuccess, self.streams

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams -= 1
        return (Code.cudaSuccess,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[Any, ...]:
        block = self.blocks[to if kind == 1 else source]
        assert size <= len(block) and self.captured is None
        if kind == 1:
            self.uploads.append(to)
        self.enqueue(lambda: void(ctypes.memmove(to, source, size)))
        return (Code.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        work, self.queue = self.queue, []
        for each in work:
            each()
        return (Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.captured = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        work, self.captured = self.captured, None
        self.templates += 1
        return Code.cudaSuccess, work

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        self.captures += 1
        self.graphs[self.captures] = graph
        return Code.cudaSuccess, self.captures

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self.templates -= 1
        return (Code.cudaSuccess,)

    def cudaGraphLaunch(self, ready: int, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        self.queue += self.graphs[ready]
        return (Code.cudaSuccess,)

    def cudaGraphExecDestroy(self, ready: int) -> tuple[Any, ...]:
        del self.graphs[ready]
        return (Code.cudaSuccess,)


def void(_: Any) -> None:
    pass


class Network:
    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, i: int) -> Any:
        return self.inputs[i]

    def get_output(self, i: int) -> Any:
        return self.outputs[i]


class Parser:
    def __init__(self, network: Network, log: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.network.path = path  # type: ignore[attr-defined]
        self.network.inputs = [_tensor(value) for value in session.get_inputs()]
        self.network.outputs = [_tensor(value) for value in session.get_outputs()]
        return True


def _tensor(value: Any) -> Any:
    shape = tuple(side if isinstance(side, int) else -1 for side in value.shape)
    return SimpleNamespace(
        name=value.name, dtype=SimpleNamespace(name=KINDS[value.type]), shape=shape
    )


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes = {name: tuple(low) for name, (low, high) in engine.ranges.items()}
        self.addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in {tensor.name for tensor in self.engine.tensors}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.ranges[name]
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.engine.device == self.engine.cuda.current
        if self.engine.fails:
            self.engine.log.log(2, "ran out of\nluck")
            return False
        shapes = dict(self.shapes)
        self.engine.cuda.enqueue(lambda: self._run(shapes))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        inputs = {}
        for value in self.engine.session.get_inputs():
            shape, dtype = shapes[value.name], np.dtype(DTYPES[KINDS[value.type]])
            size = int(np.prod(shape)) * dtype.itemsize
            block = ctypes.string_at(self.addresses[value.name], size)
            inputs[value.name] = np.frombuffer(block, dtype).reshape(shape)
        names = [value.name for value in self.engine.session.get_outputs()]
        for name, found in zip(names, self.engine.session.run(names, inputs), strict=True):
            found = np.ascontiguousarray(found) * np.dtype(found.dtype).type(self.engine.factor)
            ctypes.memmove(self.addresses[name], found.ctypes.data, found.nbytes)


class Engine:
    def __init__(self, cuda: Cuda, log: Any, text: bytes) -> None:
        told = json.loads(text)
        self.cuda, self.log, self.fails, self.factor = cuda, log, False, 1
        self.device = cuda.current
        self.ranges: dict[str, Any] = told["ranges"]
        self.session = ort.InferenceSession(
            base64.b64decode(told["model"]), providers=["CPUExecutionProvider"]
        )
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.tensors)
        self.weight_streaming_budget_v2 = 0

    def get_tensor_name(self, i: int) -> str:
        return str(self.tensors[i].name)

    def get_tensor_dtype(self, name: str) -> Any:
        return next(_tensor(value).dtype for value in self.tensors if value.name == name)

    def get_weight_streaming_automatic_budget(self) -> int:
        return 12345

    def create_execution_context(self, config: Any = None) -> Context:
        return Context(self)

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(read=None, serialize=lambda: b"kernels")
        cache.deserialize = lambda content: setattr(cache, "read", content)
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=void)


class Config:
    def __init__(self) -> None:
        self.flags: set[str] = {"TF32"}
        self.profile: dict[str, Any] = {}
        self.capabilities: list[Any] = []

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def set_compute_capability(self, capability: Any, i: int) -> None:
        self.capabilities.append(capability)

    def create_timing_cache(self, known: bytes) -> Any:
        return None if known == b"broken" else SimpleNamespace(serialize=lambda: known + b"t")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache

    def add_optimization_profile(self, profile: Any) -> None:
        self.profile = profile.shapes


class TensorRt(ModuleType):
    """The package of one vendor's name, as far as it is used."""

    def __init__(self, name: str, cuda: Cuda) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__, self.cuda = "10.13.0", cuda
        self.builds: list[Config] = []
        self.engines: list[Engine] = []
        self.invalid = 0  # diagnostics of engines that ship
        flags = ("TF32", "REFIT", "WEIGHT_STREAMING", "VERSION_COMPATIBLE")
        self.BuilderFlag = IntEnum("BuilderFlag", flags)
        self.NetworkDefinitionCreationFlag = IntEnum("Creation", ["STRONGLY_TYPED"])
        self.ComputeCapability = IntEnum("ComputeCapability", ["CURRENT", "SM86", "SM89"])
        self.HardwareCompatibilityLevel = IntEnum("Level", ["AMPERE_PLUS"])
        self.EngineValidity = IntEnum("EngineValidity", ["VALID", "INVALID"])
        bits = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2}
        self.EngineInvalidityDiagnostics = IntEnum("Diagnostics", bits)
        self.OnnxParser = Parser
        self.ILogger = type("ILogger", (), {"ERROR": 2, "INTERNAL_ERROR": 1, "WARNING": 3})

    def Builder(self, log: Any) -> Any:
        return SimpleNamespace(
            create_network=lambda flags: Network(),
            create_builder_config=Config,
            create_optimization_profile=_profile,
            build_serialized_network=self._built,
        )

    def _built(self, network: Any, config: Config) -> bytes:
        self.builds.append(config)
        fixed = {tensor.name: (tensor.shape, tensor.shape) for tensor in network.inputs}
        ranges = fixed | {name: (low, high) for name, (low, _, high) in config.profile.items()}
        assert all(-1 not in low for low, _ in ranges.values())
        model = base64.b64encode(Path(network.path).read_bytes()).decode()
        return json.dumps({"model": model, "ranges": ranges}).encode()

    def Runtime(self, log: Any) -> Any:
        def load(text: bytes) -> Engine | None:
            if not text:
                return None
            self.engines.append(Engine(self.cuda, log, text))
            return self.engines[-1]

        verdict = self.EngineValidity.INVALID if self.invalid else self.EngineValidity.VALID
        return SimpleNamespace(
            deserialize_cuda_engine=load,
            engine_header_size=8,
            get_engine_validity=lambda header: (verdict, self.invalid),
        )

    def Refitter(self, engine: Engine, log: Any) -> Any:
        return SimpleNamespace(engine=engine, refit_cuda_engine=lambda: True)

    def OnnxParserRefitter(self, refitter: Any, log: Any) -> Any:
        def refit_from_file(path: str) -> bool:
            refitter.engine.session = ort.InferenceSession(path)
            return Path(path).is_file()

        return SimpleNamespace(refit_from_file=refit_from_file)


def _profile() -> Any:
    shapes: dict[str, Any] = {}
    return SimpleNamespace(
        shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three})
    )


def simulate(patch: pytest.MonkeyPatch, vendor: str) -> TensorRt:
    """Puts a simulated GPU and a vendor's package into this process."""
    import cuda.bindings

    trt = TensorRt(vendor, Cuda())
    patch.setattr(cuda.bindings, "runtime", trt.cuda, raising=False)
    patch.setitem(sys.modules, vendor, trt)
    return trt
