"""What of an export is done, for the same command to go on with after any end of the first one.

`<out>.run/` lies beside the bundle in the making and holds, for each finished stage, a folder with
its files and a mark, `<stage>.json`, which is written last: what the stage was made from, and the
hashes of what it made. A stage is taken up when both still hold. A changed option redoes what it
shapes, and what follows from that, alone. The folder stays, as a training's does: files of the
bundle are in it by hard links, which take no space as long as the bundle is there. Large weights
are in the bundle alone, from where they come back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import Field, ValidationError

from edgeflash.bundle import File, Part, describe_file
from edgeflash.disk import TRAINING, is_disk_full, write_atomic
from edgeflash.errors import EdgeflashError, Stopped

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SHARED = "stages.run"  # of several exports to a folder that will go
DRAFT = "bundle"  # in a folder of stages: the bundle in the making
LOCK = "export.lock"  # in a folder of stages: the mark that it is one, held while one works in it
Inputs = dict[str, Any]


class Outcome(Part):
    """The mark of a finished stage."""

    inputs: Inputs
    files: tuple[File, ...]  # below the stage's folder
    told: Inputs = Field({}, description="what else it found")

    @property
    def sha256(self) -> str:
        """Of what it made, whatever from."""
        made = self.model_dump_json(exclude={"inputs"})
        return hashlib.sha256(made.encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """One step of an export.

    Attributes:
        run: folder of all stages.
        name: of this one.
        inputs: what it is made from, as JSON has it; asked for when it matters.
    """

    run: Path
    name: str
    inputs: Callable[[], Inputs]

    @property
    def folder(self) -> Path:
        return self.run / self.name

    @property
    def mark(self) -> Path:
        return self.run / f"{self.name}.json"

    def outcome(self) -> Outcome | None:
        """What it made from these inputs; None where that is not there as it was left."""
        found = self.read()
        return found if found and all(map(self._is_whole, found.files)) else None

    def read(self) -> Outcome | None:
        """The same of a stage that has just been finished: its files are not read."""
        try:
            found = Outcome.model_validate_json(self.mark.read_bytes())
        except (OSError, ValidationError):
            return None
        there = found.inputs == _plain(self.inputs()) and all(map(self._lies_at, found.files))
        return found if there else None

    def _lies_at(self, file: File) -> Path | None:
        """Where a file is: here, or in the bundle it was given to, in the making or in its place.

        None where there is none of that size.
        """
        for home in (self.folder, self.run / DRAFT, self.run.with_suffix("")):
            path = home / file.path
            if path.is_file() and path.stat().st_size == file.bytes:
                return path
        return None

    def _is_whole(self, file: File) -> bool:
        path = self._lies_at(file)
        if path is not None and path != self.folder / file.path:
            self._bring_back(path, file)
        return path is not None and describe_file(self.folder, file.path) == file

    def _bring_back(self, path: Path, file: File) -> None:
        """From a bundle in the making; of a finished one, which stays as it is, a copy."""
        here = self.folder / file.path
        if path.is_relative_to(self.run):
            move(path, here)
        else:
            draft = here.with_name(f".{here.name}")  # half of it would look like a damaged one
            copy(path, draft)
            move(draft, here)

    def begin(self) -> Path:
        """An empty folder to work in."""
        self.mark.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def finish(self, **told: Any) -> Outcome:
        """Marks it as done, with all that lies in its folder."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        files = tuple(describe_file(self.folder, name) for name in names)
        made = Outcome(inputs=_plain(self.inputs()), files=files, told=_plain(told))
        write_atomic(self.mark, made.model_dump_json(indent=1))
        return made


def _plain(table: Inputs) -> Inputs:
    """As it comes back from a file."""
    plain: Inputs = json.loads(json.dumps(table))
    return plain


@contextmanager
def run_folder(out: Path, *, lasting: bool = True) -> Iterator[Path]:
    """The folder of the stages of ``out``; it goes when none of them was finished.

    ``lasting``: whether it is still there for the next command. Where it is not, all exports to
    the folder that ``out`` is in go on with each other's stages: they differ in little.

    Raises:
        EdgeflashError: a training has it, or a person, or another export is at work there.
        Stopped: Ctrl-C, or a full disk.
    """
    run = out.parent / (f"{out.name}.run" if lasting else SHARED)
    _check_ours(run)
    new = not run.exists()
    with _locked(run, out):
        try:
            with _ending_told(run, out, lasting):
                yield run
        finally:
            if new and not any(run.glob("*.json")):
                shutil.rmtree(run, ignore_errors=True)


def _check_ours(run: Path) -> None:
    """Refuses a folder that exports have not made: stages of the same names would go."""
    if (run / TRAINING).exists():
        raise EdgeflashError(f"{run}: holds a training; choose another --out for the bundle")
    held = os.listdir(run) if run.is_dir() else ["a file"] * run.exists()
    if held and LOCK not in held and not any(run.glob("record-*.json")):
        raise EdgeflashError(
            f"{run}: holds something else, and stages of the export would go there; "
            "choose another --out"
        )


@contextmanager
def _locked(run: Path, out: Path) -> Iterator[None]:
    """Keeps other exports away for as long as this process lives, however it ends."""
    while True:
        with _opened(run / LOCK) as stream:
            if not _take(stream):
                raise EdgeflashError(
                    f"another export to {out} is at work: wait for it, or choose another --out"
                )
            if _is_at(stream, run / LOCK):  # else it has gone with the folder
                yield
                return


def _opened(path: Path) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another export has just taken the folder away
            return path.open("a")


def _take(stream: IO[str]) -> bool:
    """Whether nobody else holds the lock; where the file system knows none, nobody does."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _is_at(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _ending_told(run: Path, out: Path, lasting: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        said = f"interrupted: {out} was not written; run the same command again"
        raise Stopped(said + " to go on" * lasting) from None
    except Exception as error:
        if is_disk_full(error, run):
            raise Stopped(f"{out}: disk full; free some space and run again") from None
        raise


def drop_others(run: Path, components: Collection[str]) -> None:
    """Removes stages of components that an export no longer has, their marks first."""
    found = [*run.glob("record-*"), *run.glob("lower-*")]
    for path in sorted(found, key=lambda path: path.suffix != ".json"):
        if path.name.removesuffix(".json").partition("-")[2] in components:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def link(source: Path, target: Path) -> None:
    """A second name for a finished file, or a copy where the disk knows no such names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def copy(source: Path, target: Path) -> None:
    """A finished file once more."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def move(source: Path, target: Path) -> None:
    """A finished file under another name alone, on the same disk; `Stage` finds it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
