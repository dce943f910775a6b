# SPDX-License-Identifier: Apache-2.0
"""Virtual time: a clock that jumps over waiting, a scheduler with a seed, and cards driven by both.

Under it trio's time stands still while anything can run, and jumps to the next deadline when
nothing can.  So nothing may wait for what happens outside: a native thread, a socket, a terminal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from spanker.device.virtual.units import to_ps, to_s

if TYPE_CHECKING:
    from spanker.device.virtual.card import VirtualRig

T = TypeVar("T")


def now_ps() -> int:
    """trio's time, of whatever clock."""
    return to_ps(trio.current_time())


async def drive(rig: VirtualRig) -> None:
    """Let the time of a rig pass as trio's does, until cancelled: one sleep for each time at which
    something happens, whatever the number of cards."""

    def due() -> float:
        event = rig.next_event()
        return math.inf if event is None else to_s(event)

    asleep = trio.CancelScope()

    def changed() -> None:
        asleep.deadline = due()

    rig.on_change = changed
    try:
        while True:
            with trio.CancelScope(deadline=due()) as asleep:
                await trio.sleep_forever()
            # As a float the time may lie a little before the event that it stands for.
            event = rig.next_event()
            if event is not None and to_s(event) <= trio.current_time():
                rig.advance(max(event, now_ps()))
    finally:
        rig.on_change = None


@contextlib.asynccontextmanager
async def alongside(run: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run something that lets time pass for others, within the block and to its very end: their
    orderly stop after a cancellation needs it too."""
    scope = trio.CancelScope(shield=True)

    async def shielded() -> None:
        with scope:
            await run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shielded)
        try:
            yield
        finally:
            scope.cancel()


def run_virtual(
    async_fn: Callable[..., Awaitable[T]], *args: object, seed: int = 0, **options: Any
) -> T:
    """`trio.run` in virtual time, which begins at 0.

    The same function does the same in the same order for the same seed, which decides in what
    order tasks run that could run at the same time.  Takes real time only to compute; what waits
    for native threads, soft cards for one, would be overtaken by the clock.  `options` are those of
    `trio.run`.
    """
    # trio's clock for this is in its testing tools, which take a while to import.
    from trio.testing import MockClock

    with _scheduling(seed):
        return trio.run(async_fn, *args, clock=MockClock(autojump_threshold=0), **options)


@contextlib.contextmanager
def _scheduling(seed: int) -> Iterator[None]:
    """The one place that seeds trio's scheduler, with the switches that pytest-trio uses for
    Hypothesis: tasks that can run are sorted by age, then shuffled."""
    run = trio._core._run
    before = run._r.getstate(), run._ALLOW_DETERMINISTIC_SCHEDULING
    run._r.seed(seed)
    run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    try:
        yield
    finally:
        run._r.setstate(before[0])
        run._ALLOW_DETERMINISTIC_SCHEDULING = before[1]  # type: ignore[misc]
