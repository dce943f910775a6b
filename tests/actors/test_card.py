# SPDX-License-Identifier: Apache-2.0
"""The card actor: every request answered once, errors as replies, writes side by side, steps in
order, an end."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.lowlevel
import trio.testing
from fake_device import FakeDevice
from waiting import until

from spanker.actors.card import (
    LARGE_WRITE_BYTES,
    QUEUE_MAX,
    WRITES_MAX,
    CardActor,
    KernelQueue,
)
from spanker.actors.channel import Channel, DirectRuns, memory_channel_pair, unix_channel_pair
from spanker.actors.frame import DEFAULT_LIMITS, Deferred, FrameLimits, RawBuffer
from spanker.actors.message import (
    PROTOCOL_VERSION,
    Abort,
    AllocBuffers,
    BufferData,
    BuffersAllocated,
    CardInfo,
    Counters,
    Describe,
    Failed,
    FreeBuffer,
    LoadProgram,
    Message,
    Ok,
    ProgramLoaded,
    ReadBuffer,
    ReadCounters,
    ReadTrace,
    RunStep,
    StartTrace,
    StepDone,
    Stop,
    TraceData,
    UnloadProgram,
    WriteBuffers,
    failed,
)
from spanker.device.base import (
    TRACE_EVENT,
    CardDevice,
    Completion,
    Part,
    Together,
    TraceEvent,
    unpack_events,
)
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import (
    CardError,
    CardFaultError,
    CardLostError,
    ChannelClosedError,
    ModelError,
    RemoteProtocolError,
    SpankerError,
)
from spanker.kernels import program as op
from spanker.kernels.elements import Element
from spanker.native import lib

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

STEP = op.encode_step([])
PAIRS: dict[str, Callable[..., tuple[Channel, Channel]]] = {
    "memory": memory_channel_pair,
    "unix": unix_channel_pair,
}


@attrs.define
class Host:
    """The far end of an actor's channel."""

    channel: Channel
    device: Any
    next_id: int = 0
    crash: Exception | None = None

    async def post(self, request: Message) -> int:
        self.next_id += 1
        await self.channel.send(request, self.next_id)
        return self.next_id

    async def post_all(self, requests: list[Message]) -> None:
        for request in requests:
            await self.post(request)

    async def ask(self, request: Message) -> Message:
        request_id = await self.post(request)
        answered, reply = await self.channel.receive()
        assert answered == request_id
        return reply

    async def alloc(self, nbytes: int) -> int:
        reply = await self.ask(AllocBuffers((nbytes,)))
        assert isinstance(reply, BuffersAllocated)
        return reply.handles[0]

    async def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        reply = await self.ask(ReadBuffer(handle, offset, nbytes))
        assert isinstance(reply, BufferData), reply
        return bytes(reply.buffers[0])


def write(handle: int, offset: int, data: RawBuffer) -> WriteBuffers:
    return WriteBuffers(((handle, offset, len(data)),), buffers=(data,))


@asynccontextmanager
async def serving(
    device: CardDevice, kind: str = "memory", limits: FrameLimits = DEFAULT_LIMITS
) -> AsyncIterator[Host]:
    """An actor at work, as its coordinator runs it: `serve`, then `aclose`."""
    host_end, card = PAIRS[kind](limits=limits)
    actor = CardActor(card, device)
    host = Host(host_end, device)

    async def run() -> None:
        try:
            await actor.serve()
        except Exception as error:
            host.crash = error
        finally:
            await actor.aclose()

    with trio.fail_after(10):
        async with host_end, trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield host
            nursery.cancel_scope.cancel()
    if isinstance(device, FakeDevice):
        assert device.closed == 1
    with pytest.raises(ChannelClosedError):
        await card.receive()


def ones(out: npt.NDArray[np.uint8]) -> None:
    out[:] = 1


def never(out: npt.NDArray[np.uint8]) -> None:
    raise AssertionError("nothing is made for what is refused")


def threads_of_actors() -> list[str]:
    names = ("spanker-writer", "spanker-maker")
    return [t.name for t in threading.enumerate() if t.name.startswith(names)]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert threads_of_actors() == []


@pytest.fixture(params=PAIRS)
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    async with serving(FakeDevice(3), request.param) as host:
        yield host


async def test_the_actor_says_what_its_card_is(host: Host) -> None:
    assert await host.ask(Describe()) == CardInfo(
        protocol_version=PROTOCOL_VERSION,
        semantics_version=1,
        serial=3,
        name="fake3",
        isa="none",
        ddr_bytes=1 << 20,
        max_programs=4,
    )


