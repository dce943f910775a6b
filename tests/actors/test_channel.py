# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of channels, run over every kind; then what only streams can do."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing
from waiting import until

from spanker.actors.channel import (
    Channel,
    StreamChannel,
    memory_channel_pair,
    unix_channel_pair,
)
from spanker.actors.frame import Deferred, Frame, FrameLimits, RawBuffer, encode_frame
from spanker.actors.host_link import HostLink
from spanker.actors.message import Abort, BufferData, Describe, Ok, WriteBuffers, encode
from spanker.actors.paced import PacedLink
from spanker.device.base import CardDevice
from spanker.errors import (
    ChannelClosedError,
    LocalProtocolError,
    ModelError,
    RemoteProtocolError,
)
from spanker.testing.faulty_channel import FaultyChannel

LIMITS = FrameLimits(raw_bytes_max=16 << 20)


def host_link_channel_pair(*, limits: FrameLimits) -> tuple[Channel, Channel]:
    a, b = HostLink(2e9, 100e-6).stream_pair()
    return StreamChannel(a, limits=limits), StreamChannel(b, limits=limits)


def faulty_channel_pair(*, limits: FrameLimits) -> tuple[Channel, Channel]:
    """Where nothing fails, what stands around an end changes nothing."""
    a, b = memory_channel_pair(limits=limits)
    return FaultyChannel(a, a.name, lambda before, nbytes: None), b


def faulty_unix_channel_pair(*, limits: FrameLimits) -> tuple[Channel, Channel]:
    a, b = unix_channel_pair(limits=limits)
    return FaultyChannel(a, a.name), FaultyChannel(b, b.name)


# The task that lets messages over a paced link arrive is the fixture's.
PACED = "paced"

PAIRS: dict[str, Callable[..., tuple[Channel, Channel]]] = {
    "memory": memory_channel_pair,
    "unix": unix_channel_pair,
    "host link": host_link_channel_pair,
    "faulty": faulty_channel_pair,
    "faulty unix": faulty_unix_channel_pair,
}


@pytest.fixture(params=[*PAIRS, PACED])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Channel, Channel]]:
    link = PacedLink(2e9, 100e-6)
    make = link.channel_pair if request.param == PACED else PAIRS[request.param]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        a, b = make(limits=LIMITS)
        with trio.fail_after(20):
            async with a, b:
                yield a, b
        nursery.cancel_scope.cancel()


Pair = tuple[Channel, Channel]


def write(data: RawBuffer, handle: int = 1, offset: int = 0) -> WriteBuffers:
    """A message with one raw buffer."""
    return WriteBuffers(((handle, offset, len(data)),), buffers=(data,))


