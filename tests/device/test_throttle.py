# SPDX-License-Identifier: Apache-2.0
"""Throttled cards: their modelled times equal the page's, they are never early, same bits.

What a machine that is busy with other things does to them is no business of a test: modelled times
are compared exactly, the wall clock only from below.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator

import attrs
import numpy as np
import pytest
from conformance_rigs import (
    WAIT_S,
    adder,
    collect,
    finish,
    floats,
    gather_programs,
    plant,
    readable,
    sender,
    step,
    waiter,
)
from timing_reference import Step, command_s, step_ends

from spanker.device.base import unpack_events
from spanker.device.soft import SoftCard, SoftCardSpec, SoftRig
from spanker.device.throttle import Pace
from spanker.errors import CardAbortedError, ConfigError
from spanker.kernels import program as op
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.formats import Format, row_bytes
from spanker.kernels.program import (
    Command,
    Program,
    Ref,
    SequenceStep,
    Transfer,
    encode_step,
)
from spanker.sched.bandwidth import NATIVE, REV_A, CardSpeed, LinkSpeed, Profile

# Nothing takes any time but what a test asks for.
FREE = Profile(
    name="free",
    local_ddr_bytes_per_s=math.inf,
    intercard_bytes_per_s=math.inf,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
)
# Of comparing sums of doubles, in seconds.
EXACT_S = 1e-9


@pytest.fixture
def throttled() -> Iterator[object]:
    """Makes rigs of throttled cards, and closes them."""
    rigs: list[SoftRig] = []

    def make(profile: Profile, cards: int = 1, workers: int | None = None) -> list[SoftCard]:
        specs = [SoftCardSpec(ddr_bytes=8 << 20)] * cards
        rigs.append(SoftRig(specs, workers, throttle=profile))
        return rigs[-1].cards

    yield make
    for rig in rigs:
        rig.close()


def pace(card: SoftCard) -> Pace:
    assert card.pace is not None
    return card.pace


def take(card: SoftCard, least: int = 1) -> int:
    """Wait for `least` completions or more; how many there were."""
    done = 0
    while done < least:
        readable(card, WAIT_S)
        for completion in card.completions():
            assert completion.error is None
            done += 1
    return done


def last_start_s(card: SoftCard) -> float:
    return pace(card).last_end_s - pace(card).last_step_s


# --- what commands cost -----------------------------------------------------------------


def every_command() -> list[Command]:
    """One of each operation, of no round sizes; float and integer products."""
    kv = {"kv_heads": 3, "head_dim": 16, "page_positions": 16, "pages": 4}
    x, y, z = Ref("x", 4096), Ref("y", 4096), Ref("z", 4096)
    return [
        op.embed(Format.Q4_0, Ref("w", row_bytes(Format.Q4_0, 96)), y, z, columns=96, vocabulary=7),
        op.embed(Format.Q8_0, Ref("w"), y, z, columns=64, vocabulary=33, packed_k=64),
        op.rmsnorm(x, Ref("y"), z, n=100, eps=1e-5),
        op.quantize(x, z, k=160),
        op.matmul(Format.Q4_0, Ref("w"), y, z, rows=40, k=96),
        op.matmul(Format.Q6_K, Ref("w"), y, z, rows=16, k=256, outputs=True),
        op.matmul(Format.F16, Ref("w"), x, z, rows=17, k=31),
        op.matmul(Format.F32, Ref("w"), x, z, rows=1, k=5),
        op.rope(x, Ref("y"), heads=5, head_dim=16, rope_dim=8),
        op.kv_append(x, y, Ref("w"), **kv),
        op.attention(x, Ref("w"), z, **kv, heads=6, first_head=0, group=2, scale=0.25),
        op.swiglu(x, y, z, n=33),
        op.add(x, y, n=77),
        op.select(x, z, n=50),
        op.logit_stats(x, z, n=300),
        op.top_k(x, z, n=300, k=5, first_id=0),
        op.best(x, z, k=5),
        op.choose(x, z, lists=3),
        op.reduce(Element.F32, Reduction.SUM, Ref("x"), Ref("y"), count=901),
        op.copy(Element.F16, Ref("x"), Ref("y"), count=70001),
        op.divide(Element.F32, Ref("x"), count=33, by=3),
    ]


def mixed_step() -> tuple[SequenceStep, ...]:
    """Three sequences: neighbours that share what they read of the cache, in groups of 8, a token
    far on, and none of a group."""
    return (
        SequenceStep([1] * 11, 3, [0], (0, 10)),
        SequenceStep([2], 61, [0, 1, 2, 3], (0,)),
        SequenceStep([3, 3], 0, [3]),
    )


@pytest.mark.parametrize("kind", ["memory", "int8", "float", "elements", "commands"])
@pytest.mark.parametrize("command", every_command(), ids=lambda c: c.op.name.lower())
def test_a_command_costs_what_the_page_says(throttled, command: Command, kind: str) -> None:
    profile = {
        "memory": attrs.evolve(FREE, local_ddr_bytes_per_s=1e9),
        "int8": attrs.evolve(FREE, int8_madds_per_s=1e9),
        "float": attrs.evolve(FREE, float_madds_per_s=1e9),
        "elements": attrs.evolve(FREE, elements_per_s=1e9),
        "commands": attrs.evolve(FREE, command_s=3e-6, step_s=7e-6),
    }[kind]
    (card,) = throttled(profile)
    handles = {name: card.alloc(1 << 20) for name in "wxyz"}
    program = Program((command,), 16, 4, 64).encode(handles)
    loaded = card.load_program(program)
    for sequences in (mixed_step(), (SequenceStep([0], 40, [0, 1, 2]),), ()):
        card.submit(loaded, encode_step(sequences))
        finish(card)
        expected = profile.step_s + command_s(profile, 0, command, Step(sequences))
        assert pace(card).last_step_s == pytest.approx(expected, abs=EXACT_S)
    assert pace(card).steps == 3


def test_by_hand_a_product_is_bound_by_memory_or_by_arithmetic(throttled) -> None:
    """64 x 64 weights of Q4_0 have 2,304 bytes; a token adds 68 of activations and 256 of results,
    and 4,096 multiply-adds."""
    profile = attrs.evolve(
        FREE, local_ddr_bytes_per_s=1e6, int8_madds_per_s=4e6, command_s=1e-5, step_s=1e-4
    )
    (card,) = throttled(profile)
    handles = {name: card.alloc(8192) for name in "wxy"}
    made = op.matmul(Format.Q4_0, Ref("w"), Ref("x", 68), Ref("y", 256), rows=64, k=64)
    loaded = card.load_program(Program((made, made), 4, 1, 64).encode(handles))
    for tokens, each_s in [(1, 0.002628), (2, 0.002952), (4, 0.004096)]:
        card.submit(loaded, step(tokens))
        finish(card)
        expected = 1e-4 + 2 * (1e-5 + each_s)
        assert pace(card).last_step_s == pytest.approx(expected, abs=EXACT_S)


def test_a_card_that_differs_has_its_own_speed(throttled) -> None:
    profile = attrs.evolve(
        FREE,
        local_ddr_bytes_per_s=1e7,
        elements_per_s=1e6,
        cards=(CardSpeed(1, memory=0.5), CardSpeed(2, compute=0.25)),
    )
    took = []
    for card in throttled(profile, 3):
        program, _, _ = adder(card, n=100, tokens=1)
        card.submit(program, step())
        finish(card)
        took.append(pace(card).last_step_s)
    assert took == pytest.approx([120e-6, 240e-6, 400e-6], abs=EXACT_S)


def test_busy_time_is_that_of_the_commands(throttled) -> None:
    profile = attrs.evolve(FREE, elements_per_s=1e6, command_s=5e-6, step_s=1e-3)
    (card,) = throttled(profile)
    program, _, _ = adder(card, n=100)
    card.submit(program, step(tokens=2))
    (done,) = collect(card, 1)
    assert done.busy_ns == card.counters().busy_ns == pytest.approx(205_000, abs=2)


# --- steps ------------------------------------------------------------------------------


def test_a_queued_step_begins_where_the_one_before_ended(throttled) -> None:
    profile = attrs.evolve(FREE, elements_per_s=16 / 0.05, step_s=0.01)
    (card,) = throttled(profile)
    program, _, _ = adder(card, tokens=2)
    for _ in range(5):
        before = time.monotonic()
        card.submit(program, step(tokens=1))
        card.submit(program, step(tokens=2))
        done = take(card)
        first = pace(card)
        take(card, 2 - done)
        assert time.monotonic() - before >= 0.06 + 0.11
        both = pace(card)
        assert both.last_step_s == pytest.approx(0.11, abs=EXACT_S)
        if both.steps == first.steps + 1:  # else this thread slept through the second one
            assert first.last_step_s == pytest.approx(0.06, abs=EXACT_S)
            assert last_start_s(card) == pytest.approx(first.last_end_s, abs=EXACT_S)
            break


def test_steps_are_never_early_and_late_ones_are_counted(throttled) -> None:
    profile = attrs.evolve(FREE, elements_per_s=1e6, step_s=50e-6)
    (card,) = throttled(profile)
    program, _, _ = adder(card, n=700)
    for number in range(1, 20):
        before = time.monotonic()
        card.submit(program, step())
        finish(card)
        assert time.monotonic() - before >= 750e-6
        p = pace(card)
        assert p.steps == number
        assert p.modelled_s == pytest.approx(number * 750e-6)
        assert 0 <= p.late_s_max <= p.late_s <= number * p.late_s_max + EXACT_S


def test_a_program_without_commands_takes_up_a_step(throttled) -> None:
    (card,) = throttled(attrs.evolve(FREE, step_s=0.02))
    loaded = card.load_program(Program((), 1, 1, 64).encode({}))
    before = time.monotonic()
    card.submit(loaded, step())
    finish(card)
    assert time.monotonic() - before >= 0.02
    assert pace(card).last_step_s == pytest.approx(0.02, abs=EXACT_S)


def test_traced_commands_are_no_earlier_than_in_the_model(throttled) -> None:
    profile = attrs.evolve(FREE, elements_per_s=1e6, command_s=20e-6, step_s=300e-6)
    (card,) = throttled(profile)
    x, y = card.alloc(4096), card.alloc(4096)
    sizes = (10, 500, 1, 1, 300, 50)
    commands = tuple(op.add(Ref("x", 2048), Ref("y", 2048), n=n) for n in sizes)
    loaded = card.load_program(Program(commands, 1, 1, 64).encode({"x": x, "y": y}))
    card.trace(1000)
    for _ in range(10):
        before = time.monotonic_ns()
        card.submit(loaded, step())
        finish(card)
        events = unpack_events(card.trace_events(1000)[0])
        assert [e.command for e in events] == list(range(len(sizes)))
        due = before + 300_000
        assert events[0].begin_ns >= due
        for event, n in zip(events, sizes, strict=True):
            due += 20_000 + n * 1000
            assert event.end_ns >= due - 2
        assert all(a.end_ns == b.begin_ns for a, b in itertools.pairwise(events))
        assert time.monotonic_ns() >= events[-1].end_ns


# --- links ------------------------------------------------------------------------------


def test_a_message_arrives_no_earlier_than_its_link_allows(throttled) -> None:
    """1,000 bytes at 20 KB/s, and 30 ms on the way: 80 ms from where the sender takes them up."""
    profile = attrs.evolve(FREE, intercard_bytes_per_s=20e3, intercard_latency_s=0.03)
    a, b = throttled(profile, 2)
    send, _ = sender(a, 1, 1000)
    receive, _ = waiter(b, 0, 1000)
    before = time.monotonic()
    b.submit(receive, step())
    a.submit(send, step())
    finish(b)
    assert time.monotonic() - before >= 0.08
    finish(a)
    assert pace(a).last_step_s == pytest.approx(0.05, abs=EXACT_S)
    assert pace(b).last_end_s - last_start_s(a) == pytest.approx(0.08, abs=EXACT_S)


def test_what_has_arrived_waits_for_the_receiver(throttled) -> None:
    profile = attrs.evolve(FREE, intercard_bytes_per_s=1e9, command_s=1e-3)
    a, b = throttled(profile, 2)
    send, _ = sender(a, 1, 1000)
    receive, _ = waiter(b, 0, 1000)
    a.submit(send, step())
    finish(a)
    b.submit(receive, step())
    finish(b)
    assert pace(b).last_step_s == pytest.approx(1e-3, abs=EXACT_S)


def test_messages_of_a_link_go_one_after_the_other_and_share_a_port_with_others(throttled) -> None:
    """Card 0 sends 100 and 300 bytes to card 1 and 200 to card 2, through links of 10 KB/s and a
    port of 10 KB/s: 100 and 200 go at 5 KB/s each, from 20 ms on the second 100 with 300, ..."""
    profile = attrs.evolve(FREE, intercard_bytes_per_s=10e3, port_bytes_per_s=10e3)
    cards = throttled(profile, 3)
    transfers = [Transfer(True, 1, Ref("x"), 100), Transfer(True, 1, Ref("x"), 300)]
    transfers.append(Transfer(True, 2, Ref("x"), 200))
    program = Program(op.exchange(transfers), 1, 1, 64)
    first = cards[0].load_program(program.encode({"x": cards[0].alloc(512)}))
    one, _ = waiter(cards[1], 0, 400)
    two, _ = waiter(cards[2], 0, 200)
    for card, loaded in zip(cards, (first, one, two), strict=True):
        card.submit(loaded, step())
    for card in cards:
        finish(card)
    start = last_start_s(cards[0])
    ends = [pace(card).last_end_s - start for card in cards]
    # 40 ms: 100 + 100 bytes to card 1, and all 200 to card 2; then 200 more at 10 KB/s.
    assert ends == pytest.approx([0.06, 0.06, 0.04], abs=EXACT_S)


def random_exchanges(
    rng: random.Random, cards: int, transfers: int
) -> list[list[tuple[Transfer, ...]]]:
    """A few exchanges of all cards, as the transfers of each card: any pairs, any sizes."""
    made = []
    for _ in range(rng.randint(1, 4)):
        each: list[list[Transfer]] = [[] for _ in range(cards)]
        for _ in range(transfers):
            a, b = rng.sample(range(cards), 2)
            nbytes = rng.choice((0, 1, 64, rng.randrange(1, 3000)))
            bulk = rng.random() < 0.3
            each[a].append(Transfer(True, b, Ref("x", 4096), nbytes, bulk))
            each[b].append(Transfer(False, a, Ref("y", 4096), nbytes, bulk))
        made.append([tuple(t) for t in each])
    return made


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_end_when_the_page_says(throttled, seed: int) -> None:
    """Cards, links and ports of different speeds; programs that differ by card."""
    rng = random.Random(seed)
    count = rng.randint(2, 6)
    pairs = list(itertools.permutations(range(count), 2))
    profile = Profile(
        name="random",
        local_ddr_bytes_per_s=rng.uniform(1e8, 1e9),
        intercard_bytes_per_s=rng.uniform(1e7, 1e8),
        host_link_bytes_per_s=None,
        host_link_latency_s=0.0,
        intercard_latency_s=rng.choice((0.0, 2e-6, 1e-4)),
        port_bytes_per_s=rng.choice((None, rng.uniform(1e7, 1e8))),
        elements_per_s=rng.uniform(1e7, 1e8),
        command_s=rng.choice((0.0, 2e-6)),
        step_s=rng.choice((0.0, 2e-5)),
        cards=tuple(
            CardSpeed(c, rng.uniform(0.3, 2), rng.uniform(0.3, 2)) for c in range(0, count, 2)
        ),
        links=tuple(
            LinkSpeed(a, b, rng.uniform(1e7, 1e8), rng.uniform(0, 1e-4))
            for a, b in rng.sample(pairs, len(pairs) // 3)
        ),
    )
    cards = throttled(profile, count)
    programs: dict[int, Program] = {}
    exchanges = random_exchanges(rng, count, 3 * count)
    for c in range(count):
        commands: list[Command] = []
        for of_cards in exchanges:
            for _ in range(rng.randint(0, 3)):
                commands.append(op.add(Ref("x", 4096), Ref("y", 4096), n=rng.randint(1, 1000)))
            commands += op.exchange(of_cards[c], outputs=False)
        programs[c] = Program(tuple(commands), 4, 4, 64)
    loaded = []
    for c, card in enumerate(cards):
        handles = {name: card.alloc(4 * 4096) for name in "xy"}
        loaded.append(card.load_program(programs[c].encode(handles)))
    for tokens in (1, 3):
        sequences = (SequenceStep([0] * tokens, 0, []),)
        for card, program in zip(cards, loaded, strict=True):
            card.submit(program, encode_step(sequences))
        for card in cards:
            finish(card)
        starts = {c: last_start_s(card) for c, card in enumerate(cards)}
        expected = step_ends(profile, programs, Step(sequences), starts)
        found = {c: pace(card).last_end_s for c, card in enumerate(cards)}
        assert found == pytest.approx(expected, abs=5 * EXACT_S)


def test_fleets_within_a_fleet_have_times_of_their_own(throttled) -> None:
    """Cards 0 and 1 exchange again and again while 2 and 3 do so in short steps, submitted one by
    one: none of them is delayed by what the others do meanwhile."""
    cards = throttled(attrs.evolve(REV_A, intercard_latency_s=5e-6), 4)

    def pair(me: int, peer: int, rounds: int) -> Program:
        both = [Transfer(True, peer, Ref("x"), 700), Transfer(False, peer, Ref("y"), 700)]
        one = (op.add(Ref("x"), Ref("x"), n=10 + 50 * me), *op.exchange(both))
        return Program(one * rounds, 1, 1, 64)

    programs = {0: pair(0, 1, 3000), 1: pair(1, 0, 3000), 2: pair(2, 3, 3), 3: pair(3, 2, 3)}
    loaded = []
    for c, card in enumerate(cards):
        handles = {name: card.alloc(4096) for name in "xy"}
        loaded.append(card.load_program(programs[c].encode(handles)))

    def check(some: tuple[int, int]) -> None:
        starts = {c: last_start_s(cards[c]) for c in some}
        expected = step_ends(
            attrs.evolve(REV_A, intercard_latency_s=5e-6),
            {c: programs[c] for c in some},
            Step((SequenceStep([0], 0, []),)),
            starts,
        )
        found = {c: pace(cards[c]).last_end_s for c in some}
        assert found == pytest.approx(expected, abs=5 * EXACT_S)

    for c in (0, 1):
        cards[c].submit(loaded[c], step())
    for _ in range(30):
        for c in (2, 3):
            cards[c].submit(loaded[c], step())
        for c in (2, 3):
            finish(cards[c])
        check((2, 3))
    for c in (0, 1):
        finish(cards[c])
    check((0, 1))


def test_a_card_that_is_done_delays_nobody(throttled) -> None:
    """Stages of a pipeline: the first has sent all it has to, the others go on with it."""
    a, b, c = throttled(attrs.evolve(REV_A, step_s=100e-6), 3)
    send, _ = sender(a, 1, 64)
    profile = attrs.evolve(REV_A, step_s=100e-6)
    both = {
        1: [Transfer(True, 2, Ref("x"), 900), Transfer(False, 2, Ref("y"), 900)],
        2: [Transfer(True, 1, Ref("x"), 900), Transfer(False, 1, Ref("y"), 900)],
    }
    first = op.exchange([Transfer(False, 0, Ref("y"), 64)])
    programs = {
        0: Program(op.exchange([Transfer(True, 1, Ref("out"), 64)]), 1, 1, 64),
        1: Program((*first, *op.exchange(both[1]) * 400), 1, 1, 64),
        2: Program(op.exchange(both[2]) * 400, 1, 1, 64),
    }
    loaded = {0: send}
    for number, card in ((1, b), (2, c)):
        handles = {name: card.alloc(4096) for name in "xy"}
        loaded[number] = card.load_program(programs[number].encode(handles))
    for _ in range(3):
        for number, card in enumerate((a, b, c)):
            card.submit(loaded[number], step())
        for card in (a, b, c):
            finish(card)
        starts = {n: last_start_s(card) for n, card in enumerate((a, b, c))}
        expected = step_ends(profile, programs, Step((SequenceStep([0], 0, []),)), starts)
        found = {n: pace(card).last_end_s for n, card in enumerate((a, b, c))}
        assert found == pytest.approx(expected, abs=5 * EXACT_S)


def test_many_steps_in_flight_end_when_the_page_says(throttled) -> None:
    """Queued steps of four cards that gather: one clock for all, whatever the machine does."""
    cards = throttled(REV_A, 4)
    programs, _ = gather_programs(cards, (64, 96, 32, 128), 4, seed=1)
    queued = dict.fromkeys(range(4), 0)
    for _ in range(40):
        for number, card in enumerate(cards):
            if queued[number] == 3:
                queued[number] -= take(card)
            card.submit(programs[number], step(tokens=2))
            queued[number] += 1
    for number, card in enumerate(cards):
        take(card, queued[number])
    assert {pace(card).steps for card in cards} == {40}
    ends = [pace(card).last_end_s for card in cards]
    # The last to arrive is within a message and its latency.
    assert max(ends) - min(ends) < 320 / 500e6 + 3e-6


def test_the_bits_are_those_of_unthrottled_cards(throttled) -> None:
    cards = throttled(REV_A, 3)
    rig = SoftRig([SoftCardSpec(ddr_bytes=1 << 20)] * 3)
    try:
        results = []
        for made in (cards, rig.cards):
            programs, buffers = gather_programs(made, (5, 7, 9), 4, seed=3)
            for number, card in enumerate(made):
                card.write(buffers[number], 0, bytes(range(84)))
            for card, program in zip(made, programs, strict=True):
                card.submit(program, step(tokens=4))
            for card in made:
                finish(card)
            results.append([c.read(b, 0, 84) for c, b in zip(made, buffers, strict=True)])
        assert results[0] == results[1]
    finally:
        rig.close()


# --- aborts and failures ------------------------------------------------------------------


def test_an_abort_does_not_wait_for_the_model(throttled) -> None:
    """A step of 100 s in the model comes back at once."""
    (card,) = throttled(attrs.evolve(FREE, elements_per_s=16 / 100))
    program, x, _ = adder(card)
    waits = []
    for epoch in range(2, 12):
        card.submit(program, step())
        card.submit(program, step())
        time.sleep(0.01)
        begin = time.monotonic()
        card.abort(epoch)
        for done in collect(card, 2):
            assert isinstance(done.error, CardAbortedError)
        waits.append(time.monotonic() - begin)
    assert min(waits) < 0.01
    assert pace(card).steps == 0
    assert floats(card, x, 16).max() <= 10


def test_after_an_abort_nothing_of_the_old_exchange_counts(throttled) -> None:
    """Messages that were under way in the model belong to the epoch that is over."""
    profile = attrs.evolve(FREE, intercard_bytes_per_s=1e6, intercard_latency_s=0.02)
    a, b = throttled(profile, 2)
    programs, _ = gather_programs((a, b), (1000, 1000), 1, seed=1)
    for epoch in range(2, 6):
        for card, program in zip((a, b), programs, strict=True):
            card.submit(program, step())
        time.sleep(0.002 * epoch)
        for card in (a, b):
            card.abort(epoch)
            collect(card, 1)
        for card, program in zip((a, b), programs, strict=True):
            card.submit(program, step())
        for card in (a, b):
            finish(card)
        starts = {0: last_start_s(a), 1: last_start_s(b)}
        for number, card in enumerate((a, b)):
            arrival = starts[1 - number] + 1e-3 + 0.02
            assert pace(card).last_end_s == pytest.approx(
                max(starts[number] + 1e-3, arrival), abs=EXACT_S
            )


def test_a_slow_command_is_progress_and_a_hung_card_is_not(throttled) -> None:
    (card,) = throttled(attrs.evolve(FREE, elements_per_s=16 / 30))
    program, _, _ = adder(card)
    card.submit(program, step())
    seen = [card.counters().progress]
    give_up = time.monotonic() + 20
    while len(seen) < 4 and time.monotonic() < give_up:
        time.sleep(0.02)
        if card.counters().progress != seen[-1]:
            seen.append(card.counters().progress)
    assert len(seen) == 4
    plant(card, "hang")
    time.sleep(0.1)
    stuck = card.counters().progress
    time.sleep(0.2)
    assert card.counters().progress == stuck
    card.abort(2)
    collect(card, 1)


def test_a_peer_that_fails_half_way_holds_nobody_back_in_the_model(throttled) -> None:
    """Card 1 has sent, then fails: card 0 has what it needs, and the model must not wait for an
    exchange that will never end."""
    profile = attrs.evolve(FREE, intercard_bytes_per_s=1e9, command_s=300e-6)
    a, b = throttled(profile, 2)
    receive, _ = waiter(a, 1, 64)
    x = b.alloc(64)
    b.write(x, 0, np.full(16, np.nan, np.float32).tobytes())
    commands = (
        *op.exchange([Transfer(True, 0, Ref("x"), 64)]),
        op.rmsnorm(Ref("x"), Ref("x"), Ref("x"), n=16, eps=1e-5),
    )
    failing = b.load_program(Program(commands, 1, 1, 64).encode({"x": x}))
    for epoch in range(2, 8):
        a.submit(receive, step())
        b.submit(failing, step())
        (done,) = collect(b, 1)
        assert done.error is not None
        finish(a)
        for card in (a, b):
            card.abort(epoch)


# --- many cards on few cores --------------------------------------------------------------


def test_eight_waiting_cards_leave_the_cores_alone(throttled) -> None:
    """Of 8 cards on 2 workers that wait for the model nearly all the time; 2 cores would be 100 %
    if they spun."""
    cards = throttled(attrs.evolve(REV_A, command_s=400e-6), 8, 2)
    loaded = []
    for me, card in enumerate(cards):
        peers = [peer for peer in range(8) if peer != me]
        gather = op.exchange(
            [Transfer(True, peer, Ref("x"), 64) for peer in peers]
            + [Transfer(False, peer, Ref("y", 0, 64 * peer), 64) for peer in peers]
        )
        commands = (op.add(Ref("x"), Ref("x"), n=16), *gather) * 100
        handles = {"x": card.alloc(64), "y": card.alloc(512)}
        loaded.append(card.load_program(Program(commands, 1, 1, 64).encode(handles)))
    begin, used = time.monotonic(), time.process_time()
    for _ in range(3):
        for card, program in zip(cards, loaded, strict=True):
            card.submit(program, step())
        for card in cards:
            finish(card)
    took = time.monotonic() - begin
    assert took >= 3 * 200 * 400e-6
    assert time.process_time() - used < 0.75 * took


# --- profiles that cannot be kept -----------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (NATIVE, "unthrottled"),
        (attrs.evolve(REV_A, cores=2), "cores"),
        (attrs.evolve(REV_A, shared_bytes_per_s=1e9), "shared_bytes_per_s"),
    ],
    ids=["native", "cores", "shared"],
)
def test_what_cannot_be_kept_is_refused(profile: Profile, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SoftRig([SoftCardSpec(ddr_bytes=4096)], throttle=profile)


def test_cards_without_a_throttle_have_no_pace() -> None:
    rig = SoftRig([SoftCardSpec(ddr_bytes=4096)])
    try:
        assert rig.cards[0].pace is None
    finally:
        rig.close()