async def test_every_request_has_its_reply(host: Host) -> None:
    assert await host.ask(AllocBuffers((100,))) == BuffersAllocated((1,))
    assert await host.ask(write(1, 10, b"abc")) == Ok()
    reply = await host.ask(ReadBuffer(1, 9, 5))
    assert isinstance(reply, BufferData) and bytes(reply.buffers[0]) == b"\0abc\0"
    assert await host.ask(LoadProgram(buffers=(b"12345",))) == ProgramLoaded(5)
    assert await host.ask(UnloadProgram(5)) == Ok()
    assert await host.ask(Abort(9)) == Ok()
    counters = await host.ask(ReadCounters())
    assert isinstance(counters, Counters)
    assert (counters.commands, counters.steps, counters.ddr_used_bytes) == (1, 2, 100)
    assert (counters.link_tx_bytes, counters.link_rx_bytes) == ((7, 8), (9, 10))
    assert await host.ask(FreeBuffer(1)) == Ok()
    assert "abort 9" in host.device.calls
    assert await host.ask(AllocBuffers((3, 5))) == BuffersAllocated((2, 3))
    writes = ((3, 2, 2), (2, 0, 1))
    assert await host.ask(WriteBuffers(writes, buffers=(b"xy", b"z"))) == Ok()
    assert {handle: bytes(data) for handle, data in host.device.buffers.items()} == {
        2: b"z\0\0",
        3: b"\0\0xy\0",
    }


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (FreeBuffer(99), "CardCommandError"),
        (ReadBuffer(99, 0, 1), "CardCommandError"),
        (AllocBuffers((1 << 30,)), "CardMemoryError"),
        (AllocBuffers((1, 1 << 30, 1)), "CardMemoryError"),
        (write(99, 0, b"x"), "CardCommandError"),
        (write(99, 0, bytes(LARGE_WRITE_BYTES)), "CardCommandError"),
        (RunStep(666, buffers=(b"",)), "CardCommandError"),
        (Ok(), "LocalProtocolError"),
        (StepDone(1, 2), "LocalProtocolError"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Message) else v,
)
async def test_errors_are_replies_and_the_actor_goes_on(
    host: Host, request_: Message, error: str
) -> None:
    reply = await host.ask(request_)
    assert isinstance(reply, Failed)
    assert (reply.error, reply.card) == (error, 3)
    assert isinstance(await host.ask(Describe()), CardInfo)


@pytest.mark.parametrize("fails_at", [0, 1, 63])
async def test_of_several_buffers_all_are_allocated_or_none(host: Host, fails_at: int) -> None:
    assert await host.alloc(100) == 1
    sizes = [10] * 64
    sizes[fails_at] = 1 << 30
    reply = await host.ask(AllocBuffers(tuple(sizes)))
    assert isinstance(reply, Failed) and reply.error == "CardMemoryError"
    assert list(host.device.buffers) == [1]
    assert host.device.calls.count("free") == fails_at
    # The same without the large one is allocated, in order.
    sizes[fails_at] = 20
    reply = await host.ask(AllocBuffers(tuple(sizes)))
    assert isinstance(reply, BuffersAllocated)
    assert [len(host.device.buffers[handle]) for handle in reply.handles] == sizes
    assert len(set(reply.handles) | {1}) == 65
    assert await host.ask(AllocBuffers(())) == BuffersAllocated(())


async def test_a_soft_card_keeps_no_memory_of_buffers_that_did_not_all_fit() -> None:
    with SoftRig([SoftCardSpec(ddr_bytes=1 << 20)]) as rig:
        card = rig.cards[0]
        async with serving(card) as host:
            for sizes in ((1 << 19, 64, 1 << 19), (64, 0), (1 << 20, 1)):
                reply = await host.ask(AllocBuffers(sizes))
                assert isinstance(reply, Failed)
                assert card.counters().ddr_used_bytes == 0
            reply = await host.ask(AllocBuffers((1 << 19, 64, (1 << 19) - 64)))
            assert isinstance(reply, BuffersAllocated)
            assert card.counters().ddr_used_bytes == 1 << 20


@pytest.mark.parametrize("wrapped", [bytes, bytearray, memoryview, "u16"])
async def test_pieces_are_written_in_order_from_any_buffer(host: Host, wrapped: object) -> None:
    await host.ask(AllocBuffers((8, 8)))
    pieces = (b"abcdefgh", b"ijkl", b"", b"mn", b"op")

    def wrap(piece: bytes) -> Any:
        return memoryview(piece).cast("H") if wrapped == "u16" else wrapped(piece)  # type: ignore[operator]

    # The last piece lies over the first: what comes later stays.
    writes = ((1, 0, 8), (2, 4, 4), (2, 0, 0), (2, 0, 2), (1, 6, 2))
    buffers = tuple(wrap(piece) for piece in pieces)
    assert await host.ask(WriteBuffers(writes, buffers=buffers)) == Ok()
    assert bytes(host.device.buffers[1]) == b"abcdefop"
    assert bytes(host.device.buffers[2]) == b"mn\0\0ijkl"


