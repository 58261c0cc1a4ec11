"""The models inside the package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edgeflash.errors import EdgeflashError, did_you_mean

MODELS = Path(__file__).parent / "models"


def embedded(name: str) -> Path:
    """The folder of an embedded model: shapes-teacher, shapes-student or shapes-judge.

    Raises:
        EdgeflashError: the package was built without it.
    """
    if not (MODELS / name).is_dir():
        raise EdgeflashError(f"{MODELS / name}: missing in this package; install edgeflash again")
    return MODELS / name


def models() -> list[str]:
    """Names of the embedded models."""
    return sorted(each.name for each in MODELS.iterdir() if each.is_dir())


def meant(folder: Path) -> str:
    """The end of an error's line about a folder that is not there: the nearest name, if any is.

    Of an embedded model, or of a folder beside it.
    """
    known = models() if len(folder.parts) == 1 else []
    with suppress(OSError):
        known += [each for each in os.listdir(folder.parent) if (folder.parent / each).is_dir()]
    return did_you_mean(folder.name, known)


def refuse_judge(folder: Path, index: Mapping[str, object]) -> None:
    """Raises where a `model_index.json` is that of a classifier of shapes, which draws nothing."""
    if "judge" in index and "vae" not in index:
        raise EdgeflashError(
            f"{folder}: is the classifier by which edgeflash score judges pictures of shapes, and "
            "draws none: name a student or a teacher, such as shapes-student"
        )


def located(folder: Path | str) -> Path:
    """The folder itself; of a single-file checkpoint the one it was converted to.

    Or the embedded model of that name, where there is no such folder or file.

    Raises:
        EdgeflashError: a file that cannot be converted.
    """
    folder = Path(folder)
    if folder.is_file():
        from edgeflash.single_file import opened

        return opened(folder)
    named = len(folder.parts) == 1 and (MODELS / folder).is_dir()
    return MODELS / folder if named and not folder.exists() else folder
