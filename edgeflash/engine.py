"""TensorRT engines from ONNX files, by either of the vendor's packages, which share their API.

`tensorrt_rtx` builds for named compute capabilities and needs no GPU for it; `tensorrt` builds for
the GPU of this machine. Networks are strongly typed: every tensor has the type it has in the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeflash.bundle import Component, Engine, TensorSpec
from edgeflash.disk import write_atomic
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.shelf import require

ONNX, ENGINE = ".onnx", ".engine"  # suffixes of a component's files
AHEAD = "tensorrt_rtx"  # the vendor's package that builds for GPUs that are not here
NAMES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32"}
QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
SYMMETRIC = "TensorRT takes symmetric int8 alone: export --to tensorrt --precision int8"


def load_vendor(name: str) -> Any:
    """The package `tensorrt_rtx` or `tensorrt`.

    Raises:
        EdgeflashError: it is not installed, or does not load.
    """
    require("TensorRT", [name])
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EdgeflashError(f"{name} does not load: {_one_line(error)}") from None


def build(
    path: Path,
    component: Component,
    engine: Engine,
    capabilities: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> Any:
    """Builds an engine of an ONNX file.

    Args:
        path: the file; its weights may lie beside it.
        component: its inputs and outputs.
        engine: how to build it.
        capabilities: compute capabilities to build for; none: that of the GPU here.
        timing_cache: file of what earlier builds measured, read and written; tensorrt alone.

    Returns:
        The serialized engine, a buffer in the vendor's memory.

    Raises:
        EdgeflashError: what the vendor says against it, with the operator that it is about.
    """
    trt = load_vendor(engine.vendor)
    log = logger(trt)
    builder = started(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise _not_taken(parser.get_error(0), path, engine.vendor)
    if told := [said for said in log.told if "UINT8" in said]:
        raise EdgeflashError(f"{path}: {told[0][:200]}: {SYMMETRIC}")
    _check_tensors(network, component, path)
    config = _configured(trt, builder, engine)
    _choose_capabilities(trt, config, engine.vendor, capabilities)
    _set_rows(builder, network, config, component, engine.rows)
    if timing_cache is not None and engine.vendor != AHEAD:
        _read_timings(config, timing_cache)
    made = builder.build_serialized_network(network, config)
    if made is None:
        said = log.said(0)
        raise EdgeflashError(f"{component.name}: {engine.vendor} builds no engine: {said}")
    if timing_cache is not None and engine.vendor != AHEAD:
        write_atomic(timing_cache, config.get_timing_cache().serialize())
    return made


def logger(trt: Any) -> Any:
    """A logger for the vendor's objects, which must outlive them; keeps warnings and errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[str] = []
            self.failures: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.WARNING:
                self.told.append(_one_line(message))
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.failures.append(_one_line(message))

        def said(self, which: int) -> str:
            """One of the errors, the first or the last."""
            return self.failures[which][:400] if self.failures else "it says nothing"

    return Log()


def started(kind: Any, log: Any) -> Any:
    """One of the vendor's objects that need its library to start: a Builder or Runtime.

    Raises:
        EdgeflashError: it does not, with what the vendor says.
    """
    try:
        return kind(log)
    except TypeError:  # what its Python binding makes of a null pointer
        raise EdgeflashError(
            f"TensorRT does not start here: {log.said(0)}: edgeflash doctor"
        ) from None


def capability(trt: Any, vendor: str, name: str) -> Any:
    """The vendor's constant for a compute capability such as "8.9".

    Raises:
        EdgeflashError: one that this version does not know.
    """
    numbers = {key.removeprefix("SM") for key in trt.ComputeCapability.__members__ if "SM" in key}
    known = {f"{number[:-1]}.{number[-1]}" for number in numbers}
    if name not in known:
        raise unknown(f"compute capability in {vendor} {trt.__version__}:", name, known)
    return trt.ComputeCapability.__members__[f"SM{name.replace('.', '')}"]


def _not_taken(error: Any, path: Path, vendor: str) -> EdgeflashError:
    operator = f"{error.node_operator()} {error.node_name()}".strip()
    remedy = SYMMETRIC if error.node_operator() in QUANTIZED else "keep it out, or run on onnx"
    said = _one_line(error.desc())[:300]
    return EdgeflashError(f"{path}: {vendor} does not take {operator}: {said}: {remedy}")


