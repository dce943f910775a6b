# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of CardDevice, second part: queue, counters, links, aborts, failures.

Every body of a card must pass it; conformance_rigs.py says how a body joins.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time

import numpy as np
import pytest
from conformance_rigs import (
    WAIT_S,
    MakeRig,
    abort_within_s,
    adder,
    clock_of,
    collect,
    finish,
    floats,
    gather_programs,
    make_program,
    plant,
    position_data,
    readable,
    sender,
    step,
    waiter,
)

from spanker.device.base import CardDevice
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardLostError,
)
from spanker.kernels import program as op
from spanker.kernels.formats import Format
from spanker.kernels.program import (
    Ref,
    Transfer,
)

# --- queue and completions --------------------------------------------------------------


def test_the_queue_is_bounded_and_usable_again(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    receive, _ = waiter(a, 1)
    send, _ = sender(b, 0)
    fences = []
    with pytest.raises(CardCommandError, match="queued"):
        for _ in range(100):
            fences.append(a.submit(receive, step()))
    assert 4 <= len(fences) < 100
    assert a.counters().queued == len(fences)
    for _ in fences:
        b.submit(send, step())
        finish(b)
    assert [c.fence for c in collect(a, len(fences))] == fences
    assert a.counters().queued == 0
    a.submit(receive, step())
    b.submit(send, step())
    finish(a)


def test_fences_grow_and_complete_in_order(card: CardDevice) -> None:
    long_one, _, _ = adder(card, n=8192, tokens=4)
    short_one, _, _ = adder(card, n=1, tokens=4)
    rng = random.Random(3)
    submitted: list[int] = []
    completed: list[int] = []
    for _ in range(200):
        while len(submitted) - len(completed) < 4:
            program = long_one if rng.random() < 0.3 else short_one
            submitted.append(card.submit(program, step(tokens=4)))
        readable(card, WAIT_S)
        completed += [c.fence for c in card.completions()]
    completed += [c.fence for c in collect(card, len(submitted) - len(completed))]
    assert completed == submitted == sorted(set(submitted))


def test_the_completion_fd_is_readable_while_completions_wait(card: CardDevice) -> None:
    if card.completion_fd is None:
        pytest.skip("this body finishes before submit returns")
    program, _, _ = adder(card)
    assert not readable(card, 0)
    for _ in range(300):
        card.submit(program, step())
        assert readable(card, WAIT_S)
        assert readable(card, 0), "stays readable until collected"
        finish(card)
        assert not readable(card, 0)
        assert card.completions() == []
    # A collector that was quicker than the signal may find it readable once more, for nothing.
    for _ in range(300):
        for _ in range(2):
            card.submit(program, step())
        collect(card, 2)
        for _ in range(2):
            if readable(card, 0.001):
                assert card.completions() == []
        assert not readable(card, 0)


def test_what_has_not_been_taken_is_outstanding(card: CardDevice) -> None:
    program, _, _ = adder(card)
    assert card.outstanding == 0
    for count in range(1, 4):
        card.submit(program, step())
        assert card.outstanding == count
    with pytest.raises(CardCommandError):
        card.submit(program, b"no step")
    while card.counters().queued:
        clock_of(card).sleep(0.001)
    assert card.outstanding == 3, "finished is not taken"
    taken = len(card.completions())
    assert card.outstanding == 3 - taken
    collect(card, 3 - taken)
    assert card.outstanding == 0


def test_what_was_aborted_is_outstanding_until_it_is_taken(card: CardDevice) -> None:
    program, _, _ = adder(card, n=8192)
    for _ in range(3):
        card.submit(program, step(tokens=4))
    card.abort(2)
    assert card.outstanding == 3
    collect(card, 3)
    assert card.outstanding == 0


def test_busy_time_is_that_of_the_step(card: CardDevice) -> None:
    program, _, _ = adder(card, n=8192)
    begin = clock_of(card).now_ns()
    card.submit(program, step(tokens=4))
    (completion,) = collect(card, 1)
    assert 0 < completion.busy_ns <= clock_of(card).now_ns() - begin
    assert card.counters().busy_ns == completion.busy_ns


# --- counters ---------------------------------------------------------------------------


def test_commands_steps_and_ddr_bytes_are_counted(card: CardDevice) -> None:
    n = 256
    program, _, _ = adder(card, n=n)
    before = card.counters()
    assert before.commands == before.steps == before.ddr_read_bytes == 0
    for tokens in (3, 0, 4):
        card.submit(program, step(tokens=tokens))
        finish(card)
    after = card.counters()
    assert after.commands == 3
    assert after.steps == 3
    assert after.ddr_read_bytes == 7 * n * 8
    assert after.ddr_written_bytes == 7 * n * 4
    assert after.progress > before.progress
    assert after.waiting_for is None


def test_a_matmul_reads_its_weights_once_for_all_tokens(card: CardDevice) -> None:
    rows, k, tokens = 64, 64, 4
    weights = rows * k // 32 * 18
    handles = {
        "w": card.alloc(weights),
        "x": card.alloc(tokens * 68),
        "y": card.alloc(tokens * rows * 4),
    }
    made = make_program(
        op.matmul(Format.Q4_0, Ref("w"), Ref("x", 68), Ref("y", 4 * rows), rows=rows, k=k)
    )
    card.submit(card.load_program(made.encode(handles)), step(tokens=tokens))
    finish(card)
    counters = card.counters()
    assert counters.ddr_read_bytes == weights + tokens * 68
    assert counters.ddr_written_bytes == tokens * rows * 4


def test_waiting_for_names_the_peer(make_rig: MakeRig) -> None:
    cards = make_rig(3).cards
    program, _ = waiter(cards[1], 2)
    cards[1].submit(program, step())
    clock = clock_of(cards[1])
    end = clock.now_ns() + WAIT_S * 1e9
    while cards[1].counters().waiting_for != 2:
        assert clock.now_ns() < end
        clock.sleep(0.001)
    send, _ = sender(cards[2], 1)
    cards[2].submit(send, step())
    finish(cards[1])
    assert cards[1].counters().waiting_for is None


# --- links ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("nbytes", [0, 1, 3, 64, 65535, 65536, 65537, 700_001])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_exchanges_of_every_size_arrive_whole(
    make_rig: MakeRig, count: int, nbytes: int, tokens: int
) -> None:
    # Uneven shares; 700,001 bytes exceed the ring of a link, let alone a message.
    shares = [max(nbytes - i, 0) if i % 2 else nbytes for i in range(count)]
    starts = [0, *itertools.accumulate(shares)]
    row = starts[-1]
    cards = make_rig(count, 16 << 20).cards
    programs, buffers = gather_programs(cards, shares, tokens, seed=nbytes)
    whole = position_data(0, tokens, row).reshape(tokens, row)
    for me, card in enumerate(cards):
        mine = np.zeros_like(whole)
        mine[:, starts[me] : starts[me + 1]] = whole[:, starts[me] : starts[me + 1]]
        card.write(buffers[me], 0, mine.tobytes())
    for card, program in zip(cards, programs, strict=True):
        card.submit(program, step(tokens=tokens))
    for card in cards:
        finish(card)
    for me, card in enumerate(cards):
        assert card.read(buffers[me], 0, whole.nbytes) == whole.tobytes()
        counters = card.counters()
        others = [p != me for p in range(count)]
        assert list(counters.link_tx_bytes) == [shares[me] * tokens * o for o in others]
        assert list(counters.link_rx_bytes) == [
            shares[p] * tokens * o for p, o in enumerate(others)
        ]


