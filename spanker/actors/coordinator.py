# SPDX-License-Identifier: Apache-2.0
"""The coordinator: finds the cards, plans, loads a model onto them, runs steps, stops them.

It holds the fleet's nursery: every card actor is a child task, so that none outlives it.  Steps are
in steps.py, the bytes of a load in loading.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import attrs
import numpy as np
import trio

from spanker.actors import copying, loading
from spanker.actors.card_life import CardLife
from spanker.actors.card_locks import CardLocks
from spanker.actors.channel import (
    Channel,
    StreamChannel,
    memory_channel_pair,
    unix_channel_pair,
)
from spanker.actors.client import Answer, Callback, CardClient, raw_bytes
from spanker.actors.link_watch import LinkWatch
from spanker.actors.message import (
    PROTOCOL_VERSION,
    Abort,
    AllocBuffers,
    BuffersAllocated,
    CardInfo,
    Counters,
    Describe,
    FreeBuffer,
    LoadProgram,
    Message,
    Ok,
    OpenWindows,
    ProgramLoaded,
    ReadBuffer,
    ReadCounters,
    Relayed,
    Request,
    StartTrace,
    Stop,
    UnloadProgram,
)
from spanker.actors.patience import Patience, in_time
from spanker.actors.steps import F32, LoadedModel, StepPipe, StepResult
from spanker.device.base import CardDevice
from spanker.errors import (
    CardError,
    CardHungError,
    ConfigError,
    SpankerError,
    again,
)
from spanker.events import CardJoined, CardLost, CardReturned, CardSlow, EventLog
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.packed import PackedFile
from spanker.kernels.program import Program, SequenceStep
from spanker.native import lib
from spanker.sched.bandwidth import CardSpeed, Profile
from spanker.sched.copies import check_copy_ways
from spanker.sched.detours import check_ways
from spanker.sched.layout import card_buffers, card_bytes
from spanker.sched.pages import PageMove, Seats, Table, seated
from spanker.sched.plan import FleetPlan, Limits, Plan
from spanker.sched.topology import Link, Topology
from spanker.values import Value

if TYPE_CHECKING:
    from spanker.actors.around import Around
    from spanker.actors.host_link import HostLink
    from spanker.actors.paced import PacedLink
    from spanker.actors.trace import Trace

ReplyT = TypeVar("ReplyT", bound=Message)
OwnedT = TypeVar("OwnedT", BuffersAllocated, ProgramLoaded)
Progress = Callable[[int, int], None]

_NO_SPAN = contextlib.nullcontext()

# How long an abort may take, or giving programs back, and an answer at least.
STOP_S = 2.0
# What may be ahead of a message to a card, or of its answer, besides requests: what goes over the
# host between cards, as far as the host link takes it before it is read.
RELAYED_AHEAD_BYTES = 512 << 10
# How long a fleet takes to close, all of that included: then its cards are killed.
CLOSE_S = 0.8


class Coordinator:
    """The cards of one fleet.  Made by `open_coordinator`."""

    def __init__(
        self,
        clients: Sequence[CardClient],
        profile: Profile,
        *,
        hang_timeout_s: float,
        modelled: bool = False,
        hollow: bool = False,
        topology: Topology | None = None,
        lives: Sequence[CardLife] = (),
        new_life: Callable[[CardDevice], CardLife] | None = None,
        hands_on: bool = True,
        nursery: trio.Nursery,
    ) -> None:
        # By card number; one that returns has a new one.
        self.clients = list(clients)
        self._lives = list(lives)
        self._new_life = new_life
        self._reviving = trio.Lock()
        # While cards are told to end, that they do is no loss.
        self._stopping = False
        self._in_use = trio.CancelScope()
        self._left = trio.Event()
        # How often each card has been taken into use anew: what was put on it before is gone.
        self.births = [0] * len(clients)
        self.profile = profile
        # Cards that are used no more, and why.
        self.lost: dict[int, CardError] = {}
        # Stragglers: how many times as long as it should each of them takes.
        self.slow: dict[int, float] = {}
        # Cards that are to hold no model for now, and those of them that may still hold one.
        self.drained: set[int] = set()
        self.draining: set[int] = set()
        self.events = EventLog()
        # As of the cards; a fleet is of one kind.
        self.modelled = modelled
        self.hollow = hollow
        # Whether cards bring each other weights: what is wrong on one would be on others then.
        self.hands_on = hands_on
        # The model of the host link, where there is one.
        self.host_link: HostLink | PacedLink | None = None
        self.links = LinkWatch(self, topology or Topology.with_mock(len(clients)))
        self._concerned: list[Callable[[], None]] = []
        self.cards: tuple[CardInfo, ...] = ()
        # Where what happens is told, while someone wants to know.
        self.trace: Trace | None = None
        self._steps = 0
        self._hang_timeout_s = hang_timeout_s
        self._locks = CardLocks(len(clients))
        self._every_card = range(len(clients))
        # The epoch of each card, None where it is not known, and the highest there has been.
        self._epochs: list[int | None] = [1] * len(clients)
        self._epoch = 1
        # One model at a time, so that the memory it takes can be told from another's.
        self._load_lock = trio.Lock()
        # What is given back is so whatever becomes of who wanted that.
        self._nursery = nursery
        self._giving_back = 0
        self._given_back = trio.Event()
        # Clients that were asked for something nobody waits for, with the end of giving it back.
        self._disowned: list[tuple[CardClient, trio.Event]] = []
        # Cards that have not answered after an exception, so far.
        self._doubted = set[CardClient]()

    async def discover(self) -> None:
        """Ask every card what it is, all at the same time; refuses a card that speaks or computes
        differently.  Raises as `ask`."""
        found: dict[int, CardInfo] = {}

        async def meet(client: CardClient) -> None:
            found[client.number] = await self._describe(client)

        await loading.run_all([functools.partial(meet, client) for client in self.clients])
        self.cards = tuple([found[client.number] for client in self.clients])

    async def _describe(self, client: CardClient) -> CardInfo:
        """What a card says of itself; CardError where it speaks or computes differently."""
        info = await self.ask_client(client, Describe())
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
        return info

    @property
    def alive(self) -> tuple[int, ...]:
        """The cards that models may use: neither drained nor, as far as anybody knows, lost."""
        out = self.drained.union(self.lost)
        return tuple(card for card in self._every_card if card not in out)

    def failed(self, client: CardClient, error: CardError) -> None:
        """For the clients: whoever finds out that a card is gone or hangs has its client fail, and
        that is how a card is lost, unless there is a newer one or the fleet is being closed."""
        used = client.number < len(self.clients) and self.clients[client.number] is client
        if used and not self._stopping:
            self.lose(error)

    def lose(self, error: CardError, births: Sequence[int] = ()) -> bool:
        """Use the card of this error no more: its actor ends, and whoever asks it for something
        gets the error.  False where no card is to blame.  `births` are those of the cards when what
        failed was begun: a newer card is not the one to blame."""
        card = error.card
        if card is None:
            return False
        if card in self.lost or (births and births[card] != self.births[card]):
            return True  # someone else has found out before
        # Not the one with the traceback, which keeps what its frames hold.
        self.lost[card] = again(error)
        self.clients[card].fail(self.lost[card])
        if self._lives:
            self._lives[card].end()
        self.events.tell(CardLost(trio.current_time(), card, _reason(error, card)))
        return True

    async def revive(self, card: int) -> None:
        """Use a card that was lost again, as a new one; models do not know of it yet.

        Raises what stands in its way, and then the card stays lost.
        """
        async with self._reviving:
            if card in self.lost:
                await self._revive(card)

    async def _revive(self, card: int) -> None:
        life, begun = self._lives[card], list[CardClient]()
        limit_s = self.answer_s((self.clients[card],))

        async def begin() -> None:
            begun.append(await life.again())

        try:
            if not await in_time(limit_s, begin):
                raise self.hung(self.clients[card], f"has not ended for {limit_s:.3g} s")
            client = begun[0]
            info = await self._describe(client)
            own = await self.ask_client(client, ReadCounters())
            others = await self.counters_of([c for c in self._every_card if c not in self.lost])
            traced: Trace | None = None
            while traced is not self.trace:  # one may begin, or end, meanwhile
                traced = self.trace
                await self.ask_client(client, StartTrace(traced.card_events if traced else 0))
            if client.failure is not None:
                raise again(client.failure)
        except BaseException:
            life.end()
            raise
        # All of it at once: nobody is to meet a new card and take it for the old one.
        self.clients[card] = client
        self.cards = (*self.cards[:card], info, *self.cards[card + 1 :])
        self.births[card] += 1
        self._epochs[card] = None
        if traced is not None:
            traced.returned(card)
        del self.lost[card]
        self.slow.pop(card, None)
        self.links.forget(card, {**others, card: own})
        self.events.tell(CardReturned(trio.current_time(), card))

    async def join(self, device: CardDevice, link: Callable[[], Sequence[Link] | None]) -> None:
        """Use one more card, of the next number; models do not know of it yet.  `link` links it
        with others, all of them where it does not say which: it is called while nothing is queued
        on any card.

        Raises what stands in its way; then, or cancelled, the device is closed and all is as
        before.
        """
        card = len(self.clients)
        assert device.number == card and self._new_life is not None
        life = self._new_life(device)
        client = life.begin()
        try:
            info = await self._describe(client)
            async with self.changing_memory():
                if not self.modelled:
                    # Those that it is linked with answer: `link` waits for none that is silent.
                    await self.counters_of([c for c in self._every_card if c not in self.lost])
                if client.failure is not None:
                    raise again(client.failure)
                # A trace may have begun while the cards were waited for.
                if self.trace is not None:
                    raise ConfigError(
                        "a fleet that is traced takes no more cards: end the trace first"
                    )
                # Nobody has the cards meanwhile who does not know of it.
                self._take_in(client, info, life, link)
        except BaseException:
            life.end()
            with trio.CancelScope(shield=True):
                await life.ended()
            raise
        self.events.tell(CardJoined(trio.current_time(), card, info.name))

    @trio.lowlevel.enable_ki_protection
    def _take_in(
        self,
        client: CardClient,
        info: CardInfo,
        life: CardLife,
        link: Callable[[], Sequence[Link] | None],
    ) -> None:
        """Have one more card, or, where it cannot be linked, not: Ctrl-C comes before or after."""
        links = link()
        self.clients.append(client)
        self.cards = (*self.cards, info)
        self._lives.append(life)
        self.births.append(0)
        self._epochs.append(None)
        self._locks.add()
        self._every_card = range(len(self.clients))
        self.links.join(client.number, links)

    def pace(self, factors: Mapping[int, float]) -> None:
        """Plan from now on with cards that take so many times as long as they should."""
        for card, factor in factors.items():
            self.slow[card] = factor
            if factor <= 1:
                del self.slow[card]
            self.events.tell(CardSlow(trio.current_time(), card, factor))

    @property
    def speeds(self) -> Profile:
        """The fleet's profile, with what is known of its stragglers."""
        if not self.slow:
            return self.profile
        known = {speed.card: speed for speed in self.profile.cards}
        for card, factor in self.slow.items():
            speed = self.profile.card(card)
            known[card] = CardSpeed(card, speed.memory / factor, speed.compute / factor)
        return attrs.evolve(self.profile, cards=tuple(known[card] for card in sorted(known)))

    def whole(self, loaded: LoadedModel) -> bool:
        """Whether what was loaded is still on all of its cards: none of them is a new one."""
        return all(self.holds(loaded, card) for card in loaded.plan.cards)

    def holds(self, loaded: LoadedModel, card: int) -> bool:
        """Whether what was loaded has something on a card, and that is still the same."""
        if card not in loaded.handles:
            return False
        return not loaded.births or loaded.births[card] == self.births[card]

    @property
    def relays(self) -> bool:
        """Whether cards without a link can exchange over the host."""
        return all(info.relays for info in self.cards)

    def relay(self, card: int, message: Relayed) -> None:
        """Pass on what a card sends a peer over the host."""
        if message.peer in self._every_card and message.peer not in self.lost:
            self.clients[message.peer].pass_on(card, message.buffers[0])

    def concern(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever links have changed; what comes back ends that."""
        self._concerned.append(listener)
        return lambda: self._concerned.remove(listener)

    def changed(self) -> None:
        """For the watch over links: what it says now is not what it said."""
        for listener in tuple(self._concerned):
            listener()

    @property
    def topology(self) -> Topology:
        """The cards and the links between them, as they are now."""
        return self.links.topology

    def hung(self, client: CardClient, what: str) -> CardHungError:
        """A card does nothing any more, as `what` says: it is lost, and this is the error for who
        has found out."""
        error = CardHungError(
            f"card {client.number} {what}; close the fleet and open it without that card",
            card=client.number,
        )
        client.fail(error)
        return again(error)

    def silent(self, client: CardClient, limit_s: float) -> CardHungError:
        """The same where it has answered nothing for so long."""
        return self.hung(client, f"has not answered for {limit_s:.3g} s")

    # --- loading ----------------------------------------------------------------------

    async def load(
        self,
        model: llama.LlamaModel,
        gguf: GGUFFile | None,
        plan: FleetPlan,
        limits: Limits,
        progress: Progress | None = None,
        packed: PackedFile | None = None,
    ) -> tuple[LoadedModel, ...]:
        """Put each card's share of the model on it: for each replica of the plan, in order, what
        there is on its cards.  `progress(done, total)` counts bytes sent.

        Of a model without a file all weights are zero.  What its packed copy has is mapped by
        cards that can, and read from there by the others.

        On any failure, cancellation included, what was allocated is freed again.
        """
        async with self._load_lock:
            return await self._load(model, gguf, plan, limits, progress, packed)

    async def _load(
        self,
        model: llama.LlamaModel,
        gguf: GGUFFile | None,
        plan: FleetPlan,
        limits: Limits,
        progress: Progress | None,
        packed: PackedFile | None,
    ) -> tuple[LoadedModel, ...]:
        births = tuple(self.births)
        replicas = tuple(
            LoadedModel(
                model,
                replica,
                limits,
                {c: {} for c in replica.cards},
                {},
                self.links.down_among(replica.cards),
                births,
            )
            for replica in plan.replicas
        )
        # Along a chain everything goes over one link after the other.
        chains = copying.chains(plan, self.profile, straight=self.hands_on and not self.links.down)
        todo = {
            card: llama.uploads(model, gguf, plan.replicas[number], card, limits, packed)
            for (number, card), *_ in chains
        }
        total = sum(u.nbytes for card in todo.values() for u in card)
        done = 0
        at_once = self._messages_at_once(len(chains))

        mapping = self.mapping(tuple(todo), packed)

        def sent(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        async def load_chain(chain: copying.Chain) -> None:
            """From the host to the first card, from there to the others."""
            for number, card in chain:
                handles = replicas[number].handles[card]
                buffers = card_buffers(model.shape, plan.replicas[number], card, limits)
                for specs in loading.batched(buffers, loading.BATCH_MAX):
                    # A card moves its tables only while no step of another model runs.
                    new = await self.allocate(card, tuple(spec.nbytes for spec in specs))
                    handles.update(zip((spec.name for spec in specs), new, strict=True))
            number, first = chain[0]
            mapped = packed if first in mapping else None
            # Cards behind it in the chain would have their columns from it.
            alone = len(chain) == 1
            await self.bring(replicas[number], first, todo[first], at_once, mapped, sent, alone)
            if len(chain) > 1:
                names = {upload.buffer for upload in todo[first]}
                buffers = card_buffers(model.shape, plan.replicas[number], first, limits)
                await copying.copy(
                    self,
                    {card: replicas[number].handles[card] for number, card in chain},
                    [buffer for buffer in buffers if buffer.name in names],
                )
            for number, card in chain:
                loaded = replicas[number]
                loaded.programs[card] = await self._load_step(loaded, card)

        sent(0)
        before = await self._memory_used(plan)
        try:
            await loading.run_all([functools.partial(load_chain, chain) for chain in chains])
            self._check_memory(replicas, before, await self._memory_used(plan))
        except BaseException:
            await self._drop(*replicas)
            raise
        return replicas

    async def bring(
        self,
        loaded: LoadedModel,
        card: int,
        uploads: Sequence[llama.Upload],
        at_once: int,
        packed: PackedFile | None,
        sent: Callable[[int], None],
        alone: bool = True,
    ) -> None:
        """Write buffers of a model on a card, or, where it maps a `packed` copy, map what that has;
        the whole embedding too, `alone`, instead of copying columns of it."""
        handles = loaded.handles[card]
        if packed is not None:
            mapped = [upload for upload in uploads if upload.place is not None]
            uploads = [upload for upload in uploads if upload.place is None]
            idle = functools.partial(self.ask_between_steps, card)
            table = llama.mapped_table(loaded.model, loaded.plan, card, packed)
            if table is not None and alone:
                handles[table.buffer] = await self.open_window(card, table.nbytes)
                await loading.map_all(idle, packed.fd, [table], handles, lambda nbytes: None)
                columns = [u.nbytes for u in uploads if u.buffer == llama.COLUMNS]
                uploads = [u for u in uploads if u.buffer != llama.COLUMNS]
                sent(sum(columns))
            await loading.map_all(idle, packed.fd, mapped, handles, sent)
        await loading.upload(functools.partial(self.ask, card), uploads, handles, at_once, sent)

    def mapping(self, cards: Sequence[int], packed: PackedFile | None) -> list[int]:
        """Those of these cards that map a packed copy instead of holding its bytes."""
        # From small pages every step would read slower, and loading is only once.
        reached = [c for c in cards if self.clients[c].shares_memory and self.cards[c].maps]
        return reached if packed is not None and reached and packed.is_huge() else []

    def _messages_at_once(self, cards: int) -> int:
        """How many messages are under way to each of so many cards: together as many as there are
        cores to make the bytes."""
        return 1 if self.modelled else -(-len(os.sched_getaffinity(0)) // cards)

    async def move(
        self,
        held: LoadedModel,
        beside: Sequence[LoadedModel],
        gguf: GGUFFile | None,
        plan: Plan,
        limits: Limits,
        free: Sequence[int],
        packed: PackedFile | None = None,
        tables: Sequence[Table] = (),
    ) -> tuple[LoadedModel, Seats]:
        """Put what is `held` of a model onto the cards of another plan: weights come from where
        they are, on its cards and on those of its replicas `beside`, as far as cards hand them on,
        and else as in `load`.  The pages of these `tables` go along where they are all there, to
        the seats that come back.

        `free`: bytes on each card when nothing of it is there any more.  On any failure,
        cancellation included, all of it is freed.  Raises what cards report.
        """
        from spanker.actors import resharding

        seats = seated(tables, limits.kv_pages)
        pages = PageMove.of(tables, seats, held.limits, limits, relayed=self.relays)
        down, births = self.links.down_among(plan.cards), tuple(self.births)
        loaded = LoadedModel(
            held.model, plan, limits, {c: {} for c in plan.cards}, {}, down, births
        )
        async with self._load_lock:
            try:
                move = resharding.Move(self, held, beside, loaded, gguf, packed, pages)
                steps = move.planned(free)
                before = await self._memory_used(FleetPlan.of(plan))
                for card in plan.cards:
                    if self.holds(held, card):
                        before[card] -= self._expected_bytes(held, card)
                await move.carry_out(steps, self._messages_at_once(len(plan.cards)))
                if not move.keeps_pages:
                    seats = ((),) * len(tables)

                async def load_step(card: int) -> None:
                    loaded.programs[card] = await self._load_step(loaded, card)

                await loading.run_all([functools.partial(load_step, c) for c in plan.cards])
                self._check_memory((loaded,), before, await self._memory_used(FleetPlan.of(plan)))
            except BaseException:
                await self._drop(loaded, held)
                raise
        return loaded, seats

    async def _load_step(self, loaded: LoadedModel, card: int) -> int:
        return await self.load_program(card, loaded.program(card).encode(loaded.handles[card]))

    async def reroute(self, loaded: LoadedModel) -> LoadedModel:
        """Have a model's steps go around the links that are down now; its weights and KV stay where
        they are.  Between two of its steps, for who makes them.

        Where no other card leads around one it is the host that does.  Raises PlanError where that
        cannot be, when all is as before, and what cards report.
        """
        rerouted = attrs.evolve(loaded, down=self.links.down_among(loaded.plan.cards), programs={})
        if not self.relays:
            check_ways(loaded.plan, rerouted.down)
            if loaded.limits.kv_copies:
                check_copy_ways(loaded.plan, rerouted.down)
        try:
            for card in loaded.plan.cards:
                rerouted.programs[card] = await self._load_step(rerouted, card)
        except BaseException:
            await self._unload_programs(rerouted)
            raise
        await self._unload_programs(loaded)
        return rerouted

    async def _unload_programs(self, loaded: LoadedModel) -> None:
        programs = dict(loaded.programs)
        loaded.programs.clear()
        await self.give_programs_back(programs, loaded.births or self.births)

    async def owning(self, client: CardClient, request: Request[OwnedT]) -> OwnedT:
        """As `ask_client`, a request whose reply names what must be given back later.  Cancelled,
        it is only the waiting that ends: what a late answer names is given back, since nobody else
        knows of it."""
        limit_s = self._answer_s(client, request)
        answer, sent = Answer[OwnedT](), False

        async def ask() -> None:
            nonlocal sent
            await client.post(request, answer.arrived)
            sent = True
            await answer.come()

        try:
            answered = await in_time(limit_s, ask)
        except BaseException:
            if sent:
                disowning = functools.partial(self._disown, client, request, answer)
                self._disowned = [(c, over) for c, over in self._disowned if not over.is_set()]
                self._disowned.append((client, self._give_back_soon([disowning])))
            raise
        if not answered:
            raise self._unanswered(client, request, limit_s)
        return answer.take()

    async def _disown(
        self, client: CardClient, request: Request[OwnedT], answer: Answer[OwnedT]
    ) -> None:
        """Give back what a card answers to a request of somebody who does not wait any more."""
        limit_s = self._answer_s(client, request)
        if not await in_time(limit_s, answer.come):
            self._unanswered(client, request, limit_s)
            return
        with contextlib.suppress(SpankerError):
            await self._take_back(client, _given_back(answer.take()))

    async def caught_up(self, client: CardClient) -> None:
        """Wait until a card has been given back what it was asked for by those who do not wait any
        more: a buffer that a program of theirs names cannot be freed before."""
        for other, over in tuple(self._disowned):
            if other is client:
                await over.wait()

    async def post(self, card: int, request: Request[ReplyT], callback: Callback) -> None:
        """As `CardClient.post`; CardHungError where a card takes no message for the hang timeout,
        when nothing has been sent and the callback will not be called."""
        client = self.clients[card]
        if not client.behind:
            await client.post(request, callback)
            return
        posting = functools.partial(client.post, request, callback)
        limit_s = self._hang_timeout_s + self.link_s((client,))
        if not await in_time(limit_s, posting):
            raise self.silent(client, limit_s)

    async def ask(self, card: int, request: Request[ReplyT]) -> ReplyT:
        """A request that a card answers at once, or after the work of a message; CardHungError
        where it does not within `answer_s`."""
        return await self.ask_client(self.clients[card], request)

    async def ask_between_steps(self, card: int, request: Request[ReplyT]) -> ReplyT:
        """The same of what a card does only while nothing is queued on it."""
        async with self._locks.holding((card,)):
            return await self.ask(card, request)

    async def ask_client(
        self,
        client: CardClient,
        request: Request[ReplyT],
        told: Callable[[ReplyT], None] | None = None,
    ) -> ReplyT:
        """As `ask`, of a card that may have become a new one since, which is not asked; `told` as
        in `CardClient.request`."""
        limit_s = self._answer_s(client, request)
        reply: list[ReplyT] = []
        asking = functools.partial(client.request, request, *(() if told is None else (told,)))

        async def wait() -> None:
            reply.append(await asking())

        if await in_time(limit_s, wait):
            return reply.pop()
        raise self._unanswered(client, request, limit_s)

    async def ask_each(self, card: int, requests: Sequence[Request[Message]]) -> list[float]:
        """Requests to a card, one after the other, each of which is answered as by `ask`: the
        seconds that each answer took to come."""
        client, took_s = self.clients[card], list[float]()
        limit_s = max(self._answer_s(client, request) for request in requests)
        patience = Patience(limit_s)

        async def ask() -> None:
            for request in requests:
                begin = time.perf_counter()
                await client.request(request)
                took_s.append(time.perf_counter() - begin)
                patience.came()

        if await patience.with_(ask):
            return took_s
        raise self._unanswered(client, requests[len(took_s)], limit_s)

    def _answer_s(self, client: CardClient, request: Request[ReplyT]) -> float:
        """How long a card may take to answer a request that is made now."""
        return self.answer_s((client,), raw_bytes(request))

    def answer_s(self, clients: Sequence[CardClient], nbytes: int = 0) -> float:
        """How long these cards may take to answer what they are asked for now, so many bytes at
        most with the answer; not the progress of a step, for which they have the hang timeout."""
        return max(self._hang_timeout_s, STOP_S) + self.link_s(clients, nbytes)

    def _unanswered(
        self, client: CardClient, request: Request[ReplyT], limit_s: float
    ) -> CardHungError:
        what = type(request).__name__
        return self.hung(client, f"has not answered {what} for {limit_s:.3g} s")

    def link_s(self, clients: Sequence[CardClient], nbytes: int = 0) -> float:
        """How long the host link may keep a message of so many bytes to one of these cards, and its
        answer, behind what that card has yet to answer, with as many turns for every other card; 0
        where it is not modelled.  So much longer whoever waits for a card has patience."""
        rate = self.profile.host_link_bytes_per_s
        if rate is None:
            return 0.0
        ahead = max(client.unanswered_bytes for client in clients)
        return len(self.clients) * (RELAYED_AHEAD_BYTES + ahead + nbytes) / rate

    async def allocate(self, card: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Buffers of these sizes on a card, between two steps; whoever asks gives them back."""
        async with self._locks.holding((card,)):
            return (await self.owning(self.clients[card], AllocBuffers(tuple(sizes)))).handles

    async def open_window(self, card: int, nbytes: int) -> int:
        """A window on a card, between two steps; whoever asks gives it back."""
        async with self._locks.holding((card,)):
            return (await self.owning(self.clients[card], OpenWindows((nbytes,)))).handles[0]

    async def load_program(self, card: int, program: bytes) -> int:
        """A program on a card, between two steps; whoever asks unloads it."""
        async with self._locks.holding((card,)):
            request = LoadProgram(buffers=(program,))
            return (await self.owning(self.clients[card], request)).program

    async def give_programs_back(self, programs: Mapping[int, int], births: Sequence[int]) -> None:
        """The end of what `load_program` began, by card, which is waited for a while whatever is
        being cancelled; `births` were those of the cards then."""
        jobs = [
            functools.partial(self._give_back, self.clients[card], [UnloadProgram(program)])
            for card, program in programs.items()
            if births[card] == self.births[card]
        ]
        with trio.move_on_after(STOP_S, shield=True):
            await self._surely(jobs)

    async def _memory_used(self, plan: FleetPlan) -> dict[int, int]:
        """Bytes of DDR in use, by card of the plan."""
        await self.settled()
        return {card: (await self.ask(card, ReadCounters())).ddr_used_bytes for card in plan.cards}

    def _check_memory(
        self, replicas: Sequence[LoadedModel], before: dict[int, int], after: dict[int, int]
    ) -> None:
        """A card that counts other bytes than the plan would break every later plan."""
        for loaded in replicas:
            for card in loaded.plan.cards:
                expected = self._expected_bytes(loaded, card)
                used = after[card] - before[card]
                if used != expected:
                    raise CardError(
                        f"card {card} has taken {used:,} bytes of DDR for the model, plan "
                        f"{loaded.plan.name} says {expected:,}: does something else use the card?",
                        card=card,
                    )

    def _expected_bytes(self, loaded: LoadedModel, card: int) -> int:
        """Bytes of DDR that a model takes on a card."""
        granule = self.cards[card].ddr_granule
        shape, plan, limits = loaded.model.shape, loaded.plan, loaded.limits
        return card_bytes(shape, plan, card, limits, granule=granule)

    async def unload(self, *models: LoadedModel) -> None:
        """Free what models hold on their cards; as `free`."""
        everything = [(loaded, loaded.handles) for loaded in models]
        await self._surely([job for held in everything for job in self._freeing(*held)])

    async def _drop(self, *models: LoadedModel) -> None:
        """The same after an exception, as `cut_short`."""
        jobs: dict[CardClient, list[loading.Job]] = {}
        for loaded in models:
            for card, buffers in loaded.handles.items():
                freeing = self._freeing(loaded, {card: buffers})
                jobs.setdefault(self.clients[card], []).extend(freeing)
        await self.cut_short(
            {client: functools.partial(self._surely, todo) for client, todo in jobs.items()}
        )

    async def free(self, loaded: LoadedModel, buffers: Mapping[int, Sequence[str]]) -> None:
        """Free these buffers of a model, by card, and first its programs there; a card that is lost
        has nothing to free, and one that answers nothing for `answer_s` is lost.  Cancelled, it is
        only the waiting that ends.

        Not one by one: hundreds of answers over a slow host link take seconds, and a card that does
        not answer must not keep the others' memory.
        """
        await self._surely(self._freeing(loaded, buffers))

    def _freeing(
        self, loaded: LoadedModel, buffers: Mapping[int, Iterable[str]]
    ) -> list[loading.Job]:
        jobs: list[loading.Job] = []
        for card, names in buffers.items():
            if self.holds(loaded, card):
                handles = loaded.handles[card]
                first = (
                    [UnloadProgram(loaded.programs.pop(card))] if card in loaded.programs else []
                )
                rest = [FreeBuffer(handles.pop(name)) for name in tuple(names)]
                if first or rest:
                    client = self.clients[card]
                    jobs.append(functools.partial(self._give_back, client, first, rest))
        return jobs

    async def _give_back(self, client: CardClient, *batches: Sequence[Request[Ok]]) -> None:
        """Requests after which a card has less, one batch after the other."""
        await self.caught_up(client)
        await self._take_back(client, *batches)

    async def _take_back(self, client: CardClient, *batches: Sequence[Request[Ok]]) -> None:
        """The same of what nothing names that has yet to come."""
        limit_s = self.answer_s((client,))
        patience = Patience(limit_s)

        async def ask(request: Request[Ok]) -> None:
            with contextlib.suppress(CardError):
                await client.request(request)
            patience.came()

        async def give_back() -> None:
            for requests in batches:
                async with trio.open_nursery() as asking:
                    for request in requests:
                        asking.start_soon(ask, request)

        if not await patience.with_(give_back):
            # What it still holds nobody will ever know.
            self.silent(client, limit_s)

    async def _surely(self, jobs: Sequence[loading.Job]) -> None:
        """Run what gives something back, all together, to its end, also where the caller is
        cancelled meanwhile."""
        if jobs:
            await self._give_back_soon(jobs).wait()

    def _give_back_soon(self, jobs: Sequence[loading.Job]) -> trio.Event:
        """The same for who does not wait, or as long as it likes: the event is its end."""
        done = trio.Event()

        async def run() -> None:
            try:
                await loading.run_all(jobs)
            finally:
                done.set()
                self._giving_back -= 1
                if not self._giving_back:
                    self._given_back.set()

        if not self._giving_back:
            self._given_back = trio.Event()
        self._giving_back += 1
        self._nursery.start_soon(run)
        return done

    @contextlib.asynccontextmanager
    async def finishing(
        self, jobs: Callable[[], Mapping[CardClient, loading.Job]]
    ) -> AsyncIterator[None]:
        """At the end of the block do something at cards, all at the same time: to its end, or after
        an exception as `cut_short`."""
        try:
            yield
            await loading.run_all(tuple(jobs().values()))
        except BaseException:
            await self.cut_short(jobs())
            raise

    async def cut_short(self, jobs: Mapping[CardClient, loading.Job]) -> None:
        """What an exception leaves to do at cards, all at the same time, whatever is cancelled; it
        is only the waiting that ends early.

        After CLOSE_S, and that once: until a card that has not done its part by then answers again,
        nobody else waits for it like this, and closing the fleet begins with its end.
        """
        waiting, done = set(jobs) - self._doubted, trio.Event()

        async def do(client: CardClient) -> None:
            # It ends with the card, if not before.
            with trio.CancelScope(shield=True):
                await _ignoring_errors(jobs[client])  # type: ignore[arg-type]
            waiting.discard(client)
            if not waiting:
                done.set()

        for client in jobs:
            self._nursery.start_soon(do, client)
        if waiting:
            with trio.move_on_after(CLOSE_S, shield=True):
                await done.wait()
        self._doubt(waiting)

    def _doubt(self, clients: Iterable[CardClient]) -> None:
        async def hear(client: CardClient) -> None:
            try:
                await _ignoring_errors(functools.partial(client.request, Describe()))
            finally:
                self._doubted.remove(client)

        for client in set(clients) - self._doubted:
            self._doubted.add(client)
            self._nursery.start_soon(hear, client)

    async def settled(self) -> None:
        """Nothing is being given back any more for somebody who has not waited for it."""
        while self._giving_back:
            await self._given_back.wait()

    # --- steps ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def steps(self, loaded: LoadedModel) -> AsyncIterator[StepPipe]:
        """The cards of a model, for a series of its steps: nobody else's step runs there meanwhile.

        However the block is left, no step of it is queued any more: what has not been collected is
        aborted on these cards, and so is everything when one fails or the block is cancelled.
        """
        async with self._locks.holding(loaded.plan.cards):
            await self._agree(loaded.plan.cards)
            pipe = StepPipe(self, loaded)
            limit_s = CLOSE_S
            try:
                yield pipe
                limit_s = STOP_S
            except Exception:
                limit_s = STOP_S
                raise
            finally:
                if pipe.in_flight:
                    with trio.CancelScope(shield=True), self.span("abort", pipe.oldest):
                        await self.abort(pipe.all_back, loaded.plan.cards, limit_s)

    async def step(
        self, loaded: LoadedModel, sequences: Sequence[SequenceStep], *, logits: bool = False
    ) -> StepResult:
        """Run one step on every card of the plan and collect the outputs; as `StepPipe`."""
        async with self.steps(loaded) as pipe:
            await pipe.submit(sequences, logits=logits)
            return await pipe.result()

    def wanted(self, cards: Sequence[int]) -> bool:
        """Whether someone else waits for one of these cards: for steps, or to load something."""
        return self._locks.wanted(cards)

    @property
    def hang_timeout_s(self) -> float:
        """How long cards may make no progress before one is taken for hung."""
        return self._hang_timeout_s

    @contextlib.asynccontextmanager
    async def changing_memory(self) -> AsyncIterator[None]:
        """Within the block nobody else allocates or frees on the cards, and no step is queued."""
        async with self._load_lock:
            await self.settled()
            async with self.between_steps():
                yield

    async def take_cards(self, cards: Sequence[int] | None = None) -> None:
        """Wait until no step of anybody is queued on these cards, or all; then only the caller may
        queue some, until it gives them back.  No checkpoint where they are free."""
        cards = self._every_card if cards is None else cards
        if not self._locks.take_nowait(cards):
            await self._locks.take(cards)
        if self._agreed(cards):
            return
        try:
            await self._agree(cards)
        except BaseException:
            self._locks.give_back(cards)
            raise

    def give_cards_back(self, cards: Sequence[int] | None = None) -> None:
        """The end of what `take_cards` began; the caller's steps are done."""
        self._locks.give_back(self._every_card if cards is None else cards)

    @contextlib.asynccontextmanager
    async def between_steps(self, cards: Sequence[int] | None = None) -> AsyncIterator[None]:
        """Within the block no step of any model is queued on these cards, or all."""
        async with self._locks.holding(self._every_card if cards is None else cards):
            yield

    def now_ns(self) -> int:
        """The time by which this fleet's cards tell what they did."""
        return round(trio.current_time() * 1e9) if self.modelled else time.monotonic_ns()

    async def host_work(self) -> None:
        """For modelled cards: what the host takes before it can submit a step that depends on its
        choice."""
        if self.profile.host_step_s:
            await trio.sleep(self.profile.host_step_s)

    def count_step(self) -> int:
        """The number of a new step, from 1."""
        self._steps += 1
        return self._steps

    def span(self, what: str, step: int) -> contextlib.AbstractContextManager[None]:
        """Tells the trace, if there is one, what the host does for a step within the block."""
        return _NO_SPAN if self.trace is None else self.trace.span(what, step)

    async def read_logits(self, loaded: LoadedModel, output: int) -> F32:
        """The whole logits (vocabulary,) of one output of the last step."""
        parts: list[F32] = []
        for share in loaded.output_shares:
            nbytes = share.vocabulary.size * 4
            handle = loaded.handles[share.card]["logits"]
            reply = await self.ask(share.card, ReadBuffer(handle, output * nbytes, nbytes))
            parts.append(np.frombuffer(reply.buffers[0], np.float32))
        return np.concatenate(parts)

    async def abort(
        self,
        all_back: Callable[[], Awaitable[None]],
        cards: Sequence[int] | None = None,
        limit_s: float = STOP_S,
    ) -> None:
        """Enter a new epoch on these cards, or all, and wait until what was posted is back; bounded
        in time.  For who holds the cards between its own steps."""
        cards = self._every_card if cards is None else cards
        clients = [self.clients[card] for card in cards]

        async def enter() -> None:
            async with trio.open_nursery() as nursery:
                for entering in self._entering(cards):
                    nursery.start_soon(_ignoring_errors, entering)
            await all_back()

        if not await in_time(min(limit_s, self._hang_timeout_s), enter):
            self._doubt(c for c in clients if self._epochs[c.number] is None)

    async def emptied(self, card: int) -> None:
        """Nothing is queued on a card by an aborted step: if it is not known whether it has heard
        of the abort, have it abort again.  Raises what it reports, CardHungError where it is
        silent."""
        if self._epochs[card] is None:
            async with self._locks.holding((card,)):
                await self._agree((card,))

    async def look_for(self, card: int) -> None:
        """Have a card do nothing, as a step: one that is gone or hangs is found out, and lost.
        Raises what it reports, CardHungError where it does not even that."""
        nothing = {card: Program((), 1, 1, 1).encode({})}
        async with copying.loaded(self, nothing) as programs:
            await copying.run(self, programs)

    def _agreed(self, cards: Sequence[int]) -> bool:
        """Whether these cards are in one epoch, and it is known which."""
        epochs = set(map(self._epochs.__getitem__, cards))
        return len(epochs) == 1 and None not in epochs

    async def _agree(self, cards: Sequence[int]) -> None:
        """Bring cards that are about to work together into one epoch: those of a link drop or hold
        back what comes from another one.  No checkpoint where they are in one; for who holds them,
        with nothing queued."""
        if self._agreed(cards):
            return
        entering, clients = self._entering(cards), [self.clients[card] for card in cards]
        limit_s = self.answer_s(clients)
        await in_time(limit_s, functools.partial(loading.run_all, entering))
        silent = [client for client in clients if self._epochs[client.number] is None]
        if silent:
            raise self.silent(silent[0], limit_s)

    def _entering(self, cards: Sequence[int]) -> list[Callable[[], Awaitable[None]]]:
        """What takes each of these cards into a new epoch, the same for all of them."""
        self._epoch += 1
        epoch = self._epoch
        for card in cards:
            # Of a card that never answers nobody will know whether it has entered it.
            self._epochs[card] = None

        async def enter(card: int) -> None:
            await self.clients[card].request(Abort(epoch))
            self._epochs[card] = epoch

        return [functools.partial(enter, card) for card in cards]

    async def counters(self) -> tuple[Counters, ...]:
        """The counters of every card.  Raises as `ask`."""
        return tuple([await self.ask(card, ReadCounters()) for card in self._every_card])

    async def counters_of(self, cards: Sequence[int]) -> dict[int, Counters]:
        """Those of these cards that answer, in this order; all are asked at the same time, and one
        that is silent is lost."""
        found: dict[int, Counters] = {}

        async def count(card: int) -> None:
            with contextlib.suppress(CardError):
                found[card] = await self.ask(card, ReadCounters())

        await loading.run_all([functools.partial(count, card) for card in cards])
        return {card: found[card] for card in cards if card in found}

    # --- the end ----------------------------------------------------------------------

    def closing(self) -> None:
        """The fleet is to close: from now on its cards have CLOSE_S, whoever is at work on them."""
        self._in_use.cancel()

    def left(self) -> None:
        """Nobody is at work on the cards any more, so that they may stop."""
        self.closing()
        self._left.set()

    async def run(self) -> None:
        """End the cards once the fleet is `closing`, or cancelled: as soon as it is `left` each is
        asked to stop, and all that are there after CLOSE_S are killed, which also ends whatever
        waits for them; at once one that has just kept `cut_short` waiting in vain."""
        try:
            with self._in_use:
                await trio.sleep_forever()
        finally:
            with trio.move_on_after(CLOSE_S, shield=True):
                self._stopping = bool(self._doubted)
                for client in self._doubted.intersection(self.clients):
                    self._lives[client.number].end()
                await self._left.wait()
                await self._stop()
            self._kill()
            with trio.CancelScope(shield=True):
                await self._left.wait()
            # Who is shielded from that cancellation may have opened some again.
            self._kill()

    def _kill(self) -> None:
        self._stopping = True
        for life in self._lives:
            life.end()

    async def _stop(self) -> None:
        self._stopping = True
        # At the same time, so that a card that does not answer holds up no other.
        async with trio.open_nursery() as nursery:
            for client in self.clients:
                stopping = functools.partial(client.request, Stop())
                nursery.start_soon(_ignoring_errors, stopping)


def _given_back(reply: BuffersAllocated | ProgramLoaded) -> list[Request[Ok]]:
    """The requests that give back what a reply names."""
    if isinstance(reply, ProgramLoaded):
        return [UnloadProgram(reply.program)]
    return [FreeBuffer(handle) for handle in reply.handles]


async def _ignoring_errors(job: Callable[[], Awaitable[object]]) -> None:
    with contextlib.suppress(SpankerError):
        await job()


def _reason(error: CardError, card: int) -> str:
    """What an error says has happened, without the name of the card and what to do about it."""
    text = str(error).partition("; ")[0]
    for prefix in (f"card {card} is lost: ", *(f"card {card}{end}" for end in (", ", ": ", " "))):
        text = text.removeprefix(prefix)
    return text


# --- opening ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_coordinator(
    devices: Sequence[CardDevice],
    profile: Profile,
    *,
    channel: str = "memory",
    hang_timeout_s: float = 10.0,
    topology: Topology | None = None,
    around: Around | None = None,
    hands_on: bool = True,
) -> AsyncIterator[Coordinator]:
    """Start a card actor for each device, discover the cards, and stop everything at exit, which
    takes CLOSE_S at most, and no longer after a cancellation from outside.

    `topology` says which cards are linked; without it all are.  `channel` is how messages travel:
    `memory` or `unix`.  A profile with a throttled host link
    sends them over that link instead.  The actors own the devices, all modelled or none, and close
    them.  `around` stands around the host's end of every channel.  Without `hands_on` no card gets
    weights from another one.
    """
    if not math.isfinite(hang_timeout_s) or hang_timeout_s <= 0:
        raise ConfigError(f"the hang timeout must be a positive time, got {hang_timeout_s}")
    modelled = any(device.modelled for device in devices)
    async with _channels(profile, channel, modelled) as channels, trio.open_nursery() as nursery:

        def pair(card: int, name: str) -> tuple[Channel, Channel]:
            host_end, card_end = channels.pair(name)
            return host_end if around is None else around.channel(card, host_end), card_end

        def relay(card: int, message: Relayed) -> None:
            coordinator.relay(card, message)

        def failed(client: CardClient, error: CardError) -> None:
            coordinator.failed(client, error)

        def new_life(device: CardDevice) -> CardLife:
            ends = functools.partial(pair, device.number)
            return CardLife(nursery, device, ends, relay, failed)

        lives = [new_life(device) for device in devices]
        coordinator = Coordinator(
            [life.begin() for life in lives],
            profile,
            hang_timeout_s=hang_timeout_s,
            modelled=modelled,
            hollow=all(device.hollow for device in devices),
            topology=topology,
            lives=lives,
            new_life=new_life,
            hands_on=hands_on,
            nursery=nursery,
        )
        coordinator.host_link = channels.link
        watching = trio.CancelScope()

        async def watch() -> None:
            with watching:
                await coordinator.links.run()

        nursery.start_soon(coordinator.run)
        try:
            await coordinator.discover()
            nursery.start_soon(watch)
            yield coordinator
        finally:
            watching.cancel()
            coordinator.left()


