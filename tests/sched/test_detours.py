# SPDX-License-Identifier: Apache-2.0
"""Ways around links that are down: everything gets everywhere, over links that are up alone where
they lead there, and over the host only where they do not.

A failing case is replayed by its name: the graph is drawn from the seed in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from spanker.errors import PlanError
from spanker.sched.detours import (
    ALL_UP,
    Down,
    check_ways,
    choice_phases,
    gather_phases,
    handover_phases,
    over_host,
    reaching,
)
from spanker.sched.moves import Move, all_gather, handover
from spanker.sched.plan import tensor_pipeline
from spanker.sched.shapes import named_shape
from spanker.sched.shares import Share

Phases = Sequence[Sequence[Move]]


def drawn(seed: int) -> tuple[tuple[int, ...], Down]:
    """Cards, in any order, and links that are down."""
    draw = random.Random(seed)
    cards = draw.sample(range(12), draw.randint(1, 8))
    part = draw.choice((0.0, 0.1, 0.3, 0.5, 0.8))
    pairs = [(a, b) for a in cards for b in cards if a != b and draw.random() < part]
    if draw.random() < 0.7:
        pairs += [(b, a) for a, b in pairs]
    return tuple(cards), frozenset(pairs)


def carried(phases: Phases, held: dict[int, set[int]], down: Down) -> dict[int, set[int]]:
    """Which elements each card has after the phases; each sends only what it had before one."""
    first = {card: set(has) for card, has in held.items()}
    for moves in phases:
        before = {card: set(has) for card, has in held.items()}
        for move in moves:
            if (move.source, move.target) in down:
                reached = {c for c in first if set(range(*_ends(move))) <= first[c]}
                reached = {r for c in reached for r in reach(c, first, down)}
                assert move.target not in reached, "over the host, though links lead there"
            part = set(range(move.part.start, move.part.stop))
            assert part <= before[move.source], "sent before it was there"
            assert not part & held[move.target], "sent twice"
            held[move.target] |= part
    return held


def _ends(move: Move) -> tuple[int, int]:
    return move.part.start, move.part.stop


def reach(first: int, cards: Iterable[int], down: Down) -> set[int]:
    """By another way than the code: powers of the relation."""
    found = {first}
    for _ in range(12):
        found |= {b for a in found for b in cards if (a, b) not in down}
    return found


@pytest.mark.parametrize("seed", range(200))
def test_a_gather_brings_every_part_to_every_card(seed: int) -> None:
    cards, down = drawn(seed)
    draw = random.Random(-seed)
    sizes = [draw.choice((0, 1, 3)) for _ in cards]
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    shares = tuple(Share(edges[i], edges[i + 1]) for i in range(len(cards)))
    held = {c: set(range(s.start, s.stop)) for c, s in zip(cards, shares, strict=True)}
    phases = gather_phases(cards, shares, down)
    whole = set(range(sum(sizes)))
    assert all(has == whole for has in carried(phases, held, down).values())


@pytest.mark.parametrize("seed", range(200))
def test_a_handover_brings_the_row_to_every_target(seed: int) -> None:
    cards, down = drawn(seed)
    half = max(1, len(cards) // 2)
    sources, targets = cards[:half], cards[half:]
    held = {c: set(range(5)) if c in sources else set[int]() for c in cards}
    after = carried(handover_phases(sources, targets, 5, down), held, down)
    assert all(after[c] == set(range(5)) for c in targets)


@pytest.mark.parametrize("seed", range(200))
def test_every_vote_comes_to_every_embedder(seed: int) -> None:
    cards, down = drawn(seed)
    draw = random.Random(-seed)
    voters = draw.sample(cards, draw.randint(1, len(cards)))
    embedders = draw.sample(cards, draw.randint(1, len(cards)))
    # Others know nothing of votes, and hand none on.
    held = {c: {voters.index(c)} if c in voters else set() for c in {*voters, *embedders}}
    after = carried(choice_phases(voters, embedders, down), held, down)
    assert all(after[c] == set(range(len(voters))) for c in embedders)


def test_with_all_links_up_everything_goes_straight() -> None:
    cards = (2, 0, 5)
    shares = (Share(0, 4), Share(4, 4), Share(4, 9))
    assert gather_phases(cards, shares, ALL_UP) == (all_gather(cards, shares),)
    assert handover_phases((0, 1), (2, 3, 4), 8, ALL_UP) == (handover((0, 1), (2, 3, 4), 8),)
    straight = [(v, e) for v in (3, 4) for e in (3, 7) if v != e]
    (only,) = choice_phases((3, 4), (3, 7), ALL_UP)
    assert [(m.source, m.target) for m in only] == straight


def test_a_gather_without_anything_to_send_has_no_phase() -> None:
    assert gather_phases((1,), (Share(0, 4),), ALL_UP) == ()


def test_one_link_down_costs_one_more_phase_of_what_went_over_it() -> None:
    shares = tuple(Share(i, i + 1) for i in range(4))
    down = frozenset({(0, 2), (2, 0)})
    first, second = gather_phases((0, 1, 2, 3), shares, down)
    assert len(first) == 10
    assert {(m.target, m.part) for m in second} == {(2, shares[0]), (0, shares[2])}


@pytest.mark.parametrize("seed", range(100))
def test_groups_reach_each_other_within_and_not_between(seed: int) -> None:
    cards, down = drawn(seed)
    groups = reaching(cards, down)
    assert sorted(c for group in groups for c in group) == sorted(cards)
    assert [len(g) for g in groups] == sorted((len(g) for g in groups), reverse=True)
    both = {
        frozenset((a, b))
        for a in cards
        for b in cards
        if b in reach(a, cards, down) and a in reach(b, cards, down)
    }
    for group in groups:
        assert all(frozenset((a, b)) in both for a in group for b in group)
    for one in groups:
        for other in groups:
            if one is not other:
                assert frozenset((one[0], other[0])) not in both


@pytest.mark.parametrize("stages", [1, 2])
def test_a_plan_is_told_to_have_ways_or_not(stages: int) -> None:
    shape = named_shape("tinyllama")
    plan = tensor_pipeline(shape, 4 // stages, stages)
    check_ways(plan, ALL_UP)
    check_ways(plan, frozenset({(0, 1), (1, 0)}) if stages == 1 else frozenset({(0, 2), (2, 0)}))
    lonely = frozenset((a, b) for a in range(4) for b in range(4) if 3 in (a, b) and a != b)
    assert over_host(plan, ALL_UP) == ()
    assert {3} <= {card for pair in over_host(plan, lonely) for card in pair}
    with pytest.raises(PlanError, match=r"card \d cannot be reached from card \d"):
        check_ways(plan, lonely)
