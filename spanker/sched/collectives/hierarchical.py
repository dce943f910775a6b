# SPDX-License-Identifier: Apache-2.0
"""Two levels: groups of cards that are well linked among themselves, and few ways between groups.

    all-gather       2 steps   each share once into each other group, then on inside it
    reduce-scatter   2 steps   the same backwards: folded inside the groups, then across
    all-reduce       4 steps   both
    broadcast        2 steps   DATA once into each other group, then on inside it
    all-to-all       2 steps   inside the group to the card in the receiver's place, then across
    barrier          2 steps   across, then inside

Card number p of a group deals with number p of the other groups, counted round in smaller ones.
It needs all links inside each group and those across between cards of equal places.  Groups that
are not given are neighbours in the order of cards, as near to sqrt(n) as links allow.
"""

from __future__ import annotations

import math
from collections import defaultdict

from spanker.errors import PlanError
from spanker.sched.collectives.compose import averaged_shares, move, tmp, tokens, transposed
from spanker.sched.collectives.direct import kept, out
from spanker.sched.collectives.plan import Phase, Send
from spanker.sched.collectives.task import Graph, Task

Groups = tuple[tuple[int, ...], ...]


def all_gather(task: Task) -> list[Phase]:
    groups = _groups(task)
    return [
        Phase(tuple(move(a, b, task.share(a)) for a, b in _across(groups))),
        Phase(tuple(move(a, b, task.share(c)) for a, b, c in _inside(groups))),
    ]


def reduce_scatter(task: Task) -> list[Phase]:
    return transposed(all_gather(task.backwards()), task.elements) + averaged_shares(task)


def all_reduce(task: Task) -> list[Phase]:
    return reduce_scatter(task) + all_gather(task)


def broadcast(task: Task) -> list[Phase]:
    groups, root, whole = _groups(task), task.root, task.whole
    return [
        Phase(tuple(move(a, b, whole) for a, b in _across(groups) if a == root)),
        Phase(tuple(move(a, b, whole) for a, b, c in _inside(groups) if c == root)),
    ]


def all_to_all(task: Task) -> list[Phase]:
    groups = _groups(task)
    size = task.share(0).size
    first, second = [], []
    taken: defaultdict[int, int] = defaultdict(int)
    for group in groups:
        for source in group:
            for other in groups:
                for place, target in enumerate(other):
                    relay = group[place % len(group)]
                    if other is group and target != source:
                        first.append(Send(source, target, task.share(target), out(task, source)))
                    elif other is not group and relay == source:
                        second.append(Send(source, target, task.share(target), out(task, source)))
                    elif other is not group:
                        room = tmp(taken[relay], size)
                        taken[relay] += size
                        first.append(Send(source, relay, task.share(target), room))
                        second.append(Send(relay, target, room, out(task, source)))
    return [Phase(tuple(first), kept(task)), Phase(tuple(second))]


def barrier(task: Task) -> list[Phase]:
    groups = _groups(task)
    inside = dict.fromkeys((a, b) for a, b, _ in _inside(groups))
    return tokens([_across(groups), inside])


def _across(groups: Groups) -> list[tuple[int, int]]:
    """Every card, and the card of each other group that hears from it."""
    return [
        (card, other[place % len(other)])
        for group in groups
        for place, card in enumerate(group)
        for other in groups
        if other is not group
    ]


def _inside(groups: Groups) -> list[tuple[int, int, int]]:
    """(a, b, c): b learns from a of its group what a has from card c, which may be a itself."""
    has = {card: [card] for group in groups for card in group}
    for source, card in _across(groups):
        has[card].append(source)
    return [(a, b, c) for group in groups for a in group for b in group if a != b for c in has[a]]


def _groups(task: Task) -> Groups:
    if task.groups:
        return task.groups
    n = task.n
    if n <= 2:
        return (tuple(range(n)),)
    sizes = sorted(range(1, n + 1), key=lambda size: abs(size - math.sqrt(n)))
    for size in sizes:
        groups = tuple(tuple(range(i, min(i + size, n))) for i in range(0, n, size))
        if 1 < len(groups) < n and _linked(task.graph, groups):
            return groups
    raise PlanError(
        f"no groups of neighbours among {n} cards have the links inside and between them that "
        "algorithm 'hierarchical' needs; give groups=, or use algorithm 'routed'"
    )


def _linked(graph: Graph, groups: Groups) -> bool:
    pairs = _across(groups) + [(a, b) for a, b, _ in _inside(groups)]
    return graph.links.issuperset(pairs)
