# SPDX-License-Identifier: Apache-2.0
"""Every instruction set multiplies exactly as reference.py does."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import (
    FORMATS,
    QUANTISED,
    Guarded,
    activations,
    assert_same_bits,
    floats,
    q8_rows,
    seed_of,
    strided,
    weights,
)

from spanker.kernels import reference
from spanker.kernels.formats import Format, pack
from spanker.kernels.native import NativeKernels

ROWS = (0, 1, 15, 16, 17, 33)
DEPTHS = (32, 64, 96, 160)
FLOAT_DEPTHS = (0, 1, 7, 33)


def cases() -> list[tuple[str, int, int]]:
    return [
        (name, rows, k)
        for name in FORMATS
        for rows in ROWS
        for k in (DEPTHS if name in QUANTISED else DEPTHS + FLOAT_DEPTHS)
    ]


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
    w, x = weights(rng, name, 17, 64), activations(rng, name, 33, 64)
    expected = reference.matmul(name, w, x)
    for tokens in range(1, 34):
        assert_same_bits(kernels.matmul(name, w, x[:tokens]), expected[:tokens], *case)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tiles", [(0, 0), (0, 1), (1, 3), (2, 3), (1, 2), (0, 3)])
def test_a_range_of_tiles_writes_its_rows_only(
    kernels: NativeKernels, name: str, tiles: tuple[int, int]
) -> None:
    case = ("tiles", name)
    rng = np.random.default_rng(seed_of(*case))
    rows, k, tokens = 41, 96, 6
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


def extreme_weights(name: str, byte: int, scale: float, minimum: float, k: int) -> np.ndarray:
    size = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[name]
    out = np.full((17, k // 32, size), byte, np.uint8)
    out[..., :2] = np.full((17, k // 32, 1), scale, np.float16).view(np.uint8)
    if name == "q4_1":
        out[..., 2:4] = np.full((17, k // 32, 1), minimum, np.float16).view(np.uint8)
    return out.reshape(17, -1)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0x81, 0xFF, 0xF0, 0x0F, 0x88])
@pytest.mark.parametrize("activation", [127, -127, 0, 1])
def test_the_largest_integers_do_not_overflow(
    kernels: NativeKernels, name: str, byte: int, activation: int
) -> None:
    k = 96
    w = extreme_weights(name, byte, 1.0, -1.0, k)
    x = q8_of(np.full((5, k), activation), 1.0)
    got = kernels.matmul(name, w, x)
    assert_same_bits(got, reference.matmul(name, w, x), name, byte, activation)
    # By hand, so that the reference cannot share the mistake: all blocks are alike.
    low = {"q4_0": (byte & 15) - 8, "q4_1": byte & 15, "q8_0": byte - 256 * (byte > 127)}[name]
    high = {"q4_0": (byte >> 4) - 8, "q4_1": byte >> 4, "q8_0": low}[name]
    offset = -1 if name == "q4_1" else 0
    total = k // 32 * 16 * activation * (low + high + 2 * offset)
    assert (got == np.float32(total)).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("scales", ["subnormal", "largest", "zero", "smallest"])
@pytest.mark.parametrize("x_scale", [2.0**-24, 2.0**-14 - 2.0**-24, 65504.0, 0.0])
def test_extreme_scales(kernels: NativeKernels, name: str, scales: str, x_scale: float) -> None:
    case = ("scales", name, scales, x_scale)
    rng = np.random.default_rng(seed_of(*case))
    w = weights(rng, name, 17, 64)
    bits = {
        "subnormal": rng.integers(1, 0x400, (17, 2, 2), dtype=np.uint16),
        "largest": np.full((17, 2, 2), 0xFBFF, np.uint16),
        "zero": np.full((17, 2, 2), 0x8000, np.uint16),
        "smallest": np.full((17, 2, 2), 1, np.uint16),
    }[scales]
    count = 4 if name == "q4_1" else 2
    w.reshape(17, 2, -1)[..., :count] = bits.view(np.uint8)[..., :count]
    x = q8_of(rng.integers(-127, 128, (3, 64)), x_scale)
    assert_same_bits(kernels.matmul(name, w, x), reference.matmul(name, w, x), *case)


@pytest.mark.parametrize("name", ["f32", "f16"])
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
