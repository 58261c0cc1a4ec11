"""The parity ladder: a bundle, held against what the student did in torch. Needs no torch itself.

====  ==========================================================================================
L0    every component loads; tokens and starting noise are those of the goldens
L1    each component alone, on recorded inputs
L2    the denoiser's answer to the prompt (with - without), over the recorded steps, and to time,
      over the timesteps of all schedules
L3    the latent after the whole loop, from the tokens on
L4    the image; of a fused graph, how close its pictures are to those of the components
====  ==========================================================================================

It runs on `Runtime.exact`: an overflow in halves shows, though the CPU may compute in float32.
Components are opened one at a time, and each once; but for the denoiser's cached graph and its
ControlNet, which run in the loop beside it. What a denoiser takes of that is never recorded whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeflash import control, parity, shelf
from edgeflash.bundle import Bundle, Component, Figure, Golden, kind_of
from edgeflash.caching import cached_name
from edgeflash.calls import Part, heard_by
from edgeflash.errors import EdgeflashError
from edgeflash.floors import FLOORS, PRECISIONS, RATIOS, check_floors, floor_of
from edgeflash.golden import (
    Array,
    Sampler,
    Tensors,
    left_for,
    load_tensors,
    noise_sha256,
    seen_beside,
    told_by,
)
from edgeflash.noise import randn
from edgeflash.roles import Runtime, Session
from edgeflash.tokenizer import read_tokenizer

Found = Iterator[tuple[str, str, float]]  # rung, metric, value


def verify(
    bundle: Bundle,
    runtime: Runtime | None = None,
    floors: Mapping[str, float] | None = None,
    *,
    usual: Mapping[str, float] | None = None,
    beside: Sequence[tuple[Golden, Tensors]] = (),
) -> tuple[Figure, ...]:
    """Climbs the ladder and gives every figure, the worst over all goldens.

    Args:
        bundle: what to check.
        runtime: where to run it; None: the runtime that goes with its target, as it is by default.
        floors: by name, see `edgeflash.floors`.
        usual: what counts where they say nothing; then those of the manifest, or the defaults.
        beside: goldens that do not ship, to climb it on as well.

    Raises EdgeflashError for a floor of no metric, no goldens, or what does not load (L0).
    """
    check_floors(floors or {})
    if not bundle.manifest.goldens:
        raise EdgeflashError(f"{bundle.folder}: has no goldens to verify against: export it again")
    exact, limits = (runtime or runtime_for(bundle)).exact(), (floors or {}, usual or {})
    climb = _Climb(bundle, exact, limits, _goldens(bundle, beside))
    return tuple(climb.figures())


def _goldens(
    bundle: Bundle, beside: Sequence[tuple[Golden, Tensors]]
) -> tuple[tuple[Golden, Tensors], ...]:
    shipped = (
        (each, load_tensors(bundle.folder / each.tensors)) for each in bundle.manifest.goldens
    )
    return (*shipped, *beside)


def refuse_below(figures: tuple[Figure, ...], folder: object) -> None:
    """Raises for the lowest rung that is not reached: its component, figure and limits."""
    for figure in sorted(figures, key=lambda figure: figure.rung):
        if not figure.passed:
            above = figure.ceiling is not None and figure.value > figure.ceiling
            limit = f"ceiling {figure.ceiling:g}" if above else f"floor {figure.floor:g}"
            raise EdgeflashError(
                f"{folder}: rung {figure.rung}, {figure.component}: {figure.metric} "
                f"{figure.value:.4g} misses its {limit}"
            )


def runtime_for(bundle: Bundle) -> Runtime:
    """The runtime that opens the bundle's components, with its default options."""
    return shelf.make(Runtime, shelf.opener(bundle.manifest.components[0].target), {})


