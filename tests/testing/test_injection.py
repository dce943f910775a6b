# SPDX-License-Identifier: Apache-2.0
"""Fault plans at work: on soft and virtual fleets, over every kind of channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from driver_model import DriverModel

import spanker
from spanker.device import uapi
from spanker.device.kernel.card import KernelCard
from spanker.errors import CardLostError, CardMemoryError, ConfigError
from spanker.events import CardLost
from spanker.testing import run_virtual
from spanker.testing.fault_plan import Client, Fault, FaultPlan, What
from spanker.testing.injection import Injection, faulty_fleet

TOKENS = 30
HANG_TIMEOUT_S = 0.4
PROMPT = [5, 6, 7]


async def answers(
    fleet: spanker.Fleet, injection: Injection, path: Path
) -> list[tuple[int, bytes]]:
    model = injection.watch(await fleet.load(path, plan="tp"))
    out = []
    generation = model.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, logits=True)
    async for token in generation:
        assert token.id is not None and token.logits is not None
        out.append((token.id, token.logits.tobytes()))
    return out


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[tuple[int, bytes]]:
    async def main() -> list[tuple[int, bytes]]:
        async with faulty_fleet(1) as (fleet, injection):
            return await answers(fleet, injection, tiny_model)

    return trio.run(main)


def lost(fleet: spanker.Fleet) -> list[int]:
    return [event.card for event in fleet.events.history if isinstance(event, CardLost)]


FLEETS: dict[str, dict[str, Any]] = {
    "soft": {"cards": "soft:3", "hang_timeout_s": HANG_TIMEOUT_S},
    "unix": {"cards": "soft:3", "hang_timeout_s": HANG_TIMEOUT_S, "channel": "unix"},
    "paced": {"cards": "virtual:3", "profile": "rev-a", "hang_timeout_s": 2.0},
    "virtual": {"cards": "virtual:3", "hang_timeout_s": 2.0},
}

# What a plan costs the fleet: these cards, and not a bit.
OUTCOMES = {
    "kill 1@token:5": [1],
    "kill 2@step:4; kill 0@token:12": [2, 0],
    "hang 1@step:5": [1],
    "reset 1@token:5": [1],
    "ecc 2@step:7": [2],
    "ecc-corrected 1@token:3 5 times": [],
    "wrong-completion 1@step:6": [1],
    "slow 1@token:2 x3": [],
    "disconnect channel:1@token:4": [1],
    "corrupt channel:2@step:5": [2],
    "corrupt channel:1@byte:40000": [1],
    "duplicate channel:1@step:5": [1],
    "stall host@token:3 for 0.1s": [],
    "stall channel:1@token:3 for 0.1s": [],
    "partition 0@token:4 for 0.1s": [],
    "partition 2@token:4": [2],
    "reorder channel:1@token:4": [1],
    "kill 1@command:4:5": [1],
    "reset 2@command:3:0": [2],
    "hang 0@command:6:9": [0],
    "ecc 1@command:2:7": [1],
    "corrupt 0-1@step:3": [],
    "cut 0-2@token:10 for 0.1s": [],
    "cut 0-2@token:4": [],
    "flap 0-1@token:3 for 0.02s 3 times": [],
    "flap 1@token:3 for 0.05s": [1],
}
# Of requests that nobody waits for the next one comes behind; of others none does for a while.
MAYBE = {"reorder channel:1@token:4"}


def run(main: Callable[[], Any], fleet: str) -> Any:
    return run_virtual(main) if "virtual" in FLEETS[fleet]["cards"] else trio.run(main)


@pytest.mark.parametrize("fleet_name", FLEETS)
@pytest.mark.parametrize("plan", OUTCOMES)
def test_the_answer_survives(
    plan: str, fleet_name: str, tiny_model: Path, expected: list[tuple[int, bytes]]
) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with faulty_fleet(faults=plan, **FLEETS[fleet_name]) as (fleet, injection):
                assert await answers(fleet, injection, tiny_model) == expected
                if lost(fleet) or plan not in MAYBE:
                    assert lost(fleet) == OUTCOMES[plan], injection.story
                assert injection.pending == ()
                told = [line for _, line in injection.story]
                for fault in FaultPlan.parse(plan).faults:
                    assert str(fault) in told

    run(main, fleet_name)


# --- cards that come back ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["flap 1@token:5 for 0.3s", "kill 1@token:5", "ecc 1@token:5"])
async def test_a_card_that_was_lost_is_admitted_again(
    plan: str, tiny_model: Path, expected: list[tuple[int, bytes]]
) -> None:
    async with faulty_fleet(3, plan, hang_timeout_s=HANG_TIMEOUT_S) as (fleet, injection):
        assert await answers(fleet, injection, tiny_model) == expected
        assert lost(fleet) == [1]
        if plan.startswith("flap"):
            with pytest.raises(CardLostError, match="card 1 is away"):
                await fleet.admit(1)
            await trio.sleep(0.3)
        await fleet.admit(1)
        assert fleet.health().cards == (0, 1, 2)
        assert await answers(fleet, injection, tiny_model) == expected
        # It can be lost once more.
        injection.strike("hang 1@time:0")
        assert await answers(fleet, injection, tiny_model) == expected
        assert lost(fleet) == [1, 1]


async def test_cards_that_are_kept_apart_are_so_on_a_new_channel(tiny_model: Path) -> None:
    async with faulty_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as (fleet, injection):
        model = await fleet.load(tiny_model, plan="tp")
        injection.strike("kill 1@time:0")
        await model.generate(PROMPT, max_tokens=2).collect()
        injection.strike("partition 1@time:0 for 0.2s")
        begin = trio.current_time()
        await fleet.admit(1)
        assert trio.current_time() - begin >= 0.19


# --- cards behind the kernel module ------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    driver = DriverModel(3, 32 << 20)
    monkeypatch.setattr(uapi, "LINUX", driver)
    yield
    assert not driver.mapped
    driver.shut_down()


@pytest.mark.parametrize("plan", OUTCOMES)
async def test_the_answer_of_kernel_cards_survives(
    plan: str, tiny_model: Path, expected: list[tuple[int, bytes]], module: None
) -> None:
    with trio.fail_after(30):
        async with faulty_fleet("kernel:3", plan, hang_timeout_s=HANG_TIMEOUT_S) as opened:
            assert await answers(*opened, tiny_model) == expected
            if plan not in MAYBE:
                assert lost(opened[0]) == OUTCOMES[plan], opened[1].story


async def test_links_that_nobody_can_cut_are_told(
    module: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(KernelCard, "cut")
    for plan in ("cut 0-2@time:0", "flap 0-1@time:0 for 1s"):
        with pytest.raises(ConfigError, match="nobody can cut the links of spanker0: cards of its"):
            async with faulty_fleet("kernel:3", plan):
                pass


# --- what is told -----------------------------------------------------------------------------


async def test_the_story_says_when_and_what(tiny_model: Path) -> None:
    plan = "slow 1@time:0 x2 for 0.01s; kill 2@token:5; hang 0@token:1000; ecc-corrected 1@time:0"
    async with faulty_fleet(3, plan, hang_timeout_s=HANG_TIMEOUT_S) as (fleet, injection):
        await trio.sleep(0.05)
        await answers(fleet, injection, tiny_model)
        assert [line for _, line in injection.story] == [
            "slow 1@time:0 x2 for 0.01s",
            "ecc-corrected 1@time:0",
            "slow 1@time:0 x2 for 0.01s: over",
            "kill 2@token:5",
        ]
        times = [time_s for time_s, _ in injection.story]
        assert times == sorted(times) and 0.01 <= times[2] - times[0] < 0.05
        assert [str(fault) for fault in injection.pending] == ["hang 0@token:1000"]
        assert injection.tokens == TOKENS
        assert injection.corrected == {1: 1}


def test_a_virtual_fleet_does_the_same_every_time(tiny_model: Path) -> None:
    plan = FaultPlan.parse(
        "slow 0@time:0.01 x4 for 0.02s; kill 1@time:0.03; cut 0-2@step:9 for 0.01s; "
        "stall channel:2@token:7 for 5ms; corrupt channel:0@byte:400000"
    )

    async def main() -> tuple[Any, ...]:
        async with faulty_fleet("virtual:3", plan, profile="rev-a") as (fleet, injection):
            got = await answers(fleet, injection, tiny_model)
            events = [str(event) for event in fleet.events.history]
            return got, injection.story, events, trio.current_time()

    first = run_virtual(main, seed=3)
    assert len(first[1]) >= 5
    assert first == run_virtual(main, seed=3)


async def test_a_fault_may_happen_at_a_word(tiny_model: Path, expected: Any) -> None:
    async with faulty_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as (fleet, injection):
        injection.strike("kill 1@time:0")
        assert await answers(fleet, injection, tiny_model) == expected
        assert lost(fleet) == [1]
        # What cannot be done is told.
        injection.strike("slow 0@time:0 x1e9")
        assert "not done: card 0: slower by a factor" in injection.story[-1][1]
        for text in ("kill 9@time:0", "", "kill 0@time:0; kill 2@time:0"):
            with pytest.raises(ConfigError):
                injection.strike(text)


def test_a_card_that_joins_finds_the_host_link_stalled() -> None:
    async def main() -> None:
        async with faulty_fleet("virtual:1", "stall host@time:0.1 for 0.7s") as (fleet, injection):
            await trio.sleep(0.2)
            assert injection.was_stalled(0) and not injection.was_stalled(1)
            assert await fleet.add("virtual:1") == 1
            assert trio.current_time() >= 0.75
            assert injection.was_stalled(1)
            assert await fleet.add("virtual:1") == 2
            assert not injection.was_stalled(2) and not lost(fleet)

    run_virtual(main, seed=1)


async def test_no_memory(tiny_model: Path) -> None:
    async with faulty_fleet(2, "out-of-memory 1@time:0") as (fleet, injection):
        await trio.sleep(0.01)
        with pytest.raises(CardMemoryError, match="card 1: no room for"):
            await answers(fleet, injection, tiny_model)
        await answers(fleet, injection, tiny_model)


async def test_clients_are_somebody_elses() -> None:
    plan = "cancel client:3@token:2; stall client:1@time:0 for 1s"
    with pytest.raises(ConfigError, match="nobody runs clients here"):
        async with faulty_fleet(1, plan):
            pass
    told: list[Fault] = []
    async with faulty_fleet(1, plan, clients=told.append) as (_, injection):
        await trio.sleep(0.01)
        assert [fault.where for fault in told] == [Client(1)]
        injection.token()
        injection.token()
        assert [fault.where for fault in told] == [Client(1), Client(3)]


async def test_what_a_fleet_does_not_have_is_refused_before_it_opens() -> None:
    with pytest.raises(ConfigError, match="no card 2: the fleet has cards 0 to 1"):
        async with faulty_fleet(2, "kill 2@time:0"):
            pass
    with pytest.raises(ConfigError, match="no channel 'pigeon'"):
        async with faulty_fleet(2, "kill 1@time:0", channel="pigeon"):
            pass


@pytest.mark.parametrize("seed", range(8))
def test_drawn_plans_change_no_bit(
    seed: int, tiny_model: Path, expected: list[tuple[int, bytes]]
) -> None:
    """Of kinds after which no answer fails: what survives, survives with the same bits."""
    plan = FaultPlan.random(seed, 4, tokens=TOKENS, steps=TOKENS, seconds=0.05, kinds=SURVIVABLE)

    async def main() -> None:
        async with faulty_fleet("virtual:4", plan, profile="rev-a", hang_timeout_s=2) as opened:
            assert await answers(*opened, tiny_model) == expected

    run_virtual(main, seed=seed)


SURVIVABLE = [
    What.DIE,
    What.HANG,
    What.SLOW,
    What.RESET,
    What.ECC,
    What.ECC_CORRECTED,
    What.WRONG_COMPLETION,
    What.DISCONNECT,
]
