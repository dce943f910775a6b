# SPDX-License-Identifier: Apache-2.0
"""What to expect of a plan: the figures that a person compares plans by, all by the cost model."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from spanker.sched.cost import (
    Bound,
    FleetCost,
    LoadCost,
    PrefillCost,
    decode_fleet,
    load,
    memory,
    prefill,
)
from spanker.sched.planning.request import Candidate, Request
from spanker.values import Value

BATCHES = (1, 4, 16)
PROMPT_TOKENS = 512


@attrs.frozen(eq=False, repr=False)
class Decode(Value):
    """Decoding of `batch` sequences at `position` positions each."""

    batch: int
    position: int
    cost: FleetCost

    @property
    def tokens_per_second(self) -> float:
        return self.cost.tokens_per_second

    @property
    def bound(self) -> Bound:
        return self.cost.bound


@attrs.frozen(eq=False, repr=False)
class Figures(Value):
    """A candidate's figures.  `prefill` is that of one prompt; `memory_bytes` is by card, with KV
    memory for the request's batch.  What memory is left on all cards would hold `spare_copies` more
    of the weights, from which those of a lost card could be had again sooner."""

    candidate: Candidate
    decode: tuple[Decode, ...]
    prefill: PrefillCost
    load: LoadCost
    memory_bytes: dict[int, int]
    spare_copies: int

    def decoding(self, batch: int, position: int) -> Decode:
        """The entry for a batch and a position; KeyError where there is none."""
        for entry in self.decode:
            if (entry.batch, entry.position) == (batch, position):
                return entry
        raise KeyError((batch, position))


def sizes(request: Request) -> tuple[tuple[int, int], ...]:
    """(batch, position) that are worth knowing: what was asked for, other batches at the same
    position, and the end of the context."""
    wanted = {(batch, request.position) for batch in (*BATCHES, request.batch)}
    wanted.add((request.batch, request.limits.context))
    return tuple(sorted(wanted))


def figures(
    request: Request, candidate: Candidate, at: Sequence[tuple[int, int]], prompt_tokens: int
) -> Figures:
    """The figures of a candidate at each (batch, position) of `at`."""
    shape, profile, topology = request.shape, request.profile, request.topology
    plan, limits = candidate.plan, request.limits_for(request.batch)
    decoding = tuple(
        Decode(
            batch,
            position,
            decode_fleet(
                shape,
                plan,
                profile,
                topology,
                batch=batch,
                context=position,
                candidates=limits.candidates,
            ),
        )
        for batch, position in at
    )
    used = memory(shape, plan, limits)
    free = {card: request.free_bytes[card] for card in topology.cards}
    spare = sum(nbytes - used.get(card, 0) for card, nbytes in free.items())
    ends = {m.name: m for m in (shape.embedding, shape.output)}
    weights = sum(layer.weight_bytes for layer in shape.layers)
    weights += sum(m.rows * m.row_bytes for m in ends.values())
    return Figures(
        candidate,
        decoding,
        prefill(
            shape,
            plan.replicas[0],
            profile,
            topology,
            tokens=min(prompt_tokens, limits.context),
            chunk=limits.prompt_chunk,
            candidates=limits.candidates,
        ),
        load(shape, plan, profile, topology, limits),
        used,
        spare // weights,
    )
