# SPDX-License-Identifier: Apache-2.0
"""Every algorithm by name, and `make`, which turns one into a plan for given cards.

The algorithms themselves are one file each; what they need of the links is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spanker.errors import PlanError
from spanker.sched.collectives import (
    chain,
    direct,
    doubling,
    everyone,
    hierarchical,
    owner,
    ring,
    rotation,
    routed,
    tree,
)
from spanker.sched.collectives.compose import finish
from spanker.sched.collectives.plan import CollectivePlan, Kind, Phase, ReduceOp
from spanker.sched.collectives.task import REDUCTIONS, WITH_SHARES, Graph, Task
from spanker.sched.shares import Share, split
from spanker.sched.topology import Topology

Algorithm = Callable[[Task], list[Phase]]

_ALGORITHMS: dict[Kind, dict[str, Algorithm]] = {
    Kind.ALL_REDUCE: {
        "direct": direct.all_reduce,
        "ring": ring.all_reduce,
        "doubling": doubling.all_reduce,
        "halving": doubling.all_reduce_halving,
        "tree": tree.all_reduce,
        "hierarchical": hierarchical.all_reduce,
        "owner": owner.all_reduce,
        "everyone": everyone.all_reduce,
        "chain": chain.all_reduce,
        "routed": routed.all_reduce,
    },
    Kind.REDUCE_SCATTER: {
        "direct": direct.reduce_scatter,
        "ring": ring.reduce_scatter,
        "halving": doubling.reduce_scatter,
        "tree": tree.reduce_scatter,
        "hierarchical": hierarchical.reduce_scatter,
        "owner": owner.reduce_scatter,
        "chain": chain.reduce_scatter,
        "routed": routed.reduce_scatter,
    },
    Kind.ALL_GATHER: {
        "direct": direct.gather,
        "ring": ring.all_gather,
        "doubling": doubling.all_gather,
        "tree": tree.all_gather,
        "hierarchical": hierarchical.all_gather,
        "routed": routed.all_gather,
    },
    Kind.BROADCAST: {
        "direct": direct.broadcast,
        "tree": tree.broadcast,
        "hierarchical": hierarchical.broadcast,
        "chain": chain.broadcast,
        "routed": routed.broadcast,
    },
    Kind.ALL_TO_ALL: {
        "direct": direct.all_to_all,
        "rotation": rotation.all_to_all,
        "doubling": doubling.all_to_all,
        "hierarchical": hierarchical.all_to_all,
        "routed": routed.all_to_all,
    },
    Kind.BARRIER: {
        "direct": direct.barrier,
        "ring": ring.barrier,
        "doubling": doubling.barrier,
        "tree": tree.barrier,
        "hierarchical": hierarchical.barrier,
        "routed": routed.barrier,
    },
}
# Those that fold in card order.
_IN_ORDER = ("owner", "everyone", "chain", "routed")

# A message shorter than this is not worth its latency (1 us at 1 GB/s is 250 float32 elements),
# and beyond some tens of chunks a pipeline is full whatever its length.
_CHUNK_ELEMENTS_MIN = 4096
_CHUNKS_MAX = 32


def algorithms(kind: Kind | str, ordered: bool = False) -> tuple[str, ...]:
    """The algorithms for a kind; for reductions with `ordered`, those that fold in card order."""
    kind = _kind(kind)
    return tuple(
        name
        for name in _ALGORITHMS[kind]
        if not ordered or kind not in REDUCTIONS or name in _IN_ORDER
    )


def make(
    kind: Kind | str,
    topology: Topology | Sequence[int] | int,
    elements: int,
    *,
    algorithm: str = "routed",
    op: ReduceOp | str = ReduceOp.SUM,
    ordered: bool | None = None,
    shares: Sequence[Share] | None = None,
    root: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    chunks: int | None = None,
    cards: Sequence[int] | None = None,
) -> CollectivePlan:
    """A plan by a named algorithm.

    `topology`: the links there are; given cards, or their number, they are all linked with each
    other.  `cards`: those that take part, in their order, else all.  `op` and `ordered` matter to
    reductions only; sums and averages are `ordered` unless said otherwise (integers may).
    `shares` cut DATA into one part a card, equal ones unless given; an all-reduce may have them
    too, to say who folds how much.  `root`: who broadcasts, the first card unless given.
    `groups`: of cards, for 'hierarchical'.  `chunks`: for 'chain' and for a 'routed' broadcast.

    Raises PlanError: an argument makes no sense, the algorithm does not exist or cannot keep the
    order, cards are not connected, or a link that the algorithm needs is not up.
    """
    task = task_of(
        kind,
        topology,
        elements,
        op=op,
        ordered=ordered,
        shares=shares,
        root=root,
        groups=groups,
        chunks=chunks,
        cards=cards,
    )
    return plan_of(task, algorithm)


def plan_of(task: Task, algorithm: str) -> CollectivePlan:
    """What `make` does when its arguments have become a task."""
    kind = task.kind
    if algorithm not in algorithms(kind):
        raise PlanError(
            f"{kind.value}: no algorithm {algorithm!r}; expected one of "
            f"{', '.join(algorithms(kind, task.ordered))}"
        )
    if algorithm not in algorithms(kind, task.ordered):
        raise PlanError(
            f"{kind.value}: algorithm {algorithm!r} does not fold in card order; expected one of "
            f"{', '.join(algorithms(kind, True))}, or ordered=False where any order is right"
        )
    phases = _ALGORITHMS[kind][algorithm](task)
    for phase in phases:
        for send in phase.sends:
            if send.what.size and (send.source, send.target) not in task.graph.links:
                a, b = (task.graph.cards[i] for i in (send.source, send.target))
                raise PlanError(
                    f"{kind.value} {algorithm!r} over {task.n} cards needs a link {a} -> {b} that "
                    "is up, and there is none; algorithm 'routed' makes do with any"
                )
    return finish(task, algorithm, phases)


def _kind(kind: Kind | str) -> Kind:
    try:
        return Kind(kind)
    except ValueError:
        known = ", ".join(k.value for k in Kind)
        raise PlanError(f"no collective {kind!r}: expected one of {known}") from None


def _op(op: ReduceOp | str) -> ReduceOp:
    try:
        return ReduceOp(op)
    except ValueError:
        known = ", ".join(o.value for o in ReduceOp)
        raise PlanError(f"no reduction {op!r}: expected one of {known}") from None


def task_of(
    kind: Kind | str,
    topology: Topology | Sequence[int] | int,
    elements: int,
    *,
    op: ReduceOp | str = ReduceOp.SUM,
    ordered: bool | None = None,
    shares: Sequence[Share] | None = None,
    root: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    chunks: int | None = None,
    cards: Sequence[int] | None = None,
) -> Task:
    """The arguments of `make`, checked, with cards by position."""
    kind = _kind(kind)
    graph = _graph(topology, cards)
    numbers, n, what = graph.cards, graph.n, f"{kind.value} over {graph.n} cards"
    op = _op(op)
    if elements < 0 or (kind is Kind.BARRIER and elements):
        wanted = "0" if kind is Kind.BARRIER else "0 or more"
        raise PlanError(f"{what}: expected {wanted} elements, got {elements}")
    if kind is Kind.ALL_TO_ALL and elements % n:
        raise PlanError(
            f"{what}: expected as many elements for each card, got {elements} in all; pad to a "
            f"multiple of {n}"
        )
    if root is not None and (kind is not Kind.BROADCAST or root not in numbers):
        wanted = "one of the cards" if kind is Kind.BROADCAST else "no root"
        raise PlanError(f"{what}: expected {wanted}, got root {root}")
    if chunks is not None and chunks < 1:
        raise PlanError(f"{what}: expected 1 chunk or more, got {chunks}")
    if groups is not None and sorted(c for group in groups for c in group) != sorted(numbers):
        raise PlanError(f"{what}: expected each card in one group, got {groups} for {numbers}")
    if shares is not None:
        _check_shares(what, kind, tuple(shares), n, elements)
    return Task(
        kind=kind,
        graph=graph,
        elements=elements,
        shares=tuple(shares) if shares is not None else split(elements, n),
        op=op if kind in REDUCTIONS else None,
        ordered=kind in REDUCTIONS
        and (op in (ReduceOp.SUM, ReduceOp.AVG) if ordered is None else ordered),
        root=0 if root is None else numbers.index(root),
        groups=tuple(tuple(map(numbers.index, group)) for group in groups or () if group),
        chunks=chunks or max(1, min(_CHUNKS_MAX, elements // _CHUNK_ELEMENTS_MIN)),
    )


def _graph(topology: Topology | Sequence[int] | int, cards: Sequence[int] | None) -> Graph:
    if isinstance(topology, int):
        topology = range(topology)
    if not isinstance(topology, Topology):
        numbers = tuple(topology)
        mesh = [(a, b) for a in range(len(numbers)) for b in range(len(numbers)) if a != b]
        graph = Graph(numbers, frozenset(mesh))
        if cards is not None:
            raise PlanError("a choice of cards needs a topology to choose from; give only one")
    else:
        numbers = topology.cards if cards is None else tuple(cards)
        graph = Graph.of(topology, numbers)
        if not set(topology.cards).issuperset(numbers):
            raise PlanError(f"expected cards of the topology, {topology.cards}, got {numbers}")
    if not numbers or len(set(numbers)) != len(numbers):
        raise PlanError(f"a collective needs one card or more, each once, got {numbers}")
    return graph


def _check_shares(what: str, kind: Kind, shares: tuple[Share, ...], n: int, elements: int) -> None:
    if kind not in (*WITH_SHARES, Kind.ALL_REDUCE):
        raise PlanError(f"{what}: expected no shares, got {len(shares)}")
    if len(shares) != n:
        raise PlanError(f"{what}: expected {n} shares, got {len(shares)}")
    at = 0
    for i, share in enumerate(shares):
        if share.start != at:
            raise PlanError(
                f"{what}: expected share {i} to start at {at}, where the one before ends, got "
                f"{share.start}; sched.split makes shares"
            )
        at = share.stop
    if at != elements:
        raise PlanError(f"{what}: expected shares of {elements} elements in all, got {at}")
    if kind is Kind.ALL_TO_ALL and len({share.size for share in shares}) > 1:
        raise PlanError(f"{what}: expected shares of one size, got {[s.size for s in shares]}")
