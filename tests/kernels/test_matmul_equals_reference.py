# SPDX-License-Identifier: Apache-2.0
"""Every instruction set multiplies exactly as reference.py does."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import (
    FLOATS,
    FORMATS,
    QUANTISED,
    SCALES_AT,
    Guarded,
    activations,
    assert_same_bits,
    depths,
    f16_bytes,
    floats,
    ggml_rows,
    q8_rows,
    seed_of,
    set_scales,
    six_bits,
    strided,
    weights,
)

from spanker.kernels import reference
from spanker.kernels.formats import Format, pack, row_bytes
from spanker.kernels.native import NativeKernels

ROWS = (0, 1, 15, 16, 17, 33)
FLOAT_DEPTHS = (0, 1, 7, 33)


def cases() -> list[tuple[str, int, int]]:
    """Odd numbers of blocks too: the tiled layout joins them in pairs."""
    return [
        (name, rows, k)
        for name in FORMATS
        for rows in ROWS
        for k in depths(name, 1, 2, 3) + (FLOAT_DEPTHS if name in FLOATS else ())
    ] + [(name, 17, k) for name in FORMATS for k in depths(name, 5)]


@pytest.mark.parametrize(("name", "rows", "k"), cases())
def test_matmul_equals_reference(kernels: NativeKernels, name: str, rows: int, k: int) -> None:
    case = ("matmul", name, rows, k)
    rng = np.random.default_rng(seed_of(*case))
    w, x = weights(rng, name, rows, k), activations(rng, name, 33, k)
    expected = reference.matmul(name, w, x)
    packed = pack(Format[name.upper()], w, k)
    for tokens in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33):
        out = Guarded((tokens, rows), np.float32)
        kernels.matmul_packed(name, packed, rows, strided(x[:tokens]), out=out.rows)
        assert_same_bits(out.rows, expected[:tokens], *case)
        out.assert_intact()


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_of_tokens_gives_the_same_rows(kernels: NativeKernels, name: str) -> None:
    case = ("tokens", name)
    rng = np.random.default_rng(seed_of(*case))
    (k,) = depths(name, 2)
    w, x = weights(rng, name, 17, k), activations(rng, name, 33, k)
    expected = reference.matmul(name, w, x)
    for tokens in range(1, 34):
        assert_same_bits(kernels.matmul(name, w, x[:tokens]), expected[:tokens], *case)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tiles", [(0, 0), (0, 1), (1, 3), (2, 3), (1, 2), (0, 3)])
@pytest.mark.parametrize("tokens", [6, 27])
def test_a_range_of_tiles_writes_its_rows_only(
    kernels: NativeKernels, name: str, tiles: tuple[int, int], tokens: int
) -> None:
    case = ("tiles", name, tokens)
    rng = np.random.default_rng(seed_of(*case))
    rows = 41
    (k,) = depths(name, 3)
    w, x = weights(rng, name, rows, k), activations(rng, name, tokens, k)
    expected = reference.matmul(name, w, x)
    out = Guarded((tokens, rows), np.float32)
    packed = pack(Format[name.upper()], w, k)
    kernels.matmul_packed(name, packed, rows, x, tiles=tiles, out=out.rows)
    begin, end = tiles[0] * 16, min(tiles[1] * 16, rows)
    assert_same_bits(out.rows[:, begin:end], expected[:, begin:end], *case)
    out.assert_intact(slice(begin, end))


def q8_of(integers: np.ndarray, scale: float) -> np.ndarray:
    """Q8 rows of these int8 (T, k) with one scale."""
    tokens, k = integers.shape
    out = np.empty((tokens, k // 32, 34), np.uint8)
    out[..., :2] = np.full((tokens, k // 32, 1), scale, np.float16).view(np.uint8)
    out[..., 2:] = integers.astype(np.int8).reshape(tokens, k // 32, 32).view(np.uint8)
    return out.reshape(tokens, -1)


def six_bits_of_byte(byte: int) -> tuple[list[int], list[int]]:
    """The scales and minima of twelve such bytes."""
    upper = byte >> 6 << 4
    return [byte & 63] * 4 + [upper + (byte & 15)] * 4, [byte & 63] * 4 + [upper + (byte >> 4)] * 4


def terms_by_hand(name: str, byte: int, activation: int) -> list[int]:
    """What is added to a sum, one after the other, by a block (a super-block) all of whose bytes
    are this one, but for a scale of 1 and a minimum of -1, and whose activations are all alike."""
    low, high, signed = byte & 15, byte >> 4, byte - 256 * (byte > 127)
    fifth = [16 * (byte >> i & 1) for i in range(8)]
    dot = {
        "q4_0": 16 * (low + high - 16),
        "q4_1": 16 * (low + high),
        "q5_0": 16 * (low + high - 32) + 4 * sum(fifth),
        "q5_1": 16 * (low + high) + 4 * sum(fifth),
        "q8_0": 32 * signed,
    }
    if name in dot:
        terms = [dot[name]] + ([-32] if len(SCALES_AT[name]) == 2 else [])
    elif name == "q6_k":
        lower = [low, low, high, high] * 2
        upper = [16 * (byte >> 2 * (j % 4) & 3) for j in range(8)]
        terms = [signed * 32 * (a + b - 32) for a, b in zip(lower, upper, strict=True)]
    else:
        terms = []
        for j, (scale, minimum) in enumerate(zip(*six_bits_of_byte(byte), strict=True)):
            q = [low, high][j % 2] + (fifth[j] if name == "q5_k" else 0)
            terms += [32 * scale * q, 32 * minimum]
    return [activation * term for term in terms]


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0x81, 0xFF, 0xF0, 0x0F, 0x88, 0x3F, 0xC5])
@pytest.mark.parametrize("activation", [127, -127, 0, 1])
def test_the_largest_integers_do_not_overflow(
    kernels: NativeKernels, name: str, byte: int, activation: int
) -> None:
    (k,) = depths(name, 3)
    w = np.full((17, row_bytes(Format[name.upper()], k)), byte, np.uint8)
    set_scales(name, w, 1.0, -1.0)
    x = q8_of(np.full((5, k), activation), 1.0)
    got = kernels.matmul(name, w, x)
    assert_same_bits(got, reference.matmul(name, w, x), name, byte, activation)
    # By hand, so that the reference cannot share the mistake: all blocks are alike.
    total = np.float32(0)
    for term in terms_by_hand(name, byte, activation) * 3:
        total = total + np.float32(term)
    assert (got == total).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_the_largest_sums_of_both_signs(kernels: NativeKernels, name: str) -> None:
    """Weights and activations at their limits with signs at random, scales of blocks included."""
    case = ("limits", name)
    rng = np.random.default_rng(seed_of(*case))
    (k,) = depths(name, 3)
    for low, high in ((0x00, 0xFF), (0x80, 0x7F), (0xF0, 0x0F)):
        w = rng.choice(np.array([low, high], np.uint8), (33, row_bytes(Format[name.upper()], k)))
        set_scales(name, w, 1.0, -1.0)
        x = q8_of(rng.choice([-127, 127], (9, k)), 1.0)
        assert_same_bits(kernels.matmul(name, w, x), reference.matmul(name, w, x), *case)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("scales", ["subnormal", "largest", "zero", "smallest"])
@pytest.mark.parametrize("x_scale", [2.0**-24, 2.0**-14 - 2.0**-24, 65504.0, 0.0])
def test_extreme_scales(kernels: NativeKernels, name: str, scales: str, x_scale: float) -> None:
    case = ("scales", name, scales, x_scale)
    rng = np.random.default_rng(seed_of(*case))
    (k,) = depths(name, 2)
    w = weights(rng, name, 17, k)
    bits = {
        "subnormal": rng.integers(1, 0x400, (2, 17, 2), dtype=np.uint16),
        "largest": np.full((2, 17, 2), 0xFBFF, np.uint16),
        "zero": np.full((2, 17, 2), 0x8000, np.uint16),
        "smallest": np.full((2, 17, 2), 1, np.uint16),
    }[scales]
    set_scales(name, w, *bits.view(np.float16))
    x = q8_of(rng.integers(-127, 128, (3, k)), x_scale)
    assert_same_bits(kernels.matmul(name, w, x), reference.matmul(name, w, x), *case)


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_every_six_bit_scale_and_minimum_at_every_place(kernels: NativeKernels, name: str) -> None:
    """Row v has scale v, v + 9, ... and minimum 63 - v, 68 - v, ... (mod 64)."""
    rng = np.random.default_rng(seed_of("six bits", name))
    row, place = np.arange(64)[:, None], np.arange(8)
    scale, minimum = (row + 9 * place) % 64, (63 - row + 5 * place) % 64
    q = rng.integers(0, 16 if name == "q4_k" else 32, (64, 8, 32))
    d, dmin, small = f16_bytes(0.5, (64, 1)), f16_bytes(-0.25, (64, 1)), six_bits(scale, minimum)
    w = ggml_rows(name, q, d, dmin, small=small[:, None])
    values = 0.5 * scale[..., None] * q + 0.25 * minimum[..., None]
    assert_values_are_multiplied(kernels, name, w, values.reshape(64, 256))


def test_every_scale_of_q6_k_at_every_place(kernels: NativeKernels) -> None:
    """Row v has scales v, v + 16, ... (mod 256)."""
    rng = np.random.default_rng(seed_of("eight bits"))
    small = ((np.arange(256)[:, None] + 16 * np.arange(16)) % 256).astype(np.uint8)
    q = rng.integers(0, 64, (256, 8, 32))
    w = ggml_rows("q6_k", q, f16_bytes(0.5, (256, 1)), small=small[:, None])
    scale = np.repeat(small.view(np.int8).astype(int), 16, axis=1)
    assert_values_are_multiplied(kernels, "q6_k", w, 0.5 * scale * (q.reshape(256, 256) - 32))


def assert_values_are_multiplied(
    kernels: NativeKernels, name: str, w: np.ndarray, values: np.ndarray
) -> None:
    """Activations so small that no sum of halves is rounded: the order does not matter."""
    xq = np.random.default_rng(seed_of(name)).integers(-15, 16, (5, 256))
    assert np.abs(2 * values).max() * 15 * 256 < 2**24
    exact = (2.0 * xq) @ values.T
    assert_same_bits(kernels.matmul(name, w, q8_of(xq, 2.0)), exact.astype(np.float32), name)
    assert_same_bits(kernels.dequantize_row(name, w, 256), values.astype(np.float32), name)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", ["zeros", "subnormal", "one_huge", "mixed"])
def test_extreme_float_activations(kernels: NativeKernels, name: str, kind: str) -> None:
    case = ("float", name, kind)
    rng = np.random.default_rng(seed_of(*case))
    w, x = weights(rng, name, 17, 33), floats(rng, (6, 33), kind)
    assert_same_bits(kernels.matmul(name, w, x), reference.matmul(name, w, x), *case)


def test_products_are_rounded_before_they_are_added(kernels: NativeKernels) -> None:
    """A fused multiply-add would keep the 2**-24 of (1 + 2**-12)**2 and give another sum."""
    a = np.float32(1 + 2**-12)
    w = np.array([[1.0, a]], np.float32).view(np.uint8)
    x = np.array([[-1.0, a]], np.float32)
    assert kernels.matmul("f32", w, x)[0, 0] == np.float32(2**-11)


def test_float_sums_run_in_ascending_k(kernels: NativeKernels) -> None:
    """1 + 2**-24 + 2**-24 is 1 from the left and 1 + 2**-23 from the right."""
    w = np.array([[1.0, 2**-24, 2**-24]] * 3, np.float32).view(np.uint8)
    x = np.ones((5, 3), np.float32)
    assert (kernels.matmul("f32", w, x) == 1.0).all()


def test_a_deep_matmul(kernels: NativeKernels) -> None:
    case = ("deep",)
    rng = np.random.default_rng(seed_of(*case))
    for name in QUANTISED:
        w, x = weights(rng, name, 17, 4096), q8_rows(rng, 9, 4096)
        assert_same_bits(kernels.matmul(name, w, x), reference.matmul(name, w, x), *case)
