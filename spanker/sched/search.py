# SPDX-License-Identifier: Apache-2.0
"""A search for faster plans than the textbook ones, on graphs that no textbook drew.

What must travel is cut into pieces.  Each gets a tree or way of its own, chosen by what it adds to
the busiest links and ports, taken back and chosen again; then hops are put into phases that keep
links about equally busy.  How many pieces, how dear a further hop, how long a phase: many choices
are tried and the fastest by `collectives.seconds` is taken.  Packing trees by link speed is the
idea of Blink, TACCL and ForestColl; the order of folding that sums of floats need comes on top.

The result is proven by `verify`, never slower than the best textbook plan, and the same for the
same seed.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.collectives import packing
from spanker.sched.collectives.catalog import algorithms, plan_of, task_of
from spanker.sched.collectives.compose import cut, finish
from spanker.sched.collectives.cost import seconds
from spanker.sched.collectives.direct import kept
from spanker.sched.collectives.packing import Hop, Loads, Speeds
from spanker.sched.collectives.pieces import (
    Carried,
    Chained,
    Owned,
    Pairs,
    Reduced,
    Route,
    Spread,
    reversed_tree,
)
from spanker.sched.collectives.plan import (
    CollectivePlan,
    Kind,
    ReduceOp,
    Region,
)
from spanker.sched.collectives.routes import Schedule
from spanker.sched.collectives.task import Task
from spanker.sched.shares import Share
from spanker.sched.topology import Topology
from spanker.sched.verify import verify

# Hops of a plan: a hundred thousand would take longer to lay out than anyone waits.
_HOPS_MAX = 5_000
# Pieces that each card's share is cut into, and prices of a hop, in what it takes an idle fleet.
_PIECES = (1, 2, 4)
_HOP_PRICES = (0.01, 0.1, 1.0)
# TMP, in what DATA takes.
_TMP_MAX = 4
# How often routes are chosen again, and how many sets of routes are tried at all lengths of phases.
_PASSES = 3
_KEPT = 3
_CUTS_MAX = 32
# Cards tried as owner of a piece, where anyone may be.
_OWNERS = 4


@attrs.frozen
class Found:
    """The fastest plan found, and the fastest of the textbook, which it may be itself."""

    plan: CollectivePlan
    seconds: float
    textbook: CollectivePlan
    textbook_seconds: float

    @property
    def gain(self) -> float:
        """How many times as fast as the textbook: 1 or more."""
        return self.textbook_seconds / self.seconds if self.seconds else 1.0


def report(found: Found) -> str:
    """What was found, in a line."""
    plan, book = found.plan, found.textbook
    what = f"{plan.kind.value} of {plan.elements:,} elements over {len(plan.cards)} cards"
    if plan is book:
        return f"{what}: {found.seconds * 1e3:.3f} ms by {book.algorithm!r}, nothing faster found"
    return (
        f"{what}: {found.seconds * 1e3:.3f} ms, {found.gain:.2f} times as fast as "
        f"{book.algorithm!r} with {found.textbook_seconds * 1e3:.3f} ms"
    )


def textbook(
    task: Task, topology: Topology, profile: Profile, element_bytes: int = 4
) -> tuple[CollectivePlan, float]:
    """The fastest plan of the catalogue for a task, pipelines in several lengths, and its seconds.

    Raises PlanError where the cards are not connected.
    """
    found = []
    for algorithm in algorithms(task.kind, task.ordered):
        pipelined = algorithm == "chain" or (algorithm == "routed" and task.kind is Kind.BROADCAST)
        for chunks in (1, 2, 4, 8, 16, 32) if pipelined else (1,):
            try:
                plan = plan_of(attrs.evolve(task, chunks=chunks), algorithm)
            except PlanError:
                # It lacks links that this one needs; 'routed' needs none in particular.
                if algorithm == "routed":
                    raise
                break
            found.append((plan, seconds(plan, profile, topology, element_bytes)))
    return min(found, key=lambda entry: entry[1])


def search(
    kind: Kind | str,
    topology: Topology,
    elements: int,
    profile: Profile,
    *,
    element_bytes: int = 4,
    op: ReduceOp | str = ReduceOp.SUM,
    ordered: bool | None = None,
    shares: Sequence[Share] | None = None,
    root: int | None = None,
    cards: Sequence[int] | None = None,
    seed: int = 0,
) -> Found:
    """The fastest plan found for a collective, arguments as for `make`; verified.

    Raises PlanError where an argument makes no sense or the cards are not connected.
    """
    task = task_of(
        kind, topology, elements, op=op, ordered=ordered, shares=shares, root=root, cards=cards
    )
    book, book_s = textbook(task, topology, profile, element_bytes)
    hunt = _Hunt(task, topology, profile, element_bytes, seed, (book, book_s))
    hunt.run()
    best, best_s = hunt.best
    verify(best, topology)
    return Found(best, best_s, book, book_s)


# --- the hunt ---------------------------------------------------------------------------

# A part of DATA and how it travels.
_Laid = tuple[Region, Route]


@attrs.frozen
class _Job:
    """A piece, the cards of which one is to own it (or to send or get it), and what finds a route
    from or to an owner, with its bytes and the price of a hop, and puts it on the loads."""

    part: Region
    owners: Sequence[int]
    route: Callable[[int, float, float], Route]


class _Hunt:
    def __init__(
        self,
        task: Task,
        topology: Topology,
        profile: Profile,
        element_bytes: int,
        seed: int,
        best: tuple[CollectivePlan, float],
    ) -> None:
        self.task = task
        self.topology = topology
        self.profile = profile
        self.element_bytes = element_bytes
        self.rng = random.Random(seed)
        self.best = best
        self.speeds = Speeds.of(task.graph, profile)
        self.loads = Loads(self.speeds)
        self.average = task.op is ReduceOp.AVG
        numbers = task.graph.cards
        links = [profile.link(numbers[a], numbers[b]) for a, b in sorted(task.graph.links)]
        count = max(1, len(links))
        # What a phase takes at least, and a byte over a link of middling speed.
        self.phase_s = profile.command_s + sum(link.latency_s for link in links) / count
        self.byte_s = sum(1 / link.bytes_per_s for link in links) / count + self.speeds.port_s

    def run(self) -> None:
        if self.task.n == 1 or not self.task.elements:
            return
        packed: list[tuple[float, int, list[_Laid], float]] = []
        for jobs, dear in itertools.product(self._jobs(), _HOP_PRICES):
            laid, busiest_s = self._pack(jobs, dear)
            # Nothing is faster than its busiest link.
            if busiest_s < self.best[1]:
                time = min(self._try(laid, 1, math.inf), self._try(laid, 2, busiest_s / 6))
                packed.append((time, len(packed), laid, busiest_s))
        packed.sort()
        for _, _, laid, busiest_s in packed[:_KEPT]:
            self._tune(laid, busiest_s)

    def _tune(self, laid: Sequence[_Laid], busiest_s: float) -> None:
        """Tries cutting finer and coarser, and phases of many lengths, then those near the best."""
        tried: dict[tuple[int, int], float] = {}

        def try_(cuts: int, phases: int) -> None:
            if (cuts, phases) not in tried and 1 <= cuts <= _CUTS_MAX and phases >= 1:
                tried[cuts, phases] = self._try(laid, cuts, busiest_s / phases)

        for cuts, phases in itertools.product((1, 4, 16), (2, 8, 32)):
            try_(cuts, phases)
        for _ in range(_PASSES):
            cuts, phases = min(tried, key=lambda choice: (tried[choice], choice))
            for choice in (
                (cuts * 2, phases),
                (cuts // 2, phases),
                (cuts, phases * 3 // 2),
                (cuts, phases * 2 // 3),
                (cuts * 2, phases * 2),
            ):
                try_(*choice)

    def _try(self, laid: Sequence[_Laid], cuts: int, phase_s: float) -> float:
        """Lays the pieces out, each in `cuts` parts, in phases of about `phase_s`."""
        parts = [(part, route) for whole, route in laid for part in _pieces(whole, cuts)]
        hops: list[Hop] = []
        ends = []
        for part, route in parts:
            hops += route.hops(len(hops), part.size * self.element_bytes)
            ends.append(len(hops))
        if len(hops) > _HOPS_MAX:
            return math.inf
        packing.into_phases(hops, self.speeds, phase_s)

        def plan_with(schedule: Schedule) -> CollectivePlan:
            if self.task.kind is Kind.ALL_TO_ALL:
                schedule.work(0, *kept(self.task))
            for (part, route), start, stop in zip(parts, [0, *ends], ends, strict=False):
                route.lay(schedule, [hop.phase for hop in hops[start:stop]], part)
            return finish(self.task, "search", schedule.phases())

        # Finding rooms takes long, and only a plan to be kept needs them.
        sketch = plan_with(Schedule(rooms=False))
        time = seconds(sketch, self.profile, self.topology, self.element_bytes)
        if time < self.best[1]:
            plan = plan_with(Schedule())
            if plan.tmp_elements <= _TMP_MAX * self.task.elements:
                self.best = plan, time
        return time

    def _pack(self, jobs: list[_Job], dear: float) -> tuple[list[_Laid], float]:
        """Routes for all jobs, and how long the busiest link or port is busy then."""
        self.loads = Loads(self.speeds)
        routes: dict[int, Route] = {}
        order = list(range(len(jobs)))
        best: tuple[float, list[_Laid]] = math.inf, []
        for _ in range(_PASSES):
            self.rng.shuffle(order)
            for i in order:
                nbytes = jobs[i].part.size * self.element_bytes
                if i in routes:
                    self.loads.add(routes[i].links, -nbytes)
                hop_s = dear * (self.phase_s + nbytes * self.byte_s)
                routes[i] = self._chosen(jobs[i], nbytes, hop_s)
            busiest_s = self.loads.busiest_s()
            if busiest_s < best[0]:
                best = busiest_s, [(job.part, routes[i]) for i, job in enumerate(jobs)]
        return best[1], best[0]

    def _chosen(self, job: _Job, nbytes: float, hop_s: float) -> Route:
        """The route of the owner with whom loads are best spread, of some if anyone may own it."""
        owners = list(job.owners)
        if len(owners) > _OWNERS:
            owners = self.rng.sample(owners, _OWNERS)
        best: tuple[float, Route] | None = None
        for owner in owners:
            route = job.route(owner, nbytes, hop_s)
            energy = self.loads.energy()
            self.loads.add(route.links, -nbytes)
            if best is None or energy < best[0]:
                best = energy, route
        assert best is not None
        self.loads.add(best[1].links, nbytes)
        return best[1]

    # What there is to carry, in several ways.

    def _jobs(self) -> Iterator[list[_Job]]:
        task, everyone = self.task, range(self.task.n)
        for pieces in _PIECES:
            shares = [
                (card, part) for card in everyone for part in _pieces(task.share(card), pieces)
            ]
            if task.kind is Kind.BROADCAST:
                parts = _pieces(task.whole, pieces * pieces)
                yield [_Job(part, (task.root,), self._spread) for part in parts]
            elif task.kind is Kind.ALL_GATHER:
                yield [_Job(part, (card,), self._spread) for card, part in shares]
            elif task.kind is Kind.ALL_TO_ALL:
                yield [
                    _Job(part, (target,), functools.partial(self._carried, source))
                    for target, part in shares
                    for source in everyone
                    if source != target
                ]
            elif task.kind is not Kind.BARRIER:
                ways = (self._owned, self._chained) if task.ordered else (self._reduced,)
                for way in ways:
                    yield [_Job(part, (card,), way) for card, part in shares]
                    if task.kind is Kind.ALL_REDUCE and way != self._chained:
                        yield [_Job(part, everyone, way) for _, part in shares]

    # Routes, put on the loads as they are chosen.

    def _spread(self, root: int, nbytes: float, hop_s: float) -> Route:
        return Spread(self._tree(root, nbytes, hop_s))

    def _carried(self, source: int, target: int, nbytes: float, hop_s: float) -> Route:
        shift = self.task.shares[target].start - self.task.shares[source].start
        return Carried(self._way(source, target, nbytes, hop_s), shift)

    def _reduced(self, root: int, nbytes: float, hop_s: float) -> Route:
        up = packing.tree(self.loads, root, nbytes, hop_s, up=True)
        return Reduced(root, reversed_tree(up), self._result(root, nbytes, hop_s), self.average)

    def _owned(self, owner: int, nbytes: float, hop_s: float) -> Route:
        others = (card for card in range(self.task.n) if card != owner)
        ways = tuple(self._way(card, owner, nbytes, hop_s) for card in others)
        return Owned(owner, ways, self._result(owner, nbytes, hop_s), self.average)

    def _chained(self, owner: int, nbytes: float, hop_s: float) -> Route:
        last = self.task.n - 1
        legs = tuple(self._way(i, i + 1, nbytes, hop_s) for i in range(last))
        if self.task.kind is Kind.REDUCE_SCATTER:
            down = self._way(last, owner, nbytes, hop_s)
        else:
            down = self._tree(last, nbytes, hop_s)
        return Chained(legs, down, self.average)

    def _result(self, owner: int, nbytes: float, hop_s: float) -> Pairs:
        if self.task.kind is Kind.REDUCE_SCATTER:
            return ()
        return self._tree(owner, nbytes, hop_s)

    def _tree(self, root: int, nbytes: float, hop_s: float) -> Pairs:
        return tuple(packing.tree(self.loads, root, nbytes, hop_s))

    def _way(self, source: int, target: int, nbytes: float, hop_s: float) -> Pairs:
        return tuple(packing.way(self.loads, source, target, nbytes, hop_s))


def _pieces(part: Region, number: int) -> list[Region]:
    return cut(part, -(-part.size // number))
