# SPDX-License-Identifier: Apache-2.0
"""What a fleet of modelled cards does when: docs/api/timing-model.md, event by event.

A discrete-event engine without I/O and without a clock: steps are submitted, time is advanced, and
each step that ends is reported.  Between two exchanges a card runs its commands in one go, so the
events of a step are its exchanges, the flows in them, and its end.  Nothing here knows what a
command computes.

Order is part of the result: events of one picosecond happen in the order in which they were
planned, and rates and contention are settled after all of them.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

import attrs
import numpy as np

from spanker.device.virtual.costs import ALONE, Durations, Level, ProgramCosts, StepCosts, StepSize
from spanker.device.virtual.flows import NEVER, Arrivals, Network
from spanker.device.virtual.recorder import Recorder
from spanker.device.virtual.units import PS_PER_S, to_ps
from spanker.sched.bandwidth import Profile

# What counts one in the progress that a card reports: a microsecond of computing or of sending, and
# whatever comes over the host.
_PROGRESS_PS = 10**6


class Outcome(enum.Enum):
    """How a step ended, as whoever runs its arithmetic says.

    STUCK: it has not, since it lacks what a peer never sent; the card stays where it is until it is
    aborted.  FAULT: it failed, and what is queued behind it is dropped.
    """

    DONE = enum.auto()
    STUCK = enum.auto()
    FAULT = enum.auto()


class _Phase(enum.Enum):
    IDLE = enum.auto()
    TAKING_UP = enum.auto()
    RUNNING = enum.auto()
    AT_EXCHANGE = enum.auto()  # begun once all that happens at this time has happened
    EXCHANGING = enum.auto()
    STUCK = enum.auto()


@attrs.define(eq=False)
class Work:
    """A submitted step; `busy_ps` is what its commands have taken so far."""

    fence: int
    program: ProgramCosts
    size: StepSize
    busy_ps: int = 0


@attrs.frozen
class CardState:
    """Counts of one card since it was opened, and where it stands; see `DeviceCounters`."""

    commands: int
    steps: int
    read_bytes: int
    written_bytes: int
    busy_ps: int
    progress: int
    queued: int
    waiting_for: int | None


@attrs.frozen
class CardUse:
    """How a card has spent its time: computing, and in exchanges by the peer that came last (its
    own number where its own sends did).  The rest it was idle."""

    busy_ps: int
    waiting_ps: dict[int, int]


@attrs.frozen
class LinkUse:
    """How long a directed link had something to carry, and what has left over it."""

    source: int
    target: int
    busy_ps: int
    nbytes: int


@attrs.frozen
class Usage:
    """What has been used how much by `now`; differences of two are what happened in between."""

    now: int
    cards: tuple[CardUse, ...]
    links: tuple[LinkUse, ...]


class _Flows:
    """The subject of events of the network: what arrives, or flows that leave."""

    def __init__(self, arrivals: Arrivals | None = None) -> None:
        self.stamp = 0
        self.arrivals = arrivals


class _Card:
    """One card: its queue, and where it stands in the step at its head."""

    def __init__(self, number: int, memory: float) -> None:
        self.number = number
        self.memory = memory  # bytes a picosecond
        self.queue: deque[Work] = deque()
        self.phase = _Phase.IDLE
        self.hung = False
        # Events of another stamp are no longer wanted.
        self.stamp = 0
        self.since = 0
        # Of the step at the head of the queue.
        self.costs: StepCosts
        self.run = 0
        self.read_bytes: list[int] = []
        self.written_bytes: list[int] = []
        # Where cards contend: command `at` has `rest` to go at the present level.
        self.durations: Durations
        self.at = 0
        self.rest = 0
        self.edges: list[int] = []  # when the run began, and when its commands have ended
        self.exchange_begun = 0  # for the recorder: with its command's own time
        # Totals.
        self.commands = self.steps = self.read = self.written = 0
        self.busy_ps = 0
        self.taking_up_ps = 0
        self.relayed = 0  # how often something has come over the host
        self.waiting_ps: dict[int, int] = {}
        self.recorder: Recorder | None = None
        # How many times longer it takes, and what happens when a step gets to a command.
        self.slowness = 1.0
        self.planted: tuple[int | None, Callable[[], None]] | None = None
        self.opened: CardState | None = None  # what had been counted when it was opened again


_Subject = _Card | _Flows


class Engine:
    """The cards of one fleet, from time `now` on.

    `complete(card, work)` is called when a step ends, and says how; `damaged(card, work)` when it
    fails on a message that does not pass its check, and what is queued behind it is dropped.
    `host(card, peer, nbytes, epoch, damaged)` is called when a card hands bytes for a peer to the
    host; what that takes is not told here, and when they have come, `take` is called with the same.
    """

    def __init__(
        self,
        profile: Profile,
        cards: int,
        complete: Callable[[int, Work], Outcome],
        now: int = 0,
        damaged: Callable[[int, Work], None] = lambda card, work: None,
        host: Callable[[int, int, int, int, bool], None] | None = None,
    ) -> None:
        self.now = now
        self._profile = profile
        self._complete = complete
        self._damaged = damaged
        self._host = host
        self._step_ps = to_ps(profile.step_s)
        memory = profile.local_ddr_bytes_per_s / PS_PER_S
        self._cards = tuple(_Card(n, memory * profile.card(n).memory) for n in range(cards))
        self._network = Network(profile, cards)
        self._flows = _Flows()
        self._at_exchange: list[_Card] = []
        self._events: list[tuple[int, int, Callable[..., None], _Subject, int]] = []
        self._planned = 0
        # Cards are in each other's way only where the profile says so.
        self._contended = profile.cores is not None or profile.shared_bytes_per_s is not None
        self._level = ALONE
        self._running: dict[_Card, None] = {}
        self._begun: dict[_Card, None] = {}
        self._running_changed = False

    def have_card(self, number: int) -> None:
        """There is one more card, of the next number; or one of that number was given up before it
        did anything, and this is another one."""
        if number < len(self._cards):
            self.reopen(number)
            return
        profile = self._profile
        memory = profile.local_ddr_bytes_per_s / PS_PER_S
        self._cards += (_Card(number, memory * profile.card(number).memory),)
        self._network.add_card()

    # --- time ---------------------------------------------------------------------------

    def next_event(self) -> int | None:
        """When something happens next, if nothing is submitted meanwhile."""
        self._settle()
        events = self._events
        while events and events[0][3].stamp != events[0][4]:
            heapq.heappop(events)
        return events[0][0] if events else None

    def advance(self, until: int) -> None:
        """Let everything happen up to and including `until`."""
        events = self._events
        while True:
            self._settle()
            if not events or events[0][0] > until:
                break
            now = events[0][0]
            while events and events[0][0] == now:
                _, _, happen, subject, stamp = heapq.heappop(events)
                if subject.stamp == stamp:
                    self.now = now
                    happen(subject)
        self.now = max(self.now, until)

    def _plan(self, at: int, happen: Callable[..., None], subject: _Subject) -> None:
        self._planned += 1
        heapq.heappush(self._events, (at, self._planned, happen, subject, subject.stamp))

    def _settle(self) -> None:
        """After all that has happened at one time: exchanges begin, flows get their rates, and
        cards that contend their pace."""
        if self._at_exchange:
            self._begin_exchanges()
        leaving = self._network.settle(self.now)
        if leaving is not None:
            self._flows.stamp += 1
            if leaving != NEVER:
                self._plan(leaving, self._leave, self._flows)
        if self._running_changed:
            self._settle_level()

    # --- the host's side ------------------------------------------------------------------

    def submit(self, card: int, work: Work) -> None:
        """Queue a step behind those before it."""
        c = self._cards[card]
        c.queue.append(work)
        if c.phase is _Phase.IDLE and not c.hung:
            self._take_up(c)

    def abort(self, card: int, epoch: int) -> tuple[Work, ...]:
        """Drop everything queued, and what of it is under way; enter `epoch`."""
        dropped = self._drop(self._cards[card])
        self._network.enter(card, epoch)
        return dropped

    def behind(self, card: int) -> tuple[Work, ...]:
        """What is queued behind the step at the head."""
        return tuple(self._cards[card].queue)[1:]

    def hang(self, card: int) -> None:
        """The card does nothing any more, but can be aborted."""
        c = self._cards[card]
        c.hung = True
        self._halt(c)

    def kill(self, card: int) -> tuple[Work, ...]:
        """The card does nothing any more, and what was queued is dropped."""
        self.hang(card)
        return self._drop(self._cards[card])

    def plant(self, card: int, command: int | None, happen: Callable[[], None]) -> None:
        """Let something happen to the card, once: when the step under way or the next one gets to
        the run of commands with this one, or to its end where it has fewer; None is any command, so
        that it happens now if one is under way.  There is one such thing."""
        c = self._cards[card]
        c.planted = command, happen
        if command is None and c.phase not in (_Phase.IDLE, _Phase.TAKING_UP):
            self._happen(c)

    def slow(self, card: int, factor: float) -> None:
        """Commands that begin from now on take so many times longer than they should."""
        c = self._cards[card]
        c.slowness = factor
        if c.phase is _Phase.IDLE or c.phase is _Phase.TAKING_UP or c in self._begun:
            return
        durations = c.costs.durations(self._level.slowed(factor))
        if c.phase is not _Phase.RUNNING:
            c.durations = durations
        elif self._contended:
            self._count_busy(c)
            c.durations = durations
            self._plan_end(c)
        else:
            first, stop = c.costs.edges[c.run], c.costs.edges[c.run + 1]
            before = c.durations.before[first:stop] - c.durations.before[first]
            at = first + int(np.searchsorted(before, self.now - c.since, "right")) - 1
            c.durations = c.costs.spliced(c.durations, durations, at)
            c.stamp += 1
            self._plan(c.since + c.durations.runs[c.run], self._end_run, c)

    def want_link(self, card: int, peer: int, up: bool) -> None:
        """The card wants its link with a peer up or down; it is up while both do."""
        self._arrive_now(self._network.want(card, peer, up))

    def _arrive_now(self, released: Sequence[Arrivals]) -> None:
        for arrivals in released:
            self._plan(self.now, self._arrive, _Flows(arrivals))

    def take(self, card: int, peer: int, nbytes: int, epoch: int, damaged: bool) -> None:
        """What a card has sent over the host comes to its peer."""
        self._cards[peer].relayed += 1
        of = np.array([card * len(self._cards) + peer])
        bad = np.array([True]) if damaged else None
        arrivals = Arrivals(of, np.array([nbytes]), np.array([epoch]), bad)
        cards, last = self._network.take(arrivals)
        for target in cards:
            self._check_exchange(self._cards[target], int(last[target]))

    def links_down(self, card: int) -> tuple[int, ...]:
        """The peers whose link with the card is down."""
        return self._network.links_down(card)

    def corrupt(self, card: int, peer: int, messages: int) -> None:
        """The next so many messages to a peer do not pass its check."""
        self._network.damage(card, peer, messages)

    def reopen(self, card: int) -> None:
        """The card is as it was when the engine began; nobody is told of what was queued."""
        c = self._cards[card]
        self._drop(c)
        self._arrive_now(self._network.reopen(card))
        c.hung, c.slowness, c.planted, c.recorder = False, 1.0, None, None
        c.opened = self._since_begin(c)

    def _drop(self, c: _Card) -> tuple[Work, ...]:
        self._halt(c)
        self._network.cancel(c.number, self.now)
        dropped = tuple(c.queue)
        c.queue.clear()
        return dropped

    def _halt(self, c: _Card) -> None:
        c.stamp += 1
        if c.phase is _Phase.RUNNING:
            self._count_busy(c)
            self._stop_running(c)
        elif c.phase is _Phase.EXCHANGING:
            self._count_waiting(c, self._network.waits_for(c.number))
        elif c.phase is _Phase.TAKING_UP:
            c.taking_up_ps += self.now - c.since
        c.phase = _Phase.IDLE

    # --- a step -------------------------------------------------------------------------

    def _take_up(self, c: _Card) -> None:
        c.phase, c.since = _Phase.TAKING_UP, self.now
        self._plan(self.now + round(self._step_ps * c.slowness), self._begin_step, c)

    def _begin_step(self, c: _Card) -> None:
        work = c.queue[0]
        c.taking_up_ps += self.now - c.since
        c.costs = work.program.step(work.size, self._profile, c.number)
        c.durations = c.costs.durations(self._level.slowed(c.slowness))
        c.read_bytes, c.written_bytes = c.costs.read_bytes(), c.costs.written_bytes()
        c.run = 0
        self._begin_run(c)

    def _happen(self, c: _Card) -> None:
        assert c.planted is not None
        _, happen = c.planted
        c.planted = None
        happen()

    def _has_happened(self, c: _Card, *, ending: bool) -> bool:
        """Whether what was planted was due at the run that begins, or at the end of the step, and
        has happened instead."""
        if c.planted is None:
            return False
        at, _ = c.planted
        program = c.queue[0].program
        numbers, commands = program.numbers, len(program.ops)

        def number(edge: int) -> int:
            return int(numbers[edge]) if edge < len(numbers) else commands

        first, stop = c.costs.edges[c.run], c.costs.edges[c.run + 1]
        if at is None:
            due = ending or first < stop
        elif ending:
            due = at >= commands
        else:
            due = number(first) <= at < number(stop)
        if due:
            c.phase = _Phase.IDLE
            self._happen(c)
        return due

    def _begin_run(self, c: _Card) -> None:
        if self._has_happened(c, ending=False):
            return
        c.phase, c.since = _Phase.RUNNING, self.now
        if c.costs.edges[c.run] == c.costs.edges[c.run + 1]:
            self._end_step(c)
        elif self._contended:
            c.at = c.costs.edges[c.run]
            c.edges.clear()
            self._running[c] = self._begun[c] = None
            self._running_changed = True
        else:
            self._plan(self.now + c.durations.runs[c.run], self._end_run, c)

    def _end_run(self, c: _Card) -> None:
        begun = c.since
        self._count_busy(c)
        self._stop_running(c)
        first, stop = c.costs.edges[c.run], c.costs.edges[c.run + 1]
        c.read += c.read_bytes[c.run]
        c.written += c.written_bytes[c.run]
        exchange = c.run + 2 < len(c.costs.edges)
        count = stop - first - exchange
        c.commands += count
        if c.recorder is not None:
            if self._contended:
                edges = np.array(c.edges, np.int64)
            else:
                edges = begun + c.durations.before[first : stop + 1] - c.durations.before[first]
            c.exchange_begun = int(edges[count])
            work = c.queue[0]
            commands = work.program.numbers[first : first + count]
            c.recorder.run(work, commands, edges[:count], edges[1 : count + 1])
        if exchange:
            c.phase, c.since = _Phase.AT_EXCHANGE, self.now
            self._at_exchange.append(c)
        else:
            self._end_step(c)

    def _end_step(self, c: _Card) -> None:
        if self._has_happened(c, ending=True):
            return
        outcome = self._complete(c.number, c.queue[0])
        if outcome is Outcome.STUCK:
            c.phase = _Phase.STUCK
            return
        c.queue.popleft()
        c.phase = _Phase.IDLE
        if outcome is Outcome.FAULT:
            c.queue.clear()
        else:
            c.steps += 1
        if c.queue:
            self._take_up(c)

    # --- an exchange ----------------------------------------------------------------------

    def _begin_exchanges(self) -> None:
        cards = [c for c in self._at_exchange if c.phase is _Phase.AT_EXCHANGE]
        self._at_exchange.clear()
        exchanges = []
        for c in cards:
            c.phase, work = _Phase.EXCHANGING, c.queue[0]
            transfers = work.program.transfers(work.size.tokens, work.size.outputs)
            exchanges.append((c.number, transfers[c.run]))
        self._network.begin(exchanges, self.now)
        for number, sized in exchanges:
            for peer, nbytes in sized.hosted:
                assert self._host is not None
                epoch, damaged = self._network.send_over_host(number, peer, nbytes)
                self._host(number, peer, nbytes, epoch, damaged)
        for c in cards:
            self._check_exchange(c, c.number)

    def _leave(self, flows: _Flows) -> None:
        cards, arrivals = self._network.leave(self.now)
        for at, arriving in arrivals:
            self._plan(at, self._arrive, _Flows(arriving))
        for card in cards:
            self._check_exchange(self._cards[card], card)

    def _arrive(self, flows: _Flows) -> None:
        assert flows.arrivals is not None
        cards, last = self._network.arrive(flows.arrivals)
        for card in cards:
            self._check_exchange(self._cards[card], int(last[card]))

    def _check_exchange(self, c: _Card, last: int) -> None:
        if c.phase is not _Phase.EXCHANGING:
            return
        if self._network.has_damaged(c.number):
            self._count_waiting(c, last)
            c.phase = _Phase.IDLE
            self._network.give_up(c.number, self.now)
            self._damaged(c.number, c.queue[0])
            c.queue.clear()
        elif self._network.is_over(c.number):
            self._exchanged(c, last)

    def _exchanged(self, c: _Card, last: int) -> None:
        self._count_waiting(c, last)
        work = c.queue[0]
        behind = work.program.behind[c.run]
        c.commands += 1 + behind
        if c.recorder is not None:
            command = int(work.program.numbers[c.costs.edges[c.run + 1] - 1])
            c.recorder.exchange(work, command, behind, c.exchange_begun, self.now)
        c.run += 1
        self._begin_run(c)

    # --- contention -----------------------------------------------------------------------

    def _stop_running(self, c: _Card) -> None:
        if c in self._running:
            del self._running[c]
            self._begun.pop(c, None)
            self._running_changed = True

    def _settle_level(self) -> None:
        """After all that happens at one time: how far the cards that compute are in each other's
        way, and when each of them gets to its next exchange."""
        self._running_changed = False
        level = self._level_now()
        if level != self._level:
            for c in self._running:
                if c not in self._begun:
                    self._change_level(c, level)
            self._level = level
        for c in self._begun:
            c.durations = c.costs.durations(level.slowed(c.slowness))
            c.rest = _duration(c.durations, c.at)
            c.edges.append(self.now)
            self._plan_end(c)
        self._begun.clear()

    def _level_now(self) -> Level:
        cores, shared = self._profile.cores, self._profile.shared_bytes_per_s
        stretch = memory = 1.0
        if cores is not None:
            stretch = max(1.0, len(self._running) / cores)
        if shared is not None and self._running:
            wanted = sum(c.memory for c in self._running) * PS_PER_S
            # What is infinitely fast cannot be thinned.
            memory = min(1.0, shared / wanted) if wanted < math.inf else 1.0
        return Level(stretch, memory)

    def _change_level(self, c: _Card, level: Level) -> None:
        self._count_busy(c)
        before = _duration(c.durations, c.at)
        c.durations = c.costs.durations(level.slowed(c.slowness))
        after = _duration(c.durations, c.at)
        c.rest = round(c.rest * (after / before)) if before else after
        self._plan_end(c)

    def _plan_end(self, c: _Card) -> None:
        before, stop = c.durations.before, c.costs.edges[c.run + 1]
        behind = int(before[stop] - before[c.at + 1])
        c.stamp += 1
        self._plan(self.now + c.rest + behind, self._end_run, c)

    # --- counting -------------------------------------------------------------------------

    def _count_busy(self, c: _Card) -> None:
        """Bring a running card up to now."""
        spent = self.now - c.since
        c.since = self.now
        c.busy_ps += spent
        c.queue[0].busy_ps += spent
        if not self._contended or c in self._begun:
            return
        stop = c.costs.edges[c.run + 1]
        while c.at < stop and spent >= c.rest:
            spent -= c.rest
            c.edges.append(self.now - spent)
            c.at += 1
            c.rest = _duration(c.durations, c.at) if c.at < stop else 0
        c.rest -= spent

    def _count_waiting(self, c: _Card, last: int) -> None:
        spent = self.now - c.since
        c.since = self.now
        if spent:
            c.waiting_ps[last] = c.waiting_ps.get(last, 0) + spent

    def state(self, card: int) -> CardState:
        """Where a card stands now."""
        state, opened = self._since_begin(self._cards[card]), self._cards[card].opened
        if opened is None:
            return state
        counted = ("commands", "steps", "read_bytes", "written_bytes", "busy_ps", "progress")
        return attrs.evolve(
            state, **{name: getattr(state, name) - getattr(opened, name) for name in counted}
        )

    def is_stuck(self, card: int) -> bool:
        """Whether the time of a step has come, but not what a peer should have sent for it."""
        return self._cards[card].phase is _Phase.STUCK

    def _since_begin(self, c: _Card) -> CardState:
        busy_ps = c.busy_ps + (self.now - c.since if c.phase is _Phase.RUNNING else 0)
        taking_up_ps = c.taking_up_ps + (self.now - c.since if c.phase is _Phase.TAKING_UP else 0)
        moving_ps = self._network.moving_ps(c.number, self.now)
        waiting_for = None
        if c.phase is _Phase.EXCHANGING:
            waiting_for = self._network.waits_for(c.number)
        spent_ps = busy_ps + taking_up_ps + moving_ps
        return CardState(
            commands=c.commands,
            steps=c.steps,
            read_bytes=c.read,
            written_bytes=c.written,
            busy_ps=busy_ps,
            progress=c.commands + c.steps + c.relayed + spent_ps // _PROGRESS_PS,
            queued=len(c.queue),
            waiting_for=waiting_for,
        )

    def link_bytes(self, card: int, peer: int) -> tuple[int, int]:
        """Bytes that a card has sent to a peer, and taken from it."""
        return self._network.link_bytes(card, peer)

    def usage(self) -> Usage:
        """What has been used how much so far."""
        cards = []
        for c in self._cards:
            waiting = dict(c.waiting_ps)
            if c.phase is _Phase.EXCHANGING:
                last = self._network.waits_for(c.number)
                waiting[last] = waiting.get(last, 0) + self.now - c.since
            cards.append(CardUse(self._since_begin(c).busy_ps, waiting))
        links = [LinkUse(*use) for use in self._network.use(self.now)]
        return Usage(self.now, tuple(cards), tuple(links))

    def record(self, card: int, recorder: Recorder | None) -> None:
        """Tell a recorder of every command that the card executes from now on."""
        self._cards[card].recorder = recorder


def _duration(durations: Durations, command: int) -> int:
    return int(durations.before[command + 1] - durations.before[command])
