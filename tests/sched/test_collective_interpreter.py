# SPDX-License-Identifier: Apache-2.0
"""An interpreter of collective plans in numpy, and that it notices what is wrong with one.

It shares nothing with `verify` but the plan: it moves real numbers, card by card in a random order
that the plan allows, and says what every card has in the end.  Other tests compare that with what
the kind promises.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from typing import Any

import attrs
import numpy as np

from spanker.sched.collectives.plan import (
    Buffer,
    CollectivePlan,
    Copy,
    Divide,
    Fold,
    Kind,
    Local,
    Phase,
    ReduceOp,
    Region,
    Send,
)
from spanker.sched.shares import split

Array = np.ndarray[Any, np.dtype[Any]]


class WrongPlanError(Exception):
    """The plan cannot be run: it hangs, or works outside its buffers."""


def poison(dtype: Any) -> Any:
    """What undefined memory holds: found in a result, it is a mistake."""
    return np.nan if np.dtype(dtype).kind == "f" else np.iinfo(dtype).min // 3


def inputs(plan: CollectivePlan, rng: random.Random, dtype: Any = None) -> dict[int, Array]:
    """Each card's DATA: numbers that depend on card and position and whose sum depends on its
    order, if they are floats, as they are for ordered plans."""
    generator = np.random.default_rng(rng.getrandbits(32))
    dtype = dtype or (np.float32 if plan.ordered else np.int64)
    data = {}
    for i, card in enumerate(plan.cards):
        if np.dtype(dtype).kind == "f":
            scale = 10.0 ** generator.integers(-3, 4, plan.elements)
            values = (generator.standard_normal(plan.elements) * scale).astype(dtype)
        else:
            values = generator.integers(-(10**6), 10**6, plan.elements).astype(dtype)
        # What the card does not hold before.
        if plan.kind is Kind.ALL_GATHER:
            values[: plan.shares[i].start] = poison(dtype)
            values[plan.shares[i].stop :] = poison(dtype)
        if plan.kind is Kind.BROADCAST and card != plan.root:
            values[:] = poison(dtype)
        data[card] = values
    return data


def fold(op: ReduceOp | None, a: Array, b: Array) -> Array:
    if op is ReduceOp.MAX:
        return np.maximum(a, b)
    if op is ReduceOp.MIN:
        return np.minimum(a, b)
    return a + b


def divide(a: Array, by: int) -> Array:
    return a / a.dtype.type(by) if a.dtype.kind == "f" else a // by


def expected(plan: CollectivePlan, data: dict[int, Array]) -> dict[int, list[tuple[Region, Array]]]:
    """What the kind promises each card, worked out on the whole arrays."""
    cards = plan.cards
    whole = Region(Buffer.DATA, 0, plan.elements)
    parts = [Region(Buffer.DATA, s.start, s.stop) for s in plan.shares]
    if plan.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER):
        result = data[cards[0]]
        for card in cards[1:]:
            result = fold(plan.op, result, data[card])
        if plan.op is ReduceOp.AVG:
            result = divide(result, len(cards))
        if plan.kind is Kind.ALL_REDUCE:
            return {card: [(whole, result)] for card in cards}
        return {
            card: [(part, result[part.start : part.stop])]
            for card, part in zip(cards, parts, strict=True)
        }
    if plan.kind is Kind.ALL_GATHER:
        row = np.concatenate([data[c][p.start : p.stop] for c, p in zip(cards, parts, strict=True)])
        return {card: [(whole, row)] for card in cards}
    if plan.kind is Kind.BROADCAST:
        assert plan.root is not None
        return {card: [(whole, data[plan.root])] for card in cards}
    if plan.kind is Kind.ALL_TO_ALL:
        out = Region(Buffer.OUT, 0, plan.elements)
        return {
            card: [(out, np.concatenate([data[c][part.start : part.stop] for c in cards]))]
            for card, part in zip(cards, parts, strict=True)
        }
    return {card: [] for card in cards}


class Interpreter:
    """Cards that run a plan, one step of one card at a time in a random order.

    Within a phase a card takes its sends and receives in any order too, as far as each link keeps
    its own: where what is received lies over what is sent, or over another, this shows.
    """

    def __init__(self, plan: CollectivePlan, data: dict[int, Array], rng: random.Random) -> None:
        self.plan = plan
        self.rng = rng
        dtype = next(iter(data.values())).dtype
        self.memory = {
            (card, buffer): np.full(size, poison(dtype), dtype)
            for card in plan.cards
            for buffer, size in (
                (Buffer.OUT, plan.out_elements),
                (Buffer.TMP, plan.tmp_elements),
            )
        }
        for card in plan.cards:
            self.memory[card, Buffer.DATA] = data[card].copy()
        self.heard = {card: {card} for card in plan.cards}
        self.links: defaultdict[tuple[int, int], deque[Any]] = defaultdict(deque)

    def at(self, card: int, region: Region) -> Array:
        if (card, region.buffer) not in self.memory:
            raise WrongPlanError(f"no card {card}")
        buffer = self.memory[card, region.buffer]
        if region.stop > len(buffer):
            raise WrongPlanError(f"{region} of card {card} ends beyond {len(buffer)}")
        return buffer[region.start : region.stop]

    def put(self, card: int, region: Region, values: Array) -> None:
        if region.size != len(values):
            raise WrongPlanError(f"{len(values)} elements for {region}")
        self.at(card, region)[:] = values

    def run(self) -> Interpreter:
        running = {card: self._steps(card) for card in self.plan.cards}
        blocked = 0
        while running:
            card = self.rng.choice(list(running))
            for step in running[card]:
                blocked = 0 if step else blocked + 1
                break
            else:
                del running[card]
                blocked = 0
            # A random card is very likely to have been each one by then.
            if blocked > 100 * len(self.plan.cards):
                raise WrongPlanError(f"cards {list(running)} wait for ever")
        return self

    def _steps(self, card: int):  # type: ignore[no-untyped-def]
        """Yields True after each step of the card, False where it has to wait."""
        for phase in self.plan.phases:
            out: defaultdict[int, deque[Send]] = defaultdict(deque)
            into: defaultdict[int, deque[Send]] = defaultdict(deque)
            for send in phase.sends:
                if send.source == card:
                    out[send.target].append(send)
                if send.target == card:
                    into[send.source].append(send)
            while any(out.values()) or any(into.values()):
                ready = [(out, peer) for peer in out if out[peer]]
                ready += [(into, peer) for peer in into if into[peer] and self.links[peer, card]]
                if not ready:
                    yield False
                    continue
                direction, peer = self.rng.choice(ready)
                send = direction[peer].popleft()
                if direction is out:
                    message = self.at(card, send.what).copy(), set(self.heard[card])
                    self.links[card, peer].append(message)
                else:
                    values, heard = self.links[peer, card].popleft()
                    self.put(card, send.to, values)
                    self.heard[card] |= heard
                yield True
            for local in phase.local:
                if local.card == card:
                    self._work(local)
            yield True

    def _work(self, local: Local) -> None:
        mine = self.at(local.card, local.into)
        if isinstance(local, Divide):
            values = divide(mine, len(self.plan.cards))
        else:
            values = self.at(local.card, local.operand)
            if len(values) != len(mine):
                raise WrongPlanError(f"{local} is of two sizes")
            if isinstance(local, Fold):
                values = fold(self.plan.op, mine, values)
        self.put(local.card, local.into, values.copy())


def same(a: Array, b: Array) -> bool:
    """Bit by bit."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def mistakes(plan: CollectivePlan, rng: random.Random, dtype: Any = None) -> list[str]:
    """What a run of the plan on random numbers gets wrong; nothing of a right one."""
    data = inputs(plan, rng, dtype)
    try:
        done = Interpreter(plan, data, rng).run()
    except WrongPlanError as error:
        return [str(error)]
    found = [
        f"card {card} has a wrong {region}"
        for card, parts in expected(plan, data).items()
        for region, values in parts
        if not same(done.at(card, region), values)
    ]
    if plan.kind is Kind.BARRIER:
        found += [
            f"card {card} has heard of {whom} only"
            for card, whom in done.heard.items()
            if whom != set(plan.cards)
        ]
    return found


