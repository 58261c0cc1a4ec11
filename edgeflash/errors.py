"""The one exception that a person's mistake becomes."""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # what typer makes of Ctrl-C
NO_SPACE = "No space left"
PARSER = (  # what it says, and what we do
    (r"a valid integer, unable to parse string as an integer", "a whole number"),
    (r"a valid number, unable to parse string as a number", "a number"),
    (r"greater than or equal to (\S+)", r"\1 or more"),
    (r"less than or equal to (\S+)", r"\1 or less"),
    (r"Input should be", "it must be"),
)


class EdgeflashError(Exception):
    """A person's mistake, told in one line: what, where and what to do.

    The command line prints the line and leaves with exit code 2. A programmer's mistake is an
    ``assert`` instead.
    """


class Stopped(EdgeflashError):
    """Work that was cut off, by Ctrl-C or a full disk; nobody may take it for a refusal."""


def unknown(kind: str, name: str, known: Iterable[str]) -> EdgeflashError:
    """The error for a name that is not on offer: lists what is and points at the nearest one.

    >>> print(unknown("target", "onx", ["onnx", "torch"]))
    no target 'onx' (have: onnx, torch); did you mean 'onnx'?
    """
    names = sorted(known)
    have = ", ".join(names) or "none"
    return EdgeflashError(f"no {kind} {name!r} (have: {have}){did_you_mean(name, names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error's line: the nearest name of those on offer; "" where none is near.

    >>> did_you_mean("shapes-studnt", ["shapes-judge", "shapes-student"])
    "; did you mean 'shapes-student'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def in_one_line(command: Callable[[], int | None]) -> int:
    """Runs a command of the command line and returns its exit code.

    A person's mistake is one line on stderr, and exit code 2.
    """
    try:
        code = command()
        if code == INTERRUPTED:
            return _fail("interrupted; nothing half-written was left: run the same command again")
    except EdgeflashError as error:
        return _fail(str(error))
    except Exception as error:
        if NO_SPACE in str(error):  # safetensors and torch raise their own kinds
            return _fail("disk full: free some space, and run the same command again")
        if isinstance(error, OSError):
            return _fail(f"{error.filename or 'file system'}: {error.strerror or error}")
        if not hasattr(error, "format_message"):  # typer's own complaints have it
            raise
        return _fail(_in_our_words(" ".join(error.format_message().split())))
    return code or 0


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Has a SIGTERM, as of ``docker stop``, end this process as Ctrl-C does: tidily.

    Children that are copies of it go as they would have.
    """
    own = os.getpid()

    def end(number: int, _: Any) -> None:
        if os.getpid() == own:
            if not callable(signal.getsignal(signal.SIGINT)):  # shells have it ignored behind &
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_our_words(line: str) -> str:
    """A complaint of the command line's parser, by what `edgeflash.complaint` would say.

    >>> _in_our_words("Invalid value for '--seed': Input should be greater than or equal to 0")
    "Invalid value for '--seed': it must be 0 or more"
    """
    for theirs, ours in PARSER:
        line = re.sub(theirs, ours, line)
    return line


def _fail(line: str) -> int:
    if line:
        print(f"edgeflash: {line}", file=sys.stderr)
    return 2
