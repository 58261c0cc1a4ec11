"""Where captioned pictures come from: the shapes renderer, a folder, webdataset shards.

Each sample is told as it is found, good or not; `packing` passes over what cannot be read.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from edgeflash import shapes
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CHUNK = 500  # shapes rendered at once

Found = tuple[str, np.ndarray | None, str | None, Any]  # name, picture [s, s, 3], caption, label


def from_shapes(data: Data, seed: int) -> Iterator[Found]:
    if data.size_px != shapes.SIZE_PX:
        raise EdgeflashError(
            f"[data] size_px: the shapes are {shapes.SIZE_PX} px, not {data.size_px}"
        )
    assert data.most
    for start in range(0, data.most, CHUNK):
        chunk = range(start, min(start + CHUNK, data.most))
        pictures, captions, labels = shapes.batch(seed, chunk)
        told = zip(chunk, pictures, captions, labels.tolist(), strict=True)
        yield from ((str(i), picture, c.text, label) for i, picture, c, label in told)


def from_folder(data: Data) -> Iterator[Found]:
    """Pictures with a caption of the same name in a .txt file, or a `metadata.jsonl`."""
    home = Path(data.path or "")
    if not home.is_dir():
        raise EdgeflashError(f"[data] path: {data.path!r} is no folder")
    told = _metadata(home)
    for path in picture_files(home):
        text = path.with_suffix(".txt")
        caption = told.get(path.relative_to(home).as_posix())
        if caption is None and text.is_file():
            caption = _decoded(text.read_bytes())
        yield path.name, read_picture(path, data.size_px), caption, None


def picture_files(home: Path) -> list[Path]:
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


def shard_urls(data: Data) -> list[str]:
    """The shards that the path is a pattern of, in its order."""
    from webdataset.shardlists import expand_urls

    return list(expand_urls(data.path))


def from_shard(url: str, size_px: int) -> Iterator[Found]:
    """One webdataset tar: a picture and a .txt (or .json with "caption") of the same key."""
    import webdataset as wds

    try:  # which process reads which shard is said elsewhere: here each reads what it is given
        for sample in wds.WebDataset(
            [url], shardshuffle=False, empty_check=False, nodesplitter=None
        ):
            raw = next((sample[k] for k in sample if f".{k.lower()}" in IMAGES), None)
            picture = None if raw is None else read_picture(raw, size_px)
            yield sample["__key__"], picture, _shard_caption(sample), None
    except FileNotFoundError as error:
        raise EdgeflashError(f"[data] path: {url}: {error}") from None
    except (tarfile.ReadError, ValueError) as error:  # webdataset adds the stream to its words
        why = re.split(" @ | in tar file", str(error.args[0]))[0]
        raise EdgeflashError(
            f"[data] path: {url}: {why}: mend this shard, or leave it out"
        ) from None


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


def read_picture(source: Path | bytes, size_px: int) -> np.ndarray | None:
    """Centre-cropped and resized to uint8 [s, s, 3]; None when it cannot be decoded."""
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow raises of every kind: bombs, broken chunks, too much text
        return None
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS), np.uint8)
