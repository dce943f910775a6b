# SPDX-License-Identifier: Apache-2.0
"""KV pages that go along when a model goes to another plan: which sequence gets which pages there,
and where a page's keys and values lie in the pools of a card.

A page of one KV head in one layer is two ranges of bytes, its keys and its values, the same bytes
on whatever card and under whatever number.  Layout: docs/api/kernel-semantics.md, "KV cache".
Moving them is resharding.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import attrs

from spanker.sched.copies import ward_heads
from spanker.sched.layout import kv_buffers
from spanker.sched.plan import Limits, ModelShape, Plan
from spanker.sched.shares import Share
from spanker.values import Value


@attrs.frozen(eq=False, repr=False)
class Table(Value):
    """The KV pages of a sequence, of which the first `used` have positions that are computed."""

    pages: tuple[int, ...]
    used: int


Seats = tuple[tuple[int, ...], ...]
"""The new pages of each of some tables; none for one that is to be computed again."""


def seated(tables: Sequence[Table], pages: int) -> Seats:
    """Where tables go in pools of so many pages: each keeps its numbers if they are all there, else
    they move together from the first page on, in order, as long as there is room."""
    if all(page < pages for table in tables for page in table.pages):
        return tuple(table.pages for table in tables)
    seats, at = [], 0
    for table in tables:
        count = len(table.pages) if at + len(table.pages) <= pages else 0
        seats.append(tuple(range(at, at + count)))
        at += count
    return tuple(seats)


@attrs.frozen(eq=False, repr=False)
class Run(Value):
    """Pages `before` and the `count - 1` after it become `after` and those after it."""

    before: int
    after: int
    count: int


def runs(tables: Sequence[Table], seats: Seats) -> tuple[Run, ...]:
    """What moves of these tables, in as few runs as there can be: used pages of those that have a
    seat, by their new numbers."""
    moved = sorted(
        (after, before)
        for table, seat in zip(tables, seats, strict=True)
        for before, after in zip(table.pages[: table.used], seat, strict=False)
    )
    found: list[Run] = []
    for after, before in moved:
        if found and (before, after) == _next(found[-1]):
            found[-1] = attrs.evolve(found[-1], count=found[-1].count + 1)
        else:
            found.append(Run(before, after, 1))
    return tuple(found)


def _next(run: Run) -> tuple[int, int]:
    return run.before + run.count, run.after + run.count


@attrs.frozen(eq=False, repr=False)
class PageMove(Value):
    """Pages of pools as in limits `before` go to pools as in limits `after`.  `relayed`: where no
    link leads the host does."""

    before: Limits
    after: Limits
    runs: tuple[Run, ...]
    relayed: bool = False

    @classmethod
    def of(
        cls,
        tables: Sequence[Table],
        seats: Seats,
        before: Limits,
        after: Limits,
        *,
        relayed: bool = False,
    ) -> PageMove | None:
        """What is to be moved of these tables, None where it is nothing."""
        moved = runs(tables, seats)
        return cls(before, after, moved, relayed) if moved else None

    @property
    def stays(self) -> bool:
        """Whether every page keeps its number."""
        return all(run.before == run.after for run in self.runs)


# --- pools ---------------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Pool(Value):
    """A card's keys and values of one layer: for each of its KV `heads` two planes of `pages`, keys
    and values, a page of `page_bytes` each."""

    buffer: str
    layer: int
    heads: Share
    pages: int
    page_bytes: int

    @property
    def nbytes(self) -> int:
        return 2 * self.heads.size * self.pages * self.page_bytes

    def offset(self, head: int, plane: int, page: int) -> int:
        """Where a page of a head's keys (plane 0) or values (1) lies."""
        row = 2 * (head - self.heads.start) + plane
        return (row * self.pages + page) * self.page_bytes

    def at(self, offset: int) -> tuple[int, int, int]:
        """(head, plane, page) of what lies there."""
        row, page = divmod(offset // self.page_bytes, self.pages)
        return self.heads.start + row // 2, row % 2, page

    def planes(self) -> Iterator[tuple[int, int]]:
        """(head, plane) of all planes, in order."""
        return itertools.product(range(self.heads.start, self.heads.stop), range(2))


def pools(shape: ModelShape, plan: Plan, card: int, limits: Limits) -> tuple[Pool, ...]:
    """The pools that a card has under a plan, its own, then copies of another card's."""
    _, share = plan.place(card)
    heads = {"kv": share.kv_heads(shape.group), "kv_copy": ward_heads(shape, plan, card)}
    page_bytes = limits.page_positions * shape.head_dim * 2
    found = []
    for spec in kv_buffers(shape, plan, card, limits):
        name, _, layer = spec.name.partition(".")
        found.append(Pool(spec.name, int(layer), heads[name], limits.kv_pages, page_bytes))
    return tuple(found)
