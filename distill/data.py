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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from edgeflash import shapes
from edgeflash.bundle import write_atomic
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CHUNK = 500

Found = tuple[str, np.ndarray | None, str | None, Any]  # name, picture [s, s, 3], caption, label


class Store:
    """The packed data of one recipe.

    Attributes:
        folder: where the arrays lie.
        captions: one a sample.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        told = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.captions: list[str] = told["captions"]
        self.labels = np.array(told["labels"], np.int64) if told["labels"] else None
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

    def cached(self, key: str, compute: Callable[[np.ndarray], Tensor]) -> Cached:
        """What ``compute`` makes of each sample, computed in chunks once and kept as float16.

        ``key`` names the function and its weights: the same key reads the same file again.
        """
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            parts = np.array_split(np.arange(len(self)), max(1, len(self) // CHUNK))
            first = compute(parts[0]).to(torch.float16).cpu().numpy()
            draft = path.with_suffix(".new")
            shape = (len(self), *first.shape[1:])
            _check_space(self.folder, 2 * math.prod(shape))
            out = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
            out[parts[0]] = first
            for part in parts[1:]:
                out[part] = compute(part).to(torch.float16).cpu().numpy()
            out.flush()
            os.replace(draft, path)
        return Cached(path)


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

    Raises:
        EdgeflashError: nothing found at the path, or more than 1 % of the samples unreadable.
    """
    key = hashlib.sha256(f"{data.model_dump_json()} {seed}".encode()).hexdigest()[:16]
    home = folder / f"data-{key}"
    if not (home / "captions.json").exists():
        home.mkdir(parents=True, exist_ok=True)
        _pack(_SOURCES[data.kind](data, seed), data, home)
    return Store(home)


def _check_space(folder: Path, needed: int) -> None:
    """Refuses an array that the disk cannot hold: writing into its map would kill the process."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeflashError(
            f"{folder}: the data need {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are "
            "free; make room, or take fewer with [data] samples"
        )


def _pack(source: Iterator[Found], data: Data, home: Path) -> None:
    shape = (_most(data), data.size_px, data.size_px, 3)
    _check_space(home, math.prod(shape))
    packed = np.lib.format.open_memmap(home / "pictures.new", "w+", np.uint8, shape)
    captions: list[str] = []
    labels: list[Any] = []
    bad: list[str] = []
    for name, picture, caption, label in source:
        if caption is None or picture is None:
            what = "no readable caption" if caption is None else "unreadable picture"
            bad.append(f"{name}: {what}")
            continue
        packed[len(captions)] = picture
        captions.append(caption)
        labels += [label] if label is not None else []
        if len(captions) == len(packed):
            break
    _tell_skipped(bad, len(captions), data)
    if not captions:
        raise EdgeflashError(f"{data.path}: no captioned pictures found")
    packed.flush()
    if len(captions) < len(packed):
        np.save(home / "pictures.cut.npy", packed[: len(captions)])
        os.replace(home / "pictures.cut.npy", home / "pictures.new")
    os.replace(home / "pictures.new", home / "pictures.npy")
    write_atomic(home / "captions.json", json.dumps({"captions": captions, "labels": labels}))


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
    try:
        return text.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None


def _read_picture(source: Path | bytes, size_px: int) -> np.ndarray | None:
    """Centre-cropped and resized to uint8 [s, s, 3]; None when it cannot be decoded."""
    import io

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError):
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
