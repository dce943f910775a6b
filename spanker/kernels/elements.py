# SPDX-License-Identifier: Apache-2.0
"""Kinds of elements that the bulk operations of a card (REDUCE, COPY, DIVIDE) work on."""

from __future__ import annotations

import enum

import numpy as np

from spanker.native import lib


class Element(enum.IntEnum):
    """A kind of element; the values are GGML's type numbers.  numpy has no bf16: its bits travel
    as uint16."""

    F32 = lib.SPK_F32
    F16 = lib.SPK_F16
    BF16 = lib.SPK_BF16
    I32 = lib.SPK_I32

    @property
    def nbytes(self) -> int:
        return int(lib.spk_element_bytes(self))

    @property
    def is_float(self) -> bool:
        return self is not Element.I32

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy dtype of arrays of it."""
        return _DTYPES[self]


_DTYPES: dict[Element, np.dtype[np.generic]] = {
    Element.F32: np.dtype(np.float32),
    Element.F16: np.dtype(np.float16),
    Element.BF16: np.dtype(np.uint16),
    Element.I32: np.dtype(np.int32),
}


class Reduction(enum.IntEnum):
    """How REDUCE folds two elements."""

    SUM = lib.SPK_REDUCE_SUM
    MAX = lib.SPK_REDUCE_MAX
    MIN = lib.SPK_REDUCE_MIN
