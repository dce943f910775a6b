# SPDX-License-Identifier: Apache-2.0
"""The owner folds: each card gets all contributions to its share and folds them in card order.

    reduce-scatter   1 step    (n - 1)/n of DATA leaves each card; TMP holds as much
    all-reduce       2 steps   twice that: the shares are gathered directly

For sums of floats, whose order decides the bits.  On a full mesh; 'routed' does the same elsewhere.
"""

from __future__ import annotations

from spanker.sched.collectives import direct
from spanker.sched.collectives.compose import (
    averaged_shares,
    cut,
    folds_in_order,
    side_by_side,
    tmp,
)
from spanker.sched.collectives.plan import Phase, Region, Send
from spanker.sched.collectives.task import Task


def reduce_scatter(task: Task) -> list[Phase]:
    # Of a share much larger than others, a piece at a time: so TMP is never more than DATA.
    longest = -(-task.elements // task.n)
    return side_by_side(
        *(
            [_folded(task, owner, part) for part in cut(task.share(owner), longest)]
            for owner in range(task.n)
        )
    ) + averaged_shares(task)


def all_reduce(task: Task) -> list[Phase]:
    return reduce_scatter(task) + direct.gather(task)


def _folded(task: Task, owner: int, part: Region) -> Phase:
    others = [card for card in range(task.n) if card != owner]
    rooms = {card: tmp(place * part.size, part.size) for place, card in enumerate(others)}
    sends = tuple(Send(card, owner, part, room) for card, room in rooms.items())
    return Phase(sends, tuple(folds_in_order(owner, part, rooms)))