def data_message(number: int, nbytes: int) -> WriteBuffers:
    """A message whose every part tells which one it is."""
    return write(number.to_bytes(2, "little") * (nbytes // 2), number, nbytes)


def check_data_message(request_id: int, message: object) -> None:
    assert isinstance(message, WriteBuffers)
    assert message == data_message(request_id, message.writes[0][1])


# --- every channel -----------------------------------------------------------------


async def test_messages_arrive_in_order_both_ways_at_once(pair: Pair) -> None:
    sizes = (0, 2, 100, 40_000, 16 << 10, (16 << 10) + 2)

    async def send(channel: Channel) -> None:
        for i in range(120):
            await channel.send(data_message(i, sizes[i % len(sizes)]), i)

    async def receive(channel: Channel) -> None:
        for i in range(120):
            request_id, message = await channel.receive()
            assert request_id == i
            check_data_message(i, message)

    async with trio.open_nursery() as nursery:
        for channel in pair:
            nursery.start_soon(send, channel)
            nursery.start_soon(receive, channel)


async def test_concurrent_senders_do_not_interleave(pair: Pair) -> None:
    a, b = pair
    sizes = (0, 200, 100_000, 300_000)

    async def send(sender: int) -> None:
        for i in range(10):
            await a.send(data_message(sender * 100 + i, sizes[(sender + i) % 4]), sender * 100 + i)

    got = []
    async with trio.open_nursery() as nursery:
        for sender in range(6):
            nursery.start_soon(send, sender)
        for _ in range(60):
            request_id, message = await b.receive()
            check_data_message(request_id, message)
            got.append(request_id)
    assert sorted(got) == [sender * 100 + i for sender in range(6) for i in range(10)]
    for sender in range(6):
        own = [request_id for request_id in got if request_id // 100 == sender]
        assert own == sorted(own)


async def test_big_buffers_arrive_whole(pair: Pair) -> None:
    a, b = pair
    big = bytes(range(256)) * (8 << 12)
    assert len(big) == 8 << 20
    view = memoryview(bytearray(big))

    async def send() -> None:
        await a.send(write(big, 2), 1)
        await a.send(write(view[1:-1], 3), 2)
        await a.send(Ok(), 3)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await b.receive() == (1, write(big, 2))
        assert await b.receive() == (2, write(big[1:-1], 3))
        assert await b.receive() == (3, Ok())


async def test_empty_buffers_arrive_as_empty_buffers(pair: Pair) -> None:
    a, b = pair
    for i in range(3):
        await a.send(BufferData(buffers=(b"",)), i)
        assert await b.receive() == (i, BufferData(buffers=(b"",)))


def counted(data: bytes) -> tuple[Deferred, list[str]]:
    """A deferred buffer of these bytes, and the threads in which they were made."""
    made: list[str] = []

    def fill(out: npt.NDArray[np.uint8]) -> None:
        made.append(threading.current_thread().name)
        out[:] = np.frombuffer(data, np.uint8)

    return Deferred(len(data), fill), made


def made(buffer: RawBuffer) -> bytes:
    """The bytes of a buffer that has arrived: on a memory channel the receiver makes them."""
    return bytes(buffer.make() if isinstance(buffer, Deferred) else buffer)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 40_000, 1 << 20])
async def test_deferred_buffers_arrive_as_their_bytes(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data = random.Random(nbytes).randbytes(nbytes)
    deferred, threads = counted(data)
    buffers = (b"before", deferred, b"", counted(data[::-1])[0])
    writes = tuple((1, 0, len(buffer)) for buffer in buffers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send, WriteBuffers(writes, buffers=buffers), 7)
        request_id, message = await b.receive()
    assert isinstance(message, WriteBuffers) and (request_id, message.writes) == (7, writes)
    assert [made(buffer) for buffer in message.buffers] == [b"before", data, b"", data[::-1]]
    assert len(threads) == 1


async def test_deferred_buffers_beyond_the_limits_are_not_made(pair: Pair) -> None:
    a, b = pair
    deferred, threads = counted(bytes((16 << 20) + 1))
    small, small_threads = counted(b"x")
    for message, words in (
        (write(deferred), "raw bytes"),
        (WriteBuffers(((1, 0, -1),), buffers=(small,)), "field writes"),
        (WriteBuffers(((1, 0, 1),) * 65, buffers=(small,) * 65), "field writes"),
    ):
        with pytest.raises(LocalProtocolError, match=words):
            await a.send(message, 1)
        with pytest.raises(LocalProtocolError, match=words):
            if not a.try_send(message, 1):
                await a.send(message, 1)
    await a.send(Ok(), 2)
    assert await b.receive() == (2, Ok())
    assert threads == small_threads == []


@pytest.mark.parametrize("error", [OSError(5, "disk"), ModelError("bad"), MemoryError()], ids=repr)
async def test_a_buffer_that_cannot_be_made_fails_its_message_alone(
    pair: Pair, error: Exception
) -> None:
    a, b = pair

    def fail(out: npt.NDArray[np.uint8]) -> None:
        raise error

    words = f"raw buffer of 100 bytes could not be made: {type(error).__name__}: "
    good, _ = counted(b"good")
    message = WriteBuffers(((1, 0, 4), (1, 4, 100)), buffers=(good, Deferred(100, fail)))
    for i in range(3):
        with pytest.raises(LocalProtocolError, match=words) as caught:
            await a.send(message, i)
            # It was handed over as it is.
            _, got = await b.receive()
            assert got is message
            made(got.buffers[0]), made(got.buffers[1])
        assert caught.value.__cause__ is error
        await a.send(Ok(), i)
        assert await b.receive() == (i, Ok())


async def test_messages_sent_before_a_close_still_arrive(pair: Pair) -> None:
    a, b = pair
    for i in range(5):
        await a.send(Abort(i), i)
    await a.aclose()
    for i in range(5):
        assert await b.receive() == (i, Abort(i))
    for _ in range(2):
        with pytest.raises(ChannelClosedError, match="by the peer"):
            await b.receive()


async def test_last_words_can_be_read_after_a_send_has_failed(pair: Pair) -> None:
    a, b = pair
    await a.send(Abort(1), 1)
    await a.aclose()
    with pytest.raises(ChannelClosedError, match="by the peer"):
        while True:
            await b.send(Describe(), 0)
    assert await b.receive() == (1, Abort(1))


async def test_close_wakes_a_receiver_on_either_end(pair: Pair) -> None:
    a, b = pair

    async def expect_closed(channel: Channel, text: str) -> None:
        with pytest.raises(ChannelClosedError, match=text):
            await channel.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed, a, "on this side")
        nursery.start_soon(expect_closed, b, "by the peer")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await a.aclose()


@pytest.mark.parametrize("closer", [0, 1])
async def test_close_wakes_a_blocked_sender_on_either_end(pair: Pair, closer: int) -> None:
    sender = pair[0]

    async def expect_closed() -> None:
        with pytest.raises(ChannelClosedError):
            while True:
                await sender.send(data_message(1, 1 << 20), 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await pair[closer].aclose()


async def test_a_closed_end_stays_closed(pair: Pair) -> None:
    a, b = pair
    await b.send(Ok(), 1)
    await a.aclose()
    await a.aclose()
    with pytest.raises(ChannelClosedError, match="on this side"):
        await a.send(Ok(), 1)
    with pytest.raises(ChannelClosedError, match="on this side"):
        await a.receive()


async def test_cancelled_receives_lose_nothing(pair: Pair) -> None:
    a, b = pair

    async def send() -> None:
        for i in range(60):
            await a.send(data_message(i, 30_000), i)
            if i % 3 == 0:
                await trio.lowlevel.checkpoint()

    got = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        rounds = 0
        while len(got) < 60:
            rounds += 1
            with trio.CancelScope() as scope:
                if rounds % 2:
                    nursery.start_soon(_cancel_after_checkpoints, scope, rounds % 7)
                request_id, message = await b.receive()
                check_data_message(request_id, message)
                got.append(request_id)
    assert got == list(range(60))


async def _cancel_after_checkpoints(scope: trio.CancelScope, count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_a_send_cancelled_before_it_writes_has_sent_nothing(pair: Pair) -> None:
    a, b = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await a.send(Abort(1), 1)
    assert scope.cancelled_caught
    await a.send(Abort(2), 2)
    assert await b.receive() == (2, Abort(2))


async def test_a_send_cancelled_while_it_waits_its_turn_has_sent_nothing(pair: Pair) -> None:
    a, b = pair
    sent = 0

    async def fill() -> None:
        nonlocal sent
        for i in range(40):
            await a.send(data_message(i, 1 << 20), i)
            sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert sent < 40
        with trio.move_on_after(0.02) as scope:
            await a.send(Abort(1), 999)
        assert scope.cancelled_caught
        for i in range(40):
            request_id, message = await b.receive()
            assert request_id == i
            check_data_message(i, message)
    await a.send(Ok(), 5)
    assert await b.receive() == (5, Ok())


async def test_a_sender_cannot_run_ahead_without_bound(pair: Pair) -> None:
    a, b = pair
    sent = 0

    async def send() -> None:
        nonlocal sent
        for i in range(60):
            await a.send(data_message(i, 1 << 20), i)
            sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sent <= 16
        for i in range(60):
            assert (await b.receive())[0] == i


async def test_a_message_beyond_the_limits_is_refused_and_harms_nothing(pair: Pair) -> None:
    a, b = pair
    too_big = memoryview(bytes((16 << 20) + 1))
    with pytest.raises(LocalProtocolError, match="raw bytes"):
        await a.send(write(too_big), 1)
    with pytest.raises(LocalProtocolError, match="field epoch"):
        await a.send(Abort(-1), 1)
    await a.send(Ok(), 2)
    assert await b.receive() == (2, Ok())


async def test_send_and_receive_are_checkpoints(pair: Pair) -> None:
    a, b = pair
    for i in range(3):
        with trio.testing.assert_checkpoints():
            await a.send(Ok(), i)
    for _ in range(3):
        with trio.testing.assert_checkpoints():
            await b.receive()
    with trio.testing.assert_checkpoints():
        await a.aclose()


async def test_try_send_sends_now_or_not_at_all(pair: Pair) -> None:
    a, b = pair
    expected: list[int] = []
    for i in range(50):
        if a.try_send(data_message(i, 100), i):
            expected.append(i)
    for i in expected:
        request_id, message = await b.receive()
        assert request_id == i
        check_data_message(i, message)
    with trio.move_on_after(0.01) as scope:
        await b.receive()
    assert scope.cancelled_caught
    await a.send(Ok(), 99)
    assert await b.receive() == (99, Ok())


async def test_a_listener_changes_nothing_but_who_takes_a_message(pair: Pair) -> None:
    """Each arrives once and in order, be the receiver idle, busy, or behind."""
    a, b = pair
    arrived: list[int] = []
    rng = random.Random(47)

    def listener(request_id: int, message: object) -> bool:
        if rng.random() < 0.3:
            return False
        arrived.append(request_id)
        return True

    async def receive() -> None:
        while True:
            request_id, _ = await b.receive()
            arrived.append(request_id)
            if rng.random() < 0.3:
                await trio.sleep(0.0001)

    b.listen(listener)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for number in range(400):
            if rng.random() < 0.5 or not a.try_send(Ok(), number):
                await a.send(Ok(), number)
            if rng.random() < 0.1:
                await trio.testing.wait_all_tasks_blocked()
        await until(lambda: len(arrived) == 400)
        nursery.cancel_scope.cancel()
    assert arrived == list(range(400))


async def test_a_memory_channel_offers_messages_to_an_idle_listener_only() -> None:
    a, b = memory_channel_pair()
    heard: list[int] = []

    def listener(request_id: int, message: object) -> bool:
        heard.append(request_id)
        return True

    b.listen(listener)
    assert a.try_send(Ok(), 1) and not heard
    assert await b.receive() == (1, Ok())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert a.try_send(Ok(), 2) and heard == [2]
        with pytest.raises(LocalProtocolError):
            a.try_send(Abort(-1), 3)
        await a.send(Ok(), 4)
    await a.aclose()
    with pytest.raises(ChannelClosedError):
        a.try_send(Ok(), 5)
    assert heard == [2]


async def test_what_one_end_exposes_is_reached_in_memory_while_it_is_idle(pair: Pair) -> None:
    a, b = pair
    runs = Runs()
    b.expose(runs)
    assert a.reach() is None and b.reach() is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert a.reach() is (runs if a.shares_memory else None)
        # Whatever was sent comes first.
        await a.send(Ok(), 1)
        if not a.try_send(Ok(), 2):
            await a.send(Ok(), 2)
        assert a.reach() is None
    assert a.reach() is None
    assert await b.receive() == (2, Ok())

    async def receive_until_the_end() -> None:
        with pytest.raises(ChannelClosedError):
            await b.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_until_the_end)
        await trio.testing.wait_all_tasks_blocked()
        assert a.reach() is (runs if a.shares_memory else None)
        await a.aclose()
        assert a.reach() is None


class Runs:
    """Never called."""

    @property
    def device(self) -> CardDevice:
        raise AssertionError

    @property
    def is_free(self) -> bool:
        raise AssertionError

    def enter(self, request_id: int, fence: int) -> None:
        raise AssertionError


async def test_try_send_does_not_overtake_who_waits_to_send(pair: Pair) -> None:
    a, b = pair
    posted: list[int] = []

    async def send(number: int) -> None:
        posted.append(number)
        await a.send(data_message(number, 1 << 20), number)

    async with trio.open_nursery() as nursery:
        # Full, with a number of senders waiting in order.
        for number in range(30):
            nursery.start_soon(send, number)
            await trio.testing.wait_all_tasks_blocked()
        assert not a.try_send(Ok(), 1000)
        got = []
        tried = 2000
        while len(got) < len(posted):
            got.append((await b.receive())[0])
            if a.try_send(Ok(), tried):
                posted.append(tried)
                tried += 1
            if tried == 2010:
                break
        while len(got) < len(posted):
            got.append((await b.receive())[0])
    # Whatever went without waiting stands behind those that had waited by then.
    assert got == posted


async def test_try_send_refuses_what_send_refuses(pair: Pair) -> None:
    a, b = pair
    await a.send(Ok(), 1)
    if not a.try_send(Ok(), 2):
        return  # this kind always leaves it to `send`
    for message, words in (
        (write(memoryview(bytes((16 << 20) + 1))), "raw bytes"),
        (Abort(-1), "field epoch"),
    ):
        with pytest.raises(LocalProtocolError, match=words):
            a.try_send(message, 3)
    assert [await b.receive() for _ in range(2)] == [(1, Ok()), (2, Ok())]


@pytest.mark.parametrize(("closer", "words"), [(0, "on this side"), (1, "by the peer")])
async def test_try_send_tells_of_a_closed_channel_as_send_does(
    pair: Pair, closer: int, words: str
) -> None:
    a = pair[0]
    await pair[closer].aclose()
    for _ in range(2):
        # False, nothing sent, or the very error: then whoever goes on to `send` gets that.
        with pytest.raises(ChannelClosedError, match=words):
            if not a.try_send(Ok(), 1):
                while True:
                    await a.send(Ok(), 1)


# --- memory ------------------------------------------------------------------------


async def test_a_memory_channel_with_room_takes_a_message_at_once() -> None:
    a, b = memory_channel_pair(2)
    async with a, b:
        assert a.try_send(Ok(), 1) and a.try_send(Ok(), 2)
        assert not a.try_send(Ok(), 3)
        assert await b.receive() == (1, Ok())
        assert a.try_send(Ok(), 4)
        assert [(await b.receive())[0] for _ in range(2)] == [2, 4]


async def test_memory_channel_hands_over_the_very_buffers() -> None:
    data = bytearray(100)
    a, b = memory_channel_pair(1)
    async with a, b:
        await a.send(write(data), 1)
        _, message = await b.receive()
        assert message.buffers[0] is data


async def test_memory_channel_holds_its_capacity_and_no_more() -> None:
    a, b = memory_channel_pair(3)
    async with a, b:
        for i in range(3):
            await a.send(Ok(), i)
        with trio.move_on_after(0.01) as scope:
            await a.send(Ok(), 3)
        assert scope.cancelled_caught
        assert [(await b.receive())[0] for _ in range(3)] == [0, 1, 2]


# --- streams -----------------------------------------------------------------------


@asynccontextmanager
async def raw_peer() -> AsyncIterator[tuple[trio.abc.Stream, StreamChannel]]:
    """A bare stream, for a peer that does as it likes, and the channel at its other end."""
    raw, stream = trio.testing.memory_stream_pair()
    channel = StreamChannel(stream, name="card 2")
    async with raw, channel:
        yield raw, channel


def wire(message: Ok | WriteBuffers, request_id: int) -> bytes:
    return b"".join(encode_frame(encode(message, request_id)))


async def test_frames_may_arrive_in_any_pieces() -> None:
    data = b"".join(wire(data_message(i, 50), i) for i in range(5))
    async with raw_peer() as (raw, channel):

        async def dribble() -> None:
            for byte in data:
                await raw.send_all(bytes([byte]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble)
            for i in range(5):
                request_id, message = await channel.receive()
                assert request_id == i
                check_data_message(i, message)


async def test_garbage_is_an_error_once_and_closes_the_channel() -> None:
    async with raw_peer() as (raw, channel):
        await raw.send_all(wire(Ok(), 1) + wire(Ok(), 2) + b"GET / HTTP/1.1\r\n" * 3)
        assert await channel.receive() == (1, Ok())
        assert await channel.receive() == (2, Ok())
        with pytest.raises(RemoteProtocolError, match="magic"):
            await channel.receive()
        with pytest.raises(ChannelClosedError):
            await channel.receive()
        with pytest.raises(ChannelClosedError, match=r"^card 2: closed on this side"):
            await channel.send(Ok(), 1)
        assert await raw.receive_some() == b""


async def test_a_well_framed_message_that_makes_no_sense_closes_the_channel() -> None:
    unknown = b"".join(encode_frame(Frame(0x7F, b"\x91\x01")))
    async with raw_peer() as (raw, channel):
        await raw.send_all(wire(Ok(), 1) + unknown)
        assert await channel.receive() == (1, Ok())
        with pytest.raises(RemoteProtocolError, match="unknown kind"):
            await channel.receive()
        assert await raw.receive_some() == b""


async def test_the_end_of_the_stream_inside_a_frame_is_a_violation() -> None:
    async with raw_peer() as (raw, channel):
        await raw.send_all(wire(data_message(1, 100), 1)[:-1])
        await raw.aclose()
        with pytest.raises(RemoteProtocolError, match="ended inside a frame"):
            await channel.receive()


@pytest.mark.parametrize("kind", ["unix", "host link"])
async def test_a_send_cancelled_half_way_closes_the_channel(kind: str) -> None:
    a, b = PAIRS[kind](limits=LIMITS)
    async with a, b:
        with trio.move_on_after(0.05) as scope:
            await a.send(data_message(1, 12 << 20), 1)
        assert scope.cancelled_caught
        with pytest.raises(ChannelClosedError, match="on this side"):
            await a.send(Ok(), 2)
        with pytest.raises(ChannelClosedError, match="on this side"):
            await a.receive()
        with pytest.raises(RemoteProtocolError, match="ended inside a frame"):
            await b.receive()


class Held:
    """A deferred buffer that is made when `go_on` is set."""

    def __init__(self, data: bytes = b"held") -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.ended = False
        self.data = data

    def message(self) -> WriteBuffers:
        return write(Deferred(len(self.data), self._fill))

    def _fill(self, out: npt.NDArray[np.uint8]) -> None:
        self.started.set()
        self.go_on.wait(5)
        out[:] = np.frombuffer(self.data, np.uint8)
        self.ended = True


def maker_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("spanker-maker")]


@pytest.mark.parametrize("kind", ["unix", "host link"])
async def test_while_a_buffer_is_made_others_use_the_channel(kind: str) -> None:
    a, b = PAIRS[kind](limits=LIMITS)
    held = Held()
    async with a, b, trio.open_nursery() as nursery:
        nursery.start_soon(a.send, held.message(), 1)
        await until(held.started.is_set)
        for i in range(5):
            await a.send(Abort(i), 10 + i)
            assert await b.receive() == (10 + i, Abort(i))
            await b.send(Ok(), 10 + i)
            assert await a.receive() == (10 + i, Ok())
        held.go_on.set()
        request_id, message = await b.receive()
        assert request_id == 1 and bytes(message.buffers[0]) == b"held"
    assert maker_threads() == []


@pytest.mark.parametrize("kind", ["unix", "host link"])
async def test_one_thread_makes_the_buffers_of_many_senders(kind: str) -> None:
    a, b = PAIRS[kind](limits=LIMITS)
    async with a, b, trio.open_nursery() as nursery:
        for i in range(20):
            data = bytes([i]) * (i * 5000)
            nursery.start_soon(a.send, write(counted(data)[0]), i)
            await trio.lowlevel.checkpoint()
        arrived = []
        for _ in range(20):
            i, message = await b.receive()
            assert bytes(message.buffers[0]) == bytes([i]) * (i * 5000)
            arrived.append(i)
        assert sorted(arrived) == list(range(20))
        assert len(maker_threads()) == 1
    assert maker_threads() == []


@pytest.mark.parametrize("kind", ["unix", "host link"])
async def test_a_send_cancelled_while_its_buffer_is_made_waits_and_has_sent_nothing(
    kind: str,
) -> None:
    a, b = PAIRS[kind](limits=LIMITS)
    held = Held()
    scope = trio.CancelScope()
    left = False

    async def send() -> None:
        nonlocal left
        with scope:
            await a.send(held.message(), 1)
        left = True

    async with a, b:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await until(held.started.is_set)
            scope.cancel()
            await trio.sleep(0.02)
            assert not left
            held.go_on.set()
        assert scope.cancelled_caught and held.ended
        await a.send(Ok(), 2)
        assert await b.receive() == (2, Ok())


@pytest.mark.parametrize("kind", ["unix", "host link"])
async def test_close_does_not_wait_for_a_buffer_that_is_made(kind: str) -> None:
    a, b = PAIRS[kind](limits=LIMITS)
    held = Held()

    async def expect_closed() -> None:
        with pytest.raises(ChannelClosedError, match="on this side"):
            await a.send(held.message(), 1)

    async with b:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed)
            await until(held.started.is_set)
            await a.aclose()
            with pytest.raises(ChannelClosedError, match="on this side"):
                await a.send(write(counted(b"x")[0]), 2)
            assert not held.ended
            held.go_on.set()
        assert held.ended and maker_threads() == []
        with pytest.raises(ChannelClosedError, match="by the peer"):
            await b.receive()


class RecordingStream(trio.abc.SendStream):
    """Keeps what one send makes of its pieces."""

    def __init__(self) -> None:
        self.writes: list[object] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(data)
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_small_messages_are_one_write_and_large_buffers_are_not_copied() -> None:
    recorder = RecordingStream()
    channel = StreamChannel(trio.StapledStream(recorder, trio.testing.MemoryReceiveStream()))
    await channel.send(write(bytes(100)), 1)
    assert recorder.writes == [wire(write(bytes(100)), 1)]
    recorder.writes.clear()
    big = bytearray(1 << 20)
    await channel.send(write(big), 1)
    assert len(recorder.writes) == 2
    assert recorder.writes[1] is big
    await channel.aclose()
