# SPDX-License-Identifier: Apache-2.0
"""The host link for virtual fleets: messages by reference, in the time their bytes would take.

`HostLink` moves every byte, which a model of forty gigabytes makes felt; here a message is handed
over as an object when its last byte would have arrived.  Same turns, same latency, same times.
"""

from __future__ import annotations

from collections import deque

import trio

from spanker.actors.channel import Channel, closed_error
from spanker.actors.frame import DEFAULT_LIMITS, FrameLimits, check_frame, frame_bytes
from spanker.actors.host_link import AHEAD_S, quantum_bytes
from spanker.actors.message import Message, ReadTrace, StartTrace, TraceData, encode
from spanker.actors.turns import Stream, Turns

# Messages of one direction of a channel that have been sent and not received.
CAPACITY = 16

# Whoever looks on must not change what he sees: these take no room on the link.
_OBSERVING = (StartTrace, ReadTrace, TraceData)


class PacedLink:
    """The host's link to its cards, full duplex.  `run` must be running for anything to arrive."""

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        speeds = bandwidth_bytes_per_s, latency_s, quantum_bytes(bandwidth_bytes_per_s), AHEAD_S
        self._to_cards = Turns[_Letter](*speeds)
        self._to_host = Turns[_Letter](*speeds)
        self._asleep: trio.CancelScope | None = None

    @property
    def bytes_to_cards(self) -> int:
        """Bytes sent towards the cards so far."""
        return self._to_cards.bytes_total

    @property
    def bytes_to_host(self) -> int:
        """Bytes sent towards the host so far."""
        return self._to_host.bytes_total

    def channel_pair(
        self, *, name: str = "paced channel", limits: FrameLimits = DEFAULT_LIMITS
    ) -> tuple[PacedChannel, PacedChannel]:
        """Attach one more card: the host's end and the card's."""
        down, up = _Pipe(self, self._to_cards), _Pipe(self, self._to_host)
        return PacedChannel(down, up, name, limits), PacedChannel(up, down, name, limits)

    async def run(self) -> None:
        """Hand over what arrives, when it does, until cancelled."""
        directions = (self._to_cards, self._to_host)
        while True:
            now = trio.current_time()
            for direction in directions:
                for pipe, request_id, message in direction.arrived(now):
                    pipe.arrive(request_id, message)
            due = min(direction.next_arrival() for direction in directions)
            with trio.CancelScope(deadline=due) as self._asleep:
                await trio.sleep_forever()
            self._asleep = None

    def sent(self, direction: Turns[_Letter]) -> None:
        """For pipes: something was sent, which may arrive before anything else does."""
        if self._asleep is not None:
            self._asleep.deadline = min(self._asleep.deadline, direction.next_arrival())


class _Pipe:
    """One direction of one channel."""

    def __init__(self, link: PacedLink, direction: Turns[_Letter]) -> None:
        self.arrivals: deque[tuple[int, Message]] = deque()
        self.held = 0  # sent and not received
        self.sender_closed = False
        self.ended = False  # nothing more will arrive
        self.receiver_closed = False
        self.sender_wake = trio.lowlevel.ParkingLot()
        self.receiver_wake = trio.lowlevel.ParkingLot()
        self._link = link
        self._direction = direction
        self._stream = Stream[_Letter]()

    def send(self, request_id: int, message: Message | None, nbytes: int) -> None:
        self.held += 1
        now = trio.current_time()
        self._direction.put(now, self._stream, nbytes, (self, request_id, message))
        self._link.sent(self._direction)

    def arrive(self, request_id: int, message: Message | None) -> None:
        if message is None:
            self.ended = True
        elif not self.receiver_closed:
            self.arrivals.append((request_id, message))
        self.receiver_wake.unpark_all()

    def take(self) -> tuple[int, Message]:
        self.held -= 1
        self.sender_wake.unpark_all()
        return self.arrivals.popleft()

    def wake_all(self) -> None:
        self.sender_wake.unpark_all()
        self.receiver_wake.unpark_all()


_Letter = tuple[_Pipe, int, Message | None]


class PacedChannel(Channel):
    """A channel over a paced link, within one process.

    Messages and their raw buffers arrive as the very objects that were sent; bodies are encoded all
    the same, for their size and so that the same messages are refused.  A cancelled `send` has sent
    nothing.
    """

    def __init__(self, sending: _Pipe, receiving: _Pipe, name: str, limits: FrameLimits) -> None:
        self._sending = sending
        self._receiving = receiving
        self._limits = limits
        self._send_turn = trio.Lock()
        self.name = name

    async def send(self, message: Message, request_id: int) -> None:
        nbytes = self._nbytes(message, request_id)
        async with self._send_turn:
            while not self._can_send():
                await self._sending.sender_wake.park()
            self._sending.send(request_id, message, nbytes)

    def try_send(self, message: Message, request_id: int) -> bool:
        nbytes = self._nbytes(message, request_id)
        # It overtakes nobody who waits.
        if not self._can_send() or self._send_turn.locked():
            return False
        self._sending.send(request_id, message, nbytes)
        return True

    async def receive(self) -> tuple[int, Message]:
        await trio.lowlevel.checkpoint()
        pipe = self._receiving
        while not pipe.arrivals:
            if pipe.receiver_closed:
                raise closed_error(self.name, "on this side")
            if pipe.ended:
                raise closed_error(self.name, "by the peer")
            await pipe.receiver_wake.park()
        return pipe.take()

    async def aclose(self) -> None:
        if not self._sending.sender_closed:
            self._sending.sender_closed = True
            self._sending.send(0, None, 0)
            self._receiving.receiver_closed = True
            self._receiving.arrivals.clear()
            self._sending.wake_all()
            self._receiving.wake_all()
        await trio.lowlevel.checkpoint()

    def _nbytes(self, message: Message, request_id: int) -> int:
        frame = encode(message, request_id)
        check_frame(frame, self._limits)
        return 0 if isinstance(message, _OBSERVING) else frame_bytes(frame)

    def _can_send(self) -> bool:
        if self._sending.sender_closed:
            raise closed_error(self.name, "on this side")
        if self._sending.receiver_closed:
            raise closed_error(self.name, "by the peer")
        return self._sending.held < CAPACITY
