# SPDX-License-Identifier: Apache-2.0
"""The native kernels on numpy arrays: the functions of reference.py, computed by one ISA.

This is the way in for tests, audits and tools; the cards run the same kernels from C.  Every
array's shape, dtype and strides are checked here, because the kernels check nothing, and every
call runs in the floating-point environment that the results are defined for.  A refused argument
is a CardCommandError; a value that the kernels refuse is the same error as in reference.py.

Rows of an array may lie any distance apart, but the elements of a row are contiguous.  Where a
function takes `out`, it writes exactly the rows of `out` and returns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from spanker.errors import CardCommandError
from spanker.kernels import reference
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.formats import Format, pack, packed_bytes, row_bytes
from spanker.kernels.reference import BLOCK, F32, LOGIT_CHUNK, Q8_BLOCK_BYTES, U8
from spanker.native import check, ffi, isa_number, lib

Array = npt.NDArray[Any]
U32 = npt.NDArray[np.uint32]

TILE_ROWS = int(lib.SPK_TILE_ROWS)
Q8_GROUP = int(lib.SPK_Q8_GROUP)
# One expanded block of activations (struct spk_q8_block).
Q8_EXPANDED = np.dtype(
    [
        ("qs", np.int8, BLOCK),
        ("d", np.float32),
        ("sum", np.float32),
        ("minus_sum", np.int32),
        ("minus_first", np.int32),
    ]
)
assert ffi.sizeof("struct spk_q8_block") == Q8_EXPANDED.itemsize


@contextmanager
def _fp_environment() -> Iterator[None]:
    """Round to nearest, no flush to zero, in this thread."""
    saved = lib.spk_fp_enter()
    try:
        yield
    finally:
        lib.spk_fp_leave(saved)


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC32C (RFC 3720) of contiguous bytes, going on from `crc`."""
    view = memoryview(data)
    if not view.nbytes:
        return crc
    return int(lib.spk_crc32c(crc, ffi.from_buffer("uint8_t[]", view), view.nbytes))


