# SPDX-License-Identifier: Apache-2.0
"""`verify` takes what the catalogue makes, and refuses what is wrong with a text that says what.

Mutants are judged twice: what `verify` still takes must do the right thing in the interpreter,
which knows nothing of intervals.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from test_collective_catalog import connected, named, plan_for
from test_collective_interpreter import data, mistakes, pair_sum, tmp

from spanker.errors import PlanError
from spanker.sched import Link, LinkState, Share, Topology, split
from spanker.sched.collectives import (
    Buffer,
    CollectivePlan,
    Copy,
    Divide,
    Fold,
    Kind,
    Phase,
    ReduceOp,
    Region,
    Send,
    make,
)
from spanker.sched.verify import verify

MESH = Topology.with_mock(4)


# --- mutants ------------------------------------------------------------------------------

Mutation = Callable[[CollectivePlan, random.Random], CollectivePlan]


def at_phase(plan: CollectivePlan, number: int, **changes: Any) -> CollectivePlan:
    phases = list(plan.phases)
    phases[number] = attrs.evolve(phases[number], **changes)
    return attrs.evolve(plan, phases=tuple(phases))


def some(plan: CollectivePlan, rng: random.Random, field: str) -> tuple[int, int]:
    """A random phase with sends (or local work), and one of them."""
    places = [
        (number, i)
        for number, phase in enumerate(plan.phases)
        for i in range(len(getattr(phase, field)))
    ]
    if not places:
        raise LookupError
    return rng.choice(places)


def without(row: tuple[Any, ...], i: int) -> tuple[Any, ...]:
    return row[:i] + row[i + 1 :]


def replaced(row: tuple[Any, ...], i: int, *new: Any) -> tuple[Any, ...]:
    return row[:i] + new + row[i + 1 :]


def moved(region: Region, by_start: int, by_stop: int) -> Region:
    try:
        return Region(region.buffer, region.start + by_start, region.stop + by_stop)
    except PlanError:
        raise LookupError from None


def drop(field: str) -> Mutation:
    def mutate(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
        number, i = some(plan, rng, field)
        return at_phase(plan, number, **{field: without(getattr(plan.phases[number], field), i)})

    return mutate


def repeat(field: str) -> Mutation:
    """Once more, in the same phase or another."""

    def mutate(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
        number, i = some(plan, rng, field)
        one = getattr(plan.phases[number], field)[i]
        other = rng.randrange(len(plan.phases))
        return at_phase(plan, other, **{field: (*getattr(plan.phases[other], field), one)})

    return mutate


def redirect(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
    number, i = some(plan, rng, "sends")
    send = plan.phases[number].sends[i]
    other = rng.choice([card for card in plan.cards if card not in (send.source, send.target)])
    new = attrs.evolve(send, **{rng.choice(("source", "target")): other})
    return at_phase(plan, number, sends=replaced(plan.phases[number].sends, i, new))


def other_place(field: str) -> Mutation:
    """Some of the regions of a send or of local work a little shorter, or elsewhere."""

    def mutate(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
        number, i = some(plan, rng, field)
        one = getattr(plan.phases[number], field)[i]
        names = [name for name in ("what", "to", "into", "operand") if hasattr(one, name)]
        by = rng.choice([(0, -1), (1, 0), (1, 1), (-1, -1)])
        for name in rng.choice([names, names[:1], names[1:] or names]):
            one = attrs.evolve(one, **{name: moved(getattr(one, name), *by)})
        new = replaced(getattr(plan.phases[number], field), i, one)
        return at_phase(plan, number, **{field: new})

    return mutate


def other_phase(field: str) -> Mutation:
    def mutate(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
        number, i = some(plan, rng, field)
        one = getattr(plan.phases[number], field)[i]
        plan = drop_at(plan, field, number, i)
        other = rng.randrange(len(plan.phases))
        return at_phase(plan, other, **{field: (*getattr(plan.phases[other], field), one)})

    return mutate


def drop_at(plan: CollectivePlan, field: str, number: int, i: int) -> CollectivePlan:
    return at_phase(plan, number, **{field: without(getattr(plan.phases[number], field), i)})


def other_order(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
    number, i = some(plan, rng, "local")
    local = list(plan.phases[number].local)
    local.insert(rng.randrange(len(local)), local.pop(i))
    return at_phase(plan, number, local=tuple(local))


def swapped_phases(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
    if len(plan.phases) < 2:
        raise LookupError
    phases = list(plan.phases)
    i = rng.randrange(len(phases) - 1)
    phases[i : i + 2] = phases[i + 1], phases[i]
    return attrs.evolve(plan, phases=tuple(phases))


def other_work(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
    """A fold where there was a copy, on another card, or of operands exchanged."""
    number, i = some(plan, rng, "local")
    local = plan.phases[number].local[i]
    if isinstance(local, Divide):
        new: Any = attrs.evolve(local, card=rng.choice(plan.cards))
    else:
        new = rng.choice(
            (
                (Copy if isinstance(local, Fold) else Fold)(local.card, local.into, local.operand),
                type(local)(local.card, local.operand, local.into),
                type(local)(rng.choice(plan.cards), local.into, local.operand),
            )
        )
    return at_phase(plan, number, local=replaced(plan.phases[number].local, i, new))


def other_tmp(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
    size = plan.tmp_elements + rng.choice((-1, 1))
    return attrs.evolve(plan, tmp_elements=max(size, 0))


def other_head(plan: CollectivePlan, rng: random.Random) -> CollectivePlan:
    """Another card order, root, operation or share: the same phases are for something else then."""
    cards = list(plan.cards)
    rng.shuffle(cards)
    changes: list[dict[str, Any]] = [{"cards": tuple(cards)}]
    if plan.root is not None:
        changes.append({"root": rng.choice(plan.cards)})
    if plan.op is not None:
        changes.append({"op": rng.choice(list(ReduceOp))})
    if plan.shares and plan.kind is not Kind.ALL_TO_ALL:
        weights = [rng.random() for _ in plan.cards]
        changes.append({"shares": split(plan.elements, len(plan.cards), weights=weights)})
    return attrs.evolve(plan, **rng.choice(changes))


MUTATIONS: dict[str, Mutation] = {
    "a send less": drop("sends"),
    "a send twice": repeat("sends"),
    "a send redirected": redirect,
    "a send elsewhere": other_place("sends"),
    "a send in another phase": other_phase("sends"),
    "local work less": drop("local"),
    "local work twice": repeat("local"),
    "local work elsewhere": other_place("local"),
    "local work in another phase": other_phase("local"),
    "other local work": other_work,
    "local work in another order": other_order,
    "phases swapped": swapped_phases,
    "more or less TMP": other_tmp,
    "for something else": other_head,
}


def refused(plan: CollectivePlan, topology: Topology) -> bool:
    try:
        verify(plan, topology)
    except PlanError:
        return True
    return False


def hunt(seed: int, plans: int, each: int) -> tuple[Counter[str], Counter[str]]:
    """How many mutants of random plans were refused, and how many taken, by mutation; asserts that
    those taken are right."""
    rng = random.Random(seed)
    print("seed", seed)
    choices = list(named())
    gone: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for _ in range(plans):
        n = rng.randint(3, 6)
        topology = rng.choice(
            [Topology.with_mock(n), Topology.ring(n), Topology.line(n), connected(n, rng)]
        )
        plan = plan_for(*rng.choice(choices), topology, rng.choice((1, 7, 24)), rng)
        if plan is None or not plan.phases:
            continue
        for _ in range(each):
            name = rng.choice(list(MUTATIONS))
            try:
                mutant = MUTATIONS[name](plan, rng)
            except LookupError:
                continue
            if mutant == plan:
                continue
            if refused(mutant, topology):
                gone[name] += 1
                continue
            taken[name] += 1
            for _ in range(5):
                assert mistakes(mutant, rng) == [], (name, mutant)
    return gone, taken


def test_mutants_are_refused_or_right() -> None:
    gone, taken = hunt(seed=20_261_124, plans=400, each=10)
    print("refused", gone, "taken", taken)
    assert set(gone) == set(MUTATIONS)
    assert gone.total() > 1000
    # A send from another card that has the same, or a phase earlier, may well be right; these not.
    never = {"a send less", "local work less", "local work twice", "more or less TMP"}
    assert not never & set(taken)
    assert taken.total() < 0.2 * gone.total()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_many_mutants_are_refused_or_right(seed: int) -> None:
    hunt(seed, plans=1000, each=20)


def test_a_fold_in_another_order_is_refused_where_the_order_counts() -> None:
    for seed in range(10):
        rng = random.Random(seed)
        plan = make("all-reduce", 4, 16, algorithm="owner")
        number, i = some(plan, rng, "local")
        folds = plan.phases[number].local
        mine = [j for j, fold in enumerate(folds) if fold.card == folds[i].card]
        swapped = list(folds)
        swapped[mine[0]], swapped[mine[-1]] = swapped[mine[-1]], swapped[mine[0]]
        wrong = at_phase(plan, number, local=tuple(swapped))
        assert refused(wrong, MESH)
        assert mistakes(wrong, rng)


# --- what the texts say -------------------------------------------------------------------


def gather(**changes: Any) -> CollectivePlan:
    """Four cards and eight elements, direct."""
    return attrs.evolve(make("all-gather", 4, 8, algorithm="direct"), **changes)


def refusal(plan: CollectivePlan, topology: Topology = MESH) -> str:
    with pytest.raises(PlanError) as caught:
        verify(plan, topology)
    return str(caught.value)


def test_a_send_over_a_link_that_is_not_up_is_named() -> None:
    links = [
        Link(a, b, LinkState.ERROR if (a, b) == (2, 1) else LinkState.UP)
        for a in range(4)
        for b in range(4)
        if a != b and (a, b) != (3, 0)
    ]
    topology = Topology((0, 1, 2, 3), tuple(links))
    assert refusal(gather(), topology) == (
        "all-gather 'direct' over 4 cards, phase 0, send 2 -> 1: expected a link that is up, got "
        "one that is ERROR"
    )
    links = [link for link in links if link.state is LinkState.UP]
    topology = Topology((0, 1, 2, 3), (*links, Link(2, 1, LinkState.UP)))
    assert refusal(gather(), topology) == (
        "all-gather 'direct' over 4 cards, phase 0, send 3 -> 0: expected a link that is up, got "
        "none"
    )


def test_an_undefined_element_is_named() -> None:
    plan = gather(phases=gather().phases[:0])
    assert refusal(plan) == (
        "all-gather 'direct' over 4 cards, card 0, in the end: expected data[2, 4) of card 0 to be "
        "defined, got nothing at data[2]"
    )
    early = pair_sum(phases=pair_sum().phases[1:], tmp_elements=0, kind=Kind.BROADCAST, op=None)
    assert refusal(attrs.evolve(early, root=1)) == (
        "broadcast 'by hand' over 2 cards, phase 0, send 0 -> 1: expected data[0, 2) of card 0 to "
        "be defined, got nothing at data[0]"
    )


def test_receives_on_top_of_each_other_are_named() -> None:
    sends = (*gather().phases[0].sends, Send(1, 0, data(2, 4), data(3, 5)))
    assert refusal(gather(phases=(Phase(sends),))) == (
        "all-gather 'direct' over 4 cards, phase 0, card 0: expected receives side by side, got "
        "data[2, 4) from 1 over [3, 5) from 1"
    )


def test_what_is_received_over_what_is_sent_is_named() -> None:
    plan = gather(phases=(Phase((Send(0, 1, data(0, 2), data(0, 2)),)), *gather().phases))
    phases = (*plan.phases[:1], Phase((*plan.phases[1].sends, Send(1, 0, data(0, 1), data(0, 1)))))
    assert refusal(attrs.evolve(plan, phases=phases)) == (
        "all-gather 'direct' over 4 cards, phase 1, card 0: expected nothing received over "
        "data[0, 2), which is sent to 1; got data[0, 1) from 1"
    )


def test_regions_outside_their_buffers_are_named() -> None:
    assert refusal(pair_sum(tmp_elements=1)) == (
        "all-reduce 'by hand' over 2 cards, phase 0, send 1 -> 0: expected a region of tmp[0, 1), "
        "got tmp[0, 2)"
    )
    assert refusal(pair_sum(tmp_elements=3)) == (
        "all-reduce 'by hand' over 2 cards: expected tmp_elements 2, got 3"
    )


def test_a_contribution_twice_is_named() -> None:
    first, second = pair_sum().phases
    twice = attrs.evolve(first, local=first.local * 2)
    assert refusal(pair_sum(phases=(twice, second))) == (
        "all-reduce 'by hand' over 2 cards, phase 0, card 0, fold: expected no contribution twice, "
        "got in data[0, 2) x0 + x1 of elements [0, 2) and in tmp[0, 2) x1 of elements [0, 2)"
    )


def test_a_contribution_to_other_elements_is_named() -> None:
    first, second = pair_sum().phases
    crossed = attrs.evolve(
        first, local=(Fold(0, data(0, 1), tmp(1, 2)), Fold(0, data(1, 2), tmp(0, 1)))
    )
    assert refusal(pair_sum(phases=(crossed, second))) == (
        "all-reduce 'by hand' over 2 cards, phase 0, card 0, fold: expected contributions to the "
        "same elements, not divided, got in data[0, 1) x0 of elements [0, 1) and in tmp[1, 2) x1 "
        "of elements [1, 2)"
    )


def test_a_wrong_order_is_named() -> None:
    sends = tuple(Send(card, 3, data(0, 4), tmp(4 * card, 4 * card + 4)) for card in range(3))
    folds = tuple(Fold(3, data(0, 4), tmp(at, at + 4)) for at in (8, 4, 0))
    back = Phase(tuple(Send(3, card, data(0, 4), data(0, 4)) for card in range(3)))
    plan = CollectivePlan(
        Kind.ALL_REDUCE,
        "backwards",
        (0, 1, 2, 3),
        4,
        (Phase(sends, folds), back),
        op=ReduceOp.SUM,
        tmp_elements=12,
    )
    verify(plan, MESH)
    assert refusal(attrs.evolve(plan, ordered=True)) == (
        "all-reduce 'backwards' over 4 cards, phase 0, card 3, fold: expected the contributions of "
        "the first cards, and that of the next, got in data[0, 4) x3 of elements [0, 4) and in "
        "tmp[8, 12) x2 of elements [0, 4)"
    )


def test_a_missing_contribution_is_named() -> None:
    plan = make("all-reduce", 4, 8, algorithm="direct", ordered=False)
    first = plan.phases[0]
    fold = first.local[0]
    assert refusal(at_phase(plan, 0, local=first.local[1:])) == (
        "all-reduce 'direct' over 4 cards, card 0, in the end: expected data[0, 2) to hold "
        "x0 + x1 + x2 + x3 of elements [0, 2), got x0 + x2 + x3 of elements [0, 2)"
    ), fold


def test_an_average_is_divided_once_and_last() -> None:
    average = pair_sum(op=ReduceOp.AVG)
    assert "expected data[0, 2) to hold (x0 + x1)/2" in refusal(average)
    first, second = average.phases
    divide = Divide(0, data(0, 2))
    verify(
        attrs.evolve(average, phases=(attrs.evolve(first, local=(*first.local, divide)), second)),
        MESH,
    )
    for local in ((divide, *first.local), (*first.local, divide, divide)):
        text = refusal(attrs.evolve(average, phases=(attrs.evolve(first, local=local), second)))
        assert "divide: expected data[0, 2) to hold all contributions, not yet divided" in text
    assert "divide: has no place in a all-reduce with sum" in refusal(
        pair_sum(phases=(attrs.evolve(first, local=(*first.local, divide)), second))
    )


def test_what_nobody_needs_is_named() -> None:
    plan = gather()
    again = attrs.evolve(plan, phases=(*plan.phases, Phase(plan.phases[0].sends[:1])))
    assert refusal(again) == (
        "all-gather 'direct' over 4 cards, phase 0, send 0 -> 1: expected all of data[0, 2) on "
        "card 1 to be needed, got nothing that depends on data[0]"
    )
    idle = pair_sum(phases=(*pair_sum().phases, Phase(local=(Copy(1, tmp(0, 2), data(0, 2)),))))
    assert "phase 2, card 1, copy: expected all of tmp[0, 2) on card 1 to be needed" in refusal(
        idle
    )


def test_a_barrier_that_leaves_someone_out_is_named() -> None:
    plan = make("barrier", 4, 0, algorithm="doubling")
    assert refusal(attrs.evolve(plan, phases=plan.phases[:1])).endswith(
        "card 0, in the end: expected to have heard of card 1"
    )
    sends = (attrs.evolve(plan.phases[0].sends[0], what=tmp(1, 2)), *plan.phases[0].sends[1:])
    assert "expected a barrier's token, tmp[0, 1), got tmp[1, 2)" in refusal(
        at_phase(plan, 0, sends=sends)
    )


def test_more_transfers_than_a_card_takes_in_a_phase_are_named() -> None:
    sends = tuple(
        Send(a, b, data(at, at + 1), data(at, at + 1))
        for a, b, first in ((0, 1, 0), (1, 0, 300))
        for at in range(first, first + 300)
    )
    plan = CollectivePlan(
        Kind.ALL_GATHER, "in crumbs", (0, 1), 600, (Phase(sends),), shares=split(600, 2)
    )
    assert refusal(plan) == (
        "all-gather 'in crumbs' over 2 cards, phase 0, card 0: expected at most 512 sends and "
        "receives, got 600"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cards": ()}, "expected 1 to 256 different cards, got ()"),
        ({"cards": (0, 1, 1, 2)}, "expected 1 to 256 different cards, got (0, 1, 1, 2)"),
        ({"cards": (0, 1, 2, 9)}, "expected cards of (0, 1, 2, 3), got (0, 1, 2, 9)"),
        ({"op": ReduceOp.SUM}, "expected an op for reductions and only there"),
        ({"ordered": True}, "expected an order for reductions only, got ordered"),
        ({"root": 0}, "expected a card as root of a broadcast only, got 0"),
        ({"kind": Kind.BROADCAST, "shares": ()}, "expected a card as root of a broadcast only"),
        ({"shares": split(8, 3)}, "expected 4 shares, got 3"),
        ({"shares": split(7, 4)}, "expected shares of 8 elements in all, got 7"),
        (
            {"shares": (Share(0, 2), Share(3, 4), Share(4, 6), Share(6, 8))},
            "share of card 1: expected start 2, got 3",
        ),
        (
            {"kind": Kind.ALL_TO_ALL, "shares": split(8, 4, weights=(1, 1, 1, 5))},
            "expected shares of one size, got [1, 1, 1, 5]",
        ),
        ({"kind": Kind.BARRIER, "shares": ()}, "or, but for a barrier, more: 8"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(gather(**changes))


def test_sends_and_work_that_make_no_sense_are_refused() -> None:
    sends = gather().phases[0].sends
    for send, message in (
        (Send(0, 9, data(0, 2), data(0, 2)), "send 0 -> 9: expected cards of the plan"),
        (Send(0, 1, data(0, 0), data(0, 0)), "expected something to work on, got data[0, 0)"),
        (Send(0, 1, data(0, 2), data(0, 1)), "expected as many elements on both sides"),
        (
            Send(0, 1, data(0, 2), Region(Buffer.OUT, 0, 2)),
            "expected a region of out[0, 0), got out[0, 2)",
        ),
    ):
        assert message in refusal(gather(phases=(Phase((*sends[1:], send)),)))
    work = (
        (Fold(0, data(0, 2), data(2, 4)), "fold: has no place in a all-gather with no reduction"),
        (Copy(0, data(0, 2), data(1, 3)), "expected two regions apart"),
        (Copy(9, data(0, 2), data(2, 4)), "card 9, copy: expected a card of the plan"),
    )
    for local, message in work:
        assert message in refusal(gather(phases=(Phase(sends, (local,)),)))


def test_sixty_four_cards_and_a_million_elements_take_seconds_at_most() -> None:
    plan = make("all-reduce", 64, 1_000_003, algorithm="ring", ordered=False)
    start = time.perf_counter()
    verify(plan, Topology.with_mock(64))
    # 0.2 s where it was written; far from what single elements would take.
    assert time.perf_counter() - start < 20
