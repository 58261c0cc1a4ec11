"""How Core ML programs hold weights in fewer bits, and the floats that these stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .mil_operators import along
from .mil_weights import unpacked

Array = NDArray[Any]


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale (q - zero point), each one number or one for each index of ``axis``."""
    centred = quantized_data.astype(np.float32) - along(zero_point, quantized_data, axis)
    return along(scale.astype(np.float32), quantized_data, axis) * centred


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale (q - offset), one of each for a block; blocks are as large as the shapes tell."""
    found = data.astype(np.float32)
    if offset is not None:
        found -= spread(offset.astype(np.float32), data.shape)
    return found * spread(scale.astype(np.float32), data.shape)


def lut_to_dense(
    indices: Array, lut: Array, shape: Array | None = None, vector_axis: Array | None = None
) -> Array:
    """The palette's value of each index.

    Up to iOS 17 indices are packed bytes [k] and ``shape`` is given; since iOS 18 they have the
    weight's shape, and the palette [..., n, 1] one part for each group of rows or columns.
    """
    if shape is not None:
        bits = len(lut).bit_length() - 1
        return lut[unpacked(indices, bits, int(np.prod(shape)))].reshape(shape)
    if lut.shape[-1] != 1:
        raise NotImplementedError(f"palettes of vectors of {lut.shape[-1]}")
    sizes = lut.shape[:-2]
    table = np.arange(np.prod(sizes)).reshape(sizes)
    return lut.reshape(-1, lut.shape[-2])[spread(table, indices.shape), indices]


def spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Repeats the number of each block over the whole of it."""
    for axis, (have, want) in enumerate(zip(blocks.shape, shape, strict=True)):
        blocks = blocks if have == 1 else np.repeat(blocks, want // have, axis)
    return blocks


COMPRESSED: dict[str, Callable[..., Array]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
}
