# SPDX-License-Identifier: Apache-2.0
"""Our own sin, cos, exp and log against long doubles, and the tables made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spanker.ggml import rope

LONG = np.longdouble
pytestmark = pytest.mark.skipif(
    np.finfo(LONG).eps > 2e-19, reason="long double is no wider than double here"
)


def relative(got: np.ndarray, true: np.ndarray) -> float:
    return float(np.max(np.abs(got.astype(LONG) / true - 1)))


def test_sin_and_cos_are_right_to_a_few_units_of_the_last_place() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.linspace(0, 8, 4001),
            np.arange(0, 1 << 17, 13, dtype=np.float64),
            rng.uniform(0, 1 << 17, 20_000),
            rng.uniform(0, 1 << 20, 20_000),
            # Next to multiples of pi/2, where one of the two nearly vanishes.
            np.nextafter(np.arange(1, 2000) * (math.pi / 2), 0),
            10.0 ** np.arange(-300, 1, 7),
        ]
    )
    sin, cos = rope.sin_cos(x)
    assert np.max(np.abs(sin.astype(LONG) - np.sin(x.astype(LONG)))) < 4e-16
    assert np.max(np.abs(cos.astype(LONG) - np.cos(x.astype(LONG)))) < 4e-16
    assert np.max(np.abs(sin * sin + cos * cos - 1)) < 8e-16


def test_sin_and_cos_at_zero_are_exact() -> None:
    sin, cos = rope.sin_cos(np.zeros(3))
    assert sin.tolist() == [0, 0, 0] and cos.tolist() == [1, 1, 1]


def test_every_quadrant_has_its_signs() -> None:
    x = np.array([0.5, 2.0, 3.5, 5.5, 0.5 + 8 * math.pi])
    sin, cos = rope.sin_cos(x)
    assert np.sign(sin).tolist() == [1, 1, -1, -1, 1]
    assert np.sign(cos).tolist() == [1, -1, -1, 1, 1]


def test_exp_is_right_to_a_few_units_of_the_last_place() -> None:
    x = np.concatenate([np.linspace(-699, 699, 30_001), np.linspace(-1, 1, 2001)])
    assert relative(rope.exp(x), np.exp(x.astype(LONG))) < 8e-16
    assert rope.exp(np.zeros(1))[0] == 1


def test_log_is_right_to_a_few_units_of_the_last_place() -> None:
    x = np.concatenate(
        [np.geomspace(1e-300, 1e300, 3001), np.linspace(0.3, 3, 3001), [10_000.0, 500_000.0, 2.0]]
    )
    x = x[x != 1]
    got = np.array([rope.log(float(v)) for v in x])
    true = np.log(x.astype(LONG))
    assert np.max(np.abs(got - true) / np.maximum(np.abs(true), 0.25)) < 4e-16
    assert rope.log(1.0) == 0


# --- tables ----------------------------------------------------------------------------


def exact(positions: np.ndarray, rope_dim: int, base: float) -> np.ndarray:
    """(positions, rope_dim / 2, 2) in long double."""
    pair = np.arange(rope_dim // 2, dtype=LONG)
    angle = positions.astype(LONG)[:, None] * np.power(LONG(base), -2 * pair / rope_dim)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def test_a_table_has_cos_then_sin_of_each_pair() -> None:
    table = rope.table(5, 8, 10000.0)
    assert table.shape == (5, 4, 2) and table.dtype == np.float32
    assert table[0].tolist() == [[1, 0]] * 4
    for p in range(5):
        for i in range(4):
            angle = p * 10000.0 ** (-2 * i / 8)
            assert table[p, i] == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-7)


def test_an_empty_table_and_one_without_rotation() -> None:
    assert rope.table(0, 64, 10000.0).shape == (0, 32, 2)
    assert rope.table(3, 0, 10000.0).shape == (3, 0, 2)


@pytest.mark.parametrize("base", [10000.0, 100000.0, 500000.0])
@pytest.mark.parametrize("rope_dim", [64, 80])
def test_nearly_every_entry_up_to_position_4096_is_the_nearest_float(
    rope_dim: int, base: float
) -> None:
    """Of the 262,144 and more entries at most one in 50,000 lies so near the middle of two floats
    that the error of the angle, some 1e-12, decides."""
    table = rope.table(4096, rope_dim, base)
    nearest = exact(np.arange(4096), rope_dim, base).astype(np.float32)
    differ = int(np.count_nonzero(table != nearest))
    print(f"{differ} of {table.size} entries differ from the nearest float")
    assert differ <= table.size / 50_000
    assert np.max(np.abs(table - nearest)) <= 2.0**-24


def test_entries_up_to_position_131072_are_the_nearest_float_but_for_few() -> None:
    """The angle's error grows with it, to 2e-11 at 2**17: about one entry in 5,000 may differ."""
    rng = np.random.default_rng(1)
    positions = np.unique(np.concatenate([rng.integers(0, 1 << 17, 3000), [(1 << 17) - 1]]))
    table = rope.table(1 << 17, 64, 10000.0)[positions]
    true = exact(positions, 64, 10000.0)
    differ = int(np.count_nonzero(table != true.astype(np.float32)))
    print(f"{differ} of {table.size} entries differ from the nearest float")
    assert differ <= table.size / 2000
    assert np.max(np.abs(table.astype(LONG) - true)) < 2.0**-25 + 5e-11
    # The first pair turns by whole radians: its angles are exact.
    assert np.array_equal(table[:, 0], true[:, 0].astype(np.float32))


def test_a_shorter_table_is_the_beginning_of_a_longer_one() -> None:
    assert np.array_equal(rope.table(10, 64, 10000.0), rope.table(1000, 64, 10000.0)[:10])
