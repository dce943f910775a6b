# SPDX-License-Identifier: Apache-2.0
"""Dividing units among the cards of a stage, beside all ways there are; and the exchange behind."""

from __future__ import annotations

import itertools
import math
import random

import attrs
import numpy as np
import pytest
from planning_reference import SLOW

from spanker.sched.bandwidth import LinkSpeed
from spanker.sched.cost import Machine
from spanker.sched.planning import dividing
from spanker.sched.planning.dividing import Division, Gather, Phase
from spanker.sched.topology import Link, LinkState, Topology

COMMAND_S = 3e-6


def any_machine(rng: random.Random, n: int) -> Machine:
    """Links of any speed, some missing, with ports or without, relays for nothing or dear."""
    ends = [(a, b) for a in range(n) for b in range(n) if a != b]
    missing = set(rng.sample(ends, rng.randint(0, len(ends)))) if rng.random() < 0.6 else set()
    links = tuple(Link(*e, LinkState.DOWN if e in missing else LinkState.UP) for e in ends)
    profile = attrs.evolve(
        SLOW,
        port_bytes_per_s=rng.choice([None, 1e6, 3e7]),
        host_link_bytes_per_s=rng.choice([None, 1e6, 1e8]),
        host_link_latency_s=rng.choice([0.0, 1e-4]),
        links=tuple(
            LinkSpeed(*e, rng.choice([1e5, 1e7, 1e9]), rng.choice([0.0, 1e-5, 1e-3]))
            for e in ends
            if rng.random() < rng.choice([0.0, 0.5])
        ),
    )
    return Machine(profile, Topology(tuple(range(n)), links))


def any_phase(rng: random.Random, n: int, units: int, *, alike: bool, monotone: bool) -> Phase:
    group = rng.choice([1, 1, 2, 3])
    draw = np.random.default_rng(rng.randrange(1 << 30))

    def table() -> np.ndarray:
        found = draw.random((1 if alike else n, group, units + 1)) * 1e-3
        if monotone:
            found = np.sort(found, axis=2)
        return np.repeat(found, n, axis=0) if alike else found

    nbytes = rng.choice([0.0, 10.0, 1e4])
    partial = rng.random() < 0.5
    # As in tables of the cost model, who ends with a smaller unit takes less.
    seconds = table()
    return Phase(
        seconds,
        nbytes,
        seconds * 0.9 if partial else None,
        nbytes * rng.random() if partial else 0.0,
    )


def by_hand(division: Division, way: tuple[int, ...], machine: Machine) -> float:
    total = 0.0
    for phase in division.phases:
        times, sends = [], []
        for card, count in enumerate(way):
            start = sum(way[:card])
            last = count > 0 and start + count == division.units and phase.ending is not None
            table = phase.ending if last else phase.seconds
            times.append(table[card, start % phase.seconds.shape[1], count])
            sends.append(count * phase.unit_bytes - (phase.less_bytes if last else 0.0))
        found = machine.gather(machine.cards, sends, COMMAND_S)
        # Of commands those of the exchanges behind the first.
        total += max(times) + found.seconds - COMMAND_S * (len(sends) > 1)
    return total


def all_ways(units: int, n: int) -> list[tuple[int, ...]]:
    return [way for way in itertools.product(range(units + 1), repeat=n) if sum(way) == units]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("few_ways", [True, False], ids=["all ways", "by limits"])
def test_no_way_is_better_than_the_bound_nor_the_best_missed(
    seed: int, few_ways: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    if not few_ways:
        monkeypatch.setattr(dividing, "WAYS_MAX", 0)
    n, units = rng.randint(1, 4), rng.randint(1, 7)
    machine = any_machine(rng, n)
    # Only times that grow with the units may be said to be alike.
    alike = machine.uniform and rng.random() < 0.5
    phases = [
        any_phase(rng, n, units, alike=alike, monotone=alike) for _ in range(rng.randint(1, 2))
    ]
    division = Division(units, phases, Gather(machine, machine.cards, COMMAND_S), alike)
    prices = {way: by_hand(division, way, machine) for way in all_ways(units, n)}
    solution = division.solve()
    assert solution.seconds == pytest.approx(prices[solution.units], rel=1e-12)
    assert solution.bound <= min(prices.values()) * (1 + 1e-12)
    if few_ways:
        assert solution.seconds == pytest.approx(min(prices.values()), rel=1e-12)
        assert solution.bound == solution.seconds

    found = division.by_users
    assert found is not None
    for way in found:
        users = frozenset(i for i, count in enumerate(way.units) if count)
        of_them = [p for w, p in prices.items() if {i for i, c in enumerate(w) if c} == users]
        assert way.seconds == pytest.approx(prices[way.units], rel=1e-12)
        assert way.bound <= min(of_them) * (1 + 1e-12)
    if not alike:
        # Whatever is left out has a subset that is as fast.
        for way, price in prices.items():
            users = {i for i, count in enumerate(way) if count}
            assert any(
                {i for i, c in enumerate(f.units) if c} <= users and f.bound <= price * (1 + 1e-12)
                for f in found
            )


@pytest.mark.parametrize("seed", range(30))
def test_ways_of_whole_blocks_can_be_ruled_out(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    n, units, avoid = rng.randint(2, 3), rng.choice([4, 6]), 2
    machine = any_machine(rng, n)
    phase = any_phase(rng, n, units, alike=False, monotone=False)
    division = Division(units, [phase], Gather(machine, machine.cards, COMMAND_S), False, avoid)
    allowed = [w for w in all_ways(units, n) if any(count % avoid for count in w)]
    best = min(by_hand(division, way, machine) for way in allowed)
    assert division.solve().units in allowed
    assert division.solve().seconds == pytest.approx(best, rel=1e-12)


def test_of_cards_alike_the_last_one_takes_more_where_the_last_unit_is_small() -> None:
    machine = Machine(SLOW, Topology.with_mock(2))
    seconds = np.arange(4.0)[None, None, :].repeat(2, axis=0)
    ending = np.maximum(seconds - 0.75, 0)
    division = Division(3, [Phase(seconds, 0.0, ending)], Gather(machine, (0, 1)), True)
    assert division.solve().units == (1, 2)
    assert division.solve().seconds == 1.25
    whole = Division(3, [Phase(seconds, 0.0)], Gather(machine, (0, 1)), True)
    assert whole.solve().units == (2, 1)


@pytest.mark.parametrize("seed", range(50))
def test_a_gather_of_many_ways_is_the_machines(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    machine = any_machine(rng, n)
    cards = rng.sample(range(n), rng.randint(1, n))
    ways = [[rng.choice([0.0, 1.0, rng.random() * 1e5]) for _ in cards] for _ in range(5)]
    ways.append([0.0] * len(cards))
    gather = Gather(machine, cards, COMMAND_S)
    found = gather.seconds(np.array(ways))
    for way, seconds in zip(ways, found, strict=True):
        gathered = machine.gather(cards, way, COMMAND_S).seconds - COMMAND_S * (len(cards) > 1)
        assert seconds == pytest.approx(gathered, rel=1e-9, abs=1e-18)
        assert gather.least(math.fsum(way)) <= seconds * (1 + 1e-12)
