# SPDX-License-Identifier: Apache-2.0
"""Cards and links as the cost model sees them: what a byte and a multiply-add take where, and what
an exchange takes.

The links of a topology that are up are those there are.  Where two cards have none, what one sends
the other goes as `sched.detours` has it: over other cards, in further exchanges, and where none of
them leads there over the host link, message by message up and then down.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import ClassVar

import attrs

from spanker.sched.bandwidth import Profile
from spanker.sched.cost.messages import RELAYED_BYTES, RELAYED_HEADER_BYTES
from spanker.sched.detours import ALL_UP, Down, choice_phases, gather_phases
from spanker.sched.moves import Move
from spanker.sched.shares import Share
from spanker.sched.topology import Topology
from spanker.values import Value

# Bytes on the host link for a byte that it relays, besides one header for each move.
RELAYED_RATIO = 1 + RELAYED_HEADER_BYTES / RELAYED_BYTES
# How long the host link is one card's before it is another one's turn.
HOST_TURN_S = 500e-6


@attrs.frozen(eq=False, repr=False)
class Pace(Value):
    """Seconds a card takes: for a byte of its memory, for work by `commands.ELEMENTS`, `INT8` and
    `FLOAT`, and for taking up a command."""

    s_per_byte: float
    s_per_work: tuple[float, float, float]
    command_s: float


Moves = Sequence[tuple[int, int, float]]
"""(source, target, bytes)"""


@attrs.frozen(eq=False, repr=False)
class Exchanges(Value):
    """One or more exchanges, one after the other: seconds for taking them up, and from when all
    cards are there; `first_s` is the first one's, both together."""

    commands_s: float
    links_s: float
    first_s: float

    NONE: ClassVar[Exchanges]

    @classmethod
    def once(cls, command_s: float, links_s: float) -> Exchanges:
        """A single one."""
        return cls(command_s, links_s, command_s + links_s)

    @property
    def seconds(self) -> float:
        return self.commands_s + self.links_s


Exchanges.NONE = Exchanges(0.0, 0.0, 0.0)


