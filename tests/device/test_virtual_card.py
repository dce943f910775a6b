# SPDX-License-Identifier: Apache-2.0
"""Virtual cards beyond the conformance suite: modelled time, hollow cards, running ahead."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from conformance_rigs import (
    adder,
    collect,
    finish,
    floats,
    make_program,
    polls_readable,
    sender,
    step,
    waiter,
)

from spanker.device.base import CardDevice
from spanker.device.soft import CARDS_MAX
from spanker.device.virtual.card import VirtualRig
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.device.virtual.units import to_ps
from spanker.errors import CardAbortedError, CardCommandError, CardFaultError, ConfigError
from spanker.kernels import program as op
from spanker.kernels.program import NO_CANDIDATE, Ref
from spanker.sched.bandwidth import REV_A

HOLLOW = VirtualCardSpec(ddr_bytes=1 << 20, hollow=True)
FULL = attrs.evolve(HOLLOW, hollow=False)


def at_once(rig: VirtualRig) -> None:
    while (event := rig.next_event()) is not None:
        rig.advance(event)


def test_a_step_completes_when_its_modelled_time_has_come_and_not_before() -> None:
    with VirtualRig([FULL], REV_A) as rig:
        (card,) = rig.cards
        program, x, _ = adder(card, n=16)
        card.submit(program, step(tokens=4))
        # Taken up in 20 us; the command 5 us, and 64 elements at 10 a us or 768 bytes at 2 a ns.
        due = to_ps(20e-6 + 5e-6 + 64 / 10e6)
        assert rig.next_event() == to_ps(20e-6)
        rig.advance(due - 1)
        assert card.completions() == [] and not polls_readable(card, 0)
        assert floats(card, x, 1)[0] == 0
        rig.advance(due)
        assert polls_readable(card, 0)
        (done,) = card.completions()
        assert done.error is None and done.busy_ns == 11400
        assert floats(card, x, 64).tolist() == [1.0] * 64


def test_time_can_come_from_a_clock() -> None:
    now = 5_000_000
    with VirtualRig([FULL], REV_A, lambda: now) as rig:
        (card,) = rig.cards
        program, _, _ = adder(card)
        changes = []
        rig.on_change = lambda: changes.append(rig.next_event())
        card.submit(program, step())
        assert changes == [now + to_ps(20e-6)]
        # Whoever asks gets what is true by then.
        now += to_ps(1.0)
        assert card.counters().steps == 1
        assert len(card.completions()) == 1
        card.abort(2)
        assert changes[1:] == [None]


def test_a_peer_that_ran_ahead_for_another_card_completes_in_its_own_time() -> None:
    with VirtualRig([FULL] * 2, REV_A) as rig:
        a, b = rig.cards
        x = a.alloc(64 * 1024)
        long = op.add(Ref("x"), Ref("x"), n=16 * 1024)
        exchange = op.exchange([op.Transfer(True, 1, Ref("x"), 64)])
        made = make_program(*exchange, *[long] * 10, tokens=1)
        a.submit(a.load_program(made.encode({"x": x})), step(), [(x, 0, 4)])
        receive, _ = waiter(b, 0)
        b.submit(receive, step())
        collect(b, 1)
        assert a.completions() == [] and a.counters().queued == 1
        # An abort that comes in between finds it undone, whatever has been computed.
        a.abort(2)
        (done,) = a.completions()
        assert isinstance(done.error, CardAbortedError) and done.data == ()


def test_a_fault_is_told_and_whoever_depends_on_it_waits_for_the_abort() -> None:
    with VirtualRig([FULL] * 2, REV_A) as rig:
        a, b = rig.cards
        x = a.alloc(256)
        a.write(x, 0, np.full(32, np.nan, np.float32).tobytes())
        made = make_program(
            op.quantize(Ref("x"), Ref("x", 0, 128), k=32),
            *op.exchange([op.Transfer(True, 1, Ref("x"), 64)]),
            tokens=1,
        )
        program = a.load_program(made.encode({"x": x}))
        receive, _ = waiter(b, 0)
        fences = [a.submit(program, step()) for _ in range(2)]
        b.submit(receive, step())
        at_once(rig)
        fault, behind = a.completions()
        assert [fault.fence, behind.fence] == fences
        assert isinstance(fault.error, CardFaultError)
        assert isinstance(behind.error, CardAbortedError)
        assert b.completions() == [] and b.counters().queued == 1
        b.abort(2)
        with pytest.raises(CardAbortedError):
            finish(b)


def test_what_is_submitted_behind_a_fault_that_nobody_knows_of_yet_is_aborted_with_it() -> None:
    """The native card has run ahead into the fault, and would do what comes behind."""
    with VirtualRig([FULL] * 2, REV_A) as rig:
        a, b = rig.cards
        x, y = a.alloc(64 * 1024), a.alloc(256)
        a.write(y, 0, np.full(32, np.nan, np.float32).tobytes())
        send = op.exchange([op.Transfer(True, 1, Ref("x"), 64)])
        long = [op.add(Ref("x"), Ref("x"), n=16 * 1024)] * 10
        bad = op.quantize(Ref("y"), Ref("y", 0, 128), k=32)
        programs = [
            a.load_program(make_program(*commands, tokens=1).encode({"x": x, "y": y}))
            for commands in ((*send, *long), (*send, *long, bad), long)
        ]
        receive, _ = waiter(b, 0)
        fences = [a.submit(program, step()) for program in programs[:2]]
        for _ in fences:
            b.submit(receive, step())
        finish(b)
        # The first step is done by then, the second has sent and not yet failed.
        finish(b)
        (first,) = collect(a, 1)
        assert (first.fence, first.error) == (fences[0], None)
        fences.append(a.submit(programs[2], step()))
        fault, behind = collect(a, 2)
        assert [fault.fence, behind.fence] == fences[1:]
        assert isinstance(fault.error, CardFaultError)
        assert isinstance(behind.error, CardAbortedError)
        # Neither does it disturb what comes later.
        a.submit(programs[2], step())
        finish(a)
        a.abort(2)
        assert a.completions() == []


def test_the_same_rig_does_the_same_whatever_computes() -> None:
    """Hollow cards take the time of those that compute, to the picosecond."""

    def times(spec: VirtualCardSpec) -> list[object]:
        with VirtualRig([spec] * 2, REV_A) as rig:
            a, b = rig.cards
            send, _ = sender(a, 1, 5000)
            receive, _ = waiter(b, 0, 5000)
            work, _, _ = adder(b, n=64)
            a.submit(send, step())
            for program in (work, receive, work):
                b.submit(program, step())
            at_once(rig)
            done = [(c.fence, c.busy_ns, c.error) for c in (*a.completions(), *b.completions())]
            return [rig.now, done, a.counters(), b.counters()]

    assert times(HOLLOW) == times(FULL)


# --- hollow cards -----------------------------------------------------------------------


@pytest.fixture
def hollow() -> CardDevice:
    rig = VirtualRig([HOLLOW], REV_A)
    yield rig.cards[0]
    rig.close()


def test_a_hollow_card_keeps_no_bytes_and_still_checks_its_bounds(hollow: CardDevice) -> None:
    buffer = hollow.alloc(100)
    hollow.write(buffer, 0, b"x" * 100)
    assert hollow.read(buffer, 0, 100) == bytes(100)
    for offset, nbytes in ((0, 101), (100, 1), (1 << 63, 1)):
        with pytest.raises(CardCommandError):
            hollow.write(buffer, offset, b"x" * nbytes)
        with pytest.raises(CardCommandError):
            hollow.read(buffer, offset, nbytes)
    with pytest.raises(CardCommandError):
        hollow.read(99, 0, 1)
    assert hollow.counters().ddr_used_bytes == 128


def test_a_hollow_card_refuses_what_a_card_refuses(hollow: CardDevice) -> None:
    x = hollow.alloc(64)
    with pytest.raises(CardCommandError, match="needs 4 rows"):
        hollow.load_program(make_program(op.add(Ref("x", 64), Ref("x", 64), n=16)).encode({"x": x}))
    program, _, _ = adder(hollow)
    with pytest.raises(CardCommandError):
        hollow.submit(program, step(tokens=4)[:-4])
    with pytest.raises(CardCommandError):
        hollow.submit(program, step(), [(x, 0, 65)])


@pytest.mark.parametrize(("n", "k"), [(600, 8), (256, 64), (5, 8)])
def test_a_hollow_card_answers_as_one_whose_logits_are_all_zero(n: int, k: int) -> None:
    chunks = -(-n // 256)
    made = make_program(
        op.logit_stats(Ref("logits", 4 * n), Ref("stats", 8 * chunks), n=n),
        op.top_k(Ref("logits", 4 * n), Ref("top", 8 * k), n=n, k=k, first_id=512),
        op.best(Ref("top", 8 * k), Ref("best", 8), k=k),
    )
    sizes = {"logits": 16 * n, "stats": 32 * chunks, "top": 32 * k, "best": 32}
    answers = []
    for spec in (HOLLOW, FULL):
        with VirtualRig([spec], REV_A) as rig:
            (card,) = rig.cards
            handles = {name: card.alloc(nbytes) for name, nbytes in sizes.items()}
            reads = [
                (handles["stats"], 0, 3 * 8 * chunks),
                (handles["top"], 0, 3 * 8 * k),
                (handles["top"], 8 * k, 8 * k),
                (handles["logits"], 4, 8),
            ]
            card.submit(card.load_program(made.encode(handles)), step(3, 3), reads)
            (done,) = collect(card, 1)
            answers.append([bytes(data) for data in done.data])
    assert answers[0] == answers[1]
    ids = np.frombuffer(answers[0][1], np.uint32)[:k].tolist()
    held = [512 + i for i in range(min(n, k))]
    assert ids == held + [NO_CANDIDATE] * (k - len(held))


# --- rigs -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, CARDS_MAX + 1])
def test_impossible_rigs_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to {CARDS_MAX} cards, got {count}"):
        VirtualRig([HOLLOW] * count, REV_A)
    with pytest.raises(ConfigError, match="at least 64 bytes"):
        VirtualRig([FULL, VirtualCardSpec(ddr_bytes=1)], REV_A)


def test_sixty_four_large_cards_take_no_memory_to_speak_of() -> None:
    with VirtualRig([VirtualCardSpec(hollow=True)] * 64, REV_A) as rig:
        for card in rig.cards:
            handle = card.alloc(15 << 30)
            card.write(handle, 0, bytes(1 << 20))
        assert rig.cards[63].counters().ddr_used_bytes == 15 << 30
