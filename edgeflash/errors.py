"""The one exception that a person's mistake becomes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable

INTERRUPTED = 130  # what typer makes of Ctrl-C


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
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return EdgeflashError(f"no {kind} {name!r} (have: {', '.join(names) or 'none'}){hint}")


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
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own complaints have it
            raise
        return _fail(" ".join(error.format_message().split()))
    return code or 0


def _fail(line: str) -> int:
    if line:
        print(f"edgeflash: {line}", file=sys.stderr)
    return 2
