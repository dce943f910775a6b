# SPDX-License-Identifier: Apache-2.0
"""The card actor: owns one CardDevice and its kernel queue, and answers typed messages.

The only place where a card's completion is awaited.  The actor ends when it is told to stop, when
its channel ends, or by a crash, which its coordinator turns into CardLostError; whichever way, the
device is closed.
"""

from __future__ import annotations

from collections import deque

import attrs
import trio

from spanker.actors.channel import Channel
from spanker.actors.frame import DEFAULT_LIMITS
from spanker.actors.message import (
    PROTOCOL_VERSION,
    Abort,
    AllocBuffer,
    BufferAllocated,
    BufferData,
    CardInfo,
    Counters,
    Describe,
    FreeBuffer,
    LoadProgram,
    Message,
    Ok,
    ProgramLoaded,
    ReadBuffer,
    ReadCounters,
    RunStep,
    StepDone,
    Stop,
    UnloadProgram,
    WriteBuffer,
    failed,
)
from spanker.device.base import Buffer, CardDevice, Completion
from spanker.errors import (
    CardCommandError,
    CardError,
    ChannelClosedError,
    LocalProtocolError,
    SpankerError,
)

QUEUE_MAX = 4


class KernelQueue:
    """A bounded, in-order queue of submissions to one card."""

    def __init__(self, device: CardDevice, capacity: int = QUEUE_MAX) -> None:
        self._device = device
        self._slots = trio.Semaphore(capacity)

    async def submit(self, program: int, parameters: Buffer) -> int:
        """Submit behind what is queued; waits for a free slot.  Returns the fence."""
        await self._slots.acquire()
        try:
            return self._device.submit(program, parameters)
        except BaseException:
            self._slots.release()
            raise

    async def completed(self) -> tuple[Completion, ...]:
        """Wait until submissions finish; return them in order."""
        while True:
            done = tuple(self._device.completions())
            if done:
                for _ in done:
                    self._slots.release()
                return done
            fd = self._device.completion_fd
            if fd is None:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(fd)


@attrs.frozen
class _Pending:
    request_id: int
    fence: int
    reads: tuple[tuple[int, int, int], ...]


class CardActor:
    """Serves one channel until it stops: `serve`, then `aclose`."""

    def __init__(self, channel: Channel, device: CardDevice) -> None:
        self._channel = channel
        self._device = device
        self._queue = KernelQueue(device)
        self._pending: deque[_Pending] = deque()
        self._submitted = trio.Event()

    async def serve(self) -> None:
        """Serve until Stop or the end of the channel."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._collect)
            try:
                await self._serve()
            except ChannelClosedError:
                pass
            nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """Close the device and the channel."""
        self._device.close()
        await trio.aclose_forcefully(self._channel)

    async def _serve(self) -> None:
        while True:
            request_id, request = await self._channel.receive()
            try:
                if isinstance(request, RunStep):
                    _check_reply_bytes(request)
                    fence = await self._queue.submit(request.program, request.buffers[0])
                    self._pending.append(_Pending(request_id, fence, request.reads))
                    self._submitted.set()
                    continue
                reply = self._answer(request)
            except SpankerError as error:
                reply = failed(error, self._device.number)
            await self._send(reply, request_id)
            if isinstance(request, Stop):
                return

    def _answer(self, request: Message) -> Message:
        device = self._device
        if isinstance(request, WriteBuffer):
            device.write(request.handle, request.offset, request.buffers[0])
            return Ok()
        if isinstance(request, ReadBuffer):
            _check_reply_bytes(request)
            data = device.read(request.handle, request.offset, request.nbytes)
            return BufferData(buffers=(data,))
        if isinstance(request, AllocBuffer):
            return BufferAllocated(device.alloc(request.nbytes), request.nbytes)
        if isinstance(request, FreeBuffer):
            device.free(request.handle)
            return Ok()
        if isinstance(request, LoadProgram):
            return ProgramLoaded(device.load_program(request.buffers[0]))
        if isinstance(request, UnloadProgram):
            device.unload_program(request.program)
            return Ok()
        if isinstance(request, Abort):
            device.abort(request.epoch)
            return Ok()
        if isinstance(request, Describe):
            return self._describe()
        if isinstance(request, ReadCounters):
            return Counters(**attrs.asdict(device.counters(), recurse=False))
        if isinstance(request, Stop):
            return Ok()
        raise LocalProtocolError(f"{type(request).__name__} is not a request to a card")

    def _describe(self) -> CardInfo:
        info = self._device.info
        return CardInfo(
            protocol_version=PROTOCOL_VERSION,
            semantics_version=info.semantics_version,
            serial=info.serial,
            name=info.name,
            isa=info.isa,
            ddr_bytes=info.ddr_bytes,
            max_programs=info.programs_max,
        )

    async def _collect(self) -> None:
        """Answer steps as the card completes them."""
        while True:
            if not self._pending:
                self._submitted = trio.Event()
                await self._submitted.wait()
            for completion in await self._queue.completed():
                pending = self._pending.popleft()
                if completion.fence != pending.fence:
                    raise CardError(
                        f"card {self._device.number}: fence {completion.fence} completed, "
                        f"{pending.fence} was next",
                        card=self._device.number,
                    )
                reply: Message
                try:
                    if completion.error is not None:
                        raise completion.error
                    data = tuple(self._device.read(*read) for read in pending.reads)
                    reply = StepDone(completion.fence, completion.busy_ns, buffers=data)
                except SpankerError as error:
                    reply = failed(error, self._device.number)
                try:
                    await self._send(reply, pending.request_id)
                except ChannelClosedError:
                    return

    async def _send(self, reply: Message, request_id: int) -> None:
        try:
            await self._channel.send(reply, request_id)
        except LocalProtocolError as error:
            # Nothing was sent: the answer exceeds what the channel carries.
            await self._channel.send(failed(error, self._device.number), request_id)


def _check_reply_bytes(request: RunStep | ReadBuffer) -> None:
    """Refuse before memory is taken for an answer that no channel carries."""
    nbytes, limit = sum(request.reply_sizes()), DEFAULT_LIMITS.raw_bytes_max
    if nbytes > limit:
        raise CardCommandError(
            f"{type(request).__name__} asks for {nbytes:,} bytes at once, a reply carries at most "
            f"{limit:,}: read them in pieces"
        )
