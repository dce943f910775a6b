# SPDX-License-Identifier: Apache-2.0
"""The search for plans: proven, repeatable, never slower than the textbook, and worth its time on
irregular graphs with unequal links."""

from __future__ import annotations

import itertools
import random

import attrs
import pytest
from test_collective_interpreter import mistakes

from spanker.errors import PlanError
from spanker.sched import NATIVE, REV_A, Link, LinkSpeed, LinkState, Profile, Topology
from spanker.sched.collectives import Kind, ReduceOp, algorithms, make, seconds
from spanker.sched.collectives.packing import Hop, Loads, Speeds, into_phases, tree, way
from spanker.sched.collectives.task import Graph
from spanker.sched.search import Found, report, search
from spanker.sched.verify import verify


def irregular(seed: int, n: int, base: Profile) -> tuple[Topology, Profile]:
    """A random tree with as many links more, at full speed down to a tenth of it by direction."""
    rng = random.Random(seed)
    order = rng.sample(range(n), n)
    pairs = [(order[i], order[rng.randrange(i)]) for i in range(1, n)]
    pairs += [tuple(rng.sample(range(n), 2)) for _ in range(n)]  # type: ignore[misc]
    topology = Topology.of_pairs(n, pairs)
    links = tuple(
        LinkSpeed(
            link.local_sail,
            link.remote_sail,
            base.intercard_bytes_per_s * rng.choice((0.1, 0.25, 0.5, 1.0, 1.0)),
            base.intercard_latency_s,
        )
        for link in topology.links
    )
    return topology, attrs.evolve(base, name=f"{base.name}, irregular", links=links)


def check(found: Found, topology: Topology, profile: Profile, rng: random.Random) -> None:
    plan, book = found.plan, found.textbook
    verify(plan, topology)
    assert mistakes(plan, rng) == []
    assert found.seconds == seconds(plan, profile, topology, 4)
    assert found.textbook_seconds == seconds(book, profile, topology, 4)
    assert found.gain >= 1
    assert (plan is book) == (found.gain == 1)
    for algorithm in algorithms(plan.kind, plan.ordered):
        try:
            other = make(
                plan.kind,
                topology,
                plan.elements,
                algorithm=algorithm,
                op=plan.op or ReduceOp.SUM,
                ordered=plan.ordered,
            )
        except PlanError:
            continue
        assert found.seconds <= seconds(other, profile, topology, 4), algorithm


CASES = [
    # kind, ordered, elements, seed, cards, profile, gain that it must have
    (Kind.ALL_REDUCE, True, 60_000, 1, 5, REV_A, 1.2),
    (Kind.ALL_REDUCE, True, 60_000, 2, 6, NATIVE, 1.0),
    (Kind.ALL_REDUCE, False, 60_000, 3, 6, REV_A, 1.2),
    (Kind.REDUCE_SCATTER, True, 30_000, 4, 5, NATIVE, 1.0),
    (Kind.REDUCE_SCATTER, False, 60_000, 5, 6, NATIVE, 1.0),
    (Kind.ALL_GATHER, False, 60_000, 6, 6, REV_A, 1.0),
    (Kind.ALL_GATHER, False, 60_000, 7, 7, NATIVE, 1.2),
    (Kind.BROADCAST, False, 60_000, 8, 6, NATIVE, 1.2),
    (Kind.ALL_TO_ALL, False, 6_000, 9, 5, REV_A, 1.2),
    (Kind.ALL_REDUCE, False, 7, 10, 5, NATIVE, 1.0),
]


@pytest.mark.parametrize(
    ("kind", "ordered", "elements", "seed", "n", "base", "gain"),
    CASES,
    ids=[f"{case[0].value}-{case[3]}" for case in CASES],
)
def test_never_slower_than_the_textbook_and_often_much_faster(
    kind: Kind, ordered: bool, elements: int, seed: int, n: int, base: Profile, gain: float
) -> None:
    topology, profile = irregular(seed, n, base)
    found = search(kind, topology, elements, profile, ordered=ordered, op="avg")
    print(report(found))
    check(found, topology, profile, random.Random(seed))
    assert found.gain >= gain


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("base", [REV_A, NATIVE], ids=["rev-a", "native"])
def test_on_many_graphs(seed: int, base: Profile) -> None:
    rng = random.Random(seed)
    n = rng.randint(2, 12)
    topology, profile = irregular(seed, n, base)
    gains = []
    for kind, ordered in itertools.product(Kind, (False, True)):
        elements = 0 if kind is Kind.BARRIER else rng.choice((1, 100, 10_000)) * n
        found = search(kind, topology, elements, profile, ordered=ordered, seed=seed)
        check(found, topology, profile, rng)
        gains.append(found.gain)
    assert max(gains) >= 1.2 or n == 2


