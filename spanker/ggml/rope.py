# SPDX-License-Identifier: Apache-2.0
"""RoPE tables in float64 by our own functions, then rounded once to float32.

Neither libm nor numpy's transcendental functions are used: their last bits differ between
machines, and these tables decide every later bit.  Only + - * / and conversions appear here.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

# pi/2 and ln 2 in parts of 33 bits, so that n times a leading part is exact for n < 2**20
# (Cody and Waite; the constants are those of fdlibm's e_rem_pio2.c and s_expm1.c by value).
_PIO2_1, _PIO2_2, _PIO2_3 = (
    1.57079632673412561417e00,
    6.07710050630396597660e-11,
    2.02226624879595063154e-21,
)
_LN2_HI, _LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_MAGIC = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer


def _rint(x: F64) -> F64:
    return (x + _MAGIC) - _MAGIC


def _series(x: F64, first: int, last: int, step_sign: float) -> F64:
    """1 + x/(a(a+1)) (1 + x/((a+2)(a+3)) (...)) by Horner: Taylor terms a = first, first+2, ..."""
    total = np.ones_like(x)
    for a in range(last, first - 1, -2):
        total = 1.0 + step_sign * x / (a * (a + 1.0)) * total
    return total


def sin_cos(x: F64) -> tuple[F64, F64]:
    """sin and cos of 0 <= x < 2**20 radians, to about 1e-15 plus the rounding of x itself."""
    n = _rint(x * 0.636619772367581382433)
    r = ((x - n * _PIO2_1) - n * _PIO2_2) - n * _PIO2_3
    r2 = r * r
    s = r * _series(r2, 2, 20, -1.0)
    c = _series(r2, 1, 19, -1.0)
    quadrant = n.astype(np.int64) & 3
    swap = (quadrant & 1).astype(bool)
    sin = np.where(swap, c, s)
    cos = np.where(swap, s, c)
    return np.where(quadrant >= 2, -sin, sin), np.where(
        (quadrant == 1) | (quadrant == 2), -cos, cos
    )


def log(x: float) -> float:
    """Natural logarithm of a finite x > 0."""
    mantissa, exponent = np.frexp(np.float64(x))
    m, e = float(mantissa), int(exponent)
    if m < 0.7071067811865476:
        m, e = m * 2.0, e - 1
    z = (m - 1.0) / (m + 1.0)
    z2 = z * z
    total = 0.0
    for k in range(41, 0, -2):
        total = total * z2 + 1.0 / k
    return e * _LN2_HI + (2.0 * z * total + e * _LN2_LO)


def exp(x: F64) -> F64:
    """e**x for |x| < 700."""
    n = _rint(x * 1.44269504088896338700)
    r = (x - n * _LN2_HI) - n * _LN2_LO
    total = np.ones_like(r)
    for k in range(20, 0, -1):
        total = 1.0 + r / k * total
    return np.ldexp(total, n.astype(np.int64))


@functools.lru_cache(maxsize=4)
def table(positions: int, rope_dim: int, base: float) -> npt.NDArray[np.float32]:
    """(positions, rope_dim/2, 2) float32: cos and sin of position * base**(-2i/rope_dim).

    The formula is that of RoFormer (Su et al., 2021), with the pairs (2i, 2i+1) of llama GGUFs.
    Every card gets the same table: it is kept, and read-only.
    """
    pair = np.arange(rope_dim // 2, dtype=np.float64)
    frequency = exp(-2.0 * pair / rope_dim * log(base))
    sin, cos = sin_cos(np.arange(positions, dtype=np.float64)[:, None] * frequency[None, :])
    out = np.stack([cos, sin], axis=-1).astype(np.float32)
    out.flags.writeable = False
    return out
