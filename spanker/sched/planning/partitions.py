# SPDX-License-Identifier: Apache-2.0
"""Dealing cards to replicas, where of cards that are alike only the number counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Groups = tuple[tuple[int, ...], ...]
"""Cards in classes of those that are alike."""


def deals(groups: Sequence[Sequence[int]], count: int) -> list[Groups]:
    """The cards dealt to `count` replicas, each class as evenly as can be, so that whoever gets one
    more of a class gets one less of the next."""
    out: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
    turn = 0
    for group in groups:
        extra = len(group) % count
        lucky = {(turn + i) % count for i in range(extra)}
        turn = (turn + extra) % count
        at = 0
        for replica in range(count):
            size = len(group) // count + (replica in lucky)
            if size:
                out[replica].append(tuple(group[at : at + size]))
            at += size
    return [tuple(classes) for classes in out]


def every_deal(groups: Sequence[Sequence[int]], most: int) -> Iterator[list[Groups]]:
    """Every way to deal some or all of the cards to 2 up to `most` replicas, none empty; ways that
    differ in the order of replicas, or in which of cards alike, count once."""
    cards = [(kind, card) for kind, group in enumerate(groups) for card in group]
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for hands in _hands(cards, most):
        if len(hands) < 2:
            continue
        counts = tuple(
            sorted(
                tuple(sum(k == kind for k, _ in hand) for kind in range(len(groups)))
                for hand in hands
            )
        )
        if counts in seen:
            continue
        seen.add(counts)
        yield _dealt(groups, counts)


def _hands(cards: Sequence[tuple[int, int]], most: int) -> Iterator[list[list[tuple[int, int]]]]:
    """Every way to put some of the cards into up to `most` heaps."""
    if not cards:
        yield []
        return
    for hands in _hands(cards[:-1], most):
        yield hands
        for i in range(len(hands)):
            yield [*hands[:i], [*hands[i], cards[-1]], *hands[i + 1 :]]
        if len(hands) < most:
            yield [*hands, [cards[-1]]]


def _dealt(groups: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> list[Groups]:
    """Replicas with so many cards of each class, the lowest numbers first."""
    at = [0] * len(groups)
    out = []
    for wanted in counts:
        own = []
        for kind, count in enumerate(wanted):
            if count:
                own.append(tuple(groups[kind][at[kind] : at[kind] + count]))
            at[kind] += count
        out.append(tuple(own))
    return out
