"""Core ML: on a Mac by Apple's framework, elsewhere by an evaluator in numpy."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from edgeflash.bundle import Component
from edgeflash.errors import EdgeflashError
from edgeflash.roles import NO_DEVICE, Array, Runtime, Session

from .mil_program import Program

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ne": "CPU_AND_NE"}


class CoreMlRuntime(Runtime):
    """Runs what `to_coreml` writes.

    The evaluator shows what is wrong with a package's bytes: weights, constants, sums that leave
    half precision. How fast it is says nothing of any device. The part that talks to Apple's
    framework follows coremltools' documentation, and has not been run yet.
    """

    needs: ClassVar[tuple[str, ...]] = ("coremltools",)
    opens: ClassVar[tuple[str, ...]] = ("coreml",)

    units: Literal["auto", "all", "cpu", "gpu", "ne", "evaluator"] = Field(
        "auto",
        description="where to run; gpu, ne: with the CPU; auto: all on a Mac, else evaluator",
    )
    halves: bool = Field(
        True, description="evaluator: round to float16 where the program does; else all is float32"
    )

    @property
    def untimed(self) -> str:
        if not self._evaluates:
            return ""
        return (
            "Core ML's programs are run by an evaluator in numpy here, whose times are those of no "
            "device: measure on a Mac"
        )

    @property
    def _evaluates(self) -> bool:
        return self.units == "evaluator" or (self.units == "auto" and sys.platform != "darwin")

    def open(self, folder: Path, component: Component) -> Session:
        """Loads the component's packages.

        Raises:
            EdgeflashError: Apple's framework is asked for elsewhere, or a package does not load.
        """
        quieten()
        packages = packages_of(folder, component)
        if self._evaluates:
            return Evaluated([Program(path, halves=self.halves) for path in packages], component)
        if sys.platform != "darwin":
            raise EdgeflashError(f"units {self.units}: need a Mac; use units=evaluator here")
        return OnDevice(packages, component, UNITS.get(self.units, "ALL"))

    def watch(
        self, folder: Path, component: Component, inputs: Mapping[str, Array]
    ) -> Iterator[tuple[str, str, Array]]:
        quieten()
        known = dict(inputs)
        for path in packages_of(folder, component):
            program = Program(path, halves=self.halves)
            for step, values in program.steps(known):
                for name, value in values.items():
                    yield step.kind, name, value
                    if name in program.outputs:
                        known[name] = value


def packages_of(folder: Path, component: Component) -> list[Path]:
    """The packages that a component consists of, in the order they run."""
    ends = "/Manifest.json"
    return [folder / f.path.removesuffix(ends) for f in component.files if f.path.endswith(ends)]


def quieten() -> None:
    """Off a Mac, coremltools warns of every library of Apple's that it misses."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)


class Evaluated(Session):
    """One package, or two of which the second goes on with what the first gives."""

    device = NO_DEVICE

    def __init__(self, programs: list[Program], component: Component) -> None:
        given = {name for program in programs for name in (*program.inputs, *program.outputs)}
        _check_names(component, given)
        self._programs = programs
        self._outputs = [spec.name for spec in component.outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        known = dict(inputs)
        for program in self._programs:
            known |= program(known)
        return {name: known[name] for name in self._outputs}

    def close(self) -> None:
        self._programs.clear()


class OnDevice(Session):
    """The same on Apple's framework, by `coremltools.models.MLModel`."""

    def __init__(self, packages: list[Path], component: Component, units: str) -> None:
        import coremltools as ct

        self._name = component.name
        self._outputs = [spec.name for spec in component.outputs]
        self._models = []
        for path in packages:
            try:
                model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[units])
            except Exception as error:  # of several kinds, by what went wrong
                said = " ".join(str(error).split())
                raise EdgeflashError(f"{path}: Core ML does not load it: {said}") from None
            self._models.append(model)
        given = {name for model in self._models for name in (*_taken(model), *_given(model))}
        _check_names(component, given)
        self.device = f"Core ML {units}{_placement(self._models, units)}"

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        known = dict(inputs)
        for model in self._models:
            try:
                known |= model.predict({name: known[name] for name in _taken(model)})
            except Exception as error:  # of several kinds, by what went wrong
                said = " ".join(str(error).split())
                raise EdgeflashError(f"{self._name}: Core ML failed in a run: {said}") from None
        return {name: known[name] for name in self._outputs}

    def close(self) -> None:
        self._models.clear()


def _taken(model: Any) -> list[str]:
    return list(model.input_description)


def _given(model: Any) -> list[str]:
    return list(model.output_description)


def _check_names(component: Component, found: set[str]) -> None:
    for spec in (*component.inputs, *component.outputs):
        if spec.name not in found:
            raise EdgeflashError(
                f"components.{component.name}: the model has no tensor {spec.name!r} "
                f"(has: {', '.join(sorted(found))}); export it again"
            )


def _placement(models: list[Any], units: str) -> str:
    """On what the framework means to run how many operators; "" where it cannot tell."""
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    found: Counter[str] = Counter()
    for model in models:
        try:
            path = model.get_compiled_model_path()
            plan = MLComputePlan.load_from_path(path, ct.ComputeUnit[units])
        except Exception:  # before macOS 14.4
            return ""
        for operation in plan.model_structure.program.functions["main"].block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is not None:
                kind = type(usage.preferred_compute_device).__name__
                found[kind.removeprefix("ML").removesuffix("ComputeDevice")] += 1
    told = ", ".join(f"{kind} {count}" for kind, count in found.most_common())
    return f" ({told} operators)" if told else ""
