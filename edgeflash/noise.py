"""The same Gaussian noise on every machine and in every language, from a seed.

The algorithm, whole, so that C++, Swift, Kotlin or JavaScript can reproduce it:

1. **Counter and key.** Element ``i`` (row-major index in the array) of draw ``offset`` with a
   64-bit ``seed`` uses four counter words and two key words, all uint32::

       c = (offset, 0, i, 0)        k = (seed mod 2^32, seed div 2^32)

   Draw 0 is the noise that a picture starts from; the noise that the ``i``-th step to run adds
   (counting from 0) is draw ``i + 1``.
2. **Philox 4x32-10** (Salmon et al. 2011, doi:10.1145/2063384.2063405). Ten rounds; ``hi`` and
   ``lo`` are the halves of a 64-bit product, ``^`` is exclusive or, additions wrap::

       c = (hi(M1*c2) ^ c1 ^ k0,  lo(M1*c2),  hi(M0*c0) ^ c3 ^ k1,  lo(M0*c0))
       k = (k0 + W0, k1 + W1)       before every round but the first
       M0 = D2511F53   M1 = CD9E8D57   W0 = 9E3779B9   W1 = BB67AE85      (hexadecimal)

3. **Box-Muller** on the first two output words ``x, y``, first normal of the pair. ``f32(.)``
   rounds to the nearest float32, ties to even; everything else is float64::

       u = f32(f32(x) * 2^-32 + 2^-33)                       in (0, 1]
       v = f32(f32(y) * t + t / 2),  t = 2^-32 * f32(2 pi)   in (0, 2 pi]
       n = f32(sqrt(-2 ln u) * sin v)                        f32(2 pi) = 6.2831854820251465

Test vectors, ``c -> words`` with ``k``, from Random123's known answers::

    00000000 x 4         k 00000000 00000000  ->  6627e8d5 e169c58d bc57ac4c 9b00dbd8
    ffffffff x 4         k ffffffff ffffffff  ->  408f276d 41c83b0e a20bc7c6 6d5451fd
    243f6a88 85a308d3 13198a2e 03707344
                         k a4093822 299f31d0  ->  d16cfe09 94fdcceb 5001e420 24126ea1

and normals for seed 42, elements 0 to 4::

    offset 0:   0.19401889   2.1613739  -0.1720506   0.8490601   -1.9243993
    offset 1:   0.13913755  -0.108215846  -0.717422   0.75664866   0.3714882

**Agreement.** The words agree bit for bit, and so do ``u`` and ``v``. ``n`` is within 0.51 ulp of
its exact value, so two implementations that take its logarithm, root and sine in float64 differ by
at most 1 ulp, and hardly ever. One that takes them in float32 stays within 3 ulp; one that also
rounds ``y * t`` before it adds ``t / 2`` stays within 2e-6 (absolute), but not within a few ulp
where the sine is near zero.

**Convention.** This is the value that ``torch.randn`` gives on a CUDA device from a generator with
this seed, ``offset`` counting its earlier calls, and what the "NV" noise source of the web UIs,
stable-diffusion.cpp's ``cuda`` generator and Apple's Swift ``NvRandomSource`` give. CUDA takes a
fast float32 sine and they round ``u`` and ``v`` each in their way: values agree to about 5 decimals
(to 3 in the rare draw where ``u`` is next to 1), last digits do not.

**Where CUDA parts.** In an array with more elements than the GPU runs threads at once
(multiprocessors x threads of each: 40,960 on a T4, 270,336 on an H200; a 64x64x4 latent has 16,384)
PyTorch takes the other normals of the same counters for the rest, in an order that depends on the
GPU model (pytorch issues 194676 and 196613). Here, as in the other programs named, element ``i``
keeps counter ``i`` at every size, so that one seed stays one picture.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgeflash.errors import EdgeflashError

Words = npt.NDArray[np.uint32]

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
ROUNDS = 10
TWO_PI = float(np.float32(2 * math.pi))


def philox_4x32(counter: Words, key: Words) -> Words:
    """Philox 4x32-10 of ``counter`` [4, n] under ``key`` [2], uint32 -> [4, n] uint32.

    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405, section 4.3.
    """
    assert counter.shape[0] == 4 and counter.dtype == np.uint32, (counter.shape, counter.dtype)
    assert key.shape == (2,) and key.dtype == np.uint32, (key.shape, key.dtype)
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = M0 * c0.astype(np.uint64), M1 * c2.astype(np.uint64)
        c0, c1, c2, c3 = _hi(p1) ^ c1 ^ key[0], _lo(p1), _hi(p0) ^ c3 ^ key[1], _lo(p0)
        key = key + W
    return np.stack([c0, c1, c2, c3])


def box_muller(x: Words, y: Words) -> npt.NDArray[np.float32]:
    """The first normal of the pair that words ``x`` and ``y`` [n] make -> [n] float32."""
    u = x.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    t = 2.0**-32 * TWO_PI
    v = (y.astype(np.float32).astype(np.float64) * t + t / 2).astype(np.float32)
    s = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    return (s * np.sin(v.astype(np.float64))).astype(np.float32)


def randn(shape: tuple[int, ...], seed: int, offset: int = 0) -> npt.NDArray[np.float32]:
    """Standard normal noise of ``shape``, float32: draw ``offset`` of ``seed``.

    Raises ``EdgeflashError`` for a seed outside 0 .. 2^64 - 1. See the module for the algorithm and
    for what it agrees with.
    """
    if not 0 <= seed < 2**64:
        raise EdgeflashError(f"seed {seed} is outside 0 .. 2^64 - 1: give one inside")
    n = math.prod(shape)
    assert n < 2**32 and 0 <= offset < 2**32, (shape, offset)
    counter = np.zeros((4, n), np.uint32)
    counter[0] = offset
    counter[2] = np.arange(n, dtype=np.uint32)
    key = np.array([seed % 2**32, seed >> 32], np.uint32)
    words = philox_4x32(counter, key)
    return box_muller(words[0], words[1]).reshape(shape)


def _hi(product: npt.NDArray[np.uint64]) -> Words:
    return (product >> np.uint64(32)).astype(np.uint32)


def _lo(product: npt.NDArray[np.uint64]) -> Words:
    return product.astype(np.uint32)
