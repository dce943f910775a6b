# SPDX-License-Identifier: Apache-2.0
"""Collectives, run symbolically: who holds which element of a row after the moves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from spanker.sched.moves import Move, all_gather, handover
from spanker.sched.shares import Share, split


def run(moves: Sequence[Move], held: dict[int, set[int]]) -> dict[int, set[int]]:
    """What each card holds after all moves at once; asserts that none is senseless."""
    after = {card: set(elements) for card, elements in held.items()}
    links: set[tuple[int, int]] = set()
    for move in moves:
        elements = set(range(move.part.start, move.part.stop))
        assert move.source != move.target, "a card sends to itself"
        assert elements, "nothing is sent"
        assert elements <= held[move.source], "a card sends what it does not hold yet"
        assert not elements & after[move.target], "a card gets an element twice"
        assert (move.source, move.target) not in links, "a link is used twice"
        links.add((move.source, move.target))
        after[move.target] |= elements
    return after


@pytest.mark.parametrize("count", range(1, 17))
def test_after_an_all_gather_everyone_holds_everything(count: int) -> None:
    rng = random.Random(count)
    for row in (0, 1, 16, 17, 576, 1000):
        for weights in (None, [rng.choice((0, 0, 1, 5)) + (i == 0) for i in range(count)]):
            cards = tuple(rng.sample(range(64), count))
            shares = split(row, count, unit=16, weights=weights)
            held = {c: set(range(s.start, s.stop)) for c, s in zip(cards, shares, strict=True)}
            moves = all_gather(cards, shares)
            after = run(moves, held)
            assert all(elements == set(range(row)) for elements in after.values())
            # Each share leaves its card once for every other card, and nothing else moves.
            assert sum(m.part.size for m in moves) == row * (count - 1)


def test_cards_without_a_share_only_receive() -> None:
    moves = all_gather((4, 5, 6), (Share(0, 8), Share(8, 8), Share(8, 9)))
    assert {m.source for m in moves} == {4, 6}
    assert {m.target for m in moves} == {4, 5, 6}


def test_as_many_shares_as_cards_are_needed() -> None:
    with pytest.raises(ValueError):
        all_gather((0, 1), (Share(0, 1),))


@pytest.mark.parametrize("sources", range(1, 6))
@pytest.mark.parametrize("targets", range(1, 6))
def test_after_a_handover_every_target_holds_the_row(sources: int, targets: int) -> None:
    row = 96
    from_cards, to_cards = range(sources), range(10, 10 + targets)
    held = {c: set(range(row)) for c in from_cards} | {c: set() for c in to_cards}
    moves = handover(from_cards, to_cards, row)
    after = run(moves, held)
    assert all(after[c] == set(range(row)) for c in to_cards)
    sent = [sum(m.source == c for m in moves) for c in from_cards]
    assert max(sent) - min(sent) <= 1, "the sources share the work"