@pytest.mark.parametrize(
    ("writes", "sizes", "words"),
    [
        (((1, 0, 4),), (3,), "write 0: expected a buffer of 4 bytes, got 3"),
        (((1, 0, 4),), (5,), "write 0: expected a buffer of 4 bytes, got 5"),
        (((1, 0, 4),), (0,), "write 0: expected a buffer of 4 bytes, got 0"),
        (((1, 0, 4), (1, 4, 4)), (4, 5), "write 1: expected a buffer of 4 bytes, got 5"),
        (((1, 0, 4), (1, 4, 4)), (8,), "a raw buffer for each of 2 writes, got 1"),
        ((), (0,), "a raw buffer for each of 0 writes, got 1"),
        (((1, 0, 2),), (), "a raw buffer for each of 1 writes, got 0"),
        (((1, 0, (1 << 64) - 1),), (4,), "a buffer of 18,446,744,073,709,551,615 bytes, got 4"),
    ],
)
async def test_writes_unlike_their_buffers_are_refused_unwritten(
    host: Host, writes: tuple[tuple[int, int, int], ...], sizes: tuple[int, ...], words: str
) -> None:
    await host.alloc(16)
    for kind in (bytes, lambda nbytes: Deferred(nbytes, ones)):
        reply = await host.ask(WriteBuffers(writes, buffers=tuple(map(kind, sizes))))
        assert isinstance(reply, Failed) and reply.error == "CardCommandError"
        assert words in reply.message
    assert "write" not in host.device.calls
    assert await host.ask(WriteBuffers(())) == Ok()


async def test_a_soft_card_refuses_pieces_that_are_out_of_bounds() -> None:
    with SoftRig([SoftCardSpec(ddr_bytes=1 << 20)]) as rig:
        async with serving(rig.cards[0]) as host:
            reply = await host.ask(AllocBuffers((10, 20)))
            assert isinstance(reply, BuffersAllocated)
            a, b = reply.handles
            for bad in (
                (a, 8, 3),
                (a, 11, 0),
                (b, 1 << 63, 1),
                (a ^ b ^ 77, 0, 1),
                (1 << 40, 0, 1),
            ):
                writes = ((b, 0, 4), bad)
                for second in (b"w" * bad[2], Deferred(bad[2], never)):
                    request = WriteBuffers(writes, buffers=(b"good", second))
                    failed = await host.ask(request)
                    assert isinstance(failed, Failed) and failed.error == "CardCommandError", bad
            assert await host.read(a, 0, 10) == bytes(10)
            assert await host.read(b, 0, 5) == b"good\0"


async def test_a_reply_that_no_channel_carries_is_refused_before_it_is_read(host: Host) -> None:
    most = DEFAULT_LIMITS.raw_bytes_max
    for request in (
        ReadBuffer(1, 0, most + 1),
        RunStep(1, ((1, 0, most), (1, 0, 1)), buffers=(b"",)),
    ):
        reply = await host.ask(request)
        assert isinstance(reply, Failed) and reply.error == "CardCommandError"
        assert f"asks for {most + 1:,} bytes at once" in reply.message
    assert not {"read", "submit"} & set(host.device.calls)


@pytest.mark.parametrize("kind", PAIRS)
async def test_a_reply_beyond_the_channels_limit_is_an_error_of_that_request(kind: str) -> None:
    limits = FrameLimits(raw_bytes_max=1000)
    async with serving(FakeDevice(automatic=True), kind, limits) as host:
        await host.alloc(4000)
        for request in (ReadBuffer(1, 0, 1001), RunStep(1, ((1, 0, 1001),), buffers=(b"",))):
            reply = await host.ask(request)
            assert isinstance(reply, Failed) and reply.error == "LocalProtocolError"
        assert isinstance(await host.ask(ReadBuffer(1, 0, 1000)), BufferData)


async def test_a_trace_is_started_read_in_pieces_and_stopped(host: Host) -> None:
    device = host.device
    events = [TraceEvent(n, n + 1, 1, n, 9, 0) for n in range(5)]
    assert await host.ask(StartTrace(1000)) == Ok()
    assert device.tracing == 1000
    device.traced.extend(events)
    device.lost = 7
    for count, expected in ((2, events[:2]), (0, []), (100, events[2:]), (100, [])):
        reply = await host.ask(ReadTrace(count))
        assert isinstance(reply, TraceData) and reply.lost == 7
        assert list(unpack_events(reply.buffers[0])) == expected
    # While a step is queued it can be read, not started or stopped.
    await host.post(RunStep(1, buffers=(b"p",)))
    assert isinstance(await host.ask(ReadTrace(1)), TraceData)
    for number in (0, 10):
        reply = await host.ask(StartTrace(number))
        assert isinstance(reply, Failed) and reply.error == "CardCommandError"
    device.finish()
    assert isinstance((await host.channel.receive())[1], StepDone)
    assert await host.ask(StartTrace(0)) == Ok()
    assert device.tracing == 0


