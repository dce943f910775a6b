# SPDX-License-Identifier: Apache-2.0
"""Direct algorithms on a full mesh: every card sends its part straight to every other.

all-gather       1 step    (n - 1)/n of DATA leaves each card; every link carries one share
reduce-scatter   1 step    the same, any order of folding
all-reduce       2 steps   twice that
broadcast        1 step    the root sends DATA n - 1 times
all-to-all       1 step    (n - 1)/n of DATA leaves each card
barrier          1 step    n - 1 tokens leave each card
"""

from __future__ import annotations

from spanker.sched.collectives.compose import averaged_shares, move, tokens, transposed
from spanker.sched.collectives.plan import Buffer, Copy, Phase, Region, Send
from spanker.sched.collectives.task import Task


def gather(task: Task) -> list[Phase]:
    pairs = _pairs(task.n)
    return [Phase(tuple(move(a, b, task.share(a)) for a, b in pairs))]


def reduce_scatter(task: Task) -> list[Phase]:
    return transposed(gather(task), task.elements) + averaged_shares(task)


def all_reduce(task: Task) -> list[Phase]:
    return reduce_scatter(task) + gather(task)


def broadcast(task: Task) -> list[Phase]:
    others = (card for card in range(task.n) if card != task.root)
    return [Phase(tuple(move(task.root, card, task.whole) for card in others))]


def all_to_all(task: Task) -> list[Phase]:
    pairs = _pairs(task.n)
    sends = tuple(Send(a, b, task.share(b), out(task, a)) for a, b in pairs)
    return [Phase(sends, kept(task))]


def barrier(task: Task) -> list[Phase]:
    return tokens([_pairs(task.n)])


def out(task: Task, source: int) -> Region:
    """Where what comes from `source` ends up in an all-to-all."""
    share = task.share(source)
    return Region(Buffer.OUT, share.start, share.stop)


def kept(task: Task) -> tuple[Copy, ...]:
    """What each card has for itself in an all-to-all."""
    return tuple(Copy(card, out(task, card), task.share(card)) for card in range(task.n))


def _pairs(n: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(n) for b in range(n) if a != b]
