# SPDX-License-Identifier: Apache-2.0
"""Collective operations as values: who sends what to whom, in which order, and what is folded.

A plan is a row of phases.  In each, a card first makes its sends and takes what is sent to it, then
does its local work; then it goes on to the next phase, whether others have got there or not.  Sends
read memory as the phases before have left it, and what a card receives or sends in one phase must
not overlap.  Algorithms that make plans are one short file each beside this one;
spanker/sched/verify.py proves a plan before it may run.

Every card has three buffers of elements: DATA, the caller's own; OUT, the result of an all-to-all;
TMP, scratch of `tmp_elements`.  What is in them before and after:

    kind             DATA before                     after
    all_reduce       the card's contribution         DATA: all contributions folded
    reduce_scatter   the card's contribution         DATA[share of the card]: folded; the rest open
    all_gather       DATA[share of the card]: its    DATA: every card's share
    broadcast        of the root: the value          DATA: the value
    all_to_all       share j is for card j           OUT: share i (of the receiver's) from card i
    barrier          nothing                         nothing; every card heard of every other

The shares of an all_to_all are all equally long.  A barrier's messages are TMP[0, 1), whatever it
holds: to the card, a transfer of nothing is done before anyone was heard of.
"""

from __future__ import annotations

import enum

import attrs

from spanker.errors import PlanError
from spanker.sched.shares import Share

VERSION = 1


class Kind(enum.Enum):
    """What a plan achieves."""

    ALL_REDUCE = "all-reduce"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_GATHER = "all-gather"
    BROADCAST = "broadcast"
    ALL_TO_ALL = "all-to-all"
    BARRIER = "barrier"


class ReduceOp(enum.Enum):
    """How contributions are folded.  AVG is SUM, divided by the number of cards last."""

    SUM = "sum"
    AVG = "avg"
    MAX = "max"
    MIN = "min"


class Buffer(enum.Enum):
    """A card's memory in a plan."""

    DATA = "data"
    OUT = "out"
    TMP = "tmp"


@attrs.frozen
class Region:
    """Elements [start, stop) of a buffer of some card."""

    buffer: Buffer
    start: int
    stop: int

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise PlanError(f"a region needs 0 <= start <= stop, got {self.start} to {self.stop}")

    @property
    def size(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Region) -> bool:
        return self.buffer is other.buffer and (
            max(self.start, other.start) < min(self.stop, other.stop)
        )


@attrs.frozen
class Send:
    """`what` of card `source` goes to `to` of card `target`, over the link that joins them."""

    source: int
    target: int
    what: Region
    to: Region


@attrs.frozen
class Fold:
    """On `card`: into = into op operand, element by element, rounded once."""

    card: int
    into: Region
    operand: Region


@attrs.frozen
class Copy:
    """On `card`: into = operand."""

    card: int
    into: Region
    operand: Region


@attrs.frozen
class Divide:
    """On `card`: into = into / number of cards of the plan."""

    card: int
    into: Region


Local = Fold | Copy | Divide


@attrs.frozen
class Phase:
    """Sends that go side by side, then local work in the order given."""

    sends: tuple[Send, ...] = ()
    local: tuple[Local, ...] = ()


@attrs.frozen
class CollectivePlan:
    """A collective over `cards`, in this order; `elements` is the length of DATA.

    `shares`: each card's part of DATA (reduce_scatter, all_gather, all_to_all), else ().  `op` for
    the reductions; `ordered` says that contributions must be folded in the order of `cards`, one
    after the other from the first (float SUM and AVG); otherwise any order and grouping is right.
    `root`: the card that broadcasts.
    """

    kind: Kind
    algorithm: str
    cards: tuple[int, ...]
    elements: int
    phases: tuple[Phase, ...]
    shares: tuple[Share, ...] = ()
    op: ReduceOp | None = None
    ordered: bool = False
    root: int | None = None
    tmp_elements: int = 0

    @property
    def out_elements(self) -> int:
        """The length of OUT."""
        return self.elements if self.kind is Kind.ALL_TO_ALL else 0
