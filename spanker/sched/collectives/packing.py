# SPDX-License-Identifier: Apache-2.0
"""Spreading what must travel over links of unequal speed, and putting the hops into phases.

Knows how busy each link and port gets, not what is carried or folded.  A tree or way is chosen for
one piece at a time, by what it adds to the busiest places; a hop goes into the first phase that has
room for it.  Time here is a place's bytes over its bandwidth, in seconds.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

import attrs

from spanker.sched.bandwidth import Profile
from spanker.sched.collectives.task import Graph

# The price of a place goes with load ** _SHUN, so that only the busiest count.
_SHUN = 5


@attrs.frozen
class Speeds:
    """Seconds a byte over each link, and in and out of each card."""

    graph: Graph
    link_s: dict[tuple[int, int], float]
    port_s: float

    @classmethod
    def of(cls, graph: Graph, profile: Profile) -> Speeds:
        numbers = graph.cards
        return cls(
            graph,
            {
                (a, b): 1 / profile.link(numbers[a], numbers[b]).bytes_per_s
                for a, b in sorted(graph.links)
            },
            1 / profile.port_bytes_per_s if profile.port_bytes_per_s else 0.0,
        )


class Loads:
    """How long each link and port is busy with what has been put on it."""

    def __init__(self, speeds: Speeds) -> None:
        self.speeds = speeds
        self._link = dict.fromkeys(speeds.link_s, 0.0)
        self._out = [0.0] * speeds.graph.n
        self._in = [0.0] * speeds.graph.n
        self._top = 0.0

    def add(self, hops: Iterable[tuple[int, int]], nbytes: float) -> None:
        """Puts hops of so many bytes on; takes them off where that is negative."""
        link_s, port_s = self.speeds.link_s, self.speeds.port_s * nbytes
        for a, b in hops:
            self._link[a, b] += link_s[a, b] * nbytes
            self._out[a] += port_s
            self._in[b] += port_s
        self._top = 0.0

    def busiest_s(self) -> float:
        return max((*self._link.values(), *self._out, *self._in), default=0.0)

    def energy(self) -> float:
        """Grows with the busiest places most; the lower, the better spread."""
        loads = (*self._link.values(), *self._out, *self._in)
        return sum(load ** (_SHUN + 1) for load in loads if load > 0)

    def price(self, a: int, b: int, nbytes: float) -> float:
        """What a hop adds, in seconds of the busiest place; next to nothing where all is idle."""
        if not self._top:
            self._top = self.busiest_s() or 1.0
        top = self._top
        link_s = self.speeds.link_s[a, b] * nbytes
        price = link_s * ((self._link[a, b] + link_s) / top) ** _SHUN
        port_s = self.speeds.port_s * nbytes
        if port_s:
            price += port_s * ((self._out[a] + port_s) / top) ** _SHUN
            price += port_s * ((self._in[b] + port_s) / top) ** _SHUN
        return price


def tree(
    loads: Loads, root: int, nbytes: float, hop_s: float, *, up: bool = False
) -> list[tuple[int, int]]:
    """(upper, lower) pairs from `root` to all cards, upper ones first, put on `loads`.

    Things travel from upper to lower or, with `up`, from lower to upper.  Grown by the cheapest
    pair next; `hop_s` is the price of being one hop further from the root.
    """
    graph = loads.speeds.graph
    neighbours = graph.into if up else graph.out
    depth = {root: 0}
    pairs: list[tuple[int, int]] = []
    edge: list[tuple[float, int, int]] = []

    def price_of(a: int, b: int) -> float:
        hop = (b, a) if up else (a, b)
        return loads.price(*hop, nbytes) + hop_s * (depth[a] + 1)

    def offer(card: int) -> None:
        for b in neighbours[card]:
            if b not in depth:
                heapq.heappush(edge, (price_of(card, b), card, b))

    offer(root)
    while edge:
        price, a, b = heapq.heappop(edge)
        if b in depth:
            continue
        # The card's port may have become busier since this was offered.
        now = price_of(a, b)
        if now > price:
            heapq.heappush(edge, (now, a, b))
            continue
        depth[b] = depth[a] + 1
        pairs.append((a, b))
        loads.add([(b, a) if up else (a, b)], nbytes)
        offer(b)
    return pairs


def way(
    loads: Loads, source: int, target: int, nbytes: float, hop_s: float
) -> list[tuple[int, int]]:
    """The cheapest hops from `source` to `target`, put on `loads`."""
    graph = loads.speeds.graph
    best = {source: 0.0}
    before: dict[int, int] = {}
    edge = [(0.0, source)]
    while edge:
        price, a = heapq.heappop(edge)
        if a == target:
            break
        if price > best[a]:
            continue
        for b in graph.out[a]:
            there = price + loads.price(a, b, nbytes) + hop_s
            if there < best.get(b, float("inf")):
                best[b] = there
                before[b] = a
                heapq.heappush(edge, (there, b))
    hops = []
    while target != source:
        hops.append((before[target], target))
        target = before[target]
    hops.reverse()
    loads.add(hops, nbytes)
    return hops


@attrs.define
class Hop:
    """So many bytes over a link, in a later phase than all hops of the list that are `after`'s."""

    source: int
    target: int
    nbytes: float
    after: tuple[int, ...] = ()
    phase: int = -1


def into_phases(hops: Sequence[Hop], speeds: Speeds, phase_s: float) -> None:
    """Gives each hop a phase: the first after those it follows in which no link or port gets busier
    than `phase_s`; those that most others wait for choose first."""
    followers: list[list[int]] = [[] for _ in hops]
    open_before = [len(hop.after) for hop in hops]
    for i, hop in enumerate(hops):
        for j in hop.after:
            followers[j].append(i)
    waiting = [0] * len(hops)
    for i in reversed(range(len(hops))):
        # `after` points backwards, so all followers have been seen.
        waiting[i] = 1 + max((waiting[j] for j in followers[i]), default=0)

    ready = [(-waiting[i], i) for i in range(len(hops)) if not open_before[i]]
    phase = 0
    while ready:
        busy: defaultdict[tuple[int, int] | int, float] = defaultdict(float)
        later, released = [], []
        for key in sorted(ready):
            hop = hops[key[1]]
            link_s = speeds.link_s[hop.source, hop.target] * hop.nbytes
            port_s = speeds.port_s * hop.nbytes
            uses = (
                ((hop.source, hop.target), link_s),
                (hop.source, port_s),
                (~hop.target, port_s),
            )
            # One alone is taken whatever its size.
            if all(not busy[place] or busy[place] + time <= phase_s for place, time in uses):
                for place, time in uses:
                    busy[place] += time
                hop.phase = phase
                released += followers[key[1]]
            else:
                later.append(key)
        for i in released:
            open_before[i] -= 1
            if not open_before[i]:
                later.append((-waiting[i], i))
        ready = later
        phase += 1
