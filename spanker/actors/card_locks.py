# SPDX-License-Identifier: Apache-2.0
"""Who may queue steps on which cards: a lock for each card.

Whoever wants several takes them in ascending order and keeps what it has while it waits for the
next, so that no two can wait for each other; each card goes to who came first.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import trio


class CardLocks:
    """The locks of the cards of one fleet.  They belong to the task that has taken them."""

    def __init__(self, cards: int) -> None:
        self._locks = tuple(trio.Lock() for _ in range(cards))
        self._waiting = [0] * cards

    async def take(self, cards: Sequence[int]) -> None:
        """Wait until nobody else has any of the cards.  No checkpoint where they are free."""
        taken = []
        try:
            for card in sorted(cards):
                lock = self._locks[card]
                try:
                    lock.acquire_nowait()
                except trio.WouldBlock:
                    self._waiting[card] += 1
                    try:
                        await lock.acquire()
                    finally:
                        self._waiting[card] -= 1
                taken.append(lock)
        except BaseException:
            for lock in taken:
                lock.release()
            raise

    def give_back(self, cards: Sequence[int]) -> None:
        """The end of what `take` began."""
        for card in cards:
            self._locks[card].release()

    @contextlib.asynccontextmanager
    async def holding(self, cards: Sequence[int]) -> AsyncIterator[None]:
        """Within the block nobody else has any of the cards."""
        await self.take(cards)
        try:
            yield
        finally:
            self.give_back(cards)

    def wanted(self, cards: Sequence[int]) -> bool:
        """Whether somebody waits for one of the cards."""
        return any(self._waiting[card] for card in cards)
