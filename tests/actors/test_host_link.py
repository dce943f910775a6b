# SPDX-License-Identifier: Apache-2.0
"""The host link: a well-behaved trio stream, and times that can be worked out on paper.

Times are virtual throughout, so they are compared to within rounding.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from spanker.actors.host_link import HostLink
from spanker.errors import ConfigError

GBE = 100e6
Ends = tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]


@asynccontextmanager
async def attached(link: HostLink) -> AsyncIterator[Ends]:
    host, card = link.stream_pair()
    async with host, card:
        yield host, card


async def send_in_writes(stream: trio.abc.SendStream, nbytes: int, write_bytes: int) -> None:
    data = memoryview(bytes(min(write_bytes, nbytes)))
    while nbytes:
        await stream.send_all(data[:nbytes])
        nbytes -= min(write_bytes, nbytes)


async def receive_exactly(
    stream: trio.abc.ReceiveStream, nbytes: int, max_bytes: int | None = None
) -> float:
    """Receive so many bytes; return when the last one arrived."""
    while nbytes > 0:
        data = await stream.receive_some(max_bytes)
        assert data
        nbytes -= len(data)
    assert nbytes == 0
    return trio.current_time()


# --- a good stream -----------------------------------------------------------------


@pytest.mark.parametrize(("bandwidth", "latency_s"), [(GBE, 100e-6), (1e12, 0.0), (5e5, 0.01)])
async def test_is_a_stream_by_the_conformance_suite_of_trio(
    autojump_clock: trio.testing.MockClock, bandwidth: float, latency_s: float
) -> None:
    async def maker() -> Ends:
        return HostLink(bandwidth, latency_s).stream_pair()

    async def clogged_maker() -> Ends:
        ends = HostLink(bandwidth, latency_s, window_bytes=100).stream_pair()
        for end in ends:
            with trio.move_on_after(60):
                while True:
                    await end.send_all(bytes(1 << 16))
        return ends

    with trio.fail_after(3600):
        await trio.testing.check_half_closeable_stream(
            maker, clogged_maker if bandwidth < 1e9 else None
        )


async def test_bytes_arrive_unchanged_whatever_the_sizes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seed = 4
    print("seed", seed)
    rng = random.Random(seed)
    data = rng.randbytes(3_000_000)
    async with attached(HostLink(GBE, 1e-3)) as (host, card):

        async def send() -> None:
            rest = memoryview(data)
            while rest:
                n = rng.choice((1, 7, 1000, 60_000, 400_000))
                scratch = bytearray(rest[:n])
                await host.send_all(scratch)
                scratch[:] = bytes(len(scratch))  # the stream must have taken a copy
                rest = rest[n:]
            await host.send_eof()

        got = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while chunk := await card.receive_some(rng.choice((1, 10, 5000, 70_000))):
                got += chunk
        assert got == data


# --- exact times --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bandwidth", "write_bytes", "nbytes"),
    [
        (GBE, 1, 4000),
        (GBE, 13, 60_000),
        (GBE, 1500, 3_000_000),
        (GBE, 64 << 10, 8 << 20),
        (GBE, 64 << 20, 64 << 20),
        (GBE, 64 << 20, 1),
        (1e10, 1, 3000),
        (1e10, 64 << 20, 64 << 20),
        (123_456.7, 999, 30_000),
        (300.0, 7, 200),
        (0.5, 3, 4),
    ],
)
@pytest.mark.parametrize("latency_s", [0.0, 0.05])
async def test_a_transfer_takes_bytes_over_bandwidth_plus_latency(
    autojump_clock: trio.testing.MockClock,
    bandwidth: float,
    write_bytes: int,
    nbytes: int,
    latency_s: float,
) -> None:
    await trio.sleep_until(80_000)  # a clock that has run for long has coarser floats
    async with attached(HostLink(bandwidth, latency_s)) as (host, card):
        async with trio.open_nursery() as nursery:
            start = trio.current_time()
            nursery.start_soon(send_in_writes, host, nbytes, write_bytes)
            took_s = await receive_exactly(card, nbytes) - start
    assert took_s == pytest.approx(nbytes / bandwidth + latency_s, rel=1e-6, abs=1e-9)


async def test_reading_in_small_bites_costs_no_time(autojump_clock: trio.testing.MockClock) -> None:
    async with attached(HostLink(GBE, 1e-3)) as (host, card):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_in_writes, host, 100_000, 100_000)
            took_s = await receive_exactly(card, 100_000, 17)
    assert took_s == pytest.approx(1e-3 + 1e-3, rel=1e-6)


async def test_latency_is_paid_once_by_messages_in_a_row(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attached(HostLink(GBE, 0.25)) as (host, card):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_in_writes, host, 1_000_000, 1000)
            for i in range(1, 1001):
                arrived = await receive_exactly(card, 1000, 1000)
                assert arrived == pytest.approx(0.25 + i * 1000 / GBE, abs=11e-6)
    assert arrived == pytest.approx(0.25 + 0.01, rel=1e-6)


async def test_a_message_over_an_idle_link_arrives_at_its_own_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attached(HostLink(GBE, 200e-6)) as (host, card):

        async def send() -> None:
            for _ in range(5):
                await host.send_all(bytes(5000))
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            for i in range(5):
                arrived = await receive_exactly(card, 5000)
                assert arrived == pytest.approx(i * 0.1 + 5000 / GBE + 200e-6, rel=1e-6)


async def test_request_and_reply_take_two_latencies_and_two_transfers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attached(HostLink(GBE, 200e-6)) as (host, card):

        async def answer() -> None:
            while await card.receive_some(100):
                await card.send_all(bytes(300))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            for _ in range(50):
                await host.send_all(bytes(100))
                arrived = await receive_exactly(host, 300)
            await host.send_eof()
    assert arrived == pytest.approx(50 * (2 * 200e-6 + 400 / GBE), rel=1e-6)


async def test_a_sender_runs_ahead_of_the_wire_by_little(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attached(HostLink(GBE, 0.0)) as (host, card):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_exactly, card, 10_000_000)
            await host.send_all(bytes(10_000_000))
            assert 0.097 < trio.current_time() <= 0.1


# --- sharing ------------------------------------------------------------------------


async def finish_times(
    link: HostLink, transfers: Iterable[tuple[int, int]], *, upward: bool = False
) -> list[float]:
    """When each (nbytes, write_bytes) has arrived, a card each, all started at once."""
    times: dict[int, float] = {}

    async def transfer(card_number: int, nbytes: int, write_bytes: int) -> None:
        async with attached(link) as (host, card):
            sender, receiver = (card, host) if upward else (host, card)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_in_writes, sender, nbytes, write_bytes)
                times[card_number] = await receive_exactly(receiver, nbytes)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number, (nbytes, write_bytes) in enumerate(transfers):
            nursery.start_soon(transfer, number, nbytes, write_bytes)
    return [times[number] - start for number in sorted(times)]


@pytest.mark.parametrize("upward", [False, True])
@pytest.mark.parametrize("write_bytes", [(20_000_000,) * 2, (20_000_000, 1 << 16), (9999, 4 << 20)])
async def test_two_senders_share_equally(
    autojump_clock: trio.testing.MockClock, upward: bool, write_bytes: tuple[int, int]
) -> None:
    times = await finish_times(
        HostLink(GBE, 1e-4), [(20_000_000, n) for n in write_bytes], upward=upward
    )
    assert max(times) == pytest.approx(0.4 + 1e-4, rel=1e-6)
    assert min(times) == pytest.approx(0.4, rel=0.01)


async def test_a_short_transfer_is_delayed_by_its_share_and_not_by_the_long_ones(
    autojump_clock: trio.testing.MockClock,
) -> None:
    megabyte = 1_000_000
    transfers = [(15 * megabyte, 15 * megabyte)] * 3 + [(5 * megabyte, megabyte)]
    times = await finish_times(HostLink(GBE, 0.0), transfers)
    assert times[3] == pytest.approx(4 * 5 * megabyte / GBE, rel=0.02)
    assert max(times) == pytest.approx(50 * megabyte / GBE, rel=1e-6)


async def test_the_two_directions_do_not_slow_each_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    link = HostLink(GBE, 0.0)
    times: list[float] = []

    async def one_way(upward: bool) -> None:
        times.extend(await finish_times(link, [(10_000_000, 10_000_000)], upward=upward))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_way, False)
        nursery.start_soon(one_way, True)
    assert times == pytest.approx([0.1, 0.1], rel=1e-6)
    assert (link.bytes_to_cards, link.bytes_to_host) == (10_000_000, 10_000_000)


async def test_a_card_that_does_not_read_holds_nobody_else_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    link = HostLink(GBE, 1e-4)
    async with attached(link) as (stuck_host, _), attached(link) as (host, card):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stuck_host.send_all, bytes(50_000_000))
            await trio.sleep(1)
            start = trio.current_time()
            nursery.start_soon(host.send_all, bytes(10_000_000))
            took_s = await receive_exactly(card, 10_000_000) - start
            nursery.cancel_scope.cancel()
    assert took_s == pytest.approx(0.1 + 1e-4, rel=1e-6)
    # The stuck one got its window, what may be in flight besides, and one quantum.
    assert link.bytes_to_cards - 10_000_000 < (256 << 10) + GBE * 2.1e-3 + 64e3


async def test_a_reader_that_keeps_up_gets_the_full_rate_over_a_long_wire(
    autojump_clock: trio.testing.MockClock,
) -> None:
    link = HostLink(GBE, 0.5, window_bytes=1000)
    (took_s,) = await finish_times(link, [(30_000_000, 30_000_000)])
    assert took_s == pytest.approx(0.3 + 0.5, rel=1e-6)


# --- ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aclose", "send_eof"])
async def test_the_end_arrives_after_the_data_in_flight(
    autojump_clock: trio.testing.MockClock, how: str
) -> None:
    async with attached(HostLink(GBE, 0.5)) as (host, card):
        await host.send_all(bytes(100_000))
        await getattr(host, how)()
        assert trio.current_time() < 0.01
        assert await receive_exactly(card, 100_000) == pytest.approx(0.501, rel=1e-6)
        assert await card.receive_some() == b""
        assert trio.current_time() == pytest.approx(0.501, rel=1e-6)


async def test_the_end_of_an_idle_stream_takes_the_latency(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attached(HostLink(GBE, 0.5)) as (host, card):
        await trio.sleep(3)
        await host.aclose()
        assert await card.receive_some() == b""
        assert trio.current_time() == pytest.approx(3.5)


async def test_a_receiver_that_closes_breaks_a_sender_in_the_midst(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attached(HostLink(GBE, 0.1)) as (host, card):
        async with trio.open_nursery() as nursery:

            async def close_soon() -> None:
                await trio.sleep(0.02)
                await card.aclose()

            nursery.start_soon(close_soon)
            with pytest.raises(trio.BrokenResourceError):
                await host.send_all(bytes(50_000_000))
            assert trio.current_time() == pytest.approx(0.02, abs=1e-3)


async def test_a_cancelled_send_leaves_the_link_to_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    link = HostLink(GBE, 0.0)
    async with attached(link) as (host, card), attached(link) as (other_host, other_card):
        async with trio.open_nursery() as nursery:

            async def cancelled_after(timeout_s: float) -> None:
                with trio.move_on_after(timeout_s):
                    await host.send_all(bytes(20_000_000))

            nursery.start_soon(other_host.send_all, bytes(20_000_000))
            nursery.start_soon(cancelled_after, 0.05)
            nursery.start_soon(receive_exactly, card, 1 << 40)
            done = await receive_exactly(other_card, 20_000_000)
            nursery.cancel_scope.cancel()
    # Half the rate for 0.05 s, then all of it.
    assert done == pytest.approx(0.05 + 17_500_000 / GBE, rel=0.01)


async def test_tiny_writes_do_not_pile_up_memory(autojump_clock: trio.testing.MockClock) -> None:
    async with attached(HostLink(GBE, 1e-3)) as (host, card):
        tracemalloc.start()
        try:
            await send_in_writes(host, 4000, 1)
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert held < 100_000
        await receive_exactly(card, 4000)


# --- time and arguments ----------------------------------------------------------------


async def test_in_real_time_no_transfer_is_faster_than_the_link() -> None:
    start = time.monotonic()
    await finish_times(HostLink(GBE, 0.01), [(5_000_000, 5_000_000), (5_000_000, 64 << 10)])
    assert time.monotonic() - start >= 0.11


@pytest.mark.parametrize(
    "make",
    [
        lambda: HostLink(0, 0.0),
        lambda: HostLink(-1, 0.0),
        lambda: HostLink(float("inf"), 0.0),
        lambda: HostLink(float("nan"), 0.0),
        lambda: HostLink(1, -1e-9),
        lambda: HostLink(1, float("inf")),
        lambda: HostLink(1, 0.0, window_bytes=0),
    ],
)
def test_a_link_that_makes_no_sense_is_refused(make: Callable[[], HostLink]) -> None:
    with pytest.raises(ConfigError, match="host link"):
        make()
