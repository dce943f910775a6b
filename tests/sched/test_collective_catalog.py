# SPDX-License-Identifier: Apache-2.0
"""Every algorithm of the catalogue: run by the interpreter, proven by `verify`, and as many steps
and bytes as its file says."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from test_collective_interpreter import mistakes

from spanker.errors import PlanError
from spanker.sched import Link, LinkState, Share, Topology, split
from spanker.sched.collectives import CollectivePlan, Kind, ReduceOp, algorithms, make
from spanker.sched.verify import verify

REDUCTIONS = (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)
SIZES = (0, 1, 7, 4096)


def connected(n: int, rng: random.Random) -> Topology:
    """Random cards in random order on a random graph in which every card reaches every other.

    A quarter of the links goes one way only, some are down, and a directed ring keeps it connected.
    """
    numbers = rng.sample(range(256), n)
    ring = list(numbers)
    rng.shuffle(ring)
    ends = set(zip(ring, ring[1:] + ring[:1], strict=True)) if n > 1 else set()
    for a, b in itertools.combinations(numbers, 2):
        if rng.random() < 2 / n:
            ends |= rng.choice([{(a, b)}, {(b, a)}, {(a, b), (b, a)}, {(a, b), (b, a)}])
    down = {
        (a, b): rng.choice([LinkState.DOWN, LinkState.TRAINING, LinkState.ERROR])
        for a, b in itertools.permutations(numbers, 2)
        if (a, b) not in ends and rng.random() < 0.2
    }
    links = [Link(a, b, LinkState.UP) for a, b in sorted(ends)]
    links += [Link(a, b, state) for (a, b), state in sorted(down.items())]
    return Topology(tuple(numbers), tuple(links))


def graphs(n: int, rng: random.Random) -> dict[str, Topology]:
    return {
        "mesh": Topology.with_mock(n),
        "ring": Topology.ring(n),
        "line": Topology.line(n),
        "random": connected(n, rng),
    }


def named() -> Iterator[tuple[Kind, bool, str]]:
    for kind in Kind:
        for ordered in (False, True) if kind in REDUCTIONS else (False,):
            for algorithm in algorithms(kind, ordered):
                yield kind, ordered, algorithm


def random_shares(elements: int, n: int, rng: random.Random) -> tuple[Share, ...]:
    """Uneven ones, some of them empty."""
    weights = [rng.choice((0, 0, 1, 2, 7)) for _ in range(n)]
    weights[rng.randrange(n)] = 1
    return split(elements, n, weights=weights)


def plan_for(
    kind: Kind, ordered: bool, algorithm: str, topology: Topology, size: int, rng: random.Random
) -> CollectivePlan | None:
    """A plan with random choices of all that is free; None where the links are not there."""
    n = len(topology.cards)
    elements = {Kind.BARRIER: 0, Kind.ALL_TO_ALL: size * n}.get(kind, size)
    uneven = kind in (*REDUCTIONS, Kind.ALL_GATHER) and rng.random() < 0.5
    try:
        return make(
            kind,
            topology,
            elements,
            algorithm=algorithm,
            op=rng.choice((ReduceOp.SUM, ReduceOp.AVG) if ordered else list(ReduceOp)),
            ordered=ordered,
            shares=random_shares(elements, n, rng) if uneven else None,
            root=rng.choice(topology.cards) if kind is Kind.BROADCAST else None,
            chunks=rng.choice((None, 1, 2, 5)),
        )
    except PlanError as error:
        assert algorithm != "routed" and "algorithm 'routed'" in str(error)
        return None


def check(plan: CollectivePlan, topology: Topology, rng: random.Random) -> None:
    verify(plan, topology)
    assert mistakes(plan, rng) == [], plan
    if plan.kind is not Kind.BARRIER:
        # Card i of its group, a block for every pair: no more than a few times DATA, but where each
        # card holds what all have.
        most = max(4, len(plan.cards) - 1) if plan.algorithm == "everyone" else 4
        assert plan.tmp_elements <= most * plan.elements + 4 * len(plan.cards)


@pytest.mark.parametrize("n", range(1, 17))
def test_every_algorithm_does_what_its_kind_promises(n: int) -> None:
    rng = random.Random(n)
    found: Counter[str] = Counter()
    for graph, topology in graphs(n, rng).items():
        for kind, ordered, algorithm in named():
            plan = plan_for(kind, ordered, algorithm, topology, rng.choice(SIZES), rng)
            if plan is not None:
                check(plan, topology, rng)
                found[graph] += 1
    everything = len(list(named()))
    assert found["mesh"] == everything
    assert min(found.values()) >= len([name for *_, name in named() if name == "routed"])


@pytest.mark.long
@pytest.mark.parametrize("n", range(1, 17))
def test_every_algorithm_on_every_graph_with_every_size(n: int) -> None:
    rng = random.Random(n)
    for (kind, ordered, algorithm), size in itertools.product(named(), SIZES):
        for topology in graphs(n, rng).values():
            plan = plan_for(kind, ordered, algorithm, topology, size, rng)
            if plan is not None:
                check(plan, topology, rng)


@pytest.mark.parametrize(
    ("kind", "algorithm", "n"),
    [
        (Kind.ALL_REDUCE, "owner", 3),
        (Kind.ALL_REDUCE, "chain", 4),
        (Kind.ALL_REDUCE, "routed", 5),
        (Kind.REDUCE_SCATTER, "chain", 3),
        (Kind.BROADCAST, "routed", 5),
    ],
)
def test_a_million_elements_and_three(kind: Kind, algorithm: str, n: int) -> None:
    rng = random.Random(n)
    topology = Topology.with_mock(n) if algorithm == "owner" else Topology.line(n)
    plan = make(kind, topology, 1_000_003, algorithm=algorithm)
    verify(plan, topology)
    assert mistakes(plan, rng, np.float32) == []


@pytest.mark.parametrize("n", [33, 64])
def test_more_cards_than_anyone_runs_in_a_test(n: int) -> None:
    rng = random.Random(n)
    for kind, algorithm in ((Kind.ALL_REDUCE, "routed"), (Kind.BARRIER, "doubling")):
        topology = Topology.with_mock(n)
        plan = plan_for(kind, kind in REDUCTIONS, algorithm, topology, 200, rng)
        assert plan is not None
        check(plan, topology, rng)


def test_cards_have_their_own_numbers_and_order() -> None:
    topology = Topology.with_mock(8)
    plan = make("all-gather", topology, 10, algorithm="direct", cards=(6, 1, 3))
    assert plan.cards == (6, 1, 3)
    assert {(s.source, s.what.start, s.what.stop) for p in plan.phases for s in p.sends} == {
        (6, 0, 4),
        (1, 4, 7),
        (3, 7, 10),
    }
    verify(plan, topology)


# --- steps and bytes ----------------------------------------------------------------------


def steps(plan: CollectivePlan) -> int:
    return sum(bool(phase.sends) for phase in plan.phases)


def leaving(plan: CollectivePlan) -> Counter[int]:
    """Elements that each card sends."""
    sent: Counter[int] = Counter()
    for phase in plan.phases:
        for send in phase.sends:
            sent[send.source] += send.what.size
    return sent


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 16])
def test_steps_are_those_that_the_files_state(n: int) -> None:
    log = math.ceil(math.log2(n))
    expected = {
        ("all-gather", "direct"): 1,
        ("all-gather", "ring"): n - 1,
        ("all-gather", "doubling"): log,
        ("all-gather", "tree"): 2 * log,
        ("all-gather", "hierarchical"): 2 if n > 2 else 1,
        ("all-gather", "routed"): 1,
        ("reduce-scatter", "direct"): 1,
        ("reduce-scatter", "ring"): n - 1,
        ("reduce-scatter", "halving"): log,
        ("reduce-scatter", "tree"): 2 * log,
        ("reduce-scatter", "owner"): 1,
        ("reduce-scatter", "routed"): 1,
        ("all-reduce", "direct"): 2,
        ("all-reduce", "ring"): 2 * (n - 1),
        ("all-reduce", "doubling"): int(math.log2(n)) + 2 * (n & (n - 1) > 0),
        ("all-reduce", "halving"): 2 * log,
        ("all-reduce", "tree"): 2 * log,
        ("all-reduce", "hierarchical"): 4 if n > 2 else 2,
        ("all-reduce", "owner"): 2,
        ("all-reduce", "everyone"): 1,
        ("all-reduce", "chain"): 5 + 2 * n - 3,
        ("all-reduce", "routed"): 2,
        ("broadcast", "direct"): 1,
        ("broadcast", "tree"): log,
        ("broadcast", "chain"): 5 + n - 2,
        ("all-to-all", "direct"): 1,
        ("all-to-all", "rotation"): n - 1,
        ("all-to-all", "doubling"): log,
        ("all-to-all", "hierarchical"): 2 if n > 2 else 1,
        ("barrier", "direct"): 1,
        ("barrier", "ring"): n - 1,
        ("barrier", "doubling"): log,
        ("barrier", "tree"): 2 * log,
    }
    found = {
        (kind, algorithm): steps(
            make(
                kind,
                n,
                0 if kind == "barrier" else 240 * n,
                algorithm=algorithm,
                ordered=False,
                chunks=5,
            )
        )
        for kind, algorithm in expected
    }
    assert found == expected


@pytest.mark.parametrize(("n", "d"), [(5, 2), (8, 4)])
def test_routed_steps_are_the_longest_shortest_way(n: int, d: int) -> None:
    for topology, longest in ((Topology.ring(n), d), (Topology.line(n), n - 1)):
        assert steps(make("all-gather", topology, 64 * n)) == longest
        assert steps(make("all-to-all", topology, 64 * n)) == longest
        assert steps(make("all-reduce", topology, 64 * n)) == 2 * longest


@pytest.mark.parametrize("algorithm", ["direct", "ring", "doubling", "routed"])
@pytest.mark.parametrize("n", [2, 3, 6, 8])
def test_an_all_gather_that_is_optimal_in_bytes_sends_every_share_n_minus_1_times(
    algorithm: str, n: int
) -> None:
    sent = leaving(make("all-gather", n, 12 * n, algorithm=algorithm))
    assert set(sent.values()) == {12 * (n - 1)}


@pytest.mark.parametrize("algorithm", ["direct", "ring", "halving", "owner"])
def test_an_all_reduce_that_is_optimal_in_bytes_sends_twice_that(algorithm: str) -> None:
    plan = make("all-reduce", 6, 72, algorithm=algorithm, ordered=algorithm == "owner")
    assert set(leaving(plan).values()) == {2 * 12 * 5}


def test_a_ring_is_found_where_card_order_is_none() -> None:
    topology = Topology.of_pairs(6, [(0, 3), (3, 1), (1, 5), (5, 2), (2, 4), (4, 0)])
    plan = make("all-reduce", topology, 600, algorithm="ring", ordered=False)
    assert steps(plan) == 10
    assert set(leaving(plan).values()) == {1000}


def test_a_chain_sends_results_round_where_it_cannot_send_them_back() -> None:
    links = tuple(Link(i, (i + 1) % 4, LinkState.UP) for i in range(4))
    topology = Topology(tuple(range(4)), links)
    rng = random.Random(0)
    for kind in REDUCTIONS:
        check(make(kind, topology, 100, algorithm="chain", op="avg"), topology, rng)


def test_groups_keep_bytes_off_the_links_between_them() -> None:
    plan = make("all-gather", 6, 60, algorithm="hierarchical", groups=((0, 1, 2), (3, 4, 5)))
    across = sum(
        send.what.size
        for phase in plan.phases
        for send in phase.sends
        if (send.source < 3) != (send.target < 3)
    )
    assert across == 60
    verify(plan, Topology.with_mock(6))


def test_uneven_groups_in_any_order_are_right() -> None:
    rng = random.Random(3)
    topology = Topology.with_mock(7)
    for kind in Kind:
        elements = {Kind.BARRIER: 0, Kind.ALL_TO_ALL: 70}.get(kind, 50)
        plan = make(
            kind,
            topology,
            elements,
            algorithm="hierarchical",
            ordered=False,
            groups=((4, 0, 6), (1,), (5, 2, 3)),
        )
        check(plan, topology, rng)


# --- what is refused ----------------------------------------------------------------------


def test_algorithms_that_keep_the_order_are_some_of_all() -> None:
    for kind in REDUCTIONS:
        everyone = {"everyone"} if kind is Kind.ALL_REDUCE else set()
        assert set(algorithms(kind, ordered=True)) == {"owner", "chain", "routed"} | everyone
        assert set(algorithms(kind)) > set(algorithms(kind, ordered=True))
    assert algorithms("broadcast", ordered=True) == algorithms("broadcast")


def test_sums_of_floats_are_in_order_unless_said_otherwise() -> None:
    assert make("all-reduce", 3, 9).ordered
    assert make("all-reduce", 3, 9, op="avg").ordered
    assert not make("all-reduce", 3, 9, op="max").ordered
    assert not make("all-reduce", 3, 9, ordered=False).ordered
    assert not make("all-gather", 3, 9).ordered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "all-together"},
            "no collective 'all-together': expected one of all-reduce, reduce-scatter, "
            "all-gather, broadcast, all-to-all, barrier",
        ),
        ({"op": "mean"}, "no reduction 'mean': expected one of sum, avg, max, min"),
        (
            {"algorithm": "rings"},
            "all-reduce: no algorithm 'rings'; expected one of owner, everyone, chain, routed",
        ),
        (
            {"algorithm": "ring"},
            "all-reduce: algorithm 'ring' does not fold in card order; expected one of owner, "
            "everyone, chain, routed, or ordered=False where any order is right",
        ),
        ({"elements": -1}, "all-reduce over 3 cards: expected 0 or more elements, got -1"),
        (
            {"kind": "barrier"},
            "barrier over 3 cards: expected 0 elements, got 9",
        ),
        (
            {"kind": "all-to-all", "elements": 10},
            "all-to-all over 3 cards: expected as many elements for each card, got 10 in all; "
            "pad to a multiple of 3",
        ),
        ({"root": 1}, "all-reduce over 3 cards: expected no root, got root 1"),
        (
            {"kind": "broadcast", "root": 3},
            "broadcast over 3 cards: expected one of the cards, got root 3",
        ),
        ({"chunks": 0}, "all-reduce over 3 cards: expected 1 chunk or more, got 0"),
        (
            {"groups": ((0, 1), (1, 2))},
            "all-reduce over 3 cards: expected each card in one group, got ((0, 1), (1, 2)) for "
            "(0, 1, 2)",
        ),
        (
            {"shares": split(9, 2)},
            "all-reduce over 3 cards: expected 3 shares, got 2",
        ),
        (
            {"shares": split(8, 3)},
            "all-reduce over 3 cards: expected shares of 9 elements in all, got 8",
        ),
        (
            {"shares": (Share(0, 3), Share(4, 6), Share(6, 9))},
            "all-reduce over 3 cards: expected share 1 to start at 3, where the one before ends, "
            "got 4; sched.split makes shares",
        ),
        (
            {"kind": "broadcast", "shares": split(9, 3)},
            "broadcast over 3 cards: expected no shares, got 3",
        ),
        (
            {"kind": "all-to-all", "shares": split(9, 3, weights=(1, 2, 3))},
            "all-to-all over 3 cards: expected shares of one size, got [2, 3, 4]",
        ),
        ({"topology": 0}, "a collective needs one card or more, each once, got ()"),
        ({"topology": (4, 4)}, "a collective needs one card or more, each once, got (4, 4)"),
        ({"cards": (0, 1)}, "a choice of cards needs a topology to choose from; give only one"),
        (
            {"topology": Topology.with_mock(3), "cards": (0, 5)},
            "expected cards of the topology, (0, 1, 2), got (0, 5)",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make(**{"kind": "all-reduce", "topology": 3, "elements": 9, **arguments})  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_link_that_is_not_up_is_named_with_the_way_out() -> None:
    links = [
        Link(a, b, LinkState.TRAINING if (a, b) == (7, 4) else LinkState.UP)
        for a, b in itertools.permutations((4, 7, 9), 2)
    ]
    with pytest.raises(PlanError) as caught:
        make("all-gather", Topology((4, 7, 9), tuple(links)), 9, algorithm="direct")
    assert str(caught.value) == (
        "all-gather 'direct' over 3 cards needs a link 7 -> 4 that is up, and there is none; "
        "algorithm 'routed' makes do with any"
    )


@pytest.mark.parametrize("kind", list(Kind))
def test_cards_that_cannot_be_reached_are_named(kind: Kind) -> None:
    links = (Link(3, 5, LinkState.UP), Link(5, 3, LinkState.UP), Link(5, 8, LinkState.UP))
    with pytest.raises(PlanError, match=r"the cards are not connected: card \d") as caught:
        elements = 0 if kind is Kind.BARRIER else 30
        make(kind, Topology((3, 5, 8), links), elements, root=8 if kind is Kind.BROADCAST else None)
    assert "bring a link up" in str(caught.value)


def test_without_a_ring_or_chain_this_is_said() -> None:
    star = Topology.of_pairs(5, [(0, i) for i in range(1, 5)])
    with pytest.raises(PlanError, match=r"no ring .* all 5 cards; algorithm 'routed' needs none"):
        make("all-gather", star, 10, algorithm="ring")
    with pytest.raises(PlanError, match=r"no chain .* from card 0 through all 5 cards"):
        make("broadcast", star, 10, algorithm="chain")
    with pytest.raises(PlanError, match="no groups of neighbours among 5 cards"):
        make("all-gather", star, 10, algorithm="hierarchical")
