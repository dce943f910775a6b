# SPDX-License-Identifier: Apache-2.0
"""Time limits that hold for others, not for a machine that stands still."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from spanker.actors.patience import Patience, in_time
from spanker.errors import CardLostError


async def test_what_ends_in_time_has_ended(autojump_clock: trio.testing.MockClock) -> None:
    async def job() -> None:
        await trio.sleep(3.9)

    assert await in_time(4.0, job)
    assert trio.current_time() == pytest.approx(3.9)


async def test_what_takes_longer_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    cancelled = []

    async def job() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(trio.current_time())

    assert not await in_time(4.0, job)
    assert cancelled == [pytest.approx(4.0)]


async def test_the_time_begins_anew_with_whatever_comes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    patience = Patience(4.0)

    async def job() -> None:
        for _ in range(5):
            await trio.sleep(3.5)
            patience.came()
        await trio.sleep_forever()

    assert not await patience.with_(job)
    # What came had begun within a piece of the time.
    assert 5 * 3.5 + 4.0 - 1.0 <= trio.current_time() <= 5 * 3.5 + 4.0 + 1.0


async def test_errors_come_out_as_they_are(autojump_clock: trio.testing.MockClock) -> None:
    async def job() -> None:
        raise CardLostError("card 1 is lost", card=1)

    with pytest.raises(CardLostError, match="card 1"):
        await in_time(1.0, job)


async def test_cancelled_from_outside_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    with trio.move_on_after(1.0) as scope:
        await in_time(10.0, trio.sleep_forever)
    assert scope.cancelled_caught and trio.current_time() == pytest.approx(1.0)


async def test_a_machine_that_stands_still_uses_up_no_time() -> None:
    answered = trio.Event()

    async def machine() -> None:
        await trio.sleep(0.01)
        time.sleep(0.5)  # noqa: ASYNC251 - this process gets nothing done
        await trio.sleep(0.01)
        answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine)
        assert await in_time(0.2, answered.wait)


async def test_cancelled_as_it_ends_it_has_ended() -> None:
    """A message that has been sent, or a buffer that has been allocated, must not be forgotten."""
    sent, ended = trio.Event(), []

    async def post() -> None:
        ended.append(await in_time(10.0, sent.wait))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(post)
        await trio.testing.wait_all_tasks_blocked()
        sent.set()
        nursery.cancel_scope.cancel()
    assert ended == [True]
