# SPDX-License-Identifier: Apache-2.0
"""Channels: an ordered, bounded, two-way way for messages between two actors, on trio.

A channel moves whole messages with their raw buffers and knows nothing of requests and replies.
`MemoryChannel` hands frames over by reference; `StreamChannel` puts encoded frames on any trio
stream: a Unix socket, the host link, TCP.  tests/actors/test_channel.py is the conformance suite
that each kind must pass.
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Protocol

import trio

from spanker.actors.frame import (
    DEFAULT_LIMITS,
    Buffer,
    Deferred,
    Frame,
    FrameDecoder,
    FrameLimits,
    encode_frame,
)
from spanker.actors.message import Message, check, decode, encode
from spanker.actors.threads import WorkThreads
from spanker.device.base import CardDevice
from spanker.errors import ChannelClosedError, RemoteProtocolError

# A message of several small pieces is one write; a larger piece is worth a write of its own,
# since joining would copy it.
_JOIN_BYTES_MAX = 16 << 10
# A read allocates what it asks for, so it asks for more only while a large buffer is under way.
_READ_BYTES_MIN = 64 << 10
_READ_BYTES_MAX = 1 << 20


Listener = Callable[[int, Message], bool]
"""Takes a request id and a message at once, or says False and leaves them."""


class DirectRuns(Protocol):
    """Runs on lent memory without messages, for who is in the same process and trio's thread.

    Calls are turns of an idle actor's in the caller's task.  While it `is_free`, the caller may
    submit a run to its device, and before the next checkpoint takes what has come of it, or else
    `enter`s it.
    """

    @property
    def device(self) -> CardDevice: ...

    @property
    def is_free(self) -> bool:
        """Whether a run need not wait for what was asked before, or for what is to be answered."""

    def enter(self, request_id: int, fence: int) -> None:
        """Answer a run with a message, as if RunLent of this id had been received."""


class Channel(trio.abc.AsyncResource):
    """One end of a two-way message channel.

    Any number of tasks may send; one task at a time receives.
    """

    shares_memory: ClassVar[bool] = False
    """Whether raw buffers arrive as the very memory that was sent."""

    @abstractmethod
    async def send(self, message: Message, request_id: int) -> None:
        """Send one message; a checkpoint, and blocks while the peer is behind.

        Raises LocalProtocolError, with nothing sent, for a message that is out of range or exceeds
        the limits, and ChannelClosedError when either side has closed.  Deferred buffers are made
        by the peer where it reads the sender's memory, otherwise here, in a thread: then
        LocalProtocolError, with nothing sent, tells of an error in making them, too.
        """

    def try_send(self, message: Message, request_id: int) -> bool:
        """Send one message if that needs no waiting; False when it does, and nothing was sent.

        Raises as `send` does.
        """
        return False

    def listen(self, listener: Listener) -> None:
        """Have messages that find this end idle offered to a function first, where that is
        possible: in the sender's task, and without waking one of this side.  What it takes is not
        received."""

    def expose(self, runs: DirectRuns) -> None:
        """Let the peer call these, where that is possible."""

    def reach(self) -> DirectRuns | None:
        """What the peer exposes, while it waits for a message and none is on its way to it."""
        return None

    @abstractmethod
    async def receive(self) -> tuple[int, Message]:
        """Wait for the next message; return its request id and itself.  A checkpoint.

        Messages sent before the peer closed still arrive.  Then, and after `aclose`, raises
        ChannelClosedError.  Raises RemoteProtocolError, closing the channel, when the peer breaks
        the protocol.  Cancellation loses nothing.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close this end; wakes whoever sends or receives on either end.  Idempotent."""


# --- in memory ---------------------------------------------------------------------


_Letter = tuple[int, Message]
_GONE = (trio.ClosedResourceError, trio.BrokenResourceError, trio.EndOfChannel)


class MemoryChannel(Channel):
    """A channel within one process.  Messages and their raw buffers arrive as the very objects that
    were sent.

    Messages are checked as if they were encoded, so that both kinds accept and refuse the same.
    A cancelled `send` has sent nothing.
    """

    shares_memory = True

    def __init__(
        self,
        sending: trio.MemorySendChannel[_Letter],
        receiving: trio.MemoryReceiveChannel[_Letter],
        *,
        name: str = "memory channel",
        limits: FrameLimits = DEFAULT_LIMITS,
    ) -> None:
        self._sending = sending
        self._receiving = receiving
        self._limits = limits
        self._peer: MemoryChannel | None = None
        self._listener: Listener | None = None
        self._runs: DirectRuns | None = None
        self._receives = False
        # Messages to this end that nobody has received, or at least that are being sent.
        self._on_their_way = 0
        self.name = name

    def join(self, peer: MemoryChannel) -> None:
        """Tell each end of the other."""
        self._peer, peer._peer = peer, self

    async def send(self, message: Message, request_id: int) -> None:
        check(message, request_id, self._limits)
        self._count(1)
        try:
            await self._sending.send((request_id, message))
        except BaseException as error:
            self._count(-1)
            if isinstance(error, _GONE):
                raise self._gone(error) from None
            raise

    def try_send(self, message: Message, request_id: int) -> bool:
        check(message, request_id, self._limits)
        peer = self._peer
        if peer is not None and peer._listener is not None and peer._idle:
            if peer._listener(request_id, message):
                return True
        try:
            self._sending.send_nowait((request_id, message))
        except trio.WouldBlock:
            return False
        except _GONE as error:
            raise self._gone(error) from None
        self._count(1)
        return True

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    def expose(self, runs: DirectRuns) -> None:
        self._runs = runs

    def reach(self) -> DirectRuns | None:
        peer = self._peer
        return peer._runs if peer is not None and peer._idle else None

    @property
    def _idle(self) -> bool:
        return self._receives and not self._on_their_way

    def _count(self, messages: int) -> None:
        if self._peer is not None:
            self._peer._on_their_way += messages

    async def receive(self) -> tuple[int, Message]:
        self._receives = True
        try:
            letter = await self._receiving.receive()
        except _GONE as error:
            raise self._gone(error) from None
        finally:
            self._receives = False
        self._on_their_way -= 1
        return letter

    def _gone(self, error: Exception) -> ChannelClosedError:
        here = isinstance(error, trio.ClosedResourceError)
        return closed_error(self.name, "on this side" if here else "by the peer")

    async def aclose(self) -> None:
        self._listener = self._runs = self._peer = None
        self._sending.close()
        self._receiving.close()
        await trio.lowlevel.checkpoint()


def memory_channel_pair(
    capacity: int = 16, *, name: str = "memory channel", limits: FrameLimits = DEFAULT_LIMITS
) -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected ends; at most `capacity` messages wait in each direction."""
    a_to_b = trio.open_memory_channel[_Letter](capacity)
    b_to_a = trio.open_memory_channel[_Letter](capacity)
    a = MemoryChannel(a_to_b[0], b_to_a[1], name=name, limits=limits)
    b = MemoryChannel(b_to_a[0], a_to_b[1], name=name, limits=limits)
    a.join(b)
    return a, b


