# SPDX-License-Identifier: Apache-2.0
"""The weight formats are GGML's: values and sizes are those of the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants
from kernel_cases import FORMATS, QUANTISED, assert_same_bits, floats, seed_of, strided, weights

from spanker.errors import CardCommandError
from spanker.kernels import reference
from spanker.kernels.formats import Format, pack, packed_bytes, row_bytes
from spanker.kernels.native import NativeKernels

GGML = {name: gguf.GGMLQuantizationType[name.upper()] for name in FORMATS}


def every_scale(name: str) -> np.ndarray:
    """One block per finite f16 scale, as rows of 32 blocks; integers and minima at random."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00]
    rng = np.random.default_rng(seed_of("every scale", name))
    rows = weights(rng, name, finite.size // 32, 32 * 32)
    blocks = rows.reshape(finite.size, row_bytes(Format[name.upper()], 32))
    blocks[:, :2] = finite[:, None].view(np.uint8)
    return rows


def every_byte(name: str) -> np.ndarray:
    """One row per byte value, all integers of the row being that byte."""
    head = 4 if name == "q4_1" else 2
    rows = np.empty((256, row_bytes(Format[name.upper()], 32)), np.uint8)
    rows[:, head:] = np.arange(256, dtype=np.uint8)[:, None]
    rows[:, :head] = np.array([0.37, -1.25], np.float16).view(np.uint8)[:head]
    return rows


def test_type_numbers_and_sizes_are_ggmls() -> None:
    for name in FORMATS:
        fmt = Format[name.upper()]
        assert fmt == GGML[name]
        block, size = gguf.GGML_QUANT_SIZES[GGML[name]]
        assert fmt.block == block
        assert row_bytes(fmt, 3 * block) == 3 * size


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("blocks", [every_scale, every_byte])
def test_quantised_values_are_those_of_gguf(
    kernels: NativeKernels, name: str, blocks: object
) -> None:
    rows = blocks(name)  # type: ignore[operator]
    k = rows.shape[1] // row_bytes(Format[name.upper()], 32) * 32
    expected = quants.dequantize(rows, GGML[name])
    assert_same_bits(reference.dequantize_row(name, rows), expected, name)
    assert_same_bits(kernels.dequantize_row(name, rows, k), expected, name)


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_float_values_are_those_of_gguf(kernels: NativeKernels, name: str) -> None:
    rows = weights(np.random.default_rng(seed_of("gguf", name)), name, 9, 50)
    expected = quants.dequantize(rows, GGML[name])
    assert_same_bits(reference.dequantize_row(name, rows), expected, name)
    assert_same_bits(kernels.dequantize_row(name, rows, 50), expected, name)


@pytest.mark.parametrize("name", QUANTISED)
def test_what_gguf_quantises_is_what_we_multiply(kernels: NativeKernels, name: str) -> None:
    """A one-hot activation of scale 1 reads one weight, so the matmul must give its value."""
    w = floats(np.random.default_rng(seed_of("one hot", name)), (17, 64))
    rows = quants.quantize(w, GGML[name])
    x = np.zeros((64, 64), np.float32)
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


def unpack(name: str, packed: np.ndarray, rows: int, k: int) -> np.ndarray:
    """The inverse of pack, written from the layout's description; padding must be zero."""
    tiles = -(-rows // 16)
    if name in ("f32", "f16"):
        size = 4 if name == "f32" else 2
        tiled = packed.reshape(tiles, k, 16, size).transpose(0, 2, 1, 3)
        out = tiled.reshape(tiles * 16, k * size)
    else:
        blocks, words = k // 32, 8 if name == "q8_0" else 4
        tile = packed.reshape(tiles, -1)
        ints_end = blocks * words * 64
        ints = tile[:, :ints_end].reshape(tiles, blocks, words, 16, 4).transpose(0, 3, 1, 2, 4)
        parts = [ints.reshape(tiles * 16, blocks, words * 4)]
        for s in range((tile.shape[1] - ints_end) // (blocks * 32)):
            at = ints_end + s * blocks * 32
            scales = tile[:, at : at + blocks * 32].reshape(tiles, blocks, 16, 2)
            parts.insert(s, scales.transpose(0, 2, 1, 3).reshape(tiles * 16, blocks, 2))
        out = np.concatenate(parts, axis=-1).reshape(tiles * 16, -1)
    assert not out[rows:].any(), "rows of padding are not zero"
    return np.ascontiguousarray(out[:rows])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("k", [32, 96, 160])
def test_packing_only_moves_bytes(name: str, rows: int, k: int) -> None:
    fmt = Format[name.upper()]
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
    with pytest.raises(CardCommandError, match=r"33 weights.*blocks of 32"):
        row_bytes(Format[name.upper()], 33)


def test_packing_refuses_rows_of_another_size() -> None:
    with pytest.raises(CardCommandError, match=r"Q4_1 with k=64 needs rows of 40"):
        pack(Format.Q4_1, np.zeros((4, 36), np.uint8), 64)