async def test_more_of_a_trace_than_a_channel_carries_is_refused_before_it_is_taken(
    host: Host,
) -> None:
    most = DEFAULT_LIMITS.raw_bytes_max // TRACE_EVENT.size
    reply = await host.ask(ReadTrace(most + 1))
    assert isinstance(reply, Failed) and "read them in pieces" in reply.message
    assert "trace_events" not in host.device.calls
    assert isinstance(await host.ask(ReadTrace(most)), TraceData)


class Untraceable(FakeDevice):
    """A body that leaves the contract's own answer."""

    trace = CardDevice.trace
    trace_events = CardDevice.trace_events


async def test_a_card_that_cannot_trace_says_so() -> None:
    async with serving(Untraceable(3)) as host:
        for request in (StartTrace(1), StartTrace(0), ReadTrace(1)):
            reply = await host.ask(request)
            assert reply == Failed("CardCommandError", "card 3 cannot trace its commands", 3)


# --- large writes --------------------------------------------------------------------------


class Gate:
    """Bytes whose making waits for `go_on`."""

    def __init__(self, data: bytes = b"made") -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.data = data
        self.ended = False

    def write(self, handle: int, offset: int = 0) -> WriteBuffers:
        return write(handle, offset, Deferred(len(self.data), self._fill))

    def _fill(self, out: npt.NDArray[np.uint8]) -> None:
        self.started.set()
        assert self.go_on.wait(5)
        out[:] = np.frombuffer(self.data, np.uint8)
        self.ended = True


@asynccontextmanager
async def soft_card(kind: str = "memory") -> AsyncIterator[Host]:
    with SoftRig([SoftCardSpec(ddr_bytes=32 << 20)]) as rig:
        async with serving(rig.cards[0], kind) as host:
            yield host


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("nbytes", [LARGE_WRITE_BYTES - 1, LARGE_WRITE_BYTES, 5_000_001])
async def test_writes_of_any_size_arrive(kind: str, nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)

    def fill(out: npt.NDArray[np.uint8]) -> None:
        out[:] = np.frombuffer(data, np.uint8)[: out.size]

    async with soft_card(kind) as host:
        a, b = await host.alloc(nbytes + 1), await host.alloc(nbytes)
        writes = ((a, 1, nbytes), (b, 0, nbytes), (b, 10, 100))
        buffers = (data, Deferred(nbytes, fill), Deferred(100, fill))
        assert await host.ask(WriteBuffers(writes, buffers=buffers)) == Ok()
        assert await host.read(a, 0, nbytes + 1) == b"\0" + data
        assert await host.read(b, 0, nbytes) == data[:10] + data[:100] + data[110:]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("first", ["read", "free"])
async def test_what_comes_behind_large_writes_finds_them_done(kind: str, first: str) -> None:
    """A read gets what they wrote, and memory that is freed belongs to no write any more."""
    nbytes, rng = 1 << 20, random.Random(3)
    async with soft_card(kind) as host:
        handles = [await host.alloc(nbytes) for _ in range(6)]
        for _ in range(10):
            data = [rng.randbytes(nbytes) for _ in handles]
            asked: list[tuple[Message, Message]] = []
            asked += [(write(h, 0, d), Ok()) for h, d in zip(handles, data, strict=True)]
            if first == "read":
                asked.append((ReadBuffer(handles[-1], 0, nbytes), BufferData(buffers=(data[-1],))))
            asked += [(FreeBuffer(h), Ok()) for h in handles]
            asked.append((AllocBuffers((nbytes,) * 6), BuffersAllocated(tuple(handles))))
            zeros = BufferData(buffers=(bytes(nbytes),))
            asked += [(ReadBuffer(h, 0, nbytes), zeros) for h in handles]
            got: dict[int, Message] = {}
            async with trio.open_nursery() as nursery:
                begin = host.next_id + 1
                nursery.start_soon(host.post_all, [request for request, _ in asked])
                while len(got) < len(asked):
                    request_id, reply = await host.channel.receive()
                    got[request_id - begin] = reply
            for number, (request, reply) in enumerate(asked):
                assert got[number] == reply, type(request)


async def test_a_step_behind_a_write_waits_for_it() -> None:
    gate = Gate()
    async with serving(FakeDevice(automatic=True)) as host:
        handle = await host.alloc(4)
        written = await host.post(gate.write(handle))
        step = await host.post(RunStep(1, ((handle, 0, 4),), buffers=(b"p",)))
        await until(gate.started.is_set)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert "submit" not in host.device.calls
        gate.go_on.set()
        assert await host.channel.receive() == (written, Ok())
        answered, reply = await host.channel.receive()
        assert answered == step and isinstance(reply, StepDone)
        assert bytes(reply.buffers[0]) == b"made"


