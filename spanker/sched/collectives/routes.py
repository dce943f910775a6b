# SPDX-License-Identifier: Apache-2.0
"""Shortest ways through any connected graph, and the laying out of what travels along them.

A way is a row of hops, a tree one list of hops (from, to) for each depth.  Among equally short
ways the less loaded links are taken, so that one link is not asked to carry everything.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Sequence

from spanker.sched.collectives.compose import tmp
from spanker.sched.collectives.plan import Local, Phase, Region, Send
from spanker.sched.collectives.task import Graph

Tree = list[list[tuple[int, int]]]


def shortest_trees(graph: Graph, sizes: Sequence[int]) -> list[Tree]:
    """From every card a tree of fewest hops to all others; card i sends sizes[i] down its own."""
    load: Counter[tuple[int, int]] = Counter()
    return [shortest_tree(graph, root, size, load) for root, size in enumerate(sizes)]


def shortest_tree(graph: Graph, root: int, size: int, load: Counter[tuple[int, int]]) -> Tree:
    """A tree of fewest hops; adds what it carries to `load`."""
    hops = graph.distances(root)
    layers: list[list[int]] = [[] for _ in range(max(hops) + 1)]
    for card, depth in enumerate(hops):
        layers[depth].append(card)
    tree: Tree = []
    for upper, lower in itertools.pairwise(layers):
        step = []
        for card in lower:
            # Whichever are fewer, the cards above or the neighbours.
            above = min(upper, graph.into[card], key=len)
            linked = (u for u in above if hops[u] == len(tree) and (u, card) in graph.links)
            parent = min(linked, key=lambda u: (load[u, card], u))
            load[parent, card] += size
            step.append((parent, card))
        tree.append(step)
    return tree


class Ways:
    """Shortest ways between all pairs of cards, the load spread as they are asked for."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        back = graph.transposed()
        self._hops_to = [back.distances(target) for target in range(graph.n)]
        self._load: Counter[tuple[int, int]] = Counter()

    def way(self, source: int, target: int, size: int) -> list[tuple[int, int]]:
        """The hops from `source` to `target` of `size` elements."""
        hops_to, load, here = self._hops_to[target], self._load, source
        way = []
        while here != target:
            nearer = (c for c in self._graph.out[here] if hops_to[c] == hops_to[here] - 1)
            there = min(nearer, key=lambda c: (load[here, c], c))
            load[here, there] += size
            way.append((here, there))
            here = there
        return way


class Schedule:
    """Sends and local work by phase, and rooms in TMP for as long as they are needed.

    Rooms start at `base`: what is before it is the caller's.  Without `rooms` they are all at the
    start of TMP: for a plan of which only the time matters.
    """

    def __init__(self, *, base: int = 0, rooms: bool = True) -> None:
        self._base = base
        self._rooms = rooms
        self._sends: defaultdict[int, list[Send]] = defaultdict(list)
        self._local: defaultdict[int, list[Local]] = defaultdict(list)
        # What of a card's TMP is taken in a phase, in order, and how much that is.
        self._taken: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._used: Counter[tuple[int, int]] = Counter()

    def send(self, phase: int, source: int, target: int, what: Region, to: Region) -> None:
        self._sends[phase].append(Send(source, target, what, to))

    def work(self, phase: int, *local: Local) -> None:
        self._local[phase] += local

    def room(self, card: int, size: int, first: int, last: int) -> Region:
        """Room in TMP of `card` from phase `first` to phase `last`, both included: the lowest."""
        if not self._rooms:
            return tmp(0, size)
        start = self._lowest(card, size, first, last)
        for phase in range(first, last + 1):
            insort(self._taken[card, phase], (start, start + size))
            self._used[card, phase] += size
        return tmp(start, size)

    def _lowest(self, card: int, size: int, first: int, last: int) -> int:
        taken: list[tuple[int, int]] = []
        for phase in range(first, last + 1):
            taken += self._taken[card, phase]
        taken.sort()  # a few sorted runs: next to nothing
        at = self._base
        for start, stop in taken:
            if start >= at + size:
                break
            if stop > at:
                at = stop
        return at

    def carry(
        self, phases: Sequence[int], way: Sequence[tuple[int, int]], what: Region, to: Region
    ) -> None:
        """Sends `what` of the first card to `to` of the last, each hop in its phase."""
        for hop, (here, there) in enumerate(way):
            last = hop == len(way) - 1
            room = to if last else self.room(there, what.size, phases[hop], phases[hop + 1])
            self.send(phases[hop], here, there, what, room)
            what = room

    def carry_within(
        self, limit: int, first: int, way: Sequence[tuple[int, int]], what: Region, to: Region
    ) -> int:
        """The same from phase `first` on, a hop in each, or as much later as rooms must wait to
        stay within `limit` elements from `base` on; returns the phase in which it arrives."""
        size = what.size

        def fits(there: int, phase: int) -> bool:
            used = self._used[there, phase], self._used[there, phase + 1]
            # Surely, surely not, or a matter of gaps.
            if sum(used) + size <= limit:
                return True
            if max(used) + size > limit:
                return False
            return self._lowest(there, size, phase, phase + 1) + size <= self._base + limit

        while not all(fits(there, first + hop) for hop, (_, there) in enumerate(way[:-1])):
            first += 1
        self.carry(range(first, first + len(way)), way, what, to)
        return first + len(way) - 1

    def phases(self) -> list[Phase]:
        end = max((*self._sends, *self._local), default=-1) + 1
        return [Phase(tuple(self._sends[p]), tuple(self._local[p])) for p in range(end)]
