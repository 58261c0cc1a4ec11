"""What a tape holds after a component has passed, as files: the export goes on from it.

`recorded.json` names all of it: ``golden/<prompt>/<array>``, ``plain/<without what>/<prompt>`` and
``loss_db/<without what>`` (see `Tape`), and calls,
``calls/<component>/<number>/<takes or gives>/<position>/<tensor>``: the component's own, and those
ahead, of one that ran beside it. Behind each name stands the hash of an array, which lies in
`recorded.safetensors` once, however many names it has, or in the folder ``behind``, of what passed
before: a prompt is heard in every call, and what a denoiser left is taken by many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from edgeflash.bundle import Part
from edgeflash.errors import EdgeflashError
from edgeflash.golden import Array, Tensors, save_tensors

from .capture import Sample, Tape

FILE, INDEX = "recorded.safetensors", "recorded.json"
Calls = dict[str, dict[int, tuple[str, Array]]]  # of one call: takes or gives -> place -> tensor


class Index(Part):
    """What is recorded: by name, the hash of an array.

    ``behind``: the folder, beside this one, that holds those which are not here; "" for none.
    """

    behind: str
    names: dict[str, str]


def save(tape: Tape, component: str, samples: Sequence[Sample], folder: Path) -> None:
    """Writes all that was recorded so far, and the calls of the component that passed last."""
    told = _all(tape) | _written(f"calls/{component}", samples)
    names = {name: _sha256(array) for name, array in sorted(told.items())}
    known = set(_index(tape.kept).names.values()) if tape.kept else set()
    arrays = {sha256: told[name] for name, sha256 in names.items() if sha256 not in known}
    save_tensors(folder / FILE, arrays)
    index = Index(behind=tape.kept.name if tape.kept else "", names=names)
    (folder / INDEX).write_text(index.model_dump_json(indent=1), encoding="utf-8")
    tape.kept = folder


def _all(tape: Tape) -> Tensors:
    """By name, what a tape holds."""
    told: Tensors = {
        f"loss_db/{what}": np.array(db, np.float64) for what, db in tape.loss_db.items()
    }
    for what, latents in tape.plain.items():
        told |= {f"plain/{what}/{i}": latent for i, latent in enumerate(latents)}
    for i, golden in enumerate(tape.goldens):
        told |= {f"golden/{i}/{name}": array for name, array in golden.items()}
    for name, calls in tape.ahead.items():
        told |= _written(f"calls/{name}", calls)
    return told


def _written(head: str, samples: Sequence[Sample]) -> Tensors:
    told: Tensors = {}
    for i, sample in enumerate(samples):
        for side, tensors in (("takes", sample.inputs), ("gives", sample.outputs)):
            for j, (name, array) in enumerate(tensors.items()):
                told[f"{head}/{i}/{side}/{j}/{name}"] = array
    return told


def _sha256(array: Array) -> str:
    """Of its type, shape and values."""
    found = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    found.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def take_up(tape: Tape, component: str, folder: Path) -> tuple[Sample, ...]:
    """Winds a tape to where it was written, and gives the calls of that component."""
    goldens, plain = dict[int, Tensors](), dict[str, dict[int, Array]]()
    calls: dict[str, dict[int, Calls]] = {}
    tape.loss_db, tape.kept = {}, folder
    for key, array in _read(folder).items():
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


def _read(folder: Path) -> Tensors:
    """By name, what is recorded up to a folder.

    Raises:
        EdgeflashError: a file is gone or unreadable.
    """
    from safetensors import SafetensorError

    try:
        names = _index(folder).names
        arrays = _arrays(folder, set(names.values()))
    except (SafetensorError, OSError) as error:
        raise EdgeflashError(
            f"{folder}: unreadable ({error}): delete {folder.parent} and export again"
        ) from None
    return {name: arrays[sha256] for name, sha256 in names.items()}


def _arrays(folder: Path, wanted: Collection[str]) -> Tensors:
    """By hash, arrays that a folder holds, or one behind it."""
    from safetensors import safe_open

    with safe_open(str(folder / FILE), framework="numpy") as stored:
        here = set(stored.keys()).intersection(wanted)
        found = {sha256: stored.get_tensor(sha256) for sha256 in here}
    if left := set(wanted) - here:
        found |= _arrays(folder.parent / _index(folder).behind, left)
    return found


def _index(folder: Path) -> Index:
    return Index.model_validate_json((folder / INDEX).read_bytes())


def _samples(calls: dict[int, Calls]) -> tuple[Sample, ...]:
    return tuple(Sample(*map(_in_order, calls[i].values())) for i in sorted(calls))


def _in_order(placed: dict[int, tuple[str, Array]]) -> Tensors:
    return dict(array for _, array in sorted(placed.items()))
