"""TensorRT and TensorRT for RTX, on NVIDIA GPUs. Not run on one yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from edgeflash.bundle import Bundle, Component
from edgeflash.disk import write_atomic
from edgeflash.engine import AHEAD, bytes_of, check_tensors, has_rows, logger, shape_of, started
from edgeflash.errors import EdgeflashError
from edgeflash.gpu import use
from edgeflash.roles import Array, Runtime, Session
from edgeflash.runtimes.device_memory import CudaGraph, DeviceMemory
from edgeflash.runtimes.engine_choice import (
    Here,
    build_here,
    choose,
    look,
    onnx_file,
    reasons_against,
)


class TensorRtRuntime(Runtime):
    """Runs what `to_tensorrt` and `to_onnx` write, by the package that the bundle names.

    An engine that does not ship is built from the ONNX file at first load, which takes minutes, or
    by ``edgeflash build``; it is kept for this GPU, driver and version of the package. One call
    runs as many pictures as engines are built for, and more in turns.
    """

    needs: ClassVar[tuple[str, ...]] = ("cuda",)
    opens: ClassVar[tuple[str, ...]] = ("tensorrt", "onnx")

    gpu: int = Field(0, ge=0, description="number of the GPU")
    cuda_graph: bool = Field(False, description="launch a component's kernels as one CUDA graph")
    build_at_load: bool = Field(True, description="build engines that are missing; false: refuse")
    weights_mib: int | None = Field(
        None, ge=0, description="weight streaming: MiB to keep on the GPU; default: the vendor's"
    )
    refit_from: str = Field(
        "", description="bundle of the same networks whose weights to put into refittable engines"
    )
    cache_dir: str = Field("", description="folder for engines; empty: the user's own cache")

    def open(self, folder: Path, component: Component) -> TensorRtSession:
        """Loads the component's engine, and builds it first where it has none.

        Raises:
            EdgeflashError: no GPU or package, an engine for other machines, or what the vendor says
                against the network or the engine.
        """
        here = look(folder, component, self.gpu, self.cache_dir)
        path = choose(here, build_missing=self.build_at_load)
        use(self.gpu)
        return TensorRtSession(self._loaded(path, here), self.cuda_graph)

    def build(self, folder: Path, component: Component) -> str:
        """Builds the component's engine for this machine, unless one is there."""
        here = look(folder, component, self.gpu, self.cache_dir)
        if here.kept.is_file():
            return f"{component.name}: is there already: {here.kept}"
        if here.shipped and not reasons_against(here):
            return f"{component.name}: the engine that ships fits this machine"
        return f"{component.name}: built for {here}: {build_here(here)}"

    def _loaded(self, path: Path, here: Here) -> _Loaded:
        log = logger(here.trt)
        runtime = started(here.trt.Runtime, log)
        if here.engine.version_compatible:
            runtime.engine_host_code_allowed = True  # it was built here, with code of its own in it
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            remedy = "delete it, it is built anew" if path == here.kept else "export it again"
            raise EdgeflashError(f"{path}: {here} does not load it: {log.said(-1)}: {remedy}")
        if self.refit_from:
            self._refit(engine, log, here)
        if here.engine.weight_streaming:
            usual = engine.get_weight_streaming_automatic_budget()
            budget = usual if self.weights_mib is None else self.weights_mib * 2**20
            engine.weight_streaming_budget_v2 = budget
        loaded = _Loaded(here, path, log, runtime, engine)
        loaded.open_context(self.cuda_graph)
        return loaded

    def _refit(self, engine: Any, log: Any, here: Here) -> None:
        """Puts the weights of another bundle into an engine."""
        name = here.component.name
        if not here.engine.refit:
            raise EdgeflashError(
                f"refit_from: the engine of {name} takes no other weights: export the bundle with "
                "--set refit=true"
            )
        other = Bundle.open(self.refit_from)
        path = onnx_file(other.folder, other.component(name))
        refitter = here.trt.Refitter(engine, log)
        parser = here.trt.OnnxParserRefitter(refitter, log)
        if not parser.refit_from_file(str(path)) or not refitter.refit_cuda_engine():
            raise EdgeflashError(f"{path}: its weights do not fit {name}: {log.said(-1)}")


