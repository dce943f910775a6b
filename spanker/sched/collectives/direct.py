# SPDX-License-Identifier: Apache-2.0
"""Direct algorithms on a full mesh: every card sends its part straight to every other.

    all-gather       1 step    (n - 1)/n of DATA leaves each card; every link carries one share
    reduce-scatter   1 step    the same, any order of folding
    all-reduce       2 steps   twice that
    broadcast        1 step    the root sends DATA n - 1 times
    all-to-all       1 step    (n - 1)/n of DATA leaves each card
    barrier          1 step    n - 1 tokens leave each card

`Move` and what makes them serve the steps of a model, which gather many rows at once.  handover:
1 step, one row per link.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import attrs

from spanker.sched.collectives.compose import averaged_shares, move, tokens, transposed
from spanker.sched.collectives.plan import Buffer, Copy, Phase, Region, Send
from spanker.sched.collectives.task import Task
from spanker.sched.shares import Share


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


# --- moves of a model's step --------------------------------------------------------


@attrs.frozen
class Move:
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


@functools.lru_cache(maxsize=1024)
def all_gather_of(card: int, cards: tuple[int, ...], shares: tuple[Share, ...]) -> tuple[Move, ...]:
    """The moves of `all_gather` that one card takes part in; a model asks for each many times."""
    return tuple(m for m in all_gather(cards, shares) if card in (m.source, m.target))


def handover(sources: Sequence[int], targets: Sequence[int], row: int) -> tuple[Move, ...]:
    """Every target gets the whole row of `row` elements that each source holds."""
    return tuple(
        Move(sources[i % len(sources)], target, Share(0, row)) for i, target in enumerate(targets)
    )