def _check_tensors(network: Any, component: Component, path: Path) -> None:
    found = [network.get_input(i) for i in range(network.num_inputs)]
    found += [network.get_output(i) for i in range(network.num_outputs)]
    check_tensors({tensor.name: tensor.dtype for tensor in found}, component, path)


def check_tensors(kinds: Mapping[str, Any], component: Component, where: object) -> None:
    """Whether a network or engine takes and gives what the manifest says.

    Raises:
        EdgeflashError: it does not.
    """
    found = {name: NAMES.get(kind.name, kind.name) for name, kind in kinds.items()}
    for spec in (*component.inputs, *component.outputs):
        if found.get(spec.name) != spec.dtype:
            have = ", ".join(f"{name} {kind}" for name, kind in found.items())
            raise EdgeflashError(
                f"{where}: no tensor {spec.name} {spec.dtype} (has: {have}); export it again"
            )


def _configured(trt: Any, builder: Any, engine: Engine) -> Any:
    """A builder's configuration with the flags of ``engine``."""
    config, flag = builder.create_builder_config(), trt.BuilderFlag
    if not engine.tf32:
        config.clear_flag(flag.TF32)  # on by default, and a thousandth off
    for name in ("refit", "weight_streaming", "version_compatible"):
        if getattr(engine, name):
            config.set_flag(_member(trt, flag, name.upper()))
    if engine.hardware != "this":
        names = {"same_capability": "SAME_COMPUTE_CAPABILITY", "ampere_plus": "AMPERE_PLUS"}
        level = _member(trt, trt.HardwareCompatibilityLevel, names[engine.hardware])
        config.hardware_compatibility_level = level
    if engine.optimization_level is not None:
        config.builder_optimization_level = engine.optimization_level
    return config


def _member(trt: Any, kind: Any, name: str) -> Any:
    """A constant of the vendor's, which older versions may lack."""
    if name not in kind.__members__:
        remedy = f"pip install -U {trt.__name__}, or leave the option out"
        raise EdgeflashError(f"{trt.__name__} {trt.__version__} has no {name.lower()}: {remedy}")
    return kind.__members__[name]


def _choose_capabilities(trt: Any, config: Any, vendor: str, wanted: Sequence[str]) -> None:
    """The GPUs to build for; nothing to choose in plain TensorRT."""
    if vendor != AHEAD:
        return
    chosen = [capability(trt, vendor, name) for name in wanted] or [trt.ComputeCapability.CURRENT]
    config.num_compute_capabilities = len(chosen)
    for i, each in enumerate(chosen):
        config.set_compute_capability(each, i)


def _set_rows(
    builder: Any, network: Any, config: Any, component: Component, rows: tuple[int, int, int]
) -> None:
    """Fixes the free dimension of the inputs, or gives it its range."""
    tensors = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    free = [spec for spec in component.inputs if has_rows(spec)]
    if rows[0] == rows[-1]:
        for spec in free:
            tensors[spec.name].shape = shape_of(spec, rows[0])
    elif free:
        profile = builder.create_optimization_profile()
        for spec in free:
            profile.set_shape(spec.name, *(shape_of(spec, n) for n in rows))
        config.add_optimization_profile(profile)


def has_rows(spec: TensorSpec) -> bool:
    """Whether a tensor has a row for each picture."""
    return bool(spec.shape) and isinstance(spec.shape[0], str)


def shape_of(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The shape of a tensor for that many pictures.

    Raises:
        EdgeflashError: more than the pictures of a call is free.
    """
    if any(isinstance(side, str) for side in spec.shape[1:]):
        raise EdgeflashError(f"{spec.name} {list(spec.shape)}: TensorRT needs a fixed size here")
    return tuple(rows if isinstance(side, str) else side for side in spec.shape)


def bytes_of(spec: TensorSpec, rows: int) -> int:
    """Size of a tensor for that many pictures."""
    return int(np.prod(shape_of(spec, rows), dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _read_timings(config: Any, path: Path) -> None:
    known = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if known is None or not config.set_timing_cache(known, False):  # broken, or of another GPU
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
