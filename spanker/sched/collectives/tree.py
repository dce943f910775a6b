# SPDX-License-Identifier: Apache-2.0
"""Binomial trees: the cards that have something double in each of ceil(log2 n) steps.

    broadcast        ceil(log2 n) steps     DATA n - 1 times in all
    all-reduce       2 ceil(log2 n) steps   DATA 2(n - 1) times in all: to card 0 and back
    all-gather       2 ceil(log2 n) steps   shares to card 0, then to everyone what it lacks
    reduce-scatter   2 ceil(log2 n) steps   the same backwards
    barrier          2 ceil(log2 n) steps   2(n - 1) tokens

Card root + v stands below card root + v - (lowest bit of v), and above the cards from it up to
the next multiple of that bit: any number of cards, the last subtrees are smaller.
"""

from __future__ import annotations

from spanker.sched.collectives.compose import (
    averaged,
    averaged_shares,
    move,
    tokens,
    transposed,
)
from spanker.sched.collectives.plan import Buffer, Phase, Region
from spanker.sched.collectives.task import Task


def broadcast(task: Task) -> list[Phase]:
    return [
        Phase(tuple(move(a, b, task.whole) for a, b in step))
        for step in _downwards(task.n, task.root)
    ]


def all_reduce(task: Task) -> list[Phase]:
    down = broadcast(task)
    return transposed(down, task.elements) + averaged(task, {task.root: task.whole}) + down


def all_gather(task: Task) -> list[Phase]:
    n, down = task.n, _downwards(task.n, 0)

    def below(card: int) -> tuple[int, int]:
        """Where in DATA the shares of a card and all below it start and end."""
        end = min(card + (card & -card), n)
        return task.shares[card].start, task.shares[end - 1].stop

    def theirs(card: int) -> Region:
        return Region(Buffer.DATA, *below(card))

    def the_rest(card: int) -> tuple[Region, Region]:
        start, stop = below(card)
        return Region(Buffer.DATA, 0, start), Region(Buffer.DATA, stop, task.elements)

    return [
        *(Phase(tuple(move(b, a, theirs(b)) for a, b in step)) for step in reversed(down)),
        *(Phase(tuple(move(a, b, part) for a, b in step for part in the_rest(b))) for step in down),
    ]


def reduce_scatter(task: Task) -> list[Phase]:
    return transposed(all_gather(task), task.elements) + averaged_shares(task)


def barrier(task: Task) -> list[Phase]:
    down = _downwards(task.n, 0)
    return tokens([*([(b, a) for a, b in step] for step in reversed(down)), *down])


def _downwards(n: int, root: int) -> list[list[tuple[int, int]]]:
    """The (upper, lower) pairs of each step from the root down, the largest subtrees first."""
    steps = []
    for level in reversed(range((n - 1).bit_length())):
        d = 1 << level
        steps.append([((root + v) % n, (root + v + d) % n) for v in range(0, n - d, 2 * d)])
    return steps
