# SPDX-License-Identifier: Apache-2.0
"""Float weights to GGML's block formats, for test models.

Here lives writing only: one function per format fills blocks with bytes.  Reading them back is
the kernels' business.  The plain formats follow the reference quantisers of ggml-quants.c; the
K-quants use its layouts with a simpler choice of scales, from the extremes of each sub-block.

Layouts: ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from spanker.ggml.gguf import GGMLType

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

# Weights worked on at once: their floats and two temporaries of that size stay in a core's cache.
_CHUNK_WEIGHTS = 1 << 16

_f = np.float32


def encode(values: F32, kind: GGMLType) -> bytes:
    """Float32 values (rows, k), or one row (k,), in the layout of `kind`: see `ENCODED`.

    Where the scale of a block is 0 in f16 its integers are those of zeros.  Q8_0 rounds ties to
    even, like GGML's SIMD code; the other plain formats equal GGML's reference code.  Raises
    ValueError for other formats, for rows that cut a block, and for values whose block does not
    fit into f16 scales (NaN and infinities never do).
    """
    if kind not in _WRITERS:
        known = ", ".join(k.name for k in ENCODED)
        raise ValueError(f"no writer for {kind.name}: expected {known}")
    weights, nbytes = kind.block_weights, kind.block_bytes
    if values.ndim == 0 or values.shape[-1] % weights:
        raise ValueError(
            f"{kind.name} needs rows of whole blocks of {weights} weights, got an array of shape "
            f"{values.shape}"
        )
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, weights)
    out = np.empty((blocks.shape[0], nbytes), np.uint8)
    write, step = _WRITERS[kind], _CHUNK_WEIGHTS // weights
    # What overflows is refused by name below, not warned about.
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, blocks.shape[0], step):
            write(blocks[begin : begin + step], out[begin : begin + step])
    return out.tobytes()


# --- pieces --------------------------------------------------------------------------


def _f16(values: F32) -> npt.NDArray[np.float16]:
    half = values.astype("<f2")
    if not np.isfinite(half).all():
        wrong = values[~np.isfinite(half)].flat[0]
        raise ValueError(
            f"a weight, scale or minimum of {wrong} does not fit into f16: scale the weights down"
        )
    return half


def _bytes_of(half: npt.NDArray[np.float16]) -> U8:
    return half.view(np.uint8)


def _inverse(scale: F32, stored: npt.NDArray[np.float16]) -> F32:
    """1 / scale, and 0 where the scale is stored as 0."""
    return np.divide(_f(1), scale, out=np.zeros_like(scale), where=stored != 0)


def _extreme(blocks: F32) -> F32:
    """The value of the largest magnitude along the last axis, which is kept; ties to the first."""
    at = np.abs(blocks).argmax(-1, keepdims=True)
    return np.take_along_axis(blocks, at, -1)


def _integers(scaled: F32, most: int) -> U8:
    """Rounded half up and clipped to 0..most; the argument is overwritten."""
    scaled += _f(0.5)
    np.clip(scaled, 0, most, out=scaled)
    return scaled.astype(np.uint8)


def _nibbles(q: U8) -> U8:
    """The low four bits of 32 integers: the first half of a block sits in the low nibbles."""
    low, high = q[..., :16] & np.uint8(15), q[..., 16:] << np.uint8(4)
    return low | high


# --- plain formats -------------------------------------------------------------------


def _write_f32(blocks: F32, out: U8) -> None:
    out[:] = blocks.astype("<f4").view(np.uint8)


def _write_f16(blocks: F32, out: U8) -> None:
    out[:] = _bytes_of(_f16(blocks))


def _write_bf16(blocks: F32, out: U8) -> None:
    bits = blocks.view(np.uint32)
    # To the nearest, ties to even; where that would carry a NaN over to infinity, a quiet NaN.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    quiet = (bits >> 16) | np.uint32(64)
    out[:] = np.where(np.isnan(blocks), quiet, rounded).astype("<u2").view(np.uint8)


def _write_q8_0(blocks: F32, out: U8) -> None:
    scale = np.abs(blocks).max(1, keepdims=True) / _f(127)
    d = _f16(scale)
    out[:, :2] = _bytes_of(d)
    out[:, 2:] = np.rint(blocks * _inverse(scale, d)).astype(np.int8).view(np.uint8)


def _centred(blocks: F32, half: int) -> tuple[npt.NDArray[np.float16], U8]:
    """Scales and integers 0..2*half-1 around `half`; the extreme value becomes integer 0."""
    scale = _extreme(blocks) / _f(-half)
    d = _f16(scale)
    scaled = blocks * _inverse(scale, d)
    scaled += _f(half)
    return d, _integers(scaled, 2 * half - 1)


def _between(blocks: F32, most: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16], U8]:
    """Scales, minima and integers 0..most from the minimum to the maximum."""
    low = blocks.min(1, keepdims=True)
    scale = (blocks.max(1, keepdims=True) - low) / _f(most)
    d, m = _f16(scale), _f16(low)
    return d, m, _integers((blocks - low) * _inverse(scale, d), most)


def _write_q4_0(blocks: F32, out: U8) -> None:
    d, q = _centred(blocks, 8)
    out[:, :2], out[:, 2:] = _bytes_of(d), _nibbles(q)


def _write_q4_1(blocks: F32, out: U8) -> None:
    d, m, q = _between(blocks, 15)
    out[:, :2], out[:, 2:4], out[:, 4:] = _bytes_of(d), _bytes_of(m), _nibbles(q)


def _fifth_bits(q: U8) -> U8:
    """Bit i of 32 is the fifth bit of integer i."""
    return np.packbits(q >> np.uint8(4), axis=1, bitorder="little")


def _write_q5_0(blocks: F32, out: U8) -> None:
    d, q = _centred(blocks, 16)
    out[:, :2], out[:, 2:6], out[:, 6:] = _bytes_of(d), _fifth_bits(q), _nibbles(q)


def _write_q5_1(blocks: F32, out: U8) -> None:
    d, m, q = _between(blocks, 31)
    out[:, :2], out[:, 2:4] = _bytes_of(d), _bytes_of(m)
    out[:, 4:8], out[:, 8:] = _fifth_bits(q), _nibbles(q)


# --- K-quants ------------------------------------------------------------------------


def _super_scale(
    parts: F32, steps: int
) -> tuple[npt.NDArray[np.float16], F32, npt.NDArray[np.int32]]:
    """(f16 scale, the same as float, integers up to `steps`) of the scales of sub-blocks (n, s).

    The integer of the part of the largest magnitude is `steps`, which may be negative.
    """
    half = _f16(_extreme(parts) / _f(steps))
    d = half.astype(np.float32)
    integers = np.rint(np.divide(parts, d, out=np.zeros_like(parts), where=d != 0))
    return half, d, integers.astype(np.int32)


def _scales_and_minima(parts: F32, most: int) -> tuple[U8, U8, U8]:
    """(head, sc and m packed, integers 0..most (n, 8, 32)) of blocks given as (n, 8, 32).

    A weight is (d * sc) * q - (dmin * m), all of them at least 0.
    """
    low = np.minimum(parts.min(2), _f(0))
    high = np.maximum(parts.max(2), _f(0))
    half_d, d, sc = _super_scale((high - low) / _f(most), 63)
    half_m, dmin, m = _super_scale(-low, 63)
    sc, m = np.minimum(sc, 63), np.minimum(m, 63)
    step, offset = d * sc.astype(np.float32), dmin * m.astype(np.float32)
    inverse = np.divide(_f(1), step, out=np.zeros_like(step), where=step != 0)
    scaled = parts + offset[..., None]
    scaled *= inverse[..., None]
    # Eight pairs of six bits in twelve bytes: the last four pairs are cut in two.
    packed = np.empty((parts.shape[0], 12), np.uint8)
    packed[:, 0:4] = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    packed[:, 4:8] = m[:, :4] | (m[:, 4:] >> 4) << 6
    packed[:, 8:12] = (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    head = np.concatenate([_bytes_of(half_d), _bytes_of(half_m)], axis=1)
    return head, packed, _integers(scaled, most)


def _paired_nibbles(q: U8) -> U8:
    """(n, 8, 32) to (n, 128): sub-block 2i sits in the low nibbles, 2i + 1 in the high ones."""
    both = (q[:, 0::2] & np.uint8(15)) | (q[:, 1::2] << np.uint8(4))
    return both.reshape(-1, 128)


def _write_q4_k(blocks: F32, out: U8) -> None:
    head, packed, q = _scales_and_minima(blocks.reshape(-1, 8, 32), 15)
    out[:, :4], out[:, 4:16], out[:, 16:] = head, packed, _paired_nibbles(q)


def _write_q5_k(blocks: F32, out: U8) -> None:
    head, packed, q = _scales_and_minima(blocks.reshape(-1, 8, 32), 31)
    # Bit s of byte i is the fifth bit of integer i of sub-block s.
    fifth = np.packbits(q >> np.uint8(4), axis=1, bitorder="little").reshape(-1, 32)
    out[:, :4], out[:, 4:16] = head, packed
    out[:, 16:48], out[:, 48:] = fifth, _paired_nibbles(q)


def _write_q6_k(blocks: F32, out: U8) -> None:
    """A weight is (d * sc) * (q - 32) with sc in int8; there are 16 sub-blocks of 16."""
    parts = blocks.reshape(-1, 16, 16)
    half, d, sc = _super_scale(_extreme(parts)[..., 0] / _f(-32), -128)
    sc = np.clip(sc, -128, 127)
    step = d * sc.astype(np.float32)
    inverse = np.divide(_f(1), step, out=np.zeros_like(step), where=step != 0)
    scaled = parts * inverse[..., None]
    scaled += _f(32)
    # Each half of a block is four runs of 32 weights, which share bytes.
    q = _integers(scaled, 63).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & np.uint8(15)) | (q[:, :, 2:] << np.uint8(4))
    top = q >> np.uint8(4)
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    out[:, :128], out[:, 128:192] = low.reshape(-1, 128), high.reshape(-1, 64)
    out[:, 192:208], out[:, 208:] = sc.astype(np.int8).view(np.uint8), _bytes_of(half)


_WRITERS: Mapping[GGMLType, Callable[[F32, U8], None]] = MappingProxyType(
    {
        GGMLType.F32: _write_f32,
        GGMLType.F16: _write_f16,
        GGMLType.BF16: _write_bf16,
        GGMLType.Q8_0: _write_q8_0,
        GGMLType.Q4_0: _write_q4_0,
        GGMLType.Q4_1: _write_q4_1,
        GGMLType.Q5_0: _write_q5_0,
        GGMLType.Q5_1: _write_q5_1,
        GGMLType.Q4_K: _write_q4_k,
        GGMLType.Q5_K: _write_q5_k,
        GGMLType.Q6_K: _write_q6_k,
    }
)

#: The formats that `encode` writes.
ENCODED = tuple(_WRITERS)
