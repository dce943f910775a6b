# SPDX-License-Identifier: Apache-2.0
"""Every instruction set quantises and expands activations exactly as reference.py does."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import Guarded, assert_same_bits, finite_f16, floats, seed_of, strided

from spanker.kernels import reference
from spanker.kernels.native import NativeKernels

KINDS = ("normal", "zeros", "subnormal", "mixed", "one_huge")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 32, 64, 96, 160, 576])
def test_quantize_equals_reference(kernels: NativeKernels, kind: str, k: int) -> None:
    case = ("quantize", kind, k)
    rng = np.random.default_rng(seed_of(*case))
    x = np.clip(floats(rng, (33, k), kind), -8.3e6, 8.3e6)  # what f16 scales hold
    expected = reference.quantize_q8(x)
    for tokens in (0, 1, 2, 17, 33):
        out = Guarded((tokens, k // 32 * 34), np.uint8)
        kernels.quantize_q8(strided(x[:tokens]), out=out.rows)
        assert_same_bits(out.rows, expected[:tokens], *case)
        out.assert_intact()


def test_every_scale_is_quantised_alike(kernels: NativeKernels) -> None:
    """amax over the whole range of f16 scales, each binary order and its neighbourhood."""
    case = ("scales",)
    rng = np.random.default_rng(seed_of(*case))
    shape = floats(rng, (1, 32))
    shape /= np.abs(shape).max()
    scales = finite_f16(rng, (4000,)).astype(np.float32)
    x = (shape * (scales[:, None] * np.float32(126.9))).astype(np.float32)
    assert_same_bits(kernels.quantize_q8(x), reference.quantize_q8(x), *case)


def test_a_scale_that_rounds_to_zero_makes_the_block_zero(kernels: NativeKernels) -> None:
    below = np.float32(127 * 2.0**-25)  # half of the smallest f16: ties to even, to zero
    x = np.full((1, 32), below, np.float32)
    assert not kernels.quantize_q8(x).any()
    x[0, 5] = np.nextafter(below, np.float32(1))
    block = kernels.quantize_q8(x)
    assert block[0, :2].view(np.uint16)[0] == 1 and block[0, 2 + 5] == 127
    assert_same_bits(block, reference.quantize_q8(x))


def test_ties_round_to_even(kernels: NativeKernels) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 127.0, 0.5, 1.5, 2.5, -0.5, -1.5  # scale 1
    got = kernels.quantize_q8(x)
    assert got[0, 2:8].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2]
    assert_same_bits(got, reference.quantize_q8(x))


def test_the_largest_scale_of_f16_fits_and_the_next_does_not(kernels: NativeKernels) -> None:
    x = np.zeros((3, 64), np.float32)
    largest = np.nextafter(np.float32(65520.0), np.float32(0)) * np.float32(127)
    while np.float32(largest / np.float32(127)) >= 65520:
        largest = np.nextafter(largest, np.float32(0))
    x[1, 40] = -largest
    assert_same_bits(kernels.quantize_q8(x), reference.quantize_q8(x))
    x[1, 40] = np.float32(65520.0) * np.float32(127)
    for quantize in (kernels.quantize_q8, reference.quantize_q8):
        with pytest.raises(reference.F16RangeError):
            quantize(x)


@pytest.mark.parametrize("extreme", [np.finfo(np.float32).max, -np.finfo(np.float32).max])
def test_the_largest_float_does_not_fit(kernels: NativeKernels, extreme: np.float32) -> None:
    x = np.ones((1, 32), np.float32)
    x[0, 31] = extreme
    for quantize in (kernels.quantize_q8, reference.quantize_q8):
        with pytest.raises(reference.F16RangeError):
            quantize(x)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 31, 32, 95])
@pytest.mark.parametrize("also_too_large", [None, 1, 94])
def test_a_value_that_is_not_finite_is_an_error(
    kernels: NativeKernels, bad: float, at: int, also_too_large: int | None
) -> None:
    """Whatever else is wrong in the row, before or after it."""
    x = np.ones((3, 96), np.float32)
    if also_too_large is not None:
        x[1, also_too_large] = 1e30
    x[1, at] = bad
    for quantize in (kernels.quantize_q8, reference.quantize_q8):
        with pytest.raises(reference.NonFiniteError):
            quantize(x)


# --- blocks as the matmuls read them ------------------------------------------------------


def regrouped(expanded: np.ndarray, tokens: int) -> np.ndarray:
    """Records as they lie to (tokens, blocks): groups of 4 tokens, the last may be smaller;
    within a group block after block, within a block token after token."""
    blocks = expanded.size // tokens if tokens else 0
    out = np.empty((tokens, blocks), expanded.dtype)
    at = 0
    for first in range(0, tokens, 4):
        group = range(first, min(first + 4, tokens))
        for b in range(blocks):
            for t in group:
                out[t, b] = expanded[at]
                at += 1
    assert at == expanded.size
    return out


def assert_expanded(got: np.ndarray, rows: np.ndarray, *case: object) -> None:
    q, d, total = reference.expand_q8(rows)
    assert got.size == d.size
    blocks = regrouped(got, rows.shape[0])
    first = q[..., :16].sum(axis=-1, dtype=np.int32)
    for field, expected in (
        ("qs", q),
        ("d", d),
        ("sum", total.astype(np.float32)),
        ("minus_sum", -total),
        ("minus_first", -first),
    ):
        assert_same_bits(blocks[field], expected.reshape(blocks[field].shape), field, *case)


@pytest.mark.parametrize("k", [0, 32, 64, 160])
def test_expand_equals_reference(kernels: NativeKernels, k: int) -> None:
    case = ("expand", k)
    rng = np.random.default_rng(seed_of(*case))
    blocks = rng.integers(0, 256, (17, k // 32, 34), dtype=np.uint8)
    blocks[..., :2] = finite_f16(rng, (17, k // 32, 1)).view(np.uint8)
    rows = blocks.reshape(17, k // 32 * 34)
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        assert_expanded(kernels.expand_q8(strided(rows[:tokens])), rows[:tokens], *case, tokens)


def test_expanded_sums_of_extremes(kernels: NativeKernels) -> None:
    rows = np.zeros((4, 34), np.uint8)
    rows[0, 2:] = 0x80
    rows[1, 2:] = 0x7F
    rows[2, 2:18] = 0x80
    rows[3, 18:] = 0x7F
    got = kernels.expand_q8(rows)
    assert got["sum"].tolist() == [-4096, 4064, -2048, 2032]
    assert got["minus_sum"].tolist() == [4096, -4064, 2048, -2032]
    assert got["minus_first"].tolist() == [2048, -2032, 2048, 0]
    assert_expanded(got, rows)
