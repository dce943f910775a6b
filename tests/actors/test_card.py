# SPDX-License-Identifier: Apache-2.0
"""The card actor: every request answered once, errors as replies, steps in order, an end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
import trio.testing
from fake_device import FakeDevice
from waiting import until

from spanker.actors.card import QUEUE_MAX, CardActor, KernelQueue
from spanker.actors.channel import Channel, memory_channel_pair, unix_channel_pair
from spanker.actors.frame import DEFAULT_LIMITS, FrameLimits
from spanker.actors.message import (
    PROTOCOL_VERSION,
    Abort,
    AllocBuffer,
    AllocBuffers,
    BufferAllocated,
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
    WriteBuffer,
    WriteBuffers,
)
from spanker.device.base import TRACE_EVENT, CardDevice, TraceEvent, unpack_events
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import CardError, CardFaultError, ChannelClosedError

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

    async def ask(self, request: Message) -> Message:
        request_id = await self.post(request)
        answered, reply = await self.channel.receive()
        assert answered == request_id
        return reply


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
    assert await host.ask(AllocBuffer(100)) == BufferAllocated(1, 100)
    assert await host.ask(WriteBuffer(1, 10, buffers=(b"abc",))) == Ok()
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
    assert await host.ask(WriteBuffers(writes, buffers=(b"xyz",))) == Ok()
    assert {handle: bytes(data) for handle, data in host.device.buffers.items()} == {
        2: b"z\0\0",
        3: b"\0\0xy\0",
    }


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (FreeBuffer(99), "CardCommandError"),
        (ReadBuffer(99, 0, 1), "CardCommandError"),
        (AllocBuffer(1 << 30), "CardMemoryError"),
        (AllocBuffers((1, 1 << 30, 1)), "CardMemoryError"),
        (WriteBuffers(((99, 0, 1),), buffers=(b"x",)), "CardCommandError"),
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
    assert await host.ask(AllocBuffer(100)) == BufferAllocated(1, 100)
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
    data = bytes(range(1, 15)) + b"\xff\xfe"
    raw = memoryview(data).cast("H") if wrapped == "u16" else wrapped(data)  # type: ignore[operator]
    # The last piece lies over the first: what comes later stays.
    writes = ((1, 0, 8), (2, 4, 4), (2, 0, 0), (2, 0, 2), (1, 6, 2))
    assert await host.ask(WriteBuffers(writes, buffers=(raw,))) == Ok()
    assert bytes(host.device.buffers[1]) == data[:6] + data[14:]
    assert bytes(host.device.buffers[2]) == data[12:14] + b"\0\0" + data[8:12]


@pytest.mark.parametrize(
    ("writes", "nbytes"),
    [
        (((1, 0, 4),), 3),
        (((1, 0, 4),), 5),
        (((1, 0, 4), (1, 4, 4)), 4),
        ((), 1),
        (((1, 0, 2),), 0),
        (((1, 0, (1 << 64) - 1), (1, 0, 5)), 4),
    ],
)
async def test_pieces_that_do_not_add_up_to_what_comes_are_refused_unwritten(
    host: Host, writes: tuple[tuple[int, int, int], ...], nbytes: int
) -> None:
    await host.ask(AllocBuffer(16))
    reply = await host.ask(WriteBuffers(writes, buffers=(b"x" * nbytes,)))
    assert isinstance(reply, Failed) and reply.error == "CardCommandError"
    need = sum(n for _, _, n in writes)
    assert f"pieces of {need:,} bytes together, but brings {nbytes}" in reply.message
    assert "write" not in host.device.calls
    assert await host.ask(WriteBuffers((), buffers=(b"",))) == Ok()


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
                raw = b"w" * (4 + bad[2])
                failed = await host.ask(WriteBuffers(writes, buffers=(raw,)))
                assert isinstance(failed, Failed) and failed.error == "CardCommandError", bad
            data = await host.ask(ReadBuffer(a, 0, 10))
            assert isinstance(data, BufferData) and bytes(data.buffers[0]) == bytes(10)


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
        await host.ask(AllocBuffer(4000))
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


# --- steps ---------------------------------------------------------------------------------


async def test_a_step_comes_back_with_what_was_to_be_read(host: Host) -> None:
    await host.ask(AllocBuffer(16))
    await host.ask(WriteBuffer(1, 0, buffers=(bytes(range(16)),)))
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


async def test_a_crash_closes_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    def boom(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(device, "alloc", boom)
    async with serving(device) as host:
        with pytest.raises(ChannelClosedError):
            await host.ask(AllocBuffer(1))
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
