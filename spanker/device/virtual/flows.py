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
# What a soft card sends at most in one message.
MESSAGE_BYTES = 16384
# The time of what does not happen.
NEVER = int(np.iinfo(np.int64).max)
# What is so until it is known, of each link.
_NEVER_AT_FIRST = ("_due", "_damaged_at")


@attrs.frozen(eq=False)
class Arrivals:
    """What arrives at one time: bytes over links, the epochs they were sent in, and whether they
    are damaged (None: nothing is)."""

    links: I64
    nbytes: I64
    epochs: I64
    damaged: npt.NDArray[np.bool_] | None = None

    def of(self, which: npt.NDArray[np.bool_]) -> Arrivals:
        """Some of it."""
        damaged = None if self.damaged is None else self.damaged[which]
        return Arrivals(self.links[which], self.nbytes[which], self.epochs[which], damaged)


class Network:
    """All links between `cards` cards, and for each card what its exchange still lacks.

    `settle` gives the time at which flows leave next; whoever gets there calls `leave`, which gives
    what arrives when; whoever gets there calls `arrive`.
    """

    def __init__(self, profile: Profile, cards: int) -> None:
        n = self._n = cards
        self._profile = profile
        self._find_speeds()
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
        self._hosted = zeros()  # sent over the host, where there is no such link
        # Of the exchange that a card is in.
        self._sending = [0] * n
        self._lacking = [False] * n
        # What ends of links want, at the number of the link from that end; and what comes of it.
        self._wants_down, self._down = np.zeros(n * n, np.bool_), np.zeros(n * n, np.bool_)
        self._any_down = False
        # What is on its way, and what waits at the end of a link that is down.
        self._under_way: dict[Arrivals, None] = {}
        self._held: list[Arrivals] = []
        # Messages to be damaged, by link; and how much has come to the target, in its present epoch
        # or a later one, before the first that is.
        self._to_damage: dict[int, int] = {}
        self._damaged_at = np.full(n * n, NEVER)
        self._damaged_later: dict[tuple[int, int], int] = {}
        self._any_damaged = False
        # Totals when the source, or the target, was opened.
        self._sent_before, self._taken_before = zeros(), zeros()

    def _find_speeds(self) -> None:
        n = self._n
        pairs = [(source, target) for source in range(n) for target in range(n)]
        speeds = [self._profile.link(*ends) for ends in pairs]
        self._link_rate = np.array([s.bytes_per_s / PS_PER_S for s in speeds])
        self._latency_ps = np.array([to_ps(s.latency_s) for s in speeds], np.int64)

    def add_card(self) -> None:
        """One more card, linked with all others, in epoch 1; whatever is under way goes on."""
        n = self._n

        def moved(link: int) -> int:
            return link // n * (n + 1) + link % n

        for name, old in list(vars(self).items()):
            if isinstance(old, np.ndarray) and old.shape == (n * n,):
                new = np.full((n + 1, n + 1), NEVER if name in _NEVER_AT_FIRST else 0, old.dtype)
                new[:n, :n] = old.reshape(n, n)
                setattr(self, name, new.reshape(-1))
        self._queues = {moved(link): queue for link, queue in self._queues.items()}
        self._to_damage = {moved(link): count for link, count in self._to_damage.items()}
        for table in (self._later, self._damaged_later):
            entries = {(moved(link), epoch): value for (link, epoch), value in table.items()}
            table.clear()
            table.update(entries)
        # Those who wait for them refer to these very values.
        for arrivals in (*self._under_way, *self._held):
            arrivals.links[:] = arrivals.links // n * (n + 1) + arrivals.links % n
        self._epochs = np.append(self._epochs, 1)
        self._sending.append(0)
        self._lacking.append(False)
        self._n = n + 1
        self._find_speeds()

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

    def send_over_host(self, card: int, peer: int, nbytes: int) -> tuple[int, bool]:
        """A card hands something to the host at once: the epoch, and whether it is damaged."""
        link = card * self._n + peer
        self._hosted[link] += nbytes
        damaged = self._damage(np.array([link]), np.array([nbytes]))
        return int(self._epochs[card]), damaged is not None and bool(damaged[0])

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
        left = Arrivals(links, nbytes, epochs, self._damage(links, nbytes))
        arrivals = []
        for latency in np.unique(latencies).tolist():
            arriving = left.of(latencies == latency)
            self._under_way[arriving] = None
            arrivals.append((now + latency, arriving))
        if self._queues:
            self._start_queued(links, now)
        return cards.tolist(), arrivals

    def arrive(self, arrivals: Arrivals) -> tuple[list[int], I64]:
        """Bytes have arrived: at which cards, and by card from whom the last of them came."""
        self._under_way.pop(arrivals)
        if self._any_down:
            arrivals = self._hold(arrivals)
        return self.take(arrivals)

    def take(self, arrivals: Arrivals) -> tuple[list[int], I64]:
        """As `arrive`, of what has come over the host."""
        n, links = self._n, arrivals.links
        sources, targets = links // n, links % n
        now_in = self._epochs[targets]
        present = arrivals.epochs == now_in
        if arrivals.damaged is not None:
            self._find_damaged(arrivals, arrivals.damaged, present)
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
        self._damaged_at[card::n] = NEVER
        for link, sent_in in list(self._damaged_later):
            if link % n == card and sent_in <= epoch:
                at = self._damaged_later.pop((link, sent_in))
                if sent_in == epoch:
                    self._damaged_at[link] = at
        self._any_damaged = bool((self._damaged_at != NEVER).any())

    # --- faults ---------------------------------------------------------------------------

    def want(self, card: int, peer: int, up: bool) -> list[Arrivals]:
        """One end wants a link up or down; what had waited for that and arrives now."""
        n = self._n
        there, back = card * n + peer, peer * n + card
        self._wants_down[there] = not up
        self._down[[there, back]] = self._wants_down[there] or self._wants_down[back]
        self._any_down = bool(self._down.any())
        self._changed = True
        held, self._held = self._held, []
        released = []
        for arrivals in held:
            down = self._down[arrivals.links]
            if down.any():
                self._held.append(arrivals.of(down))
            if not down.all():
                released.append(arrivals.of(~down))
        self._under_way.update(dict.fromkeys(released))
        return released

    def links_down(self, card: int) -> tuple[int, ...]:
        """The peers of a card whose link with it is down."""
        n = self._n
        return tuple(np.flatnonzero(self._down[card * n : (card + 1) * n]).tolist())

    def _hold(self, arrivals: Arrivals) -> Arrivals:
        """What of it arrives; the rest waits where it is."""
        down = self._down[arrivals.links]
        if down.any():
            self._held.append(arrivals.of(down))
            arrivals = arrivals.of(~down)
        return arrivals

    def damage(self, card: int, peer: int, messages: int) -> None:
        """The next so many messages of a card to a peer are damaged when they leave."""
        link = card * self._n + peer
        if messages:
            self._to_damage[link] = messages
        else:
            self._to_damage.pop(link, None)

    def _damage(self, links: I64, nbytes: I64) -> npt.NDArray[np.bool_] | None:
        if not self._to_damage:
            return None
        damaged = np.zeros(len(links), np.bool_)
        for i, link in enumerate(links.tolist()):
            messages = self._to_damage.get(link)
            if messages is not None:
                damaged[i] = True
                left = messages - -(-int(nbytes[i]) // MESSAGE_BYTES)
                self.damage(link // self._n, link % self._n, max(left, 0))
        return damaged

    def _find_damaged(
        self,
        arrivals: Arrivals,
        damaged: npt.NDArray[np.bool_],
        present: npt.NDArray[np.bool_],
    ) -> None:
        for i in np.flatnonzero(damaged).tolist():
            link, epoch = int(arrivals.links[i]), int(arrivals.epochs[i])
            if present[i]:
                self._damaged_at[link] = min(self._damaged_at[link], self._arrived[link])
                self._any_damaged = True
            elif epoch > self._epochs[link % self._n]:
                self._damaged_later.setdefault((link, epoch), self._later.get((link, epoch), 0))

    def has_damaged(self, card: int) -> bool:
        """Whether something has come that a card's exchange wants, and that is damaged."""
        if not self._any_damaged:
            return False
        n = self._n
        return bool((self._wanted[card::n] > self._damaged_at[card::n]).any())

    def give_up(self, card: int, now: int) -> None:
        """A card's exchange fails on what is damaged, which stays in front of what comes next."""
        self.cancel(card, now)
        wanted = self._wanted[card :: self._n]
        np.minimum(wanted, self._damaged_at[card :: self._n], out=wanted)

    def reopen(self, card: int) -> list[Arrivals]:
        """A card, which sends nothing, begins anew in epoch 1 and wants its links up; what is under
        way to it or from it is lost.  Returns what arrives now, as `want`."""
        n = self._n
        into, out = slice(card, None, n), slice(card * n, (card + 1) * n)
        self._dropped[into] += np.minimum(self._arrived[into], self._wanted[into])
        self._taken_before[into] = self._dropped[into]
        self._sent_before[out] = self._sent[out] + self._hosted[out]
        self._arrived[into] = self._wanted[into] = 0
        # What a peer has not taken yet it will not find.
        self._arrived[out] = np.minimum(self._arrived[out], self._wanted[out])
        self._epochs[card] = 1
        self._epoch[into] = 0
        for link, queue in self._queues.items():
            if link % n == card:
                self._queues[link] = deque([(nbytes, 0) for nbytes, _ in queue])
        for arrivals in (*self._under_way, *self._held):
            lost = (arrivals.links // n == card) | (arrivals.links % n == card)
            arrivals.nbytes[lost] = arrivals.epochs[lost] = 0
        for table in (self._later, self._damaged_later):
            for link, epoch in list(table):
                if card in (link // n, link % n):
                    del table[link, epoch]
        self._damaged_at[into] = self._damaged_at[out] = NEVER
        released = []
        for peer in range(n):
            self._to_damage.pop(card * n + peer, None)
            if peer != card:
                released += self.want(card, peer, True)
        return released

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
        rates = self._fair_where_up(links) if self._any_down else self._fair(links)
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
        moving = rates > 0
        due = np.full(len(changed), NEVER)
        due[moving] = now + np.maximum(np.rint(left[moving] / rates[moving]), 0).astype(np.int64)
        self._due[changed] = due
        return int(self._due[links].min())

    def _fair_where_up(self, links: I64) -> F64:
        up = ~self._down[links]
        rates = np.zeros(len(links))
        if up.any():
            rates[up] = self._fair(links[up])
        return rates

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
        """Bytes that a card has sent to a peer, and taken from it, since it was opened."""
        out, into = card * self._n + peer, peer * self._n + card
        taken = min(self._arrived[into], self._wanted[into])
        sent = self._sent[out] + self._hosted[out] - self._sent_before[out]
        return int(sent), int(self._dropped[into] + taken - self._taken_before[into])

    def moving_ps(self, card: int, now: int) -> int:
        """How long there has been something to move from a card to others, without what stands
        still now: that counts once it has moved."""
        out = slice(card * self._n, (card + 1) * self._n)
        moving = self._active[out] & (self._rate[out] > 0)
        return int(self._busy_ps[out].sum() + (now - self._begun[out])[moving].sum())

    def use(self, now: int) -> list[tuple[int, int, int, int]]:
        """Of each link that ever carried something: its ends, how long, and how many bytes left."""
        busy = self._busy_ps + np.where(self._active, now - self._begun, 0)
        links = np.flatnonzero((busy > 0) | (self._sent > 0)).tolist()
        return [
            (link // self._n, link % self._n, int(busy[link]), int(self._sent[link]))
            for link in links
        ]
