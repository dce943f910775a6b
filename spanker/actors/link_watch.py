# SPDX-License-Identifier: Apache-2.0
"""Which links between cards can be used: those found down are left out until they have been up
again for a while.

Whoever waits for a link in vain finds out (`steps.ProgressWatch`) and tells; that one is up again
is found out here, by asking the cards at both of its ends now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from spanker.actors.message import Counters, ReadCounters
from spanker.errors import CardError
from spanker.events import LinkDown, LinkUp
from spanker.sched.detours import Down
from spanker.sched.topology import Link, LinkState, Topology

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator

# How often the ends of a link that is down are asked, and how often in a row they must both say
# that it is up: one that flaps faster than that stays out of use.
LOOK_S = 1.0
LOOKS_UP = 2


class LinkWatch:
    """The links of one fleet.  `changes` grows with whatever becomes of them."""

    def __init__(self, coordinator: Coordinator, topology: Topology) -> None:
        self._coordinator = coordinator
        self.topology = topology
        self.changes = 0
        self.down = _down(topology)
        # Links that are there and down, and how often in a row they have been seen up since.
        self._broken = {_pair(k): 0 for k in topology.links if k.state is not LinkState.UP}
        self._any_broken = trio.Event()
        # Bytes by which the counters of a link's two ends differ though nothing is under way: those
        # of a card that has come back begin anew, its peers' go on.
        self._apart: dict[tuple[int, int], int] = {}

    def down_among(self, cards: Sequence[int]) -> Down:
        """The links between these cards, from and to, that are not up."""
        if not self.down:
            return self.down
        return frozenset(pair for pair in self.down if pair[0] in cards and pair[1] in cards)

    def lose(self, card: int, peer: int) -> None:
        """A link has gone down, for both directions."""
        pair = min(card, peer), max(card, peer)
        known, self._broken[pair] = pair in self._broken, 0
        if known:
            return
        self._change({pair: LinkState.DOWN})
        self._coordinator.events.tell(LinkDown(trio.current_time(), *pair))
        self._any_broken.set()

    def join(self, card: int, links: Sequence[Link] | None = None) -> None:
        """A new card is linked with others like this, with all of them where nothing is said."""
        others = self.topology.cards
        if links is None:
            links = [Link(*ends, LinkState.UP) for c in others for ends in ((c, card), (card, c))]
        every = sorted((*self.topology.links, *links), key=lambda k: (k.local_sail, k.remote_sail))
        self.topology = Topology((*others, card), tuple(every))
        broken = {_pair(link): 0 for link in links if link.state is not LinkState.UP}
        self._broken.update(broken)
        if broken:
            self._any_broken.set()
        self._change({})

    def under_way(self, source: int, target: int, counters: Mapping[int, Counters]) -> int:
        """Bytes that one card has sent and another has not taken, by the counters of both."""
        sent = counters[source].link_tx_bytes[target] - counters[target].link_rx_bytes[source]
        return sent - self._apart.get((source, target), 0)

    def forget(self, card: int, counters: Mapping[int, Counters]) -> None:
        """A card is as new, and so are its links; `counters` are those of all cards in use, while
        nothing is under way from or to this one."""
        for peer in counters:
            if peer != card and card in counters:
                for ends in ((card, peer), (peer, card)):
                    self._apart.pop(ends, None)
                    self._apart[ends] = self.under_way(*ends, counters)
        pairs = [pair for pair in self._broken if card in pair]
        for pair in pairs:
            del self._broken[pair]
        self._change(dict.fromkeys(pairs, LinkState.UP))

    async def run(self) -> None:
        """Find out which links are up again, until cancelled."""
        while True:
            self._any_broken = trio.Event()
            if not self._broken:
                await self._any_broken.wait()
            await trio.sleep(LOOK_S)
            for pair in tuple(self._broken):
                await self._look(pair)

    async def _look(self, pair: tuple[int, int]) -> None:
        coordinator = self._coordinator
        up = True
        try:
            for card, peer in (pair, pair[::-1]):
                counters = await coordinator.ask(card, ReadCounters())
                up = up and peer not in counters.links_down
        except CardError:
            up = False
        if pair not in self._broken:
            return
        self._broken[pair] = self._broken[pair] + 1 if up else 0
        if self._broken[pair] == LOOKS_UP:
            del self._broken[pair]
            self._change({pair: LinkState.UP})
            coordinator.events.tell(LinkUp(trio.current_time(), *pair))

    def _change(self, states: dict[tuple[int, int], LinkState]) -> None:
        links = tuple(
            Link(k.local_sail, k.remote_sail, states.get(_pair(k), k.state))
            for k in self.topology.links
        )
        self.topology = Topology(self.topology.cards, links)
        self.down = _down(self.topology)
        self.changes += 1
        self._coordinator.changed()


def _pair(link: Link) -> tuple[int, int]:
    a, b = link.local_sail, link.remote_sail
    return min(a, b), max(a, b)


def _down(topology: Topology) -> Down:
    if topology.fully_meshed:
        return frozenset()
    cards = topology.cards
    return frozenset((a, b) for a in cards for b in cards if a != b and not topology.is_up(a, b))
