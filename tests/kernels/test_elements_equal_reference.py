# SPDX-License-Identifier: Apache-2.0
"""REDUCE and DIVIDE: every instruction set equals reference.py, in every bit of every element."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import assert_same_bits, seed_of

from spanker.errors import CardCommandError
from spanker.kernels import reference
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.native import NativeKernels

LENGTHS = (0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 1000)
COUNTS = (1, 2, 3, 7, 16, 64, 65536)

# Every pair of these: zeros, subnormals, the largest, infinities, NaNs of all kinds.
F32_BITS = (
    *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000, 0xBF800000),
    *(0x3F800001, 0x33800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000),
    *(0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x4B800000, 0x4B800001),
)
I32 = (0, 1, -1, 2, -2, 7, -7, 2**31 - 1, -(2**31), 2**31 - 2, -(2**31) + 1, 12345678)


def patterns(element: Element, rng: np.random.Generator, n: int) -> np.ndarray:
    """Any bits at all."""
    unsigned = np.uint32 if element.nbytes == 4 else np.uint16
    bits = rng.integers(0, 1 << 8 * element.nbytes, n, dtype=np.uint64).astype(unsigned)
    return bits.view(element.dtype)


def ordinary(element: Element, rng: np.random.Generator, n: int) -> np.ndarray:
    """Values of like size, so that sums round."""
    if element is Element.I32:
        return rng.integers(-(2**30), 2**30, n, dtype=np.int32)
    x = (rng.standard_normal(n) * np.exp2(rng.integers(-3, 4, n))).astype(np.float32)
    return reference.narrow(element, x)


@pytest.mark.parametrize("how", Reduction)
@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("make", [patterns, ordinary])
def test_reduce_equals_reference(
    kernels: NativeKernels, element: Element, how: Reduction, make: object
) -> None:
    case = ("reduce", element.name, how.name, make.__name__)
    rng = np.random.default_rng(seed_of(*case))
    for n in LENGTHS:
        # A guard at either end.
        a, b = make(element, rng, n + 2), make(element, rng, n + 2)
        want = a.copy()
        want[1:-1] = reference.reduce(element, how, a[1:-1], b[1:-1])
        kernels.reduce(element, how, a[1:-1], b[1:-1])
        assert_same_bits(a, want, *case, n)


@pytest.mark.parametrize("how", Reduction)
def test_every_pair_of_special_floats(kernels: NativeKernels, how: Reduction) -> None:
    bits = np.array(F32_BITS, np.uint32)
    a, b = (x.reshape(-1).copy() for x in np.meshgrid(bits, bits))
    want = reference.reduce(Element.F32, how, a.view(np.float32), b.view(np.float32))
    got = kernels.reduce(Element.F32, how, a.view(np.float32), b.view(np.float32))
    assert_same_bits(got, want, how)


@pytest.mark.parametrize("how", Reduction)
@pytest.mark.parametrize("element", [Element.F16, Element.BF16])
def test_every_element_of_16_bits_beside_special_ones(
    kernels: NativeKernels, element: Element, how: Reduction
) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(element.dtype)
    for other in (0x0000, 0x8000, 0x0001, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7F80, 0x7FFF, 0x3F81):
        b = np.full(1 << 16, other, np.uint16).view(element.dtype)
        want = reference.reduce(element, how, every, b)
        assert_same_bits(kernels.reduce(element, how, every.copy(), b), want, element, how, other)


@pytest.mark.parametrize("how", Reduction)
def test_every_pair_of_special_integers(kernels: NativeKernels, how: Reduction) -> None:
    values = np.array(I32, np.int32)
    a, b = (x.reshape(-1).copy() for x in np.meshgrid(values, values))
    want = reference.reduce(Element.I32, how, a, b)
    assert_same_bits(kernels.reduce(Element.I32, how, a.copy(), b), want, how)


@pytest.mark.parametrize("by", COUNTS)
@pytest.mark.parametrize("element", Element)
def test_divide_equals_reference(kernels: NativeKernels, element: Element, by: int) -> None:
    case = ("divide", element.name, by)
    rng = np.random.default_rng(seed_of(*case))
    if element.nbytes == 2:
        x = np.arange(1 << 16, dtype=np.uint16).view(element.dtype)
    elif element is Element.I32:
        near = np.arange(-300, 300, dtype=np.int32)
        edges = np.array(I32, np.int32)
        x = np.concatenate([patterns(element, rng, 10_000), near, near * np.int32(by), edges])
    else:
        specials = np.array(F32_BITS, np.uint32).view(np.float32)
        x = np.concatenate([patterns(element, rng, 10_000), specials])
    for n in (*LENGTHS, x.size):
        want = reference.divide(element, x[:n], by)
        assert_same_bits(kernels.divide(element, x[:n].copy(), by), want, *case, n)


def test_the_rules_that_users_see() -> None:
    """What the page of semantics promises, on values that one can check by hand."""
    f = np.float32
    nan = np.array([np.nan, -np.nan], f)
    zeros = np.array([0.0, -0.0], f)
    for how in Reduction:
        both = reference.reduce(Element.F32, how, nan, zeros)
        assert (both.view(np.uint32) == 0x7FC00000).all()
    larger = reference.reduce(Element.F32, Reduction.MAX, zeros, zeros[::-1].copy())
    smaller = reference.reduce(Element.F32, Reduction.MIN, zeros, zeros[::-1].copy())
    assert not np.signbit(larger).any() and np.signbit(smaller).all()
    lost = reference.reduce(
        Element.F32, Reduction.SUM, np.array([np.inf], f), -np.array([np.inf], f)
    )
    assert lost.view(np.uint32)[0] == 0x7FC00000
    big = np.array([2**31 - 1], np.int32)
    assert reference.reduce(Element.I32, Reduction.SUM, big, np.array([1], np.int32))[0] == -(2**31)
    assert reference.divide(Element.I32, np.array([-7, 7], np.int32), 2).tolist() == [-3, 3]
    # 2048 + 1 is no f16; 2048 + 3 rounds to the even neighbour of two.
    h = np.array([2048, 2048], np.float16)
    odd = np.array([1, 3], np.float16)
    assert reference.reduce(Element.F16, Reduction.SUM, h, odd).tolist() == [2048, 2052]
    over = reference.reduce(Element.F16, Reduction.SUM, *2 * [np.array([65504], np.float16)])
    assert np.isinf(over).all()


def test_arguments_are_checked(kernels: NativeKernels) -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(CardCommandError):
        kernels.reduce(Element.F32, Reduction.SUM, x, np.zeros(5, np.float32))
    with pytest.raises(CardCommandError):
        kernels.reduce(Element.F16, Reduction.SUM, x, x.copy())
    for by in (0, 65537):
        with pytest.raises(CardCommandError):
            kernels.divide(Element.F32, x, by)
