# SPDX-License-Identifier: Apache-2.0
"""Carrying out a fault plan: a fleet whose cards and channels fail when their plan says so.

    async with faulty_fleet("soft:3", "kill 1@token:20") as (fleet, injection):
        model = injection.watch(await fleet.load(path))

Everything is timed by trio's clock, so under a virtual one a plan does the same every time.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from spanker.actors.channel import Channel as Channels
from spanker.device.base import CardDevice
from spanker.errors import ConfigError, SpankerError
from spanker.testing.fault_plan import (
    AtByte,
    AtCommand,
    AtStep,
    AtTime,
    AtToken,
    Card,
    Client,
    Fault,
    FaultPlan,
    HostLink,
    Link,
    What,
)
from spanker.testing.faulty_card import FaultyCard
from spanker.testing.faulty_channel import REORDER_S, FaultyChannel

if TYPE_CHECKING:
    from spanker.device.spec import CardSpec
    from spanker.fleet import Fleet, Model

# How a card's own way to fail is called.
_KNOBS = {
    What.DIE: "kill",
    What.HANG: "hang",
    What.RESET: "reset",
    What.ECC: "fail_memory",
    What.SLOW: "slow",
    What.OUT_OF_MEMORY: "starve",
    What.CUT: "cut",
}
_MESSAGES = (What.DROP, What.DUPLICATE, What.REORDER, What.CORRUPT)


class Injection:
    """A plan at work in one fleet.  An `actors.around.Around`; made by `faulty_fleet`.

    `clients` is called, in the task in which it is due, with each fault of a client, as only who
    runs the clients can make them fail.
    """

    def __init__(self, plan: FaultPlan, clients: Callable[[Fault], None] | None = None) -> None:
        for fault in plan.faults:
            if isinstance(fault.where, Client) and clients is None:
                raise ConfigError(
                    f"fault {fault}: nobody runs clients here: leave it out, or give `clients`, "
                    f"which is called with it"
                )
        self.plan = plan
        self.corrected: Counter[int] = Counter()
        self._clients = clients
        self._pending = list(plan.faults)
        self._cards: dict[int, FaultyCard] = {}
        self._channels: dict[int, FaultyChannel] = {}
        # When the host link's own stalls end: cards that come before find it stalled as well.
        self._host_stalled_until_s = -math.inf
        self._tokens = 0
        self._story: list[tuple[float, str]] = []
        self._opened_s: float | None = None
        self._nursery: trio.Nursery | None = None
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._asleep: trio.CancelScope | None = None
        # What waits for submissions to a card, and for bytes over its channel.
        self._by_step: defaultdict[int, list[Fault]] = defaultdict(list)
        self._by_byte: defaultdict[int, list[Fault]] = defaultdict(list)
        for fault in plan.faults:
            if isinstance(fault.when, AtStep | AtCommand):
                self._by_step[fault.cards[0]].append(fault)
            elif isinstance(fault.when, AtByte):
                self._by_byte[fault.cards[0]].append(fault)

    # --- what is told -------------------------------------------------------------------

    @property
    def story(self) -> tuple[tuple[float, str], ...]:
        """What has happened so far, in order: seconds since the fleet was opened, and a line."""
        return tuple(self._story)

    @property
    def pending(self) -> tuple[Fault, ...]:
        """Faults of the plan whose moment has not come."""
        return tuple(self._pending)

    @property
    def tokens(self) -> int:
        """Tokens that were counted so far."""
        return self._tokens

    def was_stalled(self, card: int) -> bool:
        """Whether the newest channel of a card, which may still be joining, has ever been held up
        by a stall or a partition."""
        return card in self._channels and self._channels[card].stalled_until_s > -math.inf

    def token(self) -> None:
        """Count one token; what is to happen at it happens before this returns."""
        self._tokens += 1
        for fault in tuple(self._pending):
            if isinstance(fault.when, AtToken) and fault.when.n <= self._tokens:
                self.strike(fault)

    def watch(self, model: Model) -> Model:
        """The model, whose tokens are counted as they are taken: for use in its place."""
        from spanker.testing.watching import WatchedModel

        return WatchedModel(model, self.token).face

    def _tell(self, line: str) -> None:
        opened_s = trio.current_time() if self._opened_s is None else self._opened_s
        self._story.append((trio.current_time() - opened_s, line))

    # --- around a fleet -----------------------------------------------------------------

    def device(self, device: CardDevice) -> FaultyCard:
        """As Around."""
        number = device.number
        clock, token = trio.lowlevel.current_clock(), trio.lowlevel.current_trio_token()
        struck = functools.partial(self._submitting, number)
        if device.waits:
            # What submits to it is another thread.
            struck = functools.partial(trio.from_thread.run_sync, struck, trio_token=token)
        card = FaultyCard(device, clock.current_time, self.at, struck)
        self._cards[number] = card
        for fault in self.plan.faults:
            self._check_able(fault, card)
        return card

    def channel(self, card: int, host_end: Channels) -> FaultyChannel:
        """As Around."""
        counting = None
        if self._by_byte[card]:

            def counting(before: int, nbytes: int) -> None:
                for fault in tuple(self._by_byte[card]):
                    assert isinstance(fault.when, AtByte)
                    if fault.when.n <= before + nbytes:
                        self.strike(fault)

        faulty = FaultyChannel(host_end, f"channel of card {card}", counting)
        # Whatever still keeps host and card apart does so on a new channel, too.
        until_s = self._host_stalled_until_s
        if card in self._channels:
            until_s = max(until_s, self._channels[card].stalled_until_s)
        if trio.current_time() < until_s:
            faulty.stall(until_s)
        self._channels[card] = faulty
        return faulty

    def start(self, nursery: trio.Nursery) -> None:
        """The fleet is open: its time begins, and ends with this nursery."""
        self._nursery = nursery
        self._opened_s = trio.current_time()
        for fault in self.plan.faults:
            if isinstance(fault.when, AtTime):
                self._at(fault.when.seconds, fault)
        nursery.start_soon(self._run)

    def close(self) -> None:
        """The fleet is closed, or was never opened: let go of what no actor has closed."""
        for card in self._cards.values():
            card.close()

    def _at(self, seconds: float, fault: Fault) -> None:
        assert self._opened_s is not None
        self.at(self._opened_s + seconds, lambda: self.strike(fault))

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call back at a time of trio's clock."""
        heapq.heappush(self._timers, (time_s, next(self._numbers), call))
        if self._asleep is not None and time_s < self._asleep.deadline:
            self._asleep.deadline = time_s

    async def _run(self) -> None:
        while True:
            while self._timers and self._timers[0][0] <= trio.current_time():
                heapq.heappop(self._timers)[2]()
            due_s = self._timers[0][0] if self._timers else math.inf
            with trio.CancelScope(deadline=due_s) as self._asleep:
                await trio.sleep_forever()

    def _submitting(self, card: int, n: int) -> None:
        for fault in tuple(self._by_step[card]):
            when = fault.when
            if (when.step if isinstance(when, AtCommand) else getattr(when, "n", 0)) <= n:
                self.strike(fault)

    def _check_able(self, fault: Fault, card: FaultyCard) -> None:
        """ConfigError where a body has no way to fail like this."""
        if card.number not in fault.cards:
            return
        if fault.what is What.CUT or (fault.what is What.FLAP and isinstance(fault.where, Link)):
            if not card.native("cut"):
                raise ConfigError(
                    f"fault {fault}: nobody can cut the links of {card.info.name}: cards of its "
                    f"kind cannot"
                )

    # --- faults -------------------------------------------------------------------------

    def strike(self, fault: Fault | str) -> None:
        """Let a fault happen now, whether it is in the plan or not; its moment does not matter.

        Never blocks.  ConfigError where the fleet does not have what it names; what cannot be done
        is told by `story`.
        """
        if isinstance(fault, str):
            plan = FaultPlan.parse(fault)
            if len(plan.faults) != 1:
                raise ConfigError(f"expected one fault, got {len(plan.faults)} in {fault!r}")
            fault = plan.faults[0]
        FaultPlan((fault,)).check(len(self._cards))
        self._forget(fault)
        self._tell(str(fault))
        try:
            self._strike(fault)
        except SpankerError as error:
            self._tell(f"{fault}: not done: {error}")

    def _forget(self, fault: Fault) -> None:
        waiting = [self._pending]
        if fault.cards:
            waiting += [self._by_step[fault.cards[0]], self._by_byte[fault.cards[0]]]
        for faults in waiting:
            if fault in faults:
                faults.remove(fault)

    def _strike(self, fault: Fault) -> None:
        what, where = fault.what, fault.where
        if isinstance(where, Client):
            if self._clients is not None:
                self._clients(fault)
        elif isinstance(where, Card):
            self._strike_card(fault, self._cards[where.number])
        elif isinstance(where, Link):
            self._strike_link(fault, where)
        elif what in (What.STALL, What.PARTITION):
            self._stall(fault)
        elif what is What.DISCONNECT:
            self._start(self._channels[fault.cards[0]].disconnect)
        else:
            self._strike_messages(fault, self._channels[fault.cards[0]])

    def _strike_card(self, fault: Fault, card: FaultyCard) -> None:
        what = fault.what
        if what is What.SLOW:
            card.slow(fault.factor)
            self._later(fault, lambda: card.slow(1.0))
        elif what is What.OUT_OF_MEMORY:
            card.starve(fault.count)
        elif what is What.WRONG_COMPLETION:
            card.complete_wrongly()
        elif what is What.ECC_CORRECTED:
            # Corrected, it is nothing but a number.
            self.corrected[card.number] += fault.count
        elif what is What.FLAP:

            def go() -> None:
                card.away = True
                card.kill()

            def come() -> None:
                card.away = False

            self._flap(fault, go, come)
        else:
            command = fault.when.command if isinstance(fault.when, AtCommand) else None
            card.fail_at(_KNOBS[what], command)

    def _strike_link(self, fault: Fault, link: Link) -> None:
        first, second = self._cards[link.a], self._cards[link.b]
        if fault.what is What.CORRUPT:
            if first.native("corrupt"):
                first.corrupt(link.b, fault.count)
            else:
                second.fail_links(fault.count, link.a)
        elif fault.what is What.CUT:
            first.cut(link.b)
            self._later(fault, lambda: first.mend(link.b))
        else:
            self._flap(fault, lambda: first.cut(link.b), lambda: first.mend(link.b))

    def _strike_messages(self, fault: Fault, channel: FaultyChannel) -> None:
        channel.arm(fault.what, fault.count)
        if fault.what is What.REORDER:
            self._watch_reordered(channel)

    def _watch_reordered(self, channel: FaultyChannel) -> None:
        """What nothing overtakes must not wait for ever."""

        async def release() -> None:
            while channel.reorders:
                await trio.sleep(REORDER_S)
                with contextlib.suppress(SpankerError):
                    await channel.release()

        self._start(release)

    def _stall(self, fault: Fault) -> None:
        lasts_s = math.inf if fault.duration_s is None else fault.duration_s
        until_s = trio.current_time() + lasts_s
        cards = fault.cards
        if isinstance(fault.where, HostLink):
            cards = tuple(self._channels)
            self._host_stalled_until_s = max(self._host_stalled_until_s, until_s)
        for card in cards:
            self._channels[card].stall(until_s)
        self._later(fault, lambda: None)

    def _later(self, fault: Fault, end: Callable[[], None]) -> None:
        """What ends a fault that lasts."""
        if fault.duration_s is not None:
            self.at(trio.current_time() + fault.duration_s, lambda: self._end(fault, end))

    def _end(self, fault: Fault, end: Callable[[], None]) -> None:
        try:
            end()
            self._tell(f"{fault}: over")
        except SpankerError as error:
            self._tell(f"{fault}: not over: {error}")

    def _flap(self, fault: Fault, go: Callable[[], None], come: Callable[[], None]) -> None:
        """Away and back, `count` times, as long each."""
        assert fault.duration_s is not None
        go()
        self._later(fault, come)
        for again in range(1, fault.count):
            due_s = trio.current_time() + 2 * again * fault.duration_s
            self.at(due_s, lambda: self._flap_again(fault, go, come))

    def _flap_again(self, fault: Fault, go: Callable[[], None], come: Callable[[], None]) -> None:
        self._tell(f"{fault}: again")
        try:
            go()
        except SpankerError as error:
            self._tell(f"{fault}: not done: {error}")
        self._later(fault, come)

    def _start(self, job: Callable[[], Any]) -> None:
        if self._nursery is None:
            raise ConfigError("the fleet is not open yet")
        self._nursery.start_soon(job)


@contextlib.asynccontextmanager
async def faulty_fleet(
    cards: str | int | Sequence[CardSpec] = "soft:3",
    faults: FaultPlan | str = "",
    *,
    clients: Callable[[Fault], None] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Fleet, Injection]]:
    """Open a fleet that a fault plan, or its text, happens to; `options` are `open_fleet`'s.

    Times count from when the fleet is open, steps from the first that is submitted to a card,
    tokens from the first that `Injection.token` counts.  Raises ConfigError where the plan names
    what the fleet does not have, or what its cards cannot do.
    """
    from spanker.device.spec import parse_fleet
    from spanker.fleet import open_fleet

    parsed = FaultPlan.parse(faults) if isinstance(faults, str) else faults
    specs = parse_fleet(cards) if isinstance(cards, str | int) else tuple(cards)
    parsed.check(len(specs))
    injection = Injection(parsed, clients)
    try:
        async with open_fleet(specs, _around=injection, **options) as fleet:
            injection.start(fleet._nursery)
            yield fleet, injection
    finally:
        injection.close()
