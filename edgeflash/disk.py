"""Files and folders that are written whole or not at all, and what may take whose place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeflash.errors import NO_SPACE, EdgeflashError, Stopped

MANIFEST = "edgeflash.json"
TRAINING = "recipe.json"  # in the scratch folder of a training
ROOM_BYTES = 2**20  # a picture's; with less to spare the work is not begun


def write_atomic(path: Path, content: Any) -> None:
    """Writes a text or a buffer to a file, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A file beside ``path``, with its ending, that takes its place only when the block succeeds.

    Folders above it are made.

    Raises:
        Stopped: the disk is full.
        EdgeflashError: nothing can be written there. What was there before stays, either way.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        os.replace(draft, path)
    except OSError as error:
        kind = Stopped if error.errno == errno.ENOSPC else EdgeflashError
        why = error.strerror or error
        raise kind(f"{path}: not written ({why}); make room, or choose another --out") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_for_people(path: Path, text: str) -> None:
    """Writes what was asked for on the command line, whole or not at all; see `drafted`."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


def check_writable(out: Path, *, file: bool = False, flag: str = "--out") -> None:
    """Asks before the work whether a folder can be written into; it may have to be made.

    It is tried with a file of `ROOM_BYTES`, which goes again.

    Args:
        out: the folder; or what is to take a place in one.
        file: the latter, a file or a folder as a whole.
        flag: what named it.

    Raises:
        Stopped: the disk is full.
        EdgeflashError: nothing can be put there.
    """
    above = out.absolute().parent if file else out.absolute()
    there = next(each for each in (above, *above.parents) if os.path.lexists(each))
    try:
        with tempfile.NamedTemporaryFile(prefix=".edgeflash.", dir=there) as trial:
            trial.write(os.urandom(ROOM_BYTES))  # no file system can make that smaller
    except OSError as error:
        kind = Stopped if error.errno == errno.ENOSPC else EdgeflashError
        why = f"nothing can be written into {there} ({error.strerror})"
        if not there.is_dir():
            why = "is a file" if there == out.absolute() else f"{there} is no folder"
        raise kind(f"{out}: {why}; choose another {flag}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        EdgeflashError: missing, or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise EdgeflashError(f"{path}: missing: copy or download the folder again") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EdgeflashError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise EdgeflashError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether a full disk is behind an error; safetensors and torch raise their own kinds."""
    told = getattr(error, "errno", None) == errno.ENOSPC or NO_SPACE in str(error)
    return told or shutil.disk_usage(folder).free < 2**16


def check_replaceable(out: Path, *sources: Path, kind: str = "") -> None:
    """Whether a finished folder may take the place of what is there.

    Args:
        out: the folder to be.
        sources: what it is made from.
        kind: "student" or "bundle": folders of the other kind stay; "": of any kind may go.

    Raises:
        EdgeflashError: it holds something that edgeflash has not made, cannot be renamed or made,
            or is one of ``sources``.
    """
    if out.resolve() == Path.cwd() or os.path.ismount(out):
        raise EdgeflashError(f"{out}: cannot be replaced as a whole; name a folder inside it")
    check_writable(out, file=True)
    held = os.listdir(out) if out.is_dir() else ["a file"] * out.exists()
    if held and MANIFEST not in held:
        what = "holds something else" if out.is_dir() else "is a file"
        raise EdgeflashError(f"{out}: {what}; choose another --out")
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise EdgeflashError(f"{out}: would replace {source}, which it is made from")
    if kind and (there := _kind_of(out)) not in (kind, ""):
        raise EdgeflashError(f"{out}: holds a {there}; choose another --out for the {kind}")


def _kind_of(folder: Path) -> str:
    """What a folder's manifest calls it; "" where that cannot be told."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def fresh_folder(out: Path, draft: Path | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of ``out`` only when the block succeeds.

    It lies beside ``out``, or is ``draft``, on the same disk, whose earlier content goes.

    Files are flushed to disk before the rename, and an older ``out`` gives way at the end, so that
    nothing half-written can be mistaken for finished.

    Raises:
        EdgeflashError: ``out`` holds something that edgeflash has not made, or the disk is full.
    """
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if draft is None:
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    else:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        draft.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            out.rename(old / out.name)
            try:
                draft.rename(out)
            except BaseException:
                (old / out.name).rename(out)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            draft.rename(out)
    except Exception as error:
        if is_disk_full(error, draft):
            raise Stopped(f"{out}: disk full; free some space and run again") from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
