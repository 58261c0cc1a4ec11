"""What a tape holds after a component has passed, as a file: the export goes on from it.

One safetensors file: ``golden/<prompt>/<array>``, ``unmerged/<prompt>``, ``merging_db``, and the
component's own calls, ``call/<number>/<takes or gives>/<position>/<tensor>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeflash.golden import Tensors, load_tensors, save_tensors

from .capture import Sample, Tape

FILE = "recorded.safetensors"


def save(tape: Tape, samples: Sequence[Sample], folder: Path) -> None:
    """Writes all that was recorded so far, and the calls of the component that passed last."""
    told = {f"unmerged/{i}": latent for i, latent in enumerate(tape.unmerged)}
    told["merging_db"] = np.array(tape.merging_db, np.float64)
    for i, golden in enumerate(tape.goldens):
        told |= {f"golden/{i}/{name}": array for name, array in golden.items()}
    for i, sample in enumerate(samples):
        for way, tensors in (("takes", sample.inputs), ("gives", sample.outputs)):
            for j, (name, array) in enumerate(tensors.items()):
                told[f"call/{i}/{way}/{j}/{name}"] = array
    save_tensors(folder / FILE, told)


def take_up(tape: Tape, folder: Path) -> tuple[Sample, ...]:
    """Winds a tape to where it was written, and gives the calls of that component."""
    told = load_tensors(folder / FILE)
    goldens: dict[int, Tensors] = {}
    unmerged: dict[int, np.ndarray] = {}
    calls: dict[int, dict[str, dict[int, tuple[str, np.ndarray]]]] = {}
    for key, array in told.items():
        kind, *rest = key.split("/", 1)
        if kind == "golden":
            number, name = rest[0].split("/", 1)
            goldens.setdefault(int(number), {})[name] = array
        elif kind == "unmerged":
            unmerged[int(rest[0])] = array
        elif kind == "call":
            number, way, place, name = rest[0].split("/", 3)
            ways = calls.setdefault(int(number), {"takes": {}, "gives": {}})
            ways[way][int(place)] = name, array
    tape.goldens = [goldens[i] for i in sorted(goldens)]
    tape.unmerged = [unmerged[i] for i in sorted(unmerged)]
    tape.merging_db = told["merging_db"].tolist()
    return tuple(Sample(*map(_in_order, calls[i].values())) for i in sorted(calls))


def _in_order(placed: dict[int, tuple[str, np.ndarray]]) -> Tensors:
    return dict(array for _, array in sorted(placed.items()))
