"""Components called by role at batch 1, and what a bundle's goldens have recorded of such calls."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeflash.bundle import ANSWER, Bundle, Component
from edgeflash.control import PICTURE, ROLE, added
from edgeflash.golden import Array, Tensors, heard, left_for, load_tensors, told_by
from edgeflash.roles import Session


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


def first_call(bundle: Bundle, component: Component) -> Tensors:
    """The inputs of the first recorded call of a component."""
    golden = bundle.manifest.goldens[0]
    told = load_tensors(bundle.folder / golden.tensors)
    schedule, space = bundle.manifest.schedules[golden.steps], bundle.manifest.latent
    of_cached = component == bundle.cached
    row = next(i for i in map(int, told["rows"]) if bool(schedule.steps[i].graph) == of_cached)
    prompt, _ = heard_by(bundle, told)
    roles = prompt | (left_for(told, schedule, row) if of_cached else {})
    roles |= {
        "sample": told[f"input.{row}"],
        "timestep": np.array(schedule.steps[row].t),
        "guidance": np.zeros(0),
        "latent": told["latent"] / space.scale + space.shift,
        "image": told["image"],
    }
    roles |= {name: array for name, array in told.items() if name.startswith((PICTURE, ROLE))}
    if component in bundle.text_encoders:
        roles["tokens"] = told[told_by(component.name, "ids")]
    if bundle.manifest.guidance.kind == "embedded":
        roles["guidance"] = bundle.manifest.guidance.embedding()
    return feeds(component, roles)


def heard_by(bundle: Bundle, told: Tensors) -> tuple[Tensors, Tensors]:
    """What the denoiser hears of a golden: its prompt, and no prompt; with both an adapter's maps.

    What a ControlNet gave is not among it: that is asked anew before every call.
    """
    names = [component.name for component in bundle.text_encoders]
    size = bundle.manifest.image.height, bundle.manifest.image.width
    with_prompt, without = heard(told, names, bundle.denoiser.inputs, size)
    maps = {} if bundle.controlnet else added(told)
    return with_prompt | maps, without | maps