# --- over a byte stream --------------------------------------------------------------


class StreamChannel(Channel):
    """Encoded frames over a trio stream, which it owns and closes.

    Bounded by what the stream buffers.  A `send` cancelled while it waits its turn, or for its
    deferred buffers, has sent nothing.  One cancelled while it writes may have left half a frame:
    it closes the channel, so that no later frame can be taken for the rest of this one.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        name: str = "stream channel",
        limits: FrameLimits = DEFAULT_LIMITS,
    ) -> None:
        self._stream = stream
        self._limits = limits
        self._decoder = FrameDecoder(limits)
        self._arrived: deque[Frame] = deque()
        self._send_lock = trio.Lock()
        self._closed = False
        self._maker = WorkThreads("spanker-maker", 1)
        self.name = name

    async def send(self, message: Message, request_id: int) -> None:
        frame = encode(message, request_id)
        if any(isinstance(buffer, Deferred) for buffer in frame.buffers):
            pieces = await self._make(frame)
        else:
            pieces = encode_frame(frame, self._limits)
        async with self._send_lock:
            if self._closed:
                raise closed_error(self.name, "on this side")
            try:
                for piece in _join_small(pieces):
                    await self._stream.send_all(piece)
            except trio.ClosedResourceError:
                raise closed_error(self.name, "on this side") from None
            except trio.BrokenResourceError:
                # What the peer sent before it went away can still be received.
                raise closed_error(self.name, "by the peer") from None
            except BaseException:
                await self._abandon()
                raise

    async def _make(self, frame: Frame) -> list[Buffer]:
        """Encode a frame with deferred buffers, while another one may be under way."""
        if self._closed:
            raise closed_error(self.name, "on this side")
        pieces: list[Buffer] = []
        await self._maker.run(lambda: pieces.extend(encode_frame(frame, self._limits)))
        return pieces

    async def receive(self) -> tuple[int, Message]:
        if self._arrived:
            await trio.lowlevel.checkpoint()
        try:
            while not self._arrived:
                if self._closed:
                    raise closed_error(self.name, "on this side")
                # Raises the violation that came behind the frames handed out so far.
                self._decoder.feed(b"")
                await self._read_more()
            return decode(self._arrived.popleft())
        except RemoteProtocolError:
            await self._abandon()
            raise

    async def _read_more(self) -> None:
        nbytes = min(max(self._decoder.bytes_wanted, _READ_BYTES_MIN), _READ_BYTES_MAX)
        try:
            data = await self._stream.receive_some(nbytes)
        except trio.ClosedResourceError:
            raise closed_error(self.name, "on this side") from None
        except trio.BrokenResourceError:
            raise closed_error(self.name, "by the peer") from None
        if not data:
            self._decoder.eof()
            raise closed_error(self.name, "by the peer")
        self._arrived.extend(self._decoder.feed(data))

    async def aclose(self) -> None:
        self._forget()
        await self._stream.aclose()

    async def _abandon(self) -> None:
        """Close at once, in a cancelled scope too."""
        self._forget()
        await trio.aclose_forcefully(self._stream)

    def _forget(self) -> None:
        self._closed = True
        self._maker.close()
        self._arrived.clear()


def unix_channel_pair(
    *, name: str = "Unix channel", limits: FrameLimits = DEFAULT_LIMITS
) -> tuple[StreamChannel, StreamChannel]:
    """Two connected ends over a Unix socket pair; call it inside trio."""
    a, b = (
        trio.SocketStream(trio.socket.from_stdlib_socket(s))
        for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    )
    return StreamChannel(a, name=name, limits=limits), StreamChannel(b, name=name, limits=limits)


def _join_small(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes in fewer pieces: small neighbours joined, large ones passed through."""
    joined: list[Buffer] = []
    for piece in pieces:
        if len(piece) <= _JOIN_BYTES_MAX:
            joined.append(piece)
            continue
        if joined:
            yield b"".join(joined)
            joined = []
        yield piece
    if joined:
        yield b"".join(joined)


def closed_error(name: str, where: str) -> ChannelClosedError:
    """What is raised on a channel that was closed "on this side" or "by the peer"."""
    return ChannelClosedError(f"{name}: closed {where}; open a new channel to go on")
