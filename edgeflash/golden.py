"""Goldens: what a student did in torch, recorded stage by stage, for the ladder wherever it lands.

A golden's safetensors file holds, float32 if not said otherwise::

    ids, ids_empty                    [1, s] int64   tokens of the prompt, and of no prompt
    conditioning, conditioning_empty  [1, s, d]      what the text encoder makes of them
    rows                              [k] int64      recorded rows of the schedule, of each graph
    input.<row>                       [1, c + k, …]  what the denoiser saw there: the latent, and
                                                     behind it the manifest's conditions
    output.<row>, output_empty.<row>  [1, c, h, w]   its raw answer with the prompt, and with none
    output_shifted                    [1, c, h, w]   its answer to the first row's input at the last
                                                     recorded row's time; only where k > 1
    times                             [m] float64    others, some of all schedules that ship
    output_at.<j>                     [1, c, h, w]   its answer to the first row's input at those
    cache.<j>.<row>                   [1, …]         what the denoiser left at that row for recorded
    cache_empty.<j>.<row>                            rows of its cached graph, with a prompt or none
    output_shifted_cached             [1, c, h, w]   as above, of the recorded rows of that graph
    latent                            [1, c, h, w]   after the whole loop
    image                             [1, 3, H, W]   as the decoder gives it
    encoded                           [1, ., h, w]   what the encoder, if any, makes of that image
    control                           [1, 3, H, W]   what the ControlNet or the adapter, if any, saw
    residual.<j>                      [1, ., ., .]   what it gave: a ControlNet at the first row,
                                                     with the prompt; an adapter for all of them

Of a second text encoder it holds ids_2, conditioning_2, pooled_2 and so on: see `told_by`. Where
zeros stand for no prompt, no text encoder is asked: ids_empty and conditioning_empty are not there.
Rows of a cached graph have output_empty and cache_empty where they are guided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import TensorSpec
from edgeflash.caching import ROLE, left_by, unguided
from edgeflash.conditioning import Conditioning, joined, told_of
from edgeflash.errors import EdgeflashError
from edgeflash.noise import randn
from edgeflash.schedule import Guidance, Schedule, Step, advance

Array = NDArray[Any]
Tensors = dict[str, Array]
MOST_ROWS = 4  # rows recorded of one schedule
MOST_TIMES = 3  # others, at which the first row's input is seen
# row, input, what is heard and raw outputs: with the prompt and, where it is guided, without
Watch = Callable[[int, Array, Sequence[Conditioning], Sequence[Array]], None]


class Network(Protocol):
    """A component called by role: arrays of batch 1 in, the array the pipeline goes on with out."""

    def __call__(self, **by_role: Array) -> Array: ...

    def answers(self, **by_role: Array) -> Tensors:
        """All outputs that have a role."""


@dataclass(frozen=True)
class Sampler:
    """One schedule with its guidance, on latents of ``shape`` [1, c, h, w].

    It is the reference loop: the exporter records the student with it, and the ladder runs the
    exported components with it. ``gated``: the denoiser's cached graph hears no prompt.
    ``beside``: what the denoiser sees behind x_t, [1, k, h, w].
    """

    schedule: Schedule
    guidance: Guidance
    shape: tuple[int, ...]
    gated: bool = False
    beside: Array | None = None

    def seen(self, step: Step, x: Array) -> Array:
        """What the denoiser is shown of x [1, c, h, w] at a step, [1, c + k, h, w]."""
        scaled = step.in_scale * x
        return scaled if self.beside is None else np.concatenate([scaled, self.beside], 1)

    def loop(
        self,
        network: Network,
        conditioning: Conditioning,
        empty: Conditioning,
        seed: int,
        watch: Watch | None = None,
        cached: Network | None = None,
    ) -> Array:
        """The latent after all steps; ``watch`` is told of every step.

        ``cached``: the denoiser's other graph, where rows of the schedule run it.
        """
        x, previous = self.schedule.begin(randn(self.shape, seed)), None
        heard = [dict(each) for each in (conditioning, empty)[: 1 + self.guidance.doubles]]
        for i, step in enumerate(self.schedule.steps):
            seen = self.seen(step, x)
            outputs = self._outputs(step, seen, heard, network, cached)
            guided = outputs[0]
            if len(outputs) > 1:
                guided = self.guidance.guide(outputs[1], outputs[0])
            if watch is not None:
                watch(i, seen, heard, outputs)
            fresh = randn(self.shape, seed, i + 1) if step.needs_noise else None
            following = advance(step, x, guided, noise=fresh, previous=previous)
            x, previous = following, (x, guided)
        return x

    def _outputs(
        self,
        step: Step,
        seen: Array,
        heard: list[dict[str, Array]],
        network: Network,
        cached: Network | None,
    ) -> list[Array]:
        """Raw answers at a step, one for each that is heard; what they leave is put there too."""
        if step.graph:
            assert cached is not None, "this row runs the denoiser's cached graph"
            sides = heard[:1] if self.gated else heard
            return [self.predict(cached, seen, step.t, side) for side in sides]
        answers = [network.answers(**self._told(seen, step.t, side)) for side in heard]
        left = [left_by(each) for each in answers]
        if self.gated:
            left = [unguided(left)] * len(left)
        for side, each in zip(heard, left, strict=True):
            side |= each
        return [each["prediction"].astype(np.float32, copy=False) for each in answers]

    def _told(self, seen: Array, t: float, conditioning: Conditioning) -> Tensors:
        """What the denoiser is given, by role."""
        roles = {"sample": seen, "timestep": np.array(t, np.float32), **conditioning}
        if self.guidance.kind == "embedded":
            roles["guidance"] = self.guidance.embedding()
        return roles

    def predict(self, network: Network, seen: Array, t: float, conditioning: Conditioning) -> Array:
        """One raw answer of the denoiser, float32 [1, c, h, w]."""
        return network(**self._told(seen, t, conditioning)).astype(np.float32, copy=False)

    def record(
        self,
        network: Network,
        conditioning: Conditioning,
        empty: Conditioning,
        seed: int,
        rows: Sequence[int],
        cached: Network | None = None,
    ) -> Tensors:
        """The denoiser's part of a golden: see the module."""
        told: Tensors = {"rows": np.array(rows, np.int64)}
        steps = self.schedule.steps

        def watch(
            i: int, seen: Array, heard: Sequence[Conditioning], outputs: Sequence[Array]
        ) -> None:
            if i not in rows:
                return
            if not steps[i].graph and len(outputs) == 1:
                outputs = [*outputs, self.predict(network, seen, steps[i].t, empty)]
            told[f"input.{i}"] = seen
            for output, mark in zip(outputs, ("", "_empty"), strict=False):
                told[f"output{mark}.{i}"] = output
            if steps[i].graph:
                for side, mark in zip(heard[: len(outputs)], ("", "_empty"), strict=False):
                    told.update(_kept(side, mark, whole_row_before(self.schedule, i)))

        told["latent"] = self.loop(network, conditioning, empty, seed, watch, cached)
        for graph, name in ((None, "output_shifted"), ("cached", "output_shifted_cached")):
            own = [row for row in rows if steps[row].graph == graph]
            if len(own) > 1:
                seen, t = told[f"input.{own[0]}"], steps[own[-1]].t
                left = left_for(told, self.schedule, own[0]) if graph else {}
                runs = cached if graph and cached else network
                told[name] = self.predict(runs, seen, t, {**conditioning, **left})
        return told

    def proofs(self, graph: str | None) -> int:
        """Calls of a graph that `record` makes beside those of the loop: to know what it proves."""
        steps = self.schedule.steps
        own = [row for row in rows_to_record(self.schedule) if steps[row].graph == graph]
        without_prompt = 0 if graph or self.guidance.doubles else len(own)
        return without_prompt + (len(own) > 1)  # and at another time

    def sweep(
        self, network: Network, told: Tensors, conditioning: Conditioning, times: Sequence[float]
    ) -> Tensors:
        """What time does, for a golden that was recorded: see the module."""
        answers = [self.predict(network, told["input.0"], t, conditioning) for t in times]
        at = {f"output_at.{j}": answer for j, answer in enumerate(answers)}
        return {"times": np.array(times, np.float64)} | at


