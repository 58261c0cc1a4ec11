"""int8 and half precision for OpenVINO's models; int8 by NNCF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .onnx_graph import clipped_half
from .plan import PIXELS, Kind, Operator, Quantizing
from .quiet import quiet

if TYPE_CHECKING:
    from .capture import Captured

PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention")
NO_BIAS = 1e-30
LAYERS = ["edgeflash", "layers"]  # where a model tells which of the network's its products are
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


def decide(
    model: Any, captured: Captured, options: Quantizing, layers: Mapping[str, str], out: Path
) -> dict[str, str]:
    """What becomes of each product of a model, by its name; told to the plan in ``out`` too.

    ``layers``: where the nodes of the ONNX graph that it was made from come from.
    """
    steps, ends = steps_of(model), _ends(model, captured)
    operators = operators_of(steps, ends, layers)
    words = options.decided(captured.component, operators, away(steps, ends, options))
    options.write_down(out, captured.component, operators, words)
    return words


def to_int8(
    model: Any, captured: Captured, words: Mapping[str, str], *, narrow: bool = False
) -> Any:
    """Another `openvino.Model`, quantized as decided, with ranges from the student's own loop.

    Weights are int8 per output channel, activations uint8 with one range a tensor: from the least
    to the greatest recorded value. NNCF's own choice is the mean of each call's, and SmoothQuant,
    whose scales are those of a few channels in a few calls: prompts that were not recorded lost 10
    to 15 dB more in the UNet of the embedded student.

    ``narrow``: weights of 7 bits.
    """
    others = {
        word: sorted(name for name, found in words.items() if found != word)
        for word in set(words.values())
    }
    with quiet():
        import nncf  # which says hello
        from nncf.quantization.advanced_parameters import OverflowFix
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        if "int8" in others:
            model = nncf.quantize(
                model,
                nncf.Dataset([sample.inputs for sample in captured.calibration]),
                # Sums, products and norms of activations stay float: only what has weights pays.
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(captured.calibration),
                ignored_scope=nncf.IgnoredScope(names=others["int8"]),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                    overflow_fix=OverflowFix.ENABLE if narrow else None,
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(-1, -1),  # none
                ),
            )
            give_biases(model)
        if "int8-weights" in others:
            ignored = nncf.IgnoredScope(names=others["int8-weights"])
            model = nncf.compress_weights(model, ignored_scope=ignored)
        return model


def give_biases(model: Any) -> None:
    """Gives convolutions that have no bias one that is too small to change any sum.

    OpenVINO's CPU runtime (2026.4) takes the scale of an int8 convolution without a bias for
    nothing where its result is also added to a later convolution's, and the batch is free: of the
    embedded student's tiny decoder 20 dB were left of 50. An exact zero would be optimized away.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        readers = node.output(0).get_target_inputs()
        if any(_is_bias(reader) for reader in readers):
            continue
        rank = node.get_output_partial_shape(0).rank.get_length()
        biased = opset13.add(node, opset13.constant(np.full([1] * rank, NO_BIAS, np.float32)))
        for reader in readers:
            reader.replace_source_output(biased.output(0))


def _is_bias(reader: Any) -> bool:
    """Whether an input is that of an addition of a constant."""
    node = reader.get_node()
    kinds = [port.get_source_output().get_node().get_type_name() for port in node.inputs()]
    return node.get_type_name() == "Add" and "Constant" in kinds


def operators_of(steps: list[Step], ends: Ends, layers: Mapping[str, str]) -> list[Operator]:
    """The products of an OpenVINO graph, which keeps the names of ONNX nodes."""
    active = _reached(steps, ends.fed)
    found = []
    for step in steps:
        if step.kind in PRODUCTS:
            loose = active.issuperset(step.takes[:2])
            kind: Kind = "attention" if loose else "linear" if step.kind == "MatMul" else "conv"
            words = {"int8"} if loose else {"int8", "int8-weights"}
            layer = layer_of(step.name, layers)
            found.append(Operator(step.name, layer, kind, frozenset(words)))
    return found


def layer_of(name: str, layers: Mapping[str, str]) -> str:
    """What plans call a product; ``layers``: the same of ONNX's nodes, of which it was made."""
    return layers.get(name.removesuffix("/WithoutBiases"), "")


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


def away(steps: list[Step], ends: Ends, options: Quantizing) -> set[str]:
    """Names of the products that stay float unasked, because they lose more than they gain.

    As for ONNX, these are all that work on the timestep alone, and, unless asked for, what stands
    next to latents, images and conditioning, and the shortcuts of skip connections.
    """
    timeless = _reached(steps, [n for n, role in ends.fed.items() if role != "timestep"])
    left = {step.name for step in steps if step.name not in timeless}
    if not options.edges:
        left |= _edges(steps, ends)
    if not options.shortcuts:
        joined = {step.name for step in steps if step.kind == "Concat"}
        left |= {s.name for s in steps if s.kind == "Convolution" and s.takes[0] in joined}
    return left


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
