# SPDX-License-Identifier: Apache-2.0
"""The host link: the wire that every card of a fleet shares with the host, modelled.

Byte streams in memory whose bytes arrive when they would have arrived over the real link.  Nothing
here knows what the bytes mean, and time is trio's clock only, so that the same code runs in real
and in virtual time.

The model: full duplex.  In each direction the link moves `bandwidth_bytes_per_s`, shared by all
attached cards, a quantum of bytes each in turn; a byte arrives `latency_s` after it has left.
Every quantum's due time is computed from the bytes moved since the link was last idle, never by
adding up sleeps, so write sizes and late wake-ups do not add up to an error.  In virtual time
arrivals are exact; in real time one may be noticed up to about 1 ms late, which is the resolution
of trio's timers on Linux, and never early.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import trio

from spanker.errors import ConfigError

# The time one quantum occupies the link: the grain of fairness and of delivery.
_QUANTUM_S = 500e-6
_QUANTUM_BYTES_MAX = 1 << 20
# A sender books the link this far ahead before it sleeps.  Linux timers wake up to a millisecond
# late through epoll; the booked work keeps the link busy meanwhile.
AHEAD_S = 2e-3
# Writes that follow each other this closely share one delivery, which bounds the memory that
# streams of tiny writes take.  It delays their first byte by no more than this, their last by 0.
_MERGE_S = 10e-6
_RECEIVE_BYTES = 64 << 10


def quantum_bytes(bandwidth_bytes_per_s: float) -> int:
    """What one stream sends at a turn."""
    return min(max(int(bandwidth_bytes_per_s * _QUANTUM_S), 1), _QUANTUM_BYTES_MAX)


class HostLink:
    """The host's link to its cards.

    `bandwidth_bytes_per_s` is that of each direction; `window_bytes` is how much may wait unread
    at the receiver of a stream before its sender blocks.
    """

    def __init__(
        self, bandwidth_bytes_per_s: float, latency_s: float, *, window_bytes: int = 256 << 10
    ) -> None:
        if not (math.isfinite(bandwidth_bytes_per_s) and bandwidth_bytes_per_s > 0):
            raise ConfigError(
                f"host link: bandwidth must be positive and finite, got {bandwidth_bytes_per_s} B/s"
            )
        if not (math.isfinite(latency_s) and latency_s >= 0):
            raise ConfigError(f"host link: latency must be 0 or more and finite, got {latency_s} s")
        if window_bytes < 1:
            raise ConfigError(f"host link: window must be 1 byte or more, got {window_bytes}")
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.latency_s = latency_s
        self.window_bytes = window_bytes
        self._to_cards = _Direction(bandwidth_bytes_per_s, latency_s)
        self._to_host = _Direction(bandwidth_bytes_per_s, latency_s)

    @property
    def bytes_to_cards(self) -> int:
        """Bytes sent towards the cards so far."""
        return self._to_cards.bytes_total

    @property
    def bytes_to_host(self) -> int:
        """Bytes sent towards the host so far."""
        return self._to_host.bytes_total

    def stream_pair(self) -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
        """Attach one more card: its stream's host end and card end.

        `send_all` returns when the link has taken the bytes, up to 2 ms before they have left.
        End of stream arrives after the data in flight; a receiver that closes is noticed at once.
        """
        # The window holds what is unread; what is still on its way must fit besides, or the link
        # could not be kept busy.
        in_flight = math.ceil(self.bandwidth_bytes_per_s * (self.latency_s + AHEAD_S))
        down = _Pipe(self._to_cards, self.window_bytes + in_flight)
        up = _Pipe(self._to_host, self.window_bytes + in_flight)
        host_end = trio.StapledStream(_SendEnd(down), _ReceiveEnd(up))
        card_end = trio.StapledStream(_SendEnd(up), _ReceiveEnd(down))
        return host_end, card_end


class _Direction:
    """One direction of the link: whose turn it is, and until when it is taken."""

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        self._quantum_bytes = quantum_bytes(bandwidth_bytes_per_s)
        self._turn = trio.Lock()  # first come, first served
        self.bytes_total = 0
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._latency_s = latency_s
        self._busy_since = -math.inf
        self._busy_bytes = 0

    def free_at(self) -> float:
        """When the last byte booked will have left."""
        return self._busy_since + self._busy_bytes / self._bandwidth_bytes_per_s

    async def wait_turn(self) -> int:
        """Wait for a turn, while the link is booked too far ahead; return the bytes it is good for.

        A turn is as many bytes for every stream, whatever its write sizes: unused, they keep.
        """
        async with self._turn:
            bookable_at = self.free_at() - AHEAD_S
            if bookable_at > trio.current_time():
                await trio.sleep_until(bookable_at)
            return self._quantum_bytes

    def book(self, nbytes: int) -> float:
        """Take the link for `nbytes`; return when the last of them arrives."""
        now = trio.current_time()
        if self.free_at() <= now:
            self._busy_since = now
            self._busy_bytes = 0
        self._busy_bytes += nbytes
        self.bytes_total += nbytes
        return self.free_at() + self._latency_s


@attrs.define
class _Delivery:
    """Bytes that arrive together at `due`; `first_due` is when the first write among them would."""

    data: bytes | bytearray
    first_due: float
    due: float
    taken: int = 0


class _Pipe:
    """One direction of one stream: what is in flight or unread, and who waits for a change."""

    def __init__(self, direction: _Direction, capacity_bytes: int) -> None:
        self.direction = direction
        self.deliveries: deque[_Delivery] = deque()
        self.eof_due: float | None = None
        self.receiver_closed = False
        self.sender_wake = trio.lowlevel.ParkingLot()  # there is room, or an end has closed
        self.receiver_wake = trio.lowlevel.ParkingLot()  # first data or the end is under way
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0

    @property
    def has_room(self) -> bool:
        return self._held_bytes < self._capacity_bytes

    def put(self, data: memoryview) -> None:
        due = self.direction.book(len(data))
        self._held_bytes += len(data)
        last = self.deliveries[-1] if self.deliveries else None
        if last is not None and not last.taken and due - last.first_due <= _MERGE_S:
            last.data = bytearray(last.data) if isinstance(last.data, bytes) else last.data
            last.data += data
            last.due = due
            return
        self.deliveries.append(_Delivery(bytes(data), due, due))
        if last is None:
            self.receiver_wake.unpark_all()

    def end(self) -> None:
        if self.eof_due is None:
            # A booking of nothing: after the data in flight, and no sooner than the latency.
            self.eof_due = self.direction.book(0)
            self.receiver_wake.unpark_all()

    def take(self, nbytes_max: int) -> bytes:
        """What has arrived by now, at most `nbytes_max` of it."""
        now = trio.current_time()
        pieces: list[bytes | bytearray | memoryview] = []
        while nbytes_max and self.deliveries and self.deliveries[0].due <= now:
            first = self.deliveries[0]
            piece = memoryview(first.data)[first.taken : first.taken + nbytes_max]
            first.taken += len(piece)
            nbytes_max -= len(piece)
            pieces.append(piece)
            if first.taken == len(first.data):
                self.deliveries.popleft()
        data = b"".join(pieces)
        self._held_bytes -= len(data)
        if self.has_room:
            self.sender_wake.unpark_all()
        return data

    def close_receiver(self) -> None:
        self.receiver_closed = True
        self.deliveries.clear()
        self._held_bytes = 0
        self.sender_wake.unpark_all()
        self.receiver_wake.unpark_all()


class _OneAtATime:
    """Turns concurrent use by two tasks into trio.BusyResourceError."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._busy = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._busy:
            raise trio.BusyResourceError(f"another task is already {self._what} this stream")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