class Machine:
    """The cards of a topology, `cards`, at the speeds of a profile."""

    def __init__(self, profile: Profile, topology: Topology) -> None:
        self.profile = profile
        self.topology = topology
        self.cards = topology.cards
        self._link_s = 1 / profile.intercard_bytes_per_s
        self._port_s = 1 / profile.port_bytes_per_s if profile.port_bytes_per_s else 0.0
        rate = profile.host_link_bytes_per_s
        self.host_s_per_byte = 1 / rate if rate else 0.0
        # What a card sends over the host link before another one gets its turn.
        self.host_turn_bytes = rate * HOST_TURN_S if rate else 0.0
        # Whether all cards are linked, and all links alike.
        self.uniform = topology.fully_meshed and not profile.links
        # Whether cards are in each other's way while they compute.
        self.contended = profile.cores is not None or profile.shared_bytes_per_s is not None
        self._paces: dict[tuple[int, tuple[int, ...]], Pace] = {}
        # Cards of which every two are joined by the same links in both directions.
        self._alike: dict[tuple[int, ...], bool] = {}

    # --- cards --------------------------------------------------------------------------

    def pace(self, card: int, together: Sequence[int] = ()) -> Pace:
        """The pace of a card while the cards `together`, itself among them, compute.

        They are in each other's way only where the profile has `cores` or `shared_bytes_per_s`.
        """
        key = card, tuple(together) if self.contended else ()
        found = self._paces.get(key)
        if found is None:
            found = self._paces[key] = self._pace(*key)
        return found

    def _pace(self, card: int, together: tuple[int, ...]) -> Pace:
        profile, speed = self.profile, self.profile.card(card)
        memory, stretch = profile.local_ddr_bytes_per_s * speed.memory, 1.0
        if profile.cores is not None:
            stretch = max(1.0, len(together) / profile.cores)
        if profile.shared_bytes_per_s is not None and together:
            wanted = sum(profile.local_ddr_bytes_per_s * profile.card(c).memory for c in together)
            memory *= min(1.0, profile.shared_bytes_per_s / wanted)
        rates = (profile.elements_per_s, profile.int8_madds_per_s, profile.float_madds_per_s)
        elements, int8, floats = (stretch / (rate * speed.compute) for rate in rates)
        return Pace(1 / memory, (elements, int8, floats), stretch * profile.command_s)

    # --- exchanges ----------------------------------------------------------------------

    @functools.cached_property
    def down(self) -> Down:
        """Which card cannot send straight to which."""
        if self.topology.fully_meshed:
            return ALL_UP
        is_up = self.topology.is_up
        return frozenset(ends for ends in itertools.permutations(self.cards, 2) if not is_up(*ends))

    def gather(
        self, cards: Sequence[int], nbytes: Sequence[float], command_s: float = 0.0
    ) -> Exchanges:
        """An all-gather: cards[i] sends its nbytes[i] to each other one.  From when all are there;
        0 on the links where nothing moves."""
        others = len(cards) - 1
        if others < 1:
            return Exchanges.NONE
        if not self.alike(tuple(cards)):
            return self.in_phases(
                [
                    [(m.source, m.target, n) for m in moves if (n := nbytes[m.part.start])]
                    for moves in self.gather_ways(cards)
                ],
                command_s,
            )
        most = max(nbytes)
        if not most:
            return Exchanges.once(command_s, 0.0)
        # Who has most sends most; who has least receives most.
        port_bytes = max(others * most, sum(nbytes) - min(nbytes))
        latency_s = self.profile.intercard_latency_s
        links_s = max(most * self._link_s, port_bytes * self._port_s) + latency_s
        return Exchanges.once(command_s, links_s)

    def gather_ways(self, cards: Sequence[int]) -> Sequence[Sequence[Move]]:
        """The moves of each exchange of an all-gather in which the part of cards[i] is [i, i + 1).
        Which way one goes does not depend on what the others have."""
        parts = tuple(Share(i, i + 1) for i in range(len(cards)))
        return gather_phases(tuple(cards), parts, self.down)

    def choice(
        self, sources: Sequence[int], targets: Sequence[int], nbytes: float, command_s: float = 0.0
    ) -> Exchanges:
        """Every source sends so many bytes to every target that it is not itself."""
        if not self.uniform:
            # The commands are there, even for no bytes.
            phases = choice_phases(sources, targets, self.down)
            return self.in_phases(
                [[(m.source, m.target, nbytes) for m in moves] for moves in phases], command_s
            )
        both = set(sources) & set(targets)
        pairs = len(sources) * len(targets) - len(both)
        if not pairs:
            return Exchanges.NONE
        if not nbytes:
            return Exchanges.once(command_s, 0.0)
        # Some source is no target and sends to all, or else all of them send to one less.
        sent = len(targets) - (len(both) == len(sources))
        received = len(sources) - (len(both) == len(targets))
        port_s = nbytes * max(sent, received) * self._port_s
        links_s = max(nbytes * self._link_s, port_s) + self.profile.intercard_latency_s
        return Exchanges.once(command_s, links_s)

    def in_phases(self, phases: Sequence[Moves], command_s: float) -> Exchanges:
        """One exchange after the other, one at least: those in which nothing moves are none."""
        times = [self.moves_s(moves) for moves in phases if moves] or [0.0]
        return Exchanges(len(times) * command_s, sum(times), command_s + times[0])

    def moves_s(self, moves: Moves) -> float:
        """Any exchange, all moves side by side, those for which there is no link over the host.

        The longest of what any link, any port that sends and any that receives takes for its bytes,
        each with its own latency, a port's being the largest of its links; and the relayed bytes.
        """
        links: dict[tuple[int, int], float] = {}
        relayed: list[tuple[int, float]] = []
        for source, target, nbytes in moves:
            if source == target or not nbytes:
                continue
            if not self.topology.is_up(source, target):
                relayed.append((source, nbytes))
                continue
            ends = source, target
            links[ends] = links.get(ends, 0) + nbytes
        longest = self._relay_s(relayed) if relayed else 0.0
        # Of each port: bytes, and the largest latency.
        ports: dict[tuple[str, int], tuple[float, float]] = {}
        for (source, target), nbytes in links.items():
            speed = self.profile.link(source, target)
            longest = max(longest, nbytes / speed.bytes_per_s + speed.latency_s)
            for port in (("out", source), ("in", target)):
                sum_bytes, latency_s = ports.get(port, (0.0, 0.0))
                ports[port] = sum_bytes + nbytes, max(latency_s, speed.latency_s)
        for nbytes, latency_s in ports.values():
            longest = max(longest, nbytes * self._port_s + latency_s)
        return longest

    def _relay_s(self, moves: Sequence[tuple[int, float]]) -> float:
        """(source, bytes) from card to card over the host: all up, and down what has come; at the
        end the last message alone.

        Who has been first in one exchange is first in the next, and up by a turn of the link.
        """
        sent: dict[int, float] = {}
        for source, nbytes in moves:
            whole = nbytes * RELAYED_RATIO + RELAYED_HEADER_BYTES
            sent[source] = sent.get(source, 0.0) + whole
        last = min(max(nbytes for _, nbytes in moves), RELAYED_BYTES) + RELAYED_HEADER_BYTES
        most = max(sent.values())
        ahead = min(most, self.host_turn_bytes)
        nbytes = max(sum(sent.values()) - ahead, most) + last
        return nbytes * self.host_s_per_byte + 2 * self.profile.host_link_latency_s

    def alike(self, cards: tuple[int, ...]) -> bool:
        """Whether cards are linked each with each, by links that are as all others."""
        if self.uniform:
            return True
        found = self._alike.get(cards)
        if found is None:
            found = self._alike[cards] = self.down.isdisjoint(
                itertools.permutations(cards, 2)
            ) and not any(
                link.source in cards and link.target in cards for link in self.profile.links
            )
        return found
