# SPDX-License-Identifier: Apache-2.0
"""Steps of a loaded model: queued on its cards, waited for, and what they bring back.

A pipe exists only within `Coordinator.steps`, which aborts what is left of it.  What steps are for
(sequences, sampling) is the business of session.py.
"""

from __future__ import annotations

import functools
import math
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import numpy.typing as npt
import trio

from spanker.actors.message import Counters, Message, RunStep, StepDone
from spanker.actors.patience import in_time
from spanker.device.base import Completion
from spanker.errors import (
    CardAbortedError,
    CardLinkDownError,
    CardLinkError,
    SpankerError,
)
from spanker.ggml.architectures import llama
from spanker.kernels.native import fold_stats
from spanker.kernels.program import Program, SequenceStep, encode_step
from spanker.sched.copies import copies_over_host
from spanker.sched.detours import ALL_UP, Down, over_host
from spanker.sched.layout import chunks
from spanker.sched.plan import CardShare, Limits, Plan
from spanker.values import Value

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator
    from spanker.actors.trace import Trace

F32 = npt.NDArray[np.float32]
_U32, _F32 = struct.Struct("<I"), struct.Struct("<f")

# The answer of a card that no message told of.
_NOTHING = StepDone(0, 0)

# How often a step in flight is looked at, at most.
WATCH_S = 1.0
# How often without seeing anything move before a card counts as hung, at least.
LOOKS_MIN = 4


@attrs.frozen(eq=False, repr=False)
class LoadedModel(Value):
    """A model on its cards: handles of its buffers and programs, by card number."""

    model: llama.LlamaModel
    plan: Plan
    limits: Limits
    handles: dict[int, dict[str, int]]
    programs: dict[int, int]
    # The links that its programs avoid.
    down: Down = ALL_UP
    # How often each card of the fleet had been taken into use anew when it was loaded.
    births: tuple[int, ...] = ()

    def maps_table(self, card: int) -> bool:
        """Whether a card has the whole embedding mapped.  Its buffer of columns is empty then: it
        only takes the DDR that a card which maps nothing would need."""
        return llama.TABLE in self.handles.get(card, {})

    def program(self, card: int) -> Program:
        """The program of its steps on a card, around the links that it avoids."""
        table = self.maps_table(card)
        return llama.build_program(
            self.model, self.plan, card, self.limits, self.down, maps_table=table
        )

    @property
    def hosted(self) -> tuple[tuple[int, int], ...]:
        """From which card to which its steps go over the host, with their copies of KV."""
        copies = copies_over_host(self.plan, self.down) if self.limits.kv_copies else ()
        return tuple(sorted({*over_host(self.plan, self.down), *copies}))

    @property
    def output_shares(self) -> tuple[CardShare, ...]:
        """The cards that hold rows of the vocabulary, in order of those rows."""
        shares = self.plan.stages[-1].shares
        return tuple(s for s in shares if not s.vocabulary.empty)


@attrs.frozen(eq=False, repr=False)
class _Part(Value):
    """What one card brought back for the outputs of a step, as bytes of its buffers."""

    stats: bytes
    top: bytes
    logits: bytes | None


