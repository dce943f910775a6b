# SPDX-License-Identifier: Apache-2.0
"""How long a collective takes, by the exchange rules of docs/api/timing-model.md.

    a phase of a card   command_s, then its sends and receives side by side; then each local work,
                        command_s + max(bytes / memory, elements / rate)
    a send              a flow over its link: after those before it on the link, at the rate of
                        max-min fairness under link and port limits; arrives latency_s after it left

All cards begin together, and the collective is over when the last card is.  A step's own cost
(`step_s`), and what emulated cards share (`cores`, `shared_bytes_per_s`), are not a collective's.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.collectives.plan import CollectivePlan, Copy, Fold, Local
from spanker.sched.topology import Topology

# Flows that end within this part of the time of each other end together: what is left then is
# rounding.
_TOGETHER = 1e-12

_Ends = tuple[int, int]


def seconds(
    plan: CollectivePlan, profile: Profile, topology: Topology, element_bytes: int = 4
) -> float:
    """The time of `plan` with elements of so many bytes, at the speeds of `profile`.

    Raises PlanError where it sends over a link that is missing or not up.
    """
    for phase in plan.phases:
        for send in phase.sends:
            if not topology.is_up(send.source, send.target):
                raise PlanError(
                    f"{plan.kind.value} {plan.algorithm!r}: expected link {send.source} -> "
                    f"{send.target} to be up; verify says more"
                )
    return _Run(plan, profile, element_bytes).run()


def fair_rates(
    flows: Sequence[tuple[int, int, float]], port_bytes_per_s: float | None
) -> list[float]:
    """Max-min fair bytes per second of flows (source, target, limit of the link)."""
    if port_bytes_per_s is None:
        return [limit for _, _, limit in flows]
    # A port is (card, direction).
    using: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (source, target, _) in enumerate(flows):
        using[source, 0].append(i)
        using[target, 1].append(i)
    left = dict.fromkeys(using, float(port_bytes_per_s))
    waiting = {port: len(users) for port, users in using.items()}
    rates = [0.0] * len(flows)
    settled = [False] * len(flows)
    by_limit = sorted(range(len(flows)), key=lambda i: flows[i][2])
    next_limit = 0

    def settle(i: int, rate: float) -> None:
        settled[i] = True
        rates[i] = rate
        for port in ((flows[i][0], 0), (flows[i][1], 1)):
            left[port] -= rate
            waiting[port] -= 1
            if not waiting[port]:
                del waiting[port]

    while waiting:
        narrowest = min(waiting, key=lambda port: left[port] / waiting[port])
        level = left[narrowest] / waiting[narrowest]
        while settled[by_limit[next_limit]]:
            next_limit += 1
        if flows[by_limit[next_limit]][2] > level:
            for i in using[narrowest]:
                if not settled[i]:
                    settle(i, level)
        # Flows below the level take less than their share: the others' level can only rise.
        while next_limit < len(flows) and flows[by_limit[next_limit]][2] <= level:
            i = by_limit[next_limit]
            next_limit += 1
            if not settled[i]:
                settle(i, flows[i][2])
    return rates


@attrs.define
class _Step:
    """A phase of one card in which it has something to do."""

    sends: Counter[int] = attrs.Factory(Counter)  # bytes by target
    receives: int = 0
    local: list[Local] = attrs.Factory(list)


@attrs.define
class _Flow:
    """The flow that a link carries at the moment: it ends at `end`, if nothing changes."""

    phase: int
    end: float
    rate: float


class _Run:
    """Events in order of time: cards that begin a phase, flows that end, messages that arrive."""

    def __init__(self, plan: CollectivePlan, profile: Profile, element_bytes: int) -> None:
        self.profile = profile
        self.element_bytes = element_bytes
        self.steps: dict[int, dict[int, _Step]] = {card: {} for card in plan.cards}
        for number, phase in enumerate(plan.phases):
            for send in phase.sends:
                # What goes over one link in a phase goes one after the other: it is one flow.
                sends = self._step(send.source, number).sends
                self._step(send.target, number).receives += send.target not in sends
                sends[send.target] += send.what.size * element_bytes
            for local in phase.local:
                self._step(local.card, number).local.append(local)
        self.ahead = {card: deque(sorted(steps)) for card, steps in self.steps.items()}
        # Sends that have not left and messages that have not arrived, of a card's phase.
        self.open: Counter[tuple[int, int]] = Counter()
        # (phase, bytes) of what waits for a link; a link that carries a flow.
        self.queues: defaultdict[_Ends, deque[tuple[int, float]]] = defaultdict(deque)
        self.moving: dict[_Ends, _Flow] = {}
        self.rates_changed = False
        self.calls: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.now = self.end = 0.0

    def _step(self, card: int, number: int) -> _Step:
        steps = self.steps[card]
        if number not in steps:
            steps[number] = _Step()
        return steps[number]

    def run(self) -> float:
        for card in self.ahead:
            self._go_on(card, 0.0)
        while self.calls:
            self.now = self.calls[0][0]
            together = self.now * (1 + _TOGETHER)
            while self.calls and self.calls[0][0] <= together:
                _, _, call, arguments = heapq.heappop(self.calls)
                call(*arguments)
            self._start_next()
            if self.rates_changed:
                self._set_rates()
        return self.end

    def _at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.calls, (time, next(self.order), call, arguments))

    def _go_on(self, card: int, now: float) -> None:
        """The card takes up its next phase, or is done."""
        self.end = max(self.end, now)
        if not self.ahead[card]:
            return
        number = self.ahead[card].popleft()
        step = self.steps[card][number]
        if step.sends or step.receives:
            self._at(now + self.profile.command_s, self._begin, card, number)
        else:
            self._go_on(card, now + self._work_s(card, step.local))

    def _begin(self, card: int, number: int) -> None:
        step = self.steps[card][number]
        for target, nbytes in step.sends.items():
            self.queues[card, target].append((number, nbytes))
        # What arrived before has been taken off already: it waited in the link.
        self._done(card, number, -len(step.sends) - step.receives)

    def _done(self, card: int, number: int, transfers: int = 1) -> None:
        self.open[card, number] -= transfers
        if not self.open[card, number]:
            work_s = self._work_s(card, self.steps[card][number].local)
            self._go_on(card, self.now + work_s)

    def _left(self, ends: _Ends, flow: _Flow, end: float) -> None:
        """A flow has left, unless it got another end since this was foreseen."""
        if self.moving.get(ends) is not flow or flow.end != end:
            return
        del self.moving[ends]
        # Whatever is next on the link goes on at its rate.
        if self.queues.get(ends):
            self._start(ends, flow.rate)
        else:
            self.rates_changed = True
        source, target = ends
        latency_s = self.profile.link(source, target).latency_s
        self._at(self.now + latency_s, self._done, target, flow.phase)
        self._done(source, flow.phase)

    def _start_next(self) -> None:
        for ends in [ends for ends in self.queues if ends not in self.moving]:
            self._start(ends, self.profile.link(*ends).bytes_per_s)
            self.rates_changed = True

    def _start(self, ends: _Ends, rate: float) -> None:
        phase, nbytes = self.queues[ends].popleft()
        if not self.queues[ends]:
            del self.queues[ends]
        flow = self.moving[ends] = _Flow(phase, self.now + nbytes / rate, rate)
        self._at(flow.end, self._left, ends, flow, flow.end)

    def _set_rates(self) -> None:
        self.rates_changed = False
        rates = fair_rates(
            [(*ends, self.profile.link(*ends).bytes_per_s) for ends in self.moving],
            self.profile.port_bytes_per_s,
        )
        for (ends, flow), rate in zip(self.moving.items(), rates, strict=True):
            if rate != flow.rate:
                left = max(0.0, flow.end - self.now) * flow.rate
                flow.end, flow.rate = self.now + left / rate, rate
                self._at(flow.end, self._left, ends, flow, flow.end)

    def _work_s(self, card: int, local: Sequence[Local]) -> float:
        speed = self.profile.card(card)
        memory = self.profile.local_ddr_bytes_per_s * speed.memory
        rate = self.profile.elements_per_s * speed.compute
        time = 0.0
        for x in local:
            nbytes = x.into.size * self.element_bytes * (3 if isinstance(x, Fold) else 2)
            work_s = 0.0 if isinstance(x, Copy) else x.into.size / rate
            time += self.profile.command_s + max(nbytes / memory, work_s)
        return time
