"""Which operator of a lowered network goes astray first: taps on every tensor of it and of another.

How graphs are read and run is the affair of their format: `bisect_onnx`, `bisect_openvino`.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflash.blame import floor_db
from edgeflash.bundle import Bundle, Component, Figure, Manifest
from edgeflash.calls import recorded_calls
from edgeflash.errors import EdgeflashError
from edgeflash.floors import PRECISIONS
from edgeflash.golden import Array, Tensors
from edgeflash.parity import psnr_db
from edgeflash.shelf import require, target_name

from .divergence import Divergence, off, told, worst_first

if TYPE_CHECKING:
    from .capture import Captured

Lowers = Callable[[Any, "Captured", Path], Path]

TAPS = 48  # tensors held at a time
_ONNX = ".bisect_onnx", "OnnxGraph", ("onnx", "onnxruntime", "onnxscript")
_IR = ".bisect_openvino", "OpenVinoGraph", ("torch", "onnx", "onnxscript", "openvino")
# target -> module and class that read what its bundles hold, and packages they need
FORMATS = {"onnx": _ONNX, "tensorrt": _ONNX, "openvino": _IR}
SUFFIXES = ".onnx", ".xml"  # of the file that such a graph is opened by


@dataclass(frozen=True)
class Node:
    """An operator of a graph.

    Attributes:
        kind: in its format's words.
        name: its own.
        takes: the tensors that go in.
        operands: of a product, what tells whether another graph computes it otherwise; of others
            nothing.
        layer: of a product, what plans call it.
    """

    kind: str
    name: str
    takes: tuple[str, ...]
    operands: tuple[str, ...] = ()
    layer: str = ""


class Graph(ABC):
    """A network in a file, of which every tensor can be looked at.

    ``makers``: tensor -> what makes it, in the order they run. ``named``: those of them that
    another graph of the network calls the same, and that can be looked at.
    """

    path: Path
    makers: Mapping[str, Node]
    named: Collection[str]

    @abstractmethod
    def values(self, names: Sequence[str], inputs: Tensors) -> list[Array]:
        """Inner tensors in one call."""

    @abstractmethod
    def results(self, inputs: Tensors) -> list[Array]:
        """What it gives in one call, with nothing inside looked at."""

    @abstractmethod
    def changes(self, name: str, product: Node) -> bool:
        """Whether it computes a tensor otherwise than a product of another graph does."""

    @abstractmethod
    def rest(self) -> None:
        """Lets go of what `results` holds."""


def first_divergence(
    whole: Graph, suspect: Graph, component: str, calls: Iterable[Tensors], floor_db: float
) -> Divergence | None:
    """The first operator of ``suspect``, in its own order, whose output falls below the floor.

    The two must be the same graph at different precisions, so that tensors share their names; what
    only one has (what quantizes) is passed over. The operator, and the product to blame, are told
    as ``whole`` has them, of which plans speak. Where nothing inside is off and what comes out is,
    that is told: a runtime then computes otherwise while it is looked at.

    Args:
        whole: the component in float32.
        suspect: its other graph.
        component: what it is.
        calls: inputs by name; those that come out wrong are gone over, the worst first.
        floor_db: PSNR that all tensors have to reach.

    Raises:
        EdgeflashError: they are not the same graph.
    """
    names = [name for name in suspect.makers if name in suspect.named and name in whole.named]
    worst = _worst_first(whole, suspect, list(calls), floor_db)
    for graph in (whole, suspect):
        graph.rest()
    for inputs in worst:
        for name, expected, got in _both(whole, suspect, names, inputs):
            node = whole.makers[name]
            if expected.shape != got.shape:
                raise EdgeflashError(
                    f"{suspect.path}: {node.name} gives {[*got.shape]}, and {[*expected.shape]} in "
                    f"{whole.path}: they are no two precisions of one network"
                )
            if found := off(node.kind, node.name, expected, got, floor_db):
                product = _product(name, whole, suspect)
                blamed = f"{component}/{product.layer or product.name}" if product else ""
                return replace(found, product=blamed)
        for expected, got in zip(whole.results(inputs), suspect.results(inputs), strict=True):
            if found := off("the whole,", "though no operator alone", expected, got, floor_db):
                return found
    return None


def _both(
    whole: Graph, suspect: Graph, names: Sequence[str], inputs: Tensors
) -> Iterator[tuple[str, Array, Array]]:
    """These tensors of one call, as both have them."""
    for start in range(0, len(names), TAPS):
        chunk = names[start : start + TAPS]
        tapped = (graph.values(chunk, inputs) for graph in (whole, suspect))
        yield from zip(chunk, *tapped, strict=True)


def _worst_first(
    whole: Graph, suspect: Graph, calls: Sequence[Tensors], floor_db: float
) -> list[Tensors]:
    if len(calls) < 2:
        return [*calls]
    ranked = []
    for inputs in calls:
        wanted, found = (graph.results(inputs) for graph in (whole, suspect))
        pairs = [each for each in zip(wanted, found, strict=True) if each[0].size]
        same = all(a.shape == b.shape for a, b in pairs)  # else a tap tells more
        ranked.append((min((psnr_db(*each) for each in pairs), default=0.0) if same else 0, inputs))
    return worst_first(ranked, floor_db)


def _product(name: str, whole: Graph, other: Graph) -> Node | None:
    """The nearest of the products that a tensor comes from which ``other`` computes otherwise."""
    seen, rank = {name}, [name]
    while rank:
        made = [(each, whole.makers[each]) for each in rank if each in whole.makers]
        for given, node in made:
            if node.operands and other.changes(given, node):
                return node
        before = dict.fromkeys(each for _, node in made for each in node.takes if each)
        rank = [each for each in before if each not in seen]
        seen.update(rank)
    return None


def lowered_again(
    target: Any,
    component: str,
    capture: Callable[[], Captured],
    suspect: Path,
    floor_db: float,
    lower: Lowers = lambda plain, captured, home: plain.lower(captured, home)[0],
) -> str:
    """What an export tells of a component that it made: lowers it in float32, and compares.

    Args:
        target: that it was exported to.
        component: its name.
        capture: makes its program once more.
        suspect: its file.
        floor_db: PSNR that all tensors have to reach.
        lower: target in float32, program, folder -> the file to compare with.
    """
    if target.precision_of(component) == "fp32":
        return ""
    captured, to = capture(), target_name(target)
    calls = [sample.inputs for sample in captured.samples]
    plain = target.model_copy(update={"precision": "fp32"})
    with tempfile.TemporaryDirectory(dir=suspect.parent, prefix=".fp32-") as scratch:
        whole = _opened(to, lower(plain, captured, Path(scratch)))
        found = first_divergence(whole, _opened(to, suspect), component, calls, floor_db)
    return told(found, target, component, target.keep)


def check_pair(bundle: Bundle, reference: Bundle) -> None:
    """Asks before the work whether two bundles can be held against each other.

    Raises:
        EdgeflashError: another target, or packages for it that are missing, bundles of different
            students, or a component that the reference lacks, has in another format or precision
            than fp32, or as another network.
    """
    for each in (bundle, reference):
        for component in each.manifest.components:
            if component.target not in FORMATS:
                told = f"only bundles of {', '.join(FORMATS)} can be bisected"
                raise EdgeflashError(f"{each.folder}: {told}, not of {component.target}")
            require("--bisect", FORMATS[component.target][2])
    ours, theirs = bundle.manifest.lineage, reference.manifest.lineage
    if (ours.student_sha256, ours.loras) != (theirs.student_sha256, theirs.loras):
        raise EdgeflashError(f"{reference.folder}: was made from another student")
    for component in bundle.manifest.components:
        whole = reference.component(component.name)
        if FORMATS[whole.target] != FORMATS[component.target]:
            told = f"its {whole.name} is of {whole.target}, that of {bundle.folder} of"
            raise EdgeflashError(
                f"{reference.folder}: {told} {component.target}: export it to the same target"
            )
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
    whole, suspect = (_graph_of(each, name) for each in (reference, bundle))
    calls = recorded_calls(bundle, bundle.component(name))
    return first_divergence(whole, suspect, name, calls, floor_db)


def _graph_of(bundle: Bundle, name: str) -> Graph:
    component = bundle.component(name)
    files = [file.path for file in component.files if file.path.endswith(SUFFIXES)]
    return _opened(component.target, bundle.folder / files[0])


def _opened(target: str, path: Path) -> Graph:
    module, kind, _ = FORMATS[target]
    graph: Graph = getattr(import_module(module, __package__), kind)(path)
    return graph


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
