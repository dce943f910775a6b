# SPDX-License-Identifier: Apache-2.0
"""Weight formats: sizes, and packing rows into the tiled layout of the cards.

The layout is stated in spanker/kernels/csrc/spk_tiles.h.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from spanker.errors import CardCommandError
from spanker.native import check, ffi, lib


class Format(enum.IntEnum):
    """Weight formats that the kernels multiply; the values are GGML's type numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def is_float(self) -> bool:
        """Whether activations stay float32 in front of these weights (else they become Q8)."""
        return self.block == 1

    @property
    def block(self) -> int:
        """Weights per quantisation block: 1, 32, or 256 (K-quants)."""
        return int(lib.spk_block_weights(self))


def row_bytes(fmt: Format, k: int) -> int:
    """Bytes of one row of k weights in GGML's layout; CardCommandError if k cuts a block."""
    size = int(lib.spk_row_bytes(fmt, k))
    if k and not size:
        raise CardCommandError(
            f"a row of {k} weights does not fill whole {fmt.name} blocks of {fmt.block}"
        )
    return size


def packed_bytes(fmt: Format, rows: int, k: int) -> int:
    """Bytes of rows x k weights as packed: rows are padded to a multiple of 16."""
    row_bytes(fmt, k)
    return int(lib.spk_packed_bytes(fmt, rows, k))


def pack(
    fmt: Format, rows: npt.NDArray[np.uint8], k: int, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """GGML rows (rows, row_bytes), any row stride, to the tiled layout (packed_bytes,).

    Written into `out` where that is given, a contiguous array of just this size.
    """
    if rows.ndim != 2 or rows.shape[1] != row_bytes(fmt, k) or (rows.size and rows.strides[1] != 1):
        raise CardCommandError(
            f"packing {fmt.name} with k={k} needs rows of {row_bytes(fmt, k)} contiguous bytes, "
            f"got an array of shape {rows.shape}"
        )
    size = packed_bytes(fmt, rows.shape[0], k)
    if out is None:
        out = np.empty(size, np.uint8)
    if out.shape != (size,) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise CardCommandError(
            f"packing {fmt.name} needs {size} contiguous bytes for its output, "
            f"got {out.dtype} {out.shape}"
        )
    status = lib.spk_pack(
        fmt,
        ffi.cast("uint8_t *", rows.ctypes.data),
        max(rows.strides[0], 0),
        ffi.cast("uint8_t *", out.ctypes.data),
        rows.shape[0],
        k,
    )
    check(status, f"packing {fmt.name}")
    return out
