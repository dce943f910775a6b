# SPDX-License-Identifier: Apache-2.0
"""The coordinator's end of a channel: requests out, replies matched back to who asked.

Knows the rules of requests and replies, nothing of models.  Requests are written by a task of the
client, not by who makes them: a caller that is cancelled half way through a frame would otherwise
take the channel, and with it the card, away from everyone else.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from spanker.actors.channel import Channel, DirectRuns
from spanker.actors.frame import Buffer
from spanker.actors.message import (
    Abort,
    Counters,
    Message,
    ReadCounters,
    Relayed,
    Request,
    RunLent,
)
from spanker.errors import (
    CardError,
    CardLostError,
    LocalProtocolError,
    RemoteProtocolError,
    SpankerError,
    again,
)

ReplyT = TypeVar("ReplyT", bound=Message)
Callback = Callable[[Message | SpankerError], None]
# Who takes what a card sends its peers over the host.
Relay = Callable[[int, Relayed], None]
# Who is told, once, that a client has failed, and why.
Failed = Callable[["CardClient", CardError], None]

# What may wait to be sent to a card for its peers; what is beyond gets lost.
RELAYED_BYTES_MAX = 64 << 20


def raw_bytes(request: Request[Message]) -> int:
    """The raw bytes of a request and, at most, of its answer."""
    return sum(map(len, request.buffers)) + request.reply_bytes()


class Answer(Generic[ReplyT]):
    """What comes of one request: `arrived` is the callback for it.  `told` gets the reply, too,
    whoever takes it."""

    def __init__(self, told: Callable[[ReplyT], None] | None = None) -> None:
        self._told = told
        self._come = trio.Event()
        self._outcome: Message | SpankerError | None = None

    def arrived(self, outcome: Message | SpankerError) -> None:
        self._outcome = outcome
        self._come.set()
        if self._told is not None and not isinstance(outcome, SpankerError):
            self._told(outcome)  # type: ignore[arg-type]

    async def come(self) -> None:
        """Wait until it is there."""
        await self._come.wait()

    def take(self) -> ReplyT:
        """The reply, for whoever takes it first.  Raises what the card reports."""
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, SpankerError):
            try:
                raise outcome
            finally:
                # Its traceback refers to this frame: a cycle, which would keep whatever the callers
                # hold, an open file perhaps, until it is collected.
                del outcome
        return outcome  # type: ignore[return-value]


class CardClient:
    """Requests to one card.  `run` must be running in a nursery for anything to move."""

    def __init__(
        self,
        number: int,
        channel: Channel,
        relay: Relay | None = None,
        failed: Failed | None = None,
    ) -> None:
        self.number = number
        self._channel = channel
        self._relay = relay
        self._failed = failed
        # What other cards have sent this one over the host.
        self._relayed: deque[Relayed] = deque()
        self._relayed_bytes = 0
        self._to_relay = trio.Event()
        # Of these, and of those that it has sent them, how many in this epoch.
        self._relayed_in = self._relayed_out = 0
        self._waiting: dict[int, tuple[Request[Message], Callback]] = {}
        self._next_id = 0
        self._failure: CardError | None = None
        # Requests handed to the writing task and not written: none must be overtaken.
        self._unwritten = 0
        # Without room: a request is either with its caller or being written.
        self._to_write, self._writing = trio.open_memory_channel[tuple[Request[Message], int]](0)
        channel.listen(self._arrived)

    @property
    def failure(self) -> CardError | None:
        """Why the card can no longer be reached, or None."""
        return self._failure

    @property
    def behind(self) -> bool:
        """Whether requests wait to be written, so that another one would have to wait, too."""
        return self._unwritten > 0

    @property
    def unanswered_bytes(self) -> int:
        """The raw bytes of all requests that have not been answered, and of their answers: another
        one comes behind them."""
        return sum(raw_bytes(request) for request, _ in self._waiting.values())

    @property
    def shares_memory(self) -> bool:
        """Whether the card gets raw buffers as the very memory that they are."""
        return self._channel.shares_memory

    async def run(self) -> None:
        """Write requests and receive replies until the channel ends; then everything waiting
        fails."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._write_relayed)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self.fail(CardLostError(f"card {self.number} is closed", card=self.number))

    async def _write(self) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            async for request, request_id in self._writing:
                try:
                    await self._channel.send(request, request_id)
                except LocalProtocolError as error:
                    # Nothing was sent, and only this request is at fault.
                    if request_id in self._waiting:
                        self._waiting.pop(request_id)[1](error)
                except SpankerError as error:
                    self.fail(error)
                finally:
                    self._unwritten -= 1
                    del request  # which refers to memory of whoever made it

    def pass_on(self, peer: int, data: Buffer) -> None:
        """Send the card what a peer has sent it over the host, in order.  Never blocks; what can
        not be sent is lost, which the card finds out by what comes next."""
        message = Relayed(peer, buffers=(data,))
        if self._failure is not None:
            return
        try:
            if not self._relayed and self._channel.try_send(message, 0):
                self._relayed_in += 1
                return
        except SpankerError as error:
            self.fail(error)
            return
        if self._relayed_bytes + len(data) > RELAYED_BYTES_MAX:
            self._relayed_in += 1
            return
        self._relayed.append(message)
        self._relayed_bytes += len(data)
        self._to_relay.set()

    async def _write_relayed(self) -> None:
        while True:
            self._to_relay = trio.Event()
            while self._relayed:
                try:
                    await self._channel.send(self._relayed[0], 0)
                except SpankerError as error:
                    self.fail(error)
                    return
                self._relayed_bytes -= len(self._relayed.popleft().buffers[0])
                self._relayed_in += 1
            await self._to_relay.wait()

    async def _read(self) -> None:
        try:
            while True:
                request_id, reply = await self._channel.receive()
                if not self._arrived(request_id, reply):
                    raise RemoteProtocolError(
                        f"card {self.number}: reply {type(reply).__name__} to request "
                        f"{request_id}, which nobody made"
                    )
                del reply  # which refers to memory of whoever asked
        except SpankerError as error:
            self.fail(error)
            await self._channel.aclose()

    def _arrived(self, request_id: int, reply: Message) -> bool:
        """Give a reply to who asked; False where nobody did."""
        if isinstance(reply, Relayed):
            if self._relay is not None:
                self._relayed_out += 1
                self._relay(self.number, reply)
            return self._relay is not None
        if request_id not in self._waiting:
            return False
        request, callback = self._waiting.pop(request_id)
        if isinstance(request, Abort):
            self._relayed_out = 0
        try:
            callback(request.check_reply(reply))
        except SpankerError as error:
            callback(error.with_traceback(None))
            self.reported(error)
        return True

    def reported(self, error: SpankerError) -> None:
        """Take in what the card reports: that it is gone is so for everybody."""
        if isinstance(error, CardLostError) and error.card == self.number:
            self.fail(again(error))

    def fail(self, error: SpankerError) -> None:
        """The card is gone: everything waiting, and every later request, gets this error."""
        self._writing.close()
        first = self._failure is None
        if self._failure is None:
            if isinstance(error, CardError):
                self._failure = error
            else:
                self._failure = CardLostError(
                    f"card {self.number} is lost: {error}", card=self.number
                )
        waiting, self._waiting = self._waiting, {}
        for _, callback in waiting.values():
            callback(again(self._failure))
        if first and self._failed is not None:
            self._failed(self, self._failure)

    async def post(self, request: Request[ReplyT], callback: Callback) -> None:
        """Send a request; `callback` gets the reply or the error, once, in a task of the client
        or, where the card need not be waited for, before this returns.

        Blocks while the card is behind, and is no checkpoint where nothing needs to wait.  A
        failure to send reaches the callback too.  Cancelled, it has sent nothing, and the callback
        will not be called.
        """
        if self._failure is not None:
            callback(again(self._failure))
            return
        request_id = self._new_id()
        self._waiting[request_id] = (request, callback)
        if isinstance(request, Abort):
            self._relayed_in = 0
        try:
            if not self._unwritten and self._channel.try_send(request, request_id):
                return
        except LocalProtocolError as error:
            self._waiting.pop(request_id)[1](error)
            return
        except SpankerError as error:
            self.fail(error)
            return
        self._unwritten += 1
        try:
            await self._to_write.send((request, request_id))
        except trio.BrokenResourceError:
            self._unwritten -= 1  # `fail` came in between, and has told the callback
        except BaseException:
            self._unwritten -= 1
            self._waiting.pop(request_id, None)
            raise

    def _new_id(self) -> int:
        request_id = self._next_id
        self._next_id = (request_id + 1) & 0xFFFFFFFF
        return request_id

    def reach(self) -> DirectRuns | None:
        """The card's actor, where a run can be begun without a message: it is in this process and
        idle, and nothing waits to be sent to it.  Good until the next checkpoint."""
        if self._unwritten or self._failure is not None:
            return None
        return self._channel.reach()

    def expect(self, request: RunLent, callback: Callback) -> int:
        """A request id, for a run that was begun without a message: `callback` gets the reply to it
        as if it had been posted."""
        request_id = self._new_id()
        self._waiting[request_id] = (request, callback)
        return request_id

    async def request(
        self, request: Request[ReplyT], told: Callable[[ReplyT], None] | None = None
    ) -> ReplyT:
        """Send a request and wait for its reply.  Raises what the card reports.

        A cancelled request may still be carried out; its reply is dropped, but `told` gets it
        whenever it comes.
        """
        answer = Answer(told)
        await self.post(request, answer.arrived)
        await answer.come()
        return answer.take()

    async def count(self) -> tuple[Counters, bool]:
        """The card's counters, and whether a message between it and its peers has got lost between
        it and here since its last abort.  Raises what the card reports."""
        sent = self._relayed_in
        counters = await self.request(ReadCounters())
        # What was sent before the request, or has left the card before its reply, has come.
        lost = counters.relayed_in < sent or counters.relayed_out > self._relayed_out
        return counters, lost

    async def aclose(self) -> None:
        """Close the channel; `run` ends."""
        await self._channel.aclose()
