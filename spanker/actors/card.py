# SPDX-License-Identifier: Apache-2.0
"""The card actor: owns one CardDevice and its kernel queue, and answers typed messages.

The only place where a card's completion is awaited.  The actor ends when it is told to stop, when
its channel ends, or by a crash, which its coordinator turns into CardLostError; whichever way, the
device is closed.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import attrs
import trio

from spanker.actors.calls import Calls
from spanker.actors.channel import Channel
from spanker.actors.frame import DEFAULT_LIMITS, Deferred, flat_buffer
from spanker.actors.message import (
    PROTOCOL_VERSION,
    Abort,
    AllocBuffers,
    BufferData,
    BuffersAllocated,
    CardInfo,
    Counters,
    Describe,
    FreeBuffer,
    LoadProgram,
    MapFile,
    Message,
    Ok,
    OpenWindows,
    ProgramLoaded,
    ReadBuffer,
    ReadCounters,
    ReadTrace,
    Relayed,
    Request,
    RunLent,
    RunStep,
    StartTrace,
    StepDone,
    Stop,
    TraceData,
    UnloadProgram,
    WriteBuffers,
    failed,
)
from spanker.actors.threads import WorkThreads
from spanker.device.base import Buffer, CardDevice, Completion, Lent, Read
from spanker.errors import (
    CardCommandError,
    CardError,
    ChannelClosedError,
    LocalProtocolError,
    RemoteProtocolError,
    SpankerError,
)

QUEUE_MAX = 4

# What has come over the host and waits for room on the card; what is beyond gets lost, which the
# card finds out with the next message.
RELAYED_BYTES_MAX = 64 << 20

# Writes that run side by side, in threads.
WRITES_MAX = 4
# Less than this is written faster (a tenth of a millisecond) than handed to a thread.
LARGE_WRITE_BYTES = 256 << 10


class KernelQueue:
    """A bounded, in-order queue of submissions to one card, by `calls` where its body waits."""

    def __init__(
        self, device: CardDevice, capacity: int = QUEUE_MAX, calls: Calls | None = None
    ) -> None:
        self._device = device
        self._calls = calls
        # A slot that somebody waits for is handed over: it does not become free.
        self._free_slots = capacity
        self._waiting = trio.lowlevel.ParkingLot()

    async def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        """Submit behind what is queued; waits for a free slot.  Returns the fence."""
        if self._free_slots:
            self._free_slots -= 1
        else:
            await self._waiting.park()
        try:
            if self._calls is not None:
                submit = functools.partial(self._device.submit, program, parameters, reads, lent)
                return await self._calls.make(submit)
            if lent:
                return self._device.submit(program, parameters, reads, lent)
            return self._device.submit(program, parameters, reads)
        except BaseException:
            self._release(1)
            raise

    def count_submitted(self) -> None:
        """Somebody else has submitted to the card, while the queue was empty."""
        self._free_slots -= 1

    def _release(self, slots: int) -> None:
        if not self._free_slots:
            slots -= len(self._waiting.unpark(count=slots))
        self._free_slots += slots

    async def completed(
        self, looked: Callable[[], Awaitable[None]] | None = None
    ) -> Sequence[Completion]:
        """Wait until submissions finish; return them in order.  `looked` is called whenever the
        card may have something else to tell."""
        while True:
            fd = self._device.completion_fd
            if fd is None:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(fd)
            # In this order: this makes the descriptor quiet.
            if self._calls is None:
                done = self._device.completions()
            else:
                # A completion may be there before its submission has returned.
                async with self._calls.between():
                    done = self._device.completions()
            if looked is not None:
                await looked()
            if done:
                self._release(len(done))
                return done


class CardActor:
    """Serves one channel until it stops: `serve`, then `aclose`.  Also a DirectRuns."""

    def __init__(self, channel: Channel, device: CardDevice) -> None:
        self._channel = channel
        self._device = device
        self._calls = Calls(device) if device.waits else None
        self._queue = KernelQueue(device, calls=self._calls)
        # Request and fence of what is queued on the card, oldest first.
        self._pending: deque[tuple[int, int]] = deque()
        self._submitted = trio.Event()
        # The id of the last request, None before the first.
        self._last_id: int | None = None
        # While completions have been collected that are yet to be answered.
        self._answers = False
        # What has come over the host, by peer, and waits for room on the card.
        self._relayed: dict[int, deque[Buffer]] = {}
        self._relayed_bytes = 0
        # Messages that went over the host in this epoch.
        self._relayed_out = self._relayed_in = 0
        self._writers = WorkThreads("spanker-writer", WRITES_MAX)
        self._free_writers = trio.Semaphore(WRITES_MAX)
        self._waiting_for_writes = trio.lowlevel.ParkingLot()

    async def serve(self) -> None:
        """Serve until Stop or the end of the channel."""
        if self._calls is None:
            self._channel.expose(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._collect)
            try:
                await self._serve(nursery)
            except ChannelClosedError:
                pass
            nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """Close the device and the channel, once no write uses the card's memory any more."""
        with trio.CancelScope(shield=True):
            await self._all_written()
            if self._calls is not None:
                await self._calls.close_device()
        self._writers.close()
        if self._calls is None:
            self._device.close()
        await trio.aclose_forcefully(self._channel)

    async def _serve(self, nursery: trio.Nursery) -> None:
        request: Message | None
        while True:
            # While the next one is waited for nothing is kept of the last: its memory is not ours.
            request = None
            request_id, request = await self._channel.receive()
            if isinstance(request, Relayed):
                self._take_relayed(request)
                continue
            self._check_newer(request_id)
            # A modelled card's time does not wait for threads.
            in_thread = not self._device.modelled
            if in_thread and isinstance(request, WriteBuffers) and not _is_quick(request):
                await self._free_writers.acquire()
                nursery.start_soon(self._write, request, request_id)
                continue
            # Whatever comes behind a write finds it done.
            await self._all_written()
            try:
                if isinstance(request, RunStep | RunLent):
                    fence = await self._submit(request)
                    self._pending.append((request_id, fence))
                    self._submitted.set()
                    continue
                if self._calls is None:
                    reply = self._answer(request)
                else:
                    reply = await self._calls.make(functools.partial(self._answer, request))
                if isinstance(request, Abort):
                    self._relayed_out = self._relayed_in = 0
            except SpankerError as error:
                reply = failed(error, self._device.number)
            await self._send(reply, request_id)
            if isinstance(request, Stop):
                return

    @property
    def device(self) -> CardDevice:
        """As DirectRuns."""
        return self._device

    @property
    def is_free(self) -> bool:
        """As DirectRuns."""
        # Whatever comes behind a write finds it done, and answers come in order.
        return not (self._pending or self._answers) and self._free_writers.value == WRITES_MAX

    def enter(self, request_id: int, fence: int) -> None:
        """As DirectRuns."""
        self._check_newer(request_id)
        self._queue.count_submitted()
        self._pending.append((request_id, fence))
        self._submitted.set()

    def _check_newer(self, request_id: int) -> None:
        """Ids of requests grow, with gaps, and wrap at 32 bits: one that does not has come twice or
        late, and a command must not run twice.  Of two ids the newer one is that less than 2**31
        ahead."""
        last, self._last_id = self._last_id, request_id
        if last is not None and not 0 < (request_id - last) & 0xFFFFFFFF < 1 << 31:
            raise RemoteProtocolError(
                f"card {self._device.number}: expected a request newer than {last}, got "
                f"{request_id}: it came twice or late, so nothing on this channel can be trusted"
            )

    async def _submit(self, request: RunStep | RunLent) -> int:
        parameters = request.buffers[0]
        if isinstance(request, RunStep):
            _check_reply_bytes(request)
            return await self._queue.submit(request.program, parameters, request.reads)
        return await self._queue.submit(request.program, parameters, lent=_windows(request))

    def _answer(self, request: Message) -> Message:
        """Do what is asked, in whichever thread that the card's body is called in."""
        device = self._device
        if isinstance(request, WriteBuffers):
            self._write_all(request)
            return Ok()
        if isinstance(request, AllocBuffers):
            return BuffersAllocated(self._all(request.sizes, device.alloc))
        if isinstance(request, OpenWindows):
            return BuffersAllocated(self._all(request.sizes, device.window))
        if isinstance(request, MapFile):
            if not self._channel.shares_memory:
                raise CardCommandError("MapFile: a stream carries no file descriptors")
            device.map_file(request.file, request.places)
            return Ok()
        if isinstance(request, ReadBuffer):
            _check_reply_bytes(request)
            data = device.read(request.handle, request.offset, request.nbytes)
            return BufferData(buffers=(data,))
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
            return Counters(
                **attrs.asdict(device.counters(), recurse=False),
                relayed_out=self._relayed_out,
                relayed_in=self._relayed_in,
            )
        if isinstance(request, StartTrace):
            device.trace(request.events)
            return Ok()
        if isinstance(request, ReadTrace):
            _check_reply_bytes(request)
            data, lost = device.trace_events(request.events)
            return TraceData(lost, buffers=(data,))
        if isinstance(request, Stop):
            return Ok()
        raise LocalProtocolError(f"{type(request).__name__} is not a request to a card")

    def _all(self, sizes: tuple[int, ...], make: Callable[[int], int]) -> tuple[int, ...]:
        """A buffer of each of these sizes, or none."""
        handles: list[int] = []
        try:
            for nbytes in sizes:
                handles.append(make(nbytes))
        except BaseException:
            for handle in handles:
                self._device.free(handle)
            raise
        return tuple(handles)

    async def _all_written(self) -> None:
        """Wait until no write runs in a thread."""
        while self._free_writers.value < WRITES_MAX:
            await self._waiting_for_writes.park()

    async def _write(self, request: WriteBuffers, request_id: int) -> None:
        """Do one write in a thread and answer it; the caller has taken a writer for it."""
        reply: Message = Ok()
        try:
            await self._writers.run(lambda: self._write_all(request), self._device.cut_short)
        except SpankerError as error:
            reply = failed(error, self._device.number)
        finally:
            self._free_writers.release()
            self._waiting_for_writes.unpark_all()
        with contextlib.suppress(ChannelClosedError):
            await self._send(reply, request_id)

    def _write_all(self, request: WriteBuffers) -> None:
        buffers = [flat_buffer(buffer) for buffer in request.buffers]
        if len(buffers) != len(request.writes):
            raise CardCommandError(
                f"WriteBuffers: expected a raw buffer for each of {len(request.writes)} writes, "
                f"got {len(buffers)}"
            )
        for i, ((_, _, nbytes), buffer) in enumerate(zip(request.writes, buffers, strict=True)):
            if nbytes != len(buffer):
                raise CardCommandError(
                    f"WriteBuffers, write {i}: expected a buffer of {nbytes:,} bytes, "
                    f"got {len(buffer):,}"
                )
        for (handle, offset, nbytes), buffer in zip(request.writes, buffers, strict=True):
            if isinstance(buffer, Deferred):
                self._device.fill(handle, offset, nbytes, buffer.make_in)
            else:
                self._device.write(handle, offset, buffer)

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
            max_windows=info.windows_max,
            meets=info.meets,
            maps=info.maps,
            relays=info.relays,
            ddr_granule=info.ddr_granule,
        )

    async def _collect(self) -> None:
        """Answer steps as the card completes them."""
        while True:
            # An fd can be waited for before there is anything: one task the less to wake a step.
            if not self._pending and self._device.completion_fd is None:
                self._submitted = trio.Event()
                await self._submitted.wait()
            try:
                done = await self._queue.completed(self._relay)
            except ChannelClosedError:
                return
            self._answers = True
            for completion in done:
                request_id, reply = self._answer_to(completion)
                try:
                    await self._send(reply, request_id)
                except ChannelClosedError:
                    return
            self._answers = False

    async def _relay(self) -> None:
        """Send what programs have sent over the host, and give the card what waits for room."""
        for peer, data in self._device.relayed():
            await self._send(Relayed(peer, buffers=(data,)), 0)
            self._relayed_out += 1
        for peer in tuple(self._relayed):
            self._give_relayed(peer)

    def _take_relayed(self, message: Relayed) -> None:
        peer, data = message.peer, flat_buffer(message.buffers[0])
        if isinstance(data, Deferred):
            raise LocalProtocolError("Relayed: expected bytes, got a buffer that is yet to be made")
        if self._relayed_bytes + len(data) > RELAYED_BYTES_MAX:
            return
        self._relayed_in += 1
        self._relayed.setdefault(peer, deque()).append(data)
        self._relayed_bytes += len(data)
        self._give_relayed(peer)

    def _give_relayed(self, peer: int) -> None:
        """Give the card what has come from a peer, as far as it has room."""
        waiting = self._relayed[peer]
        while waiting:
            # What nobody waits for any more, or what is no message, is as good as lost.
            with contextlib.suppress(CardError):
                if not self._device.relay(peer, waiting[0]):
                    return
            self._relayed_bytes -= len(waiting.popleft())
        del self._relayed[peer]

    def _answer_to(self, completion: Completion) -> tuple[int, Message]:
        request_id, fence = self._pending.popleft()
        if completion.fence != fence:
            raise CardError(
                f"card {self._device.number}: fence {completion.fence} completed, {fence} was next",
                card=self._device.number,
            )
        if isinstance(completion.error, SpankerError):
            return request_id, failed(completion.error, self._device.number)
        if completion.error is not None:
            raise completion.error
        return request_id, StepDone(fence, completion.busy_ns, buffers=completion.data)

    async def _send(self, reply: Message, request_id: int) -> None:
        try:
            if not self._channel.try_send(reply, request_id):
                await self._channel.send(reply, request_id)
        except LocalProtocolError as error:
            # Nothing was sent: the answer exceeds what the channel carries.
            await self._channel.send(failed(error, self._device.number), request_id)


def _is_quick(request: WriteBuffers) -> bool:
    """Whether a write takes no longer than other requests: few bytes, and all of them at hand."""
    if any(isinstance(buffer, Deferred) for buffer in request.buffers):
        return False
    return sum(nbytes for _, _, nbytes in request.writes) < LARGE_WRITE_BYTES


def _windows(request: RunLent) -> tuple[Lent, ...]:
    lent = request.buffers[1:]
    read_only = [m for m in lent if memoryview(m).readonly]
    if len(lent) != len(request.windows) or read_only:
        raise CardCommandError(
            f"RunLent: expected writable memory for each of {len(request.windows)} windows, "
            f"got {len(lent)} raw buffers; a stream carries copies, which nobody would see"
        )
    return tuple(zip(request.windows, lent, strict=True))


def _check_reply_bytes(request: Request[Message]) -> None:
    """Refuse before memory is taken for an answer that no channel carries."""
    limit, nbytes = DEFAULT_LIMITS.raw_bytes_max, request.reply_bytes()
    if nbytes > limit:
        raise CardCommandError(
            f"{type(request).__name__} asks for {nbytes:,} bytes at once, a reply carries at most "
            f"{limit:,}: read them in pieces"
        )