def test_the_same_seed_finds_the_same_plan() -> None:
    topology, profile = irregular(11, 4, REV_A)
    one, other = (search("all-gather", topology, 5000, profile, seed=seed).plan for seed in (3, 3))
    assert one == other


def test_where_the_textbook_is_best_it_is_taken() -> None:
    mesh = Topology.with_mock(4)
    for kind in (Kind.ALL_GATHER, Kind.BARRIER):
        found = search(kind, mesh, 0 if kind is Kind.BARRIER else 4000, NATIVE)
        assert found.plan is found.textbook
        assert "nothing faster found" in report(found)
    alone = search("all-reduce", Topology.with_mock(1), 5, NATIVE)
    assert (alone.seconds, alone.gain) == (0, 1)


def test_the_report_says_by_how_much() -> None:
    topology, profile = irregular(8, 6, NATIVE)
    found = search("broadcast", topology, 60_000, profile)
    assert report(found) == (
        f"broadcast of 60,000 elements over 6 cards: {found.seconds * 1e3:.3f} ms, "
        f"{found.gain:.2f} times as fast as {found.textbook.algorithm!r} with "
        f"{found.textbook_seconds * 1e3:.3f} ms"
    )


def test_cards_that_are_not_connected_are_refused() -> None:
    with pytest.raises(PlanError, match="not connected: card 0 reaches 1 of 3"):
        search("all-gather", Topology((0, 1, 2)), 10, NATIVE)


# --- packing --------------------------------------------------------------------------------


def speeds(ends: dict[tuple[int, int], float], n: int, port: float | None = None) -> Speeds:
    links = tuple(Link(a, b, LinkState.UP) for a, b in ends)
    graph = Graph.of(Topology(tuple(range(n)), links), tuple(range(n)))
    profile = Profile(
        "packing",
        1.0,
        1.0,
        None,
        0.0,
        port_bytes_per_s=port,
        links=tuple(LinkSpeed(a, b, rate, 0.0) for (a, b), rate in ends.items()),
    )
    return Speeds.of(graph, profile)


def test_ways_avoid_slow_links_and_then_busy_ones() -> None:
    loads = Loads(speeds({(0, 3): 0.1, (0, 1): 1, (1, 3): 1, (0, 2): 1, (2, 3): 1}, 4))
    first, second = (way(loads, 0, 3, 1.0, 0.0) for _ in range(2))
    assert sorted([first, second]) == [[(0, 1), (1, 3)], [(0, 2), (2, 3)]]
    assert loads.busiest_s() == 1
    loads.add(first, -1.0)
    loads.add(second, -1.0)
    assert loads.busiest_s() == 0


def test_a_dear_hop_makes_trees_flat_and_a_cheap_one_makes_them_fast() -> None:
    ends = {(0, 1): 10.0, (1, 2): 10.0, (0, 2): 1.0}
    flat = tree(Loads(speeds(ends, 3)), 0, 1.0, 1e9)
    deep = tree(Loads(speeds(ends, 3)), 0, 1.0, 0.0)
    assert sorted(flat) == [(0, 1), (0, 2)]
    assert deep == [(0, 1), (1, 2)]


def test_a_tree_upwards_uses_the_links_in_the_other_direction() -> None:
    loads = Loads(speeds({(1, 0): 1.0, (2, 1): 1.0}, 3))
    assert tree(loads, 0, 1.0, 0.0, up=True) == [(0, 1), (1, 2)]
    assert tree(Loads(loads.speeds), 0, 1.0, 0.0) == []


def test_hops_wait_for_what_they_follow_and_for_room() -> None:
    path = speeds({(0, 1): 1.0, (1, 2): 1.0}, 3)

    def hops() -> list[Hop]:
        return [Hop(0, 1, 1.0), Hop(1, 2, 1.0, (0,)), Hop(0, 1, 1.0), Hop(1, 2, 1.0, (2,))]

    narrow, wide = hops(), hops()
    into_phases(narrow, path, 1.0)
    into_phases(wide, path, 2.0)
    assert [hop.phase for hop in narrow] == [0, 1, 1, 2]
    assert [hop.phase for hop in wide] == [0, 1, 0, 1]
    ports = [Hop(0, 1, 1.0), Hop(0, 2, 1.0)]
    into_phases(ports, speeds({(0, 1): 1.0, (0, 2): 1.0}, 3, port=1.0), 1.0)
    assert sorted(hop.phase for hop in ports) == [0, 1]
    alone = [Hop(0, 1, 5.0)]
    into_phases(alone, path, 1.0)
    assert alone[0].phase == 0
