# SPDX-License-Identifier: Apache-2.0
"""How one piece of a collective travels: its hops, what waits for what, and what is folded where.

A route is laid twice: as hops, to be given phases (packing.py), and with these phases into a
schedule of sends and local work (routes.py).  One route may serve many pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import attrs

from spanker.sched.collectives.compose import folds_in_order
from spanker.sched.collectives.packing import Hop
from spanker.sched.collectives.plan import Buffer, Divide, Fold, Region
from spanker.sched.collectives.routes import Schedule

Pairs = tuple[tuple[int, int], ...]


class Route:
    """Base of all: `links` are the hops in the order in which `hops` and `lay` have them."""

    links: Pairs

    def hops(self, base: int, nbytes: float) -> list[Hop]:
        """The hops of a piece; they stand from `base` on in the list that `after` counts in."""
        raise NotImplementedError

    def lay(self, schedule: Schedule, phases: Sequence[int], part: Region) -> None:
        """Puts the piece `part` into the schedule, each hop in its phase."""
        raise NotImplementedError


def _tree_hops(links: Pairs, base: int, nbytes: float, first: tuple[int, ...] = ()) -> list[Hop]:
    """Hops down a tree, those from its root after `first`."""
    arrived: dict[int, int] = {}
    hops = []
    for i, (a, b) in enumerate(links):
        hops.append(Hop(a, b, nbytes, (arrived[a],) if a in arrived else first))
        arrived[b] = base + i
    return hops


def _way_hops(links: Pairs, base: int, nbytes: float, first: tuple[int, ...] = ()) -> list[Hop]:
    """Hops one after the other, from `first` on."""
    return [Hop(a, b, nbytes, (base + i - 1,) if i else first) for i, (a, b) in enumerate(links)]


def _spread(schedule: Schedule, links: Pairs, phases: Sequence[int], part: Region) -> None:
    for (a, b), phase in zip(links, phases, strict=True):
        schedule.send(phase, a, b, part, part)


@attrs.frozen
class Spread(Route):
    """To the same place on all other cards, down a tree."""

    links: Pairs

    def hops(self, base: int, nbytes: float) -> list[Hop]:
        return _tree_hops(self.links, base, nbytes)

    def lay(self, schedule: Schedule, phases: Sequence[int], part: Region) -> None:
        _spread(schedule, self.links, phases, part)


@attrs.frozen
class Carried(Route):
    """From one card to another's OUT, through any cards between: what is `shift` elements up in
    DATA there."""

    links: Pairs
    shift: int

    def hops(self, base: int, nbytes: float) -> list[Hop]:
        return _way_hops(self.links, base, nbytes)

    def lay(self, schedule: Schedule, phases: Sequence[int], part: Region) -> None:
        to = Region(Buffer.OUT, part.start - self.shift, part.stop - self.shift)
        schedule.carry(phases, self.links, part, to)


@attrs.frozen
class Reduced(Route):
    """Folded up a tree, in any order, then down another.

    `up`, from the leaves on, are (lower, upper); `down` is empty where the result stays.
    """

    root: int
    up: Pairs
    down: Pairs
    average: bool

    @property
    def links(self) -> Pairs:  # type: ignore[override]
        return self.up + self.down

    def hops(self, base: int, nbytes: float) -> list[Hop]:
        hops = []
        arrived: dict[int, tuple[int, ...]] = {}
        for i, (lower, upper) in enumerate(self.up):
            hops.append(Hop(lower, upper, nbytes, arrived.get(lower, ())))
            arrived[upper] = (*arrived.get(upper, ()), base + i)
        done = arrived.get(self.root, ())
        return hops + _tree_hops(self.down, base + len(self.up), nbytes, done)

    def lay(self, schedule: Schedule, phases: Sequence[int], part: Region) -> None:
        last = 0
        for (lower, upper), phase in zip(self.up, phases, strict=False):
            room = schedule.room(upper, part.size, phase, phase)
            schedule.send(phase, lower, upper, part, room)
            schedule.work(phase, Fold(upper, part, room))
            if upper == self.root:
                last = max(last, phase)
        if self.average:
            schedule.work(last, Divide(self.root, part))
        _spread(schedule, self.down, phases[len(self.up) :], part)


@attrs.frozen
class Owned(Route):
    """Every contribution to its owner, who folds them in card order; then down a tree or not.

    `ways` are those from all other cards, in their order.
    """

    owner: int
    ways: tuple[Pairs, ...]
    down: Pairs
    average: bool

    @property
    def links(self) -> Pairs:  # type: ignore[override]
        return (*itertools.chain(*self.ways), *self.down)

    def hops(self, base: int, nbytes: float) -> list[Hop]:
        hops: list[Hop] = []
        arrived = []
        for way in self.ways:
            hops += _way_hops(way, base + len(hops), nbytes)
            arrived.append(base + len(hops) - 1)
        return hops + _tree_hops(self.down, base + len(hops), nbytes, tuple(arrived))

    def lay(self, schedule: Schedule, phases: Sequence[int], part: Region) -> None:
        ends = list(itertools.accumulate(map(len, self.ways)))
        last = max((phases[end - 1] for end in ends), default=0)
        rooms = {}
        for way, end in zip(self.ways, ends, strict=True):
            room = rooms[way[0][0]] = schedule.room(self.owner, part.size, phases[end - 1], last)
            schedule.carry(phases[end - len(way) : end], way, part, room)
        schedule.work(last, *folds_in_order(self.owner, part, rooms))
        if self.average:
            schedule.work(last, Divide(self.owner, part))
        _spread(schedule, self.down, phases[ends[-1] if ends else 0 :], part)


@attrs.frozen
class Chained(Route):
    """From card to card in their order, folded at each; then on from the last, or not.

    `legs[i]` is the way from card i to card i + 1.
    """

    legs: tuple[Pairs, ...]
    down: Pairs
    average: bool

    @property
    def links(self) -> Pairs:  # type: ignore[override]
        return (*itertools.chain(*self.legs), *self.down)

    def hops(self, base: int, nbytes: float) -> list[Hop]:
        along = tuple(itertools.chain(*self.legs))
        end = (base + len(along) - 1,) if along else ()
        return [
            *_way_hops(along, base, nbytes),
            *_tree_hops(self.down, base + len(along), nbytes, end),
        ]

    def lay(self, schedule: Schedule, phases: Sequence[int], part: Region) -> None:
        at = 0
        for card, leg in enumerate(self.legs, 1):
            arrives = phases[at + len(leg) - 1]
            room = schedule.room(card, part.size, arrives, arrives)
            schedule.carry(phases[at : at + len(leg)], leg, part, room)
            schedule.work(arrives, Fold(card, part, room))
            at += len(leg)
        if self.average:
            schedule.work(phases[at - 1] if at else 0, Divide(len(self.legs), part))
        _spread(schedule, self.down, phases[at:], part)


def reversed_tree(pairs: Iterable[tuple[int, int]]) -> Pairs:
    """(upper, lower) from the root on, as (lower, upper) from the leaves on."""
    return tuple((b, a) for a, b in reversed(list(pairs)))
