"""A captured component as a Core ML program, by coremltools."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflash import shelf
from edgeflash.bundle import Component, File, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Array, Runtime

from .quiet import quiet

if TYPE_CHECKING:
    from .capture import Captured, Sample

PASSED_ON = {"mul", "add", "cast", "expand_dims", "reshape", "squeeze", "slice_by_index"}


def convert(captured: Captured, *, ios: int, half: bool) -> Any:
    """A `coremltools.models.MLModel` of type mlprogram, with the names and types of the specs.

    Args:
        captured: the component; at a fixed size, and its batch too.
        ios: oldest iOS that shall run it; macOS goes with it (16: 13, 17: 14, 18: 15).
        half: float16 throughout, but for angles of the timestep, which half precision has no room
            for.

    Raises:
        EdgeflashError: it holds an operator that coremltools cannot express.
    """
    with hushed():
        import coremltools as ct

        types = [
            [ct.TensorType(name=spec.name, dtype=np.dtype(spec.dtype)) for spec in specs]
            for specs in (captured.inputs, captured.outputs)
        ]
        precision: Any = ct.precision.FLOAT32
        if half:
            precision = ct.transform.FP16ComputePrecision(lambda op: not is_angle(op))
        try:
            return ct.convert(
                captured.program.run_decompositions({}),
                inputs=types[0],
                outputs=types[1],
                minimum_deployment_target=ct.target[f"iOS{ios}"],
                compute_precision=precision,
                skip_model_load=True,
            )
        except Exception as error:  # of many kinds, by what went wrong
            said = " ".join(str(error).split())[:300]
            raise EdgeflashError(
                f"{captured.component}: coremltools does not convert it: {said}"
            ) from error


def is_angle(operation: Any) -> bool:
    """Whether all that becomes of an operator's result is sines and cosines."""
    if operation.op_type in ("sin", "cos"):
        return True
    if operation.op_type not in PASSED_ON:
        return False
    readers = [reader for output in operation.outputs for reader in output.child_ops]
    return bool(readers) and all(is_angle(reader) for reader in readers)


def save(model: Any, path: Path) -> list[Path]:
    """Writes the package, and gives its files; the manifest, by which it is opened, first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with hushed():
        model.save(str(path))
    return package_files(path)


def package_files(path: Path) -> list[Path]:
    """The files of a package, its manifest first."""
    manifest = path / "Manifest.json"
    rest = sorted(file for file in path.rglob("*") if file.is_file() and file != manifest)
    return [manifest, *rest]


def bisected(model: Any, scratch: Path) -> list[Any]:
    """Two models of about equal weight, the second of which goes on with what the first gives."""
    with hushed():
        import coremltools as ct

        save(model, scratch / "whole.mlpackage")
        ct.models.utils.bisect_model(
            str(scratch / "whole.mlpackage"), str(scratch), check_output_correctness=False
        )
        paths = [scratch / f"whole_chunk{number}.mlpackage" for number in (1, 2)]
        return [ct.models.MLModel(str(path), skip_model_load=True) for path in paths]


def save_chunks(models: Iterable[Any], whole: Path, most_mib: float) -> list[Path]:
    """Writes chunks of a package that would be too large, as `…Chunk1` and `…Chunk2`.

    Raises:
        EdgeflashError: a chunk is too large, too.
    """
    files: list[Path] = []
    for number, model in enumerate(models, 1):
        chunk = save(model, whole.with_name(f"{whole.stem}Chunk{number}.mlpackage"))
        weights = [file for file in chunk if file.parent.name == "weights"]
        mib = sum(file.stat().st_size for file in weights) / 2**20
        if mib > most_mib:
            raise EdgeflashError(
                f"chunk_mib: chunk {number} of 2 has {mib:.0f} MiB, more than {most_mib:g}: "
                "choose a precision of fewer bits, or a higher limit"
            )
        files += chunk
    return files


def join(package: Path, others: Mapping[str, Path], scratch: Path) -> None:
    """Puts other packages into one as functions of their own; equal weights are held once.

    What it did before is its default function, `main`.
    """
    with hushed():
        import coremltools as ct

        plan = ct.utils.MultiFunctionDescriptor(str(package))
        for name, path in others.items():
            plan.add_function(str(path), "main", name)
        plan.default_function_name = "main"
        ct.utils.save_multifunction(plan, str(scratch / package.name))
    shutil.rmtree(package)
    shutil.move(scratch / package.name, package)


def evaluated(
    folder: Path, packages: Sequence[str], captured: Captured, sample: Sample, **options: Any
) -> Iterator[tuple[str, str, Array]]:
    """Operator, name and value of every tensor of a recorded call, as `on_coreml` evaluates it."""
    files = tuple(
        File(path=f"{name}.mlpackage/Manifest.json", bytes=0, sha256="") for name in packages
    )
    component = Component(
        name=captured.component,
        target="coreml",
        precision="",
        files=files,
        inputs=captured.inputs,
        outputs=captured.outputs,
    )
    inputs = {spec.name: _rows_of(sample.inputs[spec.name], spec) for spec in captured.inputs}
    return shelf.make(Runtime, "coreml", options).watch(folder, component, inputs)


def _rows_of(array: Array, spec: TensorSpec) -> Array:
    """One row, as often and in the type as a package takes it."""
    return np.repeat(array, int(spec.shape[0]), axis=0).astype(spec.dtype)


@contextmanager
def hushed() -> Iterator[None]:
    """Keeps what coremltools logs, warns and counts off the terminal; errors are still raised."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
