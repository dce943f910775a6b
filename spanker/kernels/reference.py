# SPDX-License-Identifier: Apache-2.0
"""The definition of every kernel, as plain numpy that is slow, obvious and exact.

Each native kernel must equal the function of its name here, bit for bit.  Only operations that
IEEE 754 defines exactly are used: + - * / sqrt, comparisons, conversions, integer arithmetic;
numpy's own reductions and transcendental functions are not, because their order and accuracy
differ between machines.  docs/api/kernel-semantics.md says the same in words.

Arrays are float32 unless a shape comment says otherwise; T is tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spanker.errors import CardFaultError
from spanker.kernels.elements import Element, Reduction

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
Elements = npt.NDArray[Any]

BLOCK = 32
Q8_BLOCK_BYTES = 34
LOGIT_CHUNK = 256
LANES = 16

_f = np.float32


class NonFiniteError(CardFaultError):
    """A NaN or an infinity entered or left a kernel."""


class F16RangeError(CardFaultError):
    """A scale, key or value does not fit into f16."""


# --- scalar functions ---------------------------------------------------------


def rint(x: F32) -> F32:
    """Nearest integer, ties to even, for |x| < 2**22."""
    return (x + _f(12582912.0)) - _f(12582912.0)


def exp(x: F32) -> F32:
    """exp of the argument clamped to [-87, 88]: Cephes' expf by Horner, each step rounded."""
    x = np.minimum(np.maximum(x, _f(-87.0)), _f(88.0))
    n = rint(x * _f(1.44269504088896341))
    r = (x - n * _f(0.693359375)) - n * _f(-2.12194440e-4)
    p = np.full_like(r, _f(1.9875691500e-4))
    for c in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = p * r + _f(c)
    y = (p * (r * r) + r) + _f(1.0)
    scale: F32 = ((n.astype(np.int32) + 127) << 23).astype(np.uint32).view(np.float32)
    out: F32 = y * scale
    return out


def tree16(lane: F32) -> F32:
    """Fold the last axis of 16 lanes: halves are added, 8 + 8, then 4 + 4, 2 + 2, 1 + 1."""
    for half in (8, 4, 2, 1):
        lane = lane[..., :half] + lane[..., half : 2 * half]
    return lane[..., 0]


def sum_lanes(x: F32) -> F32:
    """Sum the last axis: lane i mod 16 takes element i, ascending; then `tree16`."""
    n = x.shape[-1]
    lane = np.zeros((*x.shape[:-1], LANES), np.float32)
    for begin in range(0, n, LANES):
        part = x[..., begin : begin + LANES]
        lane[..., : part.shape[-1]] = lane[..., : part.shape[-1]] + part
    return tree16(lane)


def _check_finite(x: F32) -> None:
    if not np.isfinite(x).all():
        raise NonFiniteError("a NaN or an infinity entered or left a kernel")


# --- activations --------------------------------------------------------------


