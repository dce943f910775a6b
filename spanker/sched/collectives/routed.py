# SPDX-License-Identifier: Apache-2.0
"""Routed: shortest ways over whatever links there are.  Works on every connected graph.

With d the longest shortest way (1 on a full mesh, n/2 round a ring, n - 1 along a line):

    all-gather       d steps        each share travels down a tree of its own
    reduce-scatter   d steps        the same backwards; d steps by ways where order matters
    all-reduce       2d steps       both
    broadcast        c + d' - 1     DATA in c chunks, down a tree of depth d'
    all-to-all       d steps        every card forwards what is not for it
    barrier          2d' steps      tokens up a tree of depth d', and down again

Where contributions must be folded in card order, they travel raw to the owner of their share.
What is on its way waits in TMP between two hops, on no card more than twice DATA: where that would
be exceeded, as in the middle of a star, more steps are taken.
"""

from __future__ import annotations

from collections import Counter

from spanker.sched.collectives.compose import (
    averaged_shares,
    chunks,
    cut,
    folds_in_order,
    move,
    side_by_side,
    tmp,
    tokens,
    transposed,
)
from spanker.sched.collectives.direct import kept, out
from spanker.sched.collectives.plan import Phase, Region
from spanker.sched.collectives.routes import Schedule, Tree, Ways, shortest_tree, shortest_trees
from spanker.sched.collectives.task import Task

# Of what is on its way a card holds so many times DATA at most.
_WAITING = 2


def all_gather(task: Task) -> list[Phase]:
    trees = shortest_trees(task.graph, [share.size for share in task.shares])
    return side_by_side(*(down(tree, task.share(i)) for i, tree in enumerate(trees)))


def reduce_scatter(task: Task) -> list[Phase]:
    if task.ordered:
        return _owners_fold(task) + averaged_shares(task)
    return transposed(all_gather(task.backwards()), task.elements) + averaged_shares(task)


def all_reduce(task: Task) -> list[Phase]:
    return reduce_scatter(task) + all_gather(task)


def broadcast(task: Task) -> list[Phase]:
    tree = shortest_tree(task.graph, task.root, task.elements, Counter())
    # Only a card that hands on gains from getting less at a time.
    parts = chunks(task) if len(tree) > 1 else [task.whole]
    return side_by_side(*([Phase()] * late + down(tree, part) for late, part in enumerate(parts)))


def all_to_all(task: Task) -> list[Phase]:
    ways, schedule, size = Ways(task.graph), Schedule(), task.share(0).size
    schedule.work(0, *kept(task))
    for a in range(task.n):
        for b in range(task.n):
            if a != b:
                way = ways.way(a, b, size)
                schedule.carry_within(_WAITING * task.elements, 0, way, task.share(b), out(task, a))
    return schedule.phases()


def barrier(task: Task) -> list[Phase]:
    up = shortest_tree(task.graph.transposed(), 0, 1, Counter())
    return tokens(
        [
            *([(b, a) for a, b in step] for step in reversed(up)),
            *shortest_tree(task.graph, 0, 1, Counter()),
        ]
    )


def down(tree: Tree, part: Region) -> list[Phase]:
    """`part` from the root of a tree to all below it."""
    return [Phase(tuple(move(a, b, part) for a, b in step)) for step in tree]


def _owners_fold(task: Task) -> list[Phase]:
    ways = Ways(task.graph)
    # Of a share much larger than others a piece at a time, in the same rooms.
    longest = -(-task.elements // task.n)
    schedule = Schedule(base=(task.n - 1) * longest)
    for owner in range(task.n):
        others = [card for card in range(task.n) if card != owner]
        first = 0
        for part in cut(task.share(owner), longest):
            rooms = {card: tmp(i * longest, part.size) for i, card in enumerate(others)}
            last = first
            for card, room in rooms.items():
                way = ways.way(card, owner, part.size)
                arrives = schedule.carry_within(_WAITING * task.elements, first, way, part, room)
                last = max(last, arrives)
            schedule.work(last, *folds_in_order(owner, part, rooms))
            first = last + 1
    return schedule.phases()
