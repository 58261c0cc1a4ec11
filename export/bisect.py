"""Which operator of an ONNX model goes astray first: taps on every tensor of it and of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from edgeflash.blame import floor_db
from edgeflash.bundle import Bundle, Component, Figure, Manifest
from edgeflash.calls import recorded_calls
from edgeflash.errors import EdgeflashError
from edgeflash.floors import PRECISIONS
from edgeflash.golden import Array, Tensors
from edgeflash.parity import psnr_db
from edgeflash.rounding import FOLDER, WIDE, rounded

from .divergence import Divergence, off, worst_first
from .wide import LAYER

TAPS = 48  # tensors held at a time
PRODUCTS = ("Conv", "MatMul", "Gemm")
TARGETS = ("onnx", "tensorrt")  # whose bundles hold ONNX files


@dataclass(frozen=True)
class _Graph:
    """Of an ONNX file, what there is to look up."""

    makers: dict[str, Any]  # tensor -> the node that makes it, in the order they run
    weights: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> _Graph:
        graph = onnx.load(str(path), load_external_data=False).graph
        makers = {name: node for node in graph.node for name in node.output if name}
        return cls(makers, frozenset(weight.name for weight in graph.initializer))


def first_divergence(
    reference: Path, suspect: Path, component: str, calls: Iterable[Tensors], floor_db: float
) -> Divergence | None:
    """The first operator of ``suspect``, in its own order, whose output falls below the floor.

    The two must be the same graph at different precisions, so that tensors share their names; what
    only one has (the QuantizeLinear pairs) is passed over. The operator, and the product to blame,
    are told as the reference has them, of which plans speak.

    Args:
        reference: the component's ONNX file in float32.
        suspect: its other one.
        component: what it is.
        calls: inputs by name; those that come out wrong are gone over, the worst first.
        floor_db: PSNR that all tensors have to reach.

    Raises:
        EdgeflashError: they are not the same graph.
    """
    whole, other = _Graph.of(reference), _Graph.of(suspect)
    names = [name for name in other.makers if name in whole.makers]
    for inputs in _worst_first(reference, suspect, list(calls), floor_db):
        for name, expected, got in _both(reference, suspect, names, inputs):
            node = whole.makers[name]
            if expected.shape != got.shape:
                raise EdgeflashError(
                    f"{suspect}: {node.name} gives {[*got.shape]}, and {[*expected.shape]} in "
                    f"{reference}: they are no two precisions of one network"
                )
            if found := off(node.op_type, node.name, expected, got, floor_db):
                product = _named(component, _product(name, whole, other))
                return replace(found, product=product)
    return None


def _both(
    reference: Path, suspect: Path, names: Sequence[str], inputs: Tensors
) -> Iterator[tuple[str, Array, Array]]:
    """These tensors of one call, as both have them."""
    for start in range(0, len(names), TAPS):
        chunk = names[start : start + TAPS]
        tapped = (_tapped(path, chunk, inputs) for path in (reference, suspect))
        yield from zip(chunk, *tapped, strict=True)


def _worst_first(
    reference: Path, suspect: Path, calls: Sequence[Tensors], floor_db: float
) -> list[Tensors]:
    if len(calls) < 2:
        return [*calls]
    sessions = [_opened(_as_typed(path), path.parent) for path in (reference, suspect)]
    ranked = []
    for inputs in calls:
        wanted, found = (session.run(None, inputs) for session in sessions)
        pairs = [each for each in zip(wanted, found, strict=True) if each[0].size]
        same = all(a.shape == b.shape for a, b in pairs)  # else a tap tells more
        ranked.append((min((psnr_db(*each) for each in pairs), default=0.0) if same else 0, inputs))
    return worst_first(ranked, floor_db)


def _product(name: str, whole: _Graph, other: _Graph) -> Any:
    """The nearest product among those that a tensor comes from which ``other`` computes otherwise.

    A node of ``whole``, or None.
    """
    seen, rank = {name}, [name]
    while rank:
        nodes = [whole.makers[each] for each in rank if each in whole.makers]
        for node in nodes:
            if node.op_type in PRODUCTS and _changed(node, whole, other):
                return node
        before = dict.fromkeys(each for node in nodes for each in node.input if each)
        rank = [each for each in before if each not in seen]
        seen.update(rank)
    return None


def _changed(node: Any, whole: _Graph, other: _Graph) -> bool:
    """Whether a product has other operands in ``other``, or is no such product there.

    Weights tell, where there are any: ONNX Runtime's quantizer rounds what a product takes for all
    that take it. Halves are no other operands.
    """
    given = node.output[0]
    same = other.makers.get(f"{given}.half") or other.makers.get(given)
    if same is None or same.op_type != node.op_type:
        return True
    operands = [each for each in node.input[:2] if each in whole.weights] or node.input[:2]
    return not {*operands, *(f"{each}.half" for each in operands)} & {*same.input}


def _named(component: str, product: Any) -> str:
    """What plans call it."""
    if product is None:
        return ""
    layers = [each.value for each in product.metadata_props if each.key == LAYER]
    return f"{component}/{(layers or [product.name])[0]}"


def check_pair(bundle: Bundle, reference: Bundle) -> None:
    """Asks before the work whether two bundles can be held against each other.

    Raises:
        EdgeflashError: another target, bundles of different students, or a component that the
            reference lacks, has in another precision than fp32, or has as another network.
    """
    for each in (bundle, reference):
        for component in each.manifest.components:
            if component.target not in TARGETS:
                told = f"only ONNX and TensorRT bundles can be bisected, not {component.target}"
                raise EdgeflashError(f"{each.folder}: {told}")
    ours, theirs = bundle.manifest.lineage, reference.manifest.lineage
    if (ours.student_sha256, ours.loras) != (theirs.student_sha256, theirs.loras):
        raise EdgeflashError(f"{reference.folder}: was made from another student")
    for component in bundle.manifest.components:
        whole = reference.component(component.name)
        if whole.precision != "fp32":
            told = f"{whole.name} is {whole.precision}; export it with --precision fp32"
            raise EdgeflashError(f"{reference.folder}: {told}, to bisect by it")
        if told := _unlike(bundle, component, reference, whole):
            raise EdgeflashError(
                f"{reference.folder}: its {whole.name} {told}, unlike that of {bundle.folder}: "
                "export it with the same options, but for the precision"
            )


def _unlike(bundle: Bundle, component: Component, other: Bundle, whole: Component) -> str:
    """What makes the second of two components another network; "" for nothing."""
    ours, theirs = (
        {spec.name: (*spec.shape, spec.dtype) for spec in each.inputs}
        for each in (component, whole)
    )
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            told = theirs.get(name)
            return f"takes {name} [{', '.join(map(str, told))}]" if told else f"takes no {name}"
    if component not in (bundle.denoiser, bundle.cached):
        return ""
    made = [_made(each.manifest, component) for each in (bundle, other)]
    unlike = [told for told in made[0] if made[0][told] != made[1][told]]
    return unlike[0] if unlike else ""


def _made(manifest: Manifest, denoiser: Component) -> dict[str, Any]:
    """What shapes a denoiser and does not show in its inputs."""
    merging, caching = manifest.merging, manifest.caching
    folded = {step.t for table in manifest.schedules.values() for step in table.steps}
    return {
        "merges another share of its tokens": merging and merging.share,
        "is cut otherwise": caching and (caching.method, caching.branch),
        "has another timestep in it": None if denoiser.input("timestep") else folded,
    }


def bisect_bundles(
    bundle: Bundle, reference: Bundle, name: str, floor_db: float
) -> Divergence | None:
    """`first_divergence` of a component of two bundles of one student, over all recorded calls.

    Raises:
        EdgeflashError: see `check_pair`.
    """
    check_pair(bundle, reference)
    whole, suspect = (_onnx_of(each, name) for each in (reference, bundle))
    calls = recorded_calls(bundle, bundle.component(name))
    return first_divergence(whole, suspect, name, calls, floor_db)


def _onnx_of(bundle: Bundle, name: str) -> Path:
    files = [file.path for file in bundle.component(name).files if file.path.endswith(".onnx")]
    return bundle.folder / files[0]


def told_by_component(
    bundle: Bundle, reference: Bundle, figures: Sequence[Figure]
) -> Iterator[str]:
    """A line a component: what goes astray first, below its floor, and what to try.

    ``figures``: the ladder's, of the bundle.
    """
    components = bundle.manifest.components
    coarsest = max((each.precision for each in components), key=PRECISIONS.index)
    for component in components:
        least_db = floor_db(figures, component.name, bundle.denoiser.name)
        found = bisect_bundles(bundle, reference, component.name, least_db)
        told = f"every tensor reaches {least_db:g} dB"
        if found:
            remedy = found.remedy(component.precision, coarsest, component.target)
            told = f"first below {least_db:g} dB: {found}; {remedy}"
        yield f"{component.name}: {told}"


def _opened(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    """Unoptimized, so that every tensor exists; with pairs of fp8, which ONNX Runtime breaks on."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(FOLDER, str(folder))
    told = model.SerializeToString()
    return ort.InferenceSession(told, options, providers=["CPUExecutionProvider"])


def _as_typed(path: Path) -> onnx.ModelProto:
    """The model, its weights left beside it, rounding as it is typed."""
    return onnx.load_from_string(rounded(path.read_bytes()))


def _tapped(path: Path, names: Sequence[str], inputs: Tensors) -> Iterator[Array]:
    """Runs a model for some of its inner tensors."""
    model = _as_typed(path)
    there = {name for node in model.graph.node for name in node.output}
    taps = [f"{name}{WIDE}" if f"{name}{WIDE}" in there else name for name in names]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
    yield from _opened(model, path.parent).run(taps, inputs)