class StepResult:
    """What came back for the outputs of a step, in their order (O outputs).

    `number` counts the steps of the fleet.
    """

    def __init__(
        self,
        number: int,
        parts: Sequence[_Part],
        outputs: int,
        candidates: int,
        busy_ns: tuple[int, ...],
    ) -> None:
        self.number = number
        self.busy_ns = busy_ns
        self._parts = tuple(parts)
        self._outputs = outputs
        self._candidates = candidates

    def best(self, output: int) -> tuple[int, float]:
        """The largest logit of an output and its token, of equal ones the lowest id."""
        at = output * 8 * self._candidates
        found = [
            (_F32.unpack_from(p.top, at + 4 * self._candidates)[0], _U32.unpack_from(p.top, at)[0])
            for p in self._parts
        ]
        # Cards stand in order of their ids, and max takes the first of equal ones.
        value, token = max(found, key=lambda pair: pair[0])
        return token, value

    def exp_sum(self, output: int, top: float, inv_temperature: float) -> float:
        """The sum of exp((logit - top) * inv_temperature) over the vocabulary, `top` being the
        largest logit."""
        total = 0.0
        for part in self._parts:
            size = len(part.stats) // self._outputs
            view = memoryview(part.stats)[output * size : (output + 1) * size]
            total = fold_stats(total, view, top, inv_temperature)
        return total

    @property
    def ids(self) -> npt.NDArray[np.uint32]:
        """(O, candidates of all cards): each card's best tokens, card after card."""
        tops = [self._top(p)[:, : self._candidates] for p in self._parts]
        return np.concatenate(tops, axis=1) if tops else np.zeros((0, 0), np.uint32)

    @property
    def values(self) -> F32:
        """(O, candidates of all cards): the logits of `ids`."""
        tops = [self._top(p)[:, self._candidates :].view(np.float32) for p in self._parts]
        return np.concatenate(tops, axis=1) if tops else np.zeros((0, 0), np.float32)

    @property
    def stats(self) -> F32:
        """(O, chunks, 2): (max, sum of exp) in order of the vocabulary."""
        if not self._parts:
            return np.zeros((0, 0, 2), np.float32)
        rows = [np.frombuffer(p.stats, np.float32) for p in self._parts]
        return np.concatenate([r.reshape(self._outputs, -1, 2) for r in rows], axis=1)

    @functools.cached_property
    def logits(self) -> F32 | None:
        """(O, vocabulary), or None where they were not asked for."""
        rows = [np.frombuffer(p.logits, np.float32) for p in self._parts if p.logits is not None]
        if not rows:
            return None
        return np.concatenate([r.reshape(self._outputs, -1) for r in rows], axis=1)

    def _top(self, part: _Part) -> npt.NDArray[np.uint32]:
        return np.frombuffer(part.top, np.uint32).reshape(self._outputs, 2 * self._candidates)


class StepPipe:
    """Steps of one model, queued on its cards in order; made by `Coordinator.steps`.

    A card's failure, a hung card and cancellation end the pipe: leave its block.
    """

    def __init__(self, coordinator: Coordinator, loaded: LoadedModel) -> None:
        self._coordinator = coordinator
        self._loaded = loaded
        self._flights: deque[Flight] = deque()

    @property
    def in_flight(self) -> int:
        """Steps submitted and not collected."""
        return len(self._flights)

    @property
    def oldest(self) -> int:
        """The number of the oldest step in flight."""
        return self._flights[0].number

    async def submit(self, sequences: Sequence[SequenceStep], *, logits: bool = False) -> None:
        """Queue a step behind those before it; a checkpoint.

        A step that is queued behind another may begin with tokens that the cards will have chosen
        in that one (`kernels.program.chosen_token`).
        """
        number = self._coordinator.count_step()
        with self._coordinator.span("submit", number):
            await self._submit(number, sequences, logits)

    async def _submit(self, number: int, sequences: Sequence[SequenceStep], logits: bool) -> None:
        loaded, parameters = self._loaded, encode_step(sequences)
        trace = self._coordinator.trace
        outputs = sum(len(s.outputs) for s in sequences)
        flight = Flight(number, outputs, len(loaded.plan.cards), trace)
        self._flights.append(flight)
        if trace is not None:
            trace.step(number, loaded, sequences)
        posted = 0
        try:
            for card in loaded.plan.cards:
                request = RunStep(
                    loaded.programs[card],
                    _reads(loaded, card, outputs, logits),
                    buffers=(parameters,),
                )
                await self._coordinator.post(card, request, flight.callback(card))
                posted += 1
        except BaseException:
            flight.forget(len(loaded.plan.cards) - posted)
            raise

    async def result(self) -> StepResult:
        """Wait for the oldest step and collect its outputs.

        Raises what a card reports, and as `ProgressWatch.look`.
        """
        flight = self._flights[0]
        with self._coordinator.span("wait for", flight.number):
            await self._settled(flight)
        if flight.errors:
            raise flight.cause()
        self._flights.popleft()
        return _assemble(self._loaded, flight)

    async def _settled(self, flight: Flight) -> None:
        if flight.settled.is_set():
            return
        # A step of a slow card takes long, and to look costs it a message.
        look_min_s = self._coordinator.hang_timeout_s / 10
        cards, down = self._loaded.plan.cards, self._loaded.down
        await settled(self._coordinator, flight, cards, look_min_s, down)

    async def all_back(self) -> None:
        """Wait until every card has answered every step."""
        for flight in self._flights:
            await flight.all_back.wait()


