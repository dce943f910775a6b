# SPDX-License-Identifier: Apache-2.0
"""`seconds` against sums done by hand, and against a second statement of docs/api/timing-model.md
in exact fractions."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import attrs
import pytest
from test_collective_catalog import connected, named, plan_for

from spanker.errors import PlanError
from spanker.sched import REV_A, CardSpeed, LinkSpeed, LinkState, Profile, Topology
from spanker.sched.collectives import CollectivePlan, Fold, Kind, make, seconds
from spanker.sched.collectives.cost import fair_rates
from spanker.sched.collectives.plan import Copy

PLAIN = Profile(
    "plain",
    local_ddr_bytes_per_s=1e9,
    intercard_bytes_per_s=1e6,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
    intercard_latency_s=1e-3,
    elements_per_s=1e6,
    command_s=1e-4,
)
MESH = Topology.with_mock(4)


# --- by hand ------------------------------------------------------------------------------


def test_one_message_takes_command_bytes_and_latency() -> None:
    plan = make("broadcast", 2, 1000, algorithm="direct")
    assert seconds(plan, PLAIN, MESH, 4) == pytest.approx(1e-4 + 4000 / 1e6 + 1e-3)
    assert seconds(plan, PLAIN, MESH, 2) == pytest.approx(1e-4 + 2000 / 1e6 + 1e-3)


def test_links_of_a_mesh_work_side_by_side_unless_ports_are_the_limit() -> None:
    plan = make("all-gather", 4, 4000, algorithm="direct")
    assert seconds(plan, PLAIN, MESH) == pytest.approx(1e-4 + 4000 / 1e6 + 1e-3)
    ports = attrs.evolve(PLAIN, port_bytes_per_s=1e6)
    assert seconds(plan, ports, MESH) == pytest.approx(1e-4 + 3 * 4000 / 1e6 + 1e-3)


def test_a_ring_takes_as_many_steps_as_it_has() -> None:
    plan = make("all-gather", 4, 4000, algorithm="ring")
    assert seconds(plan, PLAIN, MESH) == pytest.approx(3 * (1e-4 + 4000 / 1e6 + 1e-3))


def test_a_fold_reads_two_and_writes_one() -> None:
    plan = make("all-reduce", 2, 1000, algorithm="direct", ordered=False)
    exchange = 1e-4 + 500 * 4 / 1e6 + 1e-3
    by_elements = 1e-4 + 500 / 1e6
    assert seconds(plan, PLAIN, MESH) == pytest.approx(2 * exchange + by_elements)
    slow = attrs.evolve(PLAIN, local_ddr_bytes_per_s=1e5)
    assert seconds(plan, slow, MESH) == pytest.approx(2 * exchange + 1e-4 + 500 * 12 / 1e5)


def test_a_slow_card_or_link_holds_up_who_waits_for_it() -> None:
    plan = make("all-reduce", 2, 1000, algorithm="direct", ordered=False)
    plain = seconds(plan, PLAIN, MESH)
    straggler = attrs.evolve(PLAIN, cards=(CardSpeed(1, compute=0.5),))
    assert seconds(plan, straggler, MESH) == pytest.approx(plain + 500 / 1e6)
    link = attrs.evolve(PLAIN, links=(LinkSpeed(1, 0, 5e5, 2e-3),))
    # Card 1 goes on when its own send has left, and its second one arrives last.
    leaves, fold = 1e-4 + 500 * 4 / 5e5, 1e-4 + 500 / 1e6
    assert seconds(plan, link, MESH) == pytest.approx(2 * leaves + fold + 2e-3)


def test_nothing_to_do_takes_no_time() -> None:
    assert seconds(make("all-reduce", 1, 1000), PLAIN, MESH) == 0
    assert seconds(make("all-reduce", 4, 0), PLAIN, MESH) == 0


def test_a_plan_over_a_link_that_is_not_there_has_no_time() -> None:
    plan = make("all-gather", 4, 8, algorithm="direct")
    with pytest.raises(PlanError, match="expected link 0 -> 2 to be up"):
        seconds(plan, PLAIN, Topology.line(4))


def test_rates_are_shared_by_hand() -> None:
    # Card 0 sends to 1, 2 and 3; card 1 sends to 2 over a slow link.
    flows = [(0, 1, 10.0), (0, 2, 10.0), (0, 3, 1.0), (1, 2, 6.0)]
    assert fair_rates(flows, 10.0) == pytest.approx([4.5, 4.5, 1.0, 5.5])
    assert fair_rates(flows, None) == [10.0, 10.0, 1.0, 6.0]


@pytest.mark.parametrize("seed", range(50))
def test_each_flow_has_a_place_that_keeps_it_from_going_faster(seed: int) -> None:
    rng = random.Random(seed)
    links = rng.sample(list(itertools.permutations(range(6), 2)), rng.randint(1, 30))
    flows = [(a, b, rng.choice((0.5, 1.0, 2.0, 9.0, rng.uniform(0, 8)))) for a, b in links]
    rates = fair_rates(flows, 4.0)
    for end in (0, 1):
        for card in range(6):
            assert sum(r for r, f in zip(rates, flows, strict=True) if f[end] == card) < 4 + 1e-9
    for rate, flow in zip(rates, flows, strict=True):
        assert 0 < rate <= flow[2] + 1e-9
        full_where_fastest = any(
            sum(r for r, f in zip(rates, flows, strict=True) if f[end] == flow[end]) > 4 - 1e-9
            and rate
            >= max(r for r, f in zip(rates, flows, strict=True) if f[end] == flow[end]) - 1e-9
            for end in (0, 1)
        )
        assert rate > flow[2] - 1e-9 or full_where_fastest, (flow, rate)


# --- a second statement -------------------------------------------------------------------


def water(flows: list[tuple[int, int, Fraction]], port: Fraction | None) -> list[Fraction]:
    """Max-min rates by their definition: all rise together, and a flow stops where a limit is."""
    rates = [Fraction(0)] * len(flows)
    rising = set(range(len(flows)))
    while rising:
        room = [flows[i][2] - rates[i] for i in rising]
        for end, card in {(end, flows[i][end]) for i in rising for end in (0, 1)}:
            if port is not None:
                through = [i for i, flow in enumerate(flows) if flow[end] == card]
                left = port - sum(rates[i] for i in through)
                room.append(left / len([i for i in through if i in rising]))
        step = min(room)
        for i in rising:
            rates[i] += step
        full = {
            (end, card)
            for end in (0, 1)
            for card in {flow[end] for flow in flows}
            if port is not None
            and sum(r for r, f in zip(rates, flows, strict=True) if f[end] == card) == port
        }
        rising = {
            i
            for i in rising
            if rates[i] < flows[i][2] and not {(e, flows[i][e]) for e in (0, 1)} & full
        }
    return rates


def exact_seconds(plan: CollectivePlan, profile: Profile, element_bytes: int) -> Fraction:
    """The page again, message by message; between two moments nothing is kept but what is left."""
    command, port = Fraction(profile.command_s), profile.port_bytes_per_s
    at = dict.fromkeys(plan.cards, 0)  # phase
    free: dict[int, Fraction | None] = {card: Fraction(0) for card in plan.cards}
    begun: dict[int, bool] = dict.fromkeys(plan.cards, False)
    owed: dict[tuple[int, int], int] = {}  # (card, phase): sends that have not left
    due: dict[tuple[int, int], int] = {}  # (card, phase): messages that have not arrived
    for number, phase in enumerate(plan.phases):
        for send in phase.sends:
            owed[send.source, number] = owed.get((send.source, number), 0) + 1
            due[send.target, number] = due.get((send.target, number), 0) + 1
    sending: set[int] = set()
    queues: dict[tuple[int, int], list[list]] = {}
    flying: list[tuple[Fraction, int, int]] = []
    now = end = Fraction(0)

    def work_s(card: int, number: int) -> Fraction:
        speed, total = profile.card(card), Fraction(0)
        for local in plan.phases[number].local:
            if local.card == card:
                factor = 3 if isinstance(local, Fold) else 2
                nbytes = factor * local.into.size * element_bytes
                memory = Fraction(profile.local_ddr_bytes_per_s) * Fraction(speed.memory)
                rate = Fraction(profile.elements_per_s) * Fraction(speed.compute)
                work = Fraction(0) if isinstance(local, Copy) else local.into.size / rate
                total += command + max(nbytes / memory, work)
        return total

    while True:
        progress = True
        while progress:
            progress = False
            for landed in [f for f in flying if f[0] <= now]:
                flying.remove(landed)
                due[landed[1], landed[2]] -= 1
            for card in plan.cards:
                number, ready = at[card], free[card]
                if number == len(plan.phases) or ready is None or ready > now:
                    continue
                exchanges = (card, number) in owed or (card, number) in due
                if exchanges and not begun[card]:
                    # Command taken up: `free` is when it has been.
                    begun[card], free[card] = True, now + command
                elif exchanges and begun[card] and card not in sending:
                    sending.add(card)
                    for send in plan.phases[number].sends:
                        if send.source == card:
                            queue = queues.setdefault((card, send.target), [])
                            queue.append([Fraction(send.what.size * element_bytes), number])
                else:
                    done = not owed.get((card, number)) and not due.get((card, number))
                    if exchanges and not done:
                        continue
                    sending.discard(card)
                    begun[card] = False
                    at[card] += 1
                    free[card] = now + work_s(card, number)
                    end = max(end, now + work_s(card, number))
                progress = True
        heads = [(ends, queue[0]) for ends, queue in queues.items() if queue]
        rates = water(
            [(*ends, Fraction(profile.link(*ends).bytes_per_s)) for ends, _ in heads],
            None if port is None else Fraction(port),
        )
        times = [now + head[0] / rate for (_, head), rate in zip(heads, rates, strict=True)]
        times += [landing for landing, _, _ in flying]
        times += [f for c, f in free.items() if f is not None and f > now]
        if not times:
            assert all(number == len(plan.phases) for number in at.values())
            return end
        then = min(times)
        for (ends, head), rate in zip(heads, rates, strict=True):
            head[0] -= rate * (then - now)
            if head[0] == 0:
                queues[ends].pop(0)
                owed[ends[0], head[1]] -= 1
                latency = Fraction(profile.link(*ends).latency_s)
                flying.append((then + latency, ends[1], head[1]))
        now = then


def random_profile(topology: Topology, rng: random.Random) -> Profile:
    return attrs.evolve(
        PLAIN,
        port_bytes_per_s=rng.choice((None, 1e6, 2.5e6)),
        cards=tuple(
            CardSpeed(card, rng.choice((0.5, 1.0)), rng.choice((0.25, 1.0)))
            for card in topology.cards
        ),
        links=tuple(
            LinkSpeed(
                link.local_sail,
                link.remote_sail,
                rng.choice((2e5, 1e6, 3e6)),
                rng.choice((0, 1e-3)),
            )
            for link in topology.links
            if link.state is LinkState.UP and rng.random() < 0.7
        ),
    )


@pytest.mark.parametrize("seed", range(60))
def test_time_equals_that_of_a_second_statement_of_the_rules(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(2, 6)
    topology = rng.choice((Topology.with_mock(n), Topology.ring(n), connected(n, rng)))
    choices = list(named())
    rng.shuffle(choices)
    done = 0
    for kind, ordered, algorithm in choices:
        plan = plan_for(kind, ordered, algorithm, topology, rng.choice((1, 7, 200)), rng)
        if plan is None:
            continue
        profile = random_profile(topology, rng)
        exact = float(exact_seconds(plan, profile, 4))
        assert seconds(plan, profile, topology, 4) == pytest.approx(exact, rel=1e-9), plan
        done += 1
        if done == 2:
            break


def test_more_bytes_never_take_less_and_a_barrier_takes_its_latencies() -> None:
    for algorithm in ("direct", "ring", "doubling", "tree", "hierarchical", "routed"):
        times = [
            seconds(make("all-gather", 8, size, algorithm=algorithm), REV_A, Topology.with_mock(8))
            for size in (8, 800, 80_000)
        ]
        assert times == sorted(times)
    barrier = make(Kind.BARRIER, 8, 0, algorithm="doubling")
    step = REV_A.command_s + 4 / REV_A.intercard_bytes_per_s + REV_A.intercard_latency_s
    assert seconds(barrier, REV_A, Topology.with_mock(8)) == pytest.approx(3 * step)
