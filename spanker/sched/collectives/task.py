# SPDX-License-Identifier: Apache-2.0
"""What an algorithm is given: a collective to plan, and the links there are to plan it with.

Algorithms count cards by position, 0 to n - 1, in the order of the plan; `compose.finish` puts the
numbers of the cards in their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import attrs

from spanker.errors import PlanError
from spanker.sched.collectives.plan import Buffer, Kind, ReduceOp, Region
from spanker.sched.shares import Share
from spanker.sched.topology import Topology

REDUCTIONS = (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
WITH_SHARES = (Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.ALL_TO_ALL)

# Steps of the search for a ring or chain, after which a graph counts as having none.
_WALK_STEPS_MAX = 20_000


@attrs.frozen
class Graph:
    """The links that are up among some cards of a topology, by position.

    `out[i]` and `into[i]` are the neighbours that i sends to and hears from, in order.
    """

    cards: tuple[int, ...]
    links: frozenset[tuple[int, int]]
    out: tuple[tuple[int, ...], ...] = attrs.field(init=False, eq=False, repr=False)
    into: tuple[tuple[int, ...], ...] = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        out: list[list[int]] = [[] for _ in self.cards]
        into: list[list[int]] = [[] for _ in self.cards]
        for a, b in sorted(self.links):
            out[a].append(b)
            into[b].append(a)
        object.__setattr__(self, "out", tuple(map(tuple, out)))
        object.__setattr__(self, "into", tuple(map(tuple, into)))

    @classmethod
    def of(cls, topology: Topology, cards: tuple[int, ...]) -> Graph:
        """The links of `topology` that are up and join two of `cards`."""
        at = {card: i for i, card in enumerate(cards)}
        ends = ((link.local_sail, link.remote_sail) for link in topology.links)
        return cls(
            cards,
            frozenset(
                (at[a], at[b]) for a, b in ends if {a, b} <= at.keys() and topology.is_up(a, b)
            ),
        )

    @property
    def n(self) -> int:
        return len(self.cards)

    def transposed(self) -> Graph:
        """The same cards with every link turned round."""
        return Graph(self.cards, frozenset((b, a) for a, b in self.links))

    def distances(self, source: int) -> list[int]:
        """Hops from `source` to every card.  Raises PlanError where one is out of reach."""
        hops = {source: 0}
        edge = [source]
        for card in edge:
            for neighbour in self.out[card]:
                if neighbour not in hops:
                    hops[neighbour] = hops[card] + 1
                    edge.append(neighbour)
        for card in range(self.n):
            if card not in hops:
                raise PlanError(
                    f"the cards are not connected: card {self.cards[source]} reaches "
                    f"{len(hops)} of {self.n} over links that are up, not card "
                    f"{self.cards[card]}; bring a link up, or plan without those out of reach"
                )
        return [hops[card] for card in range(self.n)]

    def ring(self) -> tuple[int, ...]:
        """An order in which every card has a link to the next and the last to the first: that of
        the cards, if it is one.  Raises PlanError where none is found."""
        order = self._walk(0, closed=True)
        if order is None:
            raise PlanError(
                f"no ring over links that are up goes through all {self.n} cards; "
                "algorithm 'routed' needs none"
            )
        return order

    def chain(self, first: int) -> tuple[int, ...]:
        """An order that starts with `first`, in which every card has a link to the next.  Raises
        PlanError where none is found."""
        order = self._walk(first, closed=False)
        if order is None:
            raise PlanError(
                f"no chain over links that are up goes from card {self.cards[first]} through all "
                f"{self.n} cards; algorithm 'routed' needs none"
            )
        return order

    def _walk(self, first: int, *, closed: bool) -> tuple[int, ...] | None:
        n = self.n
        natural = tuple((first + i) % n for i in range(n))
        if self._linked(natural, closed):
            return natural
        path, seen = [first], {first}
        # What is left to try at each card of the path; those with the fewest ways on come last,
        # where they are taken first.
        choices = [self._onward(first, seen)]
        for _ in range(_WALK_STEPS_MAX):
            if len(path) == n and self._linked(path, closed):
                return tuple(path)
            if choices[-1]:
                path.append(choices[-1].pop())
                seen.add(path[-1])
                choices.append(self._onward(path[-1], seen))
            else:
                choices.pop()
                seen.discard(path.pop())
                if not path:
                    return None
        return None

    def _linked(self, path: Sequence[int], closed: bool) -> bool:
        hops = set(itertools.pairwise(path))
        if closed and len(path) > 1:
            hops.add((path[-1], path[0]))
        return hops <= self.links

    def _onward(self, card: int, seen: set[int]) -> list[int]:
        free = [c for c in self.out[card] if c not in seen]
        return sorted(free, key=lambda c: (-sum(d not in seen for d in self.out[c]), -c))


@attrs.frozen
class Task:
    """A collective to plan.

    `shares` are there for every kind: where the kind has none of its own, they say who folds, or
    passes on, which part.  `root` is a position; `groups` hold positions and are () where the
    algorithm is to choose them; `chunks` is into how many pieces a pipeline cuts DATA, about.
    """

    kind: Kind
    graph: Graph
    elements: int
    shares: tuple[Share, ...]
    op: ReduceOp | None = None
    ordered: bool = False
    root: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    chunks: int = 1

    @property
    def n(self) -> int:
        return self.graph.n

    def share(self, card: int) -> Region:
        """DATA[share of the card]; positions count round, so n is 0 again."""
        share = self.shares[card % self.n]
        return Region(Buffer.DATA, share.start, share.stop)

    @property
    def whole(self) -> Region:
        return Region(Buffer.DATA, 0, self.elements)

    def backwards(self) -> Task:
        """The same over links turned round: what a transposed movement is planned with."""
        return attrs.evolve(self, graph=self.graph.transposed())
