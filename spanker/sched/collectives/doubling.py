# SPDX-License-Identifier: Apache-2.0
"""Doubling and halving: what a card holds doubles (or halves) in each of ceil(log2 n) steps.

    all-gather                ceil(log2 n) steps     (n - 1)/n of DATA leaves each card
    reduce-scatter, halving   ceil(log2 n) steps     the same
    all-reduce, halving       2 ceil(log2 n) steps   twice that: reduce-scatter, then all-gather
    all-reduce, doubling      log2 n steps, two more where n is no power of two; DATA in each
    all-to-all                ceil(log2 n) steps     about half of DATA leaves each card in each
    barrier                   ceil(log2 n) steps     a token leaves each card in each

Any number of cards: in step k card i deals with card i + 2^k around the circle (Bruck et al.,
"Efficient Algorithms for All-to-All Communications", 1997), which wraps where n is no power of
two.  Only the all-reduce by doubling pairs cards i and i XOR 2^k; there the cards beyond the
largest power of two hand their contribution to a partner first and get the result from it last.
"""

from __future__ import annotations

from collections.abc import Iterator

from spanker.sched.collectives.compose import (
    averaged,
    averaged_shares,
    move,
    tmp,
    tokens,
    transposed,
)
from spanker.sched.collectives.direct import kept, out
from spanker.sched.collectives.plan import Fold, Phase, Region, Send
from spanker.sched.collectives.task import Task


def all_gather(task: Task) -> list[Phase]:
    n = task.n
    return [
        Phase(
            tuple(
                move(i + d if i + d < n else i + d - n, i, task.share(i + d + block))
                for i in range(n)
                for block in range(min(d, n - d))
            )
        )
        for d in _distances(n)
    ]


def reduce_scatter(task: Task) -> list[Phase]:
    return transposed(all_gather(task), task.elements) + averaged_shares(task)


def all_reduce_halving(task: Task) -> list[Phase]:
    return reduce_scatter(task) + all_gather(task)


def all_reduce(task: Task) -> list[Phase]:
    n, whole = task.n, task.whole
    paired = 1 << (n.bit_length() - 1)
    room = tmp(0, task.elements)
    beyond = [(card, card - paired) for card in range(paired, n)]

    def folded(pairs: list[tuple[int, int]]) -> Phase:
        """The second of each pair folds the whole of the first."""
        sends = tuple(Send(a, b, whole, room) for a, b in pairs)
        return Phase(sends, tuple(Fold(b, whole, room) for _, b in pairs))

    return [
        folded(beyond),
        *(folded([(i ^ d, i) for i in range(paired)]) for d in _distances(paired)),
        *averaged(task, dict.fromkeys(range(paired), whole)),
        Phase(tuple(move(partner, card, whole) for card, partner in beyond)),
    ]


def all_to_all(task: Task) -> list[Phase]:
    """What card s has for card s + d travels 2^k cards on for every bit k of d, lowest first."""
    n, size = task.n, task.share(0).size

    def slot(d: int, bits: int) -> Region:
        # Two rooms for each d, by turns: one is sent from while the other is filled.
        return tmp(((bits.bit_count() & 1) * n + d) * size, size)

    phases = [Phase(local=kept(task))]
    for step in _distances(n):
        sends = []
        for d in range(1, n):
            done = d & (step - 1)
            if not d & step:
                continue
            for i in range(n):
                source = (i - done) % n
                what = slot(d, done) if done else task.share(source + d)
                last = done + step == d
                to = out(task, source) if last else slot(d, done + step)
                sends.append(Send(i, (i + step) % n, what, to))
        phases.append(Phase(tuple(sends)))
    return phases


def barrier(task: Task) -> list[Phase]:
    n = task.n
    return tokens([[(i, (i + d) % n) for i in range(n)] for d in _distances(n)])


def _distances(n: int) -> Iterator[int]:
    d = 1
    while d < n:
        yield d
        d *= 2
