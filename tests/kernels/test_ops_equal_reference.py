# SPDX-License-Identifier: Apache-2.0
"""Norm, RoPE, SwiGLU, addition, exp and f16: every instruction set equals reference.py."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import (
    FORMATS,
    ISAS,
    Guarded,
    assert_same_bits,
    depths,
    floats,
    seed_of,
    strided,
    weights,
)

from spanker.kernels import native, reference
from spanker.kernels.native import NativeKernels

WIDTHS = (1, 7, 15, 16, 17, 31, 32, 33, 80, 576)
KINDS = ("normal", "zeros", "subnormal", "mixed", "one_huge")
TOKENS = (0, 1, 2, 5, 33)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_rmsnorm_equals_reference(kernels: NativeKernels, n: int, kind: str) -> None:
    case = ("rmsnorm", n, kind)
    rng = np.random.default_rng(seed_of(*case))
    x, w = floats(rng, (33, n), kind), floats(rng, (n,), "mixed")
    expected = reference.rmsnorm(x, w, 1e-5)
    for tokens in TOKENS:
        out = Guarded((tokens, n), np.float32)
        kernels.rmsnorm(strided(x[:tokens]), w, 1e-5, out=out.rows)
        assert_same_bits(out.rows, expected[:tokens], *case)
        out.assert_intact()


@pytest.mark.parametrize("n", [1, 16, 33])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e19, -3e38])
def test_rmsnorm_refuses_what_is_not_finite(kernels: NativeKernels, n: int, bad: float) -> None:
    """3e19 is finite, but the sum of squares is not."""
    for at in {0, n - 1}:
        x, w = np.ones((3, n), np.float32), np.ones(n, np.float32)
        x[1, at] = bad
        for rmsnorm in (kernels.rmsnorm, reference.rmsnorm):
            with pytest.raises(reference.NonFiniteError):
                rmsnorm(x, w, 1e-5)


def test_rmsnorm_of_zeros_without_epsilon_is_refused(kernels: NativeKernels) -> None:
    x, w = np.zeros((1, 16), np.float32), np.ones(16, np.float32)
    for rmsnorm in (kernels.rmsnorm, reference.rmsnorm):
        with pytest.raises(reference.NonFiniteError):
            rmsnorm(x, w, 0.0)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rope_dim"),
    [(1, 64, 64), (3, 16, 16), (2, 80, 80), (3, 24, 8), (9, 2, 2), (2, 16, 0), (0, 16, 16)],
)
def test_rope_equals_reference(
    kernels: NativeKernels, heads: int, head_dim: int, rope_dim: int
) -> None:
    case = ("rope", heads, head_dim, rope_dim)
    rng = np.random.default_rng(seed_of(*case))
    table = floats(rng, (4001, rope_dim // 2, 2))
    x = floats(rng, (101, heads, head_dim), "mixed")
    positions = np.array([*range(1, 101), 4000], np.uint32)
    expected = reference.rope(x, table, positions, rope_dim).reshape(101, heads * head_dim)
    for tokens in (0, 1, 33, 101):
        out = Guarded((tokens, heads * head_dim), np.float32)
        kernels.rope(x[-tokens:][:tokens], table, positions[-tokens:][:tokens], rope_dim, out.rows)
        assert_same_bits(out.rows, expected[-tokens:][:tokens], *case)
        out.assert_intact()


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_equals_reference(kernels: NativeKernels, n: int, kind: str) -> None:
    case = ("swiglu", n, kind)
    rng = np.random.default_rng(seed_of(*case))
    gate, up = floats(rng, (33, n), kind), floats(rng, (33, n), "mixed")
    expected = reference.swiglu(gate, up)
    for tokens in TOKENS:
        out = Guarded((tokens, n), np.float32)
        kernels.swiglu(strided(gate[:tokens]), strided(up[:tokens], 9), out=out.rows)
        assert_same_bits(out.rows, expected[:tokens], *case)
        out.assert_intact()


def test_swiglu_over_the_whole_range_of_exp(kernels: NativeKernels) -> None:
    """Below -17 the result shows every bit of exp; beyond 88 it shows the clamp."""
    gate = np.concatenate(
        [
            np.linspace(-100, 100, 300_001, dtype=np.float32),
            np.array([3.4e38, -3.4e38, np.inf, -np.inf, 87, -87, 88, -88], np.float32),
        ]
    )[None, :]
    up = np.full_like(gate, 1.5)
    assert_same_bits(kernels.swiglu(gate, up), reference.swiglu(gate, up))


def test_swiglu_passes_a_nan_on(kernels: NativeKernels) -> None:
    """The norm or the quantisation behind it reports it; which NaN it is, is not promised."""
    for n in (1, 16, 17):
        x, one = np.full((1, n), np.nan, np.float32), np.ones((1, n), np.float32)
        assert np.isnan(kernels.swiglu(x, one)).all()
        assert np.isnan(kernels.swiglu(one, x)).all()


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_add_equals_reference(kernels: NativeKernels, n: int, kind: str) -> None:
    case = ("add", n, kind)
    rng = np.random.default_rng(seed_of(*case))
    x, y = floats(rng, (33, n), kind), floats(rng, (33, n), kind)
    for tokens in TOKENS:
        out = Guarded((tokens, n), np.float32)
        kernels.add(x[:tokens], strided(y[:tokens]), out=out.rows)
        assert_same_bits(out.rows, reference.add(x, y)[:tokens], *case)
        out.assert_intact()


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_row_equals_reference(kernels: NativeKernels, name: str) -> None:
    for k in (0, *depths(name, 1, 2, 3)):
        case = ("dequantize", name, k)
        w = weights(np.random.default_rng(seed_of(*case)), name, 17, k)
        got = kernels.dequantize_row(name, strided(w, 7), k)
        assert_same_bits(got, reference.dequantize_row(name, w), *case)


@pytest.mark.parametrize(("name", "exponent"), [("f16", 0x7C00), ("bf16", 0x7F80)])
def test_every_float_of_16_bits_is_read_alike(
    kernels: NativeKernels, name: str, exponent: int
) -> None:
    """NaN is left out: a product of a NaN keeps no promise about its bits."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & exponent) != exponent].reshape(-1, 1)
    w = finite.view(np.uint8)
    x = np.array([[1.0], [-3.0]], np.float32)
    assert_same_bits(kernels.matmul(name, w, x), reference.matmul(name, w, x))
    if name == "f16":
        values = finite.view(np.float16).astype(np.float32)
    else:
        values = (finite.astype(np.uint32) << 16).view(np.float32)
    assert_same_bits(kernels.dequantize_row(name, w, 1), values)


