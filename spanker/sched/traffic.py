# SPDX-License-Identifier: Apache-2.0
"""What decoding moves between cards: the table of the hardware project, and what our plans move.

The table supposes bfloat16 activations and two all-reduces a layer, made by a ring.  A ring sends
2 (N - 1)/N of the payload over each link.  The table's figures are half of that: (N - 1)/N, as if
each link carried one of the ring's two rounds, or as if both directions of a link were told apart.

The planner uses neither: our cards gather instead of adding, so that every result has the same bits
whatever the number of cards, and `spanker.sched.cost` counts the bytes of these gathers.  `moved`
adds them up.
"""

from __future__ import annotations

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import REV_A
from spanker.sched.cost.machine import Machine
from spanker.sched.cost.phases import phases
from spanker.sched.cost.pieces import BEST_BYTES, Pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.plan import ModelShape, Plan
from spanker.sched.topology import Topology

BF16_BYTES = 2
# After the attention, and after the FFN.
ALL_REDUCES = 2
# What the hardware project's table was made for.
MODELS = ("tinyllama", "llama-7b", "llama-70b")
CARDS = (2, 4, 8)
TOKENS_PER_S = 30.0


def payload_bytes(shape: ModelShape) -> int:
    """Bytes that a token's all-reduces are about: two of a bfloat16 row in each layer."""
    return ALL_REDUCES * shape.hidden * len(shape.layers) * BF16_BYTES


def ring_bytes_per_s(shape: ModelShape, cards: int, tokens_per_s: float = TOKENS_PER_S) -> float:
    """What a ring of cards sends over each of its links: 2 (N - 1)/N of the payload a token."""
    return 2 * table_bytes_per_s(shape, cards, tokens_per_s)


def table_bytes_per_s(shape: ModelShape, cards: int, tokens_per_s: float = TOKENS_PER_S) -> float:
    """The table's reading, half of that: (N - 1)/N of the payload a token."""
    if cards < 1:
        raise PlanError(f"traffic between cards needs at least 1 card, got {cards}")
    return payload_bytes(shape) * tokens_per_s * (cards - 1) / cards


# --- our plans ---------------------------------------------------------------------------


@attrs.frozen
class Moved:
    """Bytes that one decoding step moves between cards.

    `sent`: by card, to all others together.  `link_most`: over the directed link that has most.
    `row_bytes`: what its gathers bring together, each row counted once however many cards it goes
    to.
    """

    sent: dict[int, int]
    link_most: int
    row_bytes: int


def moved(shape: ModelShape, plan: Plan, batch: int = 1) -> Moved:
    """What a plan moves in a step of `batch` tokens.

    In each layer a stage of several cards gathers its heads as Q8 blocks (34/32 bytes an element),
    a row of floats, its rows of the FFN as Q8 blocks, and a row of floats: for each token
    1.06 h + 4 h + 1.06 f + 4 h bytes, where h is the hidden size and f the FFN's.
    """
    cards = max(plan.cards) + 1
    machine = Machine(REV_A, Topology.with_mock(cards))
    pieces = Pieces(shape, machine, StepRows.decode(batch, 1))
    links: dict[tuple[int, int], int] = {}
    gathered = 0

    def send(source: int, target: int, nbytes: float) -> None:
        if source != target and nbytes:
            links[source, target] = links.get((source, target), 0) + int(nbytes)

    for number, stage in enumerate(plan.stages):
        for phase in phases(pieces, plan, number, candidates=1):
            if phase.sends is None or len(stage.cards) < 2:
                continue
            gathered += phase.count * int(sum(phase.sends))
            for source, nbytes in zip(stage.cards, phase.sends, strict=True):
                for target in stage.cards:
                    send(source, target, phase.count * nbytes)
    for before, after in zip(plan.stages, plan.stages[1:], strict=False):
        for moves in pieces.handover_moves(before.cards, after.cards):
            for source, target, nbytes in moves:
                send(source, target, nbytes)
    for voter in plan.voters:
        for embedder in plan.embedders:
            send(voter, embedder, BEST_BYTES * batch)
    sent = dict.fromkeys(plan.cards, 0)
    for (source, _), nbytes in links.items():
        sent[source] += nbytes
    return Moved(sent, max(links.values(), default=0), gathered)
