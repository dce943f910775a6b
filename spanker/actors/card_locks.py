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
    """The locks of the cards of one fleet.

    Taken and given back with every small collective, so where nobody waits either costs no more
    than two operations on a set, however many cards there are; a trio.Lock takes 2 us a card.
    """

    def __init__(self, cards: int) -> None:
        # A card that somebody waits for is handed over: it stays taken.
        self._taken = set[int]()
        self._waiting = [trio.lowlevel.ParkingLot() for _ in range(cards)]
        self._waiters = 0

    def add(self) -> None:
        """There is one more card, which nobody has."""
        self._waiting.append(trio.lowlevel.ParkingLot())

    def take_nowait(self, cards: Sequence[int]) -> bool:
        """Take the cards if nobody has any of them."""
        if not self._taken.isdisjoint(cards):
            return False
        self._taken.update(cards)
        return True

    async def take(self, cards: Sequence[int]) -> None:
        """Wait until nobody else has any of the cards.  No checkpoint where they are free."""
        if self.take_nowait(cards):
            return
        got: list[int] = []
        try:
            for card in sorted(cards):
                if card in self._taken:
                    await self._handed_over(card)
                else:
                    self._taken.add(card)
                got.append(card)
        except BaseException:
            self.give_back(got)
            raise

    async def _handed_over(self, card: int) -> None:
        self._waiters += 1
        try:
            await self._waiting[card].park()
        finally:
            self._waiters -= 1

    def give_back(self, cards: Sequence[int]) -> None:
        """The end of what `take` began."""
        if not self._waiters:
            self._taken.difference_update(cards)
            return
        for card in cards:
            if not self._waiting[card].unpark():
                self._taken.remove(card)

    @contextlib.asynccontextmanager
    async def holding(self, cards: Sequence[int]) -> AsyncIterator[None]:
        """Within the block nobody else has any of the cards."""
        await self.take(cards)
        try:
            yield
        finally:
            self.give_back(cards)

    def taken(self, card: int) -> bool:
        """Whether somebody has the card."""
        return card in self._taken

    def wanted(self, cards: Sequence[int]) -> bool:
        """Whether somebody waits for one of the cards."""
        return any(self._waiting[card] for card in cards)