async def test_writes_run_side_by_side_and_no_more_than_so_many() -> None:
    async with soft_card() as host:
        handle = await host.alloc(4 * (WRITES_MAX + 2))
        gates = [Gate(bytes([i] * 4)) for i in range(WRITES_MAX + 2)]
        ids = [await host.post(gate.write(handle, 4 * i)) for i, gate in enumerate(gates)]
        await until(lambda: sum(gate.started.is_set() for gate in gates) == WRITES_MAX)
        await trio.sleep(0.01)
        assert [gate.started.is_set() for gate in gates] == [True] * WRITES_MAX + [False] * 2
        assert len(threads_of_actors()) == WRITES_MAX
        # Each is answered when it is done, whatever the others do.
        for number in (2, 0, *range(4, WRITES_MAX + 2), 1, 3):
            await until(gates[number].started.is_set)
            gates[number].go_on.set()
            assert await host.channel.receive() == (ids[number], Ok())
        data = b"".join(gate.data for gate in gates)
        assert await host.read(handle, 0, len(data)) == data


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("error", [OSError(5, "disk"), ModelError("bad"), MemoryError()], ids=repr)
async def test_a_buffer_that_cannot_be_made_fails_its_write_alone(
    kind: str, error: Exception
) -> None:
    def fail(out: npt.NDArray[np.uint8]) -> None:
        raise error

    async with soft_card(kind) as host:
        handle = await host.alloc(100)
        request = WriteBuffers(
            ((handle, 0, 10), (handle, 10, 10), (handle, 20, 10)),
            buffers=(Deferred(10, ones), Deferred(10, fail), Deferred(10, never)),
        )
        try:
            reply = await host.ask(request)
        except SpankerError as raised:
            # In front of a stream, where nothing has been sent.
            reply = failed(raised, 0)
        assert isinstance(reply, Failed) and reply.error == "LocalProtocolError"
        assert f"of 10 bytes could not be made: {type(error).__name__}: " in reply.message
        assert await host.ask(write(handle, 0, Deferred(100, ones))) == Ok()
        assert await host.read(handle, 0, 100) == b"\1" * 100


async def test_a_write_that_fails_in_its_thread_lets_the_next_ones_through() -> None:
    async with soft_card() as host:
        handle = await host.alloc(1)
        for _ in range(3 * WRITES_MAX):
            reply = await host.ask(write(handle, 0, bytes(LARGE_WRITE_BYTES)))
            assert isinstance(reply, Failed) and reply.error == "CardCommandError"
        assert await host.read(handle, 0, 1) == b"\0"


async def test_a_write_to_a_dead_card_is_an_error_reply() -> None:
    async with soft_card() as host:
        handle = await host.alloc(LARGE_WRITE_BYTES)
        host.device.kill()
        for data in (bytes(1), bytes(LARGE_WRITE_BYTES), Deferred(1, never)):
            reply = await host.ask(write(handle, 0, data))
            assert isinstance(reply, Failed) and reply.error == "CardLostError"


# --- steps ---------------------------------------------------------------------------------


async def test_a_step_comes_back_with_what_was_to_be_read(host: Host) -> None:
    await host.alloc(16)
    await host.ask(write(1, 0, bytes(range(16))))
    request_id = await host.post(RunStep(1, ((1, 2, 3), (1, 15, 1)), buffers=(b"p",)))
    # Other requests are answered while it runs.
    assert isinstance(await host.ask(Describe()), CardInfo)
    host.device.finish()
    answered, reply = await host.channel.receive()
    assert answered == request_id and isinstance(reply, StepDone)
    assert (reply.fence, reply.busy_ns) == (1, 1000)
    assert [bytes(b) for b in reply.buffers] == [b"\x02\x03\x04", b"\x0f"]


async def test_steps_are_answered_in_order(host: Host) -> None:
    ids = [await host.post(RunStep(1, buffers=(b"p",))) for _ in range(3)]
    assert isinstance(await host.ask(Describe()), CardInfo)
    host.device.finish()
    host.device.finish(CardFaultError("a NaN", card=3))
    host.device.finish()
    replies = [await host.channel.receive() for _ in range(3)]
    assert [request_id for request_id, _ in replies] == ids
    assert [type(reply) for _, reply in replies] == [StepDone, Failed, StepDone]
    assert replies[1][1] == Failed("CardFaultError", "a NaN", 3)


async def test_a_read_that_fails_fails_its_step_alone(host: Host) -> None:
    host.device.automatic = True
    reply = await host.ask(RunStep(1, ((77, 0, 1),), buffers=(b"p",)))
    assert isinstance(reply, Failed) and "no buffer 77" in reply.message
    assert isinstance(await host.ask(RunStep(1, buffers=(b"p",))), StepDone)


async def test_the_queue_is_bounded_and_later_steps_wait_their_turn(host: Host) -> None:
    ids = [await host.post(RunStep(1, buffers=(b"p",))) for _ in range(QUEUE_MAX + 2)]
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert host.device.calls.count("submit") == QUEUE_MAX
    for expected in ids:
        host.device.finish()
        request_id, reply = await host.channel.receive()
        assert request_id == expected and isinstance(reply, StepDone)
    assert host.device.calls.count("submit") == QUEUE_MAX + 2


