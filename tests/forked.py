"""Functions run in processes of their own, which begin with all that is imported here."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def forked(*runs: Callable[[], object]) -> list[int]:
    """Runs all at once; 0 for each that returned, or else its exit code, or its signal below 0."""
    children = []
    for run in runs:
        if not (child := os.fork()):
            code = 1
            try:
                run()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
