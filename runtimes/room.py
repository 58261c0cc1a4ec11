"""Whether this machine has the memory for so many pictures at a time, asked before the work."""

from __future__ import annotations

import math
from contextlib import suppress

from edgeflash.bundle import Bundle, Component
from edgeflash.errors import EdgeflashError
from edgeflash.machine import installed_bytes

from .lint import look

GIB = 2**30
COPIES = 2  # of a picture, in float32: the decoder's and the one that becomes pixels
DEEP = 256  # so many pictures' worth may be alive in a network; where that is little, none is read


def check_batch(bundle: Bundle, batch: int) -> None:
    """Refuses what exceeds this machine, by an estimate; what else runs on it does not count.

    Raises:
        EdgeflashError: the pictures alone do, or what is alive within a network while it runs.
    """
    most = installed_bytes()
    if most is None or batch * DEEP * _picture(bundle) <= most:
        return
    wanted = batch * (_picture(bundle) + _alive(bundle))
    if wanted > most:
        raise EdgeflashError(
            f"{bundle.folder}: {batch:,} pictures at a time would take some {wanted / GIB:,.0f} "
            f"GiB of memory (an estimate), {most / GIB:.1f} GiB is all there is: choose a smaller "
            "--batch"
        )


def _picture(bundle: Bundle) -> int:
    image = bundle.manifest.image
    return COPIES * 4 * math.prod((3, image.height, image.width))


def _alive(bundle: Bundle) -> int:
    """Bytes of inputs and results of the network that has most of them, for one picture.

    0 where nothing here reads the graphs, and of networks that take one picture a call.
    """
    with suppress(EdgeflashError):  # the runtime will say what is wrong with the file
        parts = look(bundle)
        return max(part.peak.bytes if _takes_many(part.component) else 0 for part in parts)
    return 0


def _takes_many(component: Component) -> bool:
    return any(spec.shape and isinstance(spec.shape[0], str) for spec in component.inputs)
