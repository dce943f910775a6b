# SPDX-License-Identifier: Apache-2.0
"""Which card has become slower: by its own history, beside that of the cards it works with.

What a step takes depends on its tokens, so each card's time is taken in proportion to that of the
others in the same step.  That proportion changes only with the cards themselves.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

# Steps that a history is made of; a change must last for two such windows in a row.
WINDOW = 16
# A card that takes so many times as long as before is a straggler; less is noise.
SLOWER = 2.0


class Paces:
    """The paces of the cards of one plan, in steps since it was put on them."""

    def __init__(self, cards: Sequence[int]) -> None:
        self.cards = tuple(cards)
        self._before: list[tuple[float, ...]] = []
        self._now = deque[tuple[float, ...]](maxlen=WINDOW)
        self._steps = 0
        # What the window before would have been told of.
        self._suspected: dict[int, float] = {}

    def anew(self, cards: Sequence[int]) -> Paces:
        """A history that begins, of the cards of another plan or of the same."""
        return Paces(cards)

    def note(self, busy_ns: Sequence[int], slow: Mapping[int, float]) -> dict[int, float]:
        """Take in a step, by card of the plan; `slow` are the factors that are known.  What comes
        back are new ones, of the cards that have become slower or, of known ones, faster; nothing
        for most steps."""
        if len(self.cards) < 2 or not all(busy_ns):
            return {}
        ratios = tuple(
            busy / statistics.median(other for j, other in enumerate(busy_ns) if j != i)
            for i, busy in enumerate(busy_ns)
        )
        if len(self._before) < WINDOW:
            self._before.append(ratios)
            return {}
        self._now.append(ratios)
        self._steps += 1
        if self._steps % WINDOW:
            return {}
        changes = {
            card: statistics.median(now) / statistics.median(before)
            for card, now, before in zip(
                self.cards,
                zip(*self._now, strict=True),
                zip(*self._before, strict=True),
                strict=True,
            )
        }
        suspected, self._suspected = self._suspected, _outside(changes)
        # The one before may have begun before the change.
        changes = {card: changes[card] for card in self._suspected if card in suspected}
        # Of two cards one as fast as ever seems slow beside one that is itself again.
        faster = {
            card: max(slow[card] * change, 1.0)
            for card, change in changes.items()
            if card in slow and change <= 1 / SLOWER
        }
        return faster or {
            card: slow.get(card, 1.0) * change
            for card, change in changes.items()
            if change >= SLOWER
        }


def _outside(changes: Mapping[int, float]) -> dict[int, float]:
    """Those that are more than noise."""
    return {c: x for c, x in changes.items() if x >= SLOWER or x <= 1 / SLOWER}