class _Effect:
    """What a change of one input does to the output: in torch, and here; over all goldens and rows.

    Together they stand out from the errors of int8, which in the last steps, where the prompt has
    little left to say, are larger than its whole effect.
    """

    def __init__(self) -> None:
        self.wanted: list[Array] = []
        self.found: list[Array] = []

    def add(self, wanted: Array, found: Array) -> None:
        self.wanted.append(wanted)
        self.found.append(found)

    def kept(self) -> float:
        """1: all of it is there, 0: nothing."""
        return parity.projection(np.concatenate(self.wanted), np.concatenate(self.found))


_Effects = dict[str, _Effect]  # by metric


@dataclass
class _Climb:
    """One way up, with what is carried from rung to rung."""

    bundle: Bundle
    runtime: Runtime
    floors: tuple[Mapping[str, float], ...]  # the first that says something counts
    goldens: tuple[tuple[Golden, Tensors], ...]
    drawn: list[Tensors] = field(default_factory=list)  # what the bundle itself made, a golden each
    controlnet: Part | None = None  # while the denoiser is open

    def figures(self) -> Iterator[Figure]:
        manifest = self.bundle.manifest
        self.drawn = [{} for _ in self.goldens]
        yield self._figure("tokenizer", "L0", "equal", self._tokens_equal())
        yield self._figure("noise", "L0", "equal", self._noise_equal())
        for component in manifest.components:
            part = Part(self._open(component), component)
            yield self._figure(component.name, "L0", "loads", 1.0)
            found: dict[tuple[str, str], list[float]] = {}
            climb = getattr(self, f"_{kind_of(component.name)}")
            for rung, metric, value in climb(part):
                found.setdefault((rung, metric), []).append(value)
            part.session.close()
            for (rung, metric), values in found.items():
                yield self._figure(component.name, rung, metric, _worst(metric, values))
        if manifest.fused:
            found_db = self._fused(manifest.fused)
            yield self._figure(manifest.fused.name, "L0", "loads", 1.0)
            yield self._figure(manifest.fused.name, "L4", "fused_psnr_db", min(found_db))

    def _open(self, component: Component) -> Session:
        try:
            return self.runtime.open(self.bundle.folder, component)
        except EdgeflashError as error:
            raise EdgeflashError(f"rung L0, {component.name}: {error}") from None

    def _tokens_equal(self) -> float:
        bundle = self.bundle
        tokenize = read_tokenizer(bundle.folder, bundle.manifest.tokenizer)
        equal = all(tokenize(g.prompt).ids == g.token_ids for g, _ in self.goldens)
        for component in bundle.text_encoders:
            if component.tokenizer:
                tokenize = read_tokenizer(bundle.folder, component.tokenizer)
                key = told_by(component.name, "ids")
                equal &= all(tokenize(g.prompt).ids == (*told[key][0],) for g, told in self.goldens)
        return float(equal)

    def _noise_equal(self) -> float:
        shape = self._sampler(self.goldens[0]).shape
        return float(all(noise_sha256(shape, g.seed) == g.noise_sha256 for g, _ in self.goldens))

    def _sampler(self, golden: tuple[Golden, Tensors]) -> Sampler:
        manifest, shape = self.bundle.manifest, golden[1]["latent"].shape
        schedule = manifest.schedules[golden[0].steps]
        beside = seen_beside(golden[1])
        return Sampler(schedule, manifest.guidance, shape, manifest.gated, beside)

    def _text_encoder(self, part: Part) -> Found:
        name = part.component.name
        for (_, told), drawn in zip(self.goldens, self.drawn, strict=True):
            for empty in (False, True):
                if (ids := told_by(name, "ids", empty=empty)) not in told:
                    continue
                for role, answer in part.answers(tokens=told[ids]).items():
                    if (key := told_by(name, role, empty=empty)) in told:
                        drawn[key] = answer
                        yield from _compare("L1", told[key], answer)

    def _denoiser(self, part: Part) -> Found:
        cached, self.controlnet = (
            Part(self._open(other), other) if other else None
            for other in (self.bundle.cached, self.bundle.controlnet)
        )
        yield from self._one_graph(part, None)
        for golden, drawn in zip(self.goldens, self.drawn, strict=True):
            both = heard_by(self.bundle, drawn)
            sampler, told = self._sampler(golden), golden[1]
            asked = self._steered(part, told)
            drawn["latent"] = sampler.loop(asked, *both, golden[0].seed, cached=cached)
            yield from _compare("L3", told["latent"], drawn["latent"])
        for beside in filter(None, (cached, self.controlnet)):
            beside.session.close()
        self.controlnet = None

    def _steered(self, part: Part, told: Tensors) -> Part | control.Controlled:
        """The denoiser as the loop of a golden calls it: its ControlNet is asked before."""
        if self.controlnet is None:
            return part
        return control.Controlled(part, self.controlnet, told[control.PICTURE])

    def _adapter(self, part: Part) -> Found:
        for (_, told), drawn in zip(self.goldens, self.drawn, strict=True):
            for role, found in control.maps(part, told[control.PICTURE], 1).items():
                drawn[role] = found
                yield from _compare("L1", told[role], found)

    def _controlnet(self, part: Part) -> Found:
        for golden, told in self.goldens:
            step = self.bundle.manifest.schedules[golden.steps].steps[0]
            prompt, _ = heard_by(self.bundle, told)
            roles = {"sample": told["input.0"], "timestep": np.array(step.t), **prompt}
            for role, found in control.residuals(part, roles, told[control.PICTURE]).items():
                yield from _compare("L1", told[role], found)

    def _denoiser_cached(self, part: Part) -> Found:
        yield from self._one_graph(part, "cached")

    def _one_graph(self, part: Part, graph: str | None) -> Found:
        """L1 and L2 of one of its graphs, over all goldens."""
        effects = {name: _Effect() for name in RATIOS}
        for golden in self.goldens:
            yield from self._alone(part, self._sampler(golden), golden[1], graph, effects)
        for metric, effect in effects.items():
            if effect.wanted:
                yield "L2", metric, effect.kept()

    def _alone(
        self, part: Part, sampler: Sampler, told: Tensors, graph: str | None, effects: _Effects
    ) -> Found:
        """L1 at every recorded row; what prompt and time do there is added to ``effects``."""
        steps = sampler.schedule.steps
        rows = [int(row) for row in told["rows"] if steps[row].graph == graph]
        prompt, empty = heard_by(self.bundle, told)
        asked = self._steered(part, told)

        def predict(i: int, t: float, heard: Tensors, *, bare: bool = False) -> Array:
            left = left_for(told, sampler.schedule, i, empty=bare) if graph else {}
            return sampler.predict(asked, told[f"input.{i}"], t, heard | left)

        def moved(i: int, t: float, other: Array) -> None:
            found = answers[i] - predict(i, t, prompt)
            effects["timestep_ratio"].add(told[f"output.{i}"] - other, found)

        answers = {i: predict(i, steps[i].t, prompt) for i in rows}
        for i in rows:
            yield from _compare("L1", told[f"output.{i}"], answers[i])
            if f"output_empty.{i}" in told:
                wanted = told[f"output.{i}"] - told[f"output_empty.{i}"]
                found = answers[i] - predict(i, steps[i].t, empty, bare=True)
                effects["delta_ratio"].add(wanted, found)
        if len(rows) > 1:
            shifted = told["output_shifted_cached" if graph else "output_shifted"]
            moved(rows[0], steps[rows[-1]].t, shifted)
        for j, t in enumerate(() if graph else told.get("times", ())):
            moved(0, float(t), told[f"output_at.{j}"])

    def _vae_decoder(self, part: Part) -> Found:
        space = self.bundle.manifest.latent
        answer = part.component.output("image")
        low, high = answer.range
        peak = high - low
        for (_, told), drawn in zip(self.goldens, self.drawn, strict=True):
            alone = part(latent=told["latent"] / space.scale + space.shift)
            yield from _compare("L1", told["image"], alone, peak=peak)
            image = part(latent=drawn["latent"] / space.scale + space.shift)
            yield "L4", "psnr_db", parity.psnr_db(told["image"], image, peak)
            yield "L4", "ssim", parity.ssim(told["image"], image, peak)
            pixels = np.rint((image - low) * (255 / peak)).clip(0, 255)
            drawn["pixels"] = pixels.transpose(0, 2, 3, 1)

    def _vae_encoder(self, part: Part) -> Found:
        for _, told in self.goldens:
            yield from _compare("L1", told["encoded"], part(image=told["image"]))

    def _fused(self, fused: Component) -> list[float]:
        """PSNR in dB of every golden's picture by the fused graph, against the components'."""
        session = self._open(fused)
        tokens, noise = fused.inputs
        draws, rows = (int(side) for side in noise.shape[:2])
        found = []
        for golden, drawn in zip(self.goldens, self.drawn, strict=True):
            shape, seed = self._sampler(golden).shape, golden[0].seed
            fresh = np.stack([randn(shape, seed, k) for k in range(draws)]).repeat(rows, 1)
            ids = tokens.arranged(golden[1]["ids"].repeat(rows, 0))
            pixels = session({tokens.name: ids, noise.name: fresh})[fused.outputs[0].name]
            found.append(parity.psnr_db(drawn["pixels"], pixels[:1], peak=255))
        session.close()
        return found

    def _figure(self, name: str, rung: str, metric: str, value: float) -> Figure:
        whole = rung in ("L3", "L4")
        component = "pipeline" if whole else name
        floor, ceiling = self._limits(name, rung, component, metric)
        return Figure.model_validate(
            {
                "rung": rung,
                "component": component,
                "metric": metric,
                "value": round(value, 6),
                "floor": floor,
                "ceiling": ceiling,
                "prompts": self._prompts(name, metric),
            }
        )

    def _prompts(self, name: str, metric: str) -> int | None:
        """How many prompts a figure is of; what time does is recorded of some alone."""
        if metric == "loads":
            return None
        if metric != "timestep_ratio":
            return len(self.goldens)
        cached = kind_of(name) == cached_name("denoiser")
        moved = {"output_shifted_cached"} if cached else {"output_shifted", "times"}
        return sum(bool(moved & told.keys()) for _, told in self.goldens)

    def _limits(
        self, name: str, rung: str, component: str, metric: str
    ) -> tuple[float | None, float | None]:
        if rung == "L0":
            return 1.0, None
        precision = self._precision(name, rung)
        asked = (floor_of(table, precision, rung, metric) for table in self.floors)
        floor = next((each for each in asked if each is not None), None)
        if floor is None:
            for figure in self.bundle.manifest.parity:
                if (figure.rung, figure.component, figure.metric) == (rung, component, metric):
                    return figure.floor, figure.ceiling
            floor = floor_of(FLOORS[precision], precision, rung, metric)
        return floor, 2 - floor if metric in RATIOS and floor is not None else None

    def _precision(self, name: str, rung: str) -> str:
        """Of one component; of the coarsest for the rungs that all of them lead to."""
        components = self.bundle.manifest.components
        used = {c.precision for c in components if rung in ("L3", "L4") or c.name == name}
        return max(used, key=PRECISIONS.index)


def _compare(rung: str, reference: Array, found: Array, peak: float | None = None) -> Found:
    yield rung, "psnr_db", parity.psnr_db(reference, found, peak)
    yield rung, "cosine", parity.cosine(reference, found)
    yield rung, "relative_l2", parity.relative_l2(reference, found)


def _worst(metric: str, values: list[float]) -> float:
    if metric in RATIOS:
        return max(values, key=lambda value: abs(value - 1))
    return max(values) if metric == "relative_l2" else min(values)
