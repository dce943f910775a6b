# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of CardDevice, third part: what steps bring back, chosen tokens, the trace.

Every body of a card must pass it; conformance_rigs.py says how a body joins.
"""

from __future__ import annotations

import struct

import attrs
import numpy as np
import pytest
from conformance_rigs import (
    WAIT_S,
    adder,
    clock_of,
    collect,
    finish,
    make_program,
    readable,
    sender,
    step,
    waiter,
)

from spanker.device.base import READS_MAX, CardDevice, TraceEvent, unpack_events
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardFaultError,
    CardLostError,
)
from spanker.kernels import program as op
from spanker.kernels.formats import Format
from spanker.kernels.program import Op, Ref, SequenceStep, chosen_token, encode_step

# --- what a step brings back ------------------------------------------------------------


def test_each_step_brings_back_what_it_left(card: CardDevice) -> None:
    program, x, ones = adder(card)
    fences = [
        card.submit(program, step(tokens=2), [(x, 4 * i, 8), (ones, 0, 0), (ones, 60, 4)])
        for i in range(4)
    ]
    done = collect(card, 4)
    assert [c.fence for c in done] == fences
    for i, completion in enumerate(done):
        assert [bytes(d) for d in completion.data] == [
            np.float32([i + 1, i + 1]).tobytes(),
            b"",
            np.float32([1]).tobytes(),
        ]
    card.submit(program, step(tokens=0), [(x, 0, 256)])
    card.submit(program, step())
    first, second = collect(card, 2)
    assert bytes(first.data[0]) == np.repeat(np.float32([4, 4, 0, 0]), 16).tobytes()
    assert second.data == ()


def test_as_many_reads_as_there_may_be(card: CardDevice) -> None:
    program, x, _ = adder(card)
    card.submit(program, step(), [(x, 4 * i, 4) for i in range(READS_MAX)])
    (done,) = collect(card, 1)
    assert [bytes(d) for d in done.data] == [np.float32([1]).tobytes()] * READS_MAX
    with pytest.raises(CardCommandError, match=f"at most {READS_MAX}"):
        card.submit(program, step(), [(x, 0, 4)] * (READS_MAX + 1))


@pytest.mark.parametrize(
    "read",
    [
        (0, 257, 0),
        (0, 256, 1),
        (0, 0, 257),
        (0, 1, 256),
        (0, (1 << 64) - 4, 8),
        (0, 4, (1 << 64) - 1),
        (0, 1 << 64, 1),
        (0, 0, 1 << 64),
        (0, -1, 1),
        (0, 0, -1),
        (99, 0, 1),
        (1 << 32, 0, 1),
        (-1, 0, 1),
    ],
    ids=repr,
)
def test_reads_outside_of_their_buffer_are_refused(
    card: CardDevice, read: tuple[int, int, int]
) -> None:
    program, x, _ = adder(card)
    assert x == 0
    for reads in ([read], [(x, 0, 4), read], [read, (x, 0, 4)]):
        with pytest.raises(CardCommandError):
            card.submit(program, step(), reads)
        assert card.counters().queued == 0
    # Nothing ran and nothing is held.
    card.submit(program, step(), [(x, 0, 4)])
    (done,) = collect(card, 1)
    assert bytes(done.data[0]) == np.float32([1]).tobytes()
    card.unload_program(program)
    card.free(x)


def test_a_buffer_that_a_step_will_read_cannot_be_freed(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    receive, _ = waiter(a, 1)
    send, _ = sender(b, 0)
    other = a.alloc(100)
    a.write(other, 0, b"read me")
    fences = [a.submit(receive, step(), [(other, 0, 7)]) for _ in range(2)]
    with pytest.raises(CardCommandError):
        a.free(other)
    b.submit(send, step())
    finish(b)
    assert bytes(collect(a, 1)[0].data[0]) == b"read me"
    with pytest.raises(CardCommandError):
        a.free(other)
    a.abort(2)
    (aborted,) = collect(a, 1)
    assert aborted.fence == fences[1] and isinstance(aborted.error, CardAbortedError)
    a.free(other)


def test_a_step_that_fails_brings_nothing_back(pair: tuple[CardDevice, CardDevice]) -> None:
    card, _ = pair
    x, out = card.alloc(128), card.alloc(34)
    made = make_program(op.quantize(Ref("x"), Ref("q"), k=32), tokens=1, outputs=0)
    program = card.load_program(made.encode({"x": x, "q": out}))
    receive, _ = waiter(card, 1)
    card.write(x, 0, np.full(32, np.nan, np.float32).tobytes())
    card.submit(program, step(), [(x, 0, 128)])
    card.submit(program, step(), [(x, 0, 128)])
    fault, behind = collect(card, 2)
    assert isinstance(fault.error, CardFaultError) and fault.data == ()
    # Queued in the belief that the first succeeds; collected together with it or run after it.
    assert isinstance(behind.error, CardAbortedError | CardFaultError) and behind.data == ()
    card.submit(receive, step(), [(x, 0, 128)])
    card.abort(2)
    (aborted,) = collect(card, 1)
    assert isinstance(aborted.error, CardAbortedError) and aborted.data == ()
    if hasattr(card, "kill"):
        card.submit(receive, step(), [(x, 0, 128)])
        card.kill()
        (lost,) = collect(card, 1)
        assert isinstance(lost.error, CardLostError) and lost.data == ()


def test_what_is_submitted_once_a_fault_is_known_runs(card: CardDevice) -> None:
    x, out = card.alloc(128), card.alloc(34)
    made = make_program(op.quantize(Ref("x"), Ref("q"), k=32), tokens=1, outputs=0)
    bad = card.load_program(made.encode({"x": x, "q": out}))
    good, _, _ = adder(card)
    card.write(x, 0, np.full(32, np.nan, np.float32).tobytes())
    for _ in range(500):
        card.submit(bad, step())
        while not (done := card.completions()):
            readable(card, WAIT_S)
        assert isinstance(done[0].error, CardFaultError)
        card.submit(good, step())
        finish(card)


# --- chosen tokens ----------------------------------------------------------------------


def test_of_equal_logits_the_first_card_and_the_lowest_id_win(card: CardDevice) -> None:
    """Pairs of three cards for four outputs, two candidates a card where BEST looks."""
    handles = {"top": card.alloc(4 * 24), "pairs": card.alloc(4 * 24), "chosen": card.alloc(4 * 8)}
    made = make_program(
        op.best(Ref("top", 24), Ref("pairs", 24, 8), k=2),
        op.choose(Ref("pairs", 24), Ref("chosen", 8), lists=3),
    )
    program = card.load_program(made.encode(handles))

    def pairs(*rows: tuple[tuple[int, float], ...]) -> bytes:
        return b"".join(struct.pack("<If", *pair) for row in rows for pair in row)

    # The second card's own pair comes from its candidates: ids first, then their logits.
    own = ((7, 1.0), (5, 2.0), (9, -0.0), (0xFFFFFFFF, -3.0e38))
    card.write(handles["top"], 0, b"".join(struct.pack("<IIff8x", i, 1, v, v - 1) for i, v in own))
    card.write(
        handles["pairs"],
        0,
        pairs(
            ((3, 1.0), (0, 0.0), (11, 1.0)),
            ((3, 1.0), (0, 0.0), (11, 2.0)),
            ((3, -1.0), (0, 0.0), (11, 0.0)),
            ((3, -9.0), (0, 0.0), (11, -8.0)),
        ),
    )
    card.submit(program, step(tokens=4, outputs=4), [(handles["chosen"], 0, 28)])
    (done,) = collect(card, 1)
    assert struct.unpack("<7I", done.data[0]) == (3, 0, 5, 0, 9, 0, 11)


@attrs.frozen
class Chooser:
    """A program that embeds one column of ten words, takes outputs and chooses by that column.

    The logits are the embedded values themselves: word t is worth `values[t]`, of one candidate.
    """

    card: CardDevice
    program: int
    handles: dict[str, int]

    @classmethod
    def make(cls, card: CardDevice, values: list[float]) -> Chooser:
        sizes = {"table": 40, "chosen": 8, "x": 16, "logits": 8, "top": 16, "pairs": 16}
        handles = {name: card.alloc(nbytes) for name, nbytes in sizes.items()}
        card.write(handles["table"], 0, np.float32(values).tobytes())
        x, logits, top = Ref("x", 4), Ref("logits", 4), Ref("top", 8)
        made = make_program(
            op.embed(Format.F32, Ref("table", 4), Ref("chosen", 4), x, columns=1, vocabulary=10),
            op.select(x, logits, n=1),
            op.top_k(logits, top, n=1, k=1, first_id=6),
            op.best(top, Ref("pairs", 8), k=1),
            op.choose(Ref("pairs", 8), Ref("chosen", 4), lists=1),
            outputs=2,
        )
        return cls(card, card.load_program(made.encode(handles)), handles)

    def submit(self, tokens: list[int], outputs: tuple[int, ...] = ()) -> int:
        params = encode_step([SequenceStep(tokens, 0, [], outputs)])
        return self.card.submit(self.program, params, [(self.handles["x"], 0, 4 * len(tokens))])


def test_a_queued_step_begins_with_what_the_one_before_has_chosen(card: CardDevice) -> None:
    """No host in between: the second step is queued before the first has chosen."""
    chooser = Chooser.make(card, [float(i) for i in range(10)])
    for _ in range(50):
        # Nothing is chosen before: each of the first steps has outputs, and chooses id 6.
        chooser.submit([1, 2], (0, 1))
        chooser.submit([chosen_token(1), 3, chosen_token(0)], (2,))
        chooser.submit([chosen_token(0)])
        first, second, third = (np.frombuffer(c.data[0], np.float32) for c in collect(card, 3))
        assert first.tolist() == [1, 2]
        assert second.tolist() == [6, 3, 6]
        assert third.tolist() == [6]


@pytest.mark.parametrize("word", [10, 0x80000000, 0xFFFFFFFF])
def test_a_chosen_id_that_is_no_token_is_a_fault(card: CardDevice, word: int) -> None:
    chooser = Chooser.make(card, [0.0] * 10)
    card.write(chooser.handles["chosen"], 4, struct.pack("<I", word))
    chooser.submit([3, chosen_token(1)])
    (done,) = collect(card, 1)
    assert isinstance(done.error, CardFaultError) and done.data == ()
    assert "card 0, command 0" in str(done.error) and "no token" in str(done.error)
    chooser.submit([3, chosen_token(0)])
    finish(card)


def test_an_output_that_no_step_has_cannot_be_chosen(card: CardDevice) -> None:
    chooser = Chooser.make(card, [0.0] * 10)
    for output in (2, 3, 0x7FFFFFFF):
        with pytest.raises(CardCommandError, match=f"output of token 1 is {output}, must be below"):
            chooser.submit([0, chosen_token(output)])
    assert card.counters().queued == 0


# --- the trace --------------------------------------------------------------------------


def start_trace(card: CardDevice, events: int) -> None:
    try:
        card.trace(events)
    except CardCommandError as error:
        assert "cannot trace" in str(error)
        with pytest.raises(CardCommandError, match="cannot trace"):
            card.trace_events(1)
        pytest.skip("this body cannot trace")


def events_of(card: CardDevice, most: int = 1 << 20) -> tuple[tuple[TraceEvent, ...], int]:
    data, lost = card.trace_events(most)
    return unpack_events(data), lost


def test_a_trace_tells_every_command_of_every_step(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    start_trace(a, 1000)
    start_trace(b, 1000)
    receive, _ = waiter(a, 1)
    send, _ = sender(b, 0)
    counting, _, _ = adder(a, tokens=4)
    clock = clock_of(a)
    before = clock.now_ns()
    fences = [a.submit(counting, step(tokens=3)), a.submit(receive, step())]
    fences.append(a.submit(counting, step(tokens=0)))
    clock.sleep(0.02)
    sent = b.submit(send, step())
    finish(b)
    finish(a, 3)
    after = clock.now_ns()
    (events, lost), (others, _) = events_of(a), events_of(b)
    assert lost == 0
    assert [(e.fence, e.command, e.op) for e in events] == [
        (fences[0], 0, Op.ADD),
        (fences[1], 0, Op.EXCHANGE),
        (fences[1], 1, Op.LINK_RECV),
        (fences[2], 0, Op.ADD),
    ]
    assert [(e.fence, e.op) for e in others] == [(sent, Op.EXCHANGE), (sent, Op.LINK_SEND)]
    times = [t for e in events for t in (e.begin_ns, e.end_ns)]
    assert times == sorted(times) and before <= times[0] and times[-1] <= after
    # It waited for the far end all the while.
    assert events[1].end_ns - events[1].begin_ns > 10_000_000
    assert events_of(a) == ((), 0)


def test_a_trace_is_taken_in_pieces_and_counts_what_it_loses(card: CardDevice) -> None:
    start_trace(card, 10)
    program, _, _ = adder(card)

    def run(steps: int) -> list[int]:
        fences = []
        for _ in range(steps):
            fences.append(card.submit(program, step()))
            finish(card)
        return fences

    fences = run(8)
    (first, _), (nothing, _), (rest, lost) = (events_of(card, n) for n in (3, 0, 100))
    assert nothing == () and lost == 0
    assert [e.fence for e in first + rest] == fences and len(first) == 3
    # What does not fit is not kept; the oldest ten are.
    fences = run(13)
    events, lost = events_of(card)
    assert ([e.fence for e in events], lost) == (fences[:10], 3)
    fences = run(11)
    events, lost = events_of(card)
    assert ([e.fence for e in events], lost) == (fences[:10], 4)
    card.trace(10)
    assert events_of(card) == ((), 0)
    run(1)
    card.trace(0)
    run(1)
    assert events_of(card) == ((), 0)


@pytest.mark.parametrize("events", [-1, 1 << 32, 1 << 63, 1 << 64])
def test_a_trace_of_impossible_size_is_refused(card: CardDevice, events: int) -> None:
    start_trace(card, 1)
    with pytest.raises(CardCommandError):
        card.trace(events)


def test_a_trace_begins_and_ends_between_steps(pair: tuple[CardDevice, CardDevice]) -> None:
    a, _ = pair
    start_trace(a, 100)
    receive, _ = waiter(a, 1)
    a.submit(receive, step())
    for events in (0, 1, 100):
        with pytest.raises(CardCommandError):
            a.trace(events)
    a.abort(2)
    assert isinstance(collect(a, 1)[0].error, CardAbortedError)
    assert events_of(a) == ((), 0)
    # And what was refused has not stopped it.
    send, _ = sender(a, 1)
    a.submit(send, step())
    finish(a)
    assert [e.op for e in events_of(a)[0]] == [Op.EXCHANGE, Op.LINK_SEND]
