# SPDX-License-Identifier: Apache-2.0
"""What only shows after long: every planted bug, a thousand callers who leave, a day of serving."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from pathlib import Path

import pytest
import trio
from mutations import MUTATIONS, Mutation
from waiting import until

import spanker
from spanker.events import LOGGER, CardLost, CardReturned
from spanker.testing import run_virtual
from spanker.testing.misfortune import draw, run
from spanker.testing.misfortune.models import path_of
from spanker.testing.misfortune.profiles import INSTANT

pytestmark = pytest.mark.soak

SEEDS_MAX = 1000
CANCELLED = 1000
HOURS = 24
# A request a minute, and something that happens to a card about every quarter of an hour.
REQUEST_S, FAULT_S = 60.0, 900.0
# After so many hours logs of bounded length and caches are full, or nearly: what they may still
# gather, in blocks of memory, is less than two for each request to come.
FULL_HOURS = 8
GROWTH_BLOCKS_MAX = 2000
# What the process may grow by meanwhile: the rings of its links, two megabytes each, are touched
# little by little.
GROWTH_BYTES_MAX = 16 << 20


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_planted_bug_is_found(mutation: Mutation) -> None:
    for seed in range(SEEDS_MAX):
        if not run(draw(seed), mutation.planted).good:
            assert run(draw(seed)).good, f"seed {seed} goes wrong without {mutation.name}, too"
            print(f"{mutation.name}: found after {seed + 1} seeds")
            return
    pytest.fail(f"{mutation.name} was not found in {SEEDS_MAX} seeds")


# --- callers that leave -------------------------------------------------------------------------


async def cancel_many(cards: str, path: Path, delay_s: float) -> None:
    """A thousand generations, cancelled at random moments, a few at a time."""
    draw_moment = random.Random("cancelled")
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        model = await fleet.load(path, ctx=128)
        await model.generate([1], max_tokens=4).collect()
        tasks = trio.lowlevel.current_statistics().tasks_living
        used = [device.counters().ddr_used_bytes for device in fleet.devices]
        left = CANCELLED

        async def call() -> None:
            nonlocal left
            while left:
                left -= 1
                with trio.move_on_after(draw_moment.random() * delay_s):
                    prompt = range(draw_moment.choice((1, 20, 60)))
                    temperature = draw_moment.choice((0.0, 0.8))
                    generation = model.generate(
                        prompt, max_tokens=60, ignore_eos=True, temperature=temperature
                    )
                    await generation.collect()

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(call)
        coordinator, (session,) = fleet._coordinator, model._replicas.sessions
        await until(lambda: not (model.stats.kv_pages_used or coordinator._locks._taken))
        assert (model.stats.running, model.stats.waiting) == (0, 0)
        assert sorted(session.pool._free) == [*range(session.pool.total)]
        assert not any(client._waiting for client in coordinator.clients)
        assert not coordinator.lost
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == used
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        await coordinator.unload(session.loaded)
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == [0] * len(used)


def test_a_thousand_cancelled_generations_leave_nothing_on_soft_cards() -> None:
    trio.run(cancel_many, "soft:2", path_of("small"), 0.01)


def test_a_thousand_cancelled_generations_leave_nothing_on_virtual_cards() -> None:
    run_virtual(cancel_many, "virtual:2", path_of("small"), 0.002)


# --- a day --------------------------------------------------------------------------------------


async def serve(held: list[tuple[int, int]], returned: list[int]) -> None:
    """A day on three cards, of which now and then one fails and comes back: what is held at the end
    of each hour, in blocks of Python's and in bytes of the process, and how many have come back."""
    draw_day = random.Random("a day")
    async with spanker.open_fleet("virtual:3", profile=INSTANT, hang_timeout_s=1.0) as fleet:
        model = await fleet.load(path_of("small"), plan="tp", ctx=64)
        first = model.generate([1], max_tokens=4, ignore_eos=True)
        await first.collect()
        alone = first.token_ids
        end_s = trio.current_time() + HOURS * 3600

        async def ask() -> None:
            while trio.current_time() < end_s:
                await trio.sleep(draw_day.random() * 2 * REQUEST_S)
                generation = model.generate([1], max_tokens=4, ignore_eos=True)
                if draw_day.random() < 0.2:
                    await anext(generation)
                    generation.close()
                else:
                    await generation.collect()
                    assert generation.token_ids == alone

        async def fail() -> None:
            while True:
                await trio.sleep(draw_day.random() * 2 * FAULT_S)
                if trio.current_time() > end_s - 10 * REQUEST_S:
                    return  # nobody would find out
                card = draw_day.randrange(3)
                fault = draw_day.choice(("kill", "hang", "reset", "fail_memory", "drain"))
                if fault == "drain":
                    await fleet.drain(card)
                else:
                    getattr(fleet.devices[card], fault)()
                    # It is found out with the next request.
                    await trio.sleep(5 * REQUEST_S)
                await fleet.admit(card)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(fail)
            for _ in range(HOURS):
                await trio.sleep(3600)
                gc.collect()
                held.append((sys.getallocatedblocks(), resident_bytes()))
        history = fleet.events.history
        returned.append(sum(isinstance(event, CardReturned) for event in history))
        # Of the oldest return the loss may be forgotten.
        assert sum(isinstance(event, CardLost) for event in history) >= returned[0] - 1


def resident_bytes() -> int:
    """What this process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_day_of_serving_takes_no_more_memory_than_its_first_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # pytest keeps every record.
    monkeypatch.setattr(logging.getLogger(LOGGER), "disabled", True)
    held: list[tuple[int, int]] = []
    returned: list[int] = []
    run_virtual(serve, held, returned)
    print(f"{returned[0]} cards came back; blocks and bytes by hour: {held}")
    assert returned[0] > 10
    assert len(held) == HOURS
    before, after = held[FULL_HOURS - 1], held[-1]
    assert after[0] - before[0] < GROWTH_BLOCKS_MAX
    assert after[1] - before[1] < GROWTH_BYTES_MAX