def quantize_q8(x: F32) -> U8:
    """(T, k) floats to (T, k/32 * 34) bytes: per 32 values f16(amax/127) and 32 int8.

    Layout and rule of GGML's block_q8_0.  Raises NonFiniteError, F16RangeError.
    """
    tokens, k = x.shape
    _check_finite(x)
    v = x.reshape(tokens, k // BLOCK, BLOCK)
    amax = np.abs(v).max(axis=-1, initial=_f(0))
    scale = amax / _f(127.0)
    with np.errstate(over="ignore"):
        d = scale.astype(np.float16)
    if np.isinf(d).any():
        raise F16RangeError("the scale of an activation block does not fit into f16")
    inverse = np.zeros_like(scale)
    np.divide(_f(1.0), scale, out=inverse, where=d != 0)
    out = np.empty((tokens, k // BLOCK, Q8_BLOCK_BYTES), np.uint8)
    out[..., :2] = d[..., None].view(np.uint8)
    out[..., 2:] = rint(v * inverse[..., None]).astype(np.int8).view(np.uint8)
    return out.reshape(tokens, k // BLOCK * Q8_BLOCK_BYTES)


def expand_q8(blocks: U8) -> tuple[I8, F32, I32]:
    """Q8 blocks (T, blocks*34) to integers (T, blocks, 32), scales and integer sums (T, blocks)."""
    n = blocks.shape[1] // Q8_BLOCK_BYTES
    b = np.ascontiguousarray(blocks).reshape(blocks.shape[0], n, Q8_BLOCK_BYTES)
    d = np.ascontiguousarray(b[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    q = np.ascontiguousarray(b[..., 2:]).view(np.int8)
    return q, d, q.sum(axis=-1, dtype=np.int32)


# --- weights ------------------------------------------------------------------


class Blocks(NamedTuple):
    """Quantised rows in blocks of 32 weights; R rows, B blocks."""

    q: I32  # (R, B, 32): the integers, without the offset they are stored with
    d: F32  # (R, B): the scale; a K-quant's d * 6-bit scale, which is exact
    m: F32 | None = None  # (R, B): the minimum; a K-quant's dmin * 6-bit minimum, also exact
    halves: I32 | None = None  # (R, B, 2): q6_K's scales of the first and the last 16 weights


def split_blocks(name: str, rows: U8) -> Blocks:
    """GGML rows (R, row_bytes) in blocks of 32.  Layouts: ggml/src/ggml-common.h.

    q4_0 d qs[16]                        q5_0 d qh[4] qs[16]
    q4_1 d m qs[16]                      q5_1 d m qh[4] qs[16]
    q8_0 d qs[32]                        q6_K ql[128] qh[64] scales[16] d
    q4_K d dmin scales[12] qs[128]       q5_K d dmin scales[12] qh[32] qs[128]

    d, m and dmin are f16, q8_0's integers and q6_K's scales int8, all others unsigned.
    """
    if name in ("q4_k", "q5_k"):
        return _split_k45(name, rows)
    if name == "q6_k":
        return _split_k6(rows)
    size = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}[name]
    b = _blocks(rows, size)
    d = _f16(b[..., :2])
    if name == "q8_0":
        return Blocks(np.ascontiguousarray(b[..., 2:]).view(np.int8).astype(np.int32), d)
    # A byte of qs has weight j in its low half and weight j + 16 in its high half.
    q = np.concatenate([b[..., -16:] & 15, b[..., -16:] >> 4], axis=-1).astype(np.int32)
    if name in ("q5_0", "q5_1"):
        # Bit j of the 32 bits of qh is the fifth bit of weight j.
        q += 16 * np.unpackbits(b[..., -20:-16], axis=-1, bitorder="little")
    if name in ("q4_1", "q5_1"):
        return Blocks(q, d, _f16(b[..., 2:4]))
    return Blocks(q - {"q4_0": 8, "q5_0": 16}[name], d)


def _blocks(rows: U8, size: int) -> U8:
    return np.ascontiguousarray(rows).reshape(rows.shape[0], rows.shape[1] // size, size)


def _f16(pairs: U8) -> F32:
    """The last axis, two bytes, as a float."""
    return np.ascontiguousarray(pairs).view("<f2")[..., 0].astype(np.float32)


def _split_k45(name: str, rows: U8) -> Blocks:
    """q4_K and q5_K: 256 weights as eight blocks of 32, each with a 6-bit scale and minimum."""
    b = _blocks(rows, {"q4_k": 144, "q5_k": 176}[name])
    d, dmin = _f16(b[..., 0:2]), _f16(b[..., 2:4])
    s, qh, qs = b[..., 4:16], b[..., 16:48], b[..., -128:]  # q4_K has no qh
    scale = np.empty((*d.shape, 8), np.float32)
    minimum = np.empty((*d.shape, 8), np.float32)
    for j in range(4):
        scale[..., j] = s[..., j] & 63
        minimum[..., j] = s[..., j + 4] & 63
        # The others have four bits in the last four bytes and two above those of the first four.
        scale[..., j + 4] = (s[..., j + 8] & 15) + 16 * (s[..., j] >> 6)
        minimum[..., j + 4] = (s[..., j + 8] >> 4) + 16 * (s[..., j + 4] >> 6)
    q = np.empty((*d.shape, 8, BLOCK), np.int32)
    for j in range(8):
        # 32 bytes hold two blocks: one in their low halves, the next in their high halves.
        pair, high = divmod(j, 2)
        q[..., j, :] = (qs[..., 32 * pair :][..., :32] >> (4 * high)) & 15
        if name == "q5_k":  # bit j of byte i of qh is the fifth bit of weight i of block j
            q[..., j, :] += 16 * ((qh >> j) & 1)
    count = d.shape[1] * 8
    return Blocks(
        q.reshape(rows.shape[0], count, BLOCK),
        (d[..., None] * scale).reshape(rows.shape[0], count),
        (dmin[..., None] * minimum).reshape(rows.shape[0], count),
    )


def _split_k6(rows: U8) -> Blocks:
    """q6_K: 256 weights, an int8 scale for every 16 of them."""
    b = _blocks(rows, 210)
    ql, qh, d = b[..., :128], b[..., 128:192], _f16(b[..., 208:])
    q = np.empty((*d.shape, 8, BLOCK), np.int32)
    for j in range(8):
        # Each half of the 256 has 64 bytes of ql: four blocks, two in the low halves of the
        # bytes, two in the high ones; and 32 bytes of qh with two bits for each of the four.
        half, i = divmod(j, 4)
        lower = (ql[..., 64 * half + 32 * (i % 2) :][..., :32] >> (4 * (i // 2))) & 15
        upper = (qh[..., 32 * half :][..., :32] >> (2 * i)) & 3
        q[..., j, :] = (lower + 16 * upper).astype(np.int32) - 32
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.int32)
    count = d.shape[1] * 8
    return Blocks(
        q.reshape(rows.shape[0], count, BLOCK),
        np.repeat(d, 8, axis=1),
        halves=scales.reshape(rows.shape[0], count, 2),
    )


def dequantize_row(name: str, rows: U8) -> F32:
    """GGML rows (R, row_bytes) to floats (R, k).

    d*q, then + m where the format has minima; K-quants (d*scale)*q, then - dmin*minimum.
    """
    rows = np.ascontiguousarray(rows)
    if name == "f32":
        return rows.view(np.float32)
    if name == "f16":
        return rows.view(np.float16).astype(np.float32)
    if name == "bf16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    q, d, m, halves = split_blocks(name, rows)
    scale = d[..., None]
    if halves is not None:
        scale = scale * np.repeat(halves, 16, axis=-1).astype(np.float32)
    out = scale * q.astype(np.float32)
    if m is not None:
        out = out - m[..., None] if name in ("q4_k", "q5_k") else out + m[..., None]
    return out.reshape(rows.shape[0], q.shape[1] * BLOCK)


def matmul(name: str, weights: U8, x: npt.NDArray[np.generic]) -> F32:
    """(T, rows) = x times the GGML rows `weights` (rows, row_bytes).

    x is Q8 blocks (T, k/32*34) for quantised weights, floats (T, k) for f16, bf16 and f32.
    Per element, blocks of 32 in ascending k: acc = acc + (d*dx) * float(idot), and with minima then
    acc = acc + (m*dx) * float(sum of the block's activation integers), - instead of + in a K-quant.
    """
    if name in ("f32", "f16", "bf16"):
        w, xf = dequantize_row(name, weights), x.astype(np.float32)
        acc = np.zeros((xf.shape[0], w.shape[0]), np.float32)
        for i in range(w.shape[1]):
            acc = acc + w[None, :, i] * xf[:, i, None]
        return acc
    q, d, m, halves = split_blocks(name, weights)
    if halves is not None:
        q = q * np.repeat(halves, 16, axis=-1)
    xq, dx, xsum = expand_q8(x.astype(np.uint8, copy=False))
    acc = np.zeros((xq.shape[0], q.shape[0]), np.float32)
    for b in range(q.shape[1]):
        idot = xq[:, b, :].astype(np.int32) @ q[:, b, :].T
        acc = acc + (d[None, :, b] * dx[:, b, None]) * idot.astype(np.float32)
        if m is not None:
            term = (m[None, :, b] * dx[:, b, None]) * xsum[:, b, None].astype(np.float32)
            acc = acc - term if name in ("q4_k", "q5_k") else acc + term
    return acc


# --- everything between the matmuls --------------------------------------------


def rmsnorm(x: F32, weight: F32, eps: float) -> F32:
    """(x * r) * weight with r = 1/sqrt(mean + eps); the sum of squares runs in 16 lanes."""
    mean = sum_lanes(x * x) / _f(x.shape[-1])
    _check_finite(mean)
    r: F32 = _f(1.0) / np.sqrt(mean + _f(eps))
    _check_finite(r)
    return (x * r[..., None]) * weight


def rope(x: F32, table: F32, positions: npt.NDArray[np.uint32], rope_dim: int) -> F32:
    """Rotate pairs (2i, 2i+1) of x (T, heads, head_dim); table (positions, rope_dim/2, 2)."""
    out = x.copy()
    c = table[positions, None, :, 0]
    s = table[positions, None, :, 1]
    a, b = x[..., 0:rope_dim:2], x[..., 1:rope_dim:2]
    out[..., 0:rope_dim:2] = a * c - b * s
    out[..., 1:rope_dim:2] = a * s + b * c
    return out


def to_f16(x: F32) -> npt.NDArray[np.float16]:
    """Keys and values as stored: f16, round to nearest even.  Raises F16RangeError."""
    with np.errstate(over="ignore"):
        h = x.astype(np.float16)
    if not np.isfinite(h).all():
        raise F16RangeError("a key or value does not fit into f16")
    return h


def attention(
    q: F32, keys: npt.NDArray[np.float16], values: npt.NDArray[np.float16], scale: np.float32
) -> F32:
    """One query (head_dim,) against keys and values (positions, head_dim), all visible.

    Scores accumulate over ascending dimension; exact maximum; the sum of exponentials runs in
    lane position mod 16; values accumulate over ascending position; one division at the end.
    """
    k, v = keys.astype(np.float32), values.astype(np.float32)
    score = np.zeros(k.shape[0], np.float32)
    for i in range(q.shape[0]):
        score = score + q[i] * k[:, i]
    score = score * scale
    _check_finite(score)
    e = exp(score - score.max())
    out = np.zeros(q.shape[0], np.float32)
    for p in range(v.shape[0]):
        out = out + e[p] * v[p]
    return out / sum_lanes(e)


def swiglu(gate: F32, up: F32) -> F32:
    """(gate / (1 + exp(-gate))) * up."""
    return (gate / (_f(1.0) + exp(-gate))) * up


def add(x: F32, y: F32) -> F32:
    """x + y."""
    return x + y


def logit_stats(logits: F32, inv_temperature: float) -> F32:
    """(chunks, 2): per 256 logits the maximum and the sum of exp((x - max) * inv_temperature)."""
    _check_finite(logits)
    out = np.empty((-(-logits.shape[0] // LOGIT_CHUNK), 2), np.float32)
    for c in range(out.shape[0]):
        x = logits[c * LOGIT_CHUNK : (c + 1) * LOGIT_CHUNK]
        top = x.max()
        out[c] = top + _f(0.0), sum_lanes(exp((x - top) * _f(inv_temperature)))
    return out


def top_k(logits: F32, k: int) -> tuple[npt.NDArray[np.uint32], F32]:
    """The k largest by logit descending, then index ascending; fewer when there are fewer."""
    order = np.lexsort((np.arange(logits.shape[0]), -logits))[:k]
    return order.astype(np.uint32), logits[order]


# --- bulk operations on elements --------------------------------------------------

NAN = np.array(0x7FC00000, np.uint32).view(np.float32)


def widen(element: Element, x: Elements) -> F32:
    """Elements of 16 bits as the floats that they are; others as they are."""
    if element is Element.F16:
        return x.astype(np.float32)
    if element is Element.BF16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x


def narrow(element: Element, x: F32) -> Elements:
    """Floats rounded to nearest even, with the one NaN there is."""
    x = np.where(np.isnan(x), NAN, x).astype(np.float32)
    if element is Element.F16:
        return x.astype(np.float16)
    if element is Element.BF16:
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x


def _order(x: F32) -> I32:
    """Integers that are ordered as the floats are, -0 below +0."""
    bits = x.view(np.int32)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def reduce(element: Element, how: Reduction, into: Elements, operand: Elements) -> Elements:
    """`into` folded with `operand`, element by element: a sum rounded once (integers wrap), the
    larger, or the smaller; NaN where one of them is."""
    a, b = widen(element, into), widen(element, operand)
    if element is Element.I32:
        if how is Reduction.SUM:
            return (a.view(np.uint32) + b.view(np.uint32)).view(np.int32)
        return np.maximum(a, b) if how is Reduction.MAX else np.minimum(a, b)
    if how is Reduction.SUM:
        return narrow(element, a + b)
    larger = _order(a) > _order(b)
    chosen = np.where(larger if how is Reduction.MAX else ~larger, a, b).astype(np.float32)
    return narrow(element, np.where(np.isnan(a) | np.isnan(b), NAN, chosen))


def divide(element: Element, x: Elements, by: int) -> Elements:
    """x / by, rounded once; integers towards zero."""
    if element is Element.I32:
        wide = x.astype(np.int64)
        quotient: I32 = (np.sign(wide) * (np.abs(wide) // by)).astype(np.int32)
        return quotient
    return narrow(element, widen(element, x) / _f(by))
