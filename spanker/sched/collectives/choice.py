# SPDX-License-Identifier: Apache-2.0
"""Which plan a collective on a live fleet runs, and the proof that it is right.

    all-reduce of little   everyone   1 step
    other reductions       owner      the shares are folded where they belong
    broadcast              tree       the root's core does not make all the copies
    the rest               direct     1 step

All of them fold in card order, which is right for sums of floats and does no harm elsewhere.  What
emulated cards share is the machine's memory: fewer bytes and fewer steps are better, and nothing
else counts.  Where a link is missing, 'routed' does what it can.
"""

from __future__ import annotations

import functools

from spanker.sched.collectives.catalog import make
from spanker.sched.collectives.plan import CollectivePlan, Kind, ReduceOp
from spanker.sched.topology import Topology
from spanker.sched.verify import verify

# Up to so many bytes sent by a card, one step of all of DATA is faster than two of its shares.
EVERYONE_BYTES_MAX = 16384


@functools.lru_cache(maxsize=256)
def choose(
    kind: Kind,
    topology: Topology,
    elements: int,
    element_bytes: int,
    *,
    op: ReduceOp | None = None,
    ordered: bool = False,
    root: int | None = None,
) -> CollectivePlan:
    """A verified plan for `elements` of so many bytes each.  `ordered` as CollectivePlan has it.

    Raises PlanError where the links that are up do not connect the cards.
    """
    plan = make(
        kind,
        topology,
        elements,
        algorithm=_algorithm(kind, topology, elements * element_bytes),
        op=op or ReduceOp.SUM,
        ordered=ordered,
        root=root,
    )
    verify(plan, topology)
    return plan


def _algorithm(kind: Kind, topology: Topology, nbytes: int) -> str:
    if not topology.fully_meshed:
        return "routed"
    if kind is Kind.ALL_REDUCE:
        little = (len(topology.cards) - 1) * nbytes <= EVERYONE_BYTES_MAX
        return "everyone" if little else "owner"
    if kind is Kind.REDUCE_SCATTER:
        return "owner"
    return "tree" if kind is Kind.BROADCAST else "direct"
