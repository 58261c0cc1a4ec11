"""The pictures of a request: whether they fit the bundle, and as what steers sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Bundle
from edgeflash.conditions import masks
from edgeflash.control import CALLED, PICTURE, maps
from edgeflash.errors import EdgeflashError
from edgeflash.runtimes.edit import renoises
from edgeflash.runtimes.feed import Part
from edgeflash.schedule import Schedule

if TYPE_CHECKING:
    from edgeflash.runtimes.pipeline import Request


def cannot(bundle: Bundle, what: str, why: str) -> EdgeflashError:
    """What is said of a request that a bundle cannot fulfil."""
    return EdgeflashError(f"{bundle.folder}: this bundle cannot {what}: {why}")


def check_picture(bundle: Bundle, request: Request) -> None:
    """Raises where a picture or a mask is missing, or idle."""
    image, mask, conditions = request.image, request.mask, bundle.manifest.conditions
    idle = (mask is None) == masks(conditions) or request.edit
    if conditions and (image is None or idle):
        given = "--image and --mask" if masks(conditions) else "--image"
        raise cannot(bundle, "do that", f"it sees a picture too: give {given}, and no more of it")
    if image is not None and not _encodes(bundle):
        raise cannot(bundle, "start from an image", "it has no vae_encoder")
    if mask is None:
        return
    if image is None:
        raise EdgeflashError("a mask says where to paint into a picture: give --image too")
    if mask.shape != image.shape[:2]:
        has, of = ("x".join(map(str, each.shape[:2])) for each in (mask, image))
        raise EdgeflashError(f"the mask is {has} px, but the image {of}: scale one of them")


def check_edit(bundle: Bundle, request: Request, schedule: Schedule, made: tuple[int, int]) -> None:
    """Raises where a bundle cannot edit as asked; ``made``: (height, width) of its pictures."""
    assert request.edit
    assert request.image is None, "an edit starts from noise"
    if not _encodes(bundle):
        raise cannot(bundle, "edit", "it has no vae_encoder; export it with --image-to-image")
    if not renoises(schedule):
        raise cannot(
            bundle,
            "edit",
            f"its sampler, {schedule.sampler}, does not noise a picture anew as lcm does",
        )
    size = request.edit.size
    if size != made:
        raise cannot(bundle, f"edit {size[0]}x{size[1]} px", f"it makes {made}")


def check_control(bundle: Bundle, request: Request, made: tuple[int, int]) -> None:
    """Raises where a control picture is missing, idle or of another size than the picture made."""
    picture, scale = request.control, request.control_scale
    if bundle.steering is None and (picture is not None or scale != 1):
        raise cannot(bundle, "draw after a control picture", "it has no ControlNet or adapter")
    if bundle.steering is None:
        return
    if picture is None:
        name = CALLED[bundle.steering.name]
        raise cannot(bundle, "do that", f"its {name} sees a picture too: give --control")
    if not 0 <= scale < float("inf"):
        raise cannot(bundle, f"take the control scale {scale:g}", "scales are 0 or more")
    if picture.shape != (*made, 3):
        has, size = ("x".join(map(str, sides)) for sides in (picture.shape[:2], made))
        raise cannot(
            bundle,
            f"draw after a control picture of {has} px",
            f"it draws {size} px: crop or scale it",
        )


def shown(bundle: Bundle, picture: NDArray[np.uint8] | None) -> NDArray[np.float32] | None:
    """A control picture [h, w, 3] as the bundle takes it, [1, 3, h, w]."""
    if picture is None or bundle.steering is None:
        return None
    spec = bundle.steering.input(PICTURE)
    assert spec is not None, "refused before"
    low, high = spec.range
    pixels: NDArray[np.float32] = picture.astype(np.float32).transpose(2, 0, 1)[None]
    return pixels * ((high - low) / 255) + low


def mapped(
    adapter: Part, picture: NDArray[np.float32] | None, scale: float, rows: int
) -> dict[str, NDArray[Any]]:
    """What an adapter adds to every call of the denoiser; as `control.maps` has it."""
    assert picture is not None, "refused before"
    found = maps(adapter, picture, rows, scale)
    for array in found.values():
        array.flags.writeable = False  # a session may keep its copy on the device
    return found


def _encodes(bundle: Bundle) -> bool:
    return any(component.name == "vae_encoder" for component in bundle.manifest.components)
