# SPDX-License-Identifier: Apache-2.0
"""Sequences and steps: continuous batching of all generations on one replica of a model.

One task (`Session.run`) makes the steps.  Each step takes one token of every sequence that is
decoding and fills up with prompt tokens; KV pages are reserved for a sequence's whole length before
it starts, so that none runs out half way.  Because of "one answer", what shares a step never
changes what a sequence gets.

When the model goes to other cards, or those of its cards that are left (placement.py), every
sequence goes on with its next token: its KV pages go along, or, where some of them are lost, its
tokens so far are computed again, as a prompt.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections import deque
from collections.abc import Container, Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

import attrs
import numpy as np
import trio

from spanker.actors.coordinator import Coordinator
from spanker.actors.decisions import Action, Failure, Situation, decide
from spanker.actors.placement import Placement
from spanker.actors.steps import F32, LoadedModel, StepResult
from spanker.errors import (
    CardAuditError,
    CardError,
    CardHungError,
    CardLinkDownError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    ContextLengthError,
    PlanError,
    RequestError,
    SpankerError,
    again,
)
from spanker.events import AuditsEnded, LinkRetried, Replanned, ReplicaLost, Rerouted
from spanker.ggml import sampling
from spanker.ggml.sampling import SamplingParams, whole
from spanker.kernels.program import SequenceStep, chosen_token
from spanker.sched.pages import Table
from spanker.sched.plan import Plan
from spanker.values import Value, lazy_frozen

if TYPE_CHECKING:
    from spanker.actors.audit import Auditor
    from spanker.actors.stragglers import Paces

# A sequence pauses when its consumer is this many tokens behind, or pieces of logits.
RUN_AHEAD_MAX = 64
SCORE_AHEAD_MAX = 4
# Steps that are on the cards at once: one runs, the next waits behind it.
STEPS_AHEAD = 2
# Requests that may wait for KV pages.
WAITING_MAX = 4096


@attrs.frozen(eq=False, repr=False)
class Sampled(Value):
    """One generated token: its position in the sequence, and its logits if asked for."""

    id: int
    logprob: float
    position: int
    logits: F32 | None = None


@lazy_frozen
class Scored(Value):
    """Logits (tokens, vocabulary) of the next tokens of a forced sequence, from `position` on."""

    position: int
    logits: F32


@attrs.define(eq=False)
class Sequence:
    """A sequence under way; made by `Session.add`, ended by `Session.release`.

    `outbox` holds what the consumer has not taken; `changed` is set whenever it grows or the
    sequence ends.  `finish` says why it ended: `stop`, `length`, `context`, or None.
    Positions up to `computed` are on all cards, those up to `scheduled` are in steps under way,
    and those up to `delivered` have been counted and, of a forced sequence, scored: after a
    recovery they are computed again.  `pending` is the output of the newest such step that gives
    the next token, or None.
    """

    session: Session
    tokens: list[int]
    prompt_length: int
    tokens_max: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    want_logits: bool
    score: bool
    pages: list[int] = attrs.Factory(list)
    computed: int = 0
    scheduled: int = 0
    delivered: int = 0
    pending: int | None = None
    outbox: deque[Sampled | Scored] = attrs.Factory(deque)
    changed: trio.Event = attrs.Factory(trio.Event)
    finish: str | None = None
    error: SpankerError | None = None
    released: bool = False

    def forget_positions(self) -> None:
        """Nothing of it is on any card: all of it is to be computed again."""
        self.computed = self.scheduled = 0
        self.pending = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None or self.released

    @property
    def decoding(self) -> bool:
        """Only the newest token, known or pending, has yet to be scheduled."""
        known = len(self.tokens) + (self.pending is not None)
        return self.scheduled == known - 1 and not self.score

    @property
    def will_end(self) -> bool:
        """The pending token is the last one, whatever it is."""
        length = len(self.tokens) + 1
        return self.pending is not None and (
            length - self.prompt_length >= self.tokens_max
            or length >= self.session.loaded.limits.context
        )

    @property
    def ahead_max(self) -> int:
        return SCORE_AHEAD_MAX if self.score else RUN_AHEAD_MAX

    @property
    def paused(self) -> bool:
        """Its consumer is so far behind that nothing is computed for it."""
        return len(self.outbox) >= self.ahead_max

    def signal(self) -> None:
        self.changed.set()

    async def next(self) -> Sampled | Scored | None:
        """The next item, or None at the end; a checkpoint.  Raises the sequence's error."""
        await trio.lowlevel.checkpoint()
        while not self.outbox:
            if self.error is not None:
                raise again(self.error)
            if self.ended:
                return None
            self.changed = trio.Event()
            await self.changed.wait()
        item = self.outbox.popleft()
        if len(self.outbox) == self.ahead_max - 1 or not (self.pages or self.outbox):
            self.session.wake()
        return item


