"""Whether a bundle fits a device, told without the device: one function a rule.

What devices take is data, published figures with their sources: `edgeflash/devices.toml`. A bundle
fits; or is tight: it runs, but near a limit, with one component loaded at a time, or partly on a
slower unit; or is unsupported as it is; or will be killed for its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import get_args

import numpy as np

from edgeflash.bundle import ANSWER, Bundle, Component, Manifest, TensorSpec, kind_of
from edgeflash.control import NAME
from edgeflash.devices import Device, Limit, Verdict
from edgeflash.errors import EdgeflashError
from edgeflash.shelf import absent

from .graph import Graph, Peak, Tensor, at_work, peak
from .graph_coreml import read_coreml
from .graph_onnx import read_onnx
from .on_coreml import packages_of, quieten

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
NEAR = 0.75  # of a memory limit; the runtime, its workspace and the app are not in the estimate
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """A rule that a component breaks.

    Attributes:
        verdict: what that means for the bundle.
        rule: the function that found it.
        where: the tensor, operator or file.
        found, limit: what is there, and what may be.
        source: who published the limit.
        advice: what to do.
    """

    verdict: Verdict
    rule: str
    component: str
    where: str
    found: str
    limit: str
    source: str
    advice: str


@dataclass(frozen=True)
class Seen:
    """A component, and what could be read of it.

    Attributes:
        graph: empty where nothing reads it here; ``unread`` tells why.
        weight_bytes: as they are stored.
        peak: of inputs and results, for one image.
        beside_bytes: weights that stay loaded with it, as both graphs of a denoiser in turns do.
    """

    component: Component
    graph: Graph
    weight_bytes: int
    peak: Peak
    unread: str = ""
    beside_bytes: int = 0

    @property
    def alone(self) -> bool:
        """Whether it draws by itself, as a fused graph does that an app ships for the others."""
        return self.component.name not in ANSWER

    @property
    def bytes(self) -> int:
        """The memory it takes, as estimated: weights, and results at their peak."""
        return self.weight_bytes + self.beside_bytes + self.peak.bytes


@dataclass(frozen=True)
class Judgement:
    """What `judge` found of a bundle, worst first."""

    device: Device
    seen: tuple[Seen, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        return self.findings[0].verdict if self.findings else "fits"

    @property
    def bytes(self) -> tuple[int, int]:
        """The memory its components take, as estimated: with all loaded, and one at a time."""
        parts = [part for part in self.seen if not part.alone]
        return all_loaded(parts), max(part.bytes for part in parts)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Rules that could not be applied to some component, as its graph was not read."""
        unread = {part.component.target for part in self.seen if part.unread}
        rules = [
            OF_GRAPHS[limit.rule]
            for limit in self.device.limits
            if limit.rule in OF_GRAPHS and unread & set(limit.targets or unread)
        ]
        return tuple(dict.fromkeys(rules))

    @property
    def told(self) -> str:
        """The verdict, and whether it is one of all rules."""
        if not self.unseen:
            return self.verdict
        return f"{self.verdict}, as far as could be read"

    @property
    def left_open(self) -> list[str]:
        """What was not judged, and why."""
        unread: dict[str, list[str]] = {}
        for part in self.seen:
            if part.unread and self.unseen:
                unread.setdefault(part.unread, []).append(part.component.name)
        rules = ", ".join(self.unseen)
        told = [f"{', '.join(of)}: not looked at: {rules}: {why}" for why, of in unread.items()]
        told += [
            f"{s.component.name}: {len(s.graph.unknown)} results of unknown shape were left out"
            for s in self.seen
            if s.graph.unknown
        ]
        if not any(limit.rule == "memory" for limit in self.device.limits):
            told.append("memory was not judged: no limit of this device is published")
        return told


def look(bundle: Bundle) -> tuple[Seen, ...]:
    """Reads the components and the fused graph, as far as the packages installed here can.

    Raises:
        EdgeflashError: a file that does not read as what the manifest says.
    """
    seen = tuple(_seen(bundle, component) for component in bundle.manifest.lowered)
    kept = [bundle.controlnet]  # open as long as the denoiser
    kept += [bundle.cached] * (not bundle.manifest.gated)  # behind a gate the whole one can go
    stored = sum(part.weight_bytes for part in seen if part.component in kept)
    beside = {bundle.denoiser.name: stored}
    return tuple(replace(s, beside_bytes=beside.get(s.component.name, 0)) for s in seen)