def test_many_exchanges_in_a_row_stay_in_step(make_rig: MakeRig) -> None:
    cards = make_rig(3, 16 << 20).cards
    sets = [gather_programs(cards, shares, 2, seed=1) for shares in ((5, 70_000, 1), (64, 64, 32))]
    for turn in range(40):
        programs, buffers = sets[turn % 2]
        shares = ((5, 70_000, 1), (64, 64, 32))[turn % 2]
        starts = [0, *itertools.accumulate(shares)]
        whole = position_data(turn, 2, starts[-1]).reshape(2, -1)
        for me, card in enumerate(cards):
            mine = np.zeros_like(whole)
            mine[:, starts[me] : starts[me + 1]] = whole[:, starts[me] : starts[me + 1]]
            card.write(buffers[me], 0, mine.tobytes())
            card.submit(programs[me], step(tokens=2))
        for me, card in enumerate(cards):
            finish(card)
            assert card.read(buffers[me], 0, whole.nbytes) == whole.tobytes()


def test_several_transfers_with_one_peer_keep_their_order(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    """A large message that fills the ring must not be overtaken by a small one behind it."""
    a, b = pair
    sizes = (300_000, 1, 250_000, 17)
    starts = [0, *itertools.accumulate(sizes)]
    refs = [Ref("x", 0, start) for start in starts[:-1]]
    handles = []
    programs = []
    for card, sending in ((a, True), (b, False)):
        handles.append(card.alloc(starts[-1]))
        transfers = [
            Transfer(sending, 1 - card.number, ref, size)
            for ref, size in zip(refs, sizes, strict=True)
        ]
        made = make_program(*op.exchange(transfers), tokens=1)
        programs.append(card.load_program(made.encode({"x": handles[-1]})))
    for turn in range(30):
        data = position_data(turn, 1, starts[-1]).tobytes()
        a.write(handles[0], 0, data)
        b.write(handles[1], 0, bytes(len(data)))
        b.submit(programs[1], step())
        a.submit(programs[0], step())
        finish(a)
        finish(b)
        assert b.read(handles[1], 0, len(data)) == data


def test_transfers_can_move_the_outputs_of_a_step(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    buffers = [card.alloc(4 * 10) for card in pair]
    data = position_data(1, 4, 10).tobytes()
    a.write(buffers[0], 0, data)
    for card, sending in ((a, True), (b, False)):
        transfer = Transfer(sending, 1 - card.number, Ref("x", 10), 10)
        made = make_program(*op.exchange([transfer], outputs=True))
        program = card.load_program(made.encode({"x": buffers[card.number]}))
        card.submit(program, step(tokens=4, outputs=2))
    finish(a)
    finish(b)
    assert b.read(buffers[1], 0, 40) == data[:20] + bytes(20)
    assert a.counters().link_tx_bytes == (0, 20)


# --- abort ------------------------------------------------------------------------------


def test_abort_completes_everything_queued_within_10_ms(make_rig: MakeRig) -> None:
    cards = make_rig(3).cards
    programs = [waiter(card, (card.number + 1) % 3)[0] for card in cards]
    took: list[float] = []
    clock = clock_of(cards[0])
    for epoch in range(2, 22):
        fences = [[card.submit(programs[card.number], step()) for _ in range(3)] for card in cards]
        clock.sleep(0.002)
        begin = clock.now_ns()
        for card in cards:
            card.abort(epoch)
        for card, expected in zip(cards, fences, strict=True):
            done = collect(card, 3)
            assert [c.fence for c in done] == expected
            assert all(isinstance(c.error, CardAbortedError) for c in done)
        took.append((clock.now_ns() - begin) / 1e9)
    # The middle one: this machine may have other things to do now and then.
    assert statistics.median(took) < abort_within_s(cards[0]), took


def test_abort_stops_a_long_computation(card: CardDevice) -> None:
    n, repeats = 8192, 4000
    x = card.alloc(4 * n * 4)
    command = op.swiglu(Ref("x", 4 * n), Ref("x", 4 * n), Ref("x", 4 * n), n=n)
    program = card.load_program(make_program(*[command] * repeats).encode({"x": x}))
    took = []
    clock = clock_of(card)
    for epoch in range(2, 7):
        card.submit(program, step(tokens=4))
        clock.sleep(0.003)
        begin = clock.now_ns()
        card.abort(epoch)
        (done,) = collect(card, 1)
        took.append((clock.now_ns() - begin) / 1e9)
        assert isinstance(done.error, CardAbortedError)
    assert statistics.median(took) < abort_within_s(card), took


@pytest.mark.parametrize("epoch", [0, 1, 2, 1 << 32, -1])
def test_epochs_must_grow(card: CardDevice, epoch: int) -> None:
    card.abort(2)
    with pytest.raises(CardCommandError):
        card.abort(epoch)
    card.abort(3)


def test_what_is_submitted_after_an_abort_is_not_aborted(card: CardDevice) -> None:
    program, x, _ = adder(card, n=1)
    for epoch in range(2, 502):
        card.abort(epoch)
        card.submit(program, step())
        finish(card)
    assert floats(card, x, 1)[0] == 500


def test_an_exchange_right_after_an_abort_runs_in_the_new_epoch(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    """No card may send under the old epoch what it was given after the abort: its peer would drop
    it and wait for ever."""
    programs, buffers = gather_programs(pair, (100, 200), 1, seed=0)
    for epoch in range(2, 302):
        whole = position_data(epoch, 1, 300).tobytes()
        parts = (whole[:100] + bytes(200), bytes(100) + whole[100:])
        for card in pair if epoch % 2 else pair[::-1]:
            card.abort(epoch)
            card.write(buffers[card.number], 0, parts[card.number])
            card.submit(programs[card.number], step())
        for card in pair:
            finish(card)
            assert card.read(buffers[card.number], 0, 300) == whole


def test_messages_of_an_earlier_epoch_are_dropped(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    send, out = sender(a, 1, 100_000)
    receive, into = waiter(b, 0, 100_000)
    for epoch in range(2, 12):
        a.write(out, 0, b"old" * 33_333)
        a.submit(send, step())
        finish(a)
        for card in pair:
            card.abort(epoch)
        new = position_data(epoch, 1, 100_000).tobytes()
        a.write(out, 0, new)
        a.submit(send, step())
        b.submit(receive, step())
        finish(a)
        finish(b)
        assert b.read(into, 0, 100_000) == new


def test_an_abort_in_the_middle_of_an_exchange_leaves_nothing_behind(make_rig: MakeRig) -> None:
    cards = make_rig(3, 16 << 20).cards
    shares = (300_000, 299_999, 300_001)
    starts = [0, *itertools.accumulate(shares)]
    programs, buffers = gather_programs(cards, shares, 1, seed=9)
    rng = random.Random(5)
    for epoch in range(2, 22):
        for card in cards[: rng.randrange(1, 4)]:
            card.submit(programs[card.number], step())
        clock_of(cards[0]).sleep(rng.random() * 0.002)
        for card in cards:
            card.abort(epoch)
        whole = position_data(epoch, 1, starts[-1]).tobytes()
        for me, card in enumerate(cards):
            queued = card.counters().queued
            # Aborted or finished before the abort: either way it comes back.
            while queued:
                queued = card.counters().queued
            card.completions()
            part = whole[starts[me] : starts[me + 1]]
            card.write(buffers[me], 0, bytes(len(whole)))
            card.write(buffers[me], starts[me], part)
        for card in cards:
            card.submit(programs[card.number], step())
        for me, card in enumerate(cards):
            finish(card)
            assert card.read(buffers[me], 0, len(whole)) == whole


def test_a_message_from_a_later_epoch_waits_until_the_receiver_is_there(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    send, out = sender(a, 1)
    receive, into = waiter(b, 0)
    b.submit(receive, step())
    a.abort(2)
    a.write(out, 0, b"n" * 64)
    a.submit(send, step())
    finish(a)
    clock_of(b).sleep(0.005)
    assert b.completions() == []
    b.abort(2)
    with pytest.raises(CardAbortedError):
        finish(b)
    b.submit(receive, step())
    finish(b)
    assert b.read(into, 0, 64) == b"n" * 64


# --- failing cards ----------------------------------------------------------------------


def test_a_killed_card_loses_its_work_and_refuses_everything(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    receive, buffer = waiter(a, 1)
    other, x, _ = adder(b)
    fences = [a.submit(receive, step()) for _ in range(2)]
    plant(a, "kill")
    done = collect(a, 2)
    assert [c.fence for c in done] == fences
    assert all(isinstance(c.error, CardLostError) for c in done)
    for call in (
        lambda: a.alloc(64),
        lambda: a.free(buffer),
        lambda: a.write(buffer, 0, b"x"),
        lambda: a.read(buffer, 0, 1),
        lambda: a.load_program(b""),
        lambda: a.unload_program(receive),
        lambda: a.submit(receive, step()),
    ):
        with pytest.raises(CardLostError, match="card 0"):
            call()
    b.submit(other, step())
    finish(b)
    assert floats(b, x, 1)[0] == 1


def test_a_hung_card_keeps_its_work_until_it_is_aborted(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    program, x, _ = adder(a)
    other, _, _ = adder(b)
    plant(a, "hang")
    a.submit(program, step())
    b.submit(other, step())
    finish(b)
    clock_of(a).sleep(0.02)
    assert a.completions() == []
    counters = a.counters()
    assert counters.queued == 1 and counters.waiting_for is None and counters.commands == 0
    a.abort(2)
    with pytest.raises(CardAbortedError):
        finish(a)
    assert floats(a, x, 1)[0] == 0


# --- the end, and a new beginning ---------------------------------------------------------


@pytest.mark.parametrize("how", ["at work", "closed"])
def test_a_reopened_card_is_as_new_or_says_that_it_cannot_be(make_rig: MakeRig, how: str) -> None:
    a, b, _ = make_rig(3).cards
    new = a.counters()
    assert new.links_down == ()
    receive, buffer = waiter(a, 1)
    a.submit(receive, step())
    if how == "closed":
        a.close()
    try:
        a.reopen()
    except CardCommandError as error:
        assert "card 0 cannot be reopened" in str(error)
        pytest.skip("this body's cards cannot be reopened")
    assert a.counters() == new
    assert a.completions() == []
    assert a.outstanding == 0
    with pytest.raises(CardCommandError):
        a.read(buffer, 0, 1)
    for card in (a, b):
        card.abort(2)
    send, _ = sender(b, 0)
    receive, _ = waiter(a, 1)
    a.submit(receive, step())
    b.submit(send, step())
    finish(a)
    finish(b)


def test_closing_one_card_leaves_its_neighbours_at_work(make_rig: MakeRig) -> None:
    a, b, _ = make_rig(3).cards
    program, _, _ = adder(b)
    receive, _ = waiter(a, 1)
    a.submit(receive, step())
    fd = b.completion_fd
    a.close()
    a.close()
    with pytest.raises(CardLostError, match="card 0 is closed"):
        a.alloc(64)
    assert b.completion_fd == fd
    b.submit(program, step())
    finish(b)


def test_closing_all_cards_leaves_no_thread_and_no_descriptor(make_rig: MakeRig) -> None:
    def held() -> tuple[list[str], int]:
        return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    make_rig(1).close()
    time.sleep(0.01)  # a thread that was joined is listed a moment longer
    before = held()
    for how in ("rig", "cards"):
        for _ in range(5):
            rig = make_rig(3)
            program, _ = waiter(rig.cards[0], 1)
            rig.cards[0].submit(program, step())
            assert held() != before
            if how == "rig":
                rig.close()
            else:
                for card in rig.cards:
                    card.close()
            rig.close()
    assert held() == before
