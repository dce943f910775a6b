# SPDX-License-Identifier: Apache-2.0
"""Writing GGML's block formats, with the `gguf` package as the oracle."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants

from spanker.ggml.gguf import BLOCK_SIZES, GGMLType
from spanker.testing.quantize import ENCODED, encode

SEED = 4711
NAMES = [kind.name for kind in ENCODED]
QUANTISED = [kind.name for kind in ENCODED if kind.block_weights > 1]
# Of standard normal values.  Uniform rounding over the range of the extremes of a sub-block gives
# step / sqrt(12); the figures leave some 5 % of room, so half a bit lost anywhere is seen.
RMS_ERROR_MAX = {
    "F32": 0.0,
    "F16": 2.2e-4,
    "BF16": 1.8e-3,
    "Q8_0": 5.7e-3,
    "Q6_K": 1.98e-2,
    "Q5_0": 4.5e-2,
    "Q5_1": 4.0e-2,
    "Q5_K": 4.0e-2,
    "Q4_0": 9.0e-2,
    "Q4_1": 8.2e-2,
    "Q4_K": 8.2e-2,
}


def normal(*shape: int, seed: int = SEED) -> np.ndarray:
    print("seed", seed)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def decode(name: str, data: bytes, rows: int) -> np.ndarray:
    return quants.dequantize(np.frombuffer(data, np.uint8).reshape(rows, -1), oracle(name))


def round_trip(name: str, values: np.ndarray) -> np.ndarray:
    return decode(name, encode(values, GGMLType[name]), len(values))


def test_the_reader_knows_every_format_and_its_block_size():
    for name in NAMES:
        kind = GGMLType[name]
        assert kind == oracle(name)
        assert BLOCK_SIZES[kind] == gguf.GGML_QUANT_SIZES[oracle(name)]
        assert len(encode(np.zeros((3, 512), np.float32), kind)) == (
            3 * 512 // kind.block_weights * kind.block_bytes
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**7])
def test_the_error_is_that_of_the_format(name: str, scale: float):
    values = normal(40, 2048) * np.float32(scale)
    error = round_trip(name, values) - values
    assert np.sqrt(np.mean(error**2)) <= RMS_ERROR_MAX[name] * scale
    # No drift: a wrong zero point would show here first.
    assert abs(np.mean(error)) <= 0.05 * RMS_ERROR_MAX[name] * scale


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_goes_to_its_own_place(name: str):
    """One large value in a row of zeros, at each position of a row in turn, is found there."""
    width = 512
    values = np.zeros((width, width), np.float32)
    np.fill_diagonal(values, np.where(np.arange(width) % 3, 1.0, -1.0))
    back = round_trip(name, values)
    assert (np.abs(back).argmax(1) == np.arange(width)).all()
    assert np.allclose(back, values, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_chunks_do_not_mix(name: str):
    """Many more weights than are worked on at once, in rows that differ in scale."""
    values = normal(600, 512) * np.exp2(np.arange(600) % 9 - 4).astype(np.float32)[:, None]
    whole = encode(values, GGMLType[name])
    assert whole == b"".join(encode(row, GGMLType[name]) for row in values)


@pytest.mark.parametrize("name", QUANTISED)
def test_representable_values_come_back_exactly(name: str):
    values = representable(name, 64)
    assert np.array_equal(round_trip(name, values), values)


def representable(name: str, rows: int) -> np.ndarray:
    """Values with all integers of the format, whose scales follow from the extremes.

    Each sub-block reaches both ends of its range, and one of each block has the largest scale and
    minimum; scales are powers of two, so nothing is rounded on the way.
    """
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    size = 16 if name == "Q6_K" else 32
    most = {"4": 15, "5": 31, "6": 63, "8": 254}[name[1]]
    parts = rng.integers(0, most + 1, (rows, 512 // size, size)).astype(np.float32)
    parts[..., 3], parts[..., -2] = 0, most
    if name == "Q8_0":
        parts -= 127
    elif name.endswith("_0") or name == "Q6_K":
        parts -= (most + 1) // 2
    scale = np.exp2(rng.integers(-6, 7, (rows, 512 // size, 1))).astype(np.float32)
    block, super_scale = 256 // size, scale
    if name.endswith("_K"):
        limit = 127 if name == "Q6_K" else 63
        super_scale = np.repeat(scale[:, ::block], block, axis=1)
        steps = rng.integers(1, limit + 1, (rows, 512 // size, 1)).astype(np.float32)
        steps[:, ::block] = -128 if name == "Q6_K" else 63
        scale = super_scale * steps
    values = parts * scale
    if name.endswith("_1"):
        values += np.float32(-0.25) * scale
    if name in ("Q4_K", "Q5_K"):
        minima = rng.integers(0, 64, (rows, 512 // size, 1)).astype(np.float32)
        minima[:, 1::block] = 63
        # At most 63/8 steps of the finest sub-block: every range has 0 in it, as the format wants.
        values -= minima * super_scale / 8
    return values.reshape(rows, 512)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_signs_of_whole_blocks(name: str):
    width = 512
    values = np.zeros((5, width), np.float32)
    values[1], values[2] = 3.0, -3.0
    values[3], values[4] = 2.0 + normal(width) / 8, -2.0 + normal(width) / 8
    back = round_trip(name, values)
    assert not back[0].any()
    assert np.allclose(back[1:3], values[1:3], rtol=4e-3)
    assert (back[3] > 0).all() and (back[4] < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_large_and_tiny_values_keep_their_relative_error(name: str):
    for scale in (2.0**13, 2.0**-9):
        values = normal(8, 512) * np.float32(scale)
        error = round_trip(name, values) - values
        # Scales this small are among f16's subnormal numbers: a K-quant divides them once more.
        assert np.sqrt(np.mean(error**2)) <= 1.3 * RMS_ERROR_MAX[name] * scale


@pytest.mark.parametrize("name", QUANTISED)
def test_scales_that_vanish_in_f16_give_zeros(name: str):
    values = np.full((2, 512), 1e-9, np.float32)
    values[:, ::2] = -1e-9
    back = round_trip(name, values)
    assert not back.any()
    plain = encode(np.zeros((2, 512), np.float32), GGMLType[name])
    assert np.array_equal(decode(name, plain, 2), back)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("F32", "BF16")])
@pytest.mark.parametrize("bad", [3e9, -3e9, np.inf, -np.inf, np.nan])
def test_what_f16_cannot_hold_is_refused(name: str, bad: float):
    values = normal(2, 512)
    values[1, 77] = bad
    with pytest.raises(ValueError, match="does not fit into f16: scale the weights down"):
        encode(values, GGMLType[name])


def test_bfloat16_is_ggufs_for_every_upper_half_and_around_ties():
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper[:, None] | lower).view(np.float32)
    ours = np.frombuffer(encode(values, GGMLType.BF16), np.uint16)
    with np.errstate(over="ignore"):
        theirs = quants.quantize(values, oracle("BF16")).view(np.uint16).reshape(-1)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_plain_formats_equal_ggufs_own(name: str):
    values = normal(200, 512) * np.exp2(np.arange(200) % 15 - 7).astype(np.float32)[:, None]
    # Two equal extremes of different sign: the first one counts.
    values[0, :32] = np.tile([1.0, -1.0], 16)
    values[1, :32] = np.tile([-1.0, 1.0], 16)
    # Ties: with the extreme -8 (or -16) the scale is 1.
    values[2, :32] = np.arange(32) / 2 - 8
    values[3, :32] = np.arange(32) / 2 - 16
    ours = np.frombuffer(encode(values, GGMLType[name]), np.uint8)
    assert np.array_equal(ours, quants.quantize(values, oracle(name)).reshape(-1))


def test_q8_0_equals_ggufs_own_away_from_ties():
    """gguf rounds ties away from zero like GGML's plain C, this module to even like its SIMD."""
    values = normal(200, 512).reshape(-1, 32)
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    scaled = values * (np.float32(1) / scale)
    keep = (np.abs(scaled - np.trunc(scaled)) != 0.5).all(1)
    assert keep.sum() > 3000
    ours = np.frombuffer(encode(values[keep], GGMLType.Q8_0), np.uint8)
    assert np.array_equal(ours, quants.quantize(values[keep], oracle("Q8_0")).reshape(-1))


@pytest.mark.parametrize(("name", "width"), [("Q4_0", 33), ("Q5_1", 16), ("Q4_K", 288)])
def test_rows_that_cut_a_block_are_refused(name: str, width: int):
    with pytest.raises(ValueError, match=rf"{name} needs rows of whole blocks.*\(2, {width}\)"):
        encode(np.zeros((2, width), np.float32), GGMLType[name])


def test_formats_without_a_writer_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no writer for Q2_K: expected F32, .*Q6_K"):
        encode(np.zeros((1, 256), np.float32), GGMLType.Q2_K)


def test_strided_and_one_dimensional_values_are_taken_as_they_stand():
    values = normal(6, 1024)
    assert encode(values[::2, :512], GGMLType.Q4_K) == encode(
        values[::2, :512].copy(), GGMLType.Q4_K
    )
    assert encode(values[0], GGMLType.Q6_K) == encode(values[:1], GGMLType.Q6_K)