# --- the interpreter itself -------------------------------------------------------------


def data(start: int, stop: int) -> Region:
    return Region(Buffer.DATA, start, stop)


def tmp(start: int, stop: int) -> Region:
    return Region(Buffer.TMP, start, stop)


def pair_sum(**changes: Any) -> CollectivePlan:
    """Two cards and two elements: card 0 folds and sends back."""
    plan = CollectivePlan(
        kind=Kind.ALL_REDUCE,
        algorithm="by hand",
        cards=(0, 1),
        elements=2,
        op=ReduceOp.SUM,
        tmp_elements=2,
        phases=(
            Phase((Send(1, 0, data(0, 2), tmp(0, 2)),), (Fold(0, data(0, 2), tmp(0, 2)),)),
            Phase((Send(0, 1, data(0, 2), data(0, 2)),)),
        ),
    )
    return attrs.evolve(plan, **changes)


def test_it_finds_nothing_wrong_with_a_right_plan() -> None:
    assert mistakes(pair_sum(), random.Random(1)) == []


def test_it_finds_a_missing_contribution_and_a_missing_result() -> None:
    first, second = pair_sum().phases
    without_fold = pair_sum(phases=(attrs.evolve(first, local=()), second))
    assert len(mistakes(without_fold, random.Random(1))) == 2
    assert len(mistakes(pair_sum(phases=(first,)), random.Random(1))) == 1


