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
FORMATS = tuple(f.name.lower() for f in Format)
FLOATS = tuple(f.name.lower() for f in Format if f.is_float)
QUANTISED = tuple(f.name.lower() for f in Format if not f.is_float)
SUPER_BLOCKS = ("q4_k", "q5_k", "q6_k")
# Where the f16 fields of a block are: the scale, then the minimum if there is one.
SCALES_AT = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}
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


def depths(name: str, *blocks: int) -> tuple[int, ...]:
    """Depths of so many blocks of a format; one of float weights counts as 32."""
    block = Format[name.upper()].block
    return tuple((32 if block == 1 else block) * n for n in blocks)


def block_view(name: str, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Contiguous GGML rows as (rows, blocks, bytes of a block); a view."""
    fmt = Format[name.upper()]
    size = row_bytes(fmt, fmt.block)
    return rows.reshape(rows.shape[0], rows.shape[1] // size, size)


def f16_bytes(values: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The bytes (*shape, 2) of f16 values, broadcast to that shape."""
    f16 = np.broadcast_to(np.asarray(values, np.float16), shape)
    return np.ascontiguousarray(f16)[..., None].view(np.uint8)


def set_scales(name: str, rows: npt.NDArray[np.uint8], *values: npt.ArrayLike) -> None:
    """Overwrite the scale, then the minimum, of every block; f16 values, broadcast to (R, n)."""
    blocks = block_view(name, rows)
    for at, value in zip(SCALES_AT[name], values, strict=False):
        blocks[..., at : at + 2] = f16_bytes(value, blocks.shape[:2])


def weights(rng: np.random.Generator, name: str, rows: int, k: int) -> npt.NDArray[np.uint8]:
    """Random GGML rows (rows, row_bytes); f16 scales and minima are any finite ones."""
    if name == "f32":
        return np.ascontiguousarray(floats(rng, (rows, k), "mixed")).view(np.uint8)
    if name == "f16":
        return np.ascontiguousarray(finite_f16(rng, (rows, k))).view(np.uint8)
    if name == "bf16":
        upper = floats(rng, (rows, k), "mixed").view(np.uint32) >> 16
        return np.ascontiguousarray(upper.astype(np.uint16)).view(np.uint8)
    out = rng.integers(0, 256, (rows, row_bytes(Format[name.upper()], k)), dtype=np.uint8)
    shape = block_view(name, out).shape[:2]
    set_scales(name, out, *(finite_f16(rng, shape) for _ in SCALES_AT[name]))
    return out


def six_bits(scales: Array, minima: Array) -> npt.NDArray[np.uint8]:
    """The twelve bytes of a K-quant's scales and minima, each (..., 8) below 64.

    0-3    EEAAAAAA ... HHDDDDDD   scales A to D and the upper bits of scales E to H
    4-7    eeaaaaaa ... hhdddddd   the same of the minima
    8-11   eeeeEEEE ... hhhhHHHH   the lower bits of minima and scales E to H
    """
    upper = np.concatenate([scales[..., :4], minima[..., :4]], axis=-1)
    upper = upper | np.concatenate([scales[..., 4:], minima[..., 4:]], axis=-1) >> 4 << 6
    lower = scales[..., 4:] & 15 | (minima[..., 4:] & 15) << 4
    return np.concatenate([upper, lower], axis=-1).astype(np.uint8)


def ggml_rows(name: str, q: Array, *scales: Array, small: Array | None = None) -> Array:
    """GGML rows from their parts: the inverse of what reference.split_blocks takes apart.

    q (R, B, 32) are the integers as stored: unsigned, or int8 for q8_0.  `scales` are f16 bytes
    (R, n, 2): scale and minimum of each of the n blocks or super-blocks.  `small` are the bytes
    (R, n, 12 or 16) of a K-quant's block scales.
    """
    rows = q.shape[0]
    q = np.ascontiguousarray(q).view(np.uint8) if name == "q8_0" else q.astype(np.uint8)

    def joined(*parts: Array) -> Array:
        return np.concatenate(parts, axis=-1).reshape(rows, -1)

    def halves(low: Array, high: Array) -> Array:
        return low & 15 | (high & 15) << 4

    if name in SUPER_BLOCKS:
        n = q.shape[1] // 8
        assert small is not None
        if name == "q6_k":
            q = q.reshape(rows, n, 2, 4, 32)  # in each half, two blocks are below two others
            ql = halves(q[..., 0:2, :], q[..., 2:4, :]).reshape(rows, n, 128)
            qh = sum((q[..., i, :] >> 4 << 2 * i for i in range(4)), np.uint8(0))
            return joined(ql, qh.reshape(rows, n, 64), small, *scales)
        qs = halves(q[:, 0::2], q[:, 1::2]).reshape(rows, n, 128)
        if name == "q4_k":
            return joined(*scales, small, qs)
        fifth = np.packbits(q.reshape(rows, n, 8, 32) >> 4, axis=-2, bitorder="little")
        return joined(*scales, small, fifth.reshape(rows, n, 32), qs)
    if name == "q8_0":
        return joined(*scales, q)
    qs = halves(q[..., :16], q[..., 16:])
    if name in ("q5_0", "q5_1"):
        return joined(*scales, np.packbits(q >> 4, axis=-1, bitorder="little"), qs)
    return joined(*scales, qs)


def q8_rows(rng: np.random.Generator, tokens: int, k: int) -> npt.NDArray[np.uint8]:
    """Random Q8 activations: any finite scale, integers in [-127, 127].

    -128 is left out: no quantiser of Spanker produces it, and the kernels may rely on that.
    """
    out = np.empty((tokens, k // 32, 34), np.uint8)
    out[..., :2] = finite_f16(rng, (tokens, k // 32, 1)).view(np.uint8)
    out[..., 2:] = rng.integers(-127, 128, (tokens, k // 32, 32), dtype=np.int8).view(np.uint8)
    return out.reshape(tokens, k // 32 * 34)


def activations(rng: np.random.Generator, name: str, tokens: int, k: int) -> Array:
    """What the matmul of this format multiplies."""
    if name in FLOATS:
        return floats(rng, (tokens, k), "mixed")
    return q8_rows(rng, tokens, k)
