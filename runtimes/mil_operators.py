"""What the operators of Core ML programs compute, in numpy: those that edgeflash's exporter emits.

Parameters have MIL's names. Floats come and go as float32; `mil_program` rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] = (1, 1),
    pad_type: str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Array:
    """Of x [n, c, h, w] with weight [o, c / groups, i, j]: a product a kernel cell, summed up."""
    if weight.ndim != 4 or pad_type not in ("valid", "custom"):
        raise NotImplementedError(f"rank {weight.ndim}, pad_type {pad_type}")
    if pad_type == "custom":
        x = np.pad(x, [(0, 0), (0, 0), (pad[0], pad[1]), (pad[2], pad[3])])
    size = [
        (side - (cells - 1) * dilation - 1) // stride + 1
        for side, cells, dilation, stride in zip(
            x.shape[2:], weight.shape[2:], dilations, strides, strict=True
        )
    ]
    parts = [
        _convolved(part, kernel, size, strides, dilations)
        for part, kernel in zip(
            np.split(x, int(groups), 1), np.split(weight, int(groups)), strict=True
        )
    ]
    found = np.concatenate(parts, 1).reshape(len(x), len(weight), *size)
    return found if bias is None else found + bias[:, None, None]


def _convolved(
    x: Array, weight: Array, size: list[int], strides: Sequence[int], dilations: Sequence[int]
) -> Array:
    """[n, o, h * w] of one group."""
    total = np.zeros((len(x), len(weight), size[0] * size[1]), np.float32)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            rows = slice(i * dilations[0], i * dilations[0] + (size[0] - 1) * strides[0] + 1)
            columns = slice(j * dilations[1], j * dilations[1] + (size[1] - 1) * strides[1] + 1)
            seen = x[:, :, rows, columns][:, :, :: strides[0], :: strides[1]]
            total += weight[:, :, i, j] @ seen.reshape(len(x), x.shape[1], -1)
    return total


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    found = x @ weight.T
    return found if bias is None else found + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    x = x.swapaxes(-1, -2) if transpose_x else x
    return x @ (y.swapaxes(-1, -2) if transpose_y else y)


def einsum(values: Sequence[Array], equation: str) -> Any:
    return np.einsum(equation, *values, optimize=True)


def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Any:
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == bool:
        attn_mask = np.where(attn_mask, np.float32(0), np.float32(-np.inf))
    return softmax(scores if attn_mask is None else scores + attn_mask) @ value


def softmax(x: Array, axis: int = -1) -> Any:
    powers = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return powers / powers.sum(axis=int(axis), keepdims=True)


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Any:
    over = tuple(range(x.ndim)) if axes is None else tuple(int(axis) % x.ndim for axis in axes)
    centred = x - x.mean(over, keepdims=True)
    found = centred / np.sqrt((centred**2).mean(over, keepdims=True) + epsilon)
    shape = [side if i in over else 1 for i, side in enumerate(x.shape)]
    found = found if gamma is None else found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Of x [n, c, ...]: what coremltools makes of a constant factor and shift a channel."""
    factor = 1 / np.sqrt(variance + epsilon)
    factor = factor if gamma is None else factor * gamma
    shift = -mean * factor if beta is None else beta - mean * factor
    shape = (-1, *(1,) * (x.ndim - 2))
    return x * factor.reshape(shape) + shift.reshape(shape)


def gelu(x: Array, mode: str = "EXACT") -> Any:
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x / np.float32(math.sqrt(2))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * sigmoid(1.702 * x)