async def test_an_abort_brings_back_what_is_queued(host: Host) -> None:
    ids = [await host.post(RunStep(1, buffers=(b"p",))) for _ in range(2)]
    abort = await host.post(Abort(7))
    replies = dict([await host.channel.receive() for _ in range(3)])
    assert replies[abort] == Ok()
    for request_id in ids:
        reply = replies[request_id]
        assert isinstance(reply, Failed) and reply.error == "CardAbortedError"


async def test_a_card_without_a_descriptor_works_too() -> None:
    async with serving(FakeDevice(with_fd=False, automatic=True)) as host:
        for fence in range(1, 6):
            reply = await host.ask(RunStep(1, buffers=(b"p",)))
            assert isinstance(reply, StepDone) and reply.fence == fence


# --- the end ---------------------------------------------------------------------------------


async def test_stop_is_answered_and_then_the_actor_ends(host: Host) -> None:
    assert await host.ask(Stop()) == Ok()
    with pytest.raises(ChannelClosedError):
        await host.channel.receive()
    assert host.device.closed == 1


async def test_stop_does_not_wait_for_a_step_in_flight(host: Host) -> None:
    await host.post(RunStep(1, buffers=(b"p",)))
    assert await host.ask(Stop()) == Ok()
    with pytest.raises(ChannelClosedError):
        await host.channel.receive()
    assert host.device.closed == 1


@pytest.mark.parametrize("kind", PAIRS)
async def test_the_end_of_the_channel_ends_the_actor(kind: str) -> None:
    device = FakeDevice()
    async with serving(device, kind) as host:
        await host.post(RunStep(1, buffers=(b"p",)))
        await host.channel.aclose()
        await until(lambda: device.closed)


@pytest.mark.parametrize("end", ["stop", "channel", "cancelled"])
async def test_the_end_waits_for_a_write(end: str) -> None:
    """Its thread writes into the device's memory."""
    gates = [Gate(), Gate()]
    device = FakeDevice()
    async with trio.open_nursery() as nursery:
        async with serving(device) as host:
            handle = await host.alloc(8)
            for number, gate in enumerate(gates):
                await host.post(gate.write(handle, 4 * number))
            await until(lambda: all(gate.started.is_set() for gate in gates))

            async def open_gates() -> None:
                await trio.sleep(0.03)
                assert not device.closed
                for gate in gates:
                    gate.go_on.set()

            nursery.start_soon(open_gates)
            if end == "stop":
                await host.post(Stop())
            elif end == "channel":
                await host.channel.aclose()
        assert all(gate.ended for gate in gates)
        assert device.closed == 1 and bytes(device.buffers[handle]) == b"mademade"


async def test_close_waits_for_a_write_that_somebody_else_waits_for_too() -> None:
    gate = Gate()
    device = FakeDevice()
    with trio.fail_after(10):
        host_end, card = memory_channel_pair()
        actor = CardActor(card, device)
        async with host_end, trio.open_nursery() as nursery:
            nursery.start_soon(actor.serve)
            host = Host(host_end, device)
            handle = await host.alloc(4)
            await host.post(gate.write(handle))
            await host.post(ReadBuffer(handle, 0, 4))
            await until(gate.started.is_set)
            nursery.start_soon(actor.aclose)
            await trio.sleep(0.02)
            assert not device.closed
            gate.go_on.set()
            await until(lambda: device.closed)