def judge(seen: tuple[Seen, ...], device: Device) -> Judgement:
    """Holds every component against the device's limits."""
    found = [_target(part, device) for part in seen]
    for limit in device.limits:
        about = [s for s in seen if not limit.targets or s.component.target in limit.targets]
        if limit.rule == "memory":  # an app loads the components, or the fused graph
            found += [
                memory(limit, [s for s in about if s.alone == alone]) for alone in (False, True)
            ]
        else:
            found += [RULES[limit.rule](limit, part) for part in about]
    findings = [finding for finding in found if finding]
    worst = sorted(findings, key=lambda f: VERDICTS.index(f.verdict), reverse=True)
    return Judgement(device, seen, tuple(worst))


def refuse_unfit(judgements: Sequence[Judgement], bundle: object) -> None:
    """Raises where a device would kill the bundle or cannot run it.

    Raises:
        EdgeflashError: with the first such finding and how many more there are.
    """
    bad = [
        (judged.device.name, finding)
        for judged in judgements
        for finding in judged.findings
        if VERDICTS.index(finding.verdict) >= VERDICTS.index("unsupported")
    ]
    if bad:
        device, first = bad[0]
        more = f" (and {len(bad) - 1} more)" if bad[1:] else ""
        raise EdgeflashError(
            f"{bundle} on {device}: {first.verdict}: {first.rule}: {first.component}: "
            f"{first.where}: {first.found}, limit: {first.limit}{more}"
        )


def memory(limit: Limit, seen: Sequence[Seen]) -> Finding | None:
    """Weights and the most that is alive, of the largest component alone and with all loaded."""
    if not seen:
        return None
    largest = max(seen, key=lambda part: part.bytes)
    together = all_loaded(seen)
    if together <= NEAR * limit.most:
        return None
    verdict: Verdict = limit.broken if largest.bytes > limit.most else "tight"
    advice = "load one component at a time, as edgeflash run --low-memory does"
    if largest.bytes > NEAR * limit.most:
        advice = _smaller(largest)
    name = largest.component.name
    where = str(largest.peak) or largest.component.files[0].path
    found = f"{_mib(together)} with all loaded, {_mib(largest.bytes)} one at a time"
    told = f"at most {_mib(limit.most)}"
    return Finding(verdict, limit.rule, name, where, found, told, limit.source, advice)


def all_loaded(seen: Sequence[Seen]) -> int:
    """Bytes of all weights, and of the results of the component with the highest peak."""
    return sum(part.weight_bytes for part in seen) + max(part.peak.bytes for part in seen)


def buffer(limit: Limit, seen: Seen) -> Finding | None:
    """Every weight and result lies in one buffer."""
    largest = max(_tensors(seen), key=lambda tensor: tensor.bytes, default=None)
    if largest is None or largest.bytes <= limit.most:
        return None
    return _broken(limit, seen, largest, _mib(largest.bytes), f"at most {_mib(limit.most)}")


def file(limit: Limit, seen: Seen) -> Finding | None:
    largest = max(seen.component.files, key=lambda file: file.bytes)
    if largest.bytes <= limit.most:
        return None
    return _broken(limit, seen, largest.path, _mib(largest.bytes), f"at most {_mib(limit.most)}")


def rank(limit: Limit, seen: Seen) -> Finding | None:
    """Tensors have so many sides at most."""
    worst = max(_tensors(seen), key=lambda tensor: len(tensor.shape), default=None)
    if worst is None or len(worst.shape) <= limit.most:
        return None
    return _broken(limit, seen, worst, f"rank {len(worst.shape)}", f"at most {limit.most}")


def axis(limit: Limit, seen: Seen) -> Finding | None:
    """Rows of inputs and outputs are whole multiples of so many bytes, or else are padded."""

    def padding(spec: TensorSpec) -> int:
        *rows, last = (side for side in spec.shape if isinstance(side, int))
        return math.prod(rows) * (-last * np.dtype(spec.dtype).itemsize % limit.multiple)

    specs = [spec for spec in (*seen.component.inputs, *seen.component.outputs) if spec.shape]
    worst = max(specs, key=padding, default=None)
    if worst is None or not padding(worst):
        return None
    where = f"{worst.name} {list(worst.shape)} {worst.dtype}"
    told = f"rows of a multiple of {limit.multiple} bytes"
    return _broken(limit, seen, where, f"{padding(worst):,} bytes of padding", told)


def precision(limit: Limit, seen: Seen) -> Finding | None:
    found = seen.component.precision
    if found in limit.takes:
        return None
    where = seen.component.files[0].path
    return _broken(limit, seen, where, found, f"one of {', '.join(limit.takes)}")


def engine(limit: Limit, seen: Seen) -> Finding | None:
    """The package that TensorRT's engines are built by."""
    found = seen.component.engine
    if found is None or found.vendor in limit.takes:
        return None
    where = seen.component.files[0].path
    return _broken(limit, seen, where, f"engines of {found.vendor}", ", ".join(limit.takes))


