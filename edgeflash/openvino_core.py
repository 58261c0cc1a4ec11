"""OpenVINO's `Core`, one for the process, as it wants it: it holds the devices' plug-ins.

Where the CPU has AMX, each of them gives the thread that made it another stack for signals, and
takes it back when it goes. Of several that go in another order than they came, a stack that is gone
stays behind (2026.4): the next Ctrl-C ends the process.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def core() -> Any:
    """The process's `openvino.Core`."""
    import openvino

    return openvino.Core()
