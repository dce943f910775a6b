# SPDX-License-Identifier: Apache-2.0
"""Cards that join a running fleet, models that are unloaded, the last card that comes back.

A failing case is replayed by its name: moments are drawn from the seed in it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from crowd import FAULTS, HANG_TIMEOUT_S, ITEMS, Answers, At, Crowd, check_nothing_held, kinds
from silent_cards import SilentCards
from waiting import until

import spanker
from spanker.actors import collectives
from spanker.actors import coordinator as coordinators
from spanker.device import soft
from spanker.device.soft import SoftCard, SoftCardSpec, SoftRig
from spanker.errors import (
    CardHungError,
    CardLostError,
    ConfigError,
    RequestError,
    TopologyMismatchError,
)
from spanker.events import LOGGER, CardJoined, CardLost, Event, Replanned
from spanker.native import lib
from spanker.sched.topology import Topology
from spanker.testing import hang, kill, run_virtual


@pytest.mark.parametrize("plan", ["tp", "pp", "tp2"])
@pytest.mark.parametrize("seed", range(2))
async def test_a_card_joins_in_the_middle_of_generations(
    seed: int, plan: str, tiny: Path, expected: Answers
) -> None:
    draw = random.Random(f"{seed} {plan}")
    with trio.fail_after(30):
        async with (
            spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet,
            trio.open_nursery() as nursery,
        ):
            model = await fleet.load(tiny, plan=plan)
            joining = At({draw.randrange(1, ITEMS - 20): lambda: _join(nursery, fleet)})
            assert await Crowd(model, joining).run() == expected
            await until(lambda: CardJoined in kinds(fleet))
            assert await Crowd(model).run() == expected
            assert len(model.plan.cards) == (2 if plan == "tp2" else 3)
            assert kinds(fleet) == [CardJoined] + [Replanned] * (plan != "tp2")
            assert str(fleet.events.history[0]) == "card 2 (soft2) has joined"
            assert fleet.health().cards == (0, 1, 2) and fleet.topology == Topology.with_mock(3)
            arrays = [np.full(64, card, np.float32) for card in range(3)]
            await spanker.all_reduce(fleet, arrays)
            assert all(np.array_equal(array, np.full(64, 3, np.float32)) for array in arrays)
            await check_nothing_held(model)


def _join(nursery: trio.Nursery, fleet: spanker.Fleet) -> None:
    nursery.start_soon(fleet.add, "soft:1")


async def test_from_one_card_to_four(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(1, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        for number in (1, 2, 3):
            assert await fleet.add("soft:1") == number
            assert model.plan.cards == tuple(range(number + 1))
            assert await Crowd(model).run() == expected
        kill(fleet, 3)
        assert await Crowd(model).run() == expected
        await fleet.admit(3)
        assert len(model.plan.cards) == 4
        assert await Crowd(model).run() == expected


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_card_joins_and_another_one_dies_at_once(
    fault: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")

        async def misfortune() -> None:
            await fleet.add("soft:1")
            FAULTS[fault](fleet, 0)

        async with trio.open_nursery() as nursery:
            begin = At({30: lambda: nursery.start_soon(misfortune)})
            assert await Crowd(model, begin).run() == expected
        FAULTS[fault](fleet, 0)
        assert await Crowd(model).run() == expected
        assert model.plan.cards == (1, 2)
        assert kinds(fleet)[0] is CardJoined and kinds(fleet).count(CardLost) == 1


@pytest.mark.parametrize("cards", ["soft:2", "virtual:2"])
def test_a_join_that_is_cancelled_leaves_nothing(cards: str, tiny: Path) -> None:
    async def main() -> None:
        kind = cards.partition(":")[0]
        async with spanker.open_fleet(cards, hang_timeout_s=5, profile="rev-a") as fleet:
            model = await fleet.load(tiny, plan="tp")
            coordinator = fleet._coordinator
            before = len(coordinator._lives)
            # While somebody has the cards, it waits.
            await coordinator.take_cards()
            with trio.move_on_after(0.1) as scope:
                await fleet.add(f"{kind}:1")
            coordinator.give_cards_back()
            assert scope.cancelled_caught
            assert len(fleet.cards) == len(fleet.devices) == before == len(coordinator._lives)
            assert fleet.events.history == () and len(fleet.topology.cards) == 2
            generation = model.generate([1, 2], max_tokens=4, ignore_eos=True)
            await generation.collect()
            assert await fleet.add(f"{kind}:1") == 2
            again = model.generate([1, 2], max_tokens=4, ignore_eos=True)
            await again.collect()
            assert again.token_ids == generation.token_ids and len(model.plan.cards) == 3

    threads = threading.active_count()
    (trio.run if cards.startswith("soft") else run_virtual)(main)
    assert threading.active_count() == threads


async def test_a_card_that_is_silent_does_not_join(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinators, "STOP_S", HANG_TIMEOUT_S)
    around = SilentCards(2)
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S, _around=around) as fleet:
        model = await fleet.load(tiny, plan="tp")
        with pytest.raises(CardHungError, match="card 2 has not answered Describe"):
            await fleet.add("soft:1")
        assert len(fleet.cards) == 2 and fleet.health().lost == ()
        around.from_the_start.clear()
        assert await Crowd(model).run() == expected
        assert await fleet.add("soft:1") == 2
        assert await Crowd(model).run() == expected


async def test_a_listener_that_raises_stands_in_the_way_of_nobody(
    tiny: Path, expected: Answers, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(event: Event) -> None:
        raise ValueError(f"of the listener, at {event}")

    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        told: list[Event] = []
        for listener in (raises, told.append):
            fleet.events.listen(listener)
        assert await fleet.add("soft:1") == 2
        assert len(fleet.cards) == len(fleet.devices) == 3
        kill(fleet, 0)
        assert await Crowd(model).run() == expected
        assert model.plan.cards == (1, 2)
        assert tuple(told) == fleet.events.history
    # The traceback, with the name of the listener, goes where the events go.
    failures = [record.exc_text for record in caplog.records if record.exc_info]
    assert len(failures) == len(told) and all("in raises" in str(text) for text in failures)


class FullDisk(logging.Handler):
    """Like one that is written without `handleError`."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(errno.ENOSPC, "disk full")


