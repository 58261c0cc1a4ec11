"""Captioned pictures from the shapes renderer, a folder or webdataset shards, in one packed store.

Pictures are packed once into a memory-mapped array, so that any sample can be drawn at any step (an
exact resume needs that), and what a frozen network makes of them is cached beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from edgeflash import shapes
from edgeflash.disk import write_atomic
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CHUNK = 500  # shapes rendered at once
SAMPLES = "samples.json"  # in a store: captions, labels, seed
ROWS = 64  # encoded between two notes of how far it is
TELL_SECONDS = 30

Found = tuple[str, np.ndarray | None, str | None, Any]  # name, picture [s, s, 3], caption, label


class Store:
    """The packed data of one recipe.

    Attributes:
        folder: where the arrays lie.
        captions: one a sample.
        labels: of the shapes scenes, int64 [n, heads]; None of other data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        told = json.loads((folder / SAMPLES).read_text(encoding="utf-8"))
        self.captions: list[str] = told["captions"]
        self.labels = np.array(told["labels"], np.int64) if told["labels"] else None
        self._seed = told["seed"]
        self._pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self._open: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def size_px(self) -> int:
        return int(self._pictures.shape[1])

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
        """
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            self._fill(path, compute, f"encoding {key.partition(' ')[0]}")
        return Cached(path)

    def _fill(self, path: Path, compute: Callable[[np.ndarray], Tensor], label: str) -> None:
        """Writes a draft beside ``path`` and how many of its rows are good; renames it when full.

        Always in the same chunks: an encoder's last bits may depend on its batch.
        """
        draft, note = path.with_suffix(".new"), path.with_suffix(".rows")
        done = _rows_done(draft, note, len(self))
        out = np.lib.format.open_memmap(draft) if done else None
        with _progress(label, len(self), done) as advance:
            while done < len(self):
                indices = np.arange(done, min(done + ROWS, len(self)))
                rows = compute(indices).to(torch.float16).cpu().numpy()
                if out is None:
                    shape = (len(self), *rows.shape[1:])
                    _check_space(self.folder, 2 * math.prod(shape))
                    out = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
                out[indices] = rows
                out.flush()
                done += len(indices)
                write_atomic(note, str(done))
                advance(done)
        os.replace(draft, path)
        note.unlink()


def _rows_done(draft: Path, note: Path, count: int) -> int:
    """Rows of ``count`` that an interruption left; 0, and neither file, where they do not fit."""
    try:
        done, there = int(note.read_text()), np.load(draft, mmap_mode="r")
        if there.dtype == np.float16 and len(there) == count:
            _check_space(draft.parent, there[done:].nbytes)
            return done
    except (OSError, ValueError, EOFError):
        pass
    note.unlink(missing_ok=True)
    draft.unlink(missing_ok=True)
    return 0


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

    Data that have changed since are packed anew.

    Raises:
        EdgeflashError: nothing found at the path, or more than 1 % of the samples unreadable.
    """
    told = f"{data.model_dump_json()} {seed}{_listing(data)}"
    home = folder / f"data-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if not (home / SAMPLES).exists():
        home.mkdir(parents=True, exist_ok=True)
        _pack(_SOURCES[data.kind](data, seed), data, seed, home)
    return Store(home)


def _listing(data: Data) -> str:
    """Name, size and time of every local file the data come from; "" where they are rendered."""
    if data.kind == "shapes":
        return ""
    if data.kind == "folder":
        home = Path(data.path or "")
        pictures = _picture_files(home)
        texts = [path.with_suffix(".txt") for path in pictures]
        files = [*pictures, *texts, home / "metadata.jsonl"]
    else:
        from webdataset.shardlists import expand_urls

        files = [Path(url.removeprefix("file://")) for url in expand_urls(data.path)]
    stats = [(str(path), path.stat()) for path in files if os.path.isfile(path)]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _check_space(folder: Path, needed: int) -> None:
    """Refuses an array that the disk cannot hold: writing into its map would kill the process."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeflashError(
            f"{folder}: the data need {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are "
            "free; make room, or take fewer with [data] samples"
        )


@contextmanager
def _progress(label: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; where there is none, a line every half minute."""
    began = told_at = time.monotonic()
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total, completed=start)

        def advance(done: int) -> None:
            nonlocal told_at
            bar.update(task, completed=done)
            if bar.disable and time.monotonic() - told_at > TELL_SECONDS:
                told_at = time.monotonic()
                left = (told_at - began) / (done - start) * (total - done)
                line = f"{label}: {done}/{total}, {left / 60:.0f} min left"
                print(line, file=sys.stderr, flush=True)

        yield advance


def _pack(source: Iterator[Found], data: Data, seed: int, home: Path) -> None:
    for stale in home.glob("pictures.*"):  # of a packing that was killed: its room is needed
        stale.unlink()
    draft, cut = home / "pictures.new", home / "pictures.cut.npy"
    shape = (_most(data), data.size_px, data.size_px, 3)
    _check_space(home, math.prod(shape))
    try:
        packed = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)
        captions, labels = _take(source, data, packed)
        packed.flush()
        if len(captions) < len(packed):
            np.save(cut, packed[: len(captions)])
            os.replace(cut, draft)
        os.replace(draft, home / "pictures.npy")
    finally:
        draft.unlink(missing_ok=True)
        cut.unlink(missing_ok=True)
    told = {"captions": captions, "labels": labels, "seed": seed}
    write_atomic(home / SAMPLES, json.dumps(told))


