"""The store of a recipe's data: pictures, captions, and what frozen networks make of them.

Pictures are packed once into memory-mapped files, so that any sample can be drawn at any step (an
exact resume needs that), and what a frozen network makes of them is cached beside it. Where several
processes train, all of them open the store and ask it for its caches: each computes a share.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeflash import shapes
from edgeflash.disk import write_atomic
from edgeflash.recipe import Data

from . import crew
from .packing import PICTURES, SAMPLES, check_space, pack, progress
from .sources import picture_files, shard_urls

ROWS = 64  # encoded between two notes of how far it is


class Store:
    """The packed data of one recipe.

    Attributes:
        folder: where the arrays lie.
        captions: one a sample.
        labels: of the shapes scenes, int64 [n, heads]; None of other data.
        size_px: side of the square pictures.
        spent: seconds that computing took of each cache asked for, whoever asked first, by key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        told = json.loads((folder / SAMPLES).read_text(encoding="utf-8"))
        self.captions: list[str] = told["captions"]
        self.labels = np.array(told["labels"], np.int64) if told["labels"] else None
        self._seed = told["seed"]
        self.spent: dict[str, float] = {}
        self.size_px: int
        self._pictures: np.ndarray | _Joined
        if "shards" in told:
            self.size_px = told["size_px"]
            self._pictures = _Joined(folder, told["shards"], self.size_px)
        else:
            self._pictures = packed = np.load(folder / PICTURES, mmap_mode="r")
            self.size_px = int(packed.shape[1])

    def __len__(self) -> int:
        return len(self.captions)

    def pictures(self, indices: np.ndarray) -> Tensor:
        """float32 [n, 3, s, s] in [-1, 1]."""
        return _unit(self._pictures[indices])

    def held_out(self, count: int) -> Tensor:
        """Renders that no recipe trains on; of other data its first pictures. [n, 3, s, s]."""
        if self.labels is None:
            return self.pictures(np.arange(min(count, len(self))))
        fresh, _, _ = shapes.batch(shapes.HELD_OUT_SEED, range(count))
        return _unit(fresh)

    def mistaken(self, indices: np.ndarray) -> Tensor:
        """The same scenes of shapes as `shapes.mistaken` has them, float32 [n, 3, s, s]."""
        rows = indices.tolist()
        scenes = [shapes.mistaken(shapes.scene(self._seed, i), self._seed, i) for i in rows]
        return _unit(shapes.render(scenes, self._seed, rows))

    def cached(self, key: str, compute: Callable[[np.ndarray], Tensor]) -> Cached:
        """What ``compute`` makes of each sample, computed once and kept as float16.

        ``key`` names the function and its weights: the same key reads the same file again, or goes
        on with what an interruption left of it. Its first word is what the progress line shows.
        Every process must ask, for it computes its share.
        """
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if crew.told(not path.exists()):
            self._fill(path, compute, f"encoding {key.partition(' ')[0]}")
        self.spent[key] = _seconds(path)
        return Cached(path)

    def _fill(self, path: Path, compute: Callable[[np.ndarray], Tensor], label: str) -> None:
        """Writes a draft beside ``path``, each process every n-th chunk; renames it when full.

        Always in the same chunks: an encoder's last bits may depend on its batch.
        """
        draft, count = path.with_suffix(".new"), len(self)
        done = crew.told({*_chunks_done(draft, count)} if crew.is_main() else set())
        left = [chunk for chunk in _chunks(count) if chunk not in done]
        mine = left[crew.rank() :: crew.size()]

        @cache
        def rows(start: int, stop: int) -> np.ndarray:
            made = compute(np.arange(start, stop)).to(torch.float16)
            return np.ascontiguousarray(made.cpu().numpy())

        began = time.monotonic()
        if crew.is_main() and not draft.exists():
            shape = (count, *rows(*mine[0]).shape[1:])  # no chunk is done, so the first is here
            check_space(self.folder, 2 * math.prod(shape))
            np.lib.format.open_memmap(draft, "w+", np.float16, shape).flush()
        took = time.monotonic() - began
        crew.meet()
        before = sum(stop - start for start, stop in done)
        total = before + sum(stop - start for start, stop in mine)
        with progress(label, total, before) as advance:
            began = time.monotonic() - took  # the first chunk may be there already
            for start, stop in mine:
                _write_rows(draft, start, rows(start, stop))
                rows.cache_clear()
                ended = time.monotonic()
                _note_chunk(draft, start, stop, ended - began)
                began = ended
                before += stop - start
                advance(before)
        crew.meet()
        if crew.is_main():
            spent = sum(_read_notes(_notes(draft)).values()) / crew.size()
            write_atomic(path.with_suffix(".seconds"), f"{spent:.3f}")
            os.replace(draft, path)
            for note in _notes(draft):
                note.unlink()
        crew.meet()


