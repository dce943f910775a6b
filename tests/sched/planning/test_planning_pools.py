# SPDX-License-Identifier: Apache-2.0
"""Which cards are alike, sets of them, deals to replicas, and names."""

from __future__ import annotations

import itertools

import attrs
import pytest
from planning_reference import PLENTY, SLOW, class_order, connected_graphs, request_for, tiny

from spanker.sched.bandwidth import CardSpeed, LinkSpeed
from spanker.sched.cost import Machine
from spanker.sched.plan import Plan
from spanker.sched.planning.naming import fleet_name, plan_name
from spanker.sched.planning.partitions import deals, every_deal
from spanker.sched.planning.pools import PAIRS_MAX, Pool, after, classes
from spanker.sched.topology import Link, LinkState, Topology


def groups_of(topology: Topology, profile: object = SLOW, free: object = None) -> object:
    room = free or [PLENTY] * len(topology.cards)
    return classes(Machine(profile, topology), room)  # type: ignore[arg-type]


def test_cards_are_alike_where_exchanging_them_changes_nothing() -> None:
    assert groups_of(Topology.with_mock(4)) == ((0, 1, 2, 3),)
    assert groups_of(Topology.line(3)) == ((0, 2), (1,))
    assert groups_of(Topology.of_pairs(4, [(0, 1), (0, 2), (0, 3)])) == ((0,), (1, 2, 3))
    # In a ring of four, those across have the same neighbours; in one of five nobody has.
    assert groups_of(Topology.ring(4)) == ((0, 2), (1, 3))
    assert groups_of(Topology.ring(5)) == ((0,), (1,), (2,), (3,), (4,))


def test_speed_memory_and_links_tell_cards_apart() -> None:
    mesh = Topology.with_mock(4)
    slow = attrs.evolve(SLOW, cards=(CardSpeed(2, memory=0.5),))
    assert groups_of(mesh, slow) == ((0, 1, 3), (2,))
    assert groups_of(mesh, free=[5, 5, 5, 6]) == ((0, 1, 2), (3,))
    link = attrs.evolve(SLOW, links=(LinkSpeed(0, 1, 5.0, 0.0),))
    assert groups_of(mesh, link) == ((0,), (1,), (2, 3))
    both = attrs.evolve(link, links=(*link.links, LinkSpeed(1, 0, 5.0, 0.0)))
    assert groups_of(mesh, both) == ((0, 1), (2, 3))
    one_way = Topology(
        (0, 1, 2),
        tuple(
            Link(a, b, LinkState.DOWN if (a, b) == (0, 1) else LinkState.UP)
            for a, b in itertools.permutations(range(3), 2)
        ),
    )
    assert groups_of(one_way) == ((0,), (1,), (2,))


@pytest.mark.parametrize("n", range(1, 6))
def test_classes_are_those_of_the_reference_on_every_topology(n: int) -> None:
    for graph in connected_graphs(n):
        topology = Topology.of_pairs(n, graph)
        order = class_order(request_for(tiny(), SLOW, topology))
        groups = classes(Machine(SLOW, topology), [PLENTY] * n)
        assert [card for group in groups for card in group] == sorted(order, key=order.__getitem__)


def test_a_pool_goes_through_every_set_behind_every_other() -> None:
    pool = Pool(((0, 2), (1,)))
    assert pool.complete and pool.size == 3
    pairs = [(used, kind.counts) for used, kind in pool.pairs()]
    assert len(pairs) == len(set(pairs)) == 6 * 3 - 6
    assert [sum(used) for used, _ in pairs] == sorted(sum(used) for used, _ in pairs)
    for used, kind in pool.pairs():
        cards = pool.cards_of(used, kind)
        assert len(cards) == sum(kind.counts)
        assert after(used, kind) <= (2, 1)
    assert pool.cards_of((1, 0), pool.kind((1, 1))) == (2, 1)
    assert pool.kind((1, 1)).cards == (0, 1)


def test_a_pool_of_many_classes_is_a_row_of_neighbours() -> None:
    n = 9
    assert 3**n > PAIRS_MAX
    assert Pool([tuple(range(200))]).complete
    pool = Pool([(card,) for card in range(n)])
    assert not pool.complete
    pairs = list(pool.pairs())
    assert len(pairs) == n * (n + 1) // 2
    for used, kind in pairs:
        cards = pool.cards_of(used, kind)
        assert list(cards) == list(range(cards[0], cards[-1] + 1))
        assert sum(used) == cards[0]


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (1, 1, 1), (5, 2, 2)])
def test_deals_are_as_even_as_can_be(sizes: tuple[int, ...]) -> None:
    numbers = iter(range(100))
    groups = [tuple(next(numbers) for _ in range(size)) for size in sizes]
    for count in range(2, sum(sizes) + 1):
        dealt = deals(groups, count)
        hands = [[card for own in hand for card in own] for hand in dealt]
        assert sorted(card for hand in hands for card in hand) == list(range(sum(sizes)))
        assert max(map(len, hands)) - min(map(len, hands)) <= 1
        for group in groups:
            per_hand = [len(set(hand) & set(group)) for hand in hands]
            assert max(per_hand) - min(per_hand) <= 1


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 1, 1), (3, 1)])
def test_every_deal_is_every_deal(sizes: tuple[int, ...]) -> None:
    """By counts of each class, against all assignments of all cards."""
    numbers = iter(range(100))
    groups = [tuple(next(numbers) for _ in range(size)) for size in sizes]
    n = sum(sizes)
    for most in range(2, n + 1):
        expected = set()
        for where in itertools.product(range(most + 1), repeat=n):
            hands = [[c for c in range(n) if where[c] == i] for i in range(most)]
            counts = sorted(
                tuple(len(set(hand) & set(group)) for group in groups) for hand in hands if hand
            )
            if len(counts) > 1:
                expected.add(tuple(counts))
        found = []
        for dealt in every_deal(groups, most):
            cards = [card for hand in dealt for own in hand for card in own]
            assert len(cards) == len(set(cards))
            found.append(
                tuple(
                    sorted(
                        tuple(sum(len(set(own) & set(g)) for own in hand) for g in groups)
                        for hand in dealt
                    )
                )
            )
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((1,), "tp1"),
        ((4,), "tp4"),
        ((1, 1, 1), "pp3"),
        ((4, 4), "tp4xpp2"),
        ((3, 2), "pp2(3+2)"),
        ((1, 1, 2), "pp3(1+1+2)"),
    ],
)
def test_names_of_rows_of_stages(sizes: tuple[int, ...], name: str) -> None:
    assert plan_name(sizes) == name


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("tp4",), "tp4"),
        (("tp1", "tp1"), "dp2"),
        (("tp4", "tp4"), "dp2xtp4"),
        (("pp2", "tp1"), "dp2(pp2,tp1)"),
    ],
)
def test_names_of_replicas(names: tuple[str, ...], name: str) -> None:
    assert fleet_name([Plan(one, ()) for one in names]) == name
