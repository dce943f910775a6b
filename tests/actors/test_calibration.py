# SPDX-License-Identifier: Apache-2.0
"""Calibrating a fleet: constants that cards are throttled to are found again, and nothing is left.

Traces of throttled cards tell the model's times, so that a busy machine does not matter here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from collections.abc import Sequence as Values
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from silent_cards import SilentCards

from spanker.actors import calibration
from spanker.actors import coordinator as coordinators
from spanker.actors.calibration import STREAM_BYTES, Calibration, calibrate, figure
from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.session import Sequence, Session
from spanker.actors.tracer import Tracer
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import CardHungError, CardMemoryError, ConfigError
from spanker.sched.bandwidth import NATIVE, CardSpeed, LinkSpeed, Profile

# A tenth as slow as a real board, so that a measurement takes a second.
BOARD = Profile(
    name="board",
    local_ddr_bytes_per_s=4e9,
    intercard_bytes_per_s=0.8e9,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
    intercard_latency_s=5e-6,
    port_bytes_per_s=1e9,
    int8_madds_per_s=20e9,
    float_madds_per_s=4e9,
    elements_per_s=0.4e9,
    command_s=3e-6,
    step_s=40e-6,
    cards=(CardSpeed(1, memory=0.5), CardSpeed(2, compute=0.5)),
    links=(LinkSpeed(2, 0, 0.2e9, 5e-6), LinkSpeed(0, 1, 0.8e9, 50e-6)),
)


@asynccontextmanager
async def fleet(
    cards: int, throttle: Profile | None = None, ddr_bytes: int = 16 << 20
) -> AsyncIterator[Coordinator]:
    rig = SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)] * cards, throttle=throttle)
    try:
        async with open_coordinator(rig.cards, throttle or NATIVE) as coordinator:
            yield coordinator
    finally:
        rig.close()


async def left_over(coordinator: Coordinator) -> Values[int]:
    return [c.ddr_used_bytes for c in await coordinator.counters()]


async def test_the_constants_of_throttled_cards_are_found_again() -> None:
    async with fleet(4, BOARD) as coordinator:
        found = (await calibrate(coordinator, name="found", seconds=0.01)).profile
    assert found.name == "found"
    for name in (
        "local_ddr_bytes_per_s",
        "intercard_bytes_per_s",
        "intercard_latency_s",
        "port_bytes_per_s",
        "int8_madds_per_s",
        "float_madds_per_s",
        "elements_per_s",
        "command_s",
        "step_s",
    ):
        assert getattr(found, name) == pytest.approx(getattr(BOARD, name), rel=0.02), name
    assert found.cores is None and found.shared_bytes_per_s is None
    assert found.host_link_bytes_per_s is None
    assert found.host_step_s > 0 and found.host_link_latency_s > 0
    assert [card.card for card in found.cards] == [1, 2]
    assert found.card(1).memory == pytest.approx(0.5, rel=0.02)
    assert found.card(2).compute == pytest.approx(0.5, rel=0.02)
    assert [(x.source, x.target) for x in found.links] == [(0, 1), (2, 0)]
    assert found.link(2, 0).bytes_per_s == pytest.approx(0.2e9, rel=0.02)
    assert found.link(0, 1).latency_s == pytest.approx(50e-6, rel=0.02)


@pytest.mark.parametrize("cards", [1, 2, 3])
async def test_any_fleet_is_measured_and_left_as_it_was(cards: int) -> None:
    seen: list[tuple[int, int]] = []
    async with fleet(cards) as coordinator:
        made = await calibrate(
            coordinator, seconds=0.01, progress=lambda *counts: seen.append(counts)
        )
        assert await left_over(coordinator) == [0] * cards
        assert coordinator.trace is None
    assert isinstance(made, Calibration) and made.profile.name == "measured"
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert seen[-1][0] == seen[-1][1]
    assert made.profile.local_ddr_bytes_per_s > 1e6
    assert made.profile.int8_madds_per_s > 1e6
    assert made.about["cards"] == cards and made.about["date"]
    names = [f.name for f in made.figures]
    assert len(set(names)) == len(names)
    assert all(f.low <= f.median <= f.high and f.count for f in made.figures)
    assert ("bandwidth of a link" in names) == (cards > 1)


async def test_a_paced_host_link_is_measured_as_such() -> None:
    slow = attrs.evolve(BOARD, host_link_bytes_per_s=50e6, host_link_latency_s=3e-3)
    async with fleet(1, slow) as coordinator:
        found = (await calibrate(coordinator, seconds=0.01)).profile
    # Its model wakes up to a millisecond late in real time, and never early.
    assert found.host_link_latency_s >= 3e-3
    assert found.host_link_bytes_per_s is not None and found.host_link_bytes_per_s < 100e6


async def test_cancelled_at_any_moment_it_leaves_nothing() -> None:
    async with fleet(2, BOARD) as coordinator:
        for after_s in (0.0, 0.003, 0.03, 0.1, 0.2, 0.3):
            with trio.move_on_after(after_s) as scope:
                await calibrate(coordinator, seconds=60)
            assert scope.cancelled_caught
            assert await left_over(coordinator) == [0, 0]
            assert coordinator.trace is None
        # And the cards are as good as before.
        await calibrate(coordinator, seconds=0.01)


async def test_what_does_not_fit_is_refused_and_leaves_nothing() -> None:
    async with fleet(2, ddr_bytes=2 << 20) as coordinator:
        with pytest.raises(CardMemoryError, match="calibrating needs about 4 MiB of DDR"):
            await calibrate(coordinator)
        assert await left_over(coordinator) == [0, 0]
    assert STREAM_BYTES > 32 << 20


@pytest.mark.parametrize(
    ("after", "silent"),
    # Nothing; the first card filled; both; the host link; some of a card; all but the host's work,
    # and in the middle of that.
    [(0, 1), (1, 1), (2, 0), (3, 0), (5, 1), (19, 1), (20, 1)],
)
async def test_a_card_that_falls_silent_is_lost_and_ends_it(
    after: int, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinators, "STOP_S", 0.3)
    cards, rig = SilentCards(), SoftRig([SoftCardSpec(ddr_bytes=16 << 20)] * 2)

    def progress(done: int, total: int) -> None:
        assert total == 20
        if done == after:
            cards.silence(silent)

    class Falling(Session):
        def release(self, sequence: Sequence) -> None:
            super().release(sequence)
            if after == 20:
                cards.silence(silent)

    monkeypatch.setattr(calibration, "Session", Falling)
    with trio.fail_after(20), rig:
        async with open_coordinator(
            rig.cards, NATIVE, hang_timeout_s=0.3, around=cards
        ) as coordinator:
            if not after:
                cards.silence(silent)
            with pytest.raises(CardHungError) as caught:
                await calibrate(coordinator, seconds=0.01, progress=progress)
            assert caught.value.card == silent and list(coordinator.lost) == [silent]
            # Nothing is left on the other.
            other = rig.cards[1 - silent]
            assert coordinator.trace is None and other.trace_events(100) == (b"", 0)
            assert other.counters().ddr_used_bytes == 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
async def test_no_time_is_no_calibration(seconds: float) -> None:
    async with fleet(1) as coordinator:
        with pytest.raises(ConfigError, match="time above 0 s"):
            await calibrate(coordinator, seconds=seconds)


async def test_one_trace_at_a_time(tmp_path: Path) -> None:
    async with fleet(1, BOARD) as coordinator:
        tracer = Tracer(coordinator, tmp_path / "trace.json")
        await tracer.start()
        with pytest.raises(ConfigError, match="trace of this fleet is being recorded"):
            await calibrate(coordinator)
        await tracer.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calibrate, coordinator)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(ConfigError, match="being recorded already"):
                await Tracer(coordinator, tmp_path / "other.json").start()
            nursery.cancel_scope.cancel()


def test_a_figure_is_a_median_with_quartiles() -> None:
    made = figure("x", "s", [5.0, 1.0, 4.0, 2.0, 3.0])
    assert (made.low, made.median, made.high, made.count) == (2.0, 3.0, 4.0, 5)
