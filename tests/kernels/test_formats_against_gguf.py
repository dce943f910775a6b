# SPDX-License-Identifier: Apache-2.0
"""The weight formats are GGML's: values and sizes are those of the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from gguf import quants
from kernel_cases import (
    FLOATS,
    FORMATS,
    ISAS,
    QUANTISED,
    SCALES_AT,
    assert_same_bits,
    depths,
    finite_f16,
    floats,
    ggml_rows,
    seed_of,
    set_scales,
    strided,
    weights,
)

from spanker.errors import CardCommandError
from spanker.kernels import reference
from spanker.kernels.formats import Format, pack, packed_bytes, row_bytes
from spanker.kernels.native import NativeKernels

GGML = {name: gguf.GGMLQuantizationType[name.upper()] for name in FORMATS}


def every_scale(name: str) -> np.ndarray:
    """One block per finite f16 scale, as rows of 32 blocks; integers and minima at random."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00].reshape(-1, 32)
    rng = np.random.default_rng(seed_of("every scale", name))
    rows = weights(rng, name, len(finite), *depths(name, 32))
    set_scales(name, rows, finite.view(np.float16))
    return rows


def every_minimum(name: str) -> np.ndarray:
    """The same of the minima, where there are any."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00].reshape(-1, 32)
    rng = np.random.default_rng(seed_of("every minimum", name))
    rows = weights(rng, name, len(finite), *depths(name, 32))
    set_scales(name, rows, finite_f16(rng, finite.shape), finite.view(np.float16))
    return rows


def every_byte(name: str) -> np.ndarray:
    """One row per byte value, every byte of the row but its f16 fields being that byte."""
    fmt = Format[name.upper()]
    rows = np.repeat(np.arange(256, dtype=np.uint8)[:, None], row_bytes(fmt, fmt.block), axis=1)
    set_scales(name, rows, 0.37, -1.25)
    return rows


def random_bytes(name: str) -> np.ndarray:
    return weights(np.random.default_rng(seed_of("bytes", name)), name, 100, *depths(name, 5))


def test_type_numbers_and_sizes_are_ggmls() -> None:
    for name in FORMATS:
        fmt = Format[name.upper()]
        assert fmt == GGML[name]
        block, size = gguf.GGML_QUANT_SIZES[GGML[name]]
        assert fmt.block == block
        assert row_bytes(fmt, 3 * block) == 3 * size
        assert fmt.is_float == (name in FLOATS)


CASES = [
    (name, blocks)
    for name in QUANTISED
    for blocks in (every_scale, every_minimum, every_byte, random_bytes)
    if blocks is not every_minimum or len(SCALES_AT[name]) == 2
]


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_quantised_values_are_those_of_gguf(name: str, blocks: Callable[[str], np.ndarray]) -> None:
    rows = blocks(name)
    expected = quants.dequantize(rows, GGML[name])
    assert_same_bits(reference.dequantize_row(name, rows), expected, name)
    for isa in ISAS:  # not a parameter, as the values of some cases take long to make
        got = NativeKernels(isa).dequantize_row(name, rows, expected.shape[1])
        assert_same_bits(got, expected, name, isa)


@pytest.mark.parametrize("name", FLOATS)
def test_float_values_are_those_of_gguf(kernels: NativeKernels, name: str) -> None:
    rows = weights(np.random.default_rng(seed_of("gguf", name)), name, 9, 50)
    expected = quants.dequantize(rows, GGML[name])
    assert_same_bits(reference.dequantize_row(name, rows), expected, name)
    assert_same_bits(kernels.dequantize_row(name, rows, 50), expected, name)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_product_with_one_1_is_a_weight_of_gguf(kernels: NativeKernels, name: str) -> None:
    """A one-hot activation of scale 1 reads one weight, so the matmul must give its value."""
    (k,) = depths(name, 2)
    rng = np.random.default_rng(seed_of("one hot", name))
    rows = weights(rng, name, 17, k)
    set_scales(name, rows, rng.uniform(0.01, 0.02, (17, 2)), rng.uniform(-0.3, 0.3, (17, 2)))
    x = np.zeros((k, k), np.float32)
    np.fill_diagonal(x, 127.0)  # scale 1, integer 127
    got = kernels.matmul(name, rows, kernels.quantize_q8(x)) / np.float32(127)
    expected = quants.dequantize(rows, GGML[name]).T
    assert np.allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_q8_agrees_with_gguf_away_from_ties(kernels: NativeKernels) -> None:
    """Two rules differ, both on purpose.

    GGML's C rounds ties away from zero, its SIMD code and Spanker to even: inputs with a tie are
    left out.  Where the scale rounds to 0 in f16, Spanker stores zeros (those integers would be
    multiplied by 0 anyway): such blocks are left out too.
    """
    rng = np.random.default_rng(seed_of("q8"))
    x = floats(rng, (200, 160)) * np.exp2(rng.integers(-12, 12, (200, 1))).astype(np.float32)
    scale = np.abs(x).reshape(200, 5, 32).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x.reshape(200, 5, 32) * (np.float32(1) / scale)
    tie = np.abs(scaled - np.trunc(scaled)) == 0.5
    keep = ~(tie | (scale.astype(np.float16) == 0)).any(axis=(1, 2))
    assert keep.sum() > 190
    expected = quants.quantize(x[keep], GGML["q8_0"])
    assert_same_bits(kernels.quantize_q8(x[keep]), expected)


def test_q8_differs_from_gguf_exactly_where_it_says(kernels: NativeKernels) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = 127.0, 0.5, 2.5
    ours, theirs = kernels.quantize_q8(x), quants.quantize(x, GGML["q8_0"])
    assert ours[0, 2:5].tolist() == [127, 0, 2]
    assert theirs[0, 2:5].tolist() == [127, 1, 3]
    tiny = np.full((1, 32), 1e-7, np.float32)
    assert not kernels.quantize_q8(tiny).any()
    assert quants.quantize(tiny, GGML["q8_0"])[0, 2:].tolist() == [127] * 32


# --- packing ------------------------------------------------------------------------------


class Tile:
    """A tile's stream of bytes, taken piece by piece; spk_tiles.h says in which order."""

    def __init__(self, stream: np.ndarray) -> None:
        self.left = stream

    def take(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        taken, self.left = self.left[:count], self.left[count:]
        return taken.reshape(shape)

    def words(self, count: int) -> np.ndarray:
        """Words [count][16 rows][4 bytes] as bytes of each row (16, 4 * count)."""
        return self.take(count, 16, 4).transpose(1, 0, 2).reshape(16, 4 * count)

    def nibbles(self) -> np.ndarray:
        """Four words as the low four bits of 32 weights (16, 32)."""
        qs = self.words(4)
        return np.concatenate([qs & 15, qs >> 4], axis=1)

    def fifth(self) -> np.ndarray:
        """fifth[8] u64 as a fifth bit for each of 32 weights (16, 32)."""
        bits = np.unpackbits(self.take(8, 8), axis=1, bitorder="little")
        return 16 * bits.reshape(8, 16, 4).transpose(1, 0, 2).reshape(16, 32)

    def upper(self) -> np.ndarray:
        """upper[2] words as the bits from the fifth of 32 weights (16, 32)."""
        out = np.empty((16, 2, 4, 4), np.uint8)  # [row][half][g][c]
        for half, words in enumerate(self.take(2, 16, 4)):
            for g in range(4):
                out[:, half, g] = words >> 2 * g & 3
        return 16 * out.reshape(16, 32)


def unpack_blocks(name: str, tile: Tile, blocks: int) -> np.ndarray:
    """q4_0, q4_1, q5_0, q5_1 and q8_0: runs of two blocks, an odd last one alone."""
    q, d, m = [], [], []
    for first in range(0, blocks, 2):
        n = min(2, blocks - first)
        d += list(tile.take(n, 16, 2))
        if name in ("q4_1", "q5_1"):
            m += list(tile.take(n, 16, 2))
        fifths = [tile.fifth() if name in ("q5_0", "q5_1") else 0 for _ in range(n)]
        q += [tile.words(8) if name == "q8_0" else tile.nibbles() + fifth for fifth in fifths]
    return ggml_rows(name, np.stack(q, axis=1), *(np.stack(s, axis=1) for s in (d, m) if s))


def unpack_k45(name: str, tile: Tile, supers: int) -> np.ndarray:
    q, d, m, small = [], [], [], []
    for _ in range(supers):
        d.append(tile.take(16, 2))
        m.append(tile.take(16, 2))
        small.append(tile.words(3))
        for _ in range(8):
            fifth = tile.fifth() if name == "q5_k" else 0
            q.append(tile.nibbles() + fifth)
    q, d, m, small = (np.stack(s, axis=1) for s in (q, d, m, small))
    return ggml_rows(name, q, d, m, small=small)


def unpack_k6(tile: Tile, supers: int) -> np.ndarray:
    """Runs of two super-blocks, an odd last one alone."""
    q, d, small = [], [], []
    for first in range(0, supers, 2):
        n = min(2, supers - first)
        d += list(tile.take(n, 16, 2))
        for _ in range(8 * n):
            small.append(tile.take(2, 16).T)
            q.append(tile.nibbles() + tile.upper())
    q, d, small = (np.stack(s, axis=1) for s in (q, d, small))
    return ggml_rows("q6_k", q, d, small=small.reshape(16, supers, 16))


def unpack_tile(name: str, tile: Tile, k: int) -> np.ndarray:
    """The 16 GGML rows of a tile."""
    fmt = Format[name.upper()]
    if fmt.is_float:
        size = row_bytes(fmt, 1)
        return tile.take(k, 16, size).transpose(1, 0, 2).reshape(16, k * size)
    if name == "q6_k":
        return unpack_k6(tile, k // 256)
    if name in ("q4_k", "q5_k"):
        return unpack_k45(name, tile, k // 256)
    return unpack_blocks(name, tile, k // 32)


def unpack(name: str, packed: np.ndarray, rows: int, k: int) -> np.ndarray:
    """The inverse of pack, written from the layout's description; padding must be zero."""
    tiles = [Tile(stream) for stream in packed.reshape(-(-rows // 16), -1)]
    out = np.concatenate([unpack_tile(name, tile, k) for tile in tiles])
    assert all(not tile.left.size for tile in tiles)
    assert not out[rows:].any(), "rows of padding are not zero"
    return out[:rows]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_packing_only_moves_bits(name: str, rows: int, blocks: int) -> None:
    fmt, (k,) = Format[name.upper()], depths(name, blocks)
    source = np.random.default_rng(seed_of("pack", name, rows, k)).integers(
        1, 256, (rows, row_bytes(fmt, k)), dtype=np.uint8
    )
    packed = pack(fmt, source, k)
    assert packed.size == packed_bytes(fmt, rows, k) == -(-rows // 16) * 16 * row_bytes(fmt, k)
    if rows:
        assert_same_bits(unpack(name, packed, rows, k), source)
    assert_same_bits(pack(fmt, strided(source, 11), k), packed)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_row_that_cuts_a_block_is_refused(name: str) -> None:
    fmt = Format[name.upper()]
    for k in (1, fmt.block - 1, fmt.block + 1, fmt.block * 3 // 2):
        with pytest.raises(CardCommandError, match=rf"{k} weights.*blocks of {fmt.block}"):
            row_bytes(fmt, k)


def test_packing_refuses_rows_of_another_size() -> None:
    with pytest.raises(CardCommandError, match=r"Q4_1 with k=64 needs rows of 40"):
        pack(Format.Q4_1, np.zeros((4, 36), np.uint8), 64)
    with pytest.raises(CardCommandError, match=r"Q5_K with k=512 needs rows of 352"):
        pack(Format.Q5_K, np.zeros((4, 176), np.uint8), 512)
