"""A Core ML package, evaluated in numpy: no Apple device needed, and no compiler trusted.

It reads the bytes that ship, weights in fewer bits included, and rounds after each operator to the
type that the program names. On a device sums may run in another order, some within an operator in
half precision, and operators may be fused: figures there differ in the last bits.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.errors import EdgeflashError

from .mil_compressed import COMPRESSED
from .mil_operators import OPERATORS
from .mil_weights import DTYPES, Weights, constant, kind_of

Array = NDArray[Any]

LISTS = {"values"}  # parameters that take several tensors


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        kind: MIL's name of it.
        run: what it computes.
        fixed: parameters that are written into it.
        takes: parameters -> names of tensors.
        gives: names and types of its results.
        spent: tensors that nothing needs after it.
    """

    kind: str
    run: Callable[..., Any]
    fixed: dict[str, Any]
    takes: dict[str, tuple[str, ...]]
    gives: tuple[tuple[str, str], ...]
    spent: tuple[str, ...]


class Program:
    """One function of a package (`.mlpackage`).

    Attributes:
        inputs: name -> type and shape, of what it takes.
        outputs: names of what it gives.
    """

    def __init__(self, package: Path, function: str = "", *, halves: bool = True) -> None:
        """Reads it all; constants are held as float32.

        Args:
            package: the folder.
            function: empty: the package's default.
            halves: round to float16 where the program says so; else everything is float32.

        Raises:
            EdgeflashError: no package, weights that are not what the program says, or an operator
                that the evaluator lacks.
        """
        self.package = package
        self._halves = halves
        model = read_model(package)
        functions = model.mlProgram.functions
        name = function or model.description.defaultFunctionName or "main"
        if name not in functions:
            raise EdgeflashError(f"{package}: has no function {name!r}: {', '.join(functions)}")
        told = functions[name]
        block = told.block_specializations[told.opset]
        self.inputs = {
            tensor.name: (
                kind_of(tensor.type),
                tuple(side.constant.size for side in tensor.type.tensorType.dimensions),
            )
            for tensor in told.inputs
        }
        self.outputs = tuple(block.outputs)
        self._constants: dict[str, Any] = {}
        self._steps = self._read(block.operations, Weights(data_folder(package) / "weights"))

    def _read(self, operations: Any, weights: Weights) -> tuple[Step, ...]:
        last_read = _last_read(operations, self.outputs)
        steps = []
        for number, told in enumerate(operations):
            fixed = {k: _plain(constant(v, weights)) for k, v in told.attributes.items()}
            name = fixed.pop("name", told.outputs[0].name)
            if told.type == "const":
                self._constants[told.outputs[0].name] = fixed["val"]
                continue
            takes = {}
            for parameter, given in told.inputs.items():
                kinds = {binding.WhichOneof("binding") for binding in given.arguments}
                if kinds == {"value"}:
                    fixed[parameter] = _plain(constant(given.arguments[0].value, weights))
                else:
                    takes[parameter] = tuple(binding.name for binding in given.arguments)
            run = self._operator(told.type, name, {*fixed, *takes})
            gives = tuple((output.name, kind_of(output.type)) for output in told.outputs)
            if told.type in COMPRESSED:
                step = Step(told.type, run, fixed, takes, gives, ())
                self._constants.update(self._evaluated(step, self._constants))
                continue
            read = {tensor for names in takes.values() for tensor in names}
            spent = tuple(tensor for tensor in read if last_read.get(tensor) == number)
            steps.append(Step(told.type, run, fixed, takes, gives, spent))
        return tuple(steps)

    def _operator(self, kind: str, name: str, given: set[str]) -> Callable[..., Any]:
        run = OPERATORS.get(kind) or COMPRESSED.get(kind)
        where = f"{self.package}: operator {kind} ({name})"
        if run is None:
            raise EdgeflashError(f"{where} is not known to the evaluator")
        if unknown := given - set(inspect.signature(run).parameters):
            raise EdgeflashError(f"{where}: the evaluator does not know its {min(unknown)}")
        return run

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs it on arrays by name; raises what `steps` raises."""
        known = dict(self._given(inputs))
        for _, values in self.steps(inputs):
            known |= {name: value for name, value in values.items() if name in self.outputs}
        return {name: known[name] for name in self.outputs}

    def steps(self, inputs: Mapping[str, Array]) -> Iterator[tuple[Step, dict[str, Array]]]:
        """Runs it operator by operator, and gives each one's results by name.

        Raises:
            EdgeflashError: an input that is missing or of another shape, or an operator used in a
                way that the evaluator does not know.
        """
        values = {**self._constants, **self._given(inputs)}
        for step in self._steps:
            results = self._evaluated(step, values)
            yield step, results
            values |= results
            for name in step.spent:
                del values[name]

    def _given(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, (_, shape) in self.inputs.items():
            if name not in inputs or inputs[name].shape != shape:
                found = inputs[name].shape if name in inputs else "missing"
                raise EdgeflashError(f"{self.package}: input {name} is {found}, not {shape}")
        return {name: self._typed(inputs[name], kind) for name, (kind, _) in self.inputs.items()}

    def _evaluated(self, step: Step, values: Mapping[str, Any]) -> dict[str, Array]:
        given = dict(step.fixed)
        for parameter, names in step.takes.items():
            found = [values[name] for name in names]
            given[parameter] = found if parameter in LISTS else found[0]
        try:
            with np.errstate(all="ignore"):  # what overflows shall be seen in the result
                told = step.run(**given)
        except (ValueError, IndexError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            where = f"{self.package}: operator {step.kind} ({step.gives[0][0]})"
            raise EdgeflashError(f"{where} cannot be evaluated: {said}") from error
        results = told if isinstance(told, tuple) else (told,)
        return {
            name: self._typed(result, kind)
            for (name, kind), result in zip(step.gives, results, strict=True)
        }

    def _typed(self, array: Any, kind: str) -> Array:
        """Rounded to a MIL type; floats are float32 that hold no more than that type does."""
        with np.errstate(all="ignore"):
            if kind == "FLOAT16" and self._halves:
                array = np.asarray(array).astype(np.float16)
            if kind in ("FLOAT16", "FLOAT32"):
                return np.asarray(array, np.float32)
            return np.asarray(array).astype(DTYPES[kind])


def read_model(package: Path) -> Any:
    """The `Model` message of a package.

    Raises:
        EdgeflashError: no package, or one of another kind.
    """
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    path = _model_file(package)
    try:
        model = Model_pb2.Model.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise EdgeflashError(f"{path}: does not read as a Core ML model: {error}") from None
    if model.WhichOneof("Type") != "mlProgram":
        raise EdgeflashError(f"{path}: is no mlprogram, but a {model.WhichOneof('Type')}")
    return model


def data_folder(package: Path) -> Path:
    """Where the model file and its weights lie."""
    return _model_file(package).parent


def _model_file(package: Path) -> Path:
    path = package / "Manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = manifest["itemInfoEntries"]
        return package / "Data" / str(entries[manifest["rootModelIdentifier"]]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EdgeflashError(f"{path}: not the manifest of a Core ML package: {error}") from None


def _last_read(operations: Any, outputs: tuple[str, ...]) -> dict[str, int]:
    """Tensor -> number of the operator that reads it last; not for what is given in the end."""
    found: dict[str, int] = {}
    for number, told in enumerate(operations):
        for name in read_by(told):
            found[name] = number
    constants = {told.outputs[0].name for told in operations if told.type.startswith("const")}
    return {name: number for name, number in found.items() if name not in {*outputs, *constants}}


def read_by(told: Any) -> Iterator[str]:
    for given in told.inputs.values():
        for binding in given.arguments:
            if binding.WhichOneof("binding") == "name":
                yield binding.name


def _plain(value: Any) -> Any:
    """Halves as float32; numbers of rank 0 stay arrays."""
    if isinstance(value, np.ndarray) and value.dtype == np.float16:
        return value.astype(np.float32)
    return value
