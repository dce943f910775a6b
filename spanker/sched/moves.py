# SPDX-License-Identifier: Apache-2.0
"""What the cards of a plan send each other within a step: rows, one for each token.

all-gather   1 step, every card sends its share of a row straight to every other
handover     1 step, whole rows from the cards of a stage to those of the next
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import attrs

from spanker.sched.shares import Share
from spanker.values import Value


@attrs.frozen(eq=False, repr=False)
class Move(Value):
    """Elements [part.start, part.stop) of every row go from card `source` to card `target`,
    to the same place."""

    source: int
    target: int
    part: Share


@functools.lru_cache(maxsize=64)
def all_gather(cards: tuple[int, ...], shares: tuple[Share, ...]) -> tuple[Move, ...]:
    """After it every card holds the whole row; card cards[i] contributes shares[i]."""
    return tuple(
        Move(source, target, share)
        for source, share in zip(cards, shares, strict=True)
        if not share.empty
        for target in cards
        if target != source
    )


def handover(sources: Sequence[int], targets: Sequence[int], row: int) -> tuple[Move, ...]:
    """Every target gets the whole row of `row` elements that each source holds."""
    return tuple(
        Move(sources[i % len(sources)], target, Share(0, row)) for i, target in enumerate(targets)
    )
