"""The processes that train together, one or many: which one this is, and how they wait.

Where nobody has assembled them there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed

PATIENCE = timedelta(days=7)  # of processes that are done with their share of a cache
T = TypeVar("T")


def assemble() -> Accelerator:
    """Joins the others that torchrun or accelerate launch has started, if any."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else it does not see other processes on CPUs
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )


def size() -> int:
    """How many there are."""
    return distributed.get_world_size() if _group() else 1


def rank() -> int:
    """Which this one is, from 0 on."""
    return distributed.get_rank() if _group() else 0


def is_main() -> bool:
    """Whether this one writes and tells for all."""
    return rank() == 0


def meet() -> None:
    """Waits until all are here."""
    if size() > 1:
        distributed.barrier()


def told(value: T) -> T:
    """What the main one has; all must ask, and what the others have is dropped."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the main one do it, and then the others: for what leaves a file that all read."""
    if not is_main():
        meet()
    yield
    if is_main():
        meet()


def _group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
