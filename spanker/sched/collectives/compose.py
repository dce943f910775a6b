# SPDX-License-Identifier: Apache-2.0
"""Making plans of parts: reductions out of movements, folds in order, tokens, and the last touch.

Works on phases over positions (see task.py).  What a plan is for is the algorithms' business.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from spanker.sched.collectives.plan import (
    Buffer,
    CollectivePlan,
    Divide,
    Fold,
    Kind,
    Local,
    Phase,
    ReduceOp,
    Region,
    Send,
)
from spanker.sched.collectives.task import REDUCTIONS, WITH_SHARES, Task

TRANSFERS_MAX = 512
"""What a card may send and receive in one phase, as its EXCHANGE command takes it."""


def tmp(start: int, size: int) -> Region:
    """TMP[start, start + size)."""
    return Region(Buffer.TMP, start, start + size)


def move(source: int, target: int, part: Region) -> Send:
    """`part` goes to the same place on another card."""
    return Send(source, target, part, part)


def merged(sends: Iterable[Send]) -> tuple[Send, ...]:
    """Sends of one phase without the empty ones, neighbours made one: a message has its price."""
    runs: dict[tuple[int, int, Buffer, Buffer, int], list[Send]] = defaultdict(list)
    for s in sends:
        if s.what.size:
            shift = s.to.start - s.what.start
            runs[s.source, s.target, s.what.buffer, s.to.buffer, shift].append(s)
    result: list[Send] = []
    for run in runs.values():
        run.sort(key=lambda s: s.what.start)
        first = last = run[0]
        for s in run[1:]:
            if s.what.start != last.what.stop:
                result.append(_joined(first, last))
                first = s
            last = s
        result.append(_joined(first, last))
    return tuple(result)


def _joined(first: Send, last: Send) -> Send:
    if first is last:
        return first
    return Send(
        first.source,
        first.target,
        Region(first.what.buffer, first.what.start, last.what.stop),
        Region(first.to.buffer, first.to.start, last.to.stop),
    )


def transposed(movement: Sequence[Phase], room: int) -> list[Phase]:
    """The reduction that is a movement run backwards, with `room` elements of TMP.

    Where part R went from a to b, the partial result for R goes from b to a, which folds it into
    its own.  So the copies of R spreading from its owner become contributions that gather there,
    in as many steps and bytes, over the links turned round; one step becomes several where a card
    gets more than it has room for.  The movement may only `move` within DATA, and must give no card
    anything twice or that it had already.
    """
    phases = []
    for phase in reversed(movement):
        used: Counter[int] = Counter()
        sends: defaultdict[int, list[Send]] = defaultdict(list)
        folds: defaultdict[int, list[Fold]] = defaultdict(list)
        for s in merged(phase.sends):
            at = s.what.start
            while at < s.what.stop:
                turn, start = divmod(used[s.source], room)
                size = min(room - start, s.what.stop - at)
                part = Region(s.what.buffer, at, at + size)
                sends[turn].append(Send(s.target, s.source, part, tmp(start, size)))
                folds[turn].append(Fold(s.source, part, tmp(start, size)))
                used[s.source] += size
                at += size
        phases += [Phase(tuple(sends[turn]), tuple(folds[turn])) for turn in range(len(sends))]
    return phases


def cut(part: Region, longest: int) -> list[Region]:
    """`part` in pieces of at most `longest` elements, as equal as they can be, larger ones first;
    none of nothing."""
    number = -(-part.size // max(1, longest))
    pieces = []
    start = part.start
    for i in range(number):
        stop = start + part.size // number + (i < part.size % number)
        pieces.append(Region(part.buffer, start, stop))
        start = stop
    return pieces


def chunks(task: Task) -> list[Region]:
    """DATA in the pieces of a pipeline."""
    return cut(task.whole, -(-task.elements // task.chunks))


def averaged(task: Task, parts: Mapping[int, Region]) -> list[Phase]:
    """The division that ends an average: of parts[i] on card i; nothing for other operations."""
    if task.op is not ReduceOp.AVG:
        return []
    return [Phase(local=tuple(Divide(card, part) for card, part in parts.items()))]


def averaged_shares(task: Task) -> list[Phase]:
    """The division that ends an average, of every card's own share."""
    return averaged(task, {card: task.share(card) for card in range(task.n)})


