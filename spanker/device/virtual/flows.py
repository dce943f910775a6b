# SPDX-License-Identifier: Apache-2.0
"""Bytes on their way between cards: links, ports, and the rates that flows get.

A flow is one send over one directed link.  Flows of a link go one after the other; flows of
different links share the ports of their cards by max-min fairness: all rates grow together, and
one stops growing when its link or one of its two ports is used up.  Nothing here knows programs.

Rates change only when a flow begins or ends, and then only among flows that share ports with it,
directly or through others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from spanker.device.virtual.units import PS_PER_S, to_ps
from spanker.sched.bandwidth import Profile

# Rates this close are one rate: what differs only by the order of rounding must not make two
# events of one.
_CLOSE = 1 + 1e-12


class Flow:
    """One send under way: `left` bytes had not left at `since`, at `rate` bytes a picosecond."""

    __slots__ = ("due", "epoch", "left", "link", "nbytes", "owner", "rate", "since", "stamp")

    def __init__(self, link: Link, nbytes: int, owner: object, epoch: int) -> None:
        self.link = link
        self.nbytes = nbytes
        self.owner = owner
        self.epoch = epoch
        self.left = float(nbytes)
        self.rate = 0.0
        self.since = 0
        self.due = 0
        self.stamp = 0


class Link:
    """A directed link: the flow on it, those behind it, and what it has carried."""

    __slots__ = (
        "begun",
        "busy_ps",
        "flow",
        "latency_ps",
        "queue",
        "rate",
        "sent",
        "source",
        "target",
    )

    def __init__(self, source: int, target: int, rate: float, latency_ps: int) -> None:
        self.source = source
        self.target = target
        self.rate = rate
        self.latency_ps = latency_ps
        self.flow: Flow | None = None
        self.queue: deque[Flow] = deque()
        self.begun = 0
        self.busy_ps = 0
        self.sent = 0


class Network:
    """All links of a fleet.  `schedule(flow)` is called whenever a flow's `due` has changed;
    whoever gets there calls `leave`."""

    def __init__(self, profile: Profile, schedule: Callable[[Flow], None]) -> None:
        self._profile = profile
        self._schedule = schedule
        self._links: dict[tuple[int, int], Link] = {}
        port = profile.port_bytes_per_s
        self._port_rate = None if port is None else port / PS_PER_S
        # Flows by port: (card, False) sends, (card, True) receives.
        self._ports: dict[tuple[int, bool], dict[Flow, None]] = {}
        self._changed: dict[tuple[int, bool], None] = {}

    def link(self, source: int, target: int) -> Link:
        """The link from one card to another; it appears when it is first asked for."""
        ends = source, target
        found = self._links.get(ends)
        if found is None:
            speed = self._profile.link(source, target)
            found = self._links[ends] = Link(
                source, target, speed.bytes_per_s / PS_PER_S, to_ps(speed.latency_s)
            )
        return found

    @property
    def links(self) -> tuple[Link, ...]:
        """Every link that was asked for, in order of its ends."""
        return tuple(self._links[ends] for ends in sorted(self._links))

    def sent(self, source: int, target: int) -> int:
        """Bytes that have left over a link so far."""
        link = self._links.get((source, target))
        return link.sent if link else 0

    # --- flows begin and end ------------------------------------------------------------

    def send(self, link: Link, nbytes: int, owner: object, epoch: int, now: int) -> Flow:
        """Send so many bytes, at least one, behind what is on the link."""
        flow = Flow(link, nbytes, owner, epoch)
        if link.flow is None:
            self._begin(flow, now)
        else:
            link.queue.append(flow)
        return flow

    def leave(self, flow: Flow, now: int) -> None:
        """All bytes of a flow have left; the next one of its link begins."""
        flow.link.sent += flow.nbytes
        self._end(flow, now)

    def cancel(self, link: Link, now: int) -> None:
        """Nothing more of what is on a link leaves."""
        link.queue.clear()
        if link.flow is not None:
            link.flow.stamp += 1
            self._end(link.flow, now)

    def _begin(self, flow: Flow, now: int) -> None:
        link = flow.link
        link.flow, link.begun, flow.since = flow, now, now
        if self._port_rate is None:
            self._run(flow, link.rate, now)
            return
        for port in ((link.source, False), (link.target, True)):
            self._ports.setdefault(port, {})[flow] = None
            self._changed[port] = None

    def _end(self, flow: Flow, now: int) -> None:
        link = flow.link
        link.flow = None
        link.busy_ps += now - link.begun
        if self._port_rate is not None:
            for port in ((link.source, False), (link.target, True)):
                del self._ports[port][flow]
                self._changed[port] = None
        if link.queue:
            self._begin(link.queue.popleft(), now)

    def _run(self, flow: Flow, rate: float, now: int) -> None:
        if now > flow.since:  # a link may be infinitely fast
            flow.left -= flow.rate * (now - flow.since)
        flow.since, flow.rate = now, rate
        flow.due = now + max(int(flow.left / rate + 0.5), 0)
        flow.stamp += 1
        self._schedule(flow)

    # --- rates --------------------------------------------------------------------------

    def settle(self, now: int) -> None:
        """Give every flow its rate, after all that happens at one time has happened."""
        while self._changed:
            flows = self._neighbours(next(iter(self._changed)))
            if flows:
                for flow, rate in self._fair(flows):
                    if rate != flow.rate:
                        self._run(flow, rate, now)

    def _neighbours(self, port: tuple[int, bool]) -> dict[Flow, None]:
        """The flows that share ports with this one's, directly or through others."""
        found: dict[Flow, None] = {}
        ports = {port: None}
        to_see = [port]
        while to_see:
            port = to_see.pop()
            self._changed.pop(port, None)
            for flow in self._ports[port]:
                if flow in found:
                    continue
                found[flow] = None
                link = flow.link
                for other in ((link.source, False), (link.target, True)):
                    if other not in ports:
                        ports[other] = None
                        to_see.append(other)
        return found

    def _fair(self, flows: dict[Flow, None]) -> list[tuple[Flow, float]]:
        """Max-min fair rates of flows that share ports only with each other."""
        assert self._port_rate is not None
        # Of each port: what is left of its rate, and how many flows have none yet.
        room: dict[tuple[int, bool], list[float]] = {}
        waiting: list[tuple[Flow, list[float], list[float]]] = []
        for flow in flows:
            ends = []
            for port in ((flow.link.source, False), (flow.link.target, True)):
                state = room.get(port)
                if state is None:
                    state = room[port] = [self._port_rate, 0]
                state[1] += 1
                ends.append(state)
            waiting.append((flow, ends[0], ends[1]))
        rates: list[tuple[Flow, float]] = []
        while waiting:
            least = min(left / count for left, count in room.values() if count)
            least = min(least, min(flow.link.rate for flow, _, _ in waiting))
            limit = least * _CLOSE
            # First who stops, then what that leaves: flows must not see each other stop.
            used_up = {
                id(state) for state in room.values() if state[1] and state[0] / state[1] <= limit
            }
            left_over = []
            for entry in waiting:
                flow, out, into = entry
                if flow.link.rate <= limit or id(out) in used_up or id(into) in used_up:
                    rates.append((flow, least))
                    for state in (out, into):
                        state[0] -= least
                        state[1] -= 1
                else:
                    left_over.append(entry)
            waiting = left_over
        return rates
