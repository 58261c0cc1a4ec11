"""Keeps what vendors' quantizers say about themselves off the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences prints, progress bars and log records up to warnings; errors are still raised."""
    root = logging.root
    before, handlers, level = root.manager.disable, list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        root.handlers[:] = handlers  # some set up everybody's logging when they are imported
        root.setLevel(level)
