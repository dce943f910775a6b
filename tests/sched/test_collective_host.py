# SPDX-License-Identifier: Apache-2.0
"""All-reduce and all-gather of arrays on the host: card order, to the bit, and exact errors."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
from test_collective_interpreter import Interpreter, inputs

from spanker.errors import CollectiveError, ShapeMismatchError, TopologyMismatchError
from spanker.sched import Topology
from spanker.sched.collectives import Buffer, ReduceOp, Region, make
from spanker.sched.collectives.host import F32, all_gather_f32, all_reduce_f32

NAN_BITS = 0x7FC00000


def f32(*values: float) -> F32:
    return np.array(values, np.float32)


def bits(array: F32) -> list[int]:
    return [int(x) for x in array.view(np.uint32)]


def one(per_card: list[F32], op: ReduceOp) -> F32:
    """The result, which must be the same on every card."""
    results = all_reduce_f32(per_card, op)
    assert len(results) == len(per_card)
    assert all(bits(result) == bits(results[0]) for result in results)
    return results[0]


def test_sum_max_min_and_average() -> None:
    per_card = [f32(1, -2, 3), f32(4, 5, -6), f32(-7, 8, 9)]
    assert one(per_card, ReduceOp.SUM).tolist() == [-2, 11, 6]
    assert one(per_card, ReduceOp.MAX).tolist() == [4, 8, 9]
    assert one(per_card, ReduceOp.MIN).tolist() == [-7, -2, -6]
    average = one(per_card, ReduceOp.AVG)
    assert bits(average) == bits(f32(-2, 11, 6) / np.float32(3))


def test_sums_are_folded_in_card_order() -> None:
    assert one([f32(1e8), f32(-1e8), f32(1)], ReduceOp.SUM).tolist() == [1]
    assert one([f32(1), f32(1e8), f32(-1e8)], ReduceOp.SUM).tolist() == [0]
    assert one([f32(1), f32(1e8), f32(-1e8)], ReduceOp.AVG).tolist() == [0]


def test_an_average_is_divided_last() -> None:
    # Divided first, each would round; and the sum of halves would not overflow.
    with np.errstate(over="ignore"):
        assert one([f32(3e38), f32(3e38)], ReduceOp.AVG).tolist() == [math.inf]
    tiny = np.float32(2**-149)
    assert one([f32(tiny), f32(tiny)], ReduceOp.AVG).tolist() == [tiny]


def test_negative_zero_is_below_zero() -> None:
    for per_card in ([f32(-0.0), f32(0.0)], [f32(0.0), f32(-0.0)]):
        assert bits(one(per_card, ReduceOp.MAX)) == [0]
        assert bits(one(per_card, ReduceOp.MIN)) == [0x80000000]


def test_a_nan_gives_the_canonical_one() -> None:
    odd = np.array([0xFFC12345], np.uint32).view(np.float32)
    for op in ReduceOp:
        for per_card in ([odd, f32(1)], [f32(1), odd], [odd, odd]):
            assert bits(one(per_card, op)) == [NAN_BITS], op
    assert bits(one([f32(math.inf), f32(-math.inf)], ReduceOp.SUM)) == [NAN_BITS]


def test_length_zero_is_fine() -> None:
    for op in ReduceOp:
        assert one([f32(), f32()], op).shape == (0,)
    assert [a.shape for a in all_gather_f32([f32(), f32()])] == [(0,), (0,)]


def test_one_card_keeps_what_it_has() -> None:
    assert one([f32(3, 4)], ReduceOp.AVG).tolist() == [3, 4]
    assert all_gather_f32([f32(3, 4)])[0].tolist() == [3, 4]


def test_no_cards_have_nothing() -> None:
    nobody = Topology(())
    assert all_reduce_f32([], "sum", nobody) == all_gather_f32([], nobody) == []


def test_a_gather_is_in_card_order() -> None:
    results = all_gather_f32([f32(5, 6), f32(1, 2), f32(3, 4)])
    assert [r.tolist() for r in results] == [[5, 6, 1, 2, 3, 4]] * 3


def test_arrays_are_new_ones() -> None:
    per_card = [f32(1), f32(2)]
    for results in (all_reduce_f32(per_card, ReduceOp.SUM), all_gather_f32(per_card)):
        results[0][:] = 9
        assert 9 not in results[1]
    assert [a.tolist() for a in per_card] == [[1], [2]]


def test_as_many_buffers_as_cards_are_needed() -> None:
    for call in (
        lambda: all_reduce_f32([f32(1), f32(2)], "sum", Topology.with_mock(3)),
        lambda: all_gather_f32([f32(1), f32(2)], Topology.with_mock(3)),
    ):
        with pytest.raises(TopologyMismatchError) as caught:
            call()
        assert (caught.value.expected, caught.value.actual) == (3, 2)
        assert str(caught.value) == ("topology mismatch: expected 3 buffers, one a card, got 2")
    with pytest.raises(TopologyMismatchError, match="expected 1 buffers, one a card, got 0"):
        all_reduce_f32([], "sum")
    with pytest.raises(TopologyMismatchError, match="expected 0 buffers, one a card, got 1"):
        all_gather_f32([f32(1)], Topology(()))


def test_buffers_of_one_length_are_needed() -> None:
    per_card = [f32(1, 2), f32(1, 2), f32(1, 2, 3), f32(1)]
    for call in (lambda: all_reduce_f32(per_card, "max"), lambda: all_gather_f32(per_card)):
        with pytest.raises(ShapeMismatchError) as caught:
            call()
        error = caught.value
        assert (error.sail, error.expected, error.actual) == (2, 2, 3)
        assert str(error) == "shape mismatch on card 2: expected 2 elements as on card 0, got 3"
        assert isinstance(error, CollectiveError)
        # Errors are kept and raised again as copies.
        assert copy.copy(error).sail == 2


def test_other_types_and_operations_are_refused() -> None:
    with pytest.raises(CollectiveError, match="card 1: expected a 1-D float32 array, got float64"):
        all_reduce_f32([f32(1), np.zeros(1)], "sum")  # type: ignore[list-item]
    with pytest.raises(CollectiveError, match=r"of shape \(1, 1\)"):
        all_gather_f32([np.zeros((1, 1), np.float32)])
    with pytest.raises(
        CollectiveError, match="no reduction 'mean': expected one of sum, avg, max, min"
    ):
        all_reduce_f32([f32(1)], "mean")


@pytest.mark.parametrize("algorithm", ["owner", "chain", "routed"])
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_ordered_plans_come_to_the_same_bits(algorithm: str, op: str) -> None:
    rng = random.Random(5)
    plan = make("all-reduce", 5, 1000, algorithm=algorithm, op=op)
    per_card = inputs(plan, rng)
    done = Interpreter(plan, per_card, rng).run()
    wanted = all_reduce_f32([per_card[card] for card in plan.cards], op)
    for card, values in zip(plan.cards, wanted, strict=True):
        assert bits(done.at(card, Region(Buffer.DATA, 0, 1000))) == bits(values)