def copy_crc32c(to: bytearray, data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """The same of bytes that are copied to `to` on the way."""
    view = memoryview(data)
    if len(to) < view.nbytes:
        raise CardCommandError(f"copying {view.nbytes} bytes into {len(to)}")
    if not view.nbytes:
        return crc
    target, source = ffi.from_buffer("uint8_t[]", to), ffi.from_buffer("uint8_t[]", view)
    return int(lib.spk_copy_crc32c(crc, target, source, view.nbytes))


def exp_f32(x: npt.ArrayLike) -> F32:
    """The kernels' exp of finite float32 values, the same bits on every machine."""
    return reference.exp(np.asarray(x, np.float32))


def exp(x: float) -> float:
    """The kernels' exp of one float32."""
    with _fp_environment():
        return float(lib.spk_exp(x))


def f16_from_f32(x: float) -> int:
    """The 16 bits of a float32 rounded to f16, ties to even; beyond the range, infinity."""
    with _fp_environment():
        return int(lib.spk_f16_from_f32(x))


def f32_from_f16(bits: int) -> float:
    """The value of an f16 given by its bits."""
    with _fp_environment():
        return float(lib.spk_f32_from_f16(bits))


def fold_stats(total: float, stats: memoryview, top: float, inv_temperature: float) -> float:
    """`total` plus, chunk by chunk in float64, exp((max - top) * inv_temperature) times the sum of
    the (max, sum) float32 pairs that `logit_stats` made."""
    pairs = ffi.from_buffer("float[]", stats)
    return float(lib.spk_fold_stats(total, pairs, len(pairs) // 2, top, inv_temperature))


@attrs.frozen(eq=False)
class KvPool:
    """KV pages of one layer: uint16 (kv_heads, 2, pages, page_positions * head_dim), f16 bits.

    For each head its keys, page after page, then its values.  A page of keys is tiles of 16
    positions ([position/16][head_dim][16]), a page of values [position][head_dim].
    """

    words: npt.NDArray[np.uint16]
    page_positions: int
    head_dim: int

    @classmethod
    def zeros(cls, pages: int, kv_heads: int, page_positions: int, head_dim: int) -> KvPool:
        """An empty pool.  Pages hold a multiple of 16 positions."""
        words = np.zeros((kv_heads, 2, pages, page_positions * head_dim), np.uint16)
        return cls(words, page_positions, head_dim)

    @property
    def kv_heads(self) -> int:
        return int(self.words.shape[0])

    @property
    def pages(self) -> int:
        return int(self.words.shape[2])

    def __attrs_post_init__(self) -> None:
        if (
            self.words.ndim != 4
            or self.words.dtype != np.uint16
            or not self.words.flags.c_contiguous
            or self.page_positions <= 0
            or self.page_positions % 16
            or self.head_dim <= 0
            or self.words.shape[1] != 2
            or self.words.shape[3] != self.page_positions * self.head_dim
        ):
            raise CardCommandError(
                f"a KV pool is contiguous uint16 (heads, 2, pages, 16n positions * head size): "
                f"got {self.words.dtype} {self.words.shape} for {self.page_positions} positions "
                f"and head size {self.head_dim}"
            )

    def struct(self) -> Any:
        """The C view of this pool; it does not keep the array alive."""
        return ffi.new(
            "struct spk_kv *",
            {
                "pool": ffi.cast("uint16_t *", self.words.ctypes.data),
                "pages": self.pages,
                "page_positions": self.page_positions,
                "kv_heads": self.kv_heads,
                "head_dim": self.head_dim,
            },
        )


def _check(status: int, what: str) -> None:
    if status == lib.SPK_E_NONFINITE:
        raise reference.NonFiniteError(f"{what}: a NaN or an infinity entered or left the kernel")
    if status == lib.SPK_E_F16_RANGE:
        raise reference.F16RangeError(f"{what}: a scale, key or value does not fit into f16")
    check(status, what)


def _pointer(kind: str, array: Array) -> Any:
    return ffi.cast(kind, array.ctypes.data)


def _rows(what: str, x: Array, dtype: type[np.generic], shape: tuple[int, int]) -> int:
    """The row stride of x in elements, once x is known to have this shape and dtype."""
    size = np.dtype(dtype).itemsize
    fits = x.ndim == 2 and x.shape == shape and x.dtype == dtype
    if fits and x.size:
        fits = (shape[1] == 1 or x.strides[1] == size) and (
            shape[0] == 1 or (x.strides[0] >= shape[1] * size and x.strides[0] % size == 0)
        )
    if not fits:
        raise CardCommandError(
            f"{what}: needs {np.dtype(dtype)} {shape} with contiguous rows, "
            f"got {x.dtype} {x.shape} with strides {x.strides}"
        )
    return x.strides[0] // size if shape[0] > 1 and shape[1] else shape[1]


def _vector(what: str, x: Array, dtype: type[np.generic], length: int) -> None:
    _rows(what, x[None, :] if x.ndim == 1 else x, dtype, (1, length))


def _width(what: str, x: Array) -> tuple[int, int]:
    if x.ndim != 2:
        raise CardCommandError(f"{what}: needs a row per token, got an array of shape {x.shape}")
    return x.shape[0], x.shape[1]


def _format(name: str) -> Format:
    try:
        return Format[name.upper()]
    except KeyError:
        known = ", ".join(f.name.lower() for f in Format)
        raise CardCommandError(f"unknown weight format {name!r}: expected {known}") from None


class NativeKernels:
    """The kernels of one instruction set; ConfigError when this machine cannot run it."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self._k = lib.spk_kernels_get(isa_number(isa))

    # --- activations ----------------------------------------------------------------------

    def quantize_q8(self, x: F32, out: U8 | None = None) -> U8:
        """(T, k) floats to (T, k/32 * 34) bytes.  Raises NonFiniteError, F16RangeError."""
        tokens, k = _width("quantize_q8", x)
        if k % BLOCK:
            raise CardCommandError(f"quantize_q8: {k} values do not fill whole blocks of {BLOCK}")
        shape = (tokens, k // BLOCK * Q8_BLOCK_BYTES)
        out = np.empty(shape, np.uint8) if out is None else out
        strides = (
            _rows("quantize_q8 x", x, np.float32, (tokens, k)),
            _rows("quantize_q8 out", out, np.uint8, shape),
        )
        with _fp_environment():
            status = self._k.quantize_q8(
                _pointer("float *", x),
                strides[0],
                _pointer("uint8_t *", out),
                strides[1],
                k,
                tokens,
            )
        _check(status, "quantize_q8")
        return out

    def expand_q8(self, blocks: U8) -> Array:
        """Q8 rows (T, k/32*34) to what the matmuls read: `Q8_EXPANDED` records (T * k/32,), tokens
        in groups of 4, within a group block after block, within a block token after token."""
        tokens, nbytes = _width("expand_q8", blocks)
        if nbytes % Q8_BLOCK_BYTES:
            raise CardCommandError(
                f"expand_q8: {nbytes} bytes do not fill whole blocks of {Q8_BLOCK_BYTES} bytes"
            )
        stride = _rows("expand_q8", blocks, np.uint8, (tokens, nbytes))
        n = nbytes // Q8_BLOCK_BYTES
        out = np.empty(tokens * n, Q8_EXPANDED)
        with _fp_environment():
            self._k.expand_q8(
                _pointer("uint8_t *", blocks),
                stride,
                _pointer("struct spk_q8_block *", out),
                n * BLOCK,
                tokens,
            )
        return out

    # --- weights --------------------------------------------------------------------------

    def dequantize_row(self, name: str, rows: U8, k: int) -> F32:
        """GGML rows (R, row_bytes) to floats (R, k)."""
        fmt = _format(name)
        count, _ = _width("dequantize_row", rows)
        stride = _rows("dequantize_row", rows, np.uint8, (count, row_bytes(fmt, k)))
        out = np.empty((count, k), np.float32)
        with _fp_environment():
            for r in range(count):
                status = self._k.dequantize_row(
                    fmt,
                    ffi.cast("uint8_t *", rows.ctypes.data + r * stride),
                    ffi.cast("float *", out.ctypes.data + r * k * 4),
                    k,
                )
                _check(status, "dequantize_row")
        return out

    def matmul(self, name: str, weights: U8, x: Array, out: F32 | None = None) -> F32:
        """(T, rows) = x times the GGML rows `weights` (rows, row_bytes), which are packed first.

        x is Q8 blocks (T, k/32*34) for quantised weights, floats (T, k) for f16, bf16, f32.
        """
        fmt, width = _format(name), _width("matmul x", x)[1]
        k = width if fmt.is_float else width // Q8_BLOCK_BYTES * BLOCK
        packed = pack(fmt, weights, k)
        return self.matmul_packed(name, packed, weights.shape[0], x, out=out)

    def matmul_packed(
        self,
        name: str,
        packed: U8,
        rows: int,
        x: Array,
        *,
        tiles: tuple[int, int] | None = None,
        out: F32 | None = None,
    ) -> F32:
        """The same over weights in the tiled layout (spanker.kernels.formats.pack).

        Only the rows of tiles [begin, end) are written; a new `out` is zero elsewhere.
        """
        fmt = _format(name)
        tokens, width = _width("matmul x", x)
        tile_count = -(-rows // TILE_ROWS)
        begin, end = (0, tile_count) if tiles is None else tiles
        if not 0 <= begin <= end <= tile_count:
            raise CardCommandError(
                f"matmul: tiles {begin} to {end} of {tile_count} tiles ({rows} rows)"
            )
        out = np.zeros((tokens, rows), np.float32) if out is None else out
        out_stride = _rows("matmul out", out, np.float32, (tokens, rows))
        k = width if fmt.is_float else width // Q8_BLOCK_BYTES * BLOCK
        _vector("matmul weights", packed, np.uint8, packed_bytes(fmt, rows, k))
        w, o = _pointer("uint8_t *", packed), _pointer("float *", out)
        if fmt.is_float:
            x_stride = _rows("matmul x", x, np.float32, (tokens, k))
            run = self._k.matmul_f32[fmt]
            with _fp_environment():
                xp = _pointer("float *", x)
                run(w, xp, x_stride, o, out_stride, rows, k, tokens, begin, end)
            return out
        expanded = self.expand_q8(x)
        q8 = ffi.new(
            "struct spk_q8 *",
            {"block": _pointer("struct spk_q8_block *", expanded), "blocks": k // BLOCK},
        )
        run = self._k.matmul_q8[fmt]
        with _fp_environment():
            run(w, q8, o, out_stride, rows, tokens, begin, end)
        return out

    # --- everything between the matmuls ---------------------------------------------------

    def rmsnorm(self, x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
        """(T, n): (x / sqrt(mean of squares + eps)) * weight.  Raises NonFiniteError."""
        tokens, n = _width("rmsnorm", x)
        out = np.empty((tokens, n), np.float32) if out is None else out
        x_stride = _rows("rmsnorm x", x, np.float32, (tokens, n))
        out_stride = _rows("rmsnorm out", out, np.float32, (tokens, n))
        _vector("rmsnorm weight", weight, np.float32, n)
        with _fp_environment():
            status = self._k.rmsnorm(
                _pointer("float *", x),
                x_stride,
                _pointer("float *", weight),
                _pointer("float *", out),
                out_stride,
                n,
                tokens,
                eps,
            )
        _check(status, "rmsnorm")
        return out

    def rope(
        self, x: F32, table: F32, positions: U32, rope_dim: int, out: F32 | None = None
    ) -> F32:
        """Rotate pairs (2i, 2i+1) of x (T, heads, head_dim); table (positions, rope_dim/2, 2).

        `out` is (T, heads * head_dim).
        """
        if x.ndim != 3 or rope_dim % 2 or not 0 <= rope_dim <= x.shape[2]:
            raise CardCommandError(
                f"rope: needs (tokens, heads, head size) and an even part of the head, "
                f"got {x.shape} and {rope_dim}"
            )
        tokens, heads, dim = x.shape
        if table.ndim != 3 or table.shape[1:] != (rope_dim // 2, 2):
            raise CardCommandError(
                f"rope: needs a table (positions, {rope_dim // 2}, 2), got {table.shape}"
            )
        if not table.flags.c_contiguous or table.dtype != np.float32 or x.dtype != np.float32:
            raise CardCommandError("rope: needs float32 values and a contiguous float32 table")
        _vector("rope positions", positions, np.uint32, tokens)
        if positions.size and positions.max() >= table.shape[0]:
            raise CardCommandError(
                f"rope: position {positions.max()} is beyond a table of {table.shape[0]}"
            )
        result = np.empty((tokens, heads * dim), np.float32) if out is None else out
        stride = _rows("rope out", result, np.float32, (tokens, heads * dim))
        result[...] = x.reshape(tokens, heads * dim)
        with _fp_environment():
            self._k.rope(
                _pointer("float *", result),
                stride,
                heads,
                dim,
                rope_dim,
                _pointer("float *", table),
                _pointer("uint32_t *", positions),
                tokens,
            )
        return result.reshape(tokens, heads, dim) if out is None else out

    def kv_append(self, kv: KvPool, page: int, position_in_page: int, k: F32, v: F32) -> None:
        """Store one token's keys and values (kv_heads, head_dim) as f16.  Raises F16RangeError."""
        shape = (kv.kv_heads, kv.head_dim)
        for what, x in (("keys", k), ("values", v)):
            if x.shape != shape or x.dtype != np.float32 or not x.flags.c_contiguous:
                raise CardCommandError(
                    f"kv_append: needs contiguous float32 {what} {shape}, got {x.dtype} {x.shape}"
                )
        if not (0 <= page < kv.pages and 0 <= position_in_page < kv.page_positions):
            raise CardCommandError(
                f"kv_append: page {page}, position {position_in_page} is outside of a pool of "
                f"{kv.pages} pages of {kv.page_positions} positions"
            )
        with _fp_environment():
            status = self._k.kv_append(
                kv.struct(), page, position_in_page, _pointer("float *", k), _pointer("float *", v)
            )
        _check(status, "kv_append")

    def attention(
        self,
        kv: KvPool,
        pages: Sequence[int],
        kv_head: int,
        q: F32,
        visible: Sequence[int],
        scale: float,
        out: F32 | None = None,
    ) -> F32:
        """Queries (n, head_dim) against the first visible[i] positions of one KV head.

        `pages` are the page numbers of the sequence, in order of position.  Raises
        NonFiniteError.
        """
        n, dim = _width("attention", q)
        q_stride = _rows("attention q", q, np.float32, (n, kv.head_dim))
        out = np.empty((n, dim), np.float32) if out is None else out
        out_stride = _rows("attention out", out, np.float32, (n, dim))
        page_numbers = np.array(pages, np.uint32)
        most = len(page_numbers) * kv.page_positions
        if len(visible) != n or any(not 1 <= v <= most for v in visible):
            raise CardCommandError(
                f"attention: {n} queries each see 1 to {most} positions, got {tuple(visible)}"
            )
        if not 0 <= kv_head < kv.kv_heads or (page_numbers.size and page_numbers.max() >= kv.pages):
            raise CardCommandError(
                f"attention: KV head {kv_head} or pages {tuple(pages)} are outside of a pool of "
                f"{kv.kv_heads} heads and {kv.pages} pages"
            )
        seen = np.array(visible, np.uint32)
        longest = max((int(v) for v in visible), default=0)
        rows = int(lib.SPK_ATTENTION_ROWS)
        scratch = np.empty(rows * (-(-longest // 16) * 16 + kv.head_dim), np.float32)
        query_pointers = ffi.new("float *[]", n)
        out_pointers = ffi.new("float *[]", n)
        for i in range(n):
            query_pointers[i] = ffi.cast("float *", q.ctypes.data + i * q_stride * 4)
            out_pointers[i] = ffi.cast("float *", out.ctypes.data + i * out_stride * 4)
        argument = ffi.new(
            "struct spk_attention *",
            {
                "kv": kv.struct()[0],
                "pages": _pointer("uint32_t *", page_numbers),
                "kv_head": kv_head,
                "queries": n,
                "q": ffi.cast("float *const *", query_pointers),
                "out": out_pointers,
                "visible": _pointer("uint32_t *", seen),
                "scale": scale,
                "scratch": _pointer("float *", scratch),
            },
        )
        with _fp_environment():
            status = self._k.attention(argument)
        _check(status, "attention")
        return out

    def swiglu(self, gate: F32, up: F32, out: F32 | None = None) -> F32:
        """(T, n): (gate / (1 + exp(-gate))) * up."""
        shape = _width("swiglu", gate)
        out = np.empty(shape, np.float32) if out is None else out
        strides = [_rows("swiglu", a, np.float32, shape) for a in (gate, up, out)]
        with _fp_environment():
            self._k.swiglu(
                _pointer("float *", gate),
                strides[0],
                _pointer("float *", up),
                strides[1],
                _pointer("float *", out),
                strides[2],
                shape[1],
                shape[0],
            )
        return out

    def add(self, x: F32, y: F32, out: F32 | None = None) -> F32:
        """(T, n): x + y."""
        shape = _width("add", x)
        out = np.empty(shape, np.float32) if out is None else out
        _rows("add x", x, np.float32, shape)
        strides = [_rows("add", a, np.float32, shape) for a in (out, y)]
        out[...] = x
        with _fp_environment():
            self._k.add(
                _pointer("float *", out),
                strides[0],
                _pointer("float *", y),
                strides[1],
                shape[1],
                shape[0],
            )
        return out

    def logit_stats(self, logits: F32, inv_temperature: float) -> F32:
        """(chunks, 2): per 256 logits the maximum and the sum of exp((x - max) * inv_temperature).

        Raises NonFiniteError.
        """
        n = logits.shape[0]
        _vector("logit_stats", logits, np.float32, n)
        out = np.empty((-(-n // LOGIT_CHUNK), 2), np.float32)
        with _fp_environment():
            status = self._k.logit_stats(
                _pointer("float *", logits), n, inv_temperature, _pointer("float *", out)
            )
        _check(status, "logit_stats")
        return out

    def top_k(self, logits: F32, k: int) -> tuple[U32, F32]:
        """The k largest by logit descending, then index ascending; fewer when there are fewer."""
        n = logits.shape[0]
        _vector("top_k", logits, np.float32, n)
        if k < 0:
            raise CardCommandError(f"top_k: cannot take {k} candidates")
        size = min(k, n)
        ids, values = np.empty(size, np.uint32), np.empty(size, np.float32)
        with _fp_environment():
            held = self._k.top_k(
                _pointer("float *", logits),
                n,
                k,
                _pointer("uint32_t *", ids),
                _pointer("float *", values),
            )
        return ids[:held], values[:held]

    # --- bulk operations on elements ------------------------------------------------------

    def reduce(self, element: Element, how: Reduction, into: Array, operand: Array) -> Array:
        """Fold `operand` into `into`, both contiguous (n,) of the element's dtype."""
        _vector("reduce into", into, element.dtype.type, into.size)
        _vector("reduce operand", operand, element.dtype.type, into.size)
        with _fp_environment():
            self._k.reduce(
                element, how, _pointer("void *", into), _pointer("void *", operand), into.size
            )
        return into

    def divide(self, element: Element, into: Array, by: int) -> Array:
        """Divide `into` (n,) by a count."""
        _vector("divide", into, element.dtype.type, into.size)
        if not 1 <= by <= 65536:
            raise CardCommandError(f"divide: expected 1 to 65536, got {by}")
        with _fp_environment():
            self._k.divide(element, _pointer("void *", into), by, into.size)
        return into
