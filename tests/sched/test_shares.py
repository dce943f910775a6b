# SPDX-License-Identifier: Apache-2.0
"""Shares: cover, order, alignment, balance, and the refusal of nonsense."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanker.errors import PlanError
from spanker.sched import Share, split

totals = st.integers(0, 200_000)
parts_counts = st.integers(1, 40)
units = st.sampled_from([1, 2, 3, 16, 32, 256, 1000])
weights_lists = st.lists(
    st.one_of(st.integers(0, 5), st.floats(0, 1e6), st.just(0.0)), min_size=1, max_size=12
).filter(any)


def sizes_in_units(shares: tuple[Share, ...], unit: int) -> list[int]:
    return [math.ceil(share.size / unit) for share in shares]


def assert_cuts(shares: tuple[Share, ...], total: int, unit: int) -> None:
    edge = 0
    for share in shares:
        assert share.start == edge
        edge = share.stop
        assert edge % unit == 0 or edge == total
    assert edge == total


@given(totals, parts_counts, units)
def test_equal_shares_cover_in_order_on_boundaries_and_balance(
    total: int, parts: int, unit: int
) -> None:
    shares = split(total, parts, unit=unit)
    assert len(shares) == parts
    assert_cuts(shares, total, unit)
    sizes = sizes_in_units(shares, unit)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(totals, weights_lists, units)
def test_weighted_shares_cover_and_stay_within_one_unit_of_their_quota(
    total: int, weights: list[float], unit: int
) -> None:
    shares = split(total, len(weights), unit=unit, weights=weights)
    assert_cuts(shares, total, unit)
    all_units = math.ceil(total / unit)
    whole = sum(Fraction(weight) for weight in weights)
    remainders = []
    for weight, size in zip(weights, sizes_in_units(shares, unit), strict=True):
        quota = all_units * Fraction(weight) / whole
        assert math.floor(quota) <= size <= math.ceil(quota)
        if weight == 0:
            assert size == 0
        remainders.append((quota - math.floor(quota), size > math.floor(quota)))
    rounded_up = [remainder for remainder, up in remainders if up]
    rounded_down = [remainder for remainder, up in remainders if not up]
    if rounded_up and rounded_down:
        assert min(rounded_up) >= max(rounded_down)


@given(totals, parts_counts, units, st.sampled_from([0.1, 1.0, 3, 1e-300, 1e300]))
def test_equal_weights_are_no_weights(total: int, parts: int, unit: int, weight: float) -> None:
    weighted = split(total, parts, unit=unit, weights=[weight] * parts)
    assert weighted == split(total, parts, unit=unit)


@pytest.mark.parametrize(
    ("total", "parts", "unit", "weights", "expected"),
    [
        (9, 4, 1, None, [3, 2, 2, 2]),
        (3, 5, 1, None, [1, 1, 1, 0, 0]),
        (30, 4, 1, None, [8, 8, 7, 7]),
        (1536, 5, 32, None, [320, 320, 320, 288, 288]),
        (576, 7, 32, None, [96, 96, 96, 96, 64, 64, 64]),
        (1000, 3, 256, None, [512, 256, 232]),
        (0, 3, 16, None, [0, 0, 0]),
        (17, 1, 16, None, [17]),
        (10, 3, 1, [1, 0, 1], [5, 0, 5]),
        (10, 3, 1, [2, 1, 1], [5, 3, 2]),
        (7, 2, 1, [1, 1], [4, 3]),
        (100, 3, 10, [0.5, 0.25, 0.25], [50, 30, 20]),
    ],
)
def test_known_splits(
    total: int, parts: int, unit: int, weights: list[float] | None, expected: list[int]
) -> None:
    assert [share.size for share in split(total, parts, unit=unit, weights=weights)] == expected


@pytest.mark.parametrize(
    ("total", "parts", "unit", "weights"),
    [
        (-1, 2, 1, None),
        (8, 0, 1, None),
        (8, -3, 1, None),
        (8, 2, 0, None),
        (8, 2, 1, [1.0]),
        (8, 2, 1, [1.0, -0.5]),
        (8, 2, 1, [0.0, 0.0]),
        (8, 2, 1, [1.0, math.nan]),
        (8, 2, 1, [1.0, math.inf]),
    ],
)
def test_nonsense_is_refused_in_one_line(
    total: int, parts: int, unit: int, weights: list[float] | None
) -> None:
    with pytest.raises(PlanError, match="split: expected") as caught:
        split(total, parts, unit=unit, weights=weights)
    assert "\n" not in str(caught.value)


def test_a_share_knows_its_size_and_refuses_to_run_backwards() -> None:
    assert Share(3, 8).size == 5
    assert not Share(3, 8).empty
    assert Share(3, 3).empty
    for start, stop in [(4, 3), (-1, 2)]:
        with pytest.raises(PlanError, match="start <= stop"):
            Share(start, stop)