async def test_a_crash_closes_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    def boom(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(device, "alloc", boom)
    async with serving(device) as host:
        with pytest.raises(ChannelClosedError):
            await host.ask(AllocBuffers((1,)))
    assert "ZeroDivisionError('a bug')" in repr(host.crash)


async def test_fences_out_of_order_are_a_crash_that_says_so() -> None:
    device = FakeDevice(4)
    async with serving(device) as host:
        for _ in range(2):
            await host.post(RunStep(1, buffers=(b"p",)))
        await until(lambda: len(device.queued) == 2)
        device.queued.popleft()
        device.finish()
        with pytest.raises(ChannelClosedError):
            await host.channel.receive()
    assert "card 4: fence 2 completed, 1 was next" in repr(host.crash)


# --- bodies that wait for another process ---------------------------------------------------------


class Waiting(FakeDevice):
    """`threads` are those that it was called in; a submission returns when `go_on` is set, after
    its completion has come."""

    waits = True

    def __init__(self) -> None:
        super().__init__(automatic=True)
        self.threads: set[threading.Thread] = set()
        self.submitting, self.go_on = threading.Event(), threading.Event()
        self.cut = False

    def alloc(self, nbytes: int) -> int:
        self.threads.add(threading.current_thread())
        return super().alloc(nbytes)

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        self.threads.add(threading.current_thread())
        return super().read(handle, offset, nbytes)

    def submit(self, program: int, parameters: Any, reads: Any = (), lent: Any = ()) -> int:
        fence = super().submit(program, parameters, reads)
        self.threads.add(threading.current_thread())
        self.submitting.set()
        self.go_on.wait(20)
        if self.cut:
            raise CardLostError("card 0 was cut short", card=0)
        return fence

    def completions(self) -> Any:
        assert not self.submitting.is_set() or self.go_on.is_set(), "while a call is under way"
        return super().completions()

    def cut_short(self) -> None:
        self.cut = True
        self.go_on.set()

    def close(self) -> None:
        self.threads.add(threading.current_thread())
        super().close()


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("kind", PAIRS)
async def test_a_body_that_waits_is_called_in_one_thread_and_in_order(kind: str) -> None:
    device = Waiting()
    async with serving(device, kind) as host:
        handle = await host.alloc(4)
        for request in (RunStep(1, buffers=(b"p",)), write(handle, 0, b"abcd")):
            await host.post(request)
        await until(device.submitting.is_set)
        await host.post(ReadBuffer(handle, 0, 4))
        # Its completion is there, and nobody asks for it.
        await trio.sleep(0.01)
        assert device.calls == ["alloc", "submit"]
        device.go_on.set()
        replies = dict([await host.channel.receive() for _ in range(3)])
        assert isinstance(replies[2], StepDone) and replies[3] == Ok()
        assert isinstance(replies[4], BufferData) and bytes(replies[4].buffers[0]) == b"abcd"
        assert isinstance(await host.ask(RunStep(666, buffers=(b"p",))), Failed)
    assert len(device.threads) == 1 and threading.current_thread() not in device.threads


@pytest.mark.usefixtures("nothing_left_behind")
async def test_a_body_that_waits_is_cut_short_where_its_actor_is_cancelled() -> None:
    device = Waiting()
    async with serving(device) as host:
        await host.post(RunStep(1, buffers=(b"p",)))
        await until(device.submitting.is_set)
        assert not device.cut
    assert device.cut and device.closed == 1


async def test_a_body_that_waits_is_not_called_without_messages() -> None:
    async with serving(Waiting()) as host:
        await host.alloc(4)
        assert host.channel.reach() is None


# --- requests that come twice or late ------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("first", "second"), [(5, 5), (5, 4), (0, 0), (0, 0xFFFF_FFFF), (7, 7 + (1 << 31))]
)
async def test_a_request_that_is_not_newer_ends_the_channel_unheeded(
    kind: str, first: int, second: int
) -> None:
    device = FakeDevice(4)
    async with serving(device, kind) as host:
        await host.channel.send(AllocBuffers((64,)), first)
        assert (await host.channel.receive())[0] == first
        await host.channel.send(AllocBuffers((64,)), second)
        with pytest.raises(ChannelClosedError):
            await host.channel.receive()
    assert device.calls.count("alloc") == 1 and device.closed == 1
    crash: BaseException | None = host.crash
    while isinstance(crash, ExceptionGroup):
        crash = crash.exceptions[0]
    assert isinstance(crash, RemoteProtocolError)
    assert f"card 4: expected a request newer than {first}, got {second}" in str(crash)


async def test_ids_have_gaps_and_wrap(host: Host) -> None:
    for request_id in (3, 4, 1000, 0x7FFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF, 0, 2, 1 << 31):
        await host.channel.send(Describe(), request_id)
        answered, reply = await host.channel.receive()
        assert answered == request_id and isinstance(reply, CardInfo)


async def test_the_id_of_a_run_without_a_message_counts() -> None:
    async with direct_host() as direct:
        direct.device.hang()
        direct.enter(77)
        await direct.host.channel.send(Describe(), 77)
        with pytest.raises(ChannelClosedError):
            await direct.host.channel.receive()
    assert "newer than 77, got 77" in repr(direct.host.crash)


# --- runs without messages ----------------------------------------------------------------------


class DirectHost:
    """Calls the actor of a soft card that copies one window to another."""

    def __init__(self, host: Host) -> None:
        self.host, self.device = host, host.device
        self.windows = [self.device.window(16) for _ in range(2)]
        self.program = self.load()
        self.source, self.target = bytearray(b"0123456789abcdef"), bytearray(16)
        self.together: Together | None = None

    def load(self) -> int:
        handles = dict(zip(("from", "into"), self.windows, strict=True))
        command = op.copy(Element.F32, op.Ref("into"), op.Ref("from"), count=4)
        return self.device.load_program(op.Program((command,), 1, 1, 1).encode(handles))

    def runs(self) -> DirectRuns:
        runs = self.host.channel.reach()
        assert runs is not None
        return runs

    def begin(self, target: Any = None) -> Completion | int | None:
        """What has come of it, or its fence; None where nothing was submitted."""
        runs = self.runs()
        if not runs.is_free:
            return None
        if self.together is None:
            windows = tuple((window, 16) for window in self.windows)
            parts = [Part(runs.device, self.program, windows)]
            self.together = runs.device.together(parts, STEP)
            assert self.together is not None
        done = self.together.run((self.source, self.target if target is None else target))
        outcomes = self.together.outcomes()
        assert len(outcomes) <= 1
        assert done == any(isinstance(o, Completion) and o.error is None for o in outcomes)
        return outcomes[0] if outcomes else None

    def enter(self, request_id: int) -> None:
        """One that the card, which hangs, does not end."""
        fence = self.begin()
        assert isinstance(fence, int)
        self.runs().enter(request_id, fence)


