"""Pictures from and to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeflash.disk import check_writable, drafted
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
    """Raises where the name promises another format, or nothing can be written there."""
    if path.suffix.lower() != ".png":
        raise EdgeflashError(f"{path}: only PNG is written; name it {path.stem}.png")
    if path.is_dir():
        raise EdgeflashError(f"{path}: is a folder; choose another --out")
    check_writable(path, file=True)


def write_pngs(images: NDArray[np.uint8], path: Path) -> list[Path]:
    """Writes uint8 [n, h, w, 3] as ``path``, or as path-0, path-1 … where there are several.

    Raises:
        EdgeflashError: one could not be written; a picture that was there before stays.
    """
    alone = len(images) == 1
    places = [path if alone else path.with_stem(f"{path.stem}-{i}") for i in range(len(images))]
    for pixels, place in zip(images, places, strict=True):
        save_png(Image.fromarray(pixels), place)
    return places


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a picture, whole or not at all; see `drafted`."""
    with drafted(path) as draft:
        image.save(draft)
