"""The measures of the ladder against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflash import parity

RANDOM = np.random.default_rng(0)
A = RANDOM.standard_normal((1, 3, 16, 20)).astype(np.float32)


def test_psnr_of_a_known_error() -> None:
    found = A + np.where(np.arange(20) % 2, 0.01, -0.01)
    assert parity.psnr_db(A, found, peak=2.0) == pytest.approx(20 * math.log10(200), abs=1e-4)
    peak = float(A.max() - A.min())
    assert parity.psnr_db(A, found) == pytest.approx(20 * math.log10(peak / 0.01), abs=1e-4)


def test_psnr_at_its_ends() -> None:
    assert parity.psnr_db(A, A) == parity.BEST_DB
    assert parity.psnr_db(A, A + np.float64(1e-30)) == parity.BEST_DB
    assert parity.psnr_db(A, np.full_like(A, np.nan)) == 0
    assert parity.psnr_db(A, np.full_like(A, np.inf)) == 0
    assert parity.psnr_db(np.ones(3), np.ones(3)) == parity.BEST_DB
    assert parity.psnr_db(np.ones(3), np.zeros(3)) == 0, "a constant's peak is its size"
    assert parity.psnr_db(np.zeros(3), np.ones(3)) == 0


def test_psnr_of_one_number_and_of_masks() -> None:
    assert parity.psnr_db(np.array(500.0), np.array(499.95)) == pytest.approx(80, abs=1e-6)
    mask = np.where(A > 1, -np.inf, A)
    found = mask + 0.01
    assert parity.psnr_db(mask, mask) == parity.BEST_DB
    assert parity.psnr_db(mask, found) == parity.psnr_db(mask[A <= 1], found[A <= 1])
    assert parity.psnr_db(mask, -mask) == parity.psnr_db(A, mask) == 0
    assert parity.psnr_db(np.array([-np.inf]), np.array([-np.inf])) == parity.BEST_DB


@given(st.floats(0.01, 100), st.floats(0.1, 10))
def test_psnr_does_not_depend_on_the_unit(error: float, unit: float) -> None:
    found = A + error * np.sign(A)
    scaled = parity.psnr_db(A * unit, found * unit)
    assert scaled == pytest.approx(parity.psnr_db(A, found), abs=1e-3)


def test_cosine_and_relative_l2() -> None:
    across = np.array([[0.0, 2.0], [0.0, 0.0]])
    along = np.array([[3.0, 0.0], [0.0, 0.0]])
    assert parity.cosine(along, across) == 0
    assert parity.cosine(along, -2 * along) == pytest.approx(-1)
    assert parity.cosine(along, np.zeros((2, 2))) == 0
    assert parity.relative_l2(along, across) == pytest.approx(math.sqrt(13) / 3)
    assert parity.relative_l2(along, along) == 0
    assert parity.relative_l2(along, np.full((2, 2), np.nan)) == math.inf


@given(st.floats(-3, 3))
def test_projection_finds_the_share_beneath_unrelated_errors(share: float) -> None:
    error = RANDOM.standard_normal(A.shape)
    error -= (error * A).sum() / (A * A).sum() * A
    assert parity.projection(A, share * A + error) == pytest.approx(share, abs=1e-5)


def test_projection_of_nothing() -> None:
    assert parity.projection(np.zeros(4), np.zeros(4)) == 1
    assert parity.projection(np.zeros(4), np.ones(4)) == 0
    assert parity.projection(np.ones(4), np.full(4, np.nan)) == 0


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, as the paper writes it: Wang et al. 2004, eq. 13, uniform 8x8 window."""
    values = []
    for i in range(a.shape[-2] - 7):
        for j in range(a.shape[-1] - 7):
            x, y = a[..., i : i + 8, j : j + 8], b[..., i : i + 8, j : j + 8]
            mx, my = x.mean((-2, -1)), y.mean((-2, -1))
            vx, vy = x.var((-2, -1)), y.var((-2, -1))
            cov = (x * y).mean((-2, -1)) - mx * my
            over = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
            values.append(over / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


def test_ssim_is_the_paper_s() -> None:
    a = RANDOM.uniform(0, 1, (2, 12, 11))
    b = np.clip(a + 0.2 * RANDOM.standard_normal(a.shape), 0, 1)
    assert parity.ssim(a, b, 1.0) == pytest.approx(naive_ssim(a, b), abs=1e-9)
    assert parity.ssim(a * 255, b * 255, 255.0) == pytest.approx(naive_ssim(a, b), abs=1e-9)
    assert parity.ssim(a, a, 1.0) == pytest.approx(1)
    assert parity.ssim(a[..., :4, :4], a[..., :4, :4], 1.0) == pytest.approx(1), "small images too"
    assert parity.ssim(a, 1 - a, 1.0) < 0
