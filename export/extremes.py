"""Ranges of tensors in an ONNX file: what they were in recorded calls.

The session maps the weights from their file; large models are run in a process of its own, which
has imported next to nothing: it needs what weights and the largest results take, and 0.2 GiB more.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from edgeflash.errors import EdgeflashError
from edgeflash.golden import Array, Tensors, load_tensors, save_tensors

LOW, HIGH = "/edgeflash_low", "/edgeflash_high"  # what is added to names of tensors
APART_BYTES = 2**28  # of weights
Ranges = dict[str, tuple[Array, Array]]


def extremes(path: Path, calls: Sequence[Tensors], names: Collection[str]) -> Ranges:
    """Least and greatest value, [1] each, of all float tensors that these nodes take and give.

    Args:
        path: the model, with shapes.
        calls: inputs by name.
        names: of nodes.
    """
    beside = path.with_name("extremes.onnx")
    wanted = _watched(path, names, beside)
    around = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    if around < APART_BYTES:
        found = _run(beside, calls)
    else:
        found = _run_apart(beside, calls)
    low, high = np.nanmin(found[:, ::2], axis=0), np.nanmax(found[:, 1::2], axis=0)
    return {name: (low[i : i + 1], high[i : i + 1]) for i, name in enumerate(wanted)}


def _watched(path: Path, names: Collection[str], out: Path) -> list[str]:
    """Writes the model so that it gives extremes alone -> the tensors that they are of."""
    model = onnx.load(str(path), load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model)
    wanted = [*_floats(model.graph, names)]
    del model.graph.output[:]
    for name in wanted:
        for kind, end in (("ReduceMin", LOW), ("ReduceMax", HIGH)):
            model.graph.node.append(helper.make_node(kind, [name], [name + end], keepdims=0))
            output = helper.make_tensor_value_info(name + end, onnx.TensorProto.FLOAT, [])
            model.graph.output.append(output)
    out.write_bytes(model.SerializeToString())
    return wanted


def _run(path: Path, calls: Sequence[Tensors]) -> Array:
    """Every output of every call, [calls, outputs]."""
    session = _session(path)
    return np.array([session.run(None, call) for call in calls])


def _run_apart(path: Path, calls: Sequence[Tensors]) -> Array:
    """The same by another process.

    Raises:
        EdgeflashError: it failed, or was ended, as for lack of memory.
    """
    given, found = path.with_suffix(".safetensors"), path.with_suffix(".npy")
    told = {f"{i}/{name}": array for i, call in enumerate(calls) for name, array in call.items()}
    save_tensors(given, told)
    command = [sys.executable, "-m", "edgeflash.export.extremes", *map(str, (path, given, found))]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        why = said[-1] if said else f"ended with {ended.returncode}"
        if ended.returncode == -signal.SIGKILL:
            why = "its process was killed, as for lack of memory"
        raise EdgeflashError(f"{path.parent.name}: ranges could not be taken: {why}")
    answer: Array = np.load(found)
    return answer


def _session(path: Path) -> onnxruntime.InferenceSession:
    """Each operator by itself, as ONNX Runtime's calibrators run them, and no copies of weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _floats(graph: onnx.GraphProto, names: Collection[str]) -> Iterator[str]:
    """Float tensors that these nodes take or give, but for weights, in the order of nodes."""
    weights = {weight.name for weight in graph.initializer}
    infos = (*graph.value_info, *graph.output, *graph.input)
    kinds = {info.name: info.type.tensor_type.elem_type for info in infos}
    near = (name for n in graph.node if n.name in names for name in (*n.input, *n.output))
    for name in dict.fromkeys(near):
        if name not in weights and kinds.get(name) == onnx.TensorProto.FLOAT:
            yield name


def main(path: str, given: str, found: str) -> None:
    """What the other process does."""
    calls: dict[str, Tensors] = {}
    for key, array in load_tensors(Path(given)).items():
        number, name = key.split("/", 1)
        calls.setdefault(number, {})[name] = array
    np.save(found, _run(Path(path), [calls[str(i)] for i in range(len(calls))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
