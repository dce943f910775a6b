# SPDX-License-Identifier: Apache-2.0
"""From a collective plan to the program of each card, as values; nothing here talks to a card.

A phase becomes an EXCHANGE of all sends and receives of a card, then its local work in order.
Regions become byte ranges of buffers, by names:

    work            arrays that the caller gives       DATA is       OUT is
    all_reduce      data                               data
    broadcast       data                               data
    all_gather      in (a share), data; in place data  data
    reduce_scatter  in, out (a share); in place data   in, and out   where it is the card's share
    all_to_all      in, out                            in            out

TMP is `tmp`.  An input that is not the output too is never written: where a plan would write to
it, the card copies it to `copy` first.

An all-reduce is cut into tiles, one plan after the other in one program: what a tile touches stays
in a core's cache from the first phase to the last, and TMP is as small as a tile.  On two soft
cards of 16 MiB that is 3.2 ms instead of 5.2 (2 cores, measured).  Results of a tile travel in
the same exchange as contributions to the next, so that cards wait for each other once a tile.  A
fast card may be ahead: what it sends waits in the link until the receiver gets there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from spanker.kernels import program as op
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.program import Command, Program, Ref, Transfer
from spanker.sched.collectives.choice import choose
from spanker.sched.collectives.plan import (
    Buffer,
    CollectivePlan,
    Copy,
    Divide,
    Fold,
    Kind,
    Local,
    Phase,
    ReduceOp,
    Region,
)
from spanker.sched.shares import Share, split
from spanker.sched.topology import Topology

# Of DATA: with TMP and what the rings have in flight it fits into a second-level cache.
TILE_BYTES = 256 << 10
# More tiles make programs long, not collectives faster; and making one takes 15 us a command.
TILES_MAX = 128
COMMANDS_MAX = 10_000

_REDUCTIONS = {
    ReduceOp.SUM: Reduction.SUM,
    ReduceOp.AVG: Reduction.SUM,
    ReduceOp.MAX: Reduction.MAX,
    ReduceOp.MIN: Reduction.MIN,
}


@attrs.frozen(cache_hash=True)
class Work:
    """A collective to be done: `elements` is the length of DATA.  Equal works have equal programs.

    `in_place`: an all-gather or reduce-scatter of arrays that have the whole length.
    """

    kind: Kind
    element: Element
    elements: int
    op: ReduceOp | None = None
    root: int | None = None
    in_place: bool = True

    @property
    def ordered(self) -> bool:
        """Whether the order of folding decides the bits."""
        return self.op in (ReduceOp.SUM, ReduceOp.AVG) and self.element.is_float

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the caller's arrays of each card, in the order they are given."""
        if self.kind is Kind.BARRIER:
            return ()
        if self.kind is Kind.ALL_GATHER and not self.in_place:
            return ("in", "data")
        if self.kind is Kind.ALL_TO_ALL or (self.kind is Kind.REDUCE_SCATTER and not self.in_place):
            return ("in", "out")
        return ("data",)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those that hold something new afterwards."""
        return self.arrays[-1:]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Those that must hold something before."""
        return self.arrays[:1]

    def shares(self, cards: int) -> tuple[Share, ...]:
        """Each card's part of DATA."""
        return split(self.elements, cards)

    def array_elements(self, name: str, card: int, cards: int) -> int:
        """The length of one of the caller's arrays."""
        if (self.kind, name) in ((Kind.ALL_GATHER, "in"), (Kind.REDUCE_SCATTER, "out")):
            return self.shares(cards)[card].size
        return self.elements


@attrs.frozen
class CardWork:
    """What one card runs: its program, the bytes of each buffer that it names, by name."""

    program: Program
    array_bytes: dict[str, int]
    own_bytes: dict[str, int]


