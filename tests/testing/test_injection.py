# SPDX-License-Identifier: Apache-2.0
"""Fault plans at work: on soft and virtual fleets, over every kind of channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import spanker
from spanker.events import CardLost
from spanker.testing import run_virtual
from spanker.testing.fault_plan import FaultPlan
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
}


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
                assert lost(fleet) == OUTCOMES[plan], injection.story
                assert injection.pending == ()
                told = [line for _, line in injection.story]
                for fault in FaultPlan.parse(plan).faults:
                    assert str(fault) in told

    run(main, fleet_name)
