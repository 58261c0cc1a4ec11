"""The denoiser while one picture is drawn: the graph that a row runs, and what is carried to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Bundle
from edgeflash.caching import cached_name, left_by, unguided
from edgeflash.conditioning import Conditioning
from edgeflash.control import NAME, residuals
from edgeflash.runtimes.feed import Part
from edgeflash.schedule import Guidance, Step

Float32 = NDArray[np.float32]


class Denoiser:
    """Answers row by row, guided. What the whole network leaves for its cached graph is kept.

    A ControlNet is asked before every call: without the prompt it sees the picture all the same.

    Args:
        bundle: whose it is.
        parts: its components, among them the denoiser's graphs.
        guidance: how the prompt steers.
        conditioning: by role, [n, ...]; with guidance of two calls [2n, ...], without prompt first.
        beside: what it sees behind x_t, [1 or n, k, h, w]; None: nothing.
        control: what the bundle's ControlNet sees, [1, 3, H, W], and the scale of what that adds;
            None: it has none. An adapter's maps are among the conditioning.
    """

    def __init__(
        self,
        bundle: Bundle,
        parts: Mapping[str, Part],
        guidance: Guidance,
        conditioning: Conditioning,
        beside: Float32 | None = None,
        control: tuple[Float32 | None, float] = (None, 1.0),
    ) -> None:
        name = bundle.denoiser.name
        self._whole, self._cached = parts[name], parts.get(cached_name(name))
        self._gated, self._guidance = bundle.manifest.gated, guidance
        self._conditioning, self._beside = dict(conditioning), beside
        self._controlnet, (self._control, self._scale) = parts.get(NAME), control
        self._left: dict[str, NDArray[Any]] = {}  # by role, of the last whole row
        self._joined = False

    def open(self, step: Step) -> str:
        """Loads the graph that a row runs, if need be; gives the component's name."""
        part = self._part(step)
        part.open()
        if self._controlnet is not None:
            self._controlnet.open()
        return part.component.name

    def _part(self, step: Step) -> Part:
        if not step.graph:
            return self._whole
        assert self._cached is not None, "refused before"
        return self._cached

    def close_all_but(self, rows: Sequence[Step]) -> None:
        """Closes the graphs that none of these rows runs."""
        needed = {bool(row.graph) for row in rows}
        graphs = ((False, self._whole), (True, self._cached), (False, self._controlnet))
        for of_cached, part in graphs:
            if part is not None and of_cached not in needed:
                part.close()

    def __call__(self, step: Step, x: Float32) -> Float32:
        """The guided output [n, c, h, w] for x, which is what the network sees of the latent."""
        part = self._part(step)
        if self._beside is not None:
            beside = np.broadcast_to(self._beside, (len(x), *self._beside.shape[1:]))
            x = np.concatenate([x, beside], axis=1)
        roles: dict[str, NDArray[Any]] = {"sample": x, "timestep": np.array(step.t)}
        if self._guidance.kind == "embedded":
            roles["guidance"] = np.repeat(self._guidance.embedding(), len(x), axis=0)
        if step.graph and self._gated:
            self._join()
            return part(**roles, **self._left).astype(np.float32, copy=False)
        if self._guidance.doubles:
            roles["sample"] = np.concatenate([x, x])
        roles |= self._conditioning
        if self._controlnet is not None:
            assert self._control is not None, "refused before"
            roles |= residuals(self._controlnet, roles, self._control, self._scale)
        if step.graph:
            output = part(**roles, **self._left)
        else:
            answers = part.answers(**roles)
            output = answers[part.answer.role]
            self._left, self._joined = left_by(answers), False
            for array in self._left.values():
                array.flags.writeable = False  # a session may keep its copy on the device
        output = output.astype(np.float32, copy=False)
        if not self._guidance.doubles:
            return output
        return self._guidance.guide(*np.split(output, 2)).astype(np.float32, copy=False)

    def _join(self) -> None:
        """Puts the mean of both calls in the place of what they left, once."""
        if self._guidance.doubles and not self._joined:
            both = {role: np.split(array, 2) for role, array in self._left.items()}
            self._left = unguided([{k: v[side] for k, v in both.items()} for side in (0, 1)])
        self._joined = True