class Heir(Protocol):
    """Takes the sequences of a session that is over."""

    def take(self, sequences: Seq[Sequence], session: Session) -> int:
        """Enter sequences of a session elsewhere; of how many that was possible."""

    def others_alive(self, session: Session) -> bool:
        """Whether there is anywhere else to go from a session."""


@attrs.define(eq=False)
class _Move:
    """Somebody waits for the replica to be placed anew."""

    done: trio.Event = attrs.Factory(trio.Event)
    error: SpankerError | None = None

    def end(self, error: SpankerError | None) -> None:
        self.error = error
        self.done.set()


class PagePool:
    """KV pages by number; the lowest free pages are given first, so runs are repeatable."""

    def __init__(self, pages: int, taken: Seq[int] = ()) -> None:
        self.total = pages
        self._free = sorted(set(range(pages)).difference(taken))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        return [heapq.heappop(self._free) for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)
        pages.clear()


@attrs.frozen(eq=False, repr=False)
class SessionStats(Value):
    """Counts since the model was loaded."""

    steps: int
    prompt_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int


class Session:
    """All sequences of one replica of a loaded model."""

    def __init__(
        self,
        coordinator: Coordinator,
        loaded: LoadedModel,
        *,
        placement: Placement | None = None,
        recover: bool = True,
        number: int = 0,
        name: str = "model",
        auditor: Auditor | None = None,
        rebalance: bool = False,
    ) -> None:
        """`placement` brings replica `number` to other cards, with `recover` also when cards are
        lost: else that is the end of the session.  `name` is the model's, for events."""
        self.coordinator = coordinator
        self.loaded = loaded
        self.number = number
        self.name = name
        # Who takes its sequences once it is over.
        self.heir: Heir | None = None
        self._placement = placement
        self._recovers = recover and placement is not None
        self._auditor = auditor
        self._paces: Paces | None = None
        if rebalance:
            from spanker.actors.stragglers import Paces

            self._paces = Paces(loaded.plan.cards)
        self._moves: list[_Move] = []
        self._link_faults = 0
        # The changes of links that are known here: none of those since the load was planned.
        self._links = -1
        # Whether links that are down have cost it cards.
        self._cut_off = False
        # Whether sequences that had pages side by side may not all have them any more.
        self._crowded = False
        self.pool = PagePool(loaded.limits.kv_pages)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._work = trio.Event()
        self._flights: deque[list[tuple[Sequence, SequenceStep]]] = deque()
        self._step_scope: trio.CancelScope | None = None
        self._failure: SpankerError | None = None
        self._unloading = False
        self._over = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._steps = self._prompt_tokens = self._generated_tokens = 0

    @property
    def failure(self) -> SpankerError | None:
        """Why no sequence can be entered any more, or None."""
        return self._failure

    @property
    def unfinished(self) -> int:
        """Sequences that run or wait."""
        return len(self._running) + len(self._waiting)

    @property
    def stats(self) -> SessionStats:
        return SessionStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            running=len(self._running),
            waiting=len(self._waiting),
            kv_pages_used=self.pool.total - self.pool.free,
            kv_pages_total=self.pool.total,
        )

    # --- for the callers -----------------------------------------------------------------

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
        """Enter a sequence; it starts when its KV pages are free.  Never blocks.

        With `score` nothing is generated: the logits of every prompt token come back.  Raises
        RequestError, ContextLengthError, and the failure of a session that cannot go on.
        """
        if self._unloading and self._failure is None:
            raise RequestError(f"{self.name} is being unloaded: load it again")
        if self._failure is not None:
            raise again(self._failure)
        limits, vocabulary = self.loaded.limits, self.loaded.model.shape.vocabulary
        tokens, tokens_max = [whole(token) for token in prompt], whole(tokens_max)
        if not tokens:
            raise RequestError("the prompt has no tokens: give at least one")
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"token id {token} is not in the vocabulary: expected 0 to {vocabulary - 1}"
                )
        if tokens_max < 1 and not score:
            raise RequestError(f"max_tokens must be at least 1, got {tokens_max}")
        room = limits.context - len(tokens) + (1 if score else 0)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(tokens):,} tokens, but the context holds "
                f"{limits.context:,}{'' if score else ' with at least one for the answer'}: "
                f"shorten it or load the model with a larger context (--ctx)"
            )
        if len(self._waiting) >= WAITING_MAX:
            raise RequestError(f"{WAITING_MAX} requests already wait for KV pages: try again later")
        sequence = Sequence(
            session=self,
            tokens=tokens,
            prompt_length=len(tokens),
            tokens_max=tokens_max,
            sampling=params,
            stop_ids=stop_ids,
            want_logits=want_logits,
            score=score,
        )
        self._waiting.append(sequence)
        self.wake()
        return sequence

    def release(self, sequence: Sequence) -> None:
        """End a sequence and free its pages, now or when the step in flight is over.  Idempotent.

        A step that nobody wants any more is aborted.
        """
        if sequence.released:
            return
        sequence.released = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if not self._in_flight(sequence):
            self._retire(sequence)
        elif self._step_scope is not None and all(
            s.released for batch in self._flights for s, _ in batch
        ):
            self._step_scope.cancel()
        sequence.signal()
        self.wake()

    def release_from_anywhere(self, sequence: Sequence) -> None:
        """`release`, soon, for a destructor: that may run in any thread, between any two steps of
        this very class, or after trio has ended."""
        with contextlib.suppress(trio.RunFinishedError):
            # Until then it may have moved to another session.
            self._token.run_sync_soon(lambda: sequence.session.release(sequence))

    def wake(self) -> None:
        """Something changed that may make a step possible."""
        self._work.set()

    # --- the loop ------------------------------------------------------------------------

    async def run(self) -> None:
        """Make steps until cancelled.  A fault ends the sequences of its step; a lost or hung card
        ends the session where nothing is left to go on with, and so does the end of this task."""
        unconcern = self.coordinator.concern(self.wake)
        try:
            await self._run()
        finally:
            unconcern()
            if self._auditor is not None:
                self._auditor.close()
            self._fail(
                RequestError(
                    "the fleet is closed: use its models only inside of the `async with` block "
                    "that opened it"
                )
            )
            self._over.set()

    async def _run(self) -> None:
        while self._failure is None and not self._unloading:
            if self._moves:
                await self._move()
                continue
            if not self.coordinator.whole(self.loaded):
                # A card was lost and has come back while nobody looked.
                await self._replace(trio.current_time(), None)
                continue
            if self._links != self.coordinator.links.changes:
                await self._reroute()
                continue
            if self._auditor is not None and self._auditor.due(self._steps):
                await self._audit(self._auditor)
                continue
            if not self._plan_batch():
                self._work = trio.Event()
                await self._work.wait()
                continue
            failure: SpankerError | None = None
            try:
                await self._run_steps()
            except SpankerError as error:
                failure = self._failed(error)
            finally:
                self._step_scope = None
                flown = [s for batch in self._flights for s, _ in batch]
                self._flights.clear()
                for sequence in flown:
                    if not sequence.score:
                        # What a token is chosen from may have been lost when it was computed.
                        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
                    sequence.scheduled, sequence.pending = sequence.computed, None
                    if sequence.ended:
                        self._retire(sequence)
            if failure is not None:
                await self._recover(failure)
        # Who has asked meanwhile for a replica to move that is given up: it is on no card any more.
        self._end_moves(None)
        if self._unloading:
            self._fail(RequestError(f"{self.name} has been unloaded: load it again"))

    def _end_moves(self, error: SpankerError | None) -> None:
        for move in self._moves:
            move.end(error)
        self._moves.clear()

    def _failed(self, error: SpankerError) -> SpankerError | None:
        """Do what can be done at once about the failure of the oldest step; what was queued behind
        it can be made again.  What is left for `_recover` comes back."""
        batch = tuple(s for s, _ in self._flights[0]) if self._flights else ()
        situation = Situation(
            Failure.of(error),
            retries=self._link_faults,
            ended=any(s.ended for s in batch),
            recovers=self._recovers,
            blamed=isinstance(error, CardError) and error.card is not None,
        )
        action = decide(situation)
        if action in (Action.REPLAN, Action.GIVE_UP):
            return error
        if situation.failure in (Failure.LINK, Failure.LINK_DOWN):
            # Bytes that got lost on their way: what was computed from them is nowhere kept.
            self._link_faults = 0 if action is Action.END_SEQUENCES else self._link_faults + 1
        if action is Action.REROUTE and isinstance(error, CardLinkDownError):
            assert error.card is not None and error.peer is not None
            self.coordinator.links.lose(error.card, error.peer)
        elif action is Action.RETRY and situation.failure is Failure.LINK:
            assert isinstance(error, CardError)
            attempt, now = self._link_faults, trio.current_time()
            self.coordinator.events.tell(
                LinkRetried(now, self.name, error.card, attempt, str(error))
            )
        elif action is Action.END_SEQUENCES:
            self._end(batch, error)
        return None

    async def _recover(self, failure: SpankerError) -> None:
        """Go on after a failure on the cards that are left; where there is no way, the session is
        over.  A card that is lost is so for everybody, also where nothing recovers."""
        begin = trio.current_time()
        lost = isinstance(failure, CardLostError | CardHungError) and self.coordinator.lose(
            failure, self.loaded.births
        )
        # A card that has come back knows nothing of the model: nothing else has failed.
        if lost or not self.coordinator.whole(self.loaded):
            await self._replace(begin, failure)
        else:
            await self._end_all(failure)

    async def _replace(self, begin: float, failure: SpankerError | None) -> None:
        """Have the model put on cards that can hold it, and go on there."""
        placement, before = self._placement, self.loaded.plan
        if placement is None or not self._recovers:
            failure = failure or CardLostError("a card that holds the model was lost")
            await self._end_all(failure)
            return
        moved = 0
        if self.heir is not None and not self.loaded.limits.kv_copies:
            # Whoever can goes on at once; what is brought here is for those that come later.
            self._suspend()
            moved = self._hand_over()
        tables = self._tables()
        try:
            loaded, seats = await placement.replace(self.number, [*tables.values()])
        except SpankerError as error:
            if error is not failure:
                error.__cause__ = failure
            # Whose card is lost cannot stay; whose link is down may not have to move.
            if not (placement.has_all(self.number) and await self._stay(placement, begin)):
                await self._give_up(error, moved)
            return
        resumed, kept = self._resume_on(loaded, zip(tables, seats, strict=True))
        lost = tuple(card for card in before.cards if card in self.coordinator.lost)
        self._tell_replanned(lost, before, resumed, kept, begin, moved)

    async def _audit(self, auditor: Auditor) -> None:
        """Have a card's arithmetic computed again; one that lies is a card that is lost.  Where
        that cannot be done, sequences go on without it."""
        try:
            await auditor.look(self.loaded, self._steps)
        except (CardLostError, CardHungError) as error:
            await self._recover(error)
        except SpankerError as error:
            auditor.close()
            self._auditor = None
            now = trio.current_time()
            self.coordinator.events.tell(AuditsEnded(now, self.name, str(error)))

    async def _reroute(self) -> None:
        """Links have gone down or come back: have the steps go where they can; where that is
        nowhere, the model goes to cards that reach each other."""
        coordinator, placement, begin = self.coordinator, self._placement, trio.current_time()
        self._links = coordinator.links.changes
        if self._cut_off:
            # Cards that were out of reach may have a share again.
            self._cut_off = bool(coordinator.links.down)
            self._moves.append(_Move())
            return
        if coordinator.links.down_among(self.loaded.plan.cards) == self.loaded.down:
            return
        if placement is None:
            return
        before = self.loaded
        try:
            self.loaded = await placement.reroute(self.number)
        except PlanError as error:
            self._cut_off = True
            await self._replace(begin, CardLinkDownError(str(error)))
        except SpankerError as error:
            await self._recover(error)
        else:
            self._tell_rerouted(before, begin)

    def _tell_rerouted(self, before: LoadedModel, begin: float) -> None:
        """Where steps take other ways than before."""
        now, loaded = trio.current_time(), self.loaded
        if loaded.down != before.down:
            down = tuple(sorted(loaded.down))
            self.coordinator.events.tell(Rerouted(now, self.name, down, now - begin, loaded.hosted))

    def _tables(self) -> dict[Sequence, Table]:
        """The KV pages of the sequences that have some; none where they may be wrong."""
        coordinator, loaded = self.coordinator, self.loaded
        for card in loaded.plan.cards:
            reason = coordinator.lost.get(card)
            # Of a card that has come back nobody knows any more why it was lost.
            returned = reason is None and not coordinator.holds(loaded, card)
            if returned or isinstance(reason, CardAuditError):
                return {}
        limits = loaded.limits
        return {
            sequence: Table(
                tuple(sequence.pages), math.ceil(sequence.computed / limits.page_positions)
            )
            for sequence in self._running
        }

    def _tell_replanned(
        self,
        lost: tuple[int, ...],
        before: Plan,
        resumed: int,
        kept: int,
        begin: float,
        moved: int = 0,
    ) -> None:
        now, after = trio.current_time(), self.loaded.plan
        self.coordinator.events.tell(
            Replanned(
                now,
                self.name,
                lost,
                before.name,
                after.name,
                after.cards,
                resumed,
                now - begin,
                moved,
                kept,
            )
        )

    async def move(self) -> None:
        """Have the replica placed anew, on the cards that may be used by now, between two steps;
        waits until it is.

        Of one that is being unloaded, until nothing of it is left.  Raises ConfigError without a
        placement, and what stands in the way, CardMemoryError say: then it is where it was, if it
        can be, and its sequences go on.
        """
        if self._placement is None:
            raise ConfigError("this session cannot move: it was made without a placement")
        if self._failure is None and not self._unloading:
            move = _Move()
            self._moves.append(move)
            self.wake()
            await move.done.wait()
            if move.error is not None:
                raise again(move.error)
        if self._unloading:
            await self.unload()

    async def unload(self) -> None:
        """End once the steps under way are over, and give back what the replica has on its cards.
        Idempotent."""
        self._unloading = True
        self.wake()
        await self._over.wait()
        if self._placement is not None:
            await self._placement.give_up(self.number)

    async def _move(self) -> None:
        placement, begin, before = self._placement, trio.current_time(), self.loaded
        assert placement is not None
        asked, error, tables = len(self._moves), None, self._tables()
        try:
            loaded, seats = await placement.replace(self.number, [*tables.values()])
        except SpankerError as caught:
            heir = self.heir
            if isinstance(caught, CardLostError) and heir is not None and heir.others_alive(self):
                # Without a card of its own it is not needed: others do its work.
                await placement.give_up(self.number)
            else:
                error = caught
            if not await self._stay(placement, begin):
                await self._give_up(caught)
        else:
            if loaded.handles is before.handles:
                self.loaded = loaded
                self._tell_rerouted(before, begin)
            else:
                resumed, kept = self._resume_on(loaded, zip(tables, seats, strict=True))
                self._tell_replanned((), before.plan, resumed, kept, begin)
        for move in self._moves[:asked]:
            move.end(error)
        del self._moves[:asked]

    async def _stay(self, placement: Placement, begin: float) -> bool:
        """Go on where the replica is after a move that failed, around the links that are down;
        False where it is no more, or there is no way."""
        back, before = placement.replicas[self.number], self.loaded
        if back is None:
            return False
        if back.handles is not before.handles:
            # Where it was, but all of it had been freed.
            self._suspend()
            self._resume_on(back, ())
        if placement.has_all(self.number):
            try:
                self.loaded = await placement.go_around(self.number)
            except PlanError:
                return False
            except SpankerError as error:
                await self._recover(error)
            else:
                self._tell_rerouted(before, begin)
        return True

    def _resume_on(
        self, loaded: LoadedModel, seats: Iterable[tuple[Sequence, Seq[int]]]
    ) -> tuple[int, int]:
        """Go on with what is on other cards: with sequences that have new pages there as if nothing
        had happened, with the others from their beginning.  How many go on that had begun, and how
        many of them with their KV."""
        # Who has left meanwhile runs no more.
        kept = {s: [*pages] for s, pages in seats if pages and s in self._running}
        self._suspend(kept)
        self.loaded = loaded
        if self._paces is not None:
            self._paces = self._paces.anew(loaded.plan.cards)
        for sequence, pages in kept.items():
            sequence.pages = pages
        self.pool = PagePool(loaded.limits.kv_pages, [p for pages in kept.values() for p in pages])
        self._crowded = True
        self._end_too_long()
        moved = sum(bool(sequence.delivered) for sequence in kept)
        return moved + sum(bool(sequence.delivered) for sequence in self._waiting), moved

    def _hand_over(self) -> int:
        """Let others have the sequences that wait here; how many they have taken."""
        if self.heir is None:
            return 0
        waiting, self._waiting = self._waiting, deque()
        moved = self.heir.take(waiting, self)
        self._waiting = deque(s for s in waiting if s.session is self)
        return moved

    async def _give_up(self, error: SpankerError, moved: int = 0) -> None:
        """The session is over, and nothing of the replica is left on its cards; whoever can may
        have its sequences, as `moved` have already."""
        if self._placement is not None:
            await self._placement.give_up(self.number)
        self._suspend()
        # Not the one with the traceback, whose frames hold the model's file open.
        self._failure = error = again(error)
        moved += self._hand_over()
        ended = len(self._waiting)
        self._end(tuple(self._waiting), error)
        self.coordinator.events.tell(
            ReplicaLost(trio.current_time(), self.name, self.number, moved, ended, str(error))
        )

    def adopt(self, sequence: Sequence) -> bool:
        """Take over a sequence that waits in a session that is over, behind those that wait here;
        False where it can never have the pages it needs."""
        if self._failure is not None or self._pages_of(sequence) > self.pool.total:
            return False
        sequence.session = self
        self._crowded = True
        self._waiting.append(sequence)
        self.wake()
        return True

    def _suspend(self, kept: Container[Sequence] = ()) -> None:
        """Have sequences wait again but for these, those that ran before the others, in their
        order."""
        for sequence in reversed(self._running):
            if sequence not in kept:
                self._take_back(sequence)
                self._waiting.appendleft(sequence)
        self._running = [sequence for sequence in self._running if sequence in kept]

    def _take_back(self, sequence: Sequence) -> None:
        self.pool.give(sequence.pages)
        sequence.forget_positions()

    def _end_too_long(self) -> None:
        """End sequences that the pages there are now cannot hold."""
        for sequence in tuple(self._waiting):
            need = self._pages_of(sequence)
            if need > self.pool.total:
                page = self.loaded.limits.page_positions
                self._end(
                    (sequence,),
                    CardMemoryError(
                        f"the cards that are left have room for the KV of "
                        f"{self.pool.total * page:,} positions, this sequence needs "
                        f"{need * page:,}: ask for fewer tokens"
                    ),
                )

    async def _run_steps(self) -> None:
        """Steps until there is nothing to do, or until someone else wants the cards.

        While the cards run one step the next is queued behind it, beginning with tokens that only
        the cards know by then; so they do not wait for the host, nor the host for them.
        """
        coordinator, made, cards = self.coordinator, 0, self.loaded.plan.cards
        with trio.CancelScope() as self._step_scope:
            async with coordinator.steps(self.loaded) as pipe:
                while True:
                    while len(self._flights) < STEPS_AHEAD:
                        changed = self._links != coordinator.links.changes
                        if self._moves or self._unloading or changed:
                            break
                        if made and (coordinator.wanted(cards) or self._audit_due()):
                            break
                        batch = self._plan_batch()
                        if not batch:
                            break
                        self._schedule(batch)
                        made += 1
                        logits = any(s.want_logits or s.score for s, step in batch if step.outputs)
                        await pipe.submit([step for _, step in batch], logits=logits)
                    if not self._flights:
                        break
                    result = await pipe.result()
                    with coordinator.span("collect", result.number):
                        await self._collect(result)
                    if coordinator.modelled and not self._flights and self._plan_batch():
                        await coordinator.host_work()

    def _audit_due(self) -> bool:
        """Whether an audit is due once the steps under way are over."""
        return self._auditor is not None and self._auditor.due(self._steps + len(self._flights))

    def _plan_batch(self) -> list[tuple[Sequence, SequenceStep]]:
        """What the next step does; nothing where it would have to wait for the one under way."""
        self._admit()
        limits = self.loaded.limits
        tokens, outputs, prompt = limits.tokens_max, limits.outputs_max, limits.prompt_chunk
        batch: list[tuple[Sequence, SequenceStep]] = []
        if any(s.pending is not None and not s.sampling.greedy for s in self._running):
            return batch  # the host must choose that token
        running = [s for s in self._running if not s.ended and not s.will_end]
        for sequence in sorted(running, key=lambda s: not s.decoding):
            known = [*sequence.tokens[sequence.scheduled :]]
            if sequence.pending is not None:
                known.append(chosen_token(sequence.pending))
            count = min(len(known), tokens)
            if not sequence.decoding:
                count = min(count, prompt)
            if sequence.score:
                count = min(count, outputs)
            if len(sequence.outbox) + self._due(sequence) >= sequence.ahead_max:
                continue
            if not count or not outputs:
                continue
            if sequence.score:
                known_already = max(sequence.delivered - sequence.scheduled, 0)
                wanted = tuple(range(min(known_already, count), count))
            else:
                wanted = (count - 1,) if count == len(known) else ()
            tokens -= count
            prompt -= 0 if sequence.decoding else count
            outputs -= len(wanted)
            used = math.ceil((sequence.scheduled + count) / limits.page_positions)
            step = SequenceStep(
                tokens=known[:count],
                position=sequence.scheduled,
                pages=sequence.pages[:used],
                outputs=wanted,
                inv_temperature=sequence.sampling.inv_temperature,
            )
            batch.append((sequence, step))
        return batch

    def _schedule(self, batch: list[tuple[Sequence, SequenceStep]]) -> None:
        """Book a batch as under way."""
        output = 0
        for sequence, step in batch:
            sequence.scheduled += len(step.tokens)
            sequence.pending = None
            if step.outputs and not sequence.score:
                sequence.pending = output
            output += len(step.outputs)
        # Rotate: with more sequences than fit into a step, each gets its turn.
        if len(batch) < len(self._running):
            self._running.append(self._running.pop(0))
        self._flights.append(batch)

    def _in_flight(self, sequence: Sequence) -> bool:
        return any(s is sequence for batch in self._flights for s, _ in batch)

    def _due(self, sequence: Sequence) -> int:
        """Items that steps under way will put into the outbox."""
        return sum(
            bool(step.outputs) for batch in self._flights for s, step in batch if s is sequence
        )

    def _admit(self) -> None:
        """Start waiting sequences, first come first served, while their pages are free.

        Sequences that ran side by side may not all have pages once cards are lost.  Whoever takes
        tokens of them in turn would wait for ever if those with a full outbox kept theirs.
        """
        while sequence := next((s for s in self._waiting if not s.paused), None):
            need = self._pages_of(sequence)
            if need > self.pool.free and self._crowded:
                # Whoever has something in its outbox can wait; computing again is dear.
                sequence = next((s for s in self._waiting if not s.outbox), sequence)
                need = self._pages_of(sequence)
                if not sequence.outbox:
                    self._make_room(need)
            if need > self.pool.free:
                return
            self._waiting.remove(sequence)
            sequence.pages = self.pool.take(need)
            self._running.append(sequence)

    def _make_room(self, need: int) -> None:
        """Have sequences wait that nobody takes anything of, until so many pages are free."""
        for sequence in tuple(self._running):
            if self.pool.free < need and sequence.paused and not self._in_flight(sequence):
                self._running.remove(sequence)
                self._take_back(sequence)
                self._waiting.append(sequence)

    def _pages_of(self, sequence: Sequence) -> int:
        """The pages that a sequence takes for its whole length."""
        limits = self.loaded.limits
        length = sequence.prompt_length + (0 if sequence.score else sequence.tokens_max)
        return math.ceil(min(length, limits.context) / limits.page_positions)

    async def _collect(self, result: StepResult) -> None:
        """Take in the oldest step under way."""
        batch = self._flights[0]
        self._steps += 1
        if self._paces is not None:
            self._note_paces(self._paces, result)
        self._link_faults = 0
        output = 0
        for sequence, step in batch:
            sequence.computed += len(step.tokens)
            if sequence.computed > sequence.delivered:
                new = min(sequence.computed, sequence.prompt_length) - sequence.delivered
                self._prompt_tokens += max(new, 0)
                sequence.delivered = sequence.computed
            if step.outputs and not sequence.ended:
                await self._deliver(sequence, step, result, output)
            output += len(step.outputs)
        self._flights.popleft()
        for sequence, _ in batch:
            if not self._in_flight(sequence):
                sequence.pending = None
                if sequence.ended:
                    self._retire(sequence)

    def _note_paces(self, paces: Paces, result: StepResult) -> None:
        """Have the model moved where one of its cards has become slower, or is itself again."""
        coordinator = self.coordinator
        if paces.cards != self.loaded.plan.cards:
            paces = self._paces = paces.anew(self.loaded.plan.cards)
        found = paces.note(result.busy_ns, coordinator.slow)
        if found:
            # From now on this is what they are compared with.
            self._paces = paces.anew(paces.cards)
            coordinator.pace(found)
            self._moves.append(_Move())

    async def _deliver(
        self, sequence: Sequence, step: SequenceStep, result: StepResult, output: int
    ) -> None:
        if sequence.score:
            assert result.logits is not None
            rows = result.logits[output : output + len(step.outputs)]
            sequence.outbox.append(Scored(step.position + step.outputs[0], rows))
            if sequence.computed == len(sequence.tokens):
                sequence.finish = "length"
            sequence.signal()
            return
        position = len(sequence.tokens)
        choice = await self._choose(sequence, result, output, position)
        if choice.id in sequence.stop_ids:
            sequence.finish = "stop"
            sequence.signal()
            return
        logits = None
        if sequence.want_logits:
            assert result.logits is not None
            logits = result.logits[output]
        sequence.tokens.append(choice.id)
        sequence.outbox.append(Sampled(choice.id, choice.logprob, position, logits))
        self._generated_tokens += 1
        if len(sequence.tokens) - sequence.prompt_length >= sequence.tokens_max:
            sequence.finish = "length"
        elif len(sequence.tokens) >= self.loaded.limits.context:
            sequence.finish = "context"
        sequence.signal()

    async def _choose(
        self, sequence: Sequence, result: StepResult, output: int, position: int
    ) -> sampling.Choice:
        if sequence.sampling.greedy:
            token, value = result.best(output)
            return sampling.Choice(token, -math.log(result.exp_sum(output, value, 1.0)))
        vocabulary = self.loaded.model.shape.vocabulary
        ids, values = sampling.order(
            result.ids[output], result.values[output], vocabulary, self.loaded.limits.candidates
        )
        choice = sampling.choose(
            sequence.sampling, position, ids, values, result.stats[output], vocabulary
        )
        if choice is not None:
            return choice
        if result.logits is not None:
            logits = result.logits[output]
        else:
            logits = await self.coordinator.read_logits(self.loaded, output)
        return sampling.choose_from_logits(
            sequence.sampling, position, np.ascontiguousarray(logits)
        )

    def _retire(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        self.pool.give(sequence.pages)

    async def _end_all(self, error: SpankerError) -> None:
        """The session is over, and nothing of the replica is left on its cards; all its sequences
        end."""
        if self._placement is not None:
            await self._placement.give_up(self.number)
        # Whoever wants the replica to leave a card has what they wanted.
        self._end_moves(None)
        self._fail(error)

    def _fail(self, error: SpankerError) -> None:
        """The session is over; the first reason stays."""
        self._failure = self._failure or error
        self._end_moves(self._failure)
        self._end((*self._running, *self._waiting), self._failure)

    def _end(self, sequences: Seq[Sequence], error: SpankerError) -> None:
        for sequence in tuple(sequences):
            if not sequence.ended:
                sequence.error = error
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            if not self._in_flight(sequence):
                self._retire(sequence)
            sequence.signal()
