# SPDX-License-Identifier: Apache-2.0
"""Chunk statistics and candidates of logits: every instruction set equals reference.py."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import assert_same_bits, floats, seed_of

from spanker.kernels import reference
from spanker.kernels.native import NativeKernels

COUNTS = (0, 1, 15, 16, 17, 255, 256, 257, 271, 272, 273, 1000)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("kind", ["normal", "zeros", "subnormal", "mixed", "one_huge"])
@pytest.mark.parametrize("inv_temperature", [1.0, 1.25, 0.0, 1e-3, 100.0])
def test_logit_stats_equal_reference(
    kernels: NativeKernels, n: int, kind: str, inv_temperature: float
) -> None:
    case = ("stats", n, kind, inv_temperature)
    x = floats(np.random.default_rng(seed_of(*case)), (n,), kind)
    got = kernels.logit_stats(x, inv_temperature)
    assert_same_bits(got, reference.logit_stats(x, inv_temperature), *case)


def test_logit_stats_of_the_largest_floats(kernels: NativeKernels) -> None:
    """The difference overflows and its exp is clamped; every value itself is finite."""
    for n in (2, 16, 300):
        x = np.resize(np.float32([3.4e38, -3.4e38]), n)
        for inv_temperature in (1.0, 0.5, 1e30):
            got = kernels.logit_stats(x, inv_temperature)
            assert_same_bits(got, reference.logit_stats(x, inv_temperature))


def test_the_maximum_of_zeros_has_no_sign(kernels: NativeKernels) -> None:
    for n in (1, 16, 31):
        assert_same_bits(
            kernels.logit_stats(np.full(n, -0.0, np.float32), 1.0),
            np.array([[0.0, n]], np.float32),
        )


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 257, 272, 300])
def test_logits_that_are_not_finite_are_an_error(
    kernels: NativeKernels, bad: float, n: int
) -> None:
    for at in {0, n - 1, n // 2, min(n - 1, 15), min(n - 1, 256), min(n - 1, 271)}:
        x = np.ones(n, np.float32)
        x[at] = bad
        for logit_stats in (kernels.logit_stats, reference.logit_stats):
            with pytest.raises(reference.NonFiniteError):
                logit_stats(x, 1.0)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("k", [0, 1, 2, 16, 40, 256, 1001])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "rising", "falling", "equal"])
def test_top_k_equals_reference(kernels: NativeKernels, n: int, k: int, kind: str) -> None:
    """NaN is left out: logit_stats, which runs on the same logits, refuses it."""
    case = ("top_k", n, k, kind)
    rng = np.random.default_rng(seed_of(*case))
    x = {
        "normal": lambda: floats(rng, (n,), "mixed"),
        "ties": lambda: rng.integers(-3, 4, n).astype(np.float32),
        "zeros": lambda: floats(rng, (n,), "zeros"),
        "rising": lambda: np.arange(n, dtype=np.float32),
        "falling": lambda: -np.arange(n, dtype=np.float32),
        "equal": lambda: np.full(n, 7, np.float32),
    }[kind]()
    ids, values = kernels.top_k(x, k)
    expected_ids, expected_values = reference.top_k(x, k)
    assert_same_bits(ids, expected_ids, *case)
    assert_same_bits(values, expected_values, *case)


def test_ties_go_to_the_lowest_id_across_groups(kernels: NativeKernels) -> None:
    x = np.zeros(64, np.float32)
    x[[5, 20, 21, 50]] = 1.0
    assert kernels.top_k(x, 3)[0].tolist() == [5, 20, 21]
    x[63] = 2.0
    assert kernels.top_k(x, 3)[0].tolist() == [63, 5, 20]


def test_infinite_logits_are_ordered_like_any_other(kernels: NativeKernels) -> None:
    x = np.zeros(40, np.float32)
    x[33], x[2] = np.inf, -np.inf
    assert kernels.top_k(x, 2)[0].tolist() == [33, 0]
    assert kernels.top_k(x, 40)[0][-1] == 2