@dataclass
class _Loaded:
    """The vendor's objects, which need each other in this order."""

    here: Here
    path: Path
    log: Any
    runtime: Any
    engine: Any
    kernels: Any = None  # what tensorrt_rtx has compiled on this GPU
    context: Any = None

    def open_context(self, cuda_graph: bool) -> None:
        """Takes the memory for a run, as much as the largest call needs."""
        if self.here.engine.vendor == AHEAD:
            config = self.engine.create_runtime_config()
            self.kernels = config.create_runtime_cache()
            if self._kernels_file.is_file():
                self.kernels.deserialize(self._kernels_file.read_bytes())
            config.set_runtime_cache(self.kernels)
            if cuda_graph:
                strategy = self.here.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                config.cuda_graph_strategy = strategy
            self.context = self.engine.create_execution_context(config)
        else:
            self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EdgeflashError(f"{self.path}: no memory left to run it: {self.log.said(-1)}")

    @property
    def _kernels_file(self) -> Path:
        return self.here.kept.with_suffix(".kernels")

    def close(self) -> None:
        if self.kernels is not None:
            self.here.places.mkdir(parents=True, exist_ok=True)
            write_atomic(self._kernels_file, self.kernels.serialize())
        self.context = self.kernels = self.engine = self.runtime = None


class TensorRtSession(Session):
    """One engine, its tensors in the memory of the GPU."""

    def __init__(self, loaded: _Loaded, cuda_graph: bool) -> None:
        """Takes memory for the tensors of the largest call.

        Raises:
            EdgeflashError: it is another component's engine, or too little memory is left.
        """
        here, engine = loaded.here, loaded.engine
        self.device = f"cuda ({here.gpu.name})"
        self._loaded, self._component = loaded, here.component
        self._fewest, _, self._most = here.engine.rows
        self._rows = 0  # of the last call
        self._rowed = [spec for spec in self._component.inputs if has_rows(spec)]
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_dtype(name) for name in names}
        check_tensors(kinds, self._component, loaded.path)
        specs = (*self._component.inputs, *self._component.outputs)
        self._captures = cuda_graph and here.engine.vendor != AHEAD  # which captures by itself
        self._graph: CudaGraph | None = None
        self._memory = DeviceMemory({spec.name: bytes_of(spec, self._most) for spec in specs})
        for name, address in self._memory.address.items():
            if not loaded.context.set_tensor_address(name, address):
                self._memory.free()
                raise EdgeflashError(f"{loaded.path}: no place for {name}: {loaded.log.said(-1)}")

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        use(self._loaded.here.index)
        try:
            return self._in_turns(inputs)
        except EdgeflashError as error:
            raise EdgeflashError(f"{self._component.name}: {error}") from None

    def _in_turns(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As many rows at a time as the engine takes, filled up with repeats where it must be."""
        n = max((len(inputs[spec.name]) for spec in self._rowed), default=self._most)
        if self._fewest <= n <= self._most:
            return self._run(inputs, n)
        parts = []
        for start in range(0, n, self._most):
            rows = np.arange(start, max(min(start + self._most, n), start + self._fewest))
            rows = np.minimum(rows, n - 1)
            turn = dict(inputs) | {s.name: inputs[s.name][rows] for s in self._rowed}
            parts.append(self._run(turn, len(rows)))
        names = [spec.name for spec in self._component.outputs]
        return {name: np.concatenate([part[name] for part in parts])[:n] for name in names}

    def _run(self, inputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
        memory, component = self._memory, self._component
        given = {s.name: np.asarray(inputs[s.name], s.dtype, order="C") for s in component.inputs}
        for spec in component.inputs:
            if given[spec.name].shape != shape_of(spec, rows):  # it would be written beyond its end
                shapes = f"{given[spec.name].shape}, not {shape_of(spec, rows)}"
                raise EdgeflashError(f"{spec.name} has the shape {shapes}")
            memory.upload(spec.name, given[spec.name])
        self._enqueue(rows)
        found = {
            spec.name: memory.download(spec.name, shape_of(spec, rows), spec.dtype)
            for spec in component.outputs
        }
        memory.wait()
        return found

    def _enqueue(self, rows: int) -> None:
        """Begins one run; from the second of one shape on, as a graph where asked."""
        if rows != self._rows:
            self._drop_graph()
            self._rows = 0
            for spec in self._rowed if self._fewest != self._most else ():
                if not self._loaded.context.set_input_shape(spec.name, shape_of(spec, rows)):
                    raise EdgeflashError(
                        f"TensorRT takes no {rows} rows: {self._loaded.log.said(-1)}"
                    )
            self._rows = rows
        elif self._captures:
            if self._graph is None:
                self._graph = CudaGraph(self._memory.stream, self._execute)
            self._graph.launch()
            return
        self._execute()

    def _execute(self) -> None:
        if not self._loaded.context.execute_async_v3(self._memory.stream):
            raise EdgeflashError(f"TensorRT failed in a run: {self._loaded.log.said(-1)}")

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
            self._graph = None

    def close(self) -> None:
        use(self._loaded.here.index)
        self._drop_graph()
        self._memory.free()
        self._loaded.close()
