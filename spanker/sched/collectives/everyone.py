# SPDX-License-Identifier: Apache-2.0
"""Everyone folds everything: each card gets the whole contribution of every other, in one step.

    all-reduce   1 step   DATA leaves each card n - 1 times, and TMP holds as much

For little data, where a second step costs more than n/2 times the bytes.  Folds in card order; on a
full mesh.
"""

from __future__ import annotations

from spanker.sched.collectives.compose import averaged, folds_in_order, tmp
from spanker.sched.collectives.plan import Local, Phase, Send
from spanker.sched.collectives.task import Task


def all_reduce(task: Task) -> list[Phase]:
    sends: list[Send] = []
    folds: list[Local] = []
    for card in range(task.n):
        others = [other for other in range(task.n) if other != card]
        rooms = {o: tmp(place * task.elements, task.elements) for place, o in enumerate(others)}
        sends += (Send(other, card, task.whole, room) for other, room in rooms.items())
        folds += folds_in_order(card, task.whole, rooms)
    average = averaged(task, dict.fromkeys(range(task.n), task.whole))
    return [Phase(tuple(sends), tuple(folds)), *average]