def erf(x: Array) -> Array:
    """Within 1e-6: x P(x²) / Q(x²), the rational minimax fit over [-4, 4] that Eigen uses."""
    x = x.clip(-4, 4)
    p = (
        -2.72614225801306e-10,
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    )
    q = (
        -1.45660718464996e-05,
        -2.13374055278905e-04,
        -1.68282697438203e-03,
        -7.37332916720468e-03,
        -1.42647390514189e-02,
    )
    return x * np.polyval(p, x * x) / np.polyval(q, x * x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def reduce_mean(x: Array, axes: Array, keep_dims: bool = False) -> Any:
    return x.mean(tuple(int(axis) for axis in axes), keepdims=bool(keep_dims))


def reduce_argmax(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "") -> Any:
    return x.argmax(int(axis), keepdims=bool(keep_dims))


def gather(
    x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Array:
    if batch_dims:
        raise NotImplementedError(f"batch_dims {batch_dims}")
    return x.take(indices, int(axis))


def gather_nd(x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool = False) -> Any:
    if batch_dims:
        raise NotImplementedError(f"batch_dims {batch_dims}")
    return x[tuple(np.moveaxis(indices, -1, 0))]


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Any:
    masks = [np.zeros(x.ndim, bool) if m is None else m for m in (begin_mask, end_mask)]
    steps = np.ones(x.ndim, int) if stride is None else stride
    cut: list[Any] = []
    for i in range(x.ndim):
        first = None if masks[0][i] else int(begin[i])
        last = None if masks[1][i] else int(end[i])
        alone = squeeze_mask is not None and squeeze_mask[i]
        cut.append(int(begin[i]) if alone else slice(first, last, int(steps[i])))
    return x[tuple(cut)]


def split(
    x: Array, axis: int, num_splits: int | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    if split_sizes is None:
        assert num_splits is not None
        return tuple(np.split(x, int(num_splits), int(axis)))
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1], int(axis)))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    if interleave:
        raise NotImplementedError("interleave")
    return np.concatenate(values, int(axis))


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: float = 0.0) -> Array:
    widths = [(0, 0)] * (x.ndim - len(pad) // 2)
    widths += [(int(a), int(b)) for a, b in np.reshape(pad, (-1, 2))]
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    return np.pad(x, widths, mode="reflect" if mode == "reflect" else "edge")


def upsample(x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Array:
    factors = (scale_factor_height, scale_factor_width)
    rows, columns = (
        (np.arange(math.floor(side * factor)) // factor).astype(int)
        for side, factor in zip(x.shape[-2:], factors, strict=True)
    )
    return x[..., rows[:, None], columns]


def quantize(
    input: Array,
    scale: Array,
    output_dtype: str,
    zero_point: Array | None = None,
    axis: int | None = None,
) -> Array:
    zero = 0 if zero_point is None else along(zero_point, input, axis).astype(np.float32)
    limits = np.iinfo(output_dtype)
    return (np.rint(input / along(scale, input, axis)) + zero).clip(limits.min, limits.max)


def dequantize(
    input: Array, scale: Array, zero_point: Array | None = None, axis: int | None = None
) -> Array:
    zero = 0 if zero_point is None else along(zero_point, input, axis).astype(np.float32)
    return along(scale, input, axis).astype(np.float32) * (input.astype(np.float32) - zero)


def along(numbers: Array, array: Array, axis: Array | int | None) -> Array:
    """One number, or one for each index of an axis, in the rank of ``array``."""
    if not numbers.ndim:
        return numbers
    assert axis is not None
    return numbers.reshape([-1 if i == int(axis) % array.ndim else 1 for i in range(array.ndim)])


def squeeze(x: Array, axes: Array | None = None) -> Array:
    return x.squeeze(None if axes is None else tuple(int(axis) for axis in axes))


def expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def reshape(x: Array, shape: Array) -> Array:
    """0 keeps a side."""
    return x.reshape([x.shape[i] if side == 0 else int(side) for i, side in enumerate(shape)])


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "batch_norm": batch_norm,
    "cast": lambda x, dtype: x,  # to its output's type, as all are
    "clip": lambda x, alpha, beta: x.clip(alpha, beta),
    "concat": concat,
    "conv": conv,
    "cos": lambda x: np.cos(x),
    "dequantize": dequantize,
    "einsum": einsum,
    "equal": lambda x, y: x == y,
    "expand_dims": expand_dims,
    "fill_like": lambda ref_tensor, value: np.full(ref_tensor.shape, value),
    "gather": gather,
    "gather_nd": gather_nd,
    "gelu": gelu,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "mul": lambda x, y: x * y,
    "pad": pad,
    "quantize": quantize,
    "real_div": lambda x, y: x / y,
    "reduce_argmax": reduce_argmax,
    "reduce_mean": reduce_mean,
    "relu": lambda x: np.maximum(x, 0),
    "reshape": reshape,
    "scaled_dot_product_attention": attention,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "sigmoid": sigmoid,
    "silu": silu,
    "sin": lambda x: np.sin(x),
    "slice_by_index": slice_by_index,
    "softmax": softmax,
    "split": split,
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: x * x,
    "squeeze": squeeze,
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "transpose": lambda x, perm: x.transpose(perm),
    "upsample_nearest_neighbor": upsample,
}