def folds_in_order(card: int, own: Region, others: Mapping[int, Region]) -> list[Local]:
    """Fold own and others' contributions (by card) in card order, ((x0 + x1) + x2) ..., into own.

    A partial result stays in the room of card 0's contribution until the card's own turn comes;
    own + partial is then partial + own, as IEEE addition commutes.
    """
    so_far = others.get(0, own)
    folds: list[Local] = []
    for other in range(1, len(others) + 1):
        if other == card:
            folds.append(Fold(card, own, so_far))
            so_far = own
        else:
            folds.append(Fold(card, so_far, others[other]))
    return folds


def tokens(steps: Iterable[Iterable[tuple[int, int]]]) -> list[Phase]:
    """A phase for each step of (source, target), whose messages are one element of TMP that means
    nothing."""
    phases = []
    for step in steps:
        heard: Counter[int] = Counter()
        sends = []
        for source, target in step:
            heard[target] += 1
            sends.append(Send(source, target, tmp(0, 1), tmp(heard[target], 1)))
        phases.append(Phase(tuple(sends)))
    return phases


def side_by_side(*rows: Sequence[Phase]) -> list[Phase]:
    """Rows of phases that start together."""
    return [
        Phase(
            tuple(s for row in rows if p < len(row) for s in row[p].sends),
            tuple(x for row in rows if p < len(row) for x in row[p].local),
        )
        for p in range(max(map(len, rows), default=0))
    ]


def finish(task: Task, algorithm: str, phases: Iterable[Phase]) -> CollectivePlan:
    """The plan of these phases: nothing empty in it, neighbours merged, cards by their numbers,
    TMP as large as it must be."""
    numbers = task.graph.cards
    renamed = functools.partial(_renamed, numbers=numbers)
    kept: list[Phase] = []
    for phase in phases:
        local = tuple(renamed(x) for x in phase.local if x.into.size)
        sends = tuple(
            Send(numbers[s.source], numbers[s.target], s.what, s.to) for s in merged(phase.sends)
        )
        if kept and local and not sends:
            # Local work alone belongs to the phase before it.
            kept[-1] = Phase(kept[-1].sends, kept[-1].local + local)
        elif sends or local:
            kept += _within_transfers_max(sends, local)
    reduces = task.kind in REDUCTIONS
    return CollectivePlan(
        kind=task.kind,
        algorithm=algorithm,
        cards=numbers,
        elements=task.elements,
        phases=tuple(kept),
        shares=task.shares if task.kind in WITH_SHARES else (),
        op=task.op if reduces else None,
        ordered=task.ordered and reduces,
        root=numbers[task.root] if task.kind is Kind.BROADCAST else None,
        tmp_elements=tmp_used(kept),
    )


def _renamed(local: Local, numbers: Sequence[int]) -> Local:
    card = numbers[local.card]
    if isinstance(local, Divide):
        return Divide(card, local.into)
    return type(local)(card, local.into, local.operand)


def tmp_used(phases: Iterable[Phase]) -> int:
    """Up to where any card's TMP is used."""
    regions = (
        region
        for phase in phases
        for step in (*phase.sends, *phase.local)
        for region in regions_of(step)
    )
    return max((r.stop for r in regions if r.buffer is Buffer.TMP), default=0)


def _within_transfers_max(sends: tuple[Send, ...], local: tuple[Local, ...]) -> list[Phase]:
    """A phase, or several where a card sends and receives too much in it: as nothing is received
    over what others send, taking turns changes nothing."""
    if len(sends) <= TRANSFERS_MAX:
        return [Phase(sends, local)]
    turns: list[list[Send]] = []
    counts: list[Counter[int]] = []
    full: Counter[int] = Counter()
    for send in sends:
        turn = max(full[send.source], full[send.target])
        while turn < len(turns) and TRANSFERS_MAX in (
            counts[turn][send.source],
            counts[turn][send.target],
        ):
            turn += 1
        if turn == len(turns):
            turns.append([])
            counts.append(Counter())
        turns[turn].append(send)
        for card in (send.source, send.target):
            counts[turn][card] += 1
            if counts[turn][card] == TRANSFERS_MAX and full[card] == turn:
                full[card] = turn + 1
    phases = [Phase(tuple(turn)) for turn in turns]
    return [*phases[:-1], Phase(phases[-1].sends, local)]


def regions_of(step: Send | Local) -> tuple[Region, ...]:
    """The regions that a send or local work names, on whatever card."""
    if isinstance(step, Send):
        return step.what, step.to
    return (step.into,) if isinstance(step, Divide) else (step.into, step.operand)
