# SPDX-License-Identifier: Apache-2.0
"""One direction of a link that streams share by turns: which message has left when.

The rules are those of `host_link`, without its bytes.  Streams that have something to send take
turns of `quantum` bytes, first come, first served; what a stream has not used of its last turn is
still its own.  Turns are given `ahead_s` before the link gets to them.  A message has arrived
`latency_s` after its last byte has left.  So small messages go in order, and large ones side by
side.

No I/O and no clock; all sums are whole bytes since the link was last idle, so that nothing adds up
to an error.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

# A time that was computed from whole bytes gives them back whatever the rounding.
_BYTE_SLACK = 1e-3


class Stream(Generic[T]):
    """One sender: its messages for whose last bytes there has been no turn yet."""

    __slots__ = ("backlog", "left", "messages", "unused")

    def __init__(self) -> None:
        self.messages: deque[tuple[int, T]] = deque()
        self.left = 0  # bytes of the first message
        self.backlog = 0  # bytes of all of them
        self.unused = 0  # bytes of its last turn, while it waits for none


class Turns(Generic[T]):
    """The streams of one direction.  Every method takes the time, which must not go back."""

    def __init__(
        self, bytes_per_s: float, latency_s: float, quantum: int, ahead_s: float = 0.0
    ) -> None:
        self.bytes_total = 0
        self._rate = bytes_per_s
        self._latency_s = latency_s
        self._quantum = quantum
        self._ahead_s = ahead_s
        # Since when the link has been busy, and the bytes since then that have had their turn.
        self._since = -math.inf
        self._position = 0
        self._order: deque[Stream[T]] = deque()  # the first one has the turn
        self._turn = quantum  # what is left of it
        self._arriving: deque[tuple[float, T]] = deque()
        self._next: float | None = None  # when the next one arrives, as far as that is known

    def put(self, now: float, stream: Stream[T], nbytes: int, message: T) -> None:
        """Send a message behind those of its stream; one of no bytes needs no turn."""
        self._move(now)
        if not nbytes and not stream.messages:
            self._arriving.append((max(now, self._left_at()) + self._latency_s, message))
            return
        self._next = None
        self.bytes_total += nbytes
        stream.messages.append((nbytes, message))
        stream.backlog += nbytes
        if len(stream.messages) > 1:
            return
        stream.left = nbytes
        if not self._order and now > self._left_at():
            self._since, self._position = now, 0
        used = min(stream.unused, nbytes)
        if used:
            stream.unused -= used
            self._send(stream, used)
        if stream.left:
            self._order.append(stream)
        else:
            self._end_messages(stream)

    def arrived(self, now: float) -> list[T]:
        """Messages that have arrived since the last call, in order."""
        self._move(now)
        found = []
        while self._arriving and self._arriving[0][0] <= now:
            found.append(self._arriving.popleft()[1])
        return found

    def next_arrival(self) -> float:
        """When the next message arrives, if no other one is sent meanwhile; or infinity."""
        if self._arriving:
            return self._arriving[0][0]
        if not self._order:
            return math.inf
        if self._next is None:
            position = self._position + self._next_end()
            self._next = self._since + position / self._rate + self._latency_s
        return self._next

    # --- turns --------------------------------------------------------------------------

    def _left_at(self) -> float:
        return self._since + self._position / self._rate

    def _move(self, now: float) -> None:
        """Give the turns that have been given by now."""
        if not self._order:
            return
        end = int((now + self._ahead_s - self._since) * self._rate + _BYTE_SLACK)
        while self._position < end and self._order:
            room = end - self._position
            rounds = self._whole_rounds(room)
            if rounds:
                for stream in self._order:
                    self._send(stream, rounds * self._quantum)
                continue
            stream = self._order[0]
            nbytes = min(room, self._turn, stream.left)
            self._turn -= nbytes
            self._send(stream, nbytes)
            self._end_turn(stream)

    def _send(self, stream: Stream[T], nbytes: int) -> None:
        stream.left -= nbytes
        stream.backlog -= nbytes
        self._position += nbytes

    def _whole_rounds(self, room: int) -> int:
        """Rounds in which every stream has a whole turn and no message ends."""
        rounds = room // (self._quantum * len(self._order))
        if not rounds or self._turn < self._quantum:
            return 0
        least = min(stream.left for stream in self._order)
        return min((least - 1) // self._quantum, rounds)

    def _end_turn(self, stream: Stream[T]) -> None:
        """After the stream with the turn has sent something."""
        if not stream.left:
            self._end_messages(stream)
        if not stream.messages:
            stream.unused = self._turn
            self._order.popleft()
            self._turn = self._quantum
        elif not self._turn:
            self._order.rotate(-1)
            self._turn = self._quantum

    def _end_messages(self, stream: Stream[T]) -> None:
        """The first message of a stream has had its turns, and those of no bytes behind it."""
        due = self._left_at() + self._latency_s
        self._next = None
        while stream.messages and not stream.left:
            self._arriving.append((due, stream.messages.popleft()[1]))
            stream.left = stream.messages[0][0] if stream.messages else 0

    def _next_end(self) -> int:
        """Bytes until the next message has left, the streams taking turns as they will."""
        quantum, order = self._quantum, self._order
        first = [self._turn, *[quantum] * (len(order) - 1)]
        turns = [
            1 if stream.left <= f else 1 - (f - stream.left) // quantum
            for stream, f in zip(order, first, strict=True)
        ]
        least = min(turns)
        index = turns.index(least)
        # Who stands in front has had as many turns by then, who stands behind one less.
        nbytes = order[index].left
        for i, (stream, f) in enumerate(zip(order, first, strict=True)):
            had = least if i < index else least - 1
            if i != index and had:
                nbytes += min(stream.backlog, f + (had - 1) * quantum)
        return nbytes
