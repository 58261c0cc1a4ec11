"""A process that has imported what making a component takes: each child begins as its fork.

Nothing but imports runs in it, so that no pool of threads is cut off by a fork; what it holds is
shared with the children, and imported once for all of them, while its parent imports the same. For
a child it is sent the ends of four pipes: standard input, output and error, and one on which it
tells the child's process id and, when that has ended, how, a line each. It ends with its parent.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, NoReturn

from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.talk import KILLED

from . import memory
from .hashing import home_of

COMMAND = [sys.executable, "-m", "edgeflash.export.nursery"]
FORKS = sys.platform == "linux"  # elsewhere what the system's libraries hold does not outlive it
ALWAYS = ("edgeflash.export.line",)  # torch, diffusers, transformers
BY_NEED = {"onnxscript": ("edgeflash.export.onnx_graph", "onnxscript.function_libs.torch_lib.ops")}
PIPES = 4


class Fork:
    """A child of the nursery, with what is used of `subprocess.Popen`."""

    def __init__(self, stdin: IO[str], stdout: IO[str], told: IO[str]) -> None:
        self.stdin, self.stdout, self._told = stdin, stdout, told
        self.pid = int(told.readline() or 0)
        self.returncode: int | None = None

    def wait(self) -> int:
        """How it ended: an exit code, or its signal below 0."""
        if self.returncode is None:
            self.returncode = int(self._told.readline() or KILLED)  # nobody is left to tell
            self._told.close()
        return self.returncode

    def kill(self) -> None:
        over = self.returncode is not None or select.select([self._told], [], [], 0)[0]
        if not over:  # else the number may be another's by now
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """The parent's side."""

    def __init__(self, imports: Iterable[str]) -> None:
        """``imports``: modules, or ``<module>:<what a module imports when it is asked for it>``."""
        self._asking, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, *imports],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def fork(self, complaint: IO[str]) -> Fork | None:
        """A new child, which complains to that file; None where the nursery is no more."""
        (given, stdin), (stdout, made), (told, tells) = os.pipe(), os.pipe(), os.pipe()
        ours = (open(stdin, "w", encoding="utf-8"), *map(_read, (stdout, told)))
        try:
            ends = [given, made, complaint.fileno(), tells]
            with suppress(OSError):
                socket.send_fds(self._asking, [b"\n"], ends)
        finally:
            for end in (given, made, tells):
                os.close(end)
        if (child := Fork(*ours)).pid:
            return child
        for stream in ours:
            stream.close()
        return None

    def close(self) -> None:
        """Children that are at work go on."""
        self._asking.close()
        self._process.kill()
        self._process.wait()


def _read(end: int) -> IO[str]:
    return open(end, encoding="utf-8", errors="replace")


@contextmanager
def begun(student: Student, target: Target) -> Iterator[Nursery | None]:
    """For the components of a student that get processes of their own; None where none does."""
    large = memory.large(student, student.family.components())
    if not large or not FORKS:
        yield None
        return
    nursery = Nursery(_imports(student, target, large))
    try:
        yield nursery
    finally:
        nursery.close()


def _imports(student: Student, target: Target, components: Sequence[str]) -> Iterator[str]:
    yield from ALWAYS
    for name in components:
        yield ":".join(student.class_of(home_of(student, name)))
    for package in target.needs:
        yield from BY_NEED.get(package, ())


def main(run: Callable[[], object]) -> None:
    """The nursery; ``run``: what each child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for its parent, with which it ends
    for name in sys.argv[1:]:
        with suppress(Exception):  # a child will import it once more, and tell
            _import(*name.split(":"))
    gc.collect()
    gc.freeze()  # collections in children pass over all that, and leave it shared
    _serve(socket.socket(fileno=0), run)


def _import(module: str, attribute: str = "__name__") -> None:
    getattr(importlib.import_module(module), attribute)


def _component() -> None:
    from .apart import main as make_component

    make_component()


def _serve(asking: socket.socket, run: Callable[[], object]) -> None:
    """Forks whenever it is asked to, and tells how children end, until nobody can ask any more."""
    at_work: dict[int, tuple[int, int]] = {}  # a pipe that a child's end closes -> it, its parent
    while True:
        for end in select.select([asking.fileno(), *at_work], [], [])[0]:
            if end in at_work:
                child, told = at_work.pop(end)
                _tell(told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
                os.close(told)
                os.close(end)
                continue
            given = socket.recv_fds(asking, 1, PIPES)[1]
            if not given:
                return
            *streams, told = given
            over, lives = os.pipe()
            if not (child := os.fork()):
                _live(streams, [told, over, *at_work, *(t for _, t in at_work.values())], run)
            for other in (*streams, lives):
                os.close(other)
            at_work[over] = child, told
            _tell(told, child)


def _tell(end: int, number: int) -> None:
    with suppress(BrokenPipeError):  # its parent wants to know no more
        os.write(end, b"%d\n" % number)


def _live(streams: Sequence[int], others: Iterable[int], run: Callable[[], object]) -> NoReturn:
    """A child, from its first moment to its last."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, end in enumerate(streams):
            os.dup2(end, number)  # the first in place of the nursery's socket
        for end in (*streams, *others):
            os.close(end)
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(_component)
