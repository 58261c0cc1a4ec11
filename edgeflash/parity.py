"""How far two arrays are apart, in numpy. The first array is always the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BEST_DB = 200.0  # stands for equality: a figure that JSON can hold
WINDOW, C1, C2 = 8, 0.01**2, 0.03**2  # of SSIM


def psnr_db(reference: Array, found: Array, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio, 20 log10(peak / rms error), at most 200 dB; NaN counts as 0.

    Args:
        reference: any shape; infinities that both have, as of masks, are not looked at.
        found: the same shape.
        peak: largest possible difference; None: largest - smallest value of the reference, or the
            size of that value where there is but one.
    """
    assert reference.shape == found.shape, (reference.shape, found.shape)
    a, b = reference.astype(np.float64), found.astype(np.float64)
    never = np.isinf(a) & (a == b)
    if never.any():
        a, b = a[~never], b[~never]
    if a.size == 0:
        return BEST_DB
    rms = math.sqrt(float(np.mean((a - b) ** 2)))
    if peak is None:
        peak = float(a.max() - a.min()) or abs(float(a.flat[0]))
    if not math.isfinite(rms) or peak == 0:
        return BEST_DB if rms == 0 else 0.0
    if rms <= peak * 10 ** (-BEST_DB / 20):
        return BEST_DB
    return 20 * math.log10(peak / rms)


def cosine(reference: Array, found: Array) -> float:
    """Cosine of the angle between the arrays as vectors: 1 same direction, 0 unrelated."""
    a, b = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return _number(float(a @ b) / norms) if norms else float(np.array_equal(a, b))


def relative_l2(reference: Array, found: Array) -> float:
    """|found - reference| / |reference|: 0 when equal."""
    a, b = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    norm, error = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    return _number(error / norm, math.inf) if norm else (0.0 if error == 0 else math.inf)


def projection(reference: Array, found: Array) -> float:
    """How much of the reference is in ``found``: <found, reference> / <reference, reference>.

    1 when all of it is, 0 when none. Errors that have nothing to do with the reference cancel,
    which a ratio of norms would count as more of it.
    """
    a, b = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    power = float(a @ a)
    return _number(float(a @ b) / power) if power else float(np.array_equal(a, b))


def ssim(reference: Array, found: Array, peak: float) -> float:
    """Structural similarity (Wang et al. 2004), mean over channels and 8 px windows, stride 1.

    Args:
        reference: [..., h, w], values ``peak`` apart at the most.
        found: the same shape.
        peak: largest possible difference.
    """
    assert reference.shape == found.shape, (reference.shape, found.shape)
    a, b = reference.astype(np.float64) / peak, found.astype(np.float64) / peak
    size = min(WINDOW, *a.shape[-2:])
    mean_a, mean_b = _windowed(a, size), _windowed(b, size)
    var_a = _windowed(a * a, size) - mean_a**2
    var_b = _windowed(b * b, size) - mean_b**2
    both = _windowed(a * b, size) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * both + C2) / (var_a + var_b + C2)
    return _number(float(np.mean(luminance * structure)))


def _windowed(x: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Means over every size x size window of the last two axes, from running sums."""
    total = np.zeros((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 1))
    total[..., 1:, 1:] = x.cumsum(-1).cumsum(-2)
    rows = total[..., size:, :] - total[..., :-size, :]
    means: NDArray[np.float64] = (rows[..., size:] - rows[..., :-size]) / size**2
    return means


def _number(value: float, otherwise: float = 0.0) -> float:
    return value if math.isfinite(value) else otherwise
