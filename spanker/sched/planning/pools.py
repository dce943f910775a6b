# SPDX-License-Identifier: Apache-2.0
"""Which cards are alike, and the sets of cards that the planner considers.

Two cards are alike when exchanging them would change nothing: same speed, same free memory, same
links to all others.  Of cards that are alike only their number counts, so 64 equal cards are 64
possible stages and not 2^64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import attrs

from spanker.sched.cost.machine import Machine
from spanker.values import Value

# Stages times what is used before them, that the dynamic programme goes through at most.
PAIRS_MAX = 9000

State = tuple[int, ...]
"""How many cards of each class are used."""


def classes(machine: Machine, free_bytes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The cards in classes of those that are alike, in order of their lowest numbers."""
    found: list[list[int]] = []
    for card in machine.cards:
        for alike in found:
            if _alike(machine, free_bytes, alike[0], card):
                alike.append(card)
                break
        else:
            found.append([card])
    return tuple(map(tuple, found))


def _alike(machine: Machine, free_bytes: Sequence[int], a: int, b: int) -> bool:
    profile, topology = machine.profile, machine.topology
    speeds = [(s.memory, s.compute) for s in (profile.card(a), profile.card(b))]
    if speeds[0] != speeds[1] or free_bytes[a] != free_bytes[b]:
        return False
    if machine.uniform:
        return True

    def link(source: int, target: int) -> tuple[bool, float, float]:
        speed = profile.link(source, target)
        return topology.is_up(source, target), speed.bytes_per_s, speed.latency_s

    return link(a, b) == link(b, a) and all(
        link(a, x) == link(b, x) and link(x, a) == link(x, b)
        for x in machine.cards
        if x not in (a, b)
    )


@attrs.frozen(eq=False, repr=False)
class Kind(Value):
    """A set of cards that can be a stage, as numbers of each class; `cards` stand for all alike."""

    counts: State
    cards: tuple[int, ...]


class Pool:
    """Cards to choose stages from, and the order in which sets of them can be used up.

    With few classes every set of cards is considered (`complete`).  With many, the cards stand in a
    row, class by class, and stages are neighbours in it.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = tuple(tuple(group) for group in groups if group)
        counts = [len(group) for group in self._groups]
        # Neighbours of cards that are all alike would be as many, and every set.
        few = math.prod(math.comb(n + 2, 2) for n in counts) <= PAIRS_MAX
        self.complete = few or len(counts) == 1
        if not self.complete:
            # Each card a class of its own, and only neighbours together.
            self._groups = tuple((card,) for group in self._groups for card in group)
        self.size = sum(counts)
        self.empty: State = (0,) * len(self._groups)
        self._kinds: dict[State, Kind] = {}

    def kind(self, counts: State) -> Kind:
        """The first cards of each class, so many."""
        found = self._kinds.get(counts)
        if found is None:
            cards = (
                card
                for group, count in zip(self._groups, counts, strict=True)
                for card in group[:count]
            )
            found = self._kinds[counts] = Kind(counts, tuple(cards))
        return found

    def pairs(self) -> Iterator[tuple[State, Kind]]:
        """(used before, stage that comes next), what is used growing."""
        if self.complete:
            ranges = [range(len(group) + 1) for group in self._groups]
            states = sorted(itertools.product(*ranges), key=sum)
            for used in states:
                rest = [
                    range(len(g) - count + 1) for g, count in zip(self._groups, used, strict=True)
                ]
                for counts in itertools.product(*rest):
                    if any(counts):
                        yield used, self.kind(counts)
            return
        n = len(self._groups)
        for begin in range(n):
            used = (1,) * begin + (0,) * (n - begin)
            for end in range(begin + 1, n + 1):
                yield used, self.kind((0,) * begin + (1,) * (end - begin) + (0,) * (n - end))

    def cards_of(self, used: State, kind: Kind) -> tuple[int, ...]:
        """Which cards a stage gets when so many are used before it."""
        return tuple(
            card
            for group, before, count in zip(self._groups, used, kind.counts, strict=True)
            for card in group[before : before + count]
        )


def after(used: State, kind: Kind) -> State:
    """What is used once a stage has its cards."""
    return tuple(a + b for a, b in zip(used, kind.counts, strict=True))
