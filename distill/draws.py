"""Random numbers for samples: the same however a batch is cut into micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class Part(torch.Generator):
    """The generator of a step, as one of the equal parts of its batch is given it.

    On the CPU, so that every device draws the same numbers. What a loss draws with it directly,
    once for all samples, is the same for every part; what it draws for samples, by `rows`, is what
    they would get in the whole batch.
    """

    index: int
    parts: int
    samples: int  # in each part

    def __new__(cls, seed: int, step: int, index: int, parts: int, samples: int) -> Part:
        words = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
        part = super().__new__(cls)
        part.manual_seed(int(words[0] >> np.uint64(1)))
        part.index, part.parts, part.samples = index, parts, samples
        return part


def rows(draw: Callable[[int], Tensor], count: int, generator: torch.Generator) -> Tensor:
    """``draw(count)``, and of a part the rows that are its own of what the whole batch draws.

    ``count`` is that of the samples, or a multiple where tensors of samples were put one after the
    other; of some of the samples each part gets as many rows in its turn.
    """
    if not isinstance(generator, Part) or generator.parts == 1:
        return draw(count)
    drawn, index, samples = draw(count * generator.parts), generator.index, generator.samples
    if count % samples:
        return drawn[index * count : (index + 1) * count]
    tensors = drawn.reshape(count // samples, -1, *drawn.shape[1:])
    return tensors[:, index * samples : (index + 1) * samples].flatten(0, 1)


def randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal, [n, ...] as ``shape`` says, on the CPU."""
    return rows(lambda n: torch.randn(n, *shape[1:], generator=generator), shape[0], generator)


def rand(count: int, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), [count]."""
    return rows(lambda n: torch.rand(n, generator=generator), count, generator)


def randint(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """Whole numbers from low to high - 1, int64 [count]."""
    return rows(lambda n: torch.randint(low, high, (n,), generator=generator), count, generator)
