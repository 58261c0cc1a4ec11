"""What a denoiser sees beside x_t, in further channels of its sample: a condition on every cell.

============  ========  =======================================================================
mask          1         1 where to paint, 0 where the picture is known; of each cell its first
                        pixel's, at the top left
masked_image  latent's  the picture with 0 of [-1, 1] where to paint, encoded and scaled as any
image         latent's  the picture, of a small one each pixel repeated, encoded but not scaled
============  ========  =======================================================================

Inpainting networks see the first two, in this order (arXiv 2112.10752, sec. 4.5; Stable
Diffusion's, and diffusers' `StableDiffusionInpaintPipeline`), networks that enlarge or change a
picture the last (arXiv 2211.09800, sec. 3.2; `StableDiffusionInstructPix2PixPipeline`). x_t alone
is scaled by a schedule's ``in_scale``. A condition is of the picture, not of the prompt: guided
networks see it in both calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Condition, Latent
from edgeflash.errors import EdgeflashError
from edgeflash.noise import randn

Float32 = NDArray[np.float32]
Painted = NDArray[np.bool_]

PATCHES = 4  # along each side of an example
PICTURES: dict[str, Callable[[Any, Any], Any]] = {  # to be encoded, of picture and painted places
    "masked_image": lambda picture, painted: picture * ~painted,
    "image": lambda picture, painted: picture,
}


def inpainting(latent_channels: int) -> tuple[Condition, ...]:
    """What inpainting networks see."""
    return (
        Condition(kind="mask", channels=1),
        Condition(kind="masked_image", channels=latent_channels),
    )


def of_image(latent_channels: int, enlarges: int | None) -> tuple[Condition, ...]:
    """What networks see that enlarge a picture, or with None change it."""
    return (Condition(kind="image", channels=latent_channels, enlarges=enlarges),)


def masks(conditions: Iterable[Condition]) -> bool:
    """Whether a mask is among them."""
    return any(condition.kind == "mask" for condition in conditions)


def width(conditions: Iterable[Condition]) -> int:
    """Channels of them all."""
    return sum(condition.channels for condition in conditions)


def beside(
    conditions: Iterable[Condition],
    picture: Float32,
    painted: Painted,
    latent: Latent,
    encode: Callable[[Float32], Float32],
) -> Float32:
    """The channels behind those of x_t, [n, k, h, w].

    Args:
        conditions: what they are.
        picture: [n, 3, H, W] in [-1, 1].
        painted: [n, 1, H, W], true where to paint.
        latent: how large cells are, and how latents are scaled.
        encode: pictures as above -> scaled latents [n, c, h, w].
    """
    seen = [
        as_seen(condition, encode(PICTURES[condition.kind](picture, painted)), latent)
        if condition.kind in PICTURES
        else on_cells(painted, latent.downsampling)
        for condition in conditions
    ]
    return np.concatenate(seen, axis=1, dtype=np.float32)


def as_seen(condition: Condition, scaled: Any, latent: Latent) -> Any:
    """Scaled latents of a condition as the denoiser sees them."""
    return scaled / latent.scale + latent.shift if condition.kind == "image" else scaled


def sized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A small picture [h, w, 3] with each pixel repeated, up to a size in px (height, width).

    Raises:
        EdgeflashError: that is no whole multiple, the same along both sides.
    """
    times, rest = divmod(size[0], image.shape[0])
    if rest or image.shape[1] * times != size[1]:
        has, made = ("x".join(map(str, sides)) for sides in (image.shape[:2], size))
        raise EdgeflashError(
            f"the image is {has} px, of which {made} is no whole multiple: crop or scale it"
        )
    return image.repeat(times, axis=0).repeat(times, axis=1)


def on_cells(painted: Painted, cell: int) -> Float32:
    """The mask of cells [n, 1, h, w], 0 or 1, of that of pixels [n, 1, H, W]."""
    return painted[..., ::cell, ::cell].astype(np.float32)


def example(number: int, size: tuple[int, int]) -> tuple[NDArray[np.uint8], Painted]:
    """A picture [H, W, 3] of patches of colour, and where to paint into it [H, W].

    Where no picture is at hand: for goldens and benchmarks. ``number`` chooses the colours, and a
    corner that half of each side to paint begins from; ``size`` is (height, width) in px.
    """
    height, width = size
    rows, columns = (np.arange(side) * PATCHES // side for side in size)
    patches = 127.5 + 64 * randn((3, PATCHES, PATCHES), number)
    picture = patches[:, rows][:, :, columns].clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    painted = np.zeros(size, np.bool_)
    top, left = (side * (number >> axis & 1) // 4 for axis, side in enumerate(size))
    painted[top : top + height // 2, left : left + width // 2] = True
    return np.ascontiguousarray(picture), painted
