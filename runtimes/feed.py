"""One component of a bundle, called by role: opens it, casts, splits batches, closes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import ANSWER, Bundle, Component, TensorSpec
from edgeflash.roles import Runtime, Session

Array = NDArray[Any]

MOST_ROWS = 32  # a call; more takes memory and no less time, and torch's graphs hold below 64


class Part:
    """A component of ``bundle`` on ``runtime``; opened when first needed.

    A call takes arrays by *role*, whatever the tensors are called, and gives the array of the role
    in ``ANSWER``; `answers` gives those of all roles. An array for a role that the component lacks
    (the timestep of a folded one-step network) is left out.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, name: str) -> None:
        self.component: Component = bundle.component(name)
        self.answer: TensorSpec = self.component.output(ANSWER[name])
        self._open: Callable[[], Session] = lambda: runtime.open(bundle.folder, self.component)
        self._session: Session | None = None
        first = self.component.inputs[0].shape[0]
        self.batch: int | None = first if isinstance(first, int) else None  # None: any

    def open(self) -> Session:
        """The loaded session; loads it if need be."""
        if self._session is None:
            self._session = self._open()
        return self._session

    def close(self) -> None:
        """Gives the memory back; a later call loads again."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __call__(self, **by_role: Array) -> Array:
        """The answer to ``n`` rows; see `answers`."""
        return self.answers(**by_role)[self.answer.role]

    def answers(self, **by_role: Array) -> dict[str, Array]:
        """Runs ``n`` rows; arrays are [n, ...], or of rank 0 where one value serves all rows.

        A component captured for a fixed batch is called as often as it takes, the last call filled
        up with repeats of its last row; one with a free batch gets ``MOST_ROWS`` at the most.
        """
        session = self.open()
        n = max(len(array) for array in by_role.values() if array.ndim)
        size = self.batch or min(n, MOST_ROWS)
        if size == n:
            return self._by_role(session(self._cast(by_role, n)))
        parts = []
        for start in range(0, n, size):
            rows = np.arange(start, start + size if self.batch else min(start + size, n))
            rows = np.minimum(rows, n - 1)
            chunk = {role: a[rows] if a.ndim else a for role, a in by_role.items()}
            parts.append(self._by_role(session(self._cast(chunk, len(rows)))))
        return {role: np.concatenate([part[role] for part in parts])[:n] for role in parts[0]}

    def _by_role(self, found: dict[str, Array]) -> dict[str, Array]:
        specs = [spec for spec in self.component.outputs if spec.role != "unused"]
        return {spec.role: found[spec.name] for spec in specs}

    def _cast(self, by_role: dict[str, Array], n: int) -> dict[str, Array]:
        return {
            spec.name: fitted(by_role[spec.role], spec, n)
            for spec in self.component.inputs
            if spec.role in by_role
        }


def fitted(array: Array, spec: TensorSpec, n: int) -> Array:
    """``array`` in the dtype, layout and rank of ``spec``; no copy where it fits already."""
    array = spec.arranged(array)
    if array.ndim == 0 and spec.shape:
        array = np.full((1 if spec.shape[0] == 1 else n,), array)
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have
        for want, have in zip(spec.shape, array.shape, strict=True)
    )
    assert fits, f"{spec.name} [{spec.role}] is {array.shape}, its spec says {spec.shape}"
    return array
