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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from edgeflash import shapes
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CHUNK = 500

Sample = tuple[np.ndarray, str]  # picture uint8 [s, s, 3], caption


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


def _pack(source: Iterator[tuple[np.ndarray, str, Any]], data: Data, home: Path) -> None:
    shape = (data.samples, data.size_px, data.size_px, 3)
    _check_space(home, math.prod(shape))
    packed = np.lib.format.open_memmap(home / "pictures.new", "w+", np.uint8, shape)
    captions: list[str] = []
    labels: list[Any] = []
    for picture, caption, label in source:
        packed[len(captions)] = picture
        captions.append(caption)
        labels += [label] if label is not None else []
        if len(captions) == data.samples:
            break
    if not captions:
        raise EdgeflashError(f"{data.path}: no captioned pictures found")
    packed.flush()
    if len(captions) < data.samples:
        np.save(home / "pictures.cut.npy", packed[: len(captions)])
        os.replace(home / "pictures.cut.npy", home / "pictures.new")
    os.replace(home / "pictures.new", home / "pictures.npy")
    told = {"captions": captions, "labels": labels}
    (home / "captions.json").write_text(json.dumps(told), encoding="utf-8")


def _from_shapes(data: Data, seed: int) -> Iterator[tuple[np.ndarray, str, Any]]:
    if data.size_px != shapes.SIZE_PX:
        raise EdgeflashError(
            f"[data] size_px: the shapes are {shapes.SIZE_PX} px, not {data.size_px}"
        )
    for start in range(0, data.samples, CHUNK):
        chunk = range(start, min(start + CHUNK, data.samples))
        pictures, captions, labels = shapes.batch(seed, chunk)
        yield from zip(pictures, (c.text for c in captions), labels.tolist(), strict=True)


def _from_folder(data: Data, seed: int) -> Iterator[tuple[np.ndarray, str, Any]]:
    """Pictures with a caption of the same name in a .txt file, or a `metadata.jsonl`."""
    home = Path(data.path or "")
    if not home.is_dir():
        raise EdgeflashError(f"[data] path: {data.path!r} is no folder")
    told = _metadata(home)
    paths = sorted(p for p in home.rglob("*") if p.suffix.lower() in IMAGES)
    skips = _Skips(home)
    for path in paths:
        text = path.with_suffix(".txt")
        caption = told.get(path.relative_to(home).as_posix())
        if caption is None and text.is_file():
            caption = text.read_text(encoding="utf-8").strip()
        picture = _read_picture(path, data.size_px)
        if caption is None or picture is None:
            skips.add(path.name, "no caption" if caption is None else "unreadable picture")
            continue
        skips.good += 1
        yield picture, caption, None
    skips.tell()


def _metadata(home: Path) -> dict[str, str]:
    path = home / "metadata.jsonl"
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {row["file_name"]: row["text"] for row in rows}


def _from_shards(data: Data, seed: int) -> Iterator[tuple[np.ndarray, str, Any]]:
    """webdataset tars: a picture and a .txt (or .json with "caption") of the same key."""
    import webdataset as wds

    if not data.path:
        raise EdgeflashError("[data] path: shards need a pattern like 'data/{000..009}.tar'")
    skips = _Skips(Path(data.path))
    try:
        for sample in wds.WebDataset(data.path, shardshuffle=False, empty_check=False):
            caption = _shard_caption(sample)
            raw = next((sample[k] for k in sample if f".{k.lower()}" in IMAGES), None)
            picture = _read_picture(raw, data.size_px) if raw is not None else None
            if caption is None or picture is None:
                skips.add(
                    sample["__key__"], "no caption" if caption is None else "unreadable picture"
                )
                continue
            skips.good += 1
            yield picture, caption, None
    except FileNotFoundError as error:
        raise EdgeflashError(f"[data] path: {error}") from None
    skips.tell()


def _shard_caption(sample: dict[str, Any]) -> str | None:
    if "txt" in sample:
        return str(sample["txt"].decode("utf-8")).strip()
    if "json" in sample:
        caption = json.loads(sample["json"]).get("caption")
        return None if caption is None else str(caption)
    return None


class _Skips:
    """Counts samples passed over and stops when they are more than one in a hundred."""

    def __init__(self, where: Path) -> None:
        self.where, self.good, self.bad = where, 0, list[str]()

    def add(self, name: str, why: str) -> None:
        self.bad.append(f"{name}: {why}")

    def tell(self) -> None:
        if not self.bad:
            return
        total = self.good + len(self.bad)
        line = f"{self.where}: {len(self.bad)} of {total} samples skipped, first {self.bad[0]}"
        if len(self.bad) > max(1, total // 100):
            raise EdgeflashError(f"{line}: more than 1 %, mend the data first")
        print(line, file=sys.stderr)


def _read_picture(source: Path | bytes, size_px: int) -> np.ndarray | None:
    """Centre-cropped and resized to uint8 [s, s, 3]; None when it cannot be decoded."""
    import io

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            rgb = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return None
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS), np.uint8)


_SOURCES: dict[str, Callable[[Data, int], Iterator[tuple[np.ndarray, str, Any]]]] = {
    "shapes": _from_shapes,
    "folder": _from_folder,
    "shards": _from_shards,
}