@asynccontextmanager
async def direct_host() -> AsyncIterator[DirectHost]:
    async with soft_card() as host:
        await trio.testing.wait_all_tasks_blocked()
        yield DirectHost(host)


async def test_a_free_actor_is_called_and_no_message_tells_of_it() -> None:
    async with direct_host() as direct:
        for turn in range(3 * QUEUE_MAX):
            direct.source[0], direct.target[0] = turn, 255
            with trio.testing.assert_no_checkpoints():
                done = direct.begin()
            assert isinstance(done, Completion) and done.error is None
            assert direct.target == direct.source
        # It holds no memory any more, and serves as ever.
        direct.source.clear()
        direct.target.clear()
        assert isinstance(await direct.host.ask(ReadCounters()), Counters)


async def test_a_run_that_is_not_done_at_once_is_answered_by_a_message() -> None:
    async with direct_host() as direct:
        direct.device.hang()
        direct.enter(77)
        # Answers come in order, so nobody goes before it.
        assert direct.begin() is None
        with pytest.raises(BufferError):
            direct.target.clear()
        lib.spk_card_plant(direct.device.handle, lib.SPK_PLANT_NONE)
        answered, reply = await direct.host.channel.receive()
        assert answered == 77 and isinstance(reply, StepDone)
        await trio.testing.wait_all_tasks_blocked()
        direct.target.clear()


async def test_runs_that_are_answered_by_messages_take_and_give_back_slots() -> None:
    async with direct_host() as direct:
        for turn in range(3 * QUEUE_MAX):
            direct.device.hang()
            direct.enter(77 + turn)
            lib.spk_card_plant(direct.device.handle, lib.SPK_PLANT_NONE)
            assert (await direct.host.channel.receive())[0] == 77 + turn
            await trio.testing.wait_all_tasks_blocked()
        assert isinstance(direct.begin(), Completion)


async def test_an_abort_brings_back_a_run_that_no_message_asked_for() -> None:
    async with direct_host() as direct:
        direct.device.hang()
        direct.enter(77)
        direct.host.next_id = 77
        aborted = await direct.host.post(Abort(2))
        got = dict([await direct.host.channel.receive() for _ in range(2)])
        assert got[aborted] == Ok()
        failure = got[77]
        assert isinstance(failure, Failed) and failure.error == "CardAbortedError"


async def test_what_cannot_be_begun_at_once_is_left_alone() -> None:
    async with direct_host() as direct:
        assert isinstance(direct.begin(), Completion)
        # It would be refused: whoever sends it as a message gets told.
        for target in (bytes(16), bytearray(15), 16):
            assert direct.begin(target) is None
        direct.device.unload_program(direct.program)
        assert direct.begin() is None
        assert direct.device.counters().queued == 0
        assert direct.load() == direct.program
        # It would have to wait for a write.
        gate = Gate()
        handle = await direct.host.alloc(4)
        await direct.host.post(gate.write(handle))
        await until(gate.started.is_set)
        assert direct.begin() is None
        gate.go_on.set()
        assert (await direct.host.channel.receive())[1] == Ok()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(direct.begin(), Completion) and direct.target == direct.source


async def test_a_card_that_dies_fails_its_run_and_takes_no_other() -> None:
    async with direct_host() as direct:
        direct.device.hang()
        direct.enter(77)
        direct.device.kill()
        answered, failure = await direct.host.channel.receive()
        assert answered == 77 and isinstance(failure, Failed)
        assert failure.error == "CardLostError"
        await trio.testing.wait_all_tasks_blocked()
        assert direct.begin() is None
        direct.device.close()
        assert direct.begin() is None


# --- the queue alone -----------------------------------------------------------------------------


async def test_a_refused_submission_gives_its_slot_back() -> None:
    device = FakeDevice()
    queue = KernelQueue(device, 1)
    for _ in range(3):
        with pytest.raises(CardError):
            await queue.submit(666, b"")
    assert await queue.submit(1, b"") == 1
    with trio.move_on_after(0.01) as scope:
        await queue.submit(1, b"")
    assert scope.cancelled_caught and device.calls.count("submit") == 4
    device.finish()
    assert [c.fence for c in await queue.completed()] == [1]
    assert await queue.submit(1, b"") == 2
    device.close()
