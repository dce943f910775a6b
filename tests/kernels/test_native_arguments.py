# SPDX-License-Identifier: Apache-2.0
"""The numpy face of the kernels refuses whatever would make C read or write outside an array."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from spanker.errors import CardCommandError, ConfigError, SpankerError
from spanker.kernels.native import KvPool, NativeKernels

K = NativeKernels("scalar")
POOL = KvPool.zeros(2, 1, 16, 8)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


REFUSED: dict[str, Callable[[], object]] = {
    "a single row where rows are needed": lambda: K.quantize_q8(f32(32)),
    "a block that is cut": lambda: K.quantize_q8(f32(2, 33)),
    "float64": lambda: K.quantize_q8(np.ones((2, 32))),
    "columns that are not contiguous": lambda: K.quantize_q8(f32(2, 64)[:, ::2]),
    "rows in reverse": lambda: K.quantize_q8(f32(2, 32)[::-1]),
    "rows that overlap": lambda: K.add(np.broadcast_to(f32(1, 4), (3, 4)), f32(3, 4)),
    "an output that is too narrow": lambda: K.quantize_q8(f32(2, 32), np.empty((2, 33), np.uint8)),
    "an output with too few rows": lambda: K.swiglu(f32(3, 8), f32(3, 8), f32(2, 8)),
    "an output of another dtype": lambda: K.add(f32(3, 8), f32(3, 8), np.empty((3, 8))),
    "operands of different widths": lambda: K.swiglu(f32(3, 8), f32(3, 9)),
    "Q8 rows that cut a block": lambda: K.expand_q8(np.zeros((1, 33), np.uint8)),
    "an unknown format": lambda: K.dequantize_row("q2_k", np.zeros((1, 84), np.uint8), 256),
    "a super-block that is cut": lambda: K.dequantize_row("q4_k", np.zeros((1, 72), np.uint8), 128),
    "activations that cut a super-block": lambda: K.matmul(
        "q6_k", np.zeros((1, 210), np.uint8), np.zeros((1, 7 * 34), np.uint8)
    ),
    "a row of another length": lambda: K.dequantize_row("q4_0", np.zeros((1, 18), np.uint8), 64),
    "weights for another k": lambda: K.matmul("f32", np.zeros((2, 12), np.uint8), f32(1, 4)),
    "packed weights that are too few": lambda: K.matmul_packed(
        "f32", np.zeros(16 * 4 * 4, np.uint8), 17, f32(1, 4)
    ),
    "tiles beyond the last": lambda: K.matmul_packed(
        "f32", np.zeros(16 * 4 * 4, np.uint8), 16, f32(1, 4), tiles=(0, 2)
    ),
    "tiles in reverse": lambda: K.matmul_packed(
        "f32", np.zeros(16 * 4 * 4, np.uint8), 16, f32(1, 4), tiles=(1, 0)
    ),
    "Q8 activations for float weights": lambda: K.matmul_packed(
        "f16", np.zeros(16 * 34 * 2, np.uint8), 16, np.zeros((1, 34), np.uint8)
    ),
    "Q8 activations for bf16 weights": lambda: K.matmul(
        "bf16", np.zeros((16, 68), np.uint8), np.zeros((1, 34), np.uint8)
    ),
    "floats for quantised weights": lambda: K.matmul_packed(
        "q4_0", np.zeros(16 * 18, np.uint8), 16, f32(1, 34)
    ),
    "a norm's weight of another width": lambda: K.rmsnorm(f32(2, 8), f32(7), 1e-5),
    "a position beyond the table": lambda: K.rope(
        f32(1, 1, 8), f32(4, 4, 2), np.array([4], np.uint32), 8
    ),
    "an odd rotation": lambda: K.rope(f32(1, 1, 8), f32(4, 3, 2), np.zeros(1, np.uint32), 7),
    "a rotation beyond the head": lambda: K.rope(
        f32(1, 1, 8), f32(4, 5, 2), np.zeros(1, np.uint32), 10
    ),
    "signed positions": lambda: K.rope(f32(1, 1, 8), f32(4, 4, 2), np.zeros(1, np.int64), 8),
    "a page beyond the pool": lambda: K.kv_append(POOL, 2, 0, f32(1, 8), f32(1, 8)),
    "a position beyond the page": lambda: K.kv_append(POOL, 0, 16, f32(1, 8), f32(1, 8)),
    "keys of another shape": lambda: K.kv_append(POOL, 0, 0, f32(1, 9), f32(1, 8)),
    "a query of another head size": lambda: K.attention(POOL, [0], 0, f32(1, 9), [1], 1.0),
    "positions beyond the pages": lambda: K.attention(POOL, [0], 0, f32(1, 8), [17], 1.0),
    "a query that sees nothing": lambda: K.attention(POOL, [0], 0, f32(1, 8), [0], 1.0),
    "fewer lengths than queries": lambda: K.attention(POOL, [0], 0, f32(2, 8), [1], 1.0),
    "a sequence's page beyond the pool": lambda: K.attention(POOL, [2], 0, f32(1, 8), [1], 1.0),
    "a KV head beyond the pool": lambda: K.attention(POOL, [0], 1, f32(1, 8), [1], 1.0),
    "a pool of uneven pages": lambda: KvPool.zeros(2, 1, 24, 8),
    "a pool of another size": lambda: KvPool(np.zeros((2, 1, 100), np.uint16), 16, 8),
    "strided logits": lambda: K.logit_stats(f32(64)[::2], 1.0),
    "a matrix of logits": lambda: K.top_k(f32(4, 4), 2),
    "fewer than no candidates": lambda: K.top_k(f32(4), -1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    with pytest.raises(CardCommandError) as caught:
        REFUSED[what]()
    assert "\n" not in str(caught.value)


def test_an_instruction_set_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("'mmx' is not available here")):
        NativeKernels("mmx")
    assert issubclass(ConfigError, SpankerError)
