# SPDX-License-Identifier: Apache-2.0
"""A channel that loses, repeats, swaps, spoils and holds back messages, of every kind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from spanker.actors.channel import Channel, memory_channel_pair, unix_channel_pair
from spanker.actors.frame import frame_bytes
from spanker.actors.message import Describe, Message, Ok, ReadCounters, encode
from spanker.actors.paced import PacedLink
from spanker.errors import ChannelClosedError, RemoteProtocolError
from spanker.testing.fault_plan import What
from spanker.testing.faulty_channel import REORDER_S, FaultyChannel

Pair = tuple[FaultyChannel, Channel]


@pytest.fixture(params=["memory", "unix", "paced"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    link = PacedLink(2e9, 100e-6)
    make = {"memory": memory_channel_pair, "unix": unix_channel_pair, "paced": link.channel_pair}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        host, card = make[request.param]()
        with trio.fail_after(10):
            async with FaultyChannel(host, "channel of card 1") as faulty, card:
                yield faulty, card
        nursery.cancel_scope.cancel()


async def sent_down(pair: Pair, ids: range) -> list[int]:
    """Which of these requests arrive, and how often."""
    host, card = pair
    for request_id in ids:
        if not host.try_send(Describe(), request_id):
            await host.send(Describe(), request_id)
    await host.send(ReadCounters(), 99)
    got = []
    while True:
        request_id, message = await card.receive()
        if isinstance(message, ReadCounters):
            return got
        got.append(request_id)


async def sent_up(pair: Pair, ids: range) -> list[int]:
    """Which of these replies arrive, and how often."""
    host, card = pair
    for request_id in ids:
        await card.send(Ok(), request_id)
    await card.send(ReadCounters(), 99)
    got = []
    while True:
        request_id, message = await host.receive()
        if isinstance(message, ReadCounters):
            return got
        got.append(request_id)


@pytest.mark.parametrize("way", [sent_down, sent_up])
@pytest.mark.parametrize(
    ("what", "count", "arrive"),
    [
        (None, 1, [0, 1, 2, 3, 4]),
        (What.DROP, 1, [1, 2, 3, 4]),
        (What.DROP, 3, [3, 4]),
        (What.DUPLICATE, 2, [0, 0, 1, 1, 2, 3, 4]),
        (What.REORDER, 1, [1, 0, 2, 3, 4]),
    ],
)
async def test_messages_are_lost_repeated_and_swapped(
    pair: Pair, way: object, what: What | None, count: int, arrive: list[int]
) -> None:
    if what is not None:
        pair[0].arm(what, count)
    assert await way(pair, range(5)) == arrive  # type: ignore[operator]
    # And then no more.
    assert await way(pair, range(3)) == [0, 1, 2]  # type: ignore[operator]


async def test_a_spoilt_frame_ends_the_channel(pair: Pair) -> None:
    host, card = pair
    host.arm(What.CORRUPT)
    await card.send(Ok(), 1)
    with pytest.raises(RemoteProtocolError, match="channel of card 1: a frame does not match"):
        await host.receive()
    for end in (host, card):
        with pytest.raises(ChannelClosedError):
            await end.receive()
    with pytest.raises(ChannelClosedError):
        await host.send(Describe(), 2)


async def test_a_spoilt_request_ends_the_channel(pair: Pair) -> None:
    host, card = pair
    host.arm(What.CORRUPT)
    assert not host.try_send(Describe(), 1)
    with pytest.raises(RemoteProtocolError):
        await host.send(Describe(), 1)
    with pytest.raises(ChannelClosedError):
        await card.receive()


async def test_what_nothing_overtakes_comes_later(pair: Pair) -> None:
    host, card = pair
    host.arm(What.REORDER)
    await card.send(Ok(), 1)
    begin = trio.current_time()
    assert (await host.receive())[0] == 1
    assert trio.current_time() - begin >= REORDER_S * 0.9
    host.arm(What.REORDER)
    await host.send(Describe(), 2)
    assert host.reorders
    await host.release()
    assert not host.reorders
    assert (await card.receive())[0] == 2


async def test_a_stall_holds_both_ways_back(pair: Pair) -> None:
    host, card = pair
    begin = trio.current_time()
    host.stall(begin + 0.1)
    assert not host.try_send(Describe(), 1)
    await card.send(Ok(), 1)
    times = []

    async def down() -> None:
        await host.send(Describe(), 1)
        assert (await card.receive())[0] == 1
        times.append(trio.current_time() - begin)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(down)
        assert (await host.receive())[0] == 1
        times.append(trio.current_time() - begin)
    assert min(times) >= 0.09
    assert await sent_down(pair, range(3)) == [0, 1, 2]


async def test_cancelled_while_it_waits_nothing_is_lost(pair: Pair) -> None:
    host, card = pair
    await card.send(Ok(), 1)
    host.stall(trio.current_time() + 0.05)
    with trio.move_on_after(0.02) as scope:
        await host.receive()
    assert scope.cancelled_caught
    assert (await host.receive())[0] == 1


async def test_who_waits_hears_of_the_end(pair: Pair) -> None:
    host, card = pair
    host.stall(float("inf"))
    await card.send(Ok(), 1)
    async with trio.open_nursery() as nursery:
        for call in (host.receive, lambda: host.send(Describe(), 1)):

            async def wait(call: object = call) -> None:
                with pytest.raises(ChannelClosedError):
                    await call()  # type: ignore[operator]

            nursery.start_soon(wait)
        await trio.sleep(0.01)
        await host.disconnect()
    with pytest.raises(ChannelClosedError):
        await card.receive()


async def test_bytes_are_counted_both_ways_before_they_go() -> None:
    inner, card = memory_channel_pair()
    counted: list[tuple[int, int]] = []
    host = FaultyChannel(inner, "channel", lambda before, nbytes: counted.append((before, nbytes)))
    size = frame_bytes(encode(Describe(), 1))
    async with host, card:
        assert host.try_send(Describe(), 1)
        await host.send(Describe(), 2)
        await card.send(Ok(), 1)
        await host.receive()
        assert counted[:2] == [(0, size), (size, size)]
        assert counted[2][0] == 2 * size


async def test_nothing_is_taken_at_once_while_something_is_to_go_wrong() -> None:
    inner, card = memory_channel_pair()
    host = FaultyChannel(inner, "channel")
    taken: list[int] = []

    def listener(request_id: int, message: Message) -> bool:
        taken.append(request_id)
        return True

    class Runs:
        pass

    async with host, card, trio.open_nursery() as nursery:
        host.listen(listener)
        card.expose(Runs())  # type: ignore[arg-type]
        assert host.shares_memory
        nursery.start_soon(host.receive)
        nursery.start_soon(card.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert card.try_send(Ok(), 1) and taken == [1]
        assert isinstance(host.reach(), Runs)
        host.arm(What.DUPLICATE)
        assert host.reach() is None
        assert not host.try_send(Describe(), 2)
        assert card.try_send(Ok(), 2) and taken == [1]
        nursery.cancel_scope.cancel()