# --- scalar functions ---------------------------------------------------------------------


def test_scalar_f16_conversions_equal_numpy() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    got = np.array([native.f32_from_f16(int(b)) for b in bits], np.float32)
    finite_or_inf = ~np.isnan(values)
    assert_same_bits(got[finite_or_inf], values[finite_or_inf])
    assert np.isnan(got[~finite_or_inf]).all()
    back = np.array([native.f16_from_f32(float(v)) for v in values[finite_or_inf]], np.uint16)
    assert_same_bits(back, bits[finite_or_inf])


def test_f16_overflow_is_infinity_and_nan_stays_nan() -> None:
    just_below = float(np.nextafter(np.float32(65520), np.float32(0)))
    assert native.f16_from_f32(just_below) == 0x7BFF
    assert native.f16_from_f32(65520.0) == 0x7C00
    assert native.f16_from_f32(-1e38) == 0xFC00
    assert native.f16_from_f32(float("-inf")) == 0xFC00
    assert native.f16_from_f32(float("nan")) & 0x7FFF > 0x7C00


def test_exp_equals_reference() -> None:
    x = np.concatenate(
        [
            np.linspace(-90, 90, 20_001, dtype=np.float32),
            np.array([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.inf, -np.inf], np.float32),
        ]
    )
    got = np.array([native.exp(float(v)) for v in x], np.float32)
    assert_same_bits(got, reference.exp(x))
    assert_same_bits(native.exp_f32(x), reference.exp(x))


def test_exp_is_close_to_the_true_one() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    true = np.exp(x.astype(np.float64))
    assert (np.abs(reference.exp(x) - true) <= 1.5e-7 * true).all()
    assert reference.exp(np.float32([0.0]))[0] == 1.0


def test_this_machine_has_at_least_the_plain_kernels() -> None:
    assert ISAS[0] == "scalar"
