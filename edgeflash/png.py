"""Pictures from and to files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeflash.errors import EdgeflashError


def read_picture(path: Path) -> NDArray[np.uint8]:
    """uint8 [h, w, 3] of any picture Pillow reads.

    Raises:
        EdgeflashError: missing, or no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises of every kind on files that are broken or too large
        why = " ".join(str(error).split()) or type(error).__name__
        raise EdgeflashError(f"{path}: no readable picture ({why}); choose another") from None


def check_png(path: Path) -> None:
    """Raises where the name promises another format."""
    if path.suffix.lower() != ".png":
        raise EdgeflashError(f"{path}: only PNG is written; name it {path.stem}.png")


def write_pngs(images: NDArray[np.uint8], path: Path) -> list[Path]:
    """Writes uint8 [n, h, w, 3] as ``path``, or as path-0, path-1 … where there are several.

    Raises:
        EdgeflashError: one could not be written; a picture that was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    alone = len(images) == 1
    places = [path if alone else path.with_stem(f"{path.stem}-{i}") for i in range(len(images))]
    for pixels, place in zip(images, places, strict=True):
        _write_whole(Image.fromarray(pixels), place)
    return places


def _write_whole(image: Image.Image, place: Path) -> None:
    draft = place.with_name(f".{place.name}")
    try:
        image.save(draft)
        os.replace(draft, place)
    except OSError as error:
        why = error.strerror or error
        raise EdgeflashError(
            f"{place}: not written ({why}); make room, or choose another --out"
        ) from None
    finally:
        draft.unlink(missing_ok=True)