def plans(work: Work, topology: Topology) -> Iterator[tuple[int, CollectivePlan]]:
    """The plans that do a work one after the other, and where in DATA each begins."""
    element_bytes, cards = work.element.nbytes, len(topology.cards)
    tiles = 1
    if work.kind is Kind.ALL_REDUCE:
        # Of all cards together a tile has some 5 * cards^2 commands.
        most = min(TILES_MAX, COMMANDS_MAX // (5 * cards**2))
        tiles = max(1, min(work.elements * element_bytes // TILE_BYTES, most))
    for tile in split(work.elements, tiles):
        yield (
            tile.start,
            choose(
                work.kind,
                topology,
                tile.size,
                element_bytes,
                op=work.op,
                ordered=work.ordered,
                root=work.root,
            ),
        )


def build(work: Work, topology: Topology, *, meet: bool = False) -> list[CardWork]:
    """The programs of all cards of a topology, which are numbered from 0.

    `meet`: cards reach each other's memory over links that are all up, and do an all-reduce as one
    command.
    """
    cards = len(topology.cards)
    if meet and work.kind is Kind.ALL_REDUCE and cards > 1 and work.elements:
        return [_meeting(work, cards, card) for card in range(cards)]
    made = list(plans(work, topology))
    return [_Builder(work, cards, card, made).build() for card in range(cards)]


def _meeting(work: Work, cards: int, card: int) -> CardWork:
    """All contributions folded in card order, as 'owner' does, and any other plan for what need not
    be in order: the same bits."""
    assert work.op is not None
    command = op.all_reduce(
        work.element,
        _REDUCTIONS[work.op],
        Ref("data"),
        count=work.elements,
        by=cards if work.op is ReduceOp.AVG else 1,
        cards=cards,
        own=card,
    )
    return CardWork(Program((command,), 1, 1, 1), {"data": work.elements * work.element.nbytes}, {})


@attrs.frozen
class _Tile:
    """A phase of a plan whose DATA begins at element `base`."""

    base: int
    plan: CollectivePlan
    phase: Phase


def _schedule(made: Sequence[tuple[int, CollectivePlan]]) -> Iterator[list[_Tile]]:
    """Phases in order, those of a row exchanged together.

    What the last phase of a tile moves within DATA, without local work behind it, may as well go
    with the first sends of the next tile: these touch other elements of DATA, and TMP, which nobody
    needs any more.
    """
    late: list[_Tile] = []
    for base, plan in made:
        for number, phase in enumerate(plan.phases):
            tile = _Tile(base, plan, phase)
            if number and number == len(plan.phases) - 1 and _only_moves_data(phase):
                late = [tile]
            else:
                yield [*late, tile]
                late = []
    if late:
        yield late


def _only_moves_data(phase: Phase) -> bool:
    regions = [region for send in phase.sends for region in (send.what, send.to)]
    return not phase.local and all(region.buffer is Buffer.DATA for region in regions)


class _Builder:
    """One card's program."""

    def __init__(
        self, work: Work, cards: int, card: int, made: list[tuple[int, CollectivePlan]]
    ) -> None:
        self.work = work
        self.cards = cards
        self.card = card
        self.plans = made
        self.share = work.shares(cards)[card]
        self.apart = work.kind is Kind.REDUCE_SCATTER and not work.in_place
        self.base = 0
        # Out of place, DATA is an input that the plan must leave alone but for the card's share.
        self.copied = "in" in work.arrays and "data" not in work.arrays and self._is_written()

    def build(self) -> CardWork:
        commands = list(self._before())
        for together in _schedule(self.plans):
            commands += self._exchange(together)
            for tile in together:
                commands += self._locals(tile)
        if self.copied and self.apart:
            commands.append(self._copy(Ref("out"), self._at("copy", self.share.start), self.share))
        size = self.work.element.nbytes
        tmp = max((plan.tmp_elements for _, plan in self.plans), default=0)
        own = {"tmp": tmp * size, "copy": self.work.elements * size}
        named = {ref.buffer for command in commands for _, ref in command.refs}
        arrays = {
            name: self.work.array_elements(name, self.card, self.cards) * size
            for name in self.work.arrays
            if name in named
        }
        own = {name: nbytes for name, nbytes in own.items() if name in named}
        return CardWork(Program(tuple(commands), 1, 1, 1), arrays, own)

    def _before(self) -> Iterator[Command]:
        whole = Share(0, self.work.elements)
        if self.copied:
            yield self._copy(Ref("copy"), Ref("in"), whole)
        elif self.apart and not self.share.empty:
            yield self._copy(Ref("out"), self._at("in", self.share.start), self.share)
        elif self.work.kind is Kind.ALL_GATHER and not self.work.in_place:
            if not self.share.empty:
                yield self._copy(self._at("data", self.share.start), Ref("in"), self.share)

    def _copy(self, into: Ref, operand: Ref, part: Share) -> Command:
        return op.copy(self.work.element, into, operand, count=part.size)

    # --- where regions are ---

    def _at(self, name: str, element: int) -> Ref:
        return Ref(name, 0, element * self.work.element.nbytes)

    def _ref(self, region: Region) -> Ref:
        if region.buffer is Buffer.TMP:
            return self._at("tmp", region.start)
        if region.buffer is Buffer.OUT:
            return self._at("out", region.start)
        start = self.base + region.start
        if self.copied:
            return self._at("copy", start)
        if "data" in self.work.arrays:
            return self._at("data", start)
        if self.apart and self._within_share(region):
            return self._at("out", start - self.share.start)
        return self._at("in", start)

    def _within_share(self, region: Region) -> bool:
        return self.share.start <= region.start and region.stop <= self.share.stop

    def _is_written(self) -> bool:
        """Whether the plan writes to DATA beyond the share that is kept apart, or knows of it in
        one piece with something else."""
        for _, plan in self.plans:
            for phase in plan.phases:
                written = [s.to for s in phase.sends if s.target == self.card]
                written += [x.into for x in phase.local if x.card == self.card]
                read = [s.what for s in phase.sends if s.source == self.card]
                read += [
                    x.operand
                    for x in phase.local
                    if x.card == self.card and not isinstance(x, Divide)
                ]
                for region in (*written, *read):
                    if region.buffer is not Buffer.DATA:
                        continue
                    kept = self.apart and self._within_share(region)
                    crosses = self.apart and region.overlaps(
                        Region(Buffer.DATA, self.share.start, self.share.stop)
                    )
                    if not kept and (region in written or crosses):
                        return True
        return False

    # --- commands ---

    def _exchange(self, together: Sequence[_Tile]) -> Iterator[Command]:
        size = self.work.element.nbytes
        transfers: list[tuple[int, Transfer]] = []
        for tile in together:
            self.base = tile.base
            for send in tile.phase.sends:
                for card, peer, region in (
                    (send.source, send.target, send.what),
                    (send.target, send.source, send.to),
                ):
                    if card == self.card:
                        ref, nbytes = self._ref(region), region.size * size
                        outgoing = card == send.source
                        transfers.append((peer, Transfer(outgoing, peer, ref, nbytes, True)))
        # To each peer in the order of the plan, but to the next card first: not all to card 0.
        transfers.sort(key=lambda item: (item[0] - self.card) % self.cards)
        yield from op.exchange([transfer for _, transfer in transfers])

    def _locals(self, tile: _Tile) -> Iterator[Command]:
        self.base = tile.base
        for local in tile.phase.local:
            if local.card == self.card:
                yield self._local(tile.plan, local)

    def _local(self, plan: CollectivePlan, local: Local) -> Command:
        element, count = self.work.element, local.into.size
        if isinstance(local, Divide):
            return op.divide(element, self._ref(local.into), count=count, by=len(plan.cards))
        into, operand = self._ref(local.into), self._ref(local.operand)
        if isinstance(local, Copy):
            return op.copy(element, into, operand, count=count)
        assert isinstance(local, Fold) and plan.op is not None
        return op.reduce(element, _REDUCTIONS[plan.op], into, operand, count=count)
