"""The models inside the package."""

from __future__ import annotations

from pathlib import Path

from edgeflash.errors import EdgeflashError

MODELS = Path(__file__).parent / "models"


def embedded(name: str) -> Path:
    """The folder of an embedded model: shapes-teacher, shapes-student or shapes-judge.

    Raises:
        EdgeflashError: the package was built without it.
    """
    if not (MODELS / name).is_dir():
        raise EdgeflashError(f"{MODELS / name}: missing in this package; install edgeflash again")
    return MODELS / name


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
