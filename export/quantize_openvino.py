"""int8 and half precision for OpenVINO's models; int8 by NNCF."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeflash.errors import EdgeflashError

from .onnx_graph import clipped_half
from .quiet import quiet

if TYPE_CHECKING:
    from .capture import Captured
    from .to_openvino import OpenVinoTarget

PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention")
PIXELS = ("sample", "latent", "image", "prediction")
SMALL = 1024  # numbers; biases, scales and the frequencies of the timestep have fewer


@dataclass(frozen=True)
class Step:
    """One operator: its name, its OpenVINO type, and the names of those whose results it takes."""

    name: str
    kind: str
    takes: tuple[str, ...]


def to_half(model: Any) -> None:
    """Makes the weights of an `openvino.Model` float16, to be widened where they are used.

    `save_model` does so too, but with every constant, also with the frequencies of the timestep:
    half precision has no room for angles up to 1000 radians. Here constants of fewer than ``SMALL``
    numbers stay as they are.
    """
    import openvino
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        if node.data.size < SMALL:
            continue
        half = opset13.constant(clipped_half(node.data))
        wide = opset13.convert(half, openvino.Type.f32)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(wide.output(0))


def to_int8(model: Any, captured: Captured, options: OpenVinoTarget) -> Any:
    """Another `openvino.Model`, quantized with ranges from the student's own loop.

    Weights are int8 per output channel, activations uint8 with one range a tensor. With
    ``weights_only`` activations stay float.
    """
    steps = steps_of(model)
    if options.weights_only:
        kept = named(steps, captured.component, options.keep)
    else:
        kept = left_alone(steps, _ends(model, captured), captured.component, options)
    with quiet():
        import nncf  # which says hello

        ignored = nncf.IgnoredScope(names=sorted(kept))
        if options.weights_only:
            return nncf.compress_weights(model, ignored_scope=ignored)
        return nncf.quantize(
            model,
            nncf.Dataset([sample.inputs for sample in captured.samples]),
            # Sums, products and norms of activations stay float: only what has weights pays.
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(captured.samples),
            ignored_scope=ignored,
        )


def steps_of(model: Any) -> list[Step]:
    """The operators of an `openvino.Model`, in an order in which they can run."""
    return [
        Step(
            name=node.get_friendly_name(),
            kind=node.get_type_name(),
            takes=tuple(
                port.get_source_output().get_node().get_friendly_name() for port in node.inputs()
            ),
        )
        for node in model.get_ordered_ops()
    ]


@dataclass(frozen=True)
class Ends:
    """Names of the operators at the ends of a model, by the role of their tensor."""

    fed: dict[str, str]
    given: dict[str, str]


def _ends(model: Any, captured: Captured) -> Ends:
    def by_role(ports: Iterable[Any], specs: Iterable[Any]) -> dict[str, str]:
        roles = {spec.name: spec.role for spec in specs}
        return {
            port.get_node().get_friendly_name(): roles[name]
            for port in ports
            for name in port.get_names()
            if name in roles
        }

    return Ends(by_role(model.inputs, captured.inputs), by_role(model.outputs, captured.outputs))


def left_alone(steps: list[Step], ends: Ends, component: str, options: OpenVinoTarget) -> set[str]:
    """Names of the products that stay float: those asked for, those that lose more than they gain.

    As for ONNX, these are all that work on the timestep alone, products of two activations, and,
    unless asked for, what stands next to latents, images and conditioning.

    Raises:
        EdgeflashError: a pattern that fits no operator.
    """
    products = [step for step in steps if step.kind in PRODUCTS]
    active = _reached(steps, ends.fed)
    timeless = _reached(steps, [n for n, role in ends.fed.items() if role != "timestep"])
    left = {step.name for step in products if step.name not in timeless}
    left |= {step.name for step in products if active.issuperset(step.takes[:2])}
    if not options.edges:
        left |= _edges(steps, ends)
    return left | named(steps, component, options.keep)


def named(steps: list[Step], component: str, patterns: Iterable[str]) -> set[str]:
    """The names that fit patterns, in which * stands for anything.

    Raises:
        EdgeflashError: a pattern that fits none.
    """
    names = [step.name for step in steps]
    found: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise EdgeflashError(f"keep: no operator of {component} is called {pattern!r}")
        found.update(fitting)
    return found


def _reached(steps: list[Step], start: Iterable[str]) -> set[str]:
    """Names of all whose result depends on the values of these."""
    reached = set(start)
    for step in steps:
        if step.kind != "ShapeOf" and reached.intersection(step.takes):
            reached.add(step.name)
    return reached


def _edges(steps: list[Step], ends: Ends) -> set[str]:
    """Names of the products next to the latents, images and conditioning that go in and out."""
    fed = {name for name, role in ends.fed.items() if role in (*PIXELS, "conditioning")}
    given = {name for name, role in ends.given.items() if role in PIXELS}
    found: set[str] = set()
    for step in steps:
        if step.kind != "ShapeOf" and fed.intersection(step.takes):
            (found if step.kind in PRODUCTS else fed).add(step.name)
    for step in reversed(steps):
        if step.name in given and step.kind in PRODUCTS:
            found.add(step.name)
        elif step.name in given:
            given.update(step.takes)
    return found
