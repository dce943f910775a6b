# SPDX-License-Identifier: Apache-2.0
"""Which plan a collective on a live fleet runs: cards 0 to n - 1, each linked with every other.

    everyone   all-reduce of little: 1 step, DATA goes to every other card, which folds for itself
    owner      all-reduce, reduce-scatter: a card gets everybody's part of its share and folds it
    direct     the rest: 1 step, each part goes straight to where it belongs

All of them fold in card order, which is right for sums of floats and does no harm elsewhere.  What
a fleet of emulated cards shares is the machine's memory, so that fewer bytes and fewer steps are
better, and nothing else counts.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from spanker.sched.shares import Share, split

# Up to so many bytes sent by a card, one step of all of DATA is faster than two of its shares.
EVERYONE_BYTES_MAX = 16384


def choose(
    kind: Kind,
    n: int,
    elements: int,
    element_bytes: int,
    *,
    op: ReduceOp | None = None,
    ordered: bool = False,
    root: int | None = None,
) -> CollectivePlan:
    """A plan for `elements` of so many bytes each.  `ordered` as CollectivePlan has it."""
    shares = split(elements, n)
    algorithm, phases = "direct", [Phase()]
    if kind is Kind.ALL_REDUCE and (n - 1) * elements * element_bytes <= EVERYONE_BYTES_MAX:
        algorithm, phases = "everyone", [_fold_at_everyone(n, elements, op)]
    elif kind is Kind.ALL_REDUCE:
        algorithm, phases = "owner", [_fold_at_owners(shares, op), _gather(shares)]
    elif kind is Kind.REDUCE_SCATTER:
        algorithm, phases = "owner", [_fold_at_owners(shares, op)]
    elif kind is Kind.ALL_GATHER:
        phases = [_gather(shares)]
    elif kind is Kind.BROADCAST:
        phases = [_broadcast(n, elements, root or 0)]
    elif kind is Kind.ALL_TO_ALL:
        phases = [_all_to_all(shares)]
    else:
        phases = [_tokens(n)]
    kept = tuple(phase for phase in map(_without_nothing, phases) if phase.sends or phase.local)
    used = [x for phase in kept for send in phase.sends for x in (send.what, send.to)]
    return CollectivePlan(
        kind=kind,
        algorithm=algorithm,
        cards=tuple(range(n)),
        elements=elements,
        phases=kept,
        shares=shares if kind in (Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.ALL_TO_ALL) else (),
        op=op,
        ordered=ordered,
        root=root,
        tmp_elements=max((x.stop for x in used if x.buffer is Buffer.TMP), default=0),
    )


def _data(share: Share) -> Region:
    return Region(Buffer.DATA, share.start, share.stop)


def _tmp(start: int, size: int) -> Region:
    return Region(Buffer.TMP, start, start + size)


def _fold(card: int, own: Region, rooms: Sequence[Region], op: ReduceOp | None) -> list[Local]:
    """`rooms` hold the contributions of the other cards, in their order; all of them end in `own`.

    Those before the card are folded among themselves, then with its own: a + b is b + a.
    """
    before, after = rooms[:card], rooms[card:]
    folds: list[Local] = [Fold(card, before[0], room) for room in before[1:]]
    folds += [Fold(card, own, room) for room in (*before[:1], *after)]
    return folds + ([Divide(card, own)] if op is ReduceOp.AVG else [])


def _fold_at_everyone(n: int, elements: int, op: ReduceOp | None) -> Phase:
    whole = Region(Buffer.DATA, 0, elements)
    sends, folds = [], []
    for card in range(n):
        others = [other for other in range(n) if other != card]
        rooms = [_tmp(place * elements, elements) for place in range(n - 1)]
        sends += [Send(a, card, whole, room) for a, room in zip(others, rooms, strict=True)]
        folds += _fold(card, whole, rooms, op)
    # What a card sends it folds into only when all of it has left.
    return Phase(tuple(sends), tuple(folds))


def _fold_at_owners(shares: Sequence[Share], op: ReduceOp | None) -> Phase:
    sends, folds = [], []
    for owner, share in enumerate(shares):
        others = [card for card in range(len(shares)) if card != owner]
        rooms = [_tmp(place * share.size, share.size) for place in range(len(others))]
        sends += [Send(a, owner, _data(share), r) for a, r in zip(others, rooms, strict=True)]
        folds += _fold(owner, _data(share), rooms, op)
    return Phase(tuple(sends), tuple(folds))


def _gather(shares: Sequence[Share]) -> Phase:
    pairs = _pairs(len(shares))
    return Phase(tuple(Send(a, b, _data(shares[a]), _data(shares[a])) for a, b in pairs))


def _broadcast(n: int, elements: int, root: int) -> Phase:
    whole = Region(Buffer.DATA, 0, elements)
    return Phase(tuple(Send(root, card, whole, whole) for card in range(n) if card != root))


def _all_to_all(shares: Sequence[Share]) -> Phase:
    out = [Region(Buffer.OUT, share.start, share.stop) for share in shares]
    pairs = _pairs(len(shares))
    return Phase(
        tuple(Send(a, b, _data(shares[b]), out[a]) for a, b in pairs),
        tuple(Copy(card, out[card], _data(share)) for card, share in enumerate(shares)),
    )


def _tokens(n: int) -> Phase:
    return Phase(tuple(Send(a, b, _tmp(0, 1), _tmp(1 + a, 1)) for a, b in _pairs(n)))


def _pairs(n: int) -> list[tuple[int, int]]:
    """Card i sends to i + 1, i + 2 ... first, so that not everybody sends to card 0 at once."""
    return [(a, (a + d) % n) for d in range(1, n) for a in range(n)]


def _without_nothing(phase: Phase) -> Phase:
    return Phase(
        tuple(send for send in phase.sends if send.what.size),
        tuple(local for local in phase.local if local.into.size),
    )
