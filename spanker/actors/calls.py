# SPDX-License-Identifier: Apache-2.0
"""Calls to a card whose body waits for another process: in a thread, while the event loop goes on.

Bodies that do not wait are called in the event loop's thread, without any of this.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import trio

from spanker.actors.threads import WorkThreads
from spanker.device.base import CardDevice

T = TypeVar("T")


class Calls:
    """The calls to one card, in the order asked.  Ends with `close_device`."""

    def __init__(self, device: CardDevice) -> None:
        self._device = device
        self._thread = WorkThreads("spanker-caller", 1)
        self._turn = trio.Lock()

    async def make(self, call: Callable[[], T]) -> T:
        """Make a call behind those before it; returns and raises what it does.  A checkpoint.
        Cancelled, it is cut short, and the card is lost."""
        async with self._turn:
            return await self._thread.run(call, self._device.cut_short)

    def between(self) -> AbstractAsyncContextManager[None]:
        """Within the block no call is under way, and what the last one brought is known."""
        return self._turn

    async def close_device(self) -> None:
        """Close the card, and end the thread.  For who is shielded: a process that does not end by
        itself is killed after half a second."""
        try:
            await self._thread.run(self._device.close)
        finally:
            self._thread.close()
