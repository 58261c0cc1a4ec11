"""Pictures to latents and back, by the halves of a bundle's autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.bundle import Latent, Manifest
from edgeflash.conditions import beside
from edgeflash.errors import EdgeflashError
from edgeflash.runtimes.feed import Part

Float32 = NDArray[np.float32]


def encoded(part: Part, pixels: Float32, latent: Latent) -> Float32:
    """Latents [n, c, h, w] of pictures [n, 3, height, width] of 0 to 255."""
    spec = part.component.input("image")
    assert spec is not None
    low, high = spec.range
    # Encoders of the KL kind give mean and log-variance, in this order; the mean is the latent.
    mean = part(image=pixels * ((high - low) / 255) + low)[:, : latent.channels]
    found: Float32 = finite((mean.astype(np.float32) - latent.shift) * latent.scale, "vae_encoder")
    return found


def looked_at(
    part: Part,
    manifest: Manifest,
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_] | None,
    whole: bool,
) -> tuple[Float32 | None, Float32 | None]:
    """A picture as the loop needs it: its latent [1, c, h, w], what is seen of it [1, k, h, w].

    Args:
        part: the encoder.
        manifest: of the bundle, which says what its denoiser sees beside x_t.
        image: [height, width, 3].
        mask: [height, width], true where to paint.
        whole: the latent is asked for.
    """
    latent = manifest.latent
    pixels = image.astype(np.float32).transpose(2, 0, 1)[None]
    found = encoded(part, pixels, latent) if whole else None
    if not manifest.conditions:
        return found, None

    def encode(pictures: Float32) -> Float32:
        return encoded(part, (pictures + 1) * 127.5, latent)

    painted = np.zeros(pixels.shape[2:], np.bool_) if mask is None else mask
    shown = pixels / 127.5 - 1
    return found, beside(manifest.conditions, shown, painted[None, None], latent, encode)


def decoded(part: Part, x: Float32, latent: Latent) -> Float32:
    """Pictures [n, 3, height, width], 0 to 255 and what is beyond, of latents [n, c, h, w]."""
    z = x if (latent.scale, latent.shift) == (1, 0) else x / latent.scale + latent.shift
    image = finite(part(latent=z), "vae_decoder")
    low, high = part.answer.range
    pixels: Float32 = (image.astype(np.float32) - low) * (255 / (high - low))
    return pixels


def finite(array: Any, stage: str, when: str = "") -> Any:
    """``array`` itself, if it holds numbers: an overflow would pass as a black picture."""
    if not np.isfinite(array).all():
        raise EdgeflashError(
            f"{stage} gave NaN or infinity{' ' * bool(when)}{when}: its precision overflows here, "
            "or its file was altered, which edgeflash verify tells; else export it with "
            "--precision fp32"
        )
    return array