@pytest.mark.parametrize("shown", [True, False])
async def test_a_log_that_cannot_be_written_stands_in_the_way_of_nobody(
    tiny: Path,
    expected: Answers,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raises(event: Event) -> None:
        raise ValueError("of the listener")

    monkeypatch.setattr(logging, "raiseExceptions", shown)
    full = FullDisk()
    logging.getLogger(LOGGER).addHandler(full)
    try:
        async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            told: list[Event] = []
            for listener in (raises, told.append):
                fleet.events.listen(listener)
            kill(fleet, 0)
            assert await Crowd(model).run() == expected
            assert model.plan.cards == (1, 2)
            assert told and tuple(told) == fleet.events.history
    finally:
        logging.getLogger(LOGGER).removeHandler(full)
    # Each event, and what the listener raised at it.
    assert capsys.readouterr().err.count("] disk full") == (2 * len(told) if shown else 0)


async def test_a_card_that_has_joined_stays_whatever_comes_after(
    tiny: Path, expected: Answers
) -> None:
    """Ctrl-C while listeners are told: nothing may be undone that others know of."""

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        stop = fleet.events.listen(interrupt)
        with pytest.raises(KeyboardInterrupt):
            await fleet.add("soft:1")
        stop()
        assert len(fleet.cards) == len(fleet.devices) == 3
        assert not fleet.devices[2].closed  # type: ignore[union-attr]
        assert await fleet.add("soft:1") == 3
        assert await Crowd(model).run() == expected
        assert model.plan.cards == (0, 1, 2, 3)


def test_a_card_that_workers_have_is_not_freed_before_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is raised once they have it, and whoever lets it go then."""

    class Interrupting:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def spk_pool_add(self, *arguments: object) -> int:
            assert lib.spk_pool_add(*arguments) == 0
            raise KeyboardInterrupt

    with SoftRig([SoftCardSpec()] * 2) as rig:
        cards = [rig.create(SoftCardSpec())]
        with monkeypatch.context() as patch:
            patch.setattr(soft, "lib", Interrupting())
            with pytest.raises(KeyboardInterrupt):
                rig.join(cards[0])
        cards.append(rig.create(SoftCardSpec()))
        rig.join(cards[1])
        for card in cards:
            rig.discard(card)
            assert isinstance(card, SoftCard) and card.closed and card.native is not None
    assert all(card.native is None for card in cards)  # type: ignore[union-attr]


async def test_who_cannot_join(tmp_path: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        for spec, match in (("soft:2", "one by one"), ("virtual:1", "open e.g. soft:1")):
            with pytest.raises(ConfigError, match=match):
                await fleet.add(spec)
        async with fleet.trace(tmp_path / "trace.json"):
            with pytest.raises(ConfigError, match="end the trace first"):
                await fleet.add("soft:1")
        assert len(fleet.cards) == 2


@pytest.mark.parametrize("first", ["card", "trace"])
async def test_a_trace_that_begins_while_a_card_joins(
    first: str, tiny: Path, tmp_path: Path
) -> None:
    """Both wait for the cards: a trace is of all cards there are, and none joins while it lasts."""
    path, ended = tmp_path / "trace.json", trio.Event()
    async with spanker.open_fleet(2, channel="unix") as fleet:
        model, coordinator = await fleet.load(tiny, plan="tp"), fleet._coordinator

        async def card() -> None:
            refused = pytest.raises(ConfigError, match="end the trace first")
            with refused if first == "trace" else contextlib.nullcontext():
                await fleet.add("soft:1")

        async def trace() -> None:
            async with fleet.trace(path):
                await model.generate([1, 2], max_tokens=4, ignore_eos=True).collect()
                await ended.wait()

        await coordinator.take_cards()
        async with trio.open_nursery() as nursery:
            for waiting in (card, trace) if first == "card" else (trace, card):
                nursery.start_soon(waiting)
                await trio.testing.wait_all_tasks_blocked(0.05)
            coordinator.give_cards_back()
            await trio.testing.wait_all_tasks_blocked(0.05)
            ended.set()
        cards = len(fleet.cards)
        assert cards == (3 if first == "card" else 2)
        summary = json.loads(path.read_text(encoding="ascii"))["otherData"]
        assert len(summary["cards"]) == cards
        assert await fleet.add("soft:1") == cards


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_collective_that_waits_while_a_card_joins_is_told(channel: str) -> None:
    async with spanker.open_fleet(2, channel=channel) as fleet:
        await spanker.all_reduce(fleet, [np.ones(64, np.int32) for _ in range(2)])
        arrays, coordinator = await fleet.arrays(64), fleet._coordinator

        async def reduce() -> None:
            with pytest.raises(TopologyMismatchError, match="a card has joined"):
                await spanker.all_reduce(fleet, [np.ones(64, np.int32) for _ in range(2)])

        await coordinator.take_cards()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.add, "soft:1")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(reduce)
            await trio.testing.wait_all_tasks_blocked()
            coordinator.give_cards_back()
        await arrays.aclose()
        whole = [np.full(64, card, np.int32) for card in range(3)]
        await spanker.all_reduce(fleet, whole)
        assert all(np.array_equal(array, np.full(64, 3, np.int32)) for array in whole)
        await fleet._collectives.trim()
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == [0, 0, 0]


async def test_what_collectives_hold_is_given_back_after_a_card_has_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with spanker.open_fleet(2, channel="unix") as fleet:
        await spanker.all_reduce(fleet, [np.ones(1000, np.float32) for _ in range(2)])
        arrays = await fleet.arrays(1000)
        await fleet.add("soft:1")
        with pytest.raises(TopologyMismatchError, match="each of 3 cards, got 2"):
            await spanker.all_reduce(fleet, arrays)
        await arrays.write(1, 7)
        assert np.array_equal(await arrays.read(1), np.full(1000, 7, np.float32))
        monkeypatch.setattr(collectives, "RELEASE_S", 0.05)
        async with trio.open_nursery() as nursery, fleet._coordinator.changing_memory():
            nursery.start_soon(arrays.aclose)
            await trio.sleep(0.1)
        assert [device.counters().ddr_used_bytes > 0 for device in fleet.devices[:2]] == [True] * 2
        # As all do that want memory.
        await fleet._collectives.trim()
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == [0, 0, 0]


@pytest.mark.parametrize("profile", ["rev-a", "native"])
def test_virtual_cards_join_alike_each_time(profile: str, tiny: Path) -> None:
    async def main(join: bool) -> tuple[list[int], float, list[str]]:
        async with spanker.open_fleet("virtual:2", profile=profile) as fleet:
            model = await fleet.load(tiny, plan="tp")
            async with trio.open_nursery() as nursery:
                generation = model.generate([5, 6, 7], max_tokens=30, ignore_eos=True)
                async for token in generation:
                    if join and token.position == 9:
                        nursery.start_soon(fleet.add, "virtual:1")
            log = [str(event) for event in fleet.events.history]
            return generation.token_ids, trio.current_time(), log

    alone, joined = run_virtual(main, False), run_virtual(main, True)
    assert joined[0] == alone[0]
    assert [line.partition(";")[0] for line in joined[2]] == [
        "card 2 (virtual2) has joined",
        "tiny llama: re-planned tp2 -> tp3 on cards 0, 1, 2",
    ]
    assert run_virtual(main, True) == joined


async def test_throttled_cards_join_and_keep_their_pace(tiny: Path) -> None:
    async with spanker.open_fleet(2, profile="rev-a", throttle=True) as fleet:
        model = await fleet.load(tiny, plan="tp")
        fleet.devices[0].slow(2)  # type: ignore[union-attr]
        before = model.generate([5], max_tokens=8, ignore_eos=True)
        await before.collect()
        await fleet.add("soft:1")
        after = model.generate([5], max_tokens=8, ignore_eos=True)
        await after.collect()
        assert after.token_ids == before.token_ids and len(model.plan.cards) == 3
        paces = [device.pace for device in fleet.devices]  # type: ignore[union-attr]
        assert all(pace is not None and pace.steps >= 8 for pace in paces)


# --- models that are unloaded -------------------------------------------------------------


@pytest.mark.parametrize("plan", ["tp", "dp2"])
async def test_an_unloaded_model_leaves_nothing_and_others_go_on(
    plan: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        other = await fleet.load(tiny, plan="tp")
        used = [device.counters().ddr_used_bytes for device in fleet.devices]
        model = await fleet.load(tiny, plan=plan)
        generation = model.generate([1, 2], max_tokens=60, ignore_eos=True)
        await anext(generation)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.unload)
            assert await Crowd(other).run() == expected
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == used
        with pytest.raises(RequestError, match="tiny llama has been unloaded"):
            await generation.collect()
        with pytest.raises(RequestError, match="unloaded"):
            model.generate([1], max_tokens=1)
        await model.unload()
        assert [m.name for m in fleet.health().models] == ["tiny llama"]
        assert fleet.plan == other.plan
        await other.unload()
        assert not any(device.counters().ddr_used_bytes for device in fleet.devices)


# --- the last card --------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [kill, hang])
async def test_the_last_card_comes_back(
    fail: Callable[[spanker.Fleet, int], None], tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        fail(fleet, 0)
        fail(fleet, 1)
        with pytest.raises(CardLostError, match="no card is left"):
            await model.generate([1], max_tokens=2).collect()
        assert len(fleet.health().lost) == 2
        with pytest.raises(CardLostError):
            await fleet.load(tiny)
        await fleet.admit(1)
        await fleet.admit(0)
        assert fleet.health().cards == (0, 1)
        again = await fleet.load(tiny, plan="tp")
        assert again.plan.cards == (0, 1)
        assert await Crowd(again).run() == expected
        with pytest.raises(CardLostError, match="no card is left"):
            model.generate([1], max_tokens=2)
        await model.unload()