class Flight:
    """One step under way: settled when all replies are there, or at the first error."""

    def __init__(self, number: int, outputs: int, cards: int, trace: Trace | None = None) -> None:
        self.number = number
        self.outputs = outputs
        self._trace = trace
        self.replies: dict[int, StepDone] = {}
        self.errors: list[SpankerError] = []
        self.settled = trio.Event()
        self.all_back = trio.Event()
        self._missing = cards

    def callback(self, card: int) -> Callable[[Message | SpankerError], None]:
        return functools.partial(self._arrived, card)

    def _arrived(self, card: int, reply: Message | SpankerError) -> None:
        if self._trace is not None:
            self._trace.answered(card, self.number, reply)
        if isinstance(reply, SpankerError):
            self.errors.append(reply)
        elif isinstance(reply, StepDone):
            self.replies[card] = reply
        self._one_back()

    def completed(self, card: int, completion: Completion) -> None:
        """A card has done its part, and no message told of it: it brings nothing back."""
        if completion.error is None and self._trace is None:
            self.replies[card] = _NOTHING
            self._one_back()
        elif isinstance(completion.error, SpankerError):
            self._arrived(card, completion.error)
        else:
            self._arrived(card, StepDone(completion.fence, completion.busy_ns))

    def _one_back(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.settled.set()
            self.all_back.set()
        elif self.errors:
            self.settled.set()

    def absent(self, card: int) -> None:
        """A card that has nothing to do in it."""
        self.replies[card] = _NOTHING
        self._one_back()

    def misses(self, card: int) -> bool:
        """Whether a card has not answered well."""
        return card not in self.replies

    def forget(self, count: int) -> None:
        """So many requests were never made."""
        self._missing -= count
        if not self._missing:
            self.all_back.set()

    def cause(self) -> SpankerError:
        """The error that explains the others: aborted cards only follow."""
        for error in self.errors:
            if not isinstance(error, CardAbortedError):
                return error
        return self.errors[0]


async def settled(
    coordinator: Coordinator,
    flight: Flight,
    cards: Sequence[int],
    look_min_s: float = 0.0,
    avoided: Down = ALL_UP,
) -> None:
    """Wait until a run on these cards has settled, which needs none of the links that are
    `avoided`; raises as `ProgressWatch.look`."""
    watch: ProgressWatch | None = None
    timeout_s = coordinator.hang_timeout_s
    look_s = min(max(WATCH_S, look_min_s), timeout_s / LOOKS_MIN)
    if flight.settled.is_set():
        await trio.lowlevel.checkpoint()
    while not flight.settled.is_set():
        with trio.move_on_after(look_s):
            await flight.settled.wait()
        if not flight.settled.is_set():
            looks = math.ceil(timeout_s / look_s)
            watch = watch or ProgressWatch(coordinator, cards, looks, avoided)
            await watch.look(flight)


class ProgressWatch:
    """Tells a slow step from a hung card: by progress, not by a fixed wait.

    It is looks that are counted, not time: while this process stands still nobody looks, and the
    cards may stand still, too.
    """

    def __init__(
        self, coordinator: Coordinator, cards: Sequence[int], looks: int, avoided: Down = ALL_UP
    ) -> None:
        self._coordinator = coordinator
        self._avoided = avoided
        self._clients = {card: coordinator.clients[card] for card in cards}
        self._looks = looks
        self._left = looks
        self._progress = -1
        self._since = trio.current_time()

    async def look(self, flight: Flight) -> None:
        """Raise CardHungError when nothing has moved on any card between so many looks,
        CardLinkDownError when one waits for a link that is down, and CardLinkError when nothing
        moves and a message over the host has got lost, which somebody must be waiting for."""
        counters: dict[int, Counters] = {}
        lossy: list[int] = []

        async def count() -> None:
            for card, client in self._clients.items():
                counters[card], lost = await client.count()
                if lost:
                    lossy.append(card)

        coordinator = self._coordinator
        link_s = coordinator.link_s(tuple(self._clients.values()))
        await in_time(coordinator.hang_timeout_s + link_s, count)
        missing = [card for card in self._clients if card not in counters]
        for card, own in counters.items():
            if own.waiting_for in own.links_down and (own.waiting_for, card) not in self._avoided:
                raise CardLinkDownError(
                    f"card {card} waits for card {own.waiting_for}, and the link between them is "
                    f"down",
                    card=card,
                    peer=own.waiting_for,
                )
        progress = sum(c.progress for c in counters.values())
        if progress != self._progress and not missing:
            self._progress, self._since, self._left = progress, trio.current_time(), self._looks
            return
        if lossy and not missing:
            raise CardLinkError(
                f"a message over the host between card {lossy[0]} and a peer got lost between that "
                f"card and the host",
                card=lossy[0],
            )
        self._left -= 1
        if missing or not self._left:
            idle_s = trio.current_time() - self._since
            # Whoever holds work and waits for nobody; then whoever has not taken what it waits for,
            # by counts of bytes, which are wrong where some got lost.
            idle = [c for c, own in counters.items() if own.queued and own.waiting_for is None]
            stuck = missing or idle or [c for c in counters if self._has_what_it_needs(c, counters)]
            # One that holds nothing and has not answered was not reached, or not heard.
            unheard = [c for c, own in counters.items() if flight.misses(c) and not own.queued]
            card = next(iter((*stuck, *unheard, *self._clients)))
            does = "holds a step" if stuck or not unheard else "has not answered a step"
            raise self._coordinator.hung(
                self._clients[card],
                f"hangs: it {does} and no card of the fleet has made progress for {idle_s:.1f} s",
            )

    def _has_what_it_needs(self, card: int, counters: dict[int, Counters]) -> bool:
        """Whether a card that waits for a peer could go on: that one has sent bytes, and this one
        has not taken them."""
        own = counters[card]
        if not own.queued or own.waiting_for not in counters:
            return bool(own.queued)
        return self._coordinator.links.under_way(own.waiting_for, card, counters) > 0


def _reads(
    loaded: LoadedModel, card: int, outputs: int, logits: bool
) -> tuple[tuple[int, int, int], ...]:
    """What to bring back from a card after a step: its part of the outputs."""
    for share in loaded.output_shares:
        if share.card == card and outputs:
            handles, v = loaded.handles[card], share.vocabulary.size
            reads = [
                (handles["stats"], 0, outputs * chunks(v) * 8),
                (handles["top"], 0, outputs * loaded.limits.candidates * 8),
            ]
            if logits:
                reads.append((handles["logits"], 0, outputs * v * 4))
            return tuple(reads)
    return ()


def _assemble(loaded: LoadedModel, flight: Flight) -> StepResult:
    parts: list[_Part] = []
    if flight.outputs:
        for share in loaded.output_shares:
            stats, top, *rest = flight.replies[share.card].buffers
            parts.append(_Part(bytes(stats), bytes(top), bytes(rest[0]) if rest else None))
    busy_ns = tuple(flight.replies[c].busy_ns for c in loaded.plan.cards)
    return StepResult(flight.number, parts, flight.outputs, loaded.limits.candidates, busy_ns)
