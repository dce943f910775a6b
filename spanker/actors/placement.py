# SPDX-License-Identifier: Apache-2.0
"""Where a model is on the cards of a fleet: chosen when it is loaded, and anew when cards are lost.

Which plan is the planner's business (sched/planner.py), bringing the bytes the coordinator's; here
is what both need to know: which cards still answer, what memory they have left, what was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from spanker import collecting
from spanker.actors.loading import run_all
from spanker.actors.message import Counters, ReadCounters
from spanker.actors.patience import in_time
from spanker.actors.steps import LoadedModel
from spanker.errors import (
    CardError,
    CardHungError,
    CardLinkDownError,
    CardLostError,
    CardMemoryError,
    ModelError,
    PlanError,
    SpankerError,
)
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.packed import PackedFile
from spanker.sched.copies import check_copies, check_copy_ways, keeps_all
from spanker.sched.detours import check_ways, meshed, over_host, reaching
from spanker.sched.layout import card_bytes, fit_kv_pages, rounding_bytes
from spanker.sched.limits import with_kv_pages
from spanker.sched.pages import Seats, Table
from spanker.sched.plan import (
    FleetPlan,
    Limits,
    ModelShape,
    Plan,
    check_fleet_plan,
    on_cards,
    tensor_pipeline,
)
from spanker.values import Value

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator, Progress

# Where a plan chosen automatically is to decode fastest.
PLANNED_POSITION = 512
# With stragglers among its cards a model moves to a plan that is so many times as fast.
WORTH = 1.2
T = TypeVar("T")

# Plans that go over any number of cards: whoever asks for one wants it on those that are left, too.
_ANY_CARDS = ("tp", "pp")


class ModelFile:
    """A GGUF that may have to be read again later, when it must still be the same."""

    def __init__(self, path: str) -> None:
        # By then the working directory may be another one.
        self.path = os.path.abspath(path)
        self.gguf = GGUFFile(path)
        self._open = True
        self._identity = _identity(path)

    def close(self) -> None:
        """For as long as nobody reads it."""
        self._open = False
        self.gguf.close()

    @contextlib.contextmanager
    def open(self, modelled: bool) -> Iterator[tuple[GGUFFile, PackedFile | None]]:
        """The file and its packed copy, within the block.  ModelError where it has changed since it
        was loaded."""
        with contextlib.ExitStack() as stack:
            gguf = self.gguf
            if not self._open:
                gguf = stack.enter_context(contextlib.closing(GGUFFile(self.path)))
            if _identity(self.path) != self._identity:
                raise ModelError(
                    f"{self.path} is not the file any more that was loaded: other weights would "
                    f"give other answers; load the model again"
                )
            # A modelled card's time must not depend on what is in a cache.
            packed = None if modelled else PackedFile.find(gguf)
            if packed is not None:
                stack.enter_context(packed)
            yield gguf, packed


def _identity(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read any more: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@attrs.frozen(eq=False, repr=False)
class Wanted(Value):
    """What was asked for: a plan by name or as a value, the limits of steps and contexts, room for
    the KV of so many positions, and a batch to be fast with."""

    plan: str | FleetPlan
    limits: Limits
    kv_tokens: int | None
    batch: int


class Placement:
    """One model's place on the cards of a fleet.

    `lock` is held while memory is counted and taken; `make_room` gives back what is only kept for
    next time; with `recover` a load goes on without a card that is lost meanwhile.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        lock: trio.Lock,
        make_room: Callable[[], Awaitable[None]],
        model: llama.LlamaModel,
        file: ModelFile | None,
        wanted: Wanted,
        recover: bool,
    ) -> None:
        self._coordinator = coordinator
        self._lock = lock
        self._make_room = make_room
        self._model = model
        self.file = file
        self._wanted = wanted
        self._recover = recover
        asked = wanted.plan
        self._asked = asked.strip().lower() if isinstance(asked, str) else ""
        # A plan for certain cards is not for others.
        self._flexible = self._asked in ("auto", *_ANY_CARDS)
        self._first: tuple[Plan, ...] = ()
        self._first_pages: tuple[int, ...] = ()
        # What each replica has on its cards, None while it has nothing.
        self.replicas: list[LoadedModel | None] = []

    async def place(self, progress: Progress | None) -> tuple[FleetPlan, tuple[LoadedModel, ...]]:
        """Put the model on the cards of each replica, for the first time.

        A card that is lost meanwhile is left out where the plan is not one for certain cards.
        Raises PlanError, CardMemoryError, ConfigError, CardLostError.
        """
        coordinator = self._coordinator
        async with self._lock:
            while True:
                births = tuple(coordinator.births)
                try:
                    cards, free = await self._cards(coordinator.alive, None)
                    plan, limits = self._first_plan(cards, free)
                    loaded = await self._load(plan, limits, progress)
                    break
                except CardError as error:
                    if self._link_lost(error):
                        continue
                    if not (self._recover and self._flexible and self._lost(error, births)):
                        raise
        self.replicas = list(loaded)
        self._first = plan.replicas
        self._first_pages = tuple(replica.limits.kv_pages for replica in loaded)
        return plan, loaded

    async def replace(self, number: int, tables: Sequence[Table] = ()) -> tuple[LoadedModel, Seats]:
        """Put a replica anew on the cards that are left to it: those of its own that are in use,
        and those that no replica of the model has.  The context stays what it was, and so does what
        it has where the plan is the same.  Weights come from where they are, be it on cards of
        other replicas, as far as nothing fails meanwhile; else from the file.  The KV pages of
        these `tables` go along where they are all left: what comes back says where each is then.

        The limits may allow fewer KV pages than before, or more, up to those of the beginning.
        Raises CardMemoryError, with the bytes needed, where it does not fit any more, CardLostError
        where no card is left, ModelError where its file is gone: then it still has what it had.
        After a failure later it is loaded again where it was, if that can be; else it has nothing.
        A card that is lost meanwhile is left out, too; one that is being drained is used where
        without it the model would be lost.
        """
        before = self.replicas[number]
        assert before is not None
        coordinator = self._coordinator
        held: LoadedModel | None = before
        reserve: tuple[int, ...] = ()
        async with self._lock:
            while True:
                births, moving = tuple(coordinator.births), False
                try:
                    cards, free = await self._cards((*self._left_to(number), *reserve), held)
                    plan, pages = self._replan(number, cards, free, before.limits)
                    limits = attrs.evolve(before.limits, kv_pages=pages)
                    if held is None:
                        (loaded,) = await self._load(FleetPlan.of(plan), limits, None)
                        seats: Seats = ((),) * len(tables)
                        break
                    if coordinator.whole(held) and self._stays(held.plan, plan, cards):
                        stay = tuple(table.pages for table in tables)
                        return await self.go_around(number), stay
                    with self._opened() as (gguf, packed):
                        held, self.replicas[number], moving = None, None, True
                        beside = [replica for replica in self.replicas if replica is not None]
                        loaded, seats = await coordinator.move(
                            before, beside, gguf, plan, limits, free, packed, tables
                        )
                    break
                except CardError as error:
                    self._link_lost(error)
                    # Whatever has become of what it held, the host has everything.
                    if self._lost(error, births) or moving:
                        continue
                    if not reserve and not self._is_there(before):
                        reserve = self._reserve(before)
                        if reserve:
                            continue
                    if held is None:
                        await self._put_back(number, before)
                    raise
        self.replicas[number] = loaded
        return loaded, seats

    async def _put_back(self, number: int, before: LoadedModel) -> None:
        """Load a replica where it was, if its cards are all there."""
        if not self._is_there(before):
            return
        with contextlib.suppress(SpankerError):
            if not self._coordinator.relays:
                self._check_ways(before.plan)
            plan = FleetPlan.of(before.plan)
            (self.replicas[number],) = await self._load(plan, before.limits, None)

    def has_all(self, number: int) -> bool:
        """Whether all that a replica needs is still on its cards, as far as anybody knows."""
        held = self.replicas[number]
        return held is not None and self._is_there(held) and self._coordinator.whole(held)

    def _is_there(self, replica: LoadedModel) -> bool:
        """Whether no card of a replica is lost."""
        return self._coordinator.lost.keys().isdisjoint(replica.plan.cards)

    def _link_lost(self, error: CardError) -> bool:
        """Whether it is a link that failed, of which nobody has known yet that it is down."""
        if not isinstance(error, CardLinkDownError):
            return False
        assert error.card is not None and error.peer is not None
        links = self._coordinator.links
        known = (error.card, error.peer) in links.down
        links.lose(error.card, error.peer)
        return not known

    def _lost(self, error: CardError, births: tuple[int, ...]) -> bool:
        """Whether what failed is to be tried again: it has lost a card, or one has come back
        meanwhile, on which nothing of it is.  `births` are of its beginning."""
        if isinstance(error, CardLostError | CardHungError):
            return self._coordinator.lose(error, births)
        return births != tuple(self._coordinator.births)

    async def reroute(self, number: int) -> LoadedModel:
        """Have a replica's steps go around the links that are down, where it is; over the host
        where no other of its cards leads on, and nowhere else is better.

        Raises PlanError where there is no way, or it is better placed anew, and what cards report;
        then all is as before.
        """
        held = self.replicas[number]
        assert held is not None
        down = self._coordinator.links.down_among(held.plan.cards)
        if over_host(held.plan, down):
            may_stay = self._coordinator.relays and not (self._flexible and self._recover)
            if not may_stay and not await self._is_best(number, held):
                check_ways(held.plan, down)
        return await self.go_around(number)

    async def _is_best(self, number: int, held: LoadedModel) -> bool:
        """Whether a replica is as well placed as it can be."""
        if not self._coordinator.relays:
            return False
        async with self._lock:
            cards, free = await self._cards(self._left_to(number), held)
        try:
            plan, _ = self._replan(number, cards, free, held.limits)
        except (PlanError, CardMemoryError):
            return True
        return self._stays(held.plan, plan, cards)

    async def go_around(self, number: int) -> LoadedModel:
        """As `reroute`, wherever else it would be better placed."""
        held, links = self.replicas[number], self._coordinator.links
        assert held is not None
        if links.down_among(held.plan.cards) != held.down:
            held = self.replicas[number] = await self._coordinator.reroute(held)
        return held

    async def give_up(self, number: int) -> None:
        """Free what a replica has on its cards; they are there for the others."""
        # Another one may be taking weights from it.
        async with self._lock:
            replica, self.replicas[number] = self.replicas[number], None
            if replica is not None:
                await self._coordinator.unload(replica)
        await self._coordinator.settled()

    def _left_to(self, number: int) -> tuple[int, ...]:
        others = {
            card
            for place, replica in enumerate(self.replicas)
            if replica is not None and place != number
            for card in replica.plan.cards
        }
        return tuple(card for card in self._coordinator.alive if card not in others)

    def _reserve(self, replica: LoadedModel) -> tuple[int, ...]:
        """The cards that a replica is about to leave, but could stay on."""
        left = self._coordinator.draining.difference(self._coordinator.lost)
        return tuple(card for card in replica.plan.cards if card in left)

    async def _cards(
        self, candidates: Sequence[int], held: LoadedModel | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of the cards that answer, and the free memory of all cards by number, nothing for
        those that are out of the question; what is `held` will be freed."""
        await self._make_room()
        coordinator, found = self._coordinator, dict[int, Counters]()
        await coordinator.settled()

        async def ask(card: int) -> None:
            client = coordinator.clients[card]

            async def count() -> None:
                found[card] = await client.request(ReadCounters())

            try:
                await coordinator.emptied(card)
                limit_s = coordinator.answer_s((client,))
                if not await in_time(limit_s, count):
                    raise coordinator.silent(client, limit_s)
            except (CardLostError, CardHungError):
                if not self._recover:
                    raise

        await run_all([functools.partial(ask, card) for card in candidates])
        if not found:
            drained = len(coordinator.drained.difference(coordinator.lost))
            raise CardLostError(
                f"no card is left to load the model onto: {len(coordinator.lost)} lost, {drained} "
                f"drained; `Fleet.admit` takes them back"
            )
        shape, limits = self._model.shape, self._wanted.limits
        free = [0] * len(coordinator.clients)
        for card, counters in found.items():
            rounding = rounding_bytes(shape, limits, coordinator.cards[card].ddr_granule)
            free[card] = counters.ddr_total_bytes - counters.ddr_used_bytes - rounding
            if held is not None and coordinator.holds(held, card):
                free[card] += card_bytes(
                    shape,
                    held.plan,
                    card,
                    held.limits,
                    granule=coordinator.cards[card].ddr_granule,
                )
        return tuple(sorted(found)), tuple(free)

    def _first_plan(self, cards: Sequence[int], free: Sequence[int]) -> tuple[FleetPlan, Limits]:
        """The plan that is asked for, on these cards, and the limits that fit."""
        wanted, shape = self._wanted, self._model.shape

        def make(cards: Sequence[int], hosted: bool) -> tuple[FleetPlan, Limits]:
            plan = self._plan(wanted.plan, cards, free, wanted.kv_tokens, hosted)
            if wanted.limits.kv_copies and len(cards) == len(self._coordinator.clients):
                # With fewer than there are it is better to go on without than not at all.
                check_copies(plan)
            return plan, with_kv_pages(shape, plan, wanted.limits, free, wanted.kv_tokens)

        if not self._flexible:
            return make(cards, self._coordinator.relays)
        return self._on_best_group(cards, make)

    def _replan(
        self, number: int, cards: Sequence[int], free: Sequence[int], limits: Limits
    ) -> tuple[Plan, int]:
        """The plan for what there is, as asked where its cards are there or any will do, else the
        best; and the KV pages that fit."""
        shape = self._model.shape

        def fitted(plan: Plan) -> tuple[Plan, int]:
            return plan, fit_kv_pages(shape, plan, limits, tuple(free), self._first_pages[number])

        if not self._flexible and set(self._first[number].cards) <= set(cards):
            with contextlib.suppress(PlanError):
                if not self._coordinator.relays:
                    self._check_ways(self._first[number])
                return fitted(self._first[number])
        return self._on_best_group(
            cards, lambda group, hosted: fitted(self._best(group, free, hosted))
        )

    def _on_best_group(self, cards: Sequence[int], make: Callable[[Sequence[int], bool], T]) -> T:
        """What can be made on the first group of these cards on which it can; the error of the last
        where it can on none.

        A group's cards reach each other; or, `hosted`, the host leads between some.  Where nobody
        knows what that takes it is the last resort, else the planner's choice.
        """
        coordinator, down = self._coordinator, self._coordinator.links.down
        together = reaching(cards, down)[0] if down else cards
        groups: list[tuple[Sequence[int], bool]] = [(together, False)]
        if coordinator.relays and down:
            groups.append((cards, True))
            priced = coordinator.profile.host_link_bytes_per_s is not None
            if self._asked == "auto" and priced and len(together) < len(cards):
                groups.reverse()
        for group, hosted in groups[:-1]:
            with contextlib.suppress(PlanError, CardMemoryError):
                return make(group, hosted)
        return make(*groups[-1])

    def _best(self, cards: Sequence[int], free: Sequence[int], hosted: bool) -> Plan:
        """The plan for these cards: as asked where any cards will do, else the best."""
        if self._flexible and not self._coordinator.slow.keys().isdisjoint(cards):
            # Equal shares would have all cards wait for the straggler.
            return self._plan("auto", cards, free, None, hosted).replicas[0]
        if self._asked in _ANY_CARDS:
            with contextlib.suppress(PlanError):
                plan = self._plan(self._asked, cards, free, None, hosted).replicas[0]
                if not hosted:
                    self._check_ways(plan)
                with contextlib.suppress(CardMemoryError):
                    fit_kv_pages(self._model.shape, plan, self._wanted.limits, tuple(free), 0)
                    return plan
        return self._plan("auto", cards, free, None, hosted).replicas[0]

    def _stays(self, held: Plan, plan: Plan, cards: Sequence[int]) -> bool:
        """Whether what a replica has is as good as another plan: the same, or, with stragglers
        among its cards, hardly slower."""
        if held.stages == plan.stages:
            return True
        slow = self._coordinator.slow
        if slow.keys().isdisjoint(held.cards) or not set(held.cards) <= set(cards):
            return False
        return self._step_s(held) < WORTH * self._step_s(plan)

    def _step_s(self, plan: Plan) -> float:
        """What a step takes by the cost model, with the cards as fast as they are."""
        from spanker.sched import cost

        wanted, coordinator = self._wanted, self._coordinator
        position = min(PLANNED_POSITION, wanted.limits.context)
        return cost.decode(
            self._model.shape,
            plan,
            coordinator.speeds,
            coordinator.topology,
            batch=wanted.batch,
            context=position,
        ).seconds

    @collecting.paused()
    def _plan(
        self,
        plan: str | FleetPlan,
        cards: Sequence[int],
        free: Sequence[int],
        kv_tokens: int | None,
        hosted: bool,
    ) -> FleetPlan:
        """The plan that a name or a value stands for on these cards, `hosted` where the host may
        lead between them; PlanError where none does."""
        shape = self._model.shape
        if isinstance(plan, FleetPlan):
            return self._checked(plan, shape, cards, hosted)
        if plan == "auto" and len(cards) == 1:
            only = on_cards(tensor_pipeline(shape, 1, 1), cards)
            return FleetPlan.of(attrs.evolve(only, reason="there is one card"))
        if plan.strip().lower() == "auto":
            return self._best_plan(cards, free, kv_tokens, hosted)
        from spanker.sched.planner import is_path, make_plan

        made = make_plan(plan, shape, len(cards))
        if not is_path(plan):
            replicas = tuple(on_cards(replica, cards) for replica in made.replicas)
            made = attrs.evolve(made, replicas=replicas)
        return self._checked(made, shape, cards, hosted)

    def _best_plan(
        self, cards: Sequence[int], free: Sequence[int], kv_tokens: int | None, hosted: bool
    ) -> FleetPlan:
        """The fastest by the cost model."""
        # A plan that was named, or that of one card, starts sooner without these.
        from spanker.sched.planning import Request, search

        coordinator, limits = self._coordinator, self._wanted.limits
        request = Request(
            self._model.shape,
            coordinator.speeds,
            coordinator.topology.among(cards),
            tuple(free),
            limits,
            batch=self._wanted.batch,
            position=min(PLANNED_POSITION, limits.context),
            kv_tokens=kv_tokens,
        )
        made = search(request).chosen.plan
        if limits.kv_copies and not keeps_all(made):
            made = self._plan("tp", cards, free, kv_tokens, True)
        # One that is asked for anew stands for one replica: the first is the model, too.
        if not hosted and not self._has_ways(made):
            made = self._plan("tp", cards, free, kv_tokens, True)
            if not self._has_ways(made):
                together = meshed(cards, coordinator.links.down)
                made = self._plan("auto", together, free, kv_tokens, hosted)
        return made

    def _check_ways(self, plan: Plan) -> None:
        """PlanError where links that are down cut a plan's cards off from each other."""
        down = self._coordinator.links.down
        check_ways(plan, down)
        if self._wanted.limits.kv_copies and not self._coordinator.relays:
            check_copy_ways(plan, down)

    def _has_ways(self, plan: FleetPlan) -> bool:
        """Whether the cards of each replica reach each other: those of a part of the fleet may be
        linked by others alone."""
        try:
            for replica in plan.replicas:
                self._check_ways(replica)
        except PlanError:
            return False
        return True

    def _checked(
        self, plan: FleetPlan, shape: ModelShape, cards: Sequence[int], hosted: bool
    ) -> FleetPlan:
        check_fleet_plan(shape, plan, len(self._coordinator.clients))
        missing = sorted(set(plan.cards) - set(cards))
        if missing:
            drained = missing[0] in self._coordinator.drained.difference(self._coordinator.lost)
            raise PlanError(
                f"plan {plan.name} uses card {missing[0]}, which is "
                f"{'drained' if drained else 'lost'}; `Fleet.admit` takes it back"
            )
        for replica in () if hosted else plan.replicas:
            self._check_ways(replica)
        return plan

    async def _load(
        self, plan: FleetPlan, limits: Limits, progress: Progress | None
    ) -> tuple[LoadedModel, ...]:
        with self._opened() as (gguf, packed):
            return await self._coordinator.load(self._model, gguf, plan, limits, progress, packed)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[GGUFFile | None, PackedFile | None]]:
        """The file and its packed copy within the block, as far as there are any; ModelError where
        it has changed."""
        if self.file is None:
            yield None, None
            return
        with self.file.open(self._coordinator.modelled) as opened:
            yield opened
