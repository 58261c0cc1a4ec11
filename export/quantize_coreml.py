"""Fewer bits for Core ML's weights, linear or by palettes, and int8 for activations."""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflash.errors import EdgeflashError

from .coreml_program import evaluated, hushed, save

if TYPE_CHECKING:
    from .capture import Captured
    from .to_coreml import CoreMlTarget

KINDS = ("conv", "linear")  # operators whose weights are compressed: no mask, no embedding is
PALETTE = "lut"


def check(captured: Captured, precision: str) -> None:
    """Raises where a weight is not finite, of which no palette and no scale can be made."""
    import torch

    for name, weight in captured.program.named_parameters():
        if not torch.isfinite(weight).all():
            raise EdgeflashError(
                f"{captured.component}: weight {name} holds infinities or NaN, which have no place "
                f"in {precision}: export it in fp16, or mend the student"
            )


def compress(model: Any, captured: Captured, precision: str, options: CoreMlTarget) -> Any:
    """Another model: the weights of convolutions and linear layers in fewer bits.

    Raises:
        EdgeflashError: a weight that cannot be grouped so.
    """
    kept = {layer.name for layer in layers(model.get_spec()) if _fits(layer.name, options.keep)}
    with hushed():
        import coremltools.optimize.coreml as cto

        if precision == "w8a8":
            model = _quantize_activations(model, captured, kept)
        config = cto.OptimizationConfig(
            op_type_configs=dict.fromkeys(KINDS, _scheme(precision, options)),
            op_name_configs=dict.fromkeys(kept),
        )
        if not precision.startswith(PALETTE):
            return cto.linear_quantize_weights(model, config)
        found = cto.palettize_weights(model, config)
    if options.group:
        _refuse_left_out(found, captured.component, kept, options)
    return found


def _scheme(precision: str, options: CoreMlTarget) -> Any:
    import coremltools.optimize.coreml as cto

    if precision.startswith(PALETTE):
        return cto.OpPalettizerConfig(
            nbits=int(precision.removeprefix(PALETTE)),
            granularity="per_grouped_channel" if options.group else "per_tensor",
            group_size=options.group or 32,
            weight_threshold=options.smallest,
        )
    return cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int8", weight_threshold=options.smallest
    )


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_kept(patterns: tuple[str, ...], out: Path) -> None:
    """Raises where a pattern fits no operator of ``KINDS`` in any package of a bundle."""
    if not patterns:
        return
    from coremltools.models.utils import load_spec

    packages = sorted(out.glob("*.mlpackage"))
    names = [layer.name for path in packages for layer in layers(load_spec(str(path)))]
    for pattern in patterns:
        if not any(_fits(name, (pattern,)) for name in names):
            raise EdgeflashError(
                f"keep: no convolution or linear layer is called {pattern!r}: their names are like "
                f"{', '.join(names[:3])}"
            )


def _refuse_left_out(model: Any, component: str, kept: set[str], options: CoreMlTarget) -> None:
    """coremltools passes over what it cannot group; that is no palettized model."""
    for layer in layers(model.get_spec()):
        left = layer.held_as == "const" and math.prod(layer.shape) > options.smallest
        if left and layer.name not in kept:
            raise EdgeflashError(
                f"{component}: the weight {layer.shape} of {layer.name} does not divide into "
                f"groups of {options.group} channels: set another group, or keep={layer.name}"
            )


@dataclass(frozen=True)
class Layer:
    """An operator of ``KINDS``.

    Attributes:
        name: its name.
        gives: the tensor it makes.
        shape: of its weight.
        held_as: kind of the operator that makes its weight: const, or one of constexpr_*.
    """

    name: str
    gives: str
    shape: tuple[int, ...]
    held_as: str


def layers(spec: Any) -> Iterator[Layer]:
    """The operators of ``KINDS`` in a `Model` message, in the order they run."""
    for function in spec.mlProgram.functions.values():
        makers: dict[str, Any] = {}
        for operation in function.block_specializations[function.opset].operations:
            makers |= {output.name: operation for output in operation.outputs}
            if operation.type in KINDS:
                maker = makers[operation.inputs["weight"].arguments[0].name]
                sides = maker.outputs[0].type.tensorType.dimensions
                yield Layer(
                    name=operation.attributes["name"].immediateValue.tensor.strings.values[0],
                    gives=operation.outputs[0].name,
                    shape=tuple(side.constant.size for side in sides),
                    held_as=maker.type,
                )


def squeezed(folder: Path, packages: Iterable[str]) -> dict[str, str]:
    """Names of the operators whose weights have fewer bits, by the tensor that they make."""
    from coremltools.models.utils import load_spec

    specs = [load_spec(str(folder / f"{name}.mlpackage")) for name in packages]
    found = (layer for spec in specs for layer in layers(spec) if layer.held_as != "const")
    return {layer.gives: layer.name for layer in found}


def _quantize_activations(model: Any, captured: Captured, kept: set[str]) -> Any:
    """int8 for what convolutions and linear layers take and give, at one range a tensor.

    `coremltools.optimize.coreml.linear_quantize_activations`, with ranges from the evaluator: its
    own are measured by Apple's framework, on a Mac. What works on one row alone (that is made from
    the timestep) stays float.
    """
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models.utils import _apply_graph_pass

    ranges, ranks = measured(model, captured)
    alone = {layer.name for layer in layers(model.get_spec()) if ranks[layer.gives] < 3}
    scheme = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
    config = cto.OptimizationConfig(
        op_type_configs=dict.fromkeys(KINDS, scheme),
        op_name_configs=dict.fromkeys(kept | alone),
    )
    passes = [
        PASS_REGISTRY[f"compression::insert_{where}_quantize_dequantize_pair"]
        for where in ("prefix", "suffix")
    ]
    for inserts in passes:
        inserts.set_options([PassOption("config", config), PassOption("activation_stats", ranges)])
    passes.append(PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
    return _apply_graph_pass(model, passes, spec_version=8)  # iOS 17


def measured(model: Any, captured: Captured) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Smallest and largest value of every tensor over the recorded calls, and its rank."""
    ranges: dict[str, dict[str, float]] = {}
    ranks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="edgeflash-") as scratch:
        save(model, Path(scratch) / "float.mlpackage")
        for sample in captured.calibration:
            told = evaluated(Path(scratch), ["float"], captured, sample)
            given = [("", name, array) for name, array in sample.inputs.items()]
            for _, name, array in (*given, *told):
                low, high = float(array.min()), float(array.max())
                known = ranges.setdefault(name, {"rmin": low, "rmax": high})
                known["rmin"], known["rmax"] = min(low, known["rmin"]), max(high, known["rmax"])
                ranks[name] = array.ndim
    return ranges, ranks
