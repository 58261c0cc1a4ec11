"""Goldens: what a student did in torch, recorded stage by stage, for the ladder wherever it lands.

A golden's safetensors file holds, float32 if not said otherwise::

    ids, ids_empty                    [1, s] int64   tokens of the prompt, and of no prompt
    conditioning, conditioning_empty  [1, s, d]      what the text encoder makes of them
    rows                              [k] int64      recorded rows of the schedule
    input.<row>                       [1, c, h, w]   what the denoiser saw there
    output.<row>, output_empty.<row>  [1, c, h, w]   its raw answer with the prompt, and with none
    output_shifted                    [1, c, h, w]   its answer to the first row's input at the last
                                                     recorded row's time; only where k > 1
    latent                            [1, c, h, w]   after the whole loop
    image                             [1, 3, H, W]   as the decoder gives it
    encoded                           [1, ., h, w]   what the encoder, if any, makes of that image

Of a second text encoder it holds ids_2, conditioning_2, pooled_2 and so on: see `told_by`. Where
zeros stand for no prompt, no text encoder is asked: ids_empty and conditioning_empty are not there.
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
from edgeflash.conditioning import Conditioning, joined, told_of
from edgeflash.errors import EdgeflashError
from edgeflash.noise import randn
from edgeflash.schedule import Guidance, Schedule, advance

Array = NDArray[Any]
Tensors = dict[str, Array]
MOST_ROWS = 4  # rows recorded of one schedule
Watch = Callable[
    [int, Array, Array, Array | None], None
]  # row, input, outputs with prompt, without


class Network(Protocol):
    """A component called by role: arrays of batch 1 in, the array the pipeline goes on with out."""

    def __call__(self, **by_role: Array) -> Array: ...


@dataclass(frozen=True)
class Sampler:
    """One schedule with its guidance, on latents of ``shape`` [1, c, h, w].

    It is the reference loop: the exporter records the student with it, and the ladder runs the
    exported components with it.
    """

    schedule: Schedule
    guidance: Guidance
    shape: tuple[int, ...]

    def loop(
        self,
        network: Network,
        conditioning: Conditioning,
        empty: Conditioning,
        seed: int,
        watch: Watch | None = None,
    ) -> Array:
        """The latent after all steps; ``watch`` is told of every step."""
        x, previous = self.schedule.begin(randn(self.shape, seed)), None
        for i, step in enumerate(self.schedule.steps):
            seen = step.in_scale * x
            output, bare = self.predict(network, seen, step.t, conditioning), None
            guided = output
            if self.guidance.kind == "cfg" and self.guidance.scale != 1:
                bare = self.predict(network, seen, step.t, empty)
                guided = self.guidance.guide(bare, output)
            if watch is not None:
                watch(i, seen, output, bare)
            fresh = randn(self.shape, seed, i + 1) if step.needs_noise else None
            following = advance(step, x, guided, noise=fresh, previous=previous)
            x, previous = following, (x, guided)
        return x

    def predict(self, network: Network, seen: Array, t: float, conditioning: Conditioning) -> Array:
        """One raw answer of the denoiser, float32 [1, c, h, w]."""
        roles = {"sample": seen, "timestep": np.array(t, np.float32), **conditioning}
        if self.guidance.kind == "embedded":
            roles["guidance"] = self.guidance.embedding()
        return network(**roles).astype(np.float32, copy=False)

    def record(
        self,
        network: Network,
        conditioning: Conditioning,
        empty: Conditioning,
        seed: int,
        rows: Sequence[int],
    ) -> Tensors:
        """The denoiser's part of a golden: see the module."""
        told: Tensors = {"rows": np.array(rows, np.int64)}

        def watch(i: int, seen: Array, output: Array, bare: Array | None) -> None:
            if i in rows:
                t = self.schedule.steps[i].t
                bare = self.predict(network, seen, t, empty) if bare is None else bare
                told.update({f"input.{i}": seen, f"output.{i}": output, f"output_empty.{i}": bare})

        told["latent"] = self.loop(network, conditioning, empty, seed, watch)
        if len(rows) > 1:
            seen, t = told[f"input.{rows[0]}"], self.schedule.steps[rows[-1]].t
            told["output_shifted"] = self.predict(network, seen, t, conditioning)
        return told


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


def rows_to_record(steps: int) -> list[int]:
    """First, last and some rows in between of a schedule with that many."""
    return sorted({round(i) for i in np.linspace(0, steps - 1, min(steps, MOST_ROWS))})


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
