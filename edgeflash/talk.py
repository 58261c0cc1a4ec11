"""What a process says to the one that started it: JSON on lines of standard output.

Libraries may print to the same place: what they say is no message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

KILLED = -9  # exit code of a process that the system ends, as where memory runs out
Message = dict[str, Any]
Say = Callable[[Message], None]


def speaker() -> Say:
    """Speaks to the parent alone: what libraries print goes where complaints go from now on."""
    words = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Message) -> None:
        print(json.dumps(message), file=words, flush=True)

    return say


def heard(line: str) -> Message:
    """What a child says in a line; empty where somebody else spoke."""
    with suppress(ValueError):
        if isinstance(said := json.loads(line), dict):
            return said
    return {}
