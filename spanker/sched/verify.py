# SPDX-License-Identifier: Apache-2.0
"""Proof of a collective plan without hardware: it runs on intervals of symbols, not on data.

What is proven of a plan that passes:

- It can run: cards, links that are up, regions within their buffers, no more transfers in a phase
  than a card's exchange takes, and nothing received over what is received or sent in that phase.
- It ends.  In phase p of its own a card waits for the sends listed in p and for nothing else, and
  the k-th message from a to b is the k-th that b expects of a, as both take them from one list.
  Of the cards that are not done, those in the lowest phase wait for cards in that phase only, whose
  sends wait for nobody; so one of them goes on.
- It is right: nothing undefined is read, and everyone ends with what the kind promises.  A sum
  has each contribution once; an ordered one is a left fold in card order, where own + partial
  stands for partial + own; an average is divided once, last.
- Nothing is wasted: every element that is sent, folded, copied or divided has a part in the result,
  and TMP is as large as it must be.

A barrier's messages have one element of TMP each, whose value means nothing; what counts is who has
heard of whom.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from typing import NoReturn

from spanker.errors import PlanError
from spanker.sched.collectives.compose import TRANSFERS_MAX, regions_of, tmp_used
from spanker.sched.collectives.intervals import Memory, Piece, Value, Wanted, both, shifted
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
    Send,
)
from spanker.sched.collectives.task import REDUCTIONS, WITH_SHARES
from spanker.sched.topology import MAX_CARDS, Topology


def verify(plan: CollectivePlan, topology: Topology) -> None:
    """Returns if the plan is right on that topology; raises PlanError, naming phase, card, region,
    what was expected and what was found, if it is not."""
    _Proof(plan, topology).run()


class _Proof:
    def __init__(self, plan: CollectivePlan, topology: Topology) -> None:
        self.plan = plan
        self.topology = topology
        self.at = {card: i for i, card in enumerate(plan.cards)}
        self.everyone = (1 << len(plan.cards)) - 1
        self.sizes = {
            Buffer.DATA: plan.elements,
            Buffer.OUT: plan.out_elements,
            Buffer.TMP: plan.tmp_elements,
        }
        self.memory: defaultdict[tuple[int, Buffer], Memory] = defaultdict(Memory)

    def run(self) -> None:
        self._check_fields()
        for number, phase in enumerate(self.plan.phases):
            self._check_phase(number, phase)
        needed = tmp_used(self.plan.phases)
        if self.plan.tmp_elements != needed:
            self._refuse("", f"expected tmp_elements {needed}, got {self.plan.tmp_elements}")
        if self.plan.kind is Kind.BARRIER:
            self._run_barrier()
            return
        self._fill()
        for number, phase in enumerate(self.plan.phases):
            self._run_phase(number, phase)
        self._check_results()
        self._check_use()

    def _refuse(self, where: str, why: str) -> NoReturn:
        plan = self.plan
        name = f"{plan.kind.value} {plan.algorithm!r} over {len(plan.cards)} cards"
        raise PlanError(f"{name}{where}: {why}")

    # Whether it says what it has to, and can run at all.

    def _check_fields(self) -> None:
        plan, n = self.plan, len(self.plan.cards)
        if not 1 <= n <= MAX_CARDS or len(self.at) != n:
            self._refuse("", f"expected 1 to {MAX_CARDS} different cards, got {plan.cards}")
        if not self.at.keys() <= set(self.topology.cards):
            self._refuse("", f"expected cards of {self.topology.cards}, got {plan.cards}")
        if plan.elements < 0 or (plan.kind is Kind.BARRIER and plan.elements):
            self._refuse("", f"expected 0 elements or, but for a barrier, more: {plan.elements}")
        if (plan.op is not None) != (plan.kind in REDUCTIONS):
            self._refuse("", f"expected an op for reductions and only there, got {plan.op}")
        if plan.ordered and plan.op is None:
            self._refuse("", "expected an order for reductions only, got ordered")
        if plan.root not in (plan.cards if plan.kind is Kind.BROADCAST else (None,)):
            self._refuse("", f"expected a card as root of a broadcast only, got {plan.root}")
        self._check_shares()

    def _check_shares(self) -> None:
        plan, n = self.plan, len(self.plan.cards)
        wanted = n if plan.kind in WITH_SHARES else 0
        if len(plan.shares) != wanted:
            self._refuse("", f"expected {wanted} shares, got {len(plan.shares)}")
        at = 0
        for card, share in zip(plan.cards, plan.shares, strict=False):
            if share.start != at:
                self._refuse(f", share of card {card}", f"expected start {at}, got {share.start}")
            at = share.stop
        if wanted and at != plan.elements:
            self._refuse("", f"expected shares of {plan.elements} elements in all, got {at}")
        if plan.kind is Kind.ALL_TO_ALL and len({share.size for share in plan.shares}) != 1:
            self._refuse("", f"expected shares of one size, got {[s.size for s in plan.shares]}")

    def _check_phase(self, number: int, phase: Phase) -> None:
        transfers: Counter[int] = Counter()
        for send in phase.sends:
            self._check_send(number, send)
            transfers.update((send.source, send.target))
        for card, count in transfers.items():
            if count > TRANSFERS_MAX:
                self._refuse(
                    f", phase {number}, card {card}",
                    f"expected at most {TRANSFERS_MAX} sends and receives, got {count}",
                )
        self._check_overlaps(number, phase)
        for local in phase.local:
            self._check_local(number, local)

    def _check_send(self, number: int, send: Send) -> None:
        where = f", phase {number}, send {send.source} -> {send.target}"
        for card in (send.source, send.target):
            if card not in self.at:
                self._refuse(where, f"expected cards of the plan, {self.plan.cards}, got {card}")
        if not self.topology.is_up(send.source, send.target):
            self._refuse(where, f"expected a link that is up, {self._link(send)}")
        self._check_bounds(where, send.what, send.to)
        if self.plan.kind is Kind.BARRIER and send.what != Region(Buffer.TMP, 0, 1):
            self._refuse(where, f"expected a barrier's token, tmp[0, 1), got {_name(send.what)}")

    def _link(self, send: Send) -> str:
        for link in self.topology.links:
            if (link.local_sail, link.remote_sail) == (send.source, send.target):
                return f"got one that is {link.state.name}"
        return "got none"

    def _check_bounds(self, where: str, *regions: Region) -> None:
        for region in regions:
            if region.stop > self.sizes[region.buffer]:
                self._refuse(
                    where,
                    f"expected a region of {region.buffer.value}[0, {self.sizes[region.buffer]}), "
                    f"got {_name(region)}",
                )
            if not region.size:
                self._refuse(where, f"expected something to work on, got {_name(region)}")
        if regions[0].size != regions[-1].size:
            self._refuse(
                where,
                f"expected as many elements on both sides, got {_name(regions[0])} and "
                f"{_name(regions[-1])}",
            )

    def _check_overlaps(self, number: int, phase: Phase) -> None:
        received: defaultdict[tuple[int, Buffer], list[tuple[int, int, int]]] = defaultdict(list)
        for send in phase.sends:
            received[send.target, send.to.buffer].append((send.to.start, send.to.stop, send.source))
        for (card, buffer), regions in received.items():
            regions.sort()
            for (start, stop, one), (again, end, other) in itertools.pairwise(regions):
                if again < stop:
                    self._refuse(
                        f", phase {number}, card {card}",
                        f"expected receives side by side, got {buffer.value}[{start}, {stop}) "
                        f"from {one} over [{again}, {end}) from {other}",
                    )
        for send in phase.sends:
            regions = received.get((send.source, send.what.buffer), [])
            i = bisect_left(regions, (send.what.stop,)) - 1
            if i >= 0 and regions[i][1] > send.what.start:
                start, stop, other = regions[i]
                self._refuse(
                    f", phase {number}, card {send.source}",
                    f"expected nothing received over {_name(send.what)}, which is sent to "
                    f"{send.target}; got {send.what.buffer.value}[{start}, {stop}) from {other}",
                )

    def _check_local(self, number: int, local: Local) -> None:
        where = f", phase {number}, card {local.card}, {type(local).__name__.lower()}"
        if local.card not in self.at:
            self._refuse(where, f"expected a card of the plan, {self.plan.cards}")
        self._check_bounds(where, *regions_of(local))
        if isinstance(local, Divide):
            allowed = self.plan.op is ReduceOp.AVG
        else:
            allowed = isinstance(local, Copy) or self.plan.op is not None
            if local.into.overlaps(local.operand):
                self._refuse(
                    where,
                    f"expected two regions apart, got {_name(local.into)} and "
                    f"{_name(local.operand)}",
                )
        if not allowed or self.plan.kind is Kind.BARRIER:
            op = self.plan.op.value if self.plan.op else "no"
            self._refuse(where, f"has no place in a {self.plan.kind.value} with {op} reduction")

    # Whether it is right.

    def _fill(self) -> None:
        """What memory holds before: see plan.py."""
        plan = self.plan
        for i, card in enumerate(plan.cards):
            start, stop = 0, plan.elements
            if plan.kind is Kind.ALL_GATHER:
                start, stop = plan.shares[i].start, plan.shares[i].stop
            if stop > start and (plan.kind is not Kind.BROADCAST or card == plan.root):
                piece = Piece(start, stop, Value(1 << i, 0, False))
                self.memory[card, Buffer.DATA].write(start, stop, [piece])

    def _run_phase(self, number: int, phase: Phase) -> None:
        arriving = [
            (s, self._read(f", phase {number}, send {s.source} -> {s.target}", s.source, s.what))
            for s in phase.sends
        ]
        for send, pieces in arriving:
            self._put(send.target, send.to, pieces, send.to.start - send.what.start)
        for local in phase.local:
            where = f", phase {number}, card {local.card}, {type(local).__name__.lower()}"
            self._work(where, local)

    def _work(self, where: str, local: Local) -> None:
        if isinstance(local, Copy):
            pieces = self._read(where, local.card, local.operand)
            self._put(local.card, local.into, pieces, local.into.start - local.operand.start)
            return
        mine = self._read(where, local.card, local.into)
        if isinstance(local, Divide):
            done = [Piece(p.start, p.stop, self._divided(where, local, p)) for p in mine]
        else:
            theirs = shifted(
                self._read(where, local.card, local.operand),
                local.into.start - local.operand.start,
            )
            done = [
                Piece(start, stop, self._folded(where, local, start, stop, a, b))
                for start, stop, a, b in both(mine, theirs)
            ]
        self._put(local.card, local.into, done, 0)

    def _read(self, where: str, card: int, region: Region) -> list[Piece]:
        pieces, end = self.memory[card, region.buffer].read(region.start, region.stop)
        if end < region.stop:
            self._refuse(
                where,
                f"expected {_name(region)} of card {card} to be defined, got nothing at "
                f"{region.buffer.value}[{end}]",
            )
        return pieces

    def _put(self, card: int, region: Region, pieces: list[Piece], by: int) -> None:
        if by:
            pieces = shifted(pieces, by)
        self.memory[card, region.buffer].write(region.start, region.stop, pieces)

    def _divided(self, where: str, local: Divide, piece: Piece) -> Value:
        value = piece.value
        if value.cards != self.everyone or value.divided:
            self._refuse(
                where,
                f"expected {_name(local.into)} to hold all contributions, not yet divided, got "
                f"{self._text(value, piece.start, piece.stop)}",
            )
        return value._replace(divided=True)

    def _folded(self, where: str, local: Fold, start: int, stop: int, a: Value, b: Value) -> Value:
        if a.shift != b.shift or a.divided or b.divided:
            why = "contributions to the same elements, not divided"
        elif a.cards & b.cards:
            why = "no contribution twice"
        elif self.plan.ordered and not (_next_of(a.cards, b.cards) or _next_of(b.cards, a.cards)):
            why = "the contributions of the first cards, and that of the next"
        else:
            return Value(a.cards | b.cards, a.shift, False)
        self._refuse(
            where,
            f"expected {why}, got in {_name(local.into)} {self._text(a, start, stop)} and in "
            f"{_name(local.operand)} {self._text(b, start, stop)}",
        )

    def _text(self, value: Value, start: int, stop: int) -> str:
        """What [start, stop) of a buffer holds, in words."""
        numbers = [str(card) for card, i in self.at.items() if value.cards >> i & 1]
        if len(numbers) > 8:
            numbers[4:-3] = ["..."]
        whose = " + ".join(f"x{number}" if number != "..." else number for number in numbers)
        if value.divided:
            whose = f"({whose})/{len(self.plan.cards)}"
        return f"{whose} of elements [{start + value.shift}, {stop + value.shift})"

    def _check_results(self) -> None:
        plan = self.plan
        divided = plan.op is ReduceOp.AVG
        whole = Region(Buffer.DATA, 0, plan.elements)
        for i, card in enumerate(plan.cards):
            if plan.kind is Kind.ALL_REDUCE:
                self._expect(card, whole, Value(self.everyone, 0, divided))
            elif plan.kind is Kind.BROADCAST:
                root = next(j for c, j in self.at.items() if c == plan.root)
                self._expect(card, whole, Value(1 << root, 0, False))
            elif plan.kind is Kind.REDUCE_SCATTER:
                self._expect(card, _share(plan, i), Value(self.everyone, 0, divided))
            elif plan.kind is Kind.ALL_GATHER:
                for j in range(len(plan.cards)):
                    self._expect(card, _share(plan, j), Value(1 << j, 0, False))
            else:
                for j in range(len(plan.cards)):
                    shift = plan.shares[i].start - plan.shares[j].start
                    self._expect(card, _share(plan, j, Buffer.OUT), Value(1 << j, shift, False))

    def _expect(self, card: int, region: Region, value: Value) -> None:
        pieces = self._read(f", card {card}, in the end", card, region)
        for piece in pieces:
            if piece.value != value:
                self._refuse(
                    f", card {card}, in the end",
                    f"expected {region.buffer.value}[{piece.start}, {piece.stop}) to hold "
                    f"{self._text(value, piece.start, piece.stop)}, got "
                    f"{self._text(piece.value, piece.start, piece.stop)}",
                )

    # Whether all of it is needed: backwards from the results.

    def _check_use(self) -> None:
        plan = self.plan
        wanted: defaultdict[tuple[int, Buffer], Wanted] = defaultdict(Wanted)
        result = Buffer.OUT if plan.kind is Kind.ALL_TO_ALL else Buffer.DATA
        for i, card in enumerate(plan.cards):
            part = Region(result, 0, plan.elements)
            if plan.kind is Kind.REDUCE_SCATTER:
                part = _share(plan, i)
            if part.size:
                wanted[card, result].set(part.start, part.stop, True)

        def check(where: str, card: int, region: Region) -> None:
            unused = wanted[card, region.buffer].unwanted(region.start, region.stop)
            if unused is not None:
                self._refuse(
                    where,
                    f"expected all of {_name(region)} on card {card} to be needed, got nothing "
                    f"that depends on {region.buffer.value}[{unused}]",
                )

        for number in reversed(range(len(plan.phases))):
            phase = plan.phases[number]
            for local in reversed(phase.local):
                where = f", phase {number}, card {local.card}, {type(local).__name__.lower()}"
                check(where, local.card, local.into)
                if isinstance(local, Copy):
                    wanted[local.card, local.into.buffer].set(
                        local.into.start, local.into.stop, False
                    )
                if not isinstance(local, Divide):
                    wanted[local.card, local.operand.buffer].set(
                        local.operand.start, local.operand.stop, True
                    )
            for s in phase.sends:
                check(f", phase {number}, send {s.source} -> {s.target}", s.target, s.to)
            for s in phase.sends:
                wanted[s.target, s.to.buffer].set(s.to.start, s.to.stop, False)
            for s in phase.sends:
                wanted[s.source, s.what.buffer].set(s.what.start, s.what.stop, True)

    def _run_barrier(self) -> None:
        heard = {card: 1 << i for card, i in self.at.items()}
        for phase in self.plan.phases:
            before = dict(heard)
            for send in phase.sends:
                heard[send.target] |= before[send.source]
        for card, whom in heard.items():
            if whom != self.everyone:
                missing = next(c for c, i in self.at.items() if not whom >> i & 1)
                self._refuse(
                    f", card {card}, in the end", f"expected to have heard of card {missing}"
                )


def _name(region: Region) -> str:
    return f"{region.buffer.value}[{region.start}, {region.stop})"


def _share(plan: CollectivePlan, i: int, buffer: Buffer = Buffer.DATA) -> Region:
    return Region(buffer, plan.shares[i].start, plan.shares[i].stop)


def _next_of(first: int, other: int) -> bool:
    """Whether `other` is one card, and `first` all the cards before it."""
    return other == first + 1 and first & other == 0