def told_by(text_encoder: str, what: str, *, empty: bool = False) -> str:
    """Name of a text encoder's array in a golden: conditioning, pooled_2, ids_2_empty …"""
    return f"{what}{text_encoder.removeprefix('text_encoder')}{'_empty' * empty}"


def heard(
    told: Tensors,
    text_encoders: Iterable[str],
    inputs: Sequence[TensorSpec],
    size: tuple[int, int],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Of a golden's table, what a denoiser with these inputs hears: its prompt, and no prompt."""
    with_prompt: list[Tensors] = []
    without: list[Tensors] = []
    for name in text_encoders:
        for answers, empty in ((with_prompt, False), (without, True)):
            names = {role: told_by(name, role, empty=empty) for role in told_of(inputs)}
            answers.append({role: told[key] for role, key in names.items() if key in told})
    if not any(without):
        without = [{k: np.zeros_like(v) for k, v in answer.items()} for answer in with_prompt]
    return joined(with_prompt, inputs, size), joined(without, inputs, size)


def rows_to_record(schedule: Schedule) -> list[int]:
    """First, last and some rows in between, of those that run each graph."""
    found: set[int] = set()
    for graph in (None, "cached"):
        own = [i for i, step in enumerate(schedule.steps) if step.graph == graph]
        found |= {own[round(i)] for i in np.linspace(0, len(own) - 1, min(len(own), MOST_ROWS))}
    return sorted(found)


def times_to_sweep(schedules: Iterable[Schedule], recorded: Schedule) -> tuple[float, ...]:
    """Some timesteps from all over the schedules, but for the first and last of that recorded."""
    known = {recorded.steps[0].t, recorded.steps[-1].t}
    times = sorted({step.t for schedule in schedules for step in schedule.steps} - known)
    places = np.linspace(0, len(times) - 1, min(len(times), MOST_TIMES))
    return tuple(times[round(place)] for place in places)


def whole_row_before(schedule: Schedule, row: int) -> int:
    """The last row up to that one which runs the whole denoiser."""
    return max(i for i, step in enumerate(schedule.steps[: row + 1]) if not step.graph)


def _kept(heard: Conditioning, mark: str, row: int) -> Tensors:
    """What the denoiser left at a row, as a golden's table has it."""
    return {f"cache{mark}.{k.removeprefix(ROLE)}.{row}": v for k, v in left_by(heard).items()}


def left_for(
    told: Tensors, schedule: Schedule, row: int, *, empty: bool = False
) -> dict[str, Array]:
    """Of a golden's table, what the denoiser had left for a row of its cached graph, by role."""
    head, end = f"cache{'_empty' * empty}.", f".{whole_row_before(schedule, row)}"
    names = [key for key in told if key.startswith(head) and key.endswith(end)]
    return {ROLE + key.removeprefix(head).removesuffix(end): told[key] for key in names}


def seen_beside(told: Tensors) -> Array | None:
    """Of a golden's table, what the denoiser saw behind x_t, [1, k, h, w]; None: nothing."""
    beside = told[f"input.{told['rows'][0]}"][:, told["latent"].shape[1] :]
    return beside if beside.size else None


def noise_sha256(shape: tuple[int, ...], seed: int) -> str:
    """Checksum of the starting noise, float32 little-endian."""
    return hashlib.sha256(randn(shape, seed).astype("<f4").tobytes()).hexdigest()


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Writes a golden's arrays as safetensors."""
    from safetensors.numpy import save_file

    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, str(path))


def load_tensors(path: Path) -> Tensors:
    """Reads a golden's arrays.

    Raises:
        EdgeflashError: unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError) as error:
        raise EdgeflashError(f"{path}: unreadable golden ({error}): export again") from None
