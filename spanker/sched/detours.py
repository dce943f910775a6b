# SPDX-License-Identifier: Apache-2.0
"""Ways around links that are down: the same moves, over other cards, in several phases.

A row lies at the same place on every card that has it, so a card that has received a part of it can
hand that part on.  With all links up everything is one phase, and nothing here is asked.  Where no
card leads on, the host does: a move over a link that is down stands for that.

phases       as many as the longest way has links
bytes        each part goes once over each link of the shortest ways to those that want it, and
             once over the host to each group of them that links join with no holder
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
    """`moves.all_gather` around links that are down."""
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
    """`moves.handover` around links that are down."""
    moves = handover(sources, targets, row)
    if not any((move.source, move.target) in down for move in moves):
        return (moves,)
    return _in_phases([(_ways(sources, targets, (), down), Share(0, row))])


def choice_phases(
    voters: Sequence[int], embedders: Sequence[int], down: Down
) -> tuple[tuple[Move, ...], ...]:
    """Every embedder gets what each voter has: the part of voter i is [i, i + 1).  Other voters may
    hand it on."""
    relays = [voter for voter in voters if voter not in embedders]
    return _in_phases(
        (
            _ways((voter,), [e for e in embedders if e != voter], relays, down),
            Share(place, place + 1),
        )
        for place, voter in enumerate(voters)
    )


def over_host(plan: Plan, down: Down) -> tuple[tuple[int, int], ...]:
    """From which card to which something goes over the host in a step of a plan, as not even others
    of the plan's cards lead there."""
    if not down:
        return ()
    found = {
        (move.source, move.target)
        for phases in _all_phases(plan, down)
        for moves in phases
        for move in moves
    }
    return tuple(sorted(found & down))


def _all_phases(plan: Plan, down: Down) -> Iterator[tuple[tuple[Move, ...], ...]]:
    for stage in plan.stages:
        whole = tuple(Share(i, i + 1) for i in range(len(stage.cards)))
        yield gather_phases(stage.cards, whole, down)
    for before, after in zip(plan.stages, plan.stages[1:], strict=False):
        yield handover_phases(before.cards, after.cards, 1, down)
    yield choice_phases(plan.voters, plan.embedders, down)


def check_ways(plan: Plan, down: Down) -> None:
    """PlanError where cards of a plan that must hear of each other cannot but over the host, even
    over others of the plan's."""
    for source, target in over_host(plan, down):
        raise PlanError(
            f"card {target} cannot be reached from card {source}: too many links are down"
        )


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
    over relays; where links lead to some of them only, over the host to one of the others, and on
    from there."""
    parents: dict[int, tuple[int, int]] = {}
    front, phase = list(holders), 0
    left = [card for card in (*wanting, *relays) if card not in holders]
    while left:
        if not front:
            cut_off = [card for card in left if card in wanting]
            if not cut_off:
                break
            # Holders in turn: from the first phase on nothing keeps them from it.
            source = holders[len(parents) % len(holders)]
            parents[cut_off[0]] = source, 0
            left.remove(cut_off[0])
            front, phase = cut_off[:1], 1
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
