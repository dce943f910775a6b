# SPDX-License-Identifier: Apache-2.0
"""What is asked of the planner, and what it answers."""

from __future__ import annotations

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.cost import FleetCost
from spanker.sched.plan import FleetPlan, Limits, ModelShape
from spanker.sched.topology import Topology
from spanker.values import Value


@attrs.frozen(eq=False, repr=False)
class Request(Value):
    """What to plan: a model on the cards of a topology, at the speeds of a profile.

    `free_bytes`: memory of each card by number.  `limits`: of the steps and contexts that the cards
    must have memory for; its `kv_pages` are set here: for `kv_tokens` positions in each replica, or
    else a full context for each sequence.  Decoding
    of `batch` sequences at `position` positions each is to be fast.  Of rows of stages,
    the `keep` fastest come out.
    """

    shape: ModelShape
    profile: Profile
    topology: Topology
    free_bytes: tuple[int, ...]
    limits: Limits
    batch: int = 1
    position: int = 512
    kv_tokens: int | None = None
    keep: int = 20

    def __attrs_post_init__(self) -> None:
        if len(self.free_bytes) <= max(self.topology.cards, default=-1):
            raise PlanError(
                f"planning: expected the free memory of {len(self.topology.cards)} cards, got "
                f"{len(self.free_bytes)}"
            )
        if self.batch < 1 or not 1 <= self.position <= self.limits.context:
            raise PlanError(
                f"planning: expected a batch of at least 1 at 1 to {self.limits.context} "
                f"positions, got {self.batch} at {self.position}"
            )

    def limits_for(self, sequences: int) -> Limits:
        """The limits with KV memory for so many full contexts."""
        page = self.limits.page_positions
        pages = max(sequences, 1) * -(-self.limits.context // page)
        if self.kv_tokens is not None:
            pages = -(-self.kv_tokens // page)
        return attrs.evolve(self.limits, kv_pages=pages)


@attrs.frozen(eq=False, repr=False)
class Candidate(Value):
    """A plan and what decoding takes with it."""

    plan: FleetPlan
    cost: FleetCost

    @property
    def tokens_per_second(self) -> float:
        return self.cost.tokens_per_second

    @property
    def seconds(self) -> float:
        """Of a step of the slowest replica."""
        return max(cost.seconds for cost in self.cost.replicas if cost is not None)


@attrs.frozen(eq=False, repr=False)
class Outcome(Value):
    """The plan chosen, the best candidates (it is the first), and why.

    `gap` is by how much the best plan there is could be faster, as a part of its speed: 0 where
    that is the one chosen (`exact`).
    """

    request: Request
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    gap: float
    reason: str
    search_s: float

    @property
    def exact(self) -> bool:
        return self.gap == 0
