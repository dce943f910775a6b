# SPDX-License-Identifier: Apache-2.0
"""Paces of cards and times of exchanges, against sums made by hand."""

from __future__ import annotations

import math

import attrs
import pytest

from spanker.sched.bandwidth import REV_A, CardSpeed, LinkSpeed, Profile
from spanker.sched.cost import Machine
from spanker.sched.topology import Link, LinkState, Topology

# Numbers that show where they went.
PROFILE = Profile(
    name="round",
    local_ddr_bytes_per_s=1000,
    intercard_bytes_per_s=100,
    host_link_bytes_per_s=10,
    host_link_latency_s=0.5,
    intercard_latency_s=0.25,
    port_bytes_per_s=150,
    int8_madds_per_s=400,
    float_madds_per_s=200,
    elements_per_s=50,
    command_s=0.125,
)


def machine(count: int = 3, **changes: object) -> Machine:
    return Machine(attrs.evolve(PROFILE, **changes), Topology.with_mock(count))


def test_a_pace_is_the_profile_upside_down() -> None:
    pace = machine().pace(0)
    assert pace.s_per_byte == 1 / 1000
    assert pace.s_per_work == (1 / 50, 1 / 400, 1 / 200)
    assert pace.command_s == 0.125


def test_a_slow_card_is_slow_by_its_factors_and_commands_are_not() -> None:
    pace = machine(cards=(CardSpeed(1, memory=0.5, compute=0.25),)).pace(1)
    assert pace.s_per_byte == 1 / 500
    assert pace.s_per_work == (4 / 50, 4 / 400, 4 / 200)
    assert pace.command_s == 0.125


def test_cards_that_compute_together_share_cores_and_memory() -> None:
    shared = machine(cores=2, shared_bytes_per_s=1500)
    assert shared.pace(0, (0,)) == machine().pace(0)
    pace = shared.pace(0, (0, 1, 2))
    assert pace.s_per_byte == pytest.approx(1 / 500)
    assert pace.s_per_work == pytest.approx((1.5 / 50, 1.5 / 400, 1.5 / 200))
    assert pace.command_s == 1.5 * 0.125


def test_infinite_speeds_take_no_time() -> None:
    pace = machine(elements_per_s=math.inf, int8_madds_per_s=math.inf).pace(0)
    assert pace.s_per_work[:2] == (0, 0)
    assert machine(intercard_bytes_per_s=math.inf, port_bytes_per_s=None).gather(
        (0, 1), (1e9, 1e9)
    ).seconds == pytest.approx(0.25)


def test_a_gather_is_bound_by_ports_or_else_by_links() -> None:
    # Card 0 sends 2 x 60 bytes through a port of 150 bytes/s.
    assert machine().gather((0, 1, 2), (60, 30, 0)).seconds == pytest.approx(120 / 150 + 0.25)
    # Card 3 receives 180.
    received = machine(4).gather((0, 1, 2, 3), (60, 60, 60, 0)).seconds
    assert received == pytest.approx(180 / 150 + 0.25)
    assert machine(port_bytes_per_s=None).gather((0, 1, 2), (60, 30, 0)).seconds == 60 / 100 + 0.25


def test_what_moves_nothing_takes_nothing() -> None:
    assert machine().gather((0, 1, 2), (0, 0, 0)).seconds == 0
    assert machine().gather((1,), (100,)).seconds == 0
    assert machine().moves_s([]) == 0
    assert machine().moves_s([(0, 1, 0), (1, 1, 50)]) == 0


def test_moves_over_one_link_go_one_after_the_other() -> None:
    assert machine(port_bytes_per_s=None).moves_s([(0, 1, 30), (0, 1, 50), (1, 0, 70)]) == (
        80 / 100 + 0.25
    )


@pytest.mark.parametrize("nbytes", [(60, 30, 0), (10, 20, 30), (0, 0, 7)])
def test_a_gather_on_equal_links_is_its_moves(nbytes: tuple[float, ...]) -> None:
    cards = (2, 0, 1)
    moves = [(a, b, n) for a, n in zip(cards, nbytes, strict=True) for b in cards if a != b]
    assert machine().gather(cards, nbytes).seconds == pytest.approx(machine().moves_s(moves))


def test_a_slow_link_holds_up_its_gather_and_no_other() -> None:
    links = (LinkSpeed(0, 1, bytes_per_s=10, latency_s=1.0),)
    assert machine(links=links).gather((0, 1), (30, 30)).seconds == 30 / 10 + 1.0
    assert machine(links=links).gather((1, 2), (30, 30)).seconds == 30 / 100 + 0.25


def test_a_link_far_away_and_a_slow_one_are_no_sum() -> None:
    links = (LinkSpeed(0, 1, 10, latency_s=0.0), LinkSpeed(1, 0, 1e9, latency_s=2.0))
    found = machine(links=links, port_bytes_per_s=None).gather((0, 1), (30, 30)).seconds
    assert found == pytest.approx(3.0)
    # What a card receives has come when the farthest of it has.
    assert machine(3, links=links).moves_s([(1, 0, 75), (2, 0, 75)]) == pytest.approx(1 + 2.0)


def test_where_a_link_is_missing_the_card_between_hands_on_in_a_second_exchange() -> None:
    line = Machine(PROFILE, Topology.line(3))
    found = line.gather((0, 1, 2), (20, 30, 40), command_s=0.125)
    # First 60 bytes come to card 1 and 60 leave it, or 40 over a link; then 60 leave it again.
    assert found.first_s == pytest.approx(0.125 + 40 / 100 + 0.25)
    assert found.links_s == pytest.approx(2 * (40 / 100 + 0.25))
    assert found.commands_s == 2 * 0.125
    # Nothing of cards 0 and 2 is nothing to hand on.
    once = line.gather((0, 1, 2), (0, 30, 0), command_s=0.125)
    assert once.seconds == pytest.approx(0.125 + 60 / 150 + 0.25)
    # A vote of each for card 0; the votes of card 2 go over card 1, for which this is a vote, too.
    votes = line.choice((0, 1, 2), (0,), 10, command_s=0.125)
    assert votes.seconds == pytest.approx(2 * (0.125 + 10 / 100 + 0.25))


def test_cards_between_which_none_leads_are_relayed_over_the_host_link() -> None:
    line = Machine(PROFILE, Topology.line(3))
    assert line.down == {(0, 2), (2, 0)}
    # 20 bytes of each of two cards, in messages, go up at 10 bytes/s, but for the turn by which one
    # is ahead; then the last message comes down, and two latencies.
    whole = 20 * (1 + 67 / 16384) + 67
    nbytes = 2 * whole - 10 * 500e-6 + 20 + 67
    assert line.gather((0, 2), (20, 20)).seconds == pytest.approx(nbytes / 10 + 2 * 0.5)
    assert line.gather((0, 1), (20, 20)).seconds == pytest.approx(20 / 100 + 0.25)


def test_a_link_that_is_down_is_none() -> None:
    down = Topology((0, 1), (Link(0, 1, LinkState.UP), Link(1, 0, LinkState.DOWN)))
    assert Machine(PROFILE, down).down == {(1, 0)}


def test_a_host_link_without_a_limit_relays_for_its_latency() -> None:
    free = Machine(
        attrs.evolve(REV_A, host_link_bytes_per_s=None, host_link_latency_s=0.5), Topology.line(3)
    )
    assert free.moves_s([(0, 2, 1e12)]) == 1.0
