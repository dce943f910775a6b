# SPDX-License-Identifier: Apache-2.0
"""The assertion helpers hold where they should, and fail, saying what, where they should."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

import spanker
from spanker.errors import CardLostError
from spanker.testing import (
    FaultPlan,
    Injection,
    assert_same_answer,
    faulty_fleet,
    nothing_leaked,
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spanker.testing.assertions.SETTLE_S", 0.3)


# --- nothing is left ------------------------------------------------------------------------


async def test_a_fleet_leaves_nothing(tiny_model: Path) -> None:
    async with nothing_leaked():
        async with faulty_fleet("soft:3", "kill 1@token:5", plan="tp") as (fleet, injection):
            model = injection.watch(await fleet.load(tiny_model))
            async with nothing_leaked(fleet):
                await model.generate("Hello", max_tokens=10, ignore_eos=True).collect()
                # What collectives keep, and models that are loaded, are no leaks.
                await fleet.load(tiny_model)
            assert len(fleet.health().cards) == 2


async def test_what_is_left_is_told(tiny_model: Path) -> None:
    ends = os.pipe()
    spare: list[int] = []
    over = threading.Event()

    def wait() -> None:
        over.wait()

    try:
        with pytest.raises(AssertionError, match=r"left behind: descriptors \d+: "):
            async with nothing_leaked():
                spare.append(os.dup(ends[0]))
        thread = threading.Thread(target=wait, name="forgotten")
        with pytest.raises(AssertionError, match="left behind: threads forgotten"):
            async with nothing_leaked():
                thread.start()
        over.set()
        thread.join()
    finally:
        for fd in (*ends, *spare):
            os.close(fd)
    async with trio.open_nursery() as nursery:
        with pytest.raises(AssertionError, match="left behind: 1 tasks"):
            async with nothing_leaked():
                nursery.start_soon(trio.sleep_forever)
        nursery.cancel_scope.cancel()


async def test_what_is_left_on_a_fleet_is_told(tiny_model: Path) -> None:
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(tiny_model)
        handle = 0
        with pytest.raises(AssertionError, match="left behind: 4,096 bytes on card 1"):
            async with nothing_leaked(fleet):
                handle = fleet.devices[1].alloc(4096)
        fleet.devices[1].free(handle)
        generation = model.generate("Hello", max_tokens=200, ignore_eos=True)
        generation.close()
        with pytest.raises(AssertionError, match=r"left behind: \d+ KV pages; 1 sequences"):
            async with nothing_leaked(fleet):
                generation = model.generate("Hello", max_tokens=200, ignore_eos=True)
                await anext(generation)
        generation.close()


async def test_an_error_in_the_block_stays_what_it_is() -> None:
    spare = -1
    with pytest.raises(KeyError):
        async with nothing_leaked():
            spare = os.dup(0)
            raise KeyError("mine")
    os.close(spare)


# --- the same answer ------------------------------------------------------------------------


async def use(model: spanker.Model) -> str:
    async with model.generate("Hello", max_tokens=20, ignore_eos=True, logits=True) as generation:
        return await generation.collect()


async def test_the_same_answer(tiny_model: Path) -> None:
    injection = await assert_same_answer("soft:3", use, "kill 1@token:5", model=tiny_model)
    assert injection.tokens == 20
    assert [line for _, line in injection.story] == ["kill 1@token:5"]


async def test_a_fleet_may_be_made_by_a_function(tiny_model: Path) -> None:
    def make(faults: FaultPlan):  # type: ignore[no-untyped-def]
        return faulty_fleet("soft:2", faults, plan="tp", channel="unix")

    await assert_same_answer(make, use, FaultPlan.parse("kill 1@token:5"), model=tiny_model)
    with pytest.raises(TypeError, match="options go with cards"):
        await assert_same_answer(make, use, "", model=tiny_model, workers=1)


async def test_what_fails_may_fail_only_where_that_was_said(tiny_model: Path) -> None:
    faults = "kill 0@token:5; kill 1@token:5"
    with pytest.raises(CardLostError):
        await assert_same_answer("soft:2", use, faults, model=tiny_model)
    injection = await assert_same_answer("soft:2", use, faults, model=tiny_model, may_fail=True)
    assert 5 <= injection.tokens < 20


async def test_another_answer_is_told(tiny_model: Path) -> None:
    """With faults that change answers: the second fleet gives others."""
    opened = 0

    @asynccontextmanager
    async def other(faults: FaultPlan) -> AsyncIterator[tuple[spanker.Fleet, Injection]]:
        nonlocal opened
        opened += 1
        async with faulty_fleet("soft:1", faults) as both:
            yield both

    async def another_token(model: spanker.Model) -> None:
        await model.generate([opened], max_tokens=3, ignore_eos=True).collect()

    with pytest.raises(AssertionError, match=r"answer 0, token 0: expected \d+, got \d+, with"):
        await assert_same_answer(other, another_token, "slow 0@token:1 x2", model=tiny_model)

    async def other_logits(model: spanker.Model) -> None:
        async for _, rows in model.score([1, 2, opened]):
            assert isinstance(rows, np.ndarray)

    with pytest.raises(AssertionError, match="answer 0, token 0: its logits differ"):
        await assert_same_answer(other, other_logits, "", model=tiny_model)

    async def fewer(model: spanker.Model) -> None:
        await model.generate([1], max_tokens=1 + opened % 2, ignore_eos=True).collect()

    with pytest.raises(AssertionError, match=r"answer 0: expected \d tokens, got \d"):
        await assert_same_answer(other, fewer, "", model=tiny_model)

    async def result(model: spanker.Model) -> int:
        return opened

    with pytest.raises(AssertionError, match=r"expected \d+, got \d+"):
        await assert_same_answer(other, result, "", model=tiny_model)


async def test_an_error_that_is_not_spankers_is_raised(tiny_model: Path) -> None:
    calls = 0

    async def bug(model: spanker.Model) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("of the app")

    with pytest.raises(ZeroDivisionError):
        await assert_same_answer("soft:1", bug, "", model=tiny_model, may_fail=True)
