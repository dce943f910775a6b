# SPDX-License-Identifier: Apache-2.0
"""The replicas of one model: each sequence runs on one of them, from its start to its end.

A replica has cards, KV pages and steps of its own (session.py), so replicas neither wait for each
other nor fail together; the sequences of one that cannot go on move to others.  Which one a
sequence gets changes nothing in what comes out of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import attrs
import trio

from spanker.actors.session import Sequence, Session, SessionStats
from spanker.ggml.sampling import SamplingParams
from spanker.sched.plan import FleetPlan


class Replicas:
    """The sessions of one model, one for each replica of its plan."""

    def __init__(self, sessions: Seq[Session]) -> None:
        self.sessions = tuple(sessions)
        if len(self.sessions) > 1:
            for session in self.sessions:
                session.heir = self

    def add(
        self,
        prompt: Seq[int],
        tokens_max: int,
        params: SamplingParams,
        *,
        stop_ids: frozenset[int] = frozenset(),
        want_logits: bool = False,
        score: bool = False,
    ) -> Sequence:
        """Enter a sequence where there are the fewest, of equal ones in the first; as
        `Session.add`.  Where all have failed, the failure of the first."""
        return min(self.alive or self.sessions[:1], key=lambda session: session.unfinished).add(
            prompt,
            tokens_max,
            params,
            stop_ids=stop_ids,
            want_logits=want_logits,
            score=score,
        )

    def others_alive(self, session: Session) -> bool:
        """As Heir."""
        return any(other is not session for other in self.alive)

    def take(self, sequences: Seq[Sequence], session: Session) -> int:
        """As Heir."""
        moved = 0
        others = [other for other in self.alive if other is not session]
        for sequence in sequences:
            order = sorted(others, key=lambda other: other.unfinished)
            moved += any(other.adopt(sequence) for other in order)
        return moved

    @property
    def alive(self) -> tuple[Session, ...]:
        """Those that can take sequences."""
        return tuple(session for session in self.sessions if session.failure is None)

    def plan(self, first: FleetPlan) -> FleetPlan:
        """The plan of those that are alive: the first one, unless one has failed or moved, and if
        none is left."""
        replicas = tuple(session.loaded.plan for session in self.alive)
        if not replicas or replicas == first.replicas:
            return first
        return FleetPlan("+".join(plan.name for plan in replicas), replicas, replicas[0].reason)

    async def unload(self) -> None:
        """End all of them, and give back what they have on their cards."""
        async with trio.open_nursery() as nursery:
            for session in self.sessions:
                nursery.start_soon(session.unload)

    async def run(self) -> None:
        """Make steps, of all replicas at the same time, until cancelled."""
        async with trio.open_nursery() as nursery:
            for session in self.sessions:
                nursery.start_soon(session.run)

    @property
    def stats(self) -> SessionStats:
        """Counts of all replicas together."""
        of = [session.stats for session in self.sessions]
        names = [field.name for field in attrs.fields(SessionStats)]
        return SessionStats(**{name: sum(getattr(s, name) for s in of) for name in names})
