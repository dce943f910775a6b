# SPDX-License-Identifier: Apache-2.0
"""Who gets a shared link when: worked out on paper, and against a link that moves every quantum."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest

from spanker.actors.turns import Stream, Turns

# 1000 bytes a second in turns of 100.
RATE, LATENCY_S, QUANTUM = 1000.0, 0.5, 100


def turns(latency_s: float = LATENCY_S, ahead_s: float = 0.0) -> Turns[str]:
    return Turns(RATE, latency_s, QUANTUM, ahead_s)


def arrivals(link: Turns[str]) -> list[tuple[float, str]]:
    """When everything that was sent arrives, as whoever sleeps until the next arrival sees it."""
    seen = []
    while (due := link.next_arrival()) < math.inf:
        found = link.arrived(due)
        assert found, "nothing arrived when something was to arrive"
        seen += [(round(due, 9), message) for message in found]
    return seen


def test_a_message_takes_its_bytes_and_the_latency() -> None:
    link, stream = turns(), Stream[str]()
    link.put(2.0, stream, 250, "a")
    assert link.next_arrival() == 2.75
    assert link.arrived(2.7499) == []
    assert link.arrived(2.75) == ["a"]
    assert link.next_arrival() == math.inf
    # Idle in between: the next one begins when it is sent.
    link.put(10.0, stream, 250, "b")
    assert arrivals(link) == [(10.75, "b")]
    assert link.bytes_total == 500


def test_small_messages_go_first_come_first_served() -> None:
    link = turns()
    for i in range(5):
        link.put(1.0, Stream(), 10, str(i))
    assert arrivals(link) == [(round(1.51 + i / 100, 9), str(i)) for i in range(5)]


def test_large_messages_go_side_by_side() -> None:
    link = turns(0.0)
    for name, nbytes in (("a", 250), ("b", 100), ("c", 150)):
        link.put(0.0, Stream(), nbytes, name)
    # a 100, b 100 done, c 100, a 100, c 50 done, a 50 done.
    assert arrivals(link) == [(0.2, "b"), (0.45, "c"), (0.5, "a")]


def test_messages_of_a_stream_go_one_behind_the_other_within_its_turns() -> None:
    link, a, b = turns(0.0), Stream[str](), Stream[str]()
    link.put(0.0, a, 60, "a1")
    link.put(0.0, a, 60, "a2")
    link.put(0.0, b, 100, "b")
    assert arrivals(link) == [(0.06, "a1"), (0.2, "b"), (0.22, "a2")]


def test_who_comes_later_waits_for_a_turn() -> None:
    link = turns(0.0)
    link.put(0.0, Stream(), 1000, "large")
    link.put(0.125, Stream(), 10, "small")
    # In the middle of the second turn of the large one.
    assert arrivals(link) == [(0.21, "small"), (1.01, "large")]


def test_what_is_left_of_a_turn_needs_no_other_one() -> None:
    link, control = turns(0.0), Stream[str]()
    link.put(0.0, control, 30, "first")
    link.put(0.0, Stream(), 1000, "large")
    link.put(0.5, control, 30, "second")
    link.put(0.6, control, 60, "third")
    # The third has 40 bytes at once, and 20 after the 60 that the turn under way has left.
    assert arrivals(link) == [(0.03, "first"), (0.53, "second"), (0.72, "third"), (1.12, "large")]


def test_turns_are_given_ahead() -> None:
    link = turns(0.0, ahead_s=0.25)
    link.put(0.0, Stream(), 1000, "large")
    link.put(0.125, Stream(), 10, "small")
    # By then the large one had turns up to 0.375, and is in the middle of its fourth.
    assert arrivals(link) == [(0.41, "small"), (1.01, "large")]


def test_a_message_of_nothing_takes_the_latency_alone_but_overtakes_nobody() -> None:
    link, busy = turns(), Stream[str]()
    link.put(0.0, busy, 400, "bytes")
    link.put(0.0, busy, 0, "behind")
    link.put(0.25, Stream(), 0, "aside")
    assert arrivals(link) == [(0.75, "aside"), (0.9, "bytes"), (0.9, "behind")]


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_where_a_link_that_moves_quanta_has_it(seed: int) -> None:
    rng = random.Random(seed)
    sends = sorted((rng.randrange(0, 4000), rng.randrange(5), i) for i in range(30))
    sizes = [rng.choice((0, 1, 30, 99, 100, 101, 250, 1000)) for _ in sends]

    link, streams = turns(LATENCY_S), [Stream[str]() for _ in range(5)]
    found: list[tuple[float, str]] = []
    for at_ms, stream, i in sends:
        while link.next_arrival() <= at_ms / 1000:
            due = link.next_arrival()
            found += [(round(due, 6), message) for message in link.arrived(due)]
        link.put(at_ms / 1000, streams[stream], sizes[i], str(i))
    found += [(round(due, 6), message) for due, message in arrivals(link)]

    assert found == sorted(_by_quanta(sends, sizes), key=lambda pair: pair[0])


def _by_quanta(sends: list[tuple[int, int, int]], sizes: list[int]) -> list[tuple[float, str]]:
    """The same byte by byte: a byte takes a millisecond."""
    queues = [deque[list[int]]() for _ in range(5)]
    unused = [0] * 5
    order: deque[int] = deque()
    turn = QUANTUM
    found = []
    waiting = deque(sends)
    ms = 0  # the next byte that nobody has
    while waiting or order:
        while waiting and (waiting[0][0] <= ms or not order):
            at, stream, i = waiting.popleft()
            if not sizes[i] and not queues[stream]:
                found.append((round(max(at, ms) / 1000 + LATENCY_S, 6), str(i)))
                continue
            queues[stream].append([sizes[i], i])
            if len(queues[stream]) > 1:
                continue
            ms = max(ms, at)
            used = min(unused[stream], sizes[i])
            unused[stream] -= used
            queues[stream][0][0] -= used
            ms += used
            if queues[stream][0][0]:
                order.append(stream)
            else:
                found.append((round(ms / 1000 + LATENCY_S, 6), str(queues[stream].popleft()[1])))
        if not order:
            continue
        stream = order[0]
        queues[stream][0][0] -= 1
        ms += 1
        turn -= 1
        while queues[stream] and not queues[stream][0][0]:
            found.append((round(ms / 1000 + LATENCY_S, 6), str(queues[stream].popleft()[1])))
        if not queues[stream]:
            unused[stream] = turn
            order.popleft()
            turn = QUANTUM
        elif not turn:
            order.rotate(-1)
            turn = QUANTUM
    return found
