# SPDX-License-Identifier: Apache-2.0
"""Pipelined chains: DATA in c chunks, each of them one card behind the chunk before.

    all-reduce       c + 2n - 3 steps   DATA once along the cards, folded on the way, once back
    reduce-scatter   c + 2n - 3 steps   the same, but a result goes back to its owner only
    broadcast        c + n - 2 steps    DATA once over each link of a chain that starts at the root

Contributions are folded in card order, as sums of floats must be: card i adds its own to what
cards 0 to i - 1 have made.  So card i needs a link to i + 1; results go back over the links from
i + 1 to i or, where these are missing, on from the last card to the first and round again.  TMP
holds one chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from spanker.sched.collectives.compose import chunks, cut, move, side_by_side, tmp
from spanker.sched.collectives.plan import Divide, Fold, Phase, ReduceOp, Region, Send
from spanker.sched.collectives.task import Graph, Task


def all_reduce(task: Task) -> list[Phase]:
    way_back = _way_back(task.graph)
    return _pipeline(_folded(task, part, way_back) for part in chunks(task))


def reduce_scatter(task: Task) -> list[Phase]:
    way_back = _way_back(task.graph)
    longest = -(-task.elements // task.chunks)
    return _pipeline(
        _folded(task, part, way_back[: way_back.index(owner) + 1])
        for owner in range(task.n)
        for part in cut(task.share(owner), longest)
    )


def broadcast(task: Task) -> list[Phase]:
    chain = task.graph.chain(task.root)
    return _pipeline(_along(chain, part) for part in chunks(task))


def _folded(task: Task, part: Region, way_back: tuple[int, ...]) -> list[Phase]:
    """One chunk goes along all cards, and its result from the last along `way_back`."""
    last, room = task.n - 1, tmp(0, part.size)
    steps = [Phase((Send(i, i + 1, part, room),), (Fold(i + 1, part, room),)) for i in range(last)]
    if task.op is ReduceOp.AVG:
        done = steps.pop() if steps else Phase()
        steps.append(Phase(done.sends, (*done.local, Divide(last, part))))
    return steps + _along(way_back, part)


def _along(way: tuple[int, ...], part: Region) -> list[Phase]:
    return [Phase((move(a, b, part),)) for a, b in itertools.pairwise(way)]


def _way_back(graph: Graph) -> tuple[int, ...]:
    """From the last card to all others: down the chain if it has the links, else round the ring."""
    down = tuple(reversed(range(graph.n)))
    if graph.links.issuperset(itertools.pairwise(down)):
        return down
    return down[0], *reversed(down[1:])


def _pipeline(chunks: Iterable[list[Phase]]) -> list[Phase]:
    """The steps of each chunk, starting a phase after those of the chunk before."""
    return side_by_side(*([Phase()] * late + steps for late, steps in enumerate(chunks)))
