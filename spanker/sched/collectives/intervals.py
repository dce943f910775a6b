# SPDX-License-Identifier: Apache-2.0
"""Buffers as intervals of symbols: what each holds, and what of it is wanted.

Costs go with the number of intervals, never with that of elements.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple


class Value(NamedTuple):
    """In an interval of a buffer, element e holds contributions, folded, to element e + shift.

    `cards` is a bit for the position of each card that contributed.
    """

    cards: int
    shift: int
    divided: bool


class Piece(NamedTuple):
    start: int
    stop: int
    value: Value


class Memory:
    """A buffer as disjoint intervals in order, neighbours that continue each other joined."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.pieces: list[Piece] = []

    def read(self, start: int, stop: int) -> tuple[list[Piece], int]:
        """The pieces of [start, stop), cut to it, up to the first gap, and where that is."""
        found = []
        at = start
        for i in range(max(bisect_right(self.starts, start) - 1, 0), len(self.pieces)):
            piece = self.pieces[i]
            if piece.stop <= at:
                continue
            if piece.start > at or at >= stop:
                break
            end = min(piece.stop, stop)
            found.append(Piece(at, end, piece.value))
            at = end
        return found, at

    def write(self, start: int, stop: int, new: list[Piece]) -> None:
        """Puts `new`, which covers it in order, in the place of [start, stop)."""
        pieces = self.pieces
        first = max(bisect_right(self.starts, start) - 1, 0)
        while first < len(pieces) and pieces[first].stop < start:
            first += 1
        last = bisect_right(self.starts, stop)
        around = pieces[first:last]
        before = [Piece(p.start, min(p.stop, start), p.value) for p in around if p.start < start]
        after = [Piece(max(p.start, stop), p.stop, p.value) for p in around if p.stop > stop]
        joined: list[Piece] = []
        for p in (*before, *new, *after):
            if joined and joined[-1].stop == p.start and joined[-1].value == p.value:
                joined[-1] = Piece(joined[-1].start, p.stop, p.value)
            else:
                joined.append(p)
        pieces[first:last] = joined
        self.starts[first:last] = [p.start for p in joined]


class Wanted:
    """Which elements of a buffer have a part in the result, as disjoint intervals in order."""

    def __init__(self) -> None:
        self.edges: list[int] = []  # start, stop, start, stop ...

    def unwanted(self, start: int, stop: int) -> int | None:
        """The first element of [start, stop) that has no part in it."""
        i = bisect_right(self.edges, start)
        if i % 2 == 0:
            return start
        return None if stop <= self.edges[i] else self.edges[i]

    def set(self, start: int, stop: int, wanted: bool) -> None:
        i, j = bisect_left(self.edges, start), bisect_right(self.edges, stop)
        edges = []
        if (i % 2 == 0) == wanted:
            edges.append(start)
        if (j % 2 == 0) == wanted:
            edges.append(stop)
        self.edges[i:j] = edges


def shifted(pieces: list[Piece], by: int) -> list[Piece]:
    return [
        Piece(start + by, stop + by, value._replace(shift=value.shift - by))
        for start, stop, value in pieces
    ]


def both(ours: list[Piece], theirs: list[Piece]) -> Iterator[tuple[int, int, Value, Value]]:
    """Two rows of pieces of the same elements, cut where either is."""
    i = j = 0
    while i < len(ours):
        a, b = ours[i], theirs[j]
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        yield start, stop, a.value, b.value
        i += a.stop == stop
        j += b.stop == stop
