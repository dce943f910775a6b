# SPDX-License-Identifier: Apache-2.0
"""Xpop_matmul 0.1 in numpy, written from docs/api/xpop-matmul.md: what its models are held to.

Memory is one uint8 array, addresses are offsets into it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

OPCODE = 0b0001011
TYPES = ("u4", "s4", "s8")
FORMATS = ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k")
CAUSE_ILLEGAL, CAUSE_LOAD_MISALIGNED, CAUSE_STORE_MISALIGNED = 2, 4, 6


class Insn(NamedTuple):
    """A defined encoding: `pop.dot` of a type, or `pop.step` of a format."""

    kind: str
    run: int
    tokens: int

    @property
    def step(self) -> bool:
        return self.kind in FORMATS

    @property
    def blocks(self) -> int:
        """Blocks of 32 weights that it multiplies."""
        return self.run * (8 if self.kind in ("q4_k", "q6_k") else 1)

    @property
    def tile_bytes(self) -> int:
        blocks = {"u4": 256, "s4": 256, "s8": 512, "q4_0": 288, "q4_1": 320, "q8_0": 544}
        return {**blocks, "q4_k": 2304, "q6_k": 3360}[self.kind] * self.run


def decode(funct7: int, funct3: int) -> Insn | None:
    """None where it is reserved."""
    kind, run, tokens = funct7 >> 4, (funct7 >> 3 & 1) + 1, (funct7 >> 1 & 3) + 1
    if funct7 & 1 or funct3 > 1 or kind >= len(FORMATS if funct3 else TYPES):
        return None
    if run == 2 and (funct3 == 0 or FORMATS[kind] == "q4_k"):
        return None
    return Insn((FORMATS if funct3 else TYPES)[kind], run, tokens)


DEFINED = [(f3, f7) for f3 in range(8) for f7 in range(128) if decode(f7, f3)]


def misaligned(rs1: int, rs2: int, rd: int) -> tuple[int, int] | None:
    """(cause, address) of the exception that these addresses raise, if they do."""
    for cause, address, align in (
        (CAUSE_LOAD_MISALIGNED, rs1, 16),
        (CAUSE_LOAD_MISALIGNED, rs2, 16),
        (CAUSE_STORE_MISALIGNED, rd, 256),
    ):
        if address % align:
            return cause, address
    return None


def _bytes_of_rows(a: U8) -> Array:
    """(16, k): the bytes e(0, r, k) of words of four, one a row."""
    return a.reshape(-1, 16, 4).transpose(1, 0, 2).reshape(16, -1)


def _nibbles(a: U8) -> Array:
    """(16, 32): n(0, r, k)."""
    rows = _bytes_of_rows(a)
    return np.concatenate([rows & 15, rows >> 4], axis=1).astype(np.int64)


def _upper(a: U8) -> Array:
    """(16, 32): v(0, r, k)."""
    halves = a.reshape(2, 16, 4)  # [h][r][j mod 4]
    v = np.empty((16, 2, 4, 4), np.int64)  # [r][h][g][j mod 4]
    for g in range(4):
        v[:, :, g] = (halves >> 2 * g & 3).transpose(1, 0, 2)
    return v.reshape(16, 32)


def _f16(a: U8) -> Array:
    return a.view(np.float16).astype(np.float32)


def _six_bits(words: Array, b: int) -> tuple[Array, Array]:
    """s and n of block b, from (3, 16) words."""
    w0, w1, w2 = words.astype(np.int64)
    if b < 4:
        return w0 >> 8 * b & 63, w1 >> 8 * b & 63
    c = b - 4
    upper0, upper1 = w0 >> 8 * c + 6 & 3, w1 >> 8 * c + 6 & 3
    return 16 * upper0 + (w2 >> 8 * c & 15), 16 * upper1 + (w2 >> 8 * c + 4 & 15)


def _block(insn: Insn, tile: U8, b: int) -> tuple[Array, Array, Array | None, Array | None]:
    """Of block b: w (16, 32), d, m and the two scales (2, 16), where there are any."""
    run, kind = insn.run, insn.kind
    if kind == "q4_0":
        at = 32 * run + 256 * b
        return _nibbles(tile[at : at + 256]) - 8, _f16(tile[32 * b : 32 * b + 32]), None, None
    if kind == "q4_1":
        at, m = 64 * run + 256 * b, 32 * run + 32 * b
        w = _nibbles(tile[at : at + 256])
        return w, _f16(tile[32 * b : 32 * b + 32]), _f16(tile[m : m + 32]), None
    if kind == "q8_0":
        at = 32 * run + 512 * b
        w = _bytes_of_rows(tile[at : at + 512].view(np.int8)).astype(np.int64)
        return w, _f16(tile[32 * b : 32 * b + 32]), None, None
    if kind == "q4_k":
        s, n = _six_bits(tile[64:256].view(np.uint32).reshape(3, 16), b)
        at = 256 + 256 * b
        d = _f16(tile[0:32]) * s.astype(np.float32)
        m = _f16(tile[32:64]) * n.astype(np.float32)
        return _nibbles(tile[at : at + 256]), d, m, None
    q, u = 32 * run + 416 * b, b // 8
    w = _nibbles(tile[q + 32 : q + 288]) + 16 * _upper(tile[q + 288 : q + 416]) - 32
    scales = tile[q : q + 32].view(np.int8).reshape(2, 16).astype(np.int64)
    return w, _f16(tile[32 * u : 32 * u + 32]), None, scales


def execute(insn: Insn, memory: U8, rs1: int, rs2: int, rd: int) -> None:
    """Execute with these addresses, which are aligned."""
    tokens, blocks = insn.tokens, insn.blocks
    tile = memory[rs1 : rs1 + insn.tile_bytes].copy()
    x = memory[rs2 : rs2 + 48 * blocks * tokens].copy().reshape(blocks, tokens, 48)
    xq, dx = x[..., :32].view(np.int8).astype(np.int64), x[..., 32:36].copy().view(np.float32)
    results = memory[rd : rd + 64 * tokens]
    if not insn.step:
        if insn.kind == "s8":
            w = _bytes_of_rows(tile.view(np.int8)).astype(np.int64)
        else:
            w = _nibbles(tile) - (8 if insn.kind == "s4" else 0)
        results[:] = (xq[0] @ w.T).astype(np.int32).reshape(-1).view(np.uint8)
        return
    acc = results.copy().view(np.float32).reshape(tokens, 16)
    with np.errstate(all="ignore"):
        for b in range(blocks):
            w, d, m, scales = _block(insn, tile, b)
            if scales is None:
                idot = xq[b] @ w.T
            else:
                idot = scales[0] * (xq[b, :, :16] @ w[:, :16].T)
                idot = idot + scales[1] * (xq[b, :, 16:] @ w[:, 16:].T)
            acc = acc + (d * dx[b]) * idot.astype(np.float32)
            if m is not None:
                isum = xq[b].sum(axis=1, keepdims=True).astype(np.float32)
                term = (m * dx[b]) * isum
                acc = acc - term if insn.kind == "q4_k" else acc + term
    acc[np.isnan(acc)] = np.array(0x7FC00000, np.uint32).view(np.float32)
    results[:] = acc.reshape(-1).view(np.uint8)
