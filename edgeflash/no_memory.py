"""What is said when memory does not suffice, in whatever words a library says it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgeflash.errors import EdgeflashError

SIGNS = (  # torch's on a CPU and on a GPU, C++'s, ONNX Runtime's
    *("can't allocate memory", "out of memory"),
    *("bad_alloc", "bad allocation"),
)


def out_of_memory(what: str, how: str, advice: str) -> EdgeflashError:
    """What is said when the system, or an allocator, puts an end to some work."""
    return EdgeflashError(
        f"{what}: out of memory, most likely: {how}: {advice}; then run the command again"
    )


@contextmanager
def memory_named(what: str, advice: str) -> Iterator[None]:
    """Says so where memory does not suffice for ``what``; ``advice``: what takes less."""
    try:
        yield
    except MemoryError:
        raise out_of_memory(what, "none was left", advice) from None
    except Exception as error:
        said = " ".join(str(error).split())
        if isinstance(error, EdgeflashError) or not any(sign in said for sign in SIGNS):
            raise
        raise out_of_memory(what, said[:200], advice) from None