def _take(source: Iterator[Found], data: Data, packed: np.ndarray) -> tuple[list[str], list[Any]]:
    """Packs the good samples, until ``packed`` is full; their captions and labels."""
    captions: list[str] = []
    labels: list[Any] = []
    bad: list[str] = []
    with _progress("packing pictures", len(packed)) as advance:
        for name, picture, caption, label in source:
            if caption is None or picture is None:
                what = "no readable caption" if caption is None else "unreadable picture"
                bad.append(f"{name}: {what}")
                continue
            packed[len(captions)] = picture
            captions.append(caption)
            labels += [label] if label is not None else []
            advance(len(captions))
            if len(captions) == len(packed):
                break
    _tell_skipped(bad, len(captions), data)
    if not captions:
        raise EdgeflashError(f"{data.path}: no captioned pictures found")
    return captions, labels


def _most(data: Data) -> int:
    """The most samples there can be."""
    if data.kind != "folder":
        return data.samples
    return max(1, min(data.samples, len(_picture_files(Path(data.path or "")))))


def _tell_skipped(bad: list[str], good: int, data: Data) -> None:
    """Tells how many samples were passed over, and stops when they are more than one in a hundred.

    Raises:
        EdgeflashError: more than 1 %.
    """
    if not bad:
        return
    total = good + len(bad)
    line = f"{data.path}: {len(bad)} of {total} samples skipped, first {bad[0]}"
    if len(bad) > max(1, total // 100):
        raise EdgeflashError(f"{line}: more than 1 %, mend the data first")
    print(line, file=sys.stderr)


def _from_shapes(data: Data, seed: int) -> Iterator[Found]:
    if data.size_px != shapes.SIZE_PX:
        raise EdgeflashError(
            f"[data] size_px: the shapes are {shapes.SIZE_PX} px, not {data.size_px}"
        )
    for start in range(0, data.samples, CHUNK):
        chunk = range(start, min(start + CHUNK, data.samples))
        pictures, captions, labels = shapes.batch(seed, chunk)
        told = zip(chunk, pictures, captions, labels.tolist(), strict=True)
        yield from ((str(i), picture, c.text, label) for i, picture, c, label in told)


def _from_folder(data: Data, seed: int) -> Iterator[Found]:
    """Pictures with a caption of the same name in a .txt file, or a `metadata.jsonl`."""
    home = Path(data.path or "")
    if not home.is_dir():
        raise EdgeflashError(f"[data] path: {data.path!r} is no folder")
    told = _metadata(home)
    for path in _picture_files(home):
        text = path.with_suffix(".txt")
        caption = told.get(path.relative_to(home).as_posix())
        if caption is None and text.is_file():
            caption = _decoded(text.read_bytes())
        yield path.name, _read_picture(path, data.size_px), caption, None


def _picture_files(home: Path) -> list[Path]:
    return sorted(p for p in home.rglob("*") if p.suffix.lower() in IMAGES)


def _metadata(home: Path) -> dict[str, str]:
    """File name -> caption, from the lines of `metadata.jsonl` where there is one."""
    path, told = home / "metadata.jsonl", {}
    if not path.is_file():
        return {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                told[str(row["file_name"])] = str(row["text"])
            except (ValueError, TypeError, KeyError) as error:
                why = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise EdgeflashError(
                    f"{path}, line {number}: {why}; a line is an object with file_name and text"
                ) from None
    return told


def _from_shards(data: Data, seed: int) -> Iterator[Found]:
    """webdataset tars: a picture and a .txt (or .json with "caption") of the same key."""
    import webdataset as wds

    try:
        for sample in wds.WebDataset(data.path, shardshuffle=False, empty_check=False):
            raw = next((sample[k] for k in sample if f".{k.lower()}" in IMAGES), None)
            picture = None if raw is None else _read_picture(raw, data.size_px)
            yield sample["__key__"], picture, _shard_caption(sample), None
    except (FileNotFoundError, tarfile.ReadError) as error:
        raise EdgeflashError(f"[data] path: {data.path}: {error}") from None


def _shard_caption(sample: dict[str, Any]) -> str | None:
    if "txt" in sample:
        return _decoded(sample["txt"])
    try:
        caption = json.loads(sample.get("json", b"{}")).get("caption")
    except (ValueError, AttributeError):
        return None
    return None if caption is None else str(caption)


def _decoded(text: bytes) -> str | None:
    """The caption; None of what is empty, as an interrupted captioner leaves it, or no UTF-8."""
    try:
        return text.decode("utf-8").strip() or None
    except UnicodeDecodeError:
        return None


def _read_picture(source: Path | bytes, size_px: int) -> np.ndarray | None:
    """Centre-cropped and resized to uint8 [s, s, 3]; None when it cannot be decoded."""
    import io

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow raises of every kind: bombs, broken chunks, too much text
        return None
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS), np.uint8)


_SOURCES: dict[str, Callable[[Data, int], Iterator[Found]]] = {
    "shapes": _from_shapes,
    "folder": _from_folder,
    "shards": _from_shards,
}
