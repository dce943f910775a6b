# SPDX-License-Identifier: Apache-2.0
"""Ways around links that are down: the same moves, over other cards, in several phases.

A row lies at the same place on every card that has it, so a card that has received a part of it can
hand that part on.  With all links up everything is one phase, and nothing here is asked.

phases       as many as the longest way has links
bytes        each part goes once over each link of the shortest ways to those that want it
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from spanker.errors import PlanError
from spanker.sched.moves import Move, all_gather, handover
from spanker.sched.plan import Plan
from spanker.sched.shares import Share

# Directed links that are not up, as (from, to).
Down = frozenset[tuple[int, int]]
ALL_UP: Down = frozenset()


@functools.lru_cache(maxsize=64)
def gather_phases(
    cards: tuple[int, ...], shares: tuple[Share, ...], down: Down
) -> tuple[tuple[Move, ...], ...]:
    """`moves.all_gather` around links that are down; PlanError where there is no way."""
    moves = all_gather(cards, shares)
    if not any((move.source, move.target) in down for move in moves):
        return (moves,) if moves else ()
    parts = {card: share for card, share in zip(cards, shares, strict=True) if not share.empty}
    return _in_phases(
        (
            (_ways((card,), [c for c in cards if c != card], (), down), share)
            for card, share in parts.items()
        )
    )


def handover_phases(
    sources: Sequence[int], targets: Sequence[int], row: int, down: Down
) -> tuple[tuple[Move, ...], ...]:
    """`moves.handover` around links that are down; PlanError where there is no way."""
    moves = handover(sources, targets, row)
    if not any((move.source, move.target) in down for move in moves):
        return (moves,)
    return _in_phases([(_ways(sources, targets, (), down), Share(0, row))])


def choice_phases(
    voters: Sequence[int], embedders: Sequence[int], down: Down
) -> tuple[tuple[Move, ...], ...]:
    """Every embedder gets what each voter has: the part of voter i is [i, i + 1).  Other voters may
    hand it on.  PlanError where there is no way."""
    relays = [voter for voter in voters if voter not in embedders]
    return _in_phases(
        (
            _ways((voter,), [e for e in embedders if e != voter], relays, down),
            Share(place, place + 1),
        )
        for place, voter in enumerate(voters)
    )


def check_ways(plan: Plan, down: Down) -> None:
    """PlanError where cards of a plan that must hear of each other cannot, even over others of the
    plan's."""
    if not down:
        return
    for stage in plan.stages:
        whole = tuple(Share(i, i + 1) for i in range(len(stage.cards)))
        gather_phases(stage.cards, whole, down)
    for before, after in zip(plan.stages, plan.stages[1:], strict=False):
        handover_phases(before.cards, after.cards, 1, down)
    choice_phases(plan.voters, plan.embedders, down)


def reaching(cards: Sequence[int], down: Down) -> tuple[tuple[int, ...], ...]:
    """The cards in groups within which each can reach each, the largest group first."""
    groups: list[tuple[int, ...]] = []
    left = list(cards)
    while left:
        there = _reached(left[0], left, lambda a, b: (a, b) not in down)
        back = _reached(left[0], left, lambda a, b: (b, a) not in down)
        group = tuple(card for card in left if card in there and card in back)
        groups.append(group)
        left = [card for card in left if card not in group]
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def meshed(cards: Sequence[int], down: Down) -> tuple[int, ...]:
    """The largest group found of cards between which all links are up: any plan has ways there."""
    groups = []
    for first in cards:
        group = [first]
        for card in cards:
            both_ways = all((card, c) not in down and (c, card) not in down for c in group)
            if card != first and both_ways:
                group.append(card)
        groups.append(tuple(sorted(group)))
    return max(groups, key=len)


def _reached(first: int, cards: Sequence[int], is_up: Callable[[int, int], bool]) -> set[int]:
    found, front = {first}, [first]
    while front:
        card = front.pop()
        new = [c for c in cards if c not in found and is_up(card, c)]
        found.update(new)
        front += new
    return found


# Who gets something from whom, and in which phase, by who gets it.
_Ways = Mapping[int, tuple[int, int]]


def _ways(
    holders: Sequence[int], wanting: Sequence[int], relays: Sequence[int], down: Down
) -> _Ways:
    """The shortest ways from those who hold something to those who want it, over each other and
    over relays."""
    parents: dict[int, tuple[int, int]] = {}
    front, phase = list(holders), 0
    left = [card for card in (*wanting, *relays) if card not in holders]
    while left and front:
        reached: dict[int, tuple[int, int]] = {}
        for place, card in enumerate(left):
            up = [source for source in front if (source, card) not in down]
            if up:
                # In turn, as a handover does it.
                reached[card] = up[place % len(up)], phase
        parents.update(reached)
        left = [card for card in left if card not in reached]
        # Whoever got it later only is asked by those whom nobody reached before.
        front, phase = list(reached), phase + 1
    missing = [card for card in wanting if card not in parents and card not in holders]
    if missing:
        raise PlanError(
            f"card {missing[0]} cannot be reached from card {holders[0]}: too many links are down"
        )
    needed: dict[int, tuple[int, int]] = {}
    for card in wanting:
        while card in parents and card not in needed:
            needed[card] = parents[card]
            card = parents[card][0]
    return needed


def _in_phases(ways: Iterable[tuple[_Ways, Share]]) -> tuple[tuple[Move, ...], ...]:
    phases: list[list[Move]] = []
    for parents, part in ways:
        for target, (source, phase) in sorted(parents.items()):
            while len(phases) <= phase:
                phases.append([])
            phases[phase].append(Move(source, target, part))
    return tuple(tuple(moves) for moves in phases)
