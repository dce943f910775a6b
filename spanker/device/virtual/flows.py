# SPDX-License-Identifier: Apache-2.0
"""Bytes on their way between cards: links, ports, the rates that flows get, and what has arrived.

A flow is one send over one directed link.  Flows of a link go one after the other; flows of
different links share the ports of their cards by max-min fairness: all rates grow together, and
one stops growing when its link or one of its two ports is used up.  Nothing here knows programs.

A gather of 64 cards is four thousand flows that begin, leave and arrive together, so everything is
an array over links: link source -> target of n cards has the number source * n + target.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.device.virtual.costs import Transfers
from spanker.device.virtual.units import PS_PER_S, to_ps
from spanker.sched.bandwidth import Profile

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

# Rates this close are one rate: what differs only by the order of rounding must not make two
# events of one.
_CLOSE = 1 + 1e-12
# The time of what does not happen.
NEVER = int(np.iinfo(np.int64).max)


@attrs.frozen(eq=False)
class Arrivals:
    """What arrives at one time: bytes over links, and the epochs they were sent in."""

    links: I64
    nbytes: I64
    epochs: I64


class Network:
    """All links between `cards` cards, and for each card what its exchange still lacks.

    `settle` gives the time at which flows leave next; whoever gets there calls `leave`, which gives
    what arrives when; whoever gets there calls `arrive`.
    """

    def __init__(self, profile: Profile, cards: int) -> None:
        n = self._n = cards
        pairs = [(source, target) for source in range(n) for target in range(n)]
        speeds = [profile.link(*ends) for ends in pairs]
        self._link_rate = np.array([s.bytes_per_s / PS_PER_S for s in speeds])
        self._latency_ps = np.array([to_ps(s.latency_s) for s in speeds], np.int64)
        port = profile.port_bytes_per_s
        self._port_rate = None if port is None else port / PS_PER_S

        def zeros() -> I64:
            return np.zeros(n * n, np.int64)

        # The flow on each link: `left` bytes had not left at `since`.
        self._active = np.zeros(n * n, np.bool_)
        self._nbytes, self._epoch, self._begun, self._since = (zeros() for _ in range(4))
        self._due = np.full(n * n, NEVER)
        self._left, self._rate = np.zeros(n * n), np.zeros(n * n)
        # What waits behind it: (bytes, epoch).
        self._queues: dict[int, deque[tuple[int, int]]] = {}
        self._changed = False
        # What has come to the target in its present epoch, and what its exchanges have asked for.
        self._arrived, self._wanted = zeros(), zeros()
        self._later: dict[tuple[int, int], int] = {}  # by link and epoch
        self._epochs = np.ones(n, np.int64)  # of cards
        # Totals.
        self._busy_ps, self._sent, self._dropped = zeros(), zeros(), zeros()
        # Of the exchange that a card is in.
        self._sending = [0] * n
        self._lacking = [False] * n

    # --- exchanges ----------------------------------------------------------------------

    def begin(self, exchanges: Sequence[tuple[int, Transfers]], now: int) -> None:
        """Cards get to their exchanges: all their sends begin, behind what is on their links."""
        n = self._n
        links = [card * n + transfers.send_peers for card, transfers in exchanges]
        distinct = all(transfers.distinct for _, transfers in exchanges)
        self._send(
            np.concatenate(links),
            np.concatenate([transfers.send_bytes for _, transfers in exchanges]),
            distinct,
            now,
        )
        for card, transfers in exchanges:
            self._sending[card] += len(transfers.send_peers)
        wanted = np.concatenate([t.receive_peers * n + card for card, t in exchanges])
        nbytes = np.concatenate([t.receive_bytes for _, t in exchanges])
        if distinct:
            self._wanted[wanted] += nbytes
        else:
            np.add.at(self._wanted, wanted, nbytes)
        lacking = wanted[self._arrived[wanted] < self._wanted[wanted]] % n
        for card in set(lacking.tolist()):
            self._lacking[card] = True

    def is_over(self, card: int) -> bool:
        """Whether a card's exchange is over: all has left, and all has arrived."""
        return not self._sending[card] and not self._lacking[card]

    def waits_for(self, card: int) -> int:
        """Whom a card in an exchange waits for: who sends what is missing, or who takes its own."""
        n = self._n
        if self._lacking[card]:
            lacks = self._arrived[card::n] < self._wanted[card::n]
            return int(np.flatnonzero(lacks)[0])
        return int(np.flatnonzero(self._active[card * n : (card + 1) * n])[0])

    def _send(self, links: I64, nbytes: I64, distinct: bool, now: int) -> None:
        epochs = self._epochs[links // self._n]
        free = ~self._active[links]
        if not distinct:
            first = np.zeros(len(links), np.bool_)
            first[np.unique(links, return_index=True)[1]] = True
            free &= first
        if not free.all():
            for i in np.flatnonzero(~free).tolist():
                queue = self._queues.setdefault(int(links[i]), deque())
                queue.append((int(nbytes[i]), int(epochs[i])))
            links, nbytes, epochs = links[free], nbytes[free], epochs[free]
        self._start(links, nbytes, epochs, now)

    def _start(self, links: I64, nbytes: I64, epochs: I64, now: int) -> None:
        self._active[links] = True
        self._nbytes[links] = self._left[links] = nbytes
        self._epoch[links] = epochs
        self._begun[links] = self._since[links] = now
        self._rate[links] = 0.0
        self._changed = True

    # --- flows leave and arrive -------------------------------------------------------------

    def leave(self, now: int) -> tuple[list[int], list[tuple[int, Arrivals]]]:
        """Flows have left: the cards that they came from, and what arrives when."""
        links = np.flatnonzero(self._due <= now)
        nbytes, epochs = self._nbytes[links], self._epoch[links]
        self._sent[links] += nbytes
        self._stop(links, now)
        cards, counts = np.unique(links // self._n, return_counts=True)
        for card, count in zip(cards.tolist(), counts.tolist(), strict=True):
            self._sending[card] -= count
        latencies = self._latency_ps[links]
        arrivals = []
        for latency in np.unique(latencies).tolist():
            of = latencies == latency
            arrivals.append((now + latency, Arrivals(links[of], nbytes[of], epochs[of])))
        if self._queues:
            self._start_queued(links, now)
        return cards.tolist(), arrivals

    def arrive(self, arrivals: Arrivals) -> tuple[list[int], I64]:
        """Bytes have arrived: at which cards, and by card from whom the last of them came."""
        n, links = self._n, arrivals.links
        sources, targets = links // n, links % n
        now_in = self._epochs[targets]
        present = arrivals.epochs == now_in
        # An exchange never sends two flows of one link at the same time.
        self._arrived[links[present]] += arrivals.nbytes[present]
        if not present.all():
            for i in np.flatnonzero(~present).tolist():
                link, nbytes = int(links[i]), int(arrivals.nbytes[i])
                if arrivals.epochs[i] < now_in[i]:
                    self._dropped[link] += nbytes
                else:
                    key = link, int(arrivals.epochs[i])
                    self._later[key] = self._later.get(key, 0) + nbytes
        last = np.full(n, -1)
        last[targets] = sources
        cards = np.flatnonzero(last >= 0)
        lacks = self._arrived.reshape(n, n)[:, cards] < self._wanted.reshape(n, n)[:, cards]
        for i, card in enumerate(cards.tolist()):
            self._lacking[card] = bool(lacks[:, i].any())
        return cards.tolist(), last

    def _stop(self, links: I64, now: int) -> None:
        self._busy_ps[links] += now - self._begun[links]
        self._active[links] = False
        self._due[links] = NEVER
        self._changed = True

    def _start_queued(self, links: I64, now: int) -> None:
        for link in links.tolist():
            queue = self._queues.get(link)
            if queue:
                nbytes, epoch = queue.popleft()
                of = np.array([link])
                self._start(of, np.array([nbytes]), np.array([epoch]), now)
                if not queue:
                    del self._queues[link]

    # --- epochs ---------------------------------------------------------------------------

    def cancel(self, card: int, now: int) -> None:
        """Nothing more of what a card sends leaves, and it waits for nothing."""
        n = self._n
        row = np.arange(card * n, (card + 1) * n)
        for link in row.tolist():
            self._queues.pop(link, None)
        self._stop(row[self._active[row]], now)
        self._sending[card] = 0
        self._lacking[card] = False

    def enter(self, card: int, epoch: int) -> None:
        """A card enters a later epoch: what came before is dropped."""
        n = self._n
        self._epochs[card] = epoch
        self._dropped[card::n] += self._arrived[card::n]
        self._arrived[card::n] = 0
        self._wanted[card::n] = 0
        for link, sent_in in list(self._later):
            if link % n == card and sent_in <= epoch:
                nbytes = self._later.pop((link, sent_in))
                into = self._arrived if sent_in == epoch else self._dropped
                into[link] += nbytes

    # --- rates ----------------------------------------------------------------------------

    def settle(self, now: int) -> int | None:
        """Give every flow its rate, after all that happens at one time has happened; when the next
        ones leave, or None where that is as it was."""
        if not self._changed:
            return None
        self._changed = False
        links = np.flatnonzero(self._active)
        if not len(links):
            return NEVER
        rates = self._fair(links)
        other = rates != self._rate[links]
        if not other.all():
            changed, rates = links[other], rates[other]
        else:
            changed = links
        spent = now - self._since[changed]
        # A link may be infinitely fast, for no time.
        moved = np.zeros(len(changed))
        np.multiply(self._rate[changed], spent, out=moved, where=spent > 0)
        left = self._left[changed] - moved
        self._left[changed] = left
        self._since[changed] = now
        self._rate[changed] = rates
        self._due[changed] = now + np.maximum(np.rint(left / rates), 0).astype(np.int64)
        return int(self._due[links].min())

    def _fair(self, links: I64) -> F64:
        """Max-min fair rates of all flows that there are."""
        n, caps = self._n, self._link_rate[links]
        if self._port_rate is None:
            return caps
        # A port of each card sends, a port receives.
        ends = (links // n, links % n)
        room = [np.full(n, self._port_rate) for _ in ends]
        rates = np.zeros(len(links))
        waiting = np.ones(len(links), np.bool_)
        while True:
            limits = caps.copy()
            for end, left in zip(ends, room, strict=True):
                counts = np.bincount(end[waiting], minlength=n)
                np.minimum(limits, (left / np.maximum(counts, 1))[end], out=limits)
            limits[~waiting] = np.inf
            least = limits.min()
            stops = waiting & (limits <= least * _CLOSE)
            rates[stops] = least
            waiting &= ~stops
            if not waiting.any():
                return rates
            for end, left in zip(ends, room, strict=True):
                left -= least * np.bincount(end[stops], minlength=n)

    # --- what is told ---------------------------------------------------------------------

    def link_bytes(self, card: int, peer: int) -> tuple[int, int]:
        """Bytes that a card has sent to a peer, and taken from it."""
        out, into = card * self._n + peer, peer * self._n + card
        taken = min(self._arrived[into], self._wanted[into])
        return int(self._sent[out]), int(self._dropped[into] + taken)

    def use(self, now: int) -> list[tuple[int, int, int, int]]:
        """Of each link that ever carried something: its ends, how long, and how many bytes left."""
        busy = self._busy_ps + np.where(self._active, now - self._begun, 0)
        links = np.flatnonzero((busy > 0) | (self._sent > 0)).tolist()
        return [
            (link // self._n, link % self._n, int(busy[link]), int(self._sent[link]))
            for link in links
        ]
