# SPDX-License-Identifier: Apache-2.0
"""The plans of live fleets, executed in numpy: what they leave, in which order they fold."""

from __future__ import annotations

import numpy as np
import pytest

from spanker.sched.collectives.choice import choose
from spanker.sched.collectives.plan import (
    Buffer,
    CollectivePlan,
    Copy,
    Divide,
    Kind,
    ReduceOp,
    Region,
)
from spanker.sched.shares import split
from spanker.sched.topology import Topology

CARDS = (1, 2, 3, 4, 5, 7, 8, 16)
SIZES = (0, 1, 7, 64, 5000)


def execute(plan: CollectivePlan, data: list[np.ndarray]) -> dict[Buffer, list[np.ndarray]]:
    """Phase by phase, everything of a phase at once; what nobody has written is NaN."""
    memory = {
        Buffer.DATA: [x.copy() for x in data],
        Buffer.OUT: [np.full(plan.out_elements, np.nan, np.float32) for _ in data],
        Buffer.TMP: [np.full(plan.tmp_elements, np.nan, np.float32) for _ in data],
    }

    def at(card: int, region: Region) -> np.ndarray:
        view = memory[region.buffer][card][region.start : region.stop]
        assert view.size == region.size, "beyond its buffer"
        return view

    for phase in plan.phases:
        sent = [at(s.source, s.what).copy() for s in phase.sends]
        for send, values in zip(phase.sends, sent, strict=True):
            at(send.target, send.to)[:] = values
        for local in phase.local:
            into = at(local.card, local.into)
            if isinstance(local, Divide):
                into /= np.float32(len(plan.cards))
            elif isinstance(local, Copy):
                into[:] = at(local.card, local.operand)
            elif plan.op in (ReduceOp.SUM, ReduceOp.AVG):
                into += at(local.card, local.operand)
            else:
                fold = np.maximum if plan.op is ReduceOp.MAX else np.minimum
                fold(into, at(local.card, local.operand), out=into)
    return memory


def contributions(n: int, elements: int) -> list[np.ndarray]:
    """Sums of these depend on their order."""
    rng = np.random.default_rng(n * 1000 + elements)
    scale = np.exp2(rng.integers(-10, 10, (n, elements)))
    return list((rng.standard_normal((n, elements)) * scale).astype(np.float32))


def folded(data: list[np.ndarray], op: ReduceOp) -> np.ndarray:
    """In card order."""
    result = data[0].copy()
    for x in data[1:]:
        if op in (ReduceOp.SUM, ReduceOp.AVG):
            result = result + x
        else:
            result = (np.maximum if op is ReduceOp.MAX else np.minimum)(result, x)
    return result / np.float32(len(data)) if op is ReduceOp.AVG else result


@pytest.mark.parametrize("op", ReduceOp)
@pytest.mark.parametrize("n", CARDS)
def test_reductions_fold_in_card_order(n: int, op: ReduceOp) -> None:
    for elements in SIZES:
        data = contributions(n, elements)
        want, shares = folded(data, op), split(elements, n)
        plan = choose(Kind.ALL_REDUCE, Topology.with_mock(n), elements, 4, op=op, ordered=True)
        assert all((x == want).all() for x in execute(plan, data)[Buffer.DATA])
        plan = choose(Kind.REDUCE_SCATTER, Topology.with_mock(n), elements, 4, op=op, ordered=True)
        for x, share in zip(execute(plan, data)[Buffer.DATA], shares, strict=True):
            assert (x[share.start : share.stop] == want[share.start : share.stop]).all()


def test_small_and_large_all_reduces_take_different_ways() -> None:
    small = choose(Kind.ALL_REDUCE, Topology.with_mock(2), 100, 4, op=ReduceOp.SUM, ordered=True)
    large = choose(
        Kind.ALL_REDUCE, Topology.with_mock(2), 1_000_000, 4, op=ReduceOp.SUM, ordered=True
    )
    assert (small.algorithm, len(small.phases)) == ("everyone", 1)
    assert (large.algorithm, len(large.phases)) == ("owner", 2)


@pytest.mark.parametrize("n", CARDS)
def test_movements_end_where_they_should(n: int) -> None:
    for elements in SIZES:
        data = contributions(n, elements)
        shares = split(elements, n)
        own = []
        for x, share in zip(data, shares, strict=True):
            own.append(np.full(elements, np.nan, np.float32))
            own[-1][share.start : share.stop] = x[share.start : share.stop]
        whole = np.concatenate([x[s.start : s.stop] for x, s in zip(data, shares, strict=True)])
        gathered = execute(choose(Kind.ALL_GATHER, Topology.with_mock(n), elements, 4), own)
        assert all((x == whole).all() for x in gathered[Buffer.DATA])
        for root in {0, n - 1}:
            sent = execute(
                choose(Kind.BROADCAST, Topology.with_mock(n), elements, 4, root=root), data
            )
            assert all((x == data[root]).all() for x in sent[Buffer.DATA])
        if elements % n == 0:
            swapped = execute(choose(Kind.ALL_TO_ALL, Topology.with_mock(n), elements, 4), data)[
                Buffer.OUT
            ]
            for i, x in enumerate(swapped):
                parts = [y[shares[i].start : shares[i].stop] for y in data]
                assert (x == np.concatenate(parts)).all()


def test_where_links_are_missing_data_take_another_way() -> None:
    for topology in (Topology.ring(5), Topology.line(4)):
        data = contributions(len(topology.cards), 50)
        plan = choose(Kind.ALL_REDUCE, topology, 50, 4, op=ReduceOp.SUM, ordered=True)
        assert plan.algorithm == "routed"
        for x in execute(plan, data)[Buffer.DATA]:
            assert (x == folded(data, ReduceOp.SUM)).all()


@pytest.mark.parametrize("n", CARDS)
def test_after_a_barrier_everyone_has_heard_of_everyone(n: int) -> None:
    plan = choose(Kind.BARRIER, Topology.with_mock(n), 0, 4)
    heard = {card: {card} for card in range(n)}
    for phase in plan.phases:
        before = {card: set(whom) for card, whom in heard.items()}
        for send in phase.sends:
            assert send.what.size == 1
            heard[send.target] |= before[send.source]
    assert all(whom == set(range(n)) for whom in heard.values())
