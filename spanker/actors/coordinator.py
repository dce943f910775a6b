# SPDX-License-Identifier: Apache-2.0
"""The coordinator: finds the cards, plans, loads a model onto them, runs steps, stops them.

It holds the fleet's nursery: every card actor is a child task, so that none outlives it.  What the
steps are for (sequences, sampling) is the business of session.py.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import attrs
import numpy as np
import numpy.typing as npt
import trio

from spanker.actors.card import CardActor
from spanker.actors.channel import (
    Channel,
    StreamChannel,
    memory_channel_pair,
    unix_channel_pair,
)
from spanker.actors.client import CardClient
from spanker.actors.host_link import HostLink
from spanker.actors.message import (
    PROTOCOL_VERSION,
    Abort,
    AllocBuffer,
    CardInfo,
    Counters,
    Describe,
    FreeBuffer,
    LoadProgram,
    Message,
    Ok,
    ReadBuffer,
    ReadCounters,
    Request,
    RunStep,
    StepDone,
    Stop,
    UnloadProgram,
    WriteBuffer,
)
from spanker.device.base import CardDevice
from spanker.errors import (
    CardAbortedError,
    CardError,
    CardHungError,
    CardLostError,
    ConfigError,
    SpankerError,
)
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.program import SequenceStep, encode_step
from spanker.native import lib
from spanker.sched.bandwidth import Profile
from spanker.sched.layout import card_buffers, card_bytes, chunks
from spanker.sched.plan import CardShare, Limits, Plan
from spanker.sched.topology import Topology

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

F32 = npt.NDArray[np.float32]
ReplyT = TypeVar("ReplyT", bound=Message)
Progress = Callable[[int, int], None]

# How often a step in flight is looked at, and how long an orderly stop or abort may take.
WATCH_S = 1.0
STOP_S = 2.0


@attrs.frozen
class LoadedModel:
    """A model on its cards: handles of its buffers and programs, by card number."""

    model: llama.LlamaModel
    plan: Plan
    limits: Limits
    handles: dict[int, dict[str, int]]
    programs: dict[int, int]

    @property
    def output_shares(self) -> tuple[CardShare, ...]:
        """The cards that hold rows of the vocabulary, in order of those rows."""
        shares = self.plan.stages[-1].shares
        return tuple(s for s in shares if not s.vocabulary.empty)


@attrs.frozen
class StepResult:
    """What came back for the outputs of a step, in their order (O outputs).

    `ids` and `values` (O, candidates of all cards) are each card's best, card after card; `stats`
    (O, chunks, 2) are (max, sum of exp) in order of the vocabulary; `logits` (O, vocabulary) or
    None.
    """

    ids: npt.NDArray[np.uint32]
    values: F32
    stats: F32
    logits: F32 | None
    busy_ns: tuple[int, ...]


class Coordinator:
    """The cards of one fleet.  Made by `open_coordinator`."""

    def __init__(
        self, clients: Sequence[CardClient], profile: Profile, *, hang_timeout_s: float
    ) -> None:
        self.clients = tuple(clients)
        self.profile = profile
        self.topology = Topology.with_mock(len(clients))
        self.cards: tuple[CardInfo, ...] = ()
        self._hang_timeout_s = hang_timeout_s
        self._epoch = 1
        self._step_lock = trio.Lock()
        # One model at a time, so that the memory it takes can be told from another's.
        self._load_lock = trio.Lock()

    async def discover(self) -> None:
        """Ask every card what it is; refuses a card that speaks or computes differently."""
        found: list[CardInfo] = []
        for client in self.clients:
            info = await client.request(Describe())
            if info.protocol_version != PROTOCOL_VERSION:
                raise CardError(
                    f"card {client.number} speaks protocol {info.protocol_version}, expected "
                    f"{PROTOCOL_VERSION}: run the same Spanker on both sides",
                    card=client.number,
                )
            if info.semantics_version != lib.SPK_SEMANTICS_VERSION:
                raise CardError(
                    f"card {client.number} computes by semantics {info.semantics_version}, "
                    f"expected {lib.SPK_SEMANTICS_VERSION}: its answers could differ; update it",
                    card=client.number,
                )
            found.append(info)
        self.cards = tuple(found)

    # --- loading ----------------------------------------------------------------------

    async def load(
        self,
        model: llama.LlamaModel,
        gguf: GGUFFile,
        plan: Plan,
        limits: Limits,
        progress: Progress | None = None,
    ) -> LoadedModel:
        """Put each card's share of the model on it.  `progress(done, total)` counts bytes sent.

        On any failure, cancellation included, what was allocated is freed again.
        """
        async with self._load_lock:
            return await self._load(model, gguf, plan, limits, progress)

    async def _load(
        self,
        model: llama.LlamaModel,
        gguf: GGUFFile,
        plan: Plan,
        limits: Limits,
        progress: Progress | None,
    ) -> LoadedModel:
        todo = {c: llama.uploads(model, gguf, plan, c, limits) for c in plan.cards}
        total = sum(u.nbytes for card in todo.values() for u in card)
        done = 0
        loaded = LoadedModel(model, plan, limits, {c: {} for c in plan.cards}, {})

        def sent(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        async def load_card(card: int) -> None:
            client, handles = self.clients[card], loaded.handles[card]
            for spec in card_buffers(model.shape, plan, card, limits):
                # A card moves its tables only while no step of another model runs.
                async with self._step_lock:
                    reply = await self._owning(client, AllocBuffer(spec.nbytes))
                    handles[spec.name] = reply.handle
            for upload in todo[card]:
                handle = handles[upload.buffer]
                for offset, data in upload.pieces():
                    view = data.data
                    await client.request(WriteBuffer(handle, offset, buffers=(view,)))
                    sent(len(view))
            program = llama.build_program(model, plan, card, limits).encode(handles)
            async with self._step_lock:
                loaded_program = await self._owning(client, LoadProgram(buffers=(program,)))
                loaded.programs[card] = loaded_program.program

        sent(0)
        before = await self._memory_used(plan)
        try:
            await _all([lambda c=card: load_card(c) for card in plan.cards])  # type: ignore[misc]
            self._check_memory(loaded, before, await self._memory_used(plan))
        except BaseException:
            with trio.move_on_after(STOP_S, shield=True):
                await self.unload(loaded)
            raise
        return loaded

    async def _owning(self, client: CardClient, request: Request[ReplyT]) -> ReplyT:
        """A request whose reply names what must be given back later: shielded, since cancelled in
        between it would leave on the card what nobody knows of.  A card answers it at once, once
        it has come over a host link that all cards may be using."""
        limit_s = STOP_S
        if self.profile.host_link_bytes_per_s is not None:
            nbytes = 4096 + sum(len(buffer) for buffer in request.buffers)
            limit_s += len(self.clients) * nbytes / self.profile.host_link_bytes_per_s
        try:
            with trio.move_on_after(limit_s, shield=True):
                return await client.request(request)
        except CardLostError:
            # Where everything is being cancelled, the card with it, that is what happened.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        raise CardHungError(
            f"card {client.number} has not answered {type(request).__name__} for {limit_s:.3g} s; "
            f"close the fleet and open it without that card",
            card=client.number,
        )

    async def _memory_used(self, plan: Plan) -> dict[int, int]:
        """Bytes of DDR in use, by card of the plan."""
        return {
            card: (await self.clients[card].request(ReadCounters())).ddr_used_bytes
            for card in plan.cards
        }

    def _check_memory(
        self, loaded: LoadedModel, before: dict[int, int], after: dict[int, int]
    ) -> None:
        """A card that counts other bytes than the plan would break every later plan."""
        for card in loaded.plan.cards:
            expected = card_bytes(loaded.model.shape, loaded.plan, card, loaded.limits)
            used = after[card] - before[card]
            if used != expected:
                raise CardError(
                    f"card {card} has taken {used:,} bytes of DDR for the model, plan "
                    f"{loaded.plan.name} says {expected:,}: does something else use the card?",
                    card=card,
                )

    async def unload(self, loaded: LoadedModel) -> None:
        """Free what a model holds on its cards; a card that is lost has nothing to free."""

        async def ask(client: CardClient, request: Request[Ok]) -> None:
            with contextlib.suppress(CardError):
                await client.request(request)

        # Not one by one: hundreds of answers over a slow host link take seconds.
        async with trio.open_nursery() as nursery:
            for card, handles in loaded.handles.items():
                client = self.clients[card]
                if card in loaded.programs:
                    await ask(client, UnloadProgram(loaded.programs.pop(card)))
                for name in list(handles):
                    nursery.start_soon(ask, client, FreeBuffer(handles.pop(name)))

    # --- steps ------------------------------------------------------------------------

    async def step(
        self, loaded: LoadedModel, sequences: Sequence[SequenceStep], *, logits: bool = False
    ) -> StepResult:
        """Run one step on every card of the plan and collect the outputs.

        A card's failure aborts the step on all cards and is raised; CardHungError when no card has
        made progress for the hang timeout.  Cancellation aborts the step too.
        """
        parameters = encode_step(sequences)
        outputs = sum(len(s.outputs) for s in sequences)
        requests = {
            card: RunStep(
                loaded.programs[card],
                _reads(loaded, card, outputs, logits),
                buffers=(parameters,),
            )
            for card in loaded.plan.cards
        }
        async with self._step_lock:
            replies = await self._run(requests)
        return _assemble(loaded, replies, outputs, logits)

    async def read_logits(self, loaded: LoadedModel, output: int) -> F32:
        """The whole logits (vocabulary,) of one output of the last step."""
        parts: list[F32] = []
        for share in loaded.output_shares:
            nbytes = share.vocabulary.size * 4
            handle = loaded.handles[share.card]["logits"]
            reply = await self.clients[share.card].request(
                ReadBuffer(handle, output * nbytes, nbytes)
            )
            parts.append(np.frombuffer(reply.buffers[0], np.float32))
        return np.concatenate(parts)

    async def _run(self, requests: dict[int, RunStep]) -> dict[int, StepDone]:
        waiting = _Replies(len(requests))
        posted = 0
        try:
            for card, request in requests.items():
                await self.clients[card].post(request, waiting.callback(card))
                posted += 1
            watch = _ProgressWatch(self, tuple(requests), self._hang_timeout_s)
            while not waiting.settled.is_set():
                with trio.move_on_after(min(WATCH_S, self._hang_timeout_s / 4)):
                    await waiting.settled.wait()
                if not waiting.settled.is_set():
                    await watch.look()
        except BaseException:
            waiting.forget(len(requests) - posted)
            with trio.CancelScope(shield=True):
                await self._abort(waiting)
            raise
        if waiting.errors:
            with trio.CancelScope(shield=True):
                await self._abort(waiting)
            raise waiting.cause()
        return waiting.replies

    async def _abort(self, waiting: _Replies) -> None:
        """Enter a new epoch on every card and let what was posted come back; bounded in time."""
        self._epoch += 1
        with trio.move_on_after(STOP_S):
            await self._tell_all(Abort(self._epoch))
            await waiting.all_back.wait()

    async def counters(self) -> tuple[Counters, ...]:
        """The counters of every card."""
        return tuple([await client.request(ReadCounters()) for client in self.clients])

    async def stop(self) -> None:
        """Ask every card actor to stop; bounded in time, errors ignored: killing comes next."""
        with trio.move_on_after(STOP_S):
            await self._tell_all(Stop())

    async def _tell_all(self, request: Request[Ok]) -> None:
        """At the same time, so that a card that does not answer holds up no other."""

        async def tell(client: CardClient) -> None:
            with contextlib.suppress(SpankerError):
                await client.request(request)

        async with trio.open_nursery() as nursery:
            for client in self.clients:
                nursery.start_soon(tell, client)


class _Replies:
    """Collects the replies of a step: settled when all are there, or at the first error."""

    def __init__(self, expected: int) -> None:
        self.replies: dict[int, StepDone] = {}
        self.errors: list[SpankerError] = []
        self.settled = trio.Event()
        self.all_back = trio.Event()
        self._missing = expected

    def callback(self, card: int) -> Callable[[Message | SpankerError], None]:
        def arrived(reply: Message | SpankerError) -> None:
            self._missing -= 1
            if isinstance(reply, SpankerError):
                self.errors.append(reply)
            elif isinstance(reply, StepDone):
                self.replies[card] = reply
            if self.errors or not self._missing:
                self.settled.set()
            if not self._missing:
                self.all_back.set()

        return arrived

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


class _ProgressWatch:
    """Tells a slow step from a hung card: by progress, not by a fixed wait."""

    def __init__(self, coordinator: Coordinator, cards: Sequence[int], timeout_s: float) -> None:
        self._coordinator = coordinator
        self._cards = cards
        self._timeout_s = timeout_s
        self._progress = -1
        self._since = trio.current_time()

    async def look(self) -> None:
        """Raise CardHungError when nothing has moved on any card for the timeout."""
        counters: dict[int, Counters] = {}
        with trio.move_on_after(self._timeout_s):
            for card in self._cards:
                counters[card] = await self._coordinator.clients[card].request(ReadCounters())
        missing = [card for card in self._cards if card not in counters]
        progress = sum(c.progress for c in counters.values())
        if progress != self._progress and not missing:
            self._progress, self._since = progress, trio.current_time()
        elif missing or trio.current_time() - self._since >= self._timeout_s:
            idle_s = trio.current_time() - self._since
            stuck = missing or [
                card for card, c in counters.items() if c.queued and c.waiting_for is None
            ]
            card = stuck[0] if stuck else self._cards[0]
            raise CardHungError(
                f"card {card} hangs: it holds a step and no card of the fleet has made progress "
                f"for {idle_s:.1f} s; close the fleet and open it without that card",
                card=card,
            )


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


def _assemble(
    loaded: LoadedModel, replies: dict[int, StepDone], outputs: int, logits: bool
) -> StepResult:
    ids: list[npt.NDArray[np.uint32]] = []
    values: list[F32] = []
    stats: list[F32] = []
    rows: list[F32] = []
    k = loaded.limits.candidates
    if outputs:
        for share in loaded.output_shares:
            buffers = replies[share.card].buffers
            stats.append(np.frombuffer(buffers[0], np.float32).reshape(outputs, -1, 2))
            top = np.frombuffer(buffers[1], np.uint32).reshape(outputs, 2 * k)
            ids.append(top[:, :k])
            values.append(top[:, k:].view(np.float32))
            if logits:
                rows.append(np.frombuffer(buffers[2], np.float32).reshape(outputs, -1))
    none: F32 = np.zeros((0, 0), np.float32)
    return StepResult(
        ids=np.concatenate(ids, axis=1) if ids else none.astype(np.uint32),
        values=np.concatenate(values, axis=1) if values else none,
        stats=np.concatenate(stats, axis=1) if stats else none.reshape(0, 0, 2),
        logits=np.concatenate(rows, axis=1) if rows else None,
        busy_ns=tuple(replies[c].busy_ns for c in loaded.plan.cards),
    )


async def _all(jobs: Sequence[Callable[[], object]]) -> None:
    """Run async callables together; the first error, alone, is what is raised."""
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(job: Callable[[], object]) -> None:
            try:
                await job()  # type: ignore[misc]
            except Exception as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        for job in jobs:
            nursery.start_soon(run, job)
    try:
        if errors:
            raise errors[0]
    finally:
        # The tracebacks refer to the frames that refer to the list: a cycle.
        errors.clear()


# --- opening ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_coordinator(
    devices: Sequence[CardDevice],
    profile: Profile,
    *,
    channel: str = "memory",
    hang_timeout_s: float = 10.0,
) -> AsyncIterator[Coordinator]:
    """Start a card actor for each device, discover the cards, and stop everything at exit.

    `channel` is how messages travel: `memory` or `unix`.  A profile with a throttled host link
    sends them over that link instead.  The actors own the devices and close them.
    """
    if not math.isfinite(hang_timeout_s) or hang_timeout_s <= 0:
        raise ConfigError(f"the hang timeout must be a positive time, got {hang_timeout_s}")
    make_pair = _channel_maker(profile, channel)
    async with trio.open_nursery() as nursery:
        clients: list[CardClient] = []
        scopes: list[trio.CancelScope] = []
        for device in devices:
            host_end, card_end = make_pair(f"channel of card {device.number}")
            clients.append(CardClient(device.number, host_end))
            # Cancellation from outside must not reach the cards before their coordinator has asked
            # them to stop; it does so below, within STOP_S.
            scopes.append(trio.CancelScope(shield=True))
            nursery.start_soon(_serve, CardActor(card_end, device), clients[-1], scopes[-1])
        coordinator = Coordinator(clients, profile, hang_timeout_s=hang_timeout_s)
        try:
            await coordinator.discover()
            yield coordinator
        finally:
            with trio.CancelScope(shield=True):
                await coordinator.stop()
                for client in clients:
                    await client.aclose()
            for scope in scopes:
                scope.cancel()


def _channel_maker(profile: Profile, channel: str) -> Callable[[str], tuple[Channel, Channel]]:
    if channel not in ("memory", "unix"):
        raise ConfigError(f"no channel {channel!r}: expected memory or unix")
    if profile.host_link_bytes_per_s is None:
        if channel == "unix":
            return lambda name: unix_channel_pair(name=name)
        return lambda name: memory_channel_pair(name=name)
    link = HostLink(profile.host_link_bytes_per_s, profile.host_link_latency_s)

    def paced(name: str) -> tuple[Channel, Channel]:
        host, card = link.stream_pair()
        return StreamChannel(host, name=name), StreamChannel(card, name=name)

    return paced


async def _serve(actor: CardActor, client: CardClient, scope: trio.CancelScope) -> None:
    """Run both ends of a card's channel until told to stop."""
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_supervise, actor, client)
            await client.run()


async def _supervise(actor: CardActor, client: CardClient) -> None:
    """Turn the end of an actor, however it comes, into an error for whoever waits on its card.

    The channel closes after that: it would only tell that it was closed, not why.
    """
    try:
        try:
            await actor.serve()
            error = CardLostError(f"card {client.number} has stopped", card=client.number)
        except Exception as raised:
            crash = raised
            while isinstance(crash, ExceptionGroup):
                crash = crash.exceptions[0]
            error = CardLostError(
                f"card {client.number} is lost: its actor crashed with "
                f"{type(crash).__name__}: {crash}; close the fleet and open it again",
                card=client.number,
            )
            error.__cause__ = crash
        client.fail(error)
    finally:
        await actor.aclose()
