# SPDX-License-Identifier: Apache-2.0
"""The definition of every kernel, as plain numpy that is slow, obvious and exact.

Each native kernel must equal the function of its name here, bit for bit.  Only operations that
IEEE 754 defines exactly are used: + - * / sqrt, comparisons, conversions, integer arithmetic;
numpy's own reductions and transcendental functions are not, because their order and accuracy
differ between machines.  docs/api/kernel-semantics.md says the same in words.

Arrays are float32 unless a shape comment says otherwise; T is tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spanker.errors import CardFaultError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]

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


def expand_q8(blocks: U8) -> tuple[I8, F32, npt.NDArray[np.int32]]:
    """Q8 blocks (T, blocks*34) to integers (T, blocks, 32), scales and integer sums (T, blocks)."""
    n = blocks.shape[1] // Q8_BLOCK_BYTES
    b = np.ascontiguousarray(blocks).reshape(blocks.shape[0], n, Q8_BLOCK_BYTES)
    d = np.ascontiguousarray(b[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    q = np.ascontiguousarray(b[..., 2:]).view(np.int8)
    return q, d, q.sum(axis=-1, dtype=np.int32)


# --- weights ------------------------------------------------------------------


def split_blocks(name: str, rows: U8) -> tuple[npt.NDArray[np.int32], F32, F32 | None]:
    """GGML rows (R, row_bytes) to integers (R, blocks, 32), scales and minima (R, blocks).

    The integers are what the matmul multiplies: q4_0 minus 8, q4_1 and q8_0 as stored.
    Layouts: ggml/src/ggml-common.h.
    """
    size = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[name]
    b = np.ascontiguousarray(rows).reshape(rows.shape[0], rows.shape[1] // size, size)
    d = np.ascontiguousarray(b[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    if name == "q8_0":
        return np.ascontiguousarray(b[..., 2:]).view(np.int8).astype(np.int32), d, None
    nibbles = b[..., 4 if name == "q4_1" else 2 :].astype(np.int32)
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    if name == "q4_0":
        return q - 8, d, None
    m = np.ascontiguousarray(b[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
    return q, d, m


def dequantize_row(name: str, rows: U8) -> F32:
    """GGML rows (R, row_bytes) to floats (R, k): d*q, then + m where the format has minima."""
    rows = np.ascontiguousarray(rows)
    if name == "f32":
        return rows.view(np.float32)
    if name == "f16":
        return rows.view(np.float16).astype(np.float32)
    q, d, m = split_blocks(name, rows)
    out = d[..., None] * q.astype(np.float32)
    if m is not None:
        out = out + m[..., None]
    return out.reshape(rows.shape[0], q.shape[1] * BLOCK)


def matmul(name: str, weights: U8, x: npt.NDArray[np.generic]) -> F32:
    """(T, rows) = x times the GGML rows `weights` (rows, row_bytes).

    x is Q8 blocks (T, k/32*34) for quantised weights, floats (T, k) for f16 and f32.
    Per element, blocks in ascending k: acc = acc + (dw*dx) * float(idot), and with minima then
    acc = acc + (m*dx) * float(sum of the block's activation integers).
    """
    if name in ("f32", "f16"):
        w, xf = dequantize_row(name, weights), x.astype(np.float32)
        acc = np.zeros((xf.shape[0], w.shape[0]), np.float32)
        for i in range(w.shape[1]):
            acc = acc + w[None, :, i] * xf[:, i, None]
        return acc
    q, d, m = split_blocks(name, weights)
    xq, dx, xsum = expand_q8(x.astype(np.uint8, copy=False))
    acc = np.zeros((xq.shape[0], q.shape[0]), np.float32)
    for b in range(q.shape[1]):
        idot = xq[:, b, :].astype(np.int32) @ q[:, b, :].T
        acc = acc + (d[None, :, b] * dx[:, b, None]) * idot.astype(np.float32)
        if m is not None:
            acc = acc + (m[None, :, b] * dx[:, b, None]) * xsum[:, b, None].astype(np.float32)
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