class _SendEnd(trio.abc.SendStream):
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._closed = False
        self._ended = False
        self._turn_bytes = 0  # what is left of this stream's latest turn
        self._use = _OneAtATime("sending on")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._use():
            await trio.lowlevel.checkpoint()
            self._check_open()
            rest = memoryview(data)
            while rest:
                await self._wait_for_room()
                if not self._turn_bytes:
                    self._turn_bytes = await self._pipe.direction.wait_turn()
                    self._check_open()
                piece = rest[: self._turn_bytes]
                self._pipe.put(piece)
                self._turn_bytes -= len(piece)
                rest = rest[len(piece) :]

    async def wait_send_all_might_not_block(self) -> None:
        with self._use():
            await trio.lowlevel.checkpoint()
            self._check_open()
            await self._wait_for_room()

    async def send_eof(self) -> None:
        with self._use():
            await trio.lowlevel.checkpoint()
            if not self._closed:
                self._ended = True
                self._pipe.end()

    async def aclose(self) -> None:
        self._closed = True
        self._pipe.end()
        self._pipe.sender_wake.unpark_all()
        await trio.lowlevel.checkpoint()

    async def _wait_for_room(self) -> None:
        while not self._pipe.has_room:
            await self._pipe.sender_wake.park()
            self._check_open()

    def _check_open(self) -> None:
        if self._closed or self._ended:
            raise trio.ClosedResourceError("this end of the host link stream has been closed")
        if self._pipe.receiver_closed:
            raise trio.BrokenResourceError("the other end of the host link stream has been closed")


class _ReceiveEnd(trio.abc.ReceiveStream):
    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._use = _OneAtATime("receiving from")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        nbytes_max = _RECEIVE_BYTES if max_bytes is None else operator.index(max_bytes)
        if nbytes_max < 1:
            raise ValueError(f"max_bytes must be 1 or more, got {max_bytes}")
        with self._use():
            await trio.lowlevel.checkpoint()
            while True:
                self._check_open()
                due = self._next_due()
                if due <= trio.current_time():
                    return self._pipe.take(nbytes_max)
                with trio.CancelScope(deadline=due):
                    await self._pipe.receiver_wake.park()

    async def aclose(self) -> None:
        self._pipe.close_receiver()
        await trio.lowlevel.checkpoint()

    def _next_due(self) -> float:
        """When the next bytes, or the end, arrive; infinity when nothing is under way."""
        if self._pipe.deliveries:
            return self._pipe.deliveries[0].due
        return math.inf if self._pipe.eof_due is None else self._pipe.eof_due

    def _check_open(self) -> None:
        if self._pipe.receiver_closed:
            raise trio.ClosedResourceError("this end of the host link stream has been closed")
