# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: seeded awkward inputs, guard bytes, equality of bits."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from spanker.kernels.formats import Format, row_bytes
from spanker.native import isas

Array = npt.NDArray[Any]

ISAS = isas()
FORMATS = ("f32", "f16", "q4_0", "q4_1", "q8_0")
QUANTISED = ("q4_0", "q4_1", "q8_0")
GUARD = 0xA5


def seed_of(*parts: object) -> int:
    """The seed of a case: a function of its name, so that a failure is repeated by its name."""
    return zlib.crc32(repr(parts).encode())


def assert_same_bits(got: Array, expected: Array, *case: object) -> None:
    """Equality of shape, dtype and every bit: -0 differs from +0, a NaN from another."""
    assert got.dtype == expected.dtype, (case, got.dtype, expected.dtype)
    assert got.shape == expected.shape, (case, got.shape, expected.shape)
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    a = np.ascontiguousarray(got).view(unsigned)
    b = np.ascontiguousarray(expected).view(unsigned)
    if not np.array_equal(a, b):
        wrong = np.argwhere(a != b)
        at = tuple(wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {a.size} differ, first at {at}: got {got[at]!r} ({a[at]:#x}), "
            f"expected {expected[at]!r} ({b[at]:#x}); case {case}, seed {seed_of(*case)}"
        )


class Guarded:
    """Rows to write into, `gap` elements apart, with guard bytes before, between and after."""

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike, gap: int = 5) -> None:
        rows, width = shape
        size = np.dtype(dtype).itemsize
        stride = width + gap
        self.flat = np.full((16 + rows * stride + 16) * size, GUARD, np.uint8)
        body = self.flat[16 * size : (16 + rows * stride) * size].view(dtype)
        self.rows = body.reshape(rows, stride)[:, :width]

    def assert_intact(self, *written: slice) -> None:
        """Nothing but the given columns of the rows (all of them if none is given) was written."""
        result = self.rows.copy()
        try:
            for columns in written or (slice(None),):
                self.rows[:, columns].view()[...] = np.frombuffer(
                    bytes([GUARD]) * self.rows.itemsize, self.rows.dtype
                )[0]
            assert (self.flat == GUARD).all(), "bytes outside of the output were written"
        finally:
            self.rows[...] = result


def strided(x: Array, gap: int = 3) -> Array:
    """The same rows, `gap` elements further apart than they need to be."""
    if x.ndim != 2:
        raise ValueError("only rows can be strided")
    wide = np.full((x.shape[0], x.shape[1] + gap), 77, x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def floats(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "normal") -> Array:
    """float32 values: ordinary ones, or one of the kinds that break careless arithmetic."""
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "zeros":
        return np.where(rng.random(shape) < 0.5, np.float32(0.0), np.float32(-0.0))
    if kind == "subnormal":
        bits = rng.integers(0, 1 << 23, shape, dtype=np.uint32)
        return (bits | (rng.integers(0, 2, shape, dtype=np.uint32) << 31)).view(np.float32)
    if kind == "mixed":  # 60 binary orders of magnitude, exact zeros between
        x = x * np.exp2(rng.integers(-30, 30, shape)).astype(np.float32)
        return np.where(rng.random(shape) < 0.1, np.float32(-0.0), x).astype(np.float32)
    if kind == "one_huge" and x.size:
        x.reshape(-1)[rng.integers(x.size)] = np.float32(-8.0e6)
    return x


def finite_f16(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """Any finite f16 bit pattern: a twentieth of them subnormal, either sign."""
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    infinite = (bits & 0x7C00) == 0x7C00
    return np.where(infinite, bits ^ np.uint16(0x4000), bits).astype(np.uint16).view(np.float16)


def weights(rng: np.random.Generator, name: str, rows: int, k: int) -> npt.NDArray[np.uint8]:
    """Random GGML rows (rows, row_bytes); scales and minima are any finite f16."""
    fmt = Format[name.upper()]
    if name == "f32":
        return np.ascontiguousarray(floats(rng, (rows, k), "mixed")).view(np.uint8)
    if name == "f16":
        return np.ascontiguousarray(finite_f16(rng, (rows, k))).view(np.uint8)
    nbytes = row_bytes(fmt, k)
    out = rng.integers(0, 256, (rows, nbytes), dtype=np.uint8)
    blocks = out.reshape(rows, k // 32, row_bytes(fmt, 32))
    scale_count = 2 if name == "q4_1" else 1
    scales = finite_f16(rng, (rows, k // 32, scale_count))
    blocks[..., : 2 * scale_count] = scales.view(np.uint8)
    return out


def q8_rows(rng: np.random.Generator, tokens: int, k: int) -> npt.NDArray[np.uint8]:
    """Random Q8 activations: any finite scale, integers in [-127, 127].

    -128 is left out: no quantiser of Spanker produces it, and AVX2's sign trick needs that.
    """
    out = np.empty((tokens, k // 32, 34), np.uint8)
    out[..., :2] = finite_f16(rng, (tokens, k // 32, 1)).view(np.uint8)
    out[..., 2:] = rng.integers(-127, 128, (tokens, k // 32, 32), dtype=np.int8).view(np.uint8)
    return out.reshape(tokens, k // 32 * 34)


def activations(rng: np.random.Generator, name: str, tokens: int, k: int) -> Array:
    """What the matmul of this format multiplies."""
    if name in ("f32", "f16"):
        return floats(rng, (tokens, k), "mixed")
    return q8_rows(rng, tokens, k)