@attrs.frozen(eq=False, repr=False)
class _Channels(Value):
    """What makes both ends of a card's channel, by its name, and the host link they share."""

    pair: Callable[[str], tuple[Channel, Channel]]
    link: HostLink | PacedLink | None = None


@contextlib.asynccontextmanager
async def _channels(profile: Profile, channel: str, modelled: bool) -> AsyncIterator[_Channels]:
    """How messages travel within the block.  Links that most fleets do not have are imported where
    they are made: a first token should not wait for them."""
    if channel not in ("memory", "unix"):
        raise ConfigError(f"no channel {channel!r}: expected memory or unix")
    rate, latency_s = profile.host_link_bytes_per_s, profile.host_link_latency_s
    if rate is None:
        make = unix_channel_pair if channel == "unix" else memory_channel_pair
        yield _Channels(lambda name: make(name=name))
    elif modelled:
        from spanker.actors.paced import PacedLink
        from spanker.actors.virtual_time import alongside

        paced = PacedLink(rate, latency_s)
        async with alongside(paced.run):
            yield _Channels(lambda name: paced.channel_pair(name=name), paced)
    else:
        from spanker.actors.host_link import HostLink

        link = HostLink(rate, latency_s)

        def stream_pair(name: str) -> tuple[Channel, Channel]:
            host, card = link.stream_pair()
            return StreamChannel(host, name=name), StreamChannel(card, name=name)

        yield _Channels(stream_pair, link)
