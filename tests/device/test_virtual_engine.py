# SPDX-License-Identifier: Apache-2.0
"""What happens when, by docs/api/timing-model.md: cases that can be worked out on paper.

Links carry 1 byte a nanosecond and add 5 us; a command takes 1 us and a step 10 us to take up.
Times here are in nanoseconds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs
import pytest

from spanker.device.base import TRACE_EVENT
from spanker.device.virtual.costs import ProgramCosts, StepSize
from spanker.device.virtual.engine import CardUse, Engine, LinkUse, Outcome, Work
from spanker.device.virtual.recorder import Recorder
from spanker.kernels import program as op
from spanker.kernels.program import Command, Op, Program, Ref, Transfer
from spanker.sched.bandwidth import CardSpeed, LinkSpeed, Profile

LINKS = Profile(
    "links",
    local_ddr_bytes_per_s=12e9,
    intercard_bytes_per_s=1e9,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
    intercard_latency_s=5e-6,
    command_s=1e-6,
    step_s=10e-6,
)
PORTS = attrs.evolve(LINKS, port_bytes_per_s=1e9)
X = Ref("x", 1 << 20)
# What a step takes until its first exchange begins: taking it up, and the exchange's command.
BEGIN = 11_000


def costs(*commands: Command) -> ProgramCosts:
    return ProgramCosts.read(Program(commands, 512, 64, 4096).encode({"x": 0}))


def swap(
    sends: Mapping[int, int] | Sequence[tuple[int, int]],
    receives: Mapping[int, int] = MappingProxyType({}),
) -> ProgramCosts:
    """A program of one exchange: bytes by peer to send, in order, and to receive."""
    pairs = sends.items() if isinstance(sends, Mapping) else sends
    return costs(
        *op.exchange(
            [
                *(Transfer(True, peer, X, n) for peer, n in pairs),
                *(Transfer(False, peer, X, n) for peer, n in receives.items()),
            ]
        )
    )


def computing(microseconds: int, profile: Profile = LINKS) -> Command:
    """A command of so many microseconds: one to take it up, the rest to read."""
    floats = round((microseconds - 1) * 1e-6 * profile.local_ddr_bytes_per_s / 12)
    return op.add(X, X, n=floats)


class Fleet:
    """An engine, and when its cards have completed which step."""

    def __init__(self, profile: Profile, cards: int) -> None:
        self.done: list[tuple[int, int, float]] = []
        self.outcome = Outcome.DONE
        self.engine = Engine(profile, cards, self._complete)

    def _complete(self, card: int, work: Work) -> Outcome:
        self.done.append((card, work.fence, self.engine.now / 1000))
        return self.outcome

    def submit(self, card: int, program: ProgramCosts, fence: int = 1, tokens: int = 1) -> Work:
        work = Work(fence, program, StepSize(tokens, tokens, tokens, tokens))
        self.engine.submit(card, work)
        return work

    def run(self) -> dict[int, float]:
        """Until nothing happens any more: when each card completed its last step."""
        while (event := self.engine.next_event()) is not None:
            self.engine.advance(event)
        return {card: at for card, _, at in self.done}


# --- one card ---------------------------------------------------------------------------


def test_steps_are_taken_up_one_after_the_other() -> None:
    fleet = Fleet(LINKS, 1)
    program = costs(computing(3), computing(4))
    for fence in (1, 2):
        fleet.submit(0, program, fence)
    assert fleet.engine.next_event() == 10_000_000
    fleet.run()
    assert fleet.done == [(0, 1, 17_000), (0, 2, 34_000)]
    # An idle card begins when the step comes, not when the one before was done.
    fleet.engine.advance(50_000_000)
    fleet.submit(0, program, 3)
    fleet.run()
    assert fleet.done[-1] == (0, 3, 67_000)
    assert fleet.engine.state(0).busy_ps == 3 * 7_000_000


def test_a_card_is_where_the_time_says_it_is() -> None:
    fleet = Fleet(LINKS, 1)
    fleet.submit(0, costs(computing(100)))
    fleet.engine.advance(9_999_999)
    assert fleet.engine.state(0).busy_ps == 0
    fleet.engine.advance(60_000_000)
    state = fleet.engine.state(0)
    assert (state.busy_ps, state.queued, state.steps) == (50_000_000, 1, 0)
    # Whoever looks for progress sees it grow within a command.
    fleet.engine.advance(61_000_000)
    assert fleet.engine.state(0).progress > state.progress
    fleet.engine.advance(110_000_000)
    state = fleet.engine.state(0)
    assert (state.busy_ps, state.queued, state.steps, state.commands) == (100_000_000, 0, 1, 1)


# --- flows ------------------------------------------------------------------------------


def test_what_moves_is_progress_and_what_stands_still_is_not() -> None:
    fleet = Fleet(LINKS, 3)
    engine = fleet.engine
    fleet.submit(0, swap({1: 100_000}))
    fleet.submit(1, swap({}, {0: 100_000, 2: 20}))

    def grows(card: int, nanoseconds: int) -> bool:
        before = engine.state(card).progress
        engine.advance(engine.now + nanoseconds * 1000)
        return engine.state(card).progress > before

    engine.advance(BEGIN * 1000)
    assert grows(0, 1000) and not grows(1, 1000)
    engine.want_link(0, 1, False)
    engine.advance(engine.now)
    assert not grows(0, 1000) and not grows(0, 50_000)
    engine.want_link(0, 1, True)
    assert grows(0, 1000)
    fleet.run()
    assert not grows(1, 1000)
    for _ in range(2):
        # Half of it comes over the host, and then the other half.
        before = engine.state(1).progress
        engine.take(2, 1, 10, 1, False)
        assert engine.state(1).progress > before
    fleet.run()
    assert [engine.state(card).steps for card in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("profile", [LINKS, PORTS], ids=lambda p: p.name)
def test_a_flow_leaves_at_its_links_rate_and_arrives_a_latency_later(profile: Profile) -> None:
    fleet = Fleet(profile, 2)
    fleet.submit(0, swap({1: 2000}))
    fleet.submit(1, swap({}, {0: 2000}))
    assert fleet.run() == {0: BEGIN + 2000, 1: BEGIN + 2000 + 5000}
    assert fleet.engine.link_bytes(0, 1) == (2000, 0)
    assert fleet.engine.link_bytes(1, 0) == (0, 2000)
    assert fleet.engine.usage().links == (LinkUse(0, 1, 2_000_000, 2000),)


def test_what_arrives_before_the_receiver_gets_there_waits_in_the_link() -> None:
    fleet = Fleet(PORTS, 2)
    fleet.submit(0, swap({1: 2000}))
    fleet.submit(1, costs(computing(100), *op.exchange([Transfer(False, 0, X, 2000)])))
    assert fleet.run() == {0: BEGIN + 2000, 1: 10_000 + 100_000 + 1000}
    assert fleet.engine.usage().cards[1] == CardUse(101_000_000, {})


def test_a_transfer_of_nothing_takes_nothing() -> None:
    fleet = Fleet(PORTS, 2)
    fleet.submit(0, swap({1: 0}, {1: 0}))
    assert fleet.run() == {0: BEGIN}


def test_flows_of_one_card_share_its_port() -> None:
    fleet = Fleet(PORTS, 3)
    fleet.submit(0, swap({1: 3000, 2: 3000}))
    fleet.submit(1, swap({}, {0: 3000}))
    fleet.submit(2, swap({}, {0: 3000}))
    assert fleet.run() == {0: BEGIN + 6000, 1: BEGIN + 11_000, 2: BEGIN + 11_000}


def test_who_is_done_leaves_its_rate_to_the_others() -> None:
    fleet = Fleet(PORTS, 3)
    fleet.submit(0, swap({1: 1000, 2: 3000}))
    fleet.submit(1, swap({}, {0: 1000}))
    fleet.submit(2, swap({}, {0: 3000}))
    # Half each until 1000 have left over either, then the other 2000 at the full rate.
    assert fleet.run() == {0: BEGIN + 4000, 1: BEGIN + 7000, 2: BEGIN + 9000}


def test_without_ports_links_are_the_only_limit() -> None:
    fleet = Fleet(LINKS, 3)
    fleet.submit(0, swap({1: 1000, 2: 3000}))
    fleet.submit(1, swap({}, {0: 1000, 2: 500}))
    fleet.submit(2, swap({1: 500}, {0: 3000}))
    assert fleet.run() == {0: BEGIN + 3000, 1: BEGIN + 6000, 2: BEGIN + 8000}


def test_flows_of_one_link_go_one_after_the_other() -> None:
    fleet = Fleet(PORTS, 3)
    fleet.submit(0, swap([(1, 1000), (1, 3000), (2, 2000)]))
    fleet.submit(1, swap({}, {0: 1000}), 1)
    fleet.submit(1, swap({}, {0: 3000}), 2)
    fleet.submit(2, swap({}, {0: 2000}))
    # Half a byte a ns each: 1000 by 2000 and 2000 by 4000, when 1000 of the 3000 have left.
    fleet.run()
    assert fleet.done == [
        (0, 1, BEGIN + 6000),
        (1, 1, BEGIN + 2000 + 5000),
        (2, 1, BEGIN + 4000 + 5000),
        # Its step was taken up at BEGIN + 7000.
        (1, 2, BEGIN + 7000 + 11_000),
    ]


def test_rates_are_max_min_fair() -> None:
    """Two flows into card 2, one of them from a card that sends to card 3 as well: that one gets
    half of both ports, and a slow link leaves what it cannot take to the others."""
    fleet = Fleet(PORTS, 4)
    fleet.submit(0, swap({2: 1000, 3: 1000}))
    fleet.submit(1, swap({2: 3000}))
    assert fleet.run() == {0: BEGIN + 2000, 1: BEGIN + 4000}

    slow = attrs.evolve(PORTS, links=(LinkSpeed(0, 1, 1e8, 0.0),))
    fleet = Fleet(slow, 3)
    fleet.submit(0, swap({1: 1000, 2: 9000}))
    # 0.1 and 0.9 bytes a ns.
    assert fleet.run() == {0: BEGIN + 10_000}
    assert [use.busy_ps for use in fleet.engine.usage().links] == [10_000_000, 10_000_000]

    # The port into card 3 gives three flows a third each; the one that goes elsewhere gets the
    # two thirds that its sender has left.
    fleet = Fleet(PORTS, 5)
    for card in (0, 1):
        fleet.submit(card, swap({3: 1000}))
    fleet.submit(2, swap({3: 1000, 4: 2000}))
    assert fleet.run() == {0: BEGIN + 3000, 1: BEGIN + 3000, 2: BEGIN + 3000}


def test_links_have_speeds_and_latencies_of_their_own() -> None:
    profile = attrs.evolve(LINKS, links=(LinkSpeed(0, 1, 2e9, 1e-6), LinkSpeed(1, 0, 5e8, 2e-6)))
    fleet = Fleet(profile, 2)
    fleet.submit(0, swap({1: 2000}, {1: 2000}))
    fleet.submit(1, swap({0: 2000}, {0: 2000}))
    assert fleet.run() == {0: BEGIN + 4000 + 2000, 1: BEGIN + 4000}


def test_a_gather_of_equal_shares_is_four_events() -> None:
    """All that happens at one time is one event: 56 flows do not end at 56 times."""
    fleet = Fleet(PORTS, 8)
    for card in range(8):
        others = {peer: 7000 for peer in range(8) if peer != card}
        fleet.submit(card, swap(others, others))
    times = []
    while (event := fleet.engine.next_event()) is not None:
        times.append(event)
        fleet.engine.advance(event)
    # Taken up, exchange begun, all left, all arrived.
    assert times == [10_000_000, 11_000_000, 60_000_000, 65_000_000]
    assert set(fleet.run().values()) == {65_000}


@pytest.mark.parametrize("seed", range(8))
def test_no_port_or_link_ever_carries_more_than_it_can(seed: int) -> None:
    rng = random.Random(seed)
    profile = attrs.evolve(PORTS, intercard_bytes_per_s=0.4e9)
    fleet = Fleet(profile, 6)
    sent: dict[tuple[int, int], int] = {}
    for card in range(6):
        pairs = [(rng.choice([p for p in range(6) if p != card]), rng.randrange(1, 9999))] * 3
        pairs += [(p, rng.randrange(1, 9999)) for p in range(6) if p != card]
        rng.shuffle(pairs)
        for peer, nbytes in pairs:
            sent[card, peer] = sent.get((card, peer), 0) + nbytes
        fleet.submit(card, swap(pairs))
    done = fleet.run()
    for use in fleet.engine.usage().links:
        assert use.nbytes == sent[use.source, use.target]
        assert use.nbytes <= 0.4e-3 * use.busy_ps + 1
    for card in range(6):
        out = sum(n for (source, _), n in sent.items() if source == card)
        assert done[card] - BEGIN >= out - 1
    # And nobody waits for nothing: the last flow leaves no later than if all had gone in turn.
    assert max(done.values()) - BEGIN <= sum(sent.values()) / 0.4 + 1


# --- contention -------------------------------------------------------------------------


def test_more_cards_than_cores_take_turns() -> None:
    profile = attrs.evolve(LINKS, elements_per_s=1e9, command_s=0.0, cores=2)
    fleet = Fleet(attrs.evolve(profile, local_ddr_bytes_per_s=1e30), 4)
    work = costs(op.add(X, X, n=30_000))  # 30 us of arithmetic
    for card in range(3):
        fleet.submit(card, work)
    # Three on two cores.
    assert fleet.run() == {0: 55_000, 1: 55_000, 2: 55_000}
    for card in range(2):
        fleet.submit(card, work)
    fleet.run()
    assert fleet.done[3:] == [(0, 1, 95_000), (1, 1, 95_000)]


def test_a_card_that_begins_slows_the_others_down_from_then_on() -> None:
    profile = attrs.evolve(LINKS, local_ddr_bytes_per_s=1e30, elements_per_s=1e9, cores=1)
    fleet = Fleet(attrs.evolve(profile, command_s=0.0), 2)
    fleet.engine.record(0, recorder := Recorder(100))
    fleet.submit(0, costs(op.add(X, X, n=10_000), op.add(X, X, n=20_000)))
    fleet.engine.advance(15_000_000)
    fleet.submit(1, costs(op.add(X, X, n=5000)))
    # Card 0 runs alone from 10 to 25 us: 15 of its 30; then both at half speed until card 1 is
    # done at 35, and card 0 has 10 left.
    assert fleet.run() == {0: 45_000, 1: 35_000}
    events = [e[:2] for e in TRACE_EVENT.iter_unpack(recorder.take(100))]
    assert events == [(10_000, 20_000), (20_000, 45_000)]
    assert fleet.engine.state(0).busy_ps == 35_000_000


def test_cards_that_read_together_share_the_machines_memory() -> None:
    # Each could read 12 bytes a ns, together they get 12.
    profile = attrs.evolve(LINKS, shared_bytes_per_s=12e9, command_s=0.0)
    fleet = Fleet(profile, 3)
    fleet.submit(0, costs(op.add(X, X, n=10_000)))
    fleet.submit(1, costs(op.add(X, X, n=20_000)))
    assert fleet.run() == {0: 30_000, 1: 40_000}
    # In proportion to what they could do alone.
    profile = attrs.evolve(profile, cards=(CardSpeed(1, memory=0.5),))
    fleet = Fleet(profile, 2)
    fleet.submit(0, costs(op.add(X, X, n=10_000)))
    fleet.submit(1, costs(op.add(X, X, n=5000)))
    assert fleet.run() == {0: 25_000, 1: 25_000}


def test_cards_that_wait_for_others_take_no_core() -> None:
    profile = attrs.evolve(
        LINKS, local_ddr_bytes_per_s=1e30, elements_per_s=1e9, cores=1, command_s=0.0
    )
    fleet = Fleet(profile, 2)
    late = op.add(X, X, n=10_000)
    fleet.submit(0, costs(late, *op.exchange([Transfer(True, 1, X, 1000)])))
    fleet.submit(1, costs(*op.exchange([Transfer(False, 0, X, 1000)]), late))
    assert fleet.run() == {0: 21_000, 1: 10_000 + 10_000 + 6000 + 10_000}


# --- the end of steps -------------------------------------------------------------------


def test_an_abort_drops_steps_flows_and_what_is_on_its_way() -> None:
    fleet = Fleet(PORTS, 3)
    first = fleet.submit(0, swap({1: 4000, 2: 4000}), 1)
    second = fleet.submit(0, swap({1: 1}), 2)
    waiting = fleet.submit(1, swap({}, {0: 4000}))
    fleet.engine.advance((BEGIN + 2000) * 1000)
    assert fleet.engine.abort(0, 2) == (first, second)
    assert fleet.engine.next_event() is None
    assert fleet.done == []
    # Nothing of it has left, and the ports are free again.
    assert fleet.engine.link_bytes(0, 1) == (0, 0)
    fleet.submit(0, swap({1: 1000}), 3)
    # Of a later epoch: it waits until the receiver is there too.
    fleet.run()
    begin = BEGIN + 2000 + BEGIN
    assert fleet.done == [(0, 3, begin + 1000)]
    assert fleet.engine.abort(1, 2) == (waiting,)
    fleet.submit(1, swap({}, {0: 1000}), 4)
    fleet.run()
    assert fleet.done[-1] == (1, 4, begin + 6000 + BEGIN)
    assert fleet.engine.link_bytes(1, 0) == (0, 1000)


def test_messages_of_an_earlier_epoch_are_dropped() -> None:
    fleet = Fleet(PORTS, 2)
    fleet.submit(0, swap({1: 100}))
    fleet.engine.advance((BEGIN + 200) * 1000)
    assert fleet.done == [(0, 1, BEGIN + 100)]
    fleet.engine.abort(1, 2)  # while it is on its way
    fleet.run()
    fleet.submit(1, swap({}, {0: 100}), 2)
    fleet.run()
    assert fleet.engine.state(1).waiting_for == 0
    assert fleet.engine.link_bytes(1, 0) == (0, 100)  # taken from the link, all the same


def test_a_hung_card_does_nothing_and_can_be_aborted() -> None:
    fleet = Fleet(PORTS, 2)
    fleet.submit(0, costs(computing(50)))
    fleet.engine.advance(20_000_000)
    fleet.engine.hang(0)
    fleet.run()
    fleet.submit(0, costs(computing(50)), 2)
    assert fleet.run() == {}
    state = fleet.engine.state(0)
    assert (state.queued, state.waiting_for, state.busy_ps) == (2, None, 10_000_000)
    assert [work.fence for work in fleet.engine.abort(0, 2)] == [1, 2]


def test_a_killed_card_leaves_its_peers_waiting() -> None:
    fleet = Fleet(PORTS, 2)
    fleet.submit(0, swap({1: 4000}))
    fleet.submit(1, swap({}, {0: 4000}))
    fleet.engine.advance((BEGIN + 1000) * 1000)
    assert [work.fence for work in fleet.engine.kill(0)] == [1]
    assert fleet.run() == {}
    state = fleet.engine.state(1)
    assert (state.queued, state.waiting_for) == (1, 0)


def test_a_step_that_fails_drops_those_behind_it() -> None:
    fleet = Fleet(LINKS, 1)
    fleet.outcome = Outcome.FAULT
    for fence in (1, 2, 3):
        fleet.submit(0, costs(computing(2)), fence)
    fleet.run()
    assert fleet.done == [(0, 1, 12_000)]
    assert fleet.engine.state(0).queued == 0
    fleet.outcome = Outcome.DONE
    fleet.submit(0, costs(computing(2)), 4)
    fleet.run()
    assert fleet.done[-1] == (0, 4, 24_000)


def test_a_step_that_cannot_end_stays_until_it_is_aborted() -> None:
    fleet = Fleet(LINKS, 1)
    fleet.outcome = Outcome.STUCK
    fleet.submit(0, costs(computing(2)), 1)
    fleet.submit(0, costs(computing(2)), 2)
    assert fleet.run() == {0: 12_000}
    assert fleet.engine.state(0).queued == 2
    fleet.outcome = Outcome.DONE
    assert [work.fence for work in fleet.engine.abort(0, 2)] == [1, 2]
    fleet.submit(0, costs(computing(2)), 3)
    fleet.run()
    assert fleet.done[-1] == (0, 3, 24_000)


# --- what is told -----------------------------------------------------------------------


def test_waiting_is_put_down_to_whoever_came_last() -> None:
    fleet = Fleet(PORTS, 3)
    slow = costs(computing(40), *op.exchange([Transfer(True, 2, X, 1000)]))
    fleet.submit(0, slow)
    fleet.submit(1, swap({2: 1000}))
    fleet.submit(2, swap({}, {0: 1000, 1: 1000}))
    fleet.run()
    cards = fleet.engine.usage().cards
    assert cards[0].waiting_ps == {0: 1_000_000}
    assert cards[2].waiting_ps == {0: 46_000_000}
    # While it lasts it counts too.
    fleet.submit(2, swap({}, {1: 5}))
    fleet.engine.advance(fleet.engine.now + 14_000_000)
    assert fleet.engine.usage().cards[2].waiting_ps == {0: 46_000_000, 1: 3_000_000}


def test_a_trace_tells_commands_without_gaps_and_exchanges_with_their_waiting() -> None:
    fleet = Fleet(PORTS, 2)
    recorder = Recorder(100)
    fleet.engine.record(1, recorder)
    fleet.submit(0, costs(computing(20), *op.exchange([Transfer(True, 1, X, 1000)])))
    receiving = op.exchange([Transfer(False, 0, X, 1000)])
    fleet.submit(1, costs(computing(2), computing(3), *receiving, computing(4)), 9)
    fleet.run()
    events = [e[:-1] for e in TRACE_EVENT.iter_unpack(recorder.take(100))]
    arrived = 10_000 + 21_000 + 1000 + 5000
    assert events == [
        (10_000, 12_000, 9, 0, Op.ADD),
        (12_000, 15_000, 9, 1, Op.ADD),
        (15_000, arrived, 9, 2, Op.EXCHANGE),
        (arrived, arrived, 9, 3, Op.LINK_RECV),
        (arrived, arrived + 4000, 9, 4, Op.ADD),
    ]


@pytest.mark.parametrize("contended", [False, True])
def test_the_same_submissions_give_the_same_events(contended: bool) -> None:
    profile = attrs.evolve(PORTS, cores=2, shared_bytes_per_s=20e9) if contended else PORTS

    def trace() -> list[bytes]:
        rng = random.Random(11)
        fleet = Fleet(profile, 5)
        recorders = [Recorder(1000) for _ in range(5)]
        for card, recorder in enumerate(recorders):
            fleet.engine.record(card, recorder)
        shares = [rng.randrange(1, 5000) for _ in range(5)]
        for fence in range(3):
            for card in range(5):
                others = [p for p in range(5) if p != card]
                fleet.submit(
                    card,
                    costs(
                        computing(rng.randrange(2, 40)),
                        *op.exchange(
                            [Transfer(True, p, X, shares[card]) for p in others]
                            + [Transfer(False, p, X, shares[p]) for p in others]
                        ),
                        computing(rng.randrange(2, 40)),
                    ),
                    fence,
                )
        fleet.run()
        assert len(fleet.done) == 15
        return [recorder.take(1000) for recorder in recorders]

    assert trace() == trace()
