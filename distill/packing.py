"""Captioned pictures on their way into the files of a store, from which any can be drawn.

Shapes and folders are packed by the main process into one array, shards by all processes: each
reads its own, the k-th of n every n-th from k on, into a file of pictures and a note of what it
found. A shard with a note is not read again, so a killed packing goes on with the next.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from edgeflash.disk import write_atomic
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data

from . import crew
from .sources import Found, from_folder, from_shapes, from_shard, picture_files, shard_urls

PICTURES = "pictures.npy"
SAMPLES = "samples.json"  # in a store: captions, labels, seed, and shards where they come from some
SKIPPED = "skipped.txt"  # beside it: what was passed over, a line each
TELL_SECONDS = 30


def pack(data: Data, seed: int, home: Path) -> None:
    """Packs what a recipe's data are into ``home``; all processes call it.

    Raises:
        EdgeflashError: nothing found at the path, more than 1 % of the samples unreadable, or a
            disk that cannot hold them.
    """
    if data.kind == "shards":
        _pack_shards(data, seed, home)
    elif crew.is_main():
        source = from_shapes(data, seed) if data.kind == "shapes" else from_folder(data)
        _pack_array(source, data, seed, home)
    crew.meet()


def _pack_array(source: Iterator[Found], data: Data, seed: int, home: Path) -> None:
    for stale in home.glob("pictures.*"):  # of a packing that was killed: its room is needed
        stale.unlink()
    draft, cut = home / "pictures.new", home / "pictures.cut.npy"
    shape = (_most(data), data.size_px, data.size_px, 3)
    check_space(home, math.prod(shape))
    try:
        packed = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
        captions, labels = _take(source, data, packed, home)
        packed.flush()
        if len(captions) < len(packed):
            np.save(cut, packed[: len(captions)])
            os.replace(cut, draft)
        os.replace(draft, home / PICTURES)
    finally:
        draft.unlink(missing_ok=True)
        cut.unlink(missing_ok=True)
    told = {"captions": captions, "labels": labels, "seed": seed}
    write_atomic(home / SAMPLES, json.dumps(told))


def _take(
    source: Iterator[Found], data: Data, packed: np.ndarray, home: Path
) -> tuple[list[str], list[Any]]:
    """Packs the good samples, until ``packed`` is full; their captions and labels."""
    captions: list[str] = []
    labels: list[Any] = []
    bad: list[str] = []
    with progress("packing pictures", len(packed)) as advance:
        for name, picture, caption, label in source:
            if caption is None or picture is None:
                bad.append(f"{name}: {_fault(caption)}")
                continue
            packed[len(captions)] = picture
            captions.append(caption)
            labels += [label] if label is not None else []
            advance(len(captions))
            if len(captions) == len(packed):
                break
    _tell_skipped(bad, len(captions), data, home)
    return captions, labels


def _pack_shards(data: Data, seed: int, home: Path) -> None:
    urls, side, most = shard_urls(data), data.size_px, data.most or sys.maxsize
    if crew.is_main() and data.most:  # else how many there are is known when all are read
        there = sum(path.stat().st_size for path in home.glob("shard-*.u8"))
        check_space(home, max(0, most * side**2 * 3 - there))
    share = -(-most // crew.size()) if data.most else None
    with progress("packing pictures", share) as advance:
        for number in range(crew.rank(), len(urls), crew.size()):
            before = sum(_packed(home, i, side) for i in range(number))  # so far, by whomever
            if before >= most:
                break  # whatever comes later cannot be among the first so many
            if not _note(home, number).exists():
                mine = sum(_packed(home, i, side) for i in range(crew.rank(), number, crew.size()))
                told = partial(_on, advance, mine)
                _pack_shard(urls[number], number, most - before, side, home, told)
    crew.meet()
    if crew.is_main():
        _join_shards(len(urls), data, seed, home)


def _on(advance: Callable[[int], None], before: int, count: int) -> None:
    advance(before + count)


def _pack_shard(
    url: str, number: int, most: int, side: int, home: Path, advance: Callable[[int], None]
) -> None:
    """Writes the pictures of one shard, ``most`` at the most, and at last the note of them."""
    told: list[tuple[str, str | None, str | None]] = []  # name, caption, what is wrong
    count, path = 0, _pictures(home, number)
    try:
        with path.open("wb") as file:
            for name, picture, caption, _ in from_shard(url, side):
                if caption is None or picture is None:
                    told.append((name, None, _fault(caption)))
                    continue
                file.write(picture.tobytes())
                told.append((name, caption, None))
                count += 1
                advance(count)
                if count == most:
                    break
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        path.unlink()
        raise EdgeflashError(
            f"{home}: disk full; free some space and run the same command again, or take fewer "
            "samples with [data] samples"
        ) from None
    write_atomic(_note(home, number), json.dumps(told))


def _join_shards(count: int, data: Data, seed: int, home: Path) -> None:
    """Puts the shards in order, up to the samples asked for; what is beyond them goes."""
    captions: list[str] = []
    bad: list[str] = []
    shards: list[tuple[str, int]] = []  # file, pictures of it
    for number in range(count):
        if len(captions) == data.most:
            break
        before = len(captions)
        for name, caption, fault in json.loads(_note(home, number).read_text(encoding="utf-8")):
            if caption is None:
                bad.append(f"{name}: {fault}")
            else:
                captions.append(caption)
                if len(captions) == data.most:
                    break
        shards.append((_pictures(home, number).name, len(captions) - before))
    _tell_skipped(bad, len(captions), data, home)
    told = {"captions": captions, "labels": [], "seed": seed}
    write_atomic(home / SAMPLES, json.dumps(told | {"size_px": data.size_px, "shards": shards}))
    for name, used in shards:
        os.truncate(home / name, used * data.size_px**2 * 3)
    for path in home.glob("shard-*"):
        if path.suffix == ".json" or path.name not in dict(shards):
            path.unlink()


def _pictures(home: Path, number: int) -> Path:
    return home / f"shard-{number:05}.u8"


def _note(home: Path, number: int) -> Path:
    return home / f"shard-{number:05}.json"


def _packed(home: Path, number: int, side: int) -> int:
    """How many pictures of a shard are packed; 0 while it is not done."""
    if not _note(home, number).exists():
        return 0
    return _pictures(home, number).stat().st_size // (side**2 * 3)


def _fault(caption: str | None) -> str:
    return "no readable caption" if caption is None else "unreadable picture"


def _most(data: Data) -> int:
    """The most samples there can be, of shapes and folders."""
    if data.kind == "shapes":
        assert data.most
        return data.most
    there = len(picture_files(Path(data.path or "")))
    return max(1, min(data.most or there, there))


def _tell_skipped(bad: list[str], good: int, data: Data, home: Path) -> None:
    """Tells how many samples were passed over, and stops when they are more than one in a hundred.

    Each is named in `skipped.txt` of the store.

    Raises:
        EdgeflashError: more than 1 %, or nothing but those.
    """
    if bad:
        total = good + len(bad)
        write_atomic(home / SKIPPED, "".join(f"{line}\n" for line in bad))
        line = f"{data.path}: {len(bad)} of {total} samples skipped, first {bad[0]}"
        line += f" (all in {home / SKIPPED})" if len(bad) > 1 else ""
        if len(bad) > max(1, total // 100):
            raise EdgeflashError(f"{line}: more than 1 %, mend the data first")
        print(line, file=sys.stderr)
    if not good:
        raise EdgeflashError(f"{data.path}: no captioned pictures found")


def check_space(folder: Path, needed: int) -> None:
    """Refuses an array that the disk cannot hold: writing into its map would kill the process."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeflashError(
            f"{folder}: the data need {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are "
            "free; make room, or take fewer with [data] samples"
        )


@contextmanager
def progress(label: str, total: int | None, start: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; where there is none, a line every half minute. The main process's.

    ``total``: None where it is not known.
    """
    began = told_at = time.monotonic()
    console = Console(file=sys.stderr)
    shown = crew.is_main() and sys.stderr.isatty()
    with Progress(console=console, disable=not shown) as bar:
        task = bar.add_task(label, total=total, completed=start)

        def advance(done: int) -> None:
            nonlocal told_at
            bar.update(task, completed=done)
            if not shown and crew.is_main() and time.monotonic() - told_at > TELL_SECONDS:
                told_at = time.monotonic()
                line = f"{label}: {done}"
                if total is not None:
                    left = (told_at - began) / max(1, done - start) * (total - done)
                    line += f"/{total}, {max(0, left) / 60:.0f} min left"
                print(line, file=sys.stderr, flush=True)

        yield advance