def static(limit: Limit, seen: Seen) -> Finding | None:
    """Inputs have no free sides."""
    for spec in seen.component.inputs:
        if any(isinstance(side, str) for side in spec.shape):
            where = f"{spec.name} [{', '.join(map(str, spec.shape))}]"
            return _broken(limit, seen, where, "a free side", "fixed sides")
    return None


def operators(limit: Limit, seen: Seen) -> Finding | None:
    """The runtime has them all."""
    run = at_work(seen.graph)
    strange = [op for op in run if op.kind not in limit.takes]
    if not strange:
        return None
    kinds = ", ".join(sorted({op.kind for op in strange}))
    found = f"{kinds}: {len(strange)} of {len(run)} operators"
    return _broken(limit, seen, strange[0], found, f"one of {len(limit.takes)} kinds")


def zero_points(limit: Limit, seen: Seen) -> Finding | None:
    """Quantization is symmetric."""
    found = seen.graph.off_centre
    if not found:
        return None
    count = f"{len(found)} zero points that are not 0, or of uint8"
    return _broken(limit, seen, found[0], count, "0, of int8")


OF_GRAPHS = {name: name for name in ("buffer", "rank", "operators", "zero_points")}
OF_GRAPHS["memory"] = "memory of results"  # that of weights is known from the files
RULES: dict[str, Callable[[Limit, Seen], Finding | None]] = {
    rule.__name__: rule
    for rule in (buffer, file, rank, axis, precision, engine, static, operators, zero_points)
}


def _broken(limit: Limit, seen: Seen, where: object, found: str, told: str) -> Finding:
    name, source, advice = seen.component.name, limit.source, limit.advice
    return Finding(limit.broken, limit.rule, name, str(where), found, told, source, advice)


def _tensors(seen: Seen) -> Iterator[Tensor]:
    return chain(seen.graph.weights.values(), seen.graph.tensors.values())


def _mib(number: float) -> str:
    return f"{number / MIB:,.1f} MiB"


def _smaller(seen: Seen) -> str:
    """What takes most of its memory down."""
    if seen.alone:
        return "draw with the components, one at a time, and leave this file out"
    if seen.peak.bytes > seen.weight_bytes:
        decoder = seen.component.name == "vae_decoder"
        return "a smaller --size" + decoder * ", or a tiny decoder: edgeflash distill --by decoder"
    if seen.component.precision in ("fp32", "fp16", "bf16"):
        return "edgeflash export --precision int8"
    return "a smaller student: edgeflash distill --by blocks"


def _target(seen: Seen, device: Device) -> Finding | None:
    name, target = seen.component.name, seen.component.target
    if target in device.runs:
        return None
    where, told = seen.component.files[0].path, " or ".join(device.runs)
    source, advice = "edgeflash, devices.toml", f"edgeflash export STUDENT --to {device.runs[0]}"
    return Finding("unsupported", "target", name, where, target, told, source, advice)


def _seen(bundle: Bundle, component: Component) -> Seen:
    graph, unread = _read(bundle, component)
    stored = sum(weight.bytes for weight in graph.weights.values())
    whole = sum(file.bytes for file in component.files)
    return Seen(component, graph, whole if unread else stored, peak(graph), unread)


def _read(bundle: Bundle, component: Component) -> tuple[Graph, str]:
    """The graph, or an empty one and why."""
    models = [bundle.folder / f.path for f in component.files if f.path.endswith(".onnx")]
    packages = packages_of(bundle.folder, component)
    needed = "onnx" if models else "coremltools"
    if not models and not packages:
        return Graph(), f"nothing reads the graph of {component.target} files"
    if absent([needed]):
        return Graph(), f"reading it needs {needed}: pip install {needed}"
    if models:
        return read_onnx(models[0], _shapes(component, bundle.manifest)), ""
    quieten()
    return read_coreml(packages), ""


def _shapes(component: Component, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Of the inputs, for one image: with guidance of the kind "cfg" that is two rows."""
    guidance, image, latent = manifest.guidance, manifest.image, manifest.latent
    both = ("text_encoder", "denoiser", NAME, "denoiser_cached")[: 3 if manifest.gated else 4]
    rows = 2 if guidance.doubles and kind_of(component.name) in both else 1
    cells = (image.height // latent.downsampling, image.width // latent.downsampling)
    usual = {
        "tokens": (rows, manifest.tokenizer.max_length),
        "conditioning": (rows, manifest.tokenizer.max_length),
        "sample": (rows, latent.channels, *cells),
        "latent": (rows, latent.channels, *cells),
        "image": (rows, 3, image.height, image.width),
    }
    return {
        spec.name: tuple(
            usual.get(spec.role, (rows,))[i] if isinstance(side, str) else side
            for i, side in enumerate(spec.shape)
        )
        for spec in component.inputs
    }