class _Joined:
    """Pictures of several files of raw bytes, one after the other."""

    def __init__(self, folder: Path, files: Sequence[tuple[str, int]], side: int) -> None:
        self._files = [folder / name for name, _ in files]
        self._ends = np.cumsum([count for _, count in files])
        self._shape = (side, side, 3)
        self._open: dict[int, np.ndarray] = {}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [n, s, s, 3]."""
        pictures = np.empty((len(indices), *self._shape), np.uint8)
        within = np.searchsorted(self._ends, indices, side="right")
        for number in map(int, np.unique(within)):
            (places,) = np.nonzero(within == number)
            start = int(self._ends[number - 1]) if number else 0
            pictures[places] = self._file(number)[np.asarray(indices)[places] - start]
        return pictures

    def _file(self, number: int) -> np.ndarray:
        if number not in self._open:
            flat = np.memmap(self._files[number], np.uint8, "r")
            self._open[number] = flat.reshape(-1, *self._shape)
        return self._open[number]


def _chunks(count: int) -> list[tuple[int, int]]:
    """Rows from and to, of each chunk."""
    return [(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


def _chunks_done(draft: Path, count: int) -> dict[tuple[int, int], float]:
    """Chunks of ``count`` rows that an interruption left, however many processes wrote them.

    With the seconds that each took.

    None, and neither draft nor notes, where they do not fit. Else their notes become one.
    """
    notes, known = _notes(draft), set(_chunks(count))
    try:
        there = np.load(draft, mmap_mode="r")
        if there.dtype == np.float16 and len(there) == count:
            done = {chunk: took for chunk, took in _read_notes(notes).items() if chunk in known}
            if done:
                left = sum(stop - start for start, stop in known - done.keys())
                check_space(draft.parent, there[:1].nbytes * left)
                whole = "".join(f"{a} {b} {took:.3f}\n" for (a, b), took in sorted(done.items()))
                write_atomic(_note(draft), whole)
                for note in notes:
                    if note != _note(draft):
                        note.unlink()
                return done
    except (OSError, ValueError, EOFError):
        pass
    for stale in (*notes, draft):
        stale.unlink(missing_ok=True)
    return {}


def _read_notes(notes: Sequence[Path]) -> dict[tuple[int, int], float]:
    """Chunks and the seconds that each took; an older version told no seconds.

    The last line of a note may be cut off, and has no end then.
    """
    lines = [line.split() for note in notes for line in note.read_text().split("\n")[:-1]]
    return {(int(a), int(b)): float(took[0]) if took else 0.0 for a, b, *took in lines}


def _notes(draft: Path) -> list[Path]:
    """Every process's."""
    return sorted(draft.parent.glob(f"{draft.stem}*.rows"))


def _note(draft: Path) -> Path:
    """This process's note of the chunks that it has written, a line each."""
    return draft.with_suffix(f".{crew.rank()}.rows")


def _write_rows(draft: Path, start: int, rows: np.ndarray) -> None:
    """Writes, and not through a map: processes on other machines may have the page's other half."""
    offset = np.load(draft, mmap_mode="r").offset + start * rows[0].nbytes
    with draft.open("r+b") as file:
        file.seek(offset)
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _note_chunk(draft: Path, start: int, stop: int, took: float) -> None:
    with _note(draft).open("a") as note:
        note.write(f"{start} {stop} {took:.3f}\n")


def _seconds(path: Path) -> float:
    """What computing a cache took, summed over interruptions; 0 where an older version did it."""
    noted = path.with_suffix(".seconds")
    return float(noted.read_text()) if noted.exists() else 0.0


def _unit(pictures: np.ndarray) -> Tensor:
    """uint8 [n, s, s, 3] -> float32 [n, 3, s, s] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Cached:
    """Rows of one cached array as float32 tensors."""

    def __init__(self, path: Path) -> None:
        self._rows = np.load(path, mmap_mode="r")

    def __call__(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self._rows[indices].astype(np.float32))


def open_store(data: Data, seed: int, folder: Path) -> Store:
    """The store for a recipe's data, packed below ``folder`` if it is not there yet.

    Data that have changed since are packed anew. Every process must call it.

    Raises:
        EdgeflashError: nothing found at the path, or more than 1 % of the samples unreadable.
    """
    told = f"{data.model_dump_json()} {seed}{_listing(data)}"
    home = folder / f"data-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if crew.told(not (home / SAMPLES).exists()):
        home.mkdir(parents=True, exist_ok=True)
        pack(data, seed, home)
    return Store(home)


def _listing(data: Data) -> str:
    """Name, size and time of every local file the data come from; "" where they are rendered."""
    if data.kind == "shapes":
        return ""
    if data.kind == "folder":
        home = Path(data.path or "")
        pictures = picture_files(home)
        texts = [path.with_suffix(".txt") for path in pictures]
        files = [*pictures, *texts, home / "metadata.jsonl"]
    else:
        files = [Path(url.removeprefix("file://")) for url in shard_urls(data)]
    stats = [(str(path), path.stat()) for path in files if os.path.isfile(path)]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
