# SPDX-License-Identifier: Apache-2.0
"""The paced link: what it hands over arrives when its bytes would over the real host link.

That it is a channel like the others is in test_channel.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import trio
import trio.testing

from spanker.actors.channel import Channel, StreamChannel
from spanker.actors.host_link import HostLink
from spanker.actors.message import Describe, ReadTrace, StartTrace, TraceData, WriteBuffers
from spanker.actors.paced import CAPACITY, PacedLink
from spanker.errors import ChannelClosedError

GBE, LATENCY_S = 100e6, 100e-6
Pair = tuple[Channel, Channel]


def over_host_link(count: int) -> tuple[list[Pair], None]:
    link = HostLink(GBE, LATENCY_S)
    streams = [link.stream_pair() for _ in range(count)]
    return [(StreamChannel(a), StreamChannel(b)) for a, b in streams], None


def over_paced_link(count: int) -> tuple[list[Pair], PacedLink]:
    link = PacedLink(GBE, LATENCY_S)
    return [link.channel_pair() for _ in range(count)], link


async def arrivals(
    make: Callable[[int], tuple[list[Pair], PacedLink | None]],
    sends: list[tuple[float, int, int]],
    channels: int,
) -> list[float]:
    """When messages of so many raw bytes, each sent at a time over a channel, arrive, in order of
    the sends."""
    pairs, link = make(channels)
    found = [0.0] * len(sends)

    async def send(at: float, channel: int, nbytes: int, number: int) -> None:
        await trio.sleep_until(at)
        await pairs[channel][0].send(
            WriteBuffers(((0, 0, nbytes),), buffers=(bytes(nbytes),)), number
        )

    async def receive(channel: Channel) -> None:
        while True:
            number, _ = await channel.receive()
            found[number] = trio.current_time()

    async with trio.open_nursery() as nursery:
        if link is not None:
            nursery.start_soon(link.run)
        for _, far in pairs:
            nursery.start_soon(receive, far)
        async with trio.open_nursery() as senders:
            for number, (at, channel, nbytes) in enumerate(sends):
                senders.start_soon(send, at, channel, nbytes, number)
        while not all(found):  # noqa: ASYNC110
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    return found


async def both(sends: list[tuple[float, int, int]], channels: int) -> tuple[list[float], ...]:
    begin = trio.current_time()
    real = await arrivals(over_host_link, sends, channels)
    later = trio.current_time()
    shifted = [(at + later - begin, *rest) for at, *rest in sends]
    paced = await arrivals(over_paced_link, shifted, channels)
    return [at - begin for at in real], [at - later for at in paced]


async def test_one_message_at_a_time_arrives_to_the_nanosecond(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sizes = (0, 1, 150, 50_000, 50_001, 2 << 20, 300)
    sends = [(0.1 * i, i % 2, nbytes) for i, nbytes in enumerate(sizes)]
    real, paced = await both(sends, 2)
    assert paced == pytest.approx(real, abs=1e-9)
    # 32 bytes of header, 7 of body, 8 of table.
    assert paced[0] == pytest.approx(47 / GBE + LATENCY_S, abs=1e-9)


async def test_a_step_for_many_cards_arrives_to_the_nanosecond(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Small messages at one moment: first come, first served, whoever that is."""
    sends = [(1.0, card, 190) for card in range(16)]
    real, paced = await both(sends, 16)
    assert sorted(paced) == pytest.approx(sorted(real), abs=1e-9)
    gaps = [b - a for a, b in itertools.pairwise(sorted(paced))]
    assert gaps == pytest.approx([238 / GBE] * 15, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
async def test_a_busy_link_is_as_long_busy_and_as_fair(
    autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    """Turns of half a millisecond, and the host link books two ahead: so much may each differ."""
    rng = random.Random(seed)
    sends = [(rng.random() * 0.02, card, rng.randrange(1 << 20)) for card in range(6)]
    real, paced = await both(sends, 6)
    assert max(paced) == pytest.approx(max(real), abs=1e-6)
    assert paced == pytest.approx(real, abs=6 * 0.5e-3)


async def test_both_directions_are_independent(autojump_clock: trio.testing.MockClock) -> None:
    link = PacedLink(GBE, LATENCY_S)
    host, card = link.channel_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        big = WriteBuffers(((0, 0, 1_000_000),), buffers=(bytes(1_000_000),))
        for near in (host, card):
            assert near.try_send(big, 1)
        for far in (card, host):
            await far.receive()
        assert trio.current_time() == pytest.approx(0.01 + LATENCY_S, abs=1e-6)
        assert link.bytes_to_cards == link.bytes_to_host == 1_000_051
        nursery.cancel_scope.cancel()


async def test_who_looks_on_does_not_take_room(autojump_clock: trio.testing.MockClock) -> None:
    link = PacedLink(GBE, LATENCY_S)
    host, card = link.channel_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        for number, message in enumerate((StartTrace(5), ReadTrace(5))):
            await host.send(message, number)
        await card.send(TraceData(0, buffers=(bytes(1 << 20),)), 0)
        for channel in (card, card, host):
            await channel.receive()
        assert trio.current_time() == pytest.approx(LATENCY_S)
        assert (link.bytes_to_cards, link.bytes_to_host) == (0, 0)
        nursery.cancel_scope.cancel()


async def test_a_sender_waits_while_the_receiver_is_behind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    link = PacedLink(GBE, LATENCY_S)
    host, card = link.channel_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        for number in range(CAPACITY):
            assert host.try_send(Describe(), number)
        assert not host.try_send(Describe(), 99)
        await trio.sleep(1)
        with trio.move_on_after(1) as waited:
            await host.send(Describe(), 99)
        assert waited.cancelled_caught
        assert (await card.receive())[0] == 0
        await host.send(Describe(), CAPACITY)
        assert [(await card.receive())[0] for _ in range(CAPACITY)] == [*range(1, CAPACITY + 1)]
        nursery.cancel_scope.cancel()


async def test_messages_under_way_arrive_before_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    link = PacedLink(GBE, 1.0)
    host, card = link.channel_pair(name="of card 3")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await host.send(Describe(), 7)
        await host.aclose()
        assert await card.receive() == (7, Describe())
        with pytest.raises(ChannelClosedError, match="of card 3: closed by the peer"):
            await card.receive()
        assert trio.current_time() == pytest.approx(1.0, abs=1e-6)
        nursery.cancel_scope.cancel()
