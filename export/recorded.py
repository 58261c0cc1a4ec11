"""What a tape holds after a component has passed, as a file: the export goes on from it.

One safetensors file: ``golden/<prompt>/<array>``, ``plain/<without what>/<prompt>`` and
``loss_db/<without what>`` (see `Tape`), and calls,
``calls/<component>/<number>/<takes or gives>/<position>/<tensor>``: the component's own, and those
ahead, of one that ran beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeflash.golden import Array, Tensors, load_tensors, save_tensors

from .capture import Sample, Tape

FILE = "recorded.safetensors"
Calls = dict[str, dict[int, tuple[str, Array]]]  # of one call: takes or gives -> place -> tensor


def save(tape: Tape, component: str, samples: Sequence[Sample], folder: Path) -> None:
    """Writes all that was recorded so far, and the calls of the component that passed last."""
    told: Tensors = {
        f"loss_db/{what}": np.array(db, np.float64) for what, db in tape.loss_db.items()
    }
    for what, latents in tape.plain.items():
        told |= {f"plain/{what}/{i}": latent for i, latent in enumerate(latents)}
    for i, golden in enumerate(tape.goldens):
        told |= {f"golden/{i}/{name}": array for name, array in golden.items()}
    for name, calls in {**tape.ahead, component: samples}.items():
        told |= _written(f"calls/{name}", calls)
    save_tensors(folder / FILE, told)


def _written(head: str, samples: Sequence[Sample]) -> Tensors:
    told: Tensors = {}
    for i, sample in enumerate(samples):
        for side, tensors in (("takes", sample.inputs), ("gives", sample.outputs)):
            for j, (name, array) in enumerate(tensors.items()):
                told[f"{head}/{i}/{side}/{j}/{name}"] = array
    return told


def take_up(tape: Tape, component: str, folder: Path) -> tuple[Sample, ...]:
    """Winds a tape to where it was written, and gives the calls of that component."""
    told = load_tensors(folder / FILE)
    goldens, plain = dict[int, Tensors](), dict[str, dict[int, Array]]()
    calls: dict[str, dict[int, Calls]] = {}
    tape.loss_db = {}
    for key, array in told.items():
        kind, *rest = key.split("/", 1)
        if kind == "golden":
            number, name = rest[0].split("/", 1)
            goldens.setdefault(int(number), {})[name] = array
        elif kind == "plain":
            what, number = rest[0].split("/")
            plain.setdefault(what, {})[int(number)] = array
        elif kind == "loss_db":
            tape.loss_db[rest[0]] = array.tolist()
        else:
            of, number, side, place, name = rest[0].split("/", 4)
            sides = calls.setdefault(of, {}).setdefault(int(number), {"takes": {}, "gives": {}})
            sides[side][int(place)] = name, array
    tape.goldens = [goldens[i] for i in sorted(goldens)]
    tape.plain = {what: [latents[i] for i in sorted(latents)] for what, latents in plain.items()}
    own = _samples(calls.pop(component, {}))
    tape.ahead = {name: _samples(some) for name, some in calls.items()}
    return own


def _samples(calls: dict[int, Calls]) -> tuple[Sample, ...]:
    return tuple(Sample(*map(_in_order, calls[i].values())) for i in sorted(calls))


def _in_order(placed: dict[int, tuple[str, Array]]) -> Tensors:
    return dict(array for _, array in sorted(placed.items()))
