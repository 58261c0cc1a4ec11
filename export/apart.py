"""A component's stages in a process of its own, whose memory goes back to the system at its end.

The parent writes a request, then the hashes of the files of that component, a line of JSON each;
the child says in lines of JSON what it does. It ends when its parent does, however that ends.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgeflash import talk
from edgeflash.bundle import Part
from edgeflash.disk import is_disk_full
from edgeflash.errors import INTERRUPTED, EdgeflashError, Stopped
from edgeflash.export_options import ExportOptions
from edgeflash.lora import Lora
from edgeflash.machine import peak_rss_mib
from edgeflash.no_memory import memory_named, out_of_memory
from edgeflash.roles import Target
from edgeflash.shelf import find, make, names, target_name
from edgeflash.student import Student
from edgeflash.talk import Message, Say

from . import recorded
from .hashing import Found, Hashes, homes_of
from .nursery import Nursery
from .pack import made_by
from .stages import Run, make_component

COMMAND = [sys.executable, "-m", "edgeflash.export.apart"]
BY_CTRL_C = (-2, INTERRUPTED)


class Request(Part):
    """What a child is to do.

    ``after``: the component whose recorded calls it goes on from, with their hash; "" for none.
    ``advice``: what to do where memory does not suffice.
    """

    student: str
    loras: tuple[tuple[str, float], ...]
    to: str
    target: dict[str, Any]
    options: ExportOptions
    run: str
    component: str = ""
    after: str = ""
    before: str = ""
    advice: str = ""


def request_of(
    student: Student, target: Target, options: ExportOptions, run: Path
) -> Request | None:
    """Without a component so far; None where a child could not make that target anew."""
    to = target_name(target)
    if to not in names(Target) or find(Target, to, check=False) is not type(target):
        return None
    return Request(
        student=str(student.folder.resolve()),
        loras=tuple((str(lora.file.resolve()), lora.scale) for lora in student.loras),
        to=to,
        target=target.model_dump(mode="json"),
        options=options,
        run=str(run.resolve()),
    )


class Child:
    """One component being made by a process.

    Attributes:
        recorded: its calls are written; or it has ended.
    """

    def __init__(
        self,
        request: Request,
        hashes: Future[Found],
        tell: Callable[[Message], object],
        nursery: Nursery | None = None,
    ) -> None:
        """``nursery``: where it begins; None: as a fresh process, which imports all anew."""
        self.component, self._advice = request.component, request.advice
        self.recorded = threading.Event()
        self._tell, self._error = tell, EdgeflashError("")
        self._complaint = tempfile.TemporaryFile("w+")
        fork = nursery.fork(self._complaint) if nursery else None
        self._process = fork or _fresh(self._complaint)
        self._say(request.model_dump_json())
        self._hashes = hashes
        hashes.add_done_callback(self._pass_on)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _pass_on(self, hashes: Future[Found]) -> None:
        assert self._process.stdin
        if hashes.cancelled() or hashes.exception():
            self._process.stdin.close()  # which ends it
        else:
            self._say(json.dumps(hashes.result()))

    def _say(self, line: str) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it has ended, and `result` says why

    def _listen(self) -> None:
        assert self._process.stdout
        try:
            for line in self._process.stdout:
                self._hear(talk.heard(line))
        finally:
            self.recorded.set()  # whatever happens: the parent waits for it

    def _hear(self, message: Message) -> None:
        if "error" in message:
            self._error = (Stopped if message["stopped"] else EdgeflashError)(message["error"])
        elif "recorded" in message:
            self.recorded.set()
        elif "begin" in message or "end" in message:
            self._tell(message)

    def result(self) -> None:
        """Waits for the end.

        Raises:
            EdgeflashError: what went wrong there, or that it was killed.
            KeyboardInterrupt: it was interrupted.
            OSError: the student's files could not be hashed.
        """
        code = self._process.wait()
        self._listener.join()
        if self._hashes.done():
            self._hashes.result()
        if str(self._error):
            raise self._error
        if code == talk.KILLED:
            raise out_of_memory(self.component, "its process was killed", self._advice)
        if code in BY_CTRL_C:
            raise KeyboardInterrupt
        if code:
            self._complaint.seek(0)
            raise RuntimeError(f"{self.component}: ended with {code}: {self._complaint.read()}")

    def end(self) -> None:
        """Whether or not it is done."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout, self._complaint):
            with suppress(BrokenPipeError):  # of words that it did not hear any more
                assert stream
                stream.close()


def _fresh(complaint: IO[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        COMMAND,
        stdin=pipe,
        stdout=pipe,
        stderr=complaint,
        encoding="utf-8",
        errors="replace",  # a vendor's library may print to the same place
    )


def main() -> None:
    """The child."""
    say = talk.speaker()
    heard = io.FileIO(0, closefd=False)  # a thread in a buffered read would block the exit
    request = Request.model_validate_json(heard.readline())
    hashes: Future[Found] = Future()
    threading.Thread(target=_hear, args=(heard, hashes), daemon=True).start()
    try:
        with memory_named(request.component, request.advice):
            _work(request, hashes, say)
    except EdgeflashError as error:
        say({"error": str(error), "stopped": isinstance(error, Stopped)})
        sys.exit(2)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except Exception as error:
        if is_disk_full(error, Path(request.run)):
            said = f"{request.run}: disk full; free some space and run again"
            say({"error": said, "stopped": True})
            sys.exit(2)
        traceback.print_exc()
        sys.exit(1)


def _hear(heard: io.FileIO, hashes: Future[Found]) -> None:
    """Takes what the parent says, and ends with it."""
    if line := heard.readline():
        hashes.set_result(json.loads(line))
        heard.read()
    os._exit(1)


def _work(request: Request, hashes: Future[Found], say: Say) -> None:
    from .line import planned  # which starts children, and so imports this file

    loras = [Lora(Path(file), scale) for file, scale in request.loras]
    student = Student.open(request.student, loras)
    target = make(Target, request.to, request.target)
    tape = planned(student, target, request.options).tape
    own = Hashes({homes_of(student, request.component): hashes})
    run = Run(Path(request.run), own, student.lora_scales(), made_by(student, target))
    if request.after:
        recorded.take_up(tape, request.after, run.folder / f"record-{request.after}")
    tell, done = partial(_told, say), lambda _: say({"recorded": True})
    make_component(tape, request.component, run, request.before, tell, done)


@contextmanager
def _told(say: Say, stage: str) -> Iterator[None]:
    say({"begin": stage})
    start = time.perf_counter()
    yield
    say({"end": stage, "seconds": time.perf_counter() - start, "mib": peak_rss_mib()})


if __name__ == "__main__":
    main()
