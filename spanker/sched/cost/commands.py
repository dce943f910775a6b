# SPDX-License-Identifier: Apache-2.0
"""The table of docs/api/timing-model.md: bytes and work of each command, by its rows.

A command is (bytes, work, what the work runs at); `t` are the rows it works on, tokens or outputs.
Nothing here knows of cards or of what a model consists of.
"""

from __future__ import annotations

from typing import Final

from spanker.sched.cost.rows import StepRows
from spanker.sched.layout import chunks, q8_bytes
from spanker.sched.plan import TILE_ROWS, WeightShape

# What work runs at; places in `Pace.s_per_work`.
ELEMENTS: Final = 0
INT8: Final = 1
FLOAT: Final = 2

Command = tuple[float, float, int]


def embed(t: int, table: WeightShape, columns: int) -> Command:
    row = columns // table.columns_unit * table.unit_bytes
    return t * (row + 4 * columns), t * columns, ELEMENTS


def rmsnorm(t: int, n: int) -> Command:
    return t * n * 8 + (4 * n if t else 0), t * n, ELEMENTS


def quantize(t: int, k: int) -> Command:
    return t * (4 * k + q8_bytes(k)), t * k, ELEMENTS


def matmul(t: int, matrix: WeightShape, rows: int) -> Command:
    if not t:
        return 0, 0, ELEMENTS
    k = matrix.k
    tiled = -(-rows // TILE_ROWS) * TILE_ROWS
    x = q8_bytes(k) if matrix.quantized else 4 * k
    nbytes = tiled * matrix.row_bytes + t * (x + 4 * rows)
    return nbytes, tiled * k * t, INT8 if matrix.quantized else FLOAT


def rope(t: int, heads: int, dim: int) -> Command:
    return t * heads * dim * 8, t * heads * dim, ELEMENTS


def kv_append(t: int, kv_heads: int, dim: int) -> Command:
    return t * kv_heads * dim * 12, t * kv_heads * dim * 2, ELEMENTS


def attention(rows: StepRows, heads: int, kv_heads: int, dim: int) -> Command:
    # Of each position a group reads K and V in f16: 4 bytes for each element of K.
    nbytes = rows.group_positions * kv_heads * dim * 4 + rows.tokens * heads * dim * 8
    return nbytes, rows.pairs * 2 * dim * heads, FLOAT


def swiglu(t: int, n: int) -> Command:
    return t * n * 12, t * n, ELEMENTS


def add(t: int, n: int) -> Command:
    return t * n * 12, t * n, ELEMENTS


def select(t: int, n: int) -> Command:
    return t * n * 8, t * n, ELEMENTS


def logit_stats(t: int, n: int) -> Command:
    return t * n * 4 + t * chunks(n) * 8, t * n, ELEMENTS


def top_k(t: int, n: int, k: int) -> Command:
    return t * n * 4 + t * k * 8, t * n, ELEMENTS


def best(t: int) -> Command:
    return t * 16, t, ELEMENTS


def choose(t: int, lists: int) -> Command:
    return t * (8 * lists + 4), t * lists, ELEMENTS
