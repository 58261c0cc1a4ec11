"""The one exception that a person's mistake becomes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgeflashError(Exception):
    """A person's mistake, told in one line: what, where and what to do.

    The command line prints the line and leaves with exit code 2. A programmer's mistake is an
    ``assert`` instead.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> EdgeflashError:
    """The error for a name that is not on offer: lists what is and points at the nearest one.

    >>> print(unknown("target", "onx", ["onnx", "torch"]))
    no target 'onx' (have: onnx, torch); did you mean 'onnx'?
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return EdgeflashError(f"no {kind} {name!r} (have: {', '.join(names) or 'none'}){hint}")
