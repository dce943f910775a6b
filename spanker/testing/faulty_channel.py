# SPDX-License-Identifier: Apache-2.0
"""The host's end of a channel that can lose, repeat, swap, spoil and hold back messages.

It stands around an end of any kind.  While anything is to go wrong, messages take the long way,
through `send` and `receive`, and nothing is done without messages.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import trio

from spanker.actors.channel import Channel, DirectRuns, Listener
from spanker.actors.frame import frame_bytes
from spanker.actors.message import Message, encode
from spanker.errors import RemoteProtocolError
from spanker.testing.fault_plan import What

# How long a message that is to be overtaken waits for another one.
REORDER_S = 0.1

_Letter = tuple[int, Message]


class FaultyChannel(Channel):
    """Each fault that is armed strikes the next message, whichever way it goes.

    `counting` is called with the bytes over the channel so far, both ways together, and those of
    the message that is about to go; None where nobody wants to know, as counting takes time.
    """

    def __init__(
        self, inner: Channel, name: str, counting: Callable[[int, int], None] | None = None
    ) -> None:
        self.shares_memory = inner.shares_memory  # type: ignore[misc]
        self.name = name
        self._inner = inner
        self._counting = counting
        self._bytes = 0
        self._armed: deque[What] = deque()
        self.stalled_until_s = -math.inf
        self._changed = trio.Event()
        self._sending = trio.Lock()
        self._closed = False
        # Received and not yet struck by anything, and ready to be handed out.
        self._came: deque[_Letter] = deque()
        self._ready: deque[_Letter] = deque()
        # Waiting to be overtaken, until when.
        self._outgoing: _Letter | None = None
        self._incoming: _Letter | None = None
        self._overdue_s = math.inf

    # --- failing ------------------------------------------------------------------------

    def arm(self, what: What, count: int = 1) -> None:
        """Drop, duplicate, reorder or corrupt so many of the next messages."""
        self._armed.extend([what] * count)

    def stall(self, until_s: float) -> None:
        """Hold everything back, both ways, until a time of trio's clock, or longer if it is
        already."""
        self.stalled_until_s = max(self.stalled_until_s, until_s)

    async def disconnect(self) -> None:
        """The connection breaks."""
        await self.aclose()

    @property
    def _busy(self) -> bool:
        """Whether a message may not simply pass."""
        return bool(
            self._armed
            or self._came
            or self._ready
            or self._outgoing
            or self._incoming
            or trio.current_time() < self.stalled_until_s
        )

    async def _flowing(self) -> None:
        """Wait until nothing holds messages back; no checkpoint where nothing does."""
        while trio.current_time() < self.stalled_until_s and not self._closed:
            with trio.CancelScope(deadline=self.stalled_until_s):
                await self._changed.wait()

    def _about_to_go(self, message: Message, request_id: int) -> int:
        """What a message counts; a fault may strike at its bytes."""
        if self._counting is None:
            return 0
        nbytes = frame_bytes(encode(message, request_id))
        self._counting(self._bytes, nbytes)
        return nbytes

    async def _spoilt(self) -> RemoteProtocolError:
        await self.aclose()
        return RemoteProtocolError(
            f"{self.name}: a frame does not match its checksum; open a new channel to go on"
        )

    # --- sending ------------------------------------------------------------------------

    async def send(self, message: Message, request_id: int) -> None:
        async with self._sending:
            await self._flowing()
            self._bytes += self._about_to_go(message, request_id)
            what = self._armed.popleft() if self._armed else None
            if what is What.DROP:
                return
            if what is What.CORRUPT:
                raise await self._spoilt()
            if what is What.REORDER and self._outgoing is None:
                self._outgoing = request_id, message
                return
            await self._inner.send(message, request_id)
            if what is What.DUPLICATE:
                await self._inner.send(message, request_id)
            await self._send_overtaken()

    async def _send_overtaken(self) -> None:
        if self._outgoing is not None:
            (request_id, message), self._outgoing = self._outgoing, None
            await self._inner.send(message, request_id)

    async def release(self) -> None:
        """Send what has waited long enough to be overtaken."""
        if self._outgoing is not None:
            async with self._sending:
                await self._flowing()
                await self._send_overtaken()

    @property
    def reorders(self) -> bool:
        """Whether a message to the card waits to be overtaken, or may have to."""
        return not self._closed and (self._outgoing is not None or What.REORDER in self._armed)

    def try_send(self, message: Message, request_id: int) -> bool:
        if self._closed or self._busy or self._sending.locked():
            return False
        nbytes = self._about_to_go(message, request_id)
        if self._busy or not self._inner.try_send(message, request_id):
            return False
        self._bytes += nbytes
        return True

    # --- receiving ----------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        def offered(request_id: int, message: Message) -> bool:
            if self._busy:
                return False
            nbytes = self._about_to_go(message, request_id)
            if self._busy or not listener(request_id, message):
                return False
            self._bytes += nbytes
            return True

        self._inner.listen(offered)

    async def receive(self) -> tuple[int, Message]:
        if self._ready:
            await trio.lowlevel.checkpoint()
        while not self._ready:
            await self._flowing()
            if not self._came:
                # Cancelled here, it has lost nothing.
                with trio.CancelScope(deadline=self._overdue_s):
                    self._came.append(await self._inner.receive())
                if not self._came:
                    self._overtaken()
                    continue
            await self._flowing()
            if self._closed:
                self._came.clear()
                self._ready.clear()
                continue
            await self._strike(*self._came[0])
        return self._ready.popleft()

    async def _strike(self, request_id: int, message: Message) -> None:
        """What becomes of the message that came first."""
        self._bytes += self._about_to_go(message, request_id)
        what = self._armed.popleft() if self._armed else None
        letter = self._came.popleft()
        if what is What.CORRUPT:
            raise await self._spoilt()
        if what is What.DROP:
            return
        if what is What.REORDER and self._incoming is None:
            self._incoming = letter
            self._overdue_s = trio.current_time() + REORDER_S
            return
        self._ready.extend([letter] * (2 if what is What.DUPLICATE else 1))
        self._overtaken()

    def _overtaken(self) -> None:
        if self._incoming is not None:
            self._ready.append(self._incoming)
            self._incoming, self._overdue_s = None, math.inf

    # --- the rest -----------------------------------------------------------------------

    def expose(self, runs: DirectRuns) -> None:
        self._inner.expose(runs)

    def reach(self) -> DirectRuns | None:
        return None if self._closed or self._busy else self._inner.reach()

    async def aclose(self) -> None:
        self._closed = True
        self._changed.set()
        self._changed = trio.Event()
        await self._inner.aclose()
