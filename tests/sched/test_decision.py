# SPDX-License-Identifier: Apache-2.0
"""`pick_strategy` against the hardware project's vectors and a second statement of its rule."""

from __future__ import annotations

import random

import pytest

from spanker.errors import PlanError
from spanker.sched import NATIVE, REV_A, Strategy, TileShape, pick_strategy
from spanker.sched.decision import U64_MAX

TP = Strategy.TENSOR_PARALLEL
MP = Strategy.MODEL_PARALLEL


@pytest.mark.parametrize(
    ("tile", "n_sails", "expected"),
    [
        ((4, 4, 2**20, 4), 4, TP),
        ((4096, 4096, 4, 4), 4, MP),
        ((1024, 1024, 1024, 4), 1, TP),
        ((1024, 1024, 1024, 4), 0, TP),
        ((1, 1024, 1024, 4), 4, MP),
        ((4, 4, 2**16, 4), 4, TP),
        ((1, 5632, 2048, 2), 4, MP),
    ],
)
def test_vectors_at_rev_a_bandwidths(
    tile: tuple[int, int, int, int], n_sails: int, expected: Strategy
) -> None:
    assert pick_strategy(TileShape(*tile), n_sails) is expected


def test_a_slow_link_turns_the_answer() -> None:
    tile = TileShape(4, 4, 2**16, 4)
    assert pick_strategy(tile, 4, local_bw=1e9, intercard_bw=1e3) is MP


def test_the_largest_tile_has_an_answer() -> None:
    tile = TileShape(U64_MAX, U64_MAX, U64_MAX, 4)
    assert tile.weight_bytes == tile.activation_bytes == U64_MAX
    assert pick_strategy(tile, 4) in Strategy


def test_tinyllama_decode_is_tensor_parallel_with_weights_as_the_m_by_k_operand() -> None:
    assert pick_strategy(TileShape(m=1, n=5632, k=2048, bytes_per_element=2), 4) is MP
    assert pick_strategy(TileShape(m=5632, n=1, k=2048, bytes_per_element=2), 4) is TP


def test_bytes_saturate_exactly_at_64_bits() -> None:
    assert TileShape(2**31, 3, 2**32, 2).weight_bytes == U64_MAX
    assert TileShape(2**31, 3, 2**32, 1).weight_bytes == 2**63
    assert TileShape(2**32, 2**32, 5, 1).activation_bytes == U64_MAX
    assert TileShape(2**32, 2**32 - 1, 5, 1).activation_bytes == 2**64 - 2**32
    assert TileShape(U64_MAX, 7, U64_MAX, 0).weight_bytes == 0


def test_a_draw_goes_to_tensor_parallel() -> None:
    # Equal bytes over equal bandwidths cost the same either way.
    assert pick_strategy(TileShape(8, 64, 64, 4), 2, local_bw=1.0, intercard_bw=1.0) is TP
    assert pick_strategy(TileShape(8, 65, 64, 4), 2, local_bw=1.0, intercard_bw=1.0) is MP


@pytest.mark.parametrize(("local_bw", "intercard_bw"), [(0, 1e9), (1e9, 0), (0, 0)])
def test_over_a_zero_bandwidth_both_ways_take_forever(local_bw: float, intercard_bw: float) -> None:
    for tile in (TileShape(4, 4, 64, 4), TileShape(0, 0, 0, 4)):
        assert pick_strategy(tile, 4, local_bw, intercard_bw) is TP


@pytest.mark.parametrize("bandwidth", [-1.0, float("nan")])
def test_a_bandwidth_that_is_no_speed_is_refused(bandwidth: float) -> None:
    with pytest.raises(PlanError, match="bandwidth"):
        pick_strategy(TileShape(1, 1, 1, 1), 4, local_bw=bandwidth)
    with pytest.raises(PlanError, match="bandwidth"):
        pick_strategy(TileShape(1, 1, 1, 1), 1, intercard_bw=bandwidth)


def test_a_negative_dimension_is_refused() -> None:
    with pytest.raises(PlanError, match="negative"):
        TileShape(4, -1, 4, 4)


def stated_rule(tile: TileShape, n_sails: int, local_bw: float, intercard_bw: float) -> Strategy:
    """The published rule once more, written from its text and not from the module."""
    cap = 0xFFFF_FFFF_FFFF_FFFF
    weight = float(min(cap, min(cap, tile.m * tile.k) * tile.bytes_per_element))
    activation = float(min(cap, min(cap, tile.m * tile.n) * tile.bytes_per_element))
    cards = n_sails if n_sails > 1 else 1
    if cards == 1:
        return TP
    read = weight / local_bw if local_bw else float("inf")
    send = activation / intercard_bw if intercard_bw else float("inf")
    costs = {TP: read / cards + send, MP: read + send / cards}
    return MP if costs[MP] < costs[TP] else TP


def test_ten_thousand_random_tiles_follow_the_stated_rule() -> None:
    seed = 20_260_701
    print(f"seed {seed}")
    rng = random.Random(seed)
    seen = {TP: 0, MP: 0}
    bandwidths = [
        (REV_A.local_ddr_bytes_per_s, REV_A.intercard_bytes_per_s),
        (NATIVE.local_ddr_bytes_per_s, NATIVE.intercard_bytes_per_s),
        (1e9, 1e3),
        (1.0, 1.0),
        (3.7e9, 0.0),
        (0.0, 1e9),
    ]
    for _ in range(10_000):
        m, n, k = (int(2 ** rng.uniform(0, 40)) for _ in range(3))
        tile = TileShape(m, n, k, rng.choice([1, 2, 4, 8]))
        n_sails = rng.choice([0, 1, 2, 3, 4, 7, 8, 16, 255])
        local_bw, intercard_bw = rng.choice(bandwidths)
        expected = stated_rule(tile, n_sails, local_bw, intercard_bw)
        assert pick_strategy(tile, n_sails, local_bw, intercard_bw) is expected, (tile, n_sails)
        seen[expected] += 1
    assert min(seen.values()) > 1_000
