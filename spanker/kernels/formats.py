# SPDX-License-Identifier: Apache-2.0
"""Weight formats: sizes, and packing rows into the tiled layout of the cards.

The layout is stated in spanker/kernels/csrc/pack.c.
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
    Q8_0 = 8

    @property
    def is_float(self) -> bool:
        """Whether activations stay float32 in front of these weights (else they become Q8)."""
        return self in (Format.F32, Format.F16)

    @property
    def block(self) -> int:
        """Weights per quantisation block."""
        return 1 if self.is_float else int(lib.SPK_BLOCK)


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


def pack(fmt: Format, rows: npt.NDArray[np.uint8], k: int) -> npt.NDArray[np.uint8]:
    """GGML rows (rows, row_bytes), any row stride, to the tiled layout (packed_bytes,)."""
    if rows.ndim != 2 or rows.shape[1] != row_bytes(fmt, k) or (rows.size and rows.strides[1] != 1):
        raise CardCommandError(
            f"packing {fmt.name} with k={k} needs rows of {row_bytes(fmt, k)} contiguous bytes, "
            f"got an array of shape {rows.shape}"
        )
    out = np.empty(packed_bytes(fmt, rows.shape[0], k), np.uint8)
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
