# SPDX-License-Identifier: Apache-2.0
"""Loads, moves and unloads that are cancelled, that meet each other, or in whose midst something
fails: generations go on with the same tokens, and memory comes back.

A failing case is replayed by its name, which has the seed of whatever is drawn.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import trio
import trio.testing

import spanker
from spanker.actors import loading
from spanker.actors.coordinator import Coordinator
from spanker.errors import CardLostError, CardMemoryError, SpankerError
from spanker.events import LinkDown, Rerouted
from spanker.sched.bandwidth import REV_A
from spanker.testing import kill, run_virtual
from spanker.testing.injection import faulty_fleet

TOKENS = 60

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


async def used(fleet: spanker.Fleet) -> list[int]:
    """Bytes of DDR in use on each card."""
    return [card.ddr_used_bytes for card in (await fleet.stats()).cards]


async def begun(model: spanker.Model) -> spanker.Generation:
    generation = model.generate([1, 2, 3], max_tokens=TOKENS, ignore_eos=True)
    await anext(generation)
    return generation


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> tuple[int, ...]:
    """What such a generation brings where nothing happens."""

    async def main() -> tuple[int, ...]:
        async with spanker.open_fleet(1) as fleet:
            generation = await begun(await fleet.load(tiny))
            await generation.collect()
            return tuple(generation.token_ids)

    return trio.run(main)


# --- unloading -------------------------------------------------------------------------------


@pytest.mark.parametrize("ticks", [*range(12), 15, 20, 30])
async def test_an_unload_that_is_cancelled_at_any_moment_can_be_repeated(
    tiny: Path, ticks: int
) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.unload)
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await model.unload()
        assert await used(fleet) == [0, 0]


async def test_what_is_being_freed_is_not_counted_by_the_next_load(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spanker.open_fleet(2, channel="unix") as fleet:
        model = await fleet.load(tiny, plan="tp")
        free = Coordinator.unload
        with trio.CancelScope() as scope:

            async def cancelled(self: Coordinator, *models: object) -> None:
                scope.cancel()
                await free(self, *models)  # type: ignore[arg-type]

            monkeypatch.setattr(Coordinator, "unload", cancelled)
            await model.unload()
        monkeypatch.setattr(Coordinator, "unload", free)
        assert scope.cancelled_caught
        again = await fleet.load(tiny, plan="tp")
        await again.unload()
        assert await used(fleet) == [0, 0]


@pytest.mark.parametrize("deed", ["drain", "admit", "add"])
async def test_models_move_while_one_of_them_is_unloaded(tiny: Path, deed: str) -> None:
    async with spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="tp")
        other = await fleet.load(tiny, plan="tp")
        if deed == "admit":
            await fleet.drain(2)
        fleet.devices[0].slow(200)
        generation = await begun(model)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr(fleet, deed), "soft:1" if deed == "add" else 2)
            while not model._replicas.sessions[0]._moves:
                await trio.lowlevel.checkpoint()
            nursery.start_soon(model.unload)
        generation.close()
        assert other.plan.cards == {"drain": (0, 1), "admit": (0, 1, 2), "add": (0, 1, 2, 3)}[deed]
        assert fleet.health().drained == ((2,) if deed == "drain" else ())


async def test_a_card_is_drained_once_an_unload_under_way_is_over(tiny: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        fleet.devices[0].slow(200)
        generation = await begun(model)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.unload)
            await trio.testing.wait_all_tasks_blocked(0.001)
            await fleet.drain(1)
            assert fleet.devices[1].counters().ddr_used_bytes == 0
        generation.close()


# --- moves that find no room -----------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_model_that_finds_no_room_elsewhere_stays(
    tiny: Path, tokens: tuple[int, ...], times: int
) -> None:
    """There is memory, the card says, and then there is none: with the first failure KV is computed
    again, with the second weights are loaded from the file, with the third all is put back."""
    async with spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = await begun(model)
        fleet.devices[0].starve(times)
        if times < 3:
            await fleet.drain(2)
        else:
            with pytest.raises(CardMemoryError):
                await fleet.drain(2)
        assert model.plan.cards == ((0, 1) if times < 3 else (0, 1, 2))
        assert fleet.health().models[0].replicas_alive == 1
        await generation.collect()
        assert tuple(generation.token_ids) == tokens


async def test_a_card_that_joins_ends_no_model(tiny: Path, tokens: tuple[int, ...]) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = await begun(model)
        fleet.devices[0].starve(3)
        assert await fleet.add("soft:1") == 2
        assert model.plan.cards == (0, 1)
        await generation.collect()
        assert tuple(generation.token_ids) == tokens


async def test_a_model_that_finds_no_room_where_links_lead_goes_over_the_host(
    tiny: Path, tokens: tuple[int, ...]
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=1) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = await begun(model)
        kinds: list[type] = []
        # Around a link that is down, then to cards 1 and 2, then to card 0.
        for a, b, starving in ((0, 1, None), (0, 2, 1), (1, 2, 0)):
            if starving is not None:
                fleet.devices[starving].starve(3)
            fleet.devices[a].cut(b)
            kinds += LinkDown, Rerouted
            while [type(e) for e in fleet.events.history] != kinds:
                await anext(generation)
        fleet.devices[0].mend(1)
        await generation.collect()
        assert tuple(generation.token_ids) == tokens
        assert model.plan.cards == (0, 1, 2)
        assert fleet.health().serving


@pytest.mark.parametrize("seed", range(4))
async def test_memory_in_pieces_ends_no_generation(
    tiny: Path, tokens: tuple[int, ...], seed: int
) -> None:
    draw = random.Random(seed)
    async with spanker.open_fleet("soft:3:2500KiB", channel="unix") as fleet:
        model = await fleet.load(tiny, plan="tp", ctx=256, kv_tokens=256)
        held = []
        while True:
            try:
                held.append(await fleet.arrays(draw.choice((2_000, 4_000))))
            except CardMemoryError:
                break
        draw.shuffle(held)
        for array in held[::2]:
            await array.aclose()
        generation = await begun(model)
        for _ in range(4):
            card = draw.randrange(3)
            try:
                await fleet.drain(card)
            except CardMemoryError:
                continue
            await fleet.admit(card)
        await generation.collect()
        assert tuple(generation.token_ids) == tokens


async def test_kv_pages_come_back_with_the_cards(tiny: Path) -> None:
    async with spanker.open_fleet("soft:2:3MiB") as fleet:
        model = await fleet.load(tiny, plan="tp", ctx=256)
        before = model.stats.kv_pages_total
        await fleet.drain(1)
        assert model.stats.kv_pages_total < before
        await fleet.admit(1)
        assert model.stats.kv_pages_total == before


# --- failures in the midst of it -------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the move", "during the move"])
async def test_a_model_stays_on_the_card_that_was_to_be_drained(
    tiny: Path, tokens: tuple[int, ...], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only other one is lost."""
    move = Coordinator.move

    async def moving(self: Coordinator, *arguments: object) -> object:
        kill(fleet, 0)
        return await move(self, *arguments)  # type: ignore[arg-type]

    async def drain() -> None:
        with pytest.raises(CardLostError, match=r"card 1 stays in use|is left"):
            await fleet.drain(1)

    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = await begun(model)
        if when == "during the move":
            monkeypatch.setattr(Coordinator, "move", moving)
        else:
            kill(fleet, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await generation.collect()
        assert tuple(generation.token_ids) == tokens
        assert fleet.health().drained == ()
        assert model.plan.cards == (1,)


@pytest.mark.parametrize("deed", ["add", "admit"])
async def test_a_model_whose_file_has_changed_keeps_no_other_from_moving(
    tiny: Path, tmp_path: Path, deed: str
) -> None:
    path = shutil.copy(tiny, tmp_path / "other.gguf")
    async with spanker.open_fleet(2 if deed == "add" else 3) as fleet:
        first = await fleet.load(path, plan="tp")
        second = await fleet.load(tiny, plan="tp")
        if deed == "admit":
            await fleet.drain(2)
        os.utime(path, ns=(1, 1))
        if deed == "add":
            assert await fleet.add("soft:1") == 2
        else:
            await fleet.admit(2)
        assert first.plan.cards == (0, 1)
        assert second.plan.cards == (0, 1, 2)


async def test_a_model_whose_file_has_changed_goes_over_the_host_where_a_link_is_down(
    tiny: Path, tokens: tuple[int, ...], tmp_path: Path
) -> None:
    path = shutil.copy(tiny, tmp_path / "other.gguf")
    async with spanker.open_fleet(2, hang_timeout_s=1) as fleet:
        model = await fleet.load(path, plan="tp")
        generation = await begun(model)
        os.utime(path, ns=(1, 1))
        fleet.devices[0].cut(1)
        await generation.collect()
        assert tuple(generation.token_ids) == tokens
        assert [type(e) for e in fleet.events.history] == [LinkDown, Rerouted]
        assert fleet.health().serving


async def test_a_card_is_drained_of_a_model_that_ends_meanwhile(tiny: Path) -> None:
    async with spanker.open_fleet(3, recover=False) as fleet:
        generation = await begun(await fleet.load(tiny, plan="tp"))
        kill(fleet, 0)
        await fleet.drain(1)
        assert fleet.health().drained == (1,) and await used(fleet) == [0, 0]
        with pytest.raises(CardLostError, match="card 0"):
            await generation.collect()


@pytest.mark.parametrize("plan", ["dp2", "dp2xtp2"])
def test_replicas_are_loaded_around_a_link_that_is_down(tiny: Path, plan: str) -> None:
    """Their bytes would go along it."""
    cards = 4 if "tp" in plan else 2

    async def main() -> list[int]:
        async with spanker.open_fleet(f"virtual:{cards}", profile="rev-a") as fleet:
            fleet.devices[0].cut(cards // 2)
            model = await fleet.load(tiny, plan=plan)
            generation = model.generate([1], max_tokens=3, ignore_eos=True)
            await generation.collect()
            return list(generation.token_ids)

    assert len(run_virtual(main)) == 3


async def test_a_link_that_is_down_is_found_in_real_time_too(tiny: Path) -> None:
    profile = attrs.evolve(REV_A, host_link_bytes_per_s=1e8, host_link_latency_s=0.0)
    async with spanker.open_fleet(2, profile=profile, hang_timeout_s=1) as fleet:
        fleet.devices[0].cut(1)
        await fleet.load(tiny, plan="dp2")


# --- cards that take their time ----------------------------------------------------------------


@pytest.fixture
def stalling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something happen when memory is taken on card 1 for the next time."""

    def arm(strike: Callable[[], None]) -> None:
        allocate = Coordinator.allocate

        async def allocating(self: Coordinator, card: int, sizes: object) -> tuple[int, ...]:
            if card == 1:
                monkeypatch.setattr(Coordinator, "allocate", allocate)
                strike()
            return await allocate(self, card, sizes)  # type: ignore[arg-type]

        monkeypatch.setattr(Coordinator, "allocate", allocating)

    return arm


async def test_a_card_has_the_hang_timeout_to_allocate(
    tiny: Path, stalling: Callable[[Callable[[], None]], None]
) -> None:
    async with faulty_fleet("soft:3", "", hang_timeout_s=10) as (fleet, injection):
        stalling(lambda: injection.strike("stall channel:1@time:0 for 2.5s"))
        model = await fleet.load(tiny, plan="tp")
        assert not fleet.health().lost
        # Nor does another one's death have it lost.
        stalling(lambda: injection.strike("stall channel:1@time:0 for 2.5s"))
        kill(fleet, 2)
        await model.generate([1], max_tokens=3, ignore_eos=True).collect()
        assert [card for card, _ in fleet.health().lost] == [2]


async def unload(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await model.unload()


async def load_another(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await fleet.load(tiny)


async def drain(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await fleet.drain(0)


async def agree(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    """As after a step that was aborted on a card that has not heard of it."""

    async def back() -> None:
        pass

    await fleet._coordinator.abort(back)
    await fleet._coordinator.take_cards()
    fleet._coordinator.give_cards_back()


@pytest.mark.parametrize("deed", [unload, load_another, drain, agree])
def test_a_card_has_two_seconds_at_least_for_what_is_no_step(
    tiny: Path, deed: Callable[[spanker.Fleet, spanker.Model, Path], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with faulty_fleet("virtual:2", "", hang_timeout_s=0.5) as (fleet, injection):
            model = await fleet.load(tiny, plan="tp")
            injection.strike("stall channel:1@time:0 for 1.2s")
            await deed(fleet, model, tiny)
            assert trio.current_time() >= 1.2 and not fleet.health().lost

    run_virtual(main)


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_what_a_cancelled_load_has_taken_comes_back_however_slow_the_card(
    tiny: Path, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload: Callable[..., Awaitable[None]] = loading.upload
    async with faulty_fleet("soft:2", "", hang_timeout_s=10, channel=channel) as (fleet, injection):
        with trio.CancelScope() as scope:

            async def cancelled(*arguments: object) -> None:
                injection.strike("stall channel:1@time:0 for 2.5s")
                scope.cancel()
                await upload(*arguments)

            monkeypatch.setattr(loading, "upload", cancelled)
            await fleet.load(tiny, plan="tp")
        assert scope.cancelled_caught
        monkeypatch.setattr(loading, "upload", upload)
        model = await fleet.load(tiny, plan="tp")
        await model.unload()
        assert await used(fleet) == [0, 0]
        assert not fleet.health().lost


class Programs:
    """Counts the programs that are on a fleet's cards."""

    def __init__(self, fleet: spanker.Fleet) -> None:
        self.loaded = 0
        for device in fleet.devices:
            device.load_program = self._counting(device.load_program, 1)  # type: ignore[method-assign]
            device.unload_program = self._counting(device.unload_program, -1)  # type: ignore[method-assign]

    def _counting(self, call: Callable[..., Any], by: int) -> Callable[..., Any]:
        def counted(argument: object) -> Any:
            result = call(argument)
            self.loaded += by
            return result

        return counted


async def load(fleet: spanker.Fleet, tiny: Path) -> None:
    await (await fleet.load(tiny, plan="tp")).unload()


async def arrays(fleet: spanker.Fleet, tiny: Path) -> None:
    async with await fleet.arrays(1000):
        pass


async def reduce(fleet: spanker.Fleet, tiny: Path) -> None:
    await spanker.all_reduce(fleet, [np.ones(500, np.float32) for _ in range(2)])


Deed = Callable[[spanker.Fleet, Path], Awaitable[None]]


@pytest.mark.parametrize("deed", [load, arrays, reduce])
def test_what_a_slow_card_is_asked_for_in_vain_comes_back(
    tiny: Path, deed: Deed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while a card takes its time with one request after the other."""
    owning, cancelled = Coordinator.owning, 0

    async def main(late: int) -> bool:
        asked = 0
        async with faulty_fleet("virtual:2", "", hang_timeout_s=5) as (fleet, injection):
            programs = Programs(fleet)
            with trio.CancelScope() as scope:

                async def asking(self: Coordinator, client: Any, request: Any) -> Any:
                    nonlocal asked
                    asked += 1
                    if asked == late:
                        injection.strike(f"stall channel:{client.number}@time:0 for 1s")
                        scope.deadline = trio.current_time() + 0.3
                    return await owning(self, client, request)

                monkeypatch.setattr(Coordinator, "owning", asking)
                await deed(fleet, tiny)
            # The answer may have yet to come, and disturbs nobody.
            await load(fleet, tiny)
            await trio.sleep(2)
            await fleet._collectives.trim()
            assert (await used(fleet), programs.loaded) == ([0, 0], 0)
            assert not fleet.health().lost
        return scope.cancelled_caught

    while run_virtual(main, cancelled + 1):
        cancelled += 1
    assert cancelled >= 2


async def test_a_load_without_a_card_in_use_says_why(tiny: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        kill(fleet, 0)
        with pytest.raises(SpankerError):
            await fleet.load(tiny, plan="tp1xpp2")
        await fleet.drain(1)
        with pytest.raises(SpankerError, match="1 lost, 1 drained"):
            await fleet.load(tiny)
