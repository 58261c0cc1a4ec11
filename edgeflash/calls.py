"""Components called by role at batch 1, and what a bundle's goldens have recorded of such calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from edgeflash.bundle import ANSWER, PREDICTING, Bundle, Component
from edgeflash.control import PICTURE, ROLE, added
from edgeflash.golden import Array, Tensors, heard, left_for, load_tensors, told_by
from edgeflash.roles import Session
from edgeflash.schedule import Schedule


class Part:
    """A component on a runtime, called by role at batch 1."""

    def __init__(self, session: Session, component: Component) -> None:
        self.session = session
        self.component = component
        self.answer = component.output(ANSWER[component.name])

    def __call__(self, **by_role: Array) -> Array:
        return self.answers(**by_role)[self.answer.role]

    def answers(self, **by_role: Array) -> Tensors:
        """All outputs that have a role."""
        found = self.session(feeds(self.component, by_role))
        specs = [spec for spec in self.component.outputs if spec.role != "unused"]
        return {spec.role: found[spec.name][:1].astype(np.float32) for spec in specs}


def feeds(component: Component, by_role: Mapping[str, Array]) -> Tensors:
    """Arrays of batch 1 under the component's own names, dtypes and, where it is fixed, batch."""
    inputs: Tensors = {}
    for spec in component.inputs:
        array = spec.arranged(by_role[spec.role])
        fixed = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1
        array = np.full((1,), array) if spec.shape and array.ndim == 0 else array
        inputs[spec.name] = np.repeat(array, fixed, axis=0) if fixed > 1 else array
    return inputs


def recorded_calls(bundle: Bundle, component: Component) -> Iterator[Tensors]:
    """The inputs of every recorded call of a component, golden by golden."""
    for golden in bundle.manifest.goldens:
        told = load_tensors(bundle.folder / golden.tensors)
        schedule = bundle.manifest.schedules[golden.steps]
        for row, empty in _of(bundle, component, told, schedule):
            yield feeds(component, _roles(bundle, component, told, schedule, row, empty=empty))


def _of(
    bundle: Bundle, component: Component, told: Tensors, schedule: Schedule
) -> Iterator[tuple[int, bool]]:
    """Row of the schedule, and whether no prompt is heard, of each call that a golden tells of."""
    of_cached = component == bundle.cached
    rows = [i for i in map(int, told["rows"]) if bool(schedule.steps[i].graph) == of_cached]
    if component in bundle.text_encoders:
        yield rows[0], False
        if told_by(component.name, "ids", empty=True) in told:
            yield rows[0], True
    elif component.name not in PREDICTING or bundle.controlnet:  # recorded at the first row alone
        yield rows[0], False
    else:
        for row in rows:
            yield from ((row, empty) for empty in (False, True) if _output(row, empty) in told)


def _output(row: int, empty: bool) -> str:
    return f"output{'_empty' * empty}.{row}"


def _roles(
    bundle: Bundle,
    component: Component,
    told: Tensors,
    schedule: Schedule,
    row: int,
    *,
    empty: bool,
) -> Tensors:
    """What a component takes in a recorded call, by role."""
    space, roles = bundle.manifest.latent, dict(heard_by(bundle, told)[empty])
    if component == bundle.cached:
        roles |= left_for(told, schedule, row, empty=empty)
    roles |= {
        "sample": told[f"input.{row}"],
        "timestep": np.array(schedule.steps[row].t),
        "guidance": np.zeros(0),
        "latent": told["latent"] / space.scale + space.shift,
        "image": told["image"],
    }
    roles |= {name: array for name, array in told.items() if name.startswith((PICTURE, ROLE))}
    if component in bundle.text_encoders:
        roles["tokens"] = told[told_by(component.name, "ids", empty=empty)]
    if bundle.manifest.guidance.kind == "embedded":
        roles["guidance"] = bundle.manifest.guidance.embedding()
    return roles


def heard_by(bundle: Bundle, told: Tensors) -> tuple[Tensors, Tensors]:
    """What the denoiser hears of a golden: its prompt, and no prompt; with both an adapter's maps.

    What a ControlNet gave is not among it: that is asked anew before every call.
    """
    names = [component.name for component in bundle.text_encoders]
    size = bundle.manifest.image.height, bundle.manifest.image.width
    with_prompt, without = heard(told, names, bundle.denoiser.inputs, size)
    maps = {} if bundle.controlnet else added(told)
    return with_prompt | maps, without | maps
