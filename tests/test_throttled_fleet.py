# SPDX-License-Identifier: Apache-2.0
"""A fleet of throttled cards: the same bits at a modelled machine's pace, and it still notices what
goes wrong."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import attrs
import numpy as np
import pytest
from reference_model import forward
from waiting import until

import spanker
import spanker.aio
from spanker.errors import ConfigError
from spanker.sched import profiles
from spanker.sched.bandwidth import REV_A
from spanker.testing import hang, kill
from spanker.testing.models import tiny_llama

MODEL = tiny_llama(hidden=128, heads=4, kv_heads=2, ffn=256, vocabulary=600)
# The host link's pace is its own subject (test_profile_rev_a.py).
BOARD = attrs.evolve(REV_A, name="board", host_link_bytes_per_s=None)
PROMPT = [1, 7, 42, 3, 250, 9]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.mark.parametrize(("cards", "plan"), [(1, "auto"), (2, "tp"), (2, "pp"), (4, "tp2xpp2")])
async def test_the_bits_are_those_of_the_reference(path: Path, cards: int, plan: str) -> None:
    async with spanker.open_fleet(cards, plan="tp", profile=BOARD, throttle=True) as fleet:
        model = await fleet.load(path, plan=plan, ctx=64, kv_tokens=256, prompt_chunk=4)
        logits = await model.logits(PROMPT)
        assert np.array_equal(logits.view(np.uint32), forward(MODEL, PROMPT).view(np.uint32))


async def test_it_generates_the_same_tokens_no_faster_than_the_model(path: Path) -> None:
    tokens = []
    for throttle in (False, True):
        async with spanker.open_fleet(2, plan="tp", profile=BOARD, throttle=throttle) as fleet:
            model = await fleet.load(path, ctx=64, kv_tokens=128)
            begin = time.monotonic()
            generation = model.generate(PROMPT, max_tokens=20, ignore_eos=True)
            sampled = model.generate(PROMPT, max_tokens=20, temperature=1.0, ignore_eos=True)
            for each in (generation, sampled):
                await each.collect()
            took_s = time.monotonic() - begin
            tokens.append((generation.token_ids, sampled.token_ids))
            stats = (await fleet.stats()).cards
            assert (fleet.behind is None) == (not throttle)
            if throttle:
                for device, card in zip(fleet.devices, stats, strict=True):
                    assert device.pace is not None and device.pace.steps == card.steps
                    assert 0 < device.pace.modelled_s <= took_s
                    assert 0 < card.busy_s < device.pace.modelled_s
    assert tokens[0] == tokens[1]


async def test_a_hung_or_dead_throttled_card_is_left_out(path: Path) -> None:
    for fault in (hang, kill):
        async with spanker.open_fleet(
            2, plan="tp", profile=BOARD, throttle=True, hang_timeout_s=0.3
        ) as fleet:
            model = await fleet.load(path, ctx=64)
            expected = model.generate(PROMPT, max_tokens=4)
            await expected.collect()
            fault(fleet, 1)
            generation = model.generate(PROMPT, max_tokens=4)
            await generation.collect()
            assert generation.token_ids == expected.token_ids
            assert [card for card, why in fleet.health().lost] == [1]


async def test_a_card_that_is_slow_in_the_model_does_not_hang(path: Path) -> None:
    """A step takes several times the timeout."""
    slow = attrs.evolve(BOARD, command_s=25e-3)
    async with spanker.open_fleet(1, profile=slow, throttle=True, hang_timeout_s=0.2) as fleet:
        model = await fleet.load(path, ctx=64)
        begin = time.monotonic()
        await model.generate(PROMPT, max_tokens=1).collect()
        assert time.monotonic() - begin > 0.6


async def test_an_answer_that_nobody_wants_is_given_up_at_once(path: Path) -> None:
    """Closing the fleet does not wait for a step of hours."""
    slow = attrs.evolve(BOARD, step_s=3600.0)
    begin = time.monotonic()
    async with spanker.open_fleet(2, plan="tp", profile=slow, throttle=True) as fleet:
        model = await fleet.load(path, ctx=64)
        generation = model.generate(PROMPT, max_tokens=4)
        await until(lambda: fleet.devices[0].counters().queued)
        generation.close()
    assert time.monotonic() - begin < 30


async def test_a_profile_comes_from_a_file(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    profiles.save(BOARD, file)
    async with spanker.open_fleet(2, profile=str(file), throttle=True) as fleet:
        assert fleet.profile == BOARD
        assert all(device.pace is not None for device in fleet.devices)
        await fleet.load(path, ctx=64)
        assert "with the board figures" in fleet.plan.reason


def test_asyncio_has_it_too() -> None:
    async def job() -> bool:
        async with spanker.aio.open_fleet(1, profile=BOARD, throttle=True) as fleet:
            return fleet.devices[0].pace is not None

    assert asyncio.run(job())


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("native", "profile native is this machine unthrottled"),
        (attrs.evolve(REV_A, cores=1), "leave cores out"),
        ("nowhere.toml", "cannot read the profile nowhere.toml"),
    ],
)
async def test_what_cannot_be_kept_is_refused_at_once(profile: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async with spanker.open_fleet(1, profile=profile, throttle=True):  # type: ignore[arg-type]
            raise AssertionError("it opened")