def test_it_finds_undefined_elements() -> None:
    plan = CollectivePlan(Kind.BROADCAST, "by hand", (0, 1), 3, (), root=0)
    assert mistakes(plan, random.Random(1)) == ["card 1 has a wrong " + str(data(0, 3))]


def test_it_finds_work_outside_a_buffer() -> None:
    assert "ends beyond" in mistakes(pair_sum(tmp_elements=1), random.Random(1))[0]


def test_in_some_order_it_finds_what_is_received_over_what_is_sent() -> None:
    swap = Phase((Send(0, 1, data(0, 1), data(0, 1)), Send(1, 0, data(0, 1), data(0, 1))))
    back = CollectivePlan(Kind.ALL_GATHER, "by hand", (0, 1), 2, (swap, swap), shares=split(2, 2))
    assert any(mistakes(back, random.Random(seed)) for seed in range(20))


def test_order_of_a_sum_shows_in_its_bits() -> None:
    folds = [Fold(2, data(0, 512), tmp(at, at + 512)) for at in (0, 512)]
    sends = tuple(Send(card, 2, data(0, 512), tmp(512 * card, 512 * card + 512)) for card in (0, 1))
    back = Phase(tuple(Send(2, card, data(0, 512), data(0, 512)) for card in (0, 1)))
    plan = CollectivePlan(
        Kind.ALL_REDUCE,
        "by hand",
        (0, 1, 2),
        512,
        (Phase(sends, tuple(folds)), back),
        op=ReduceOp.SUM,
        ordered=True,
        tmp_elements=1024,
    )
    assert mistakes(plan, random.Random(1)), "(x2 + x0) + x1 passed for (x0 + x1) + x2"
    right = [Fold(2, tmp(0, 512), tmp(512, 1024)), Fold(2, data(0, 512), tmp(0, 512))]
    assert not mistakes(
        attrs.evolve(plan, phases=(Phase(sends, tuple(right)), back)), random.Random(1)
    )


def test_an_all_to_all_by_hand_puts_shares_by_sender() -> None:
    out = [Region(Buffer.OUT, at, at + 1) for at in range(2)]
    plan = CollectivePlan(
        Kind.ALL_TO_ALL,
        "by hand",
        (5, 3),
        2,
        (
            Phase(
                (Send(5, 3, data(1, 2), out[0]), Send(3, 5, data(0, 1), out[1])),
                (Copy(5, out[0], data(0, 1)), Copy(3, out[1], data(1, 2))),
            ),
        ),
        shares=split(2, 2),
    )
    assert mistakes(plan, random.Random(1)) == []
