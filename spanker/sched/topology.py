# SPDX-License-Identifier: Apache-2.0
"""Which cards there are and which directed links join them, as a value.

Nothing here opens a device; `Topology.enumerate` only looks whether the device nodes exist.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping

import attrs

from spanker.errors import ConfigError, PlanError
from spanker.values import Value

# /dev/spanker0 to /dev/spanker255.
MAX_CARDS = 256


class LinkState(enum.IntEnum):
    """State of a directed link; the numbers are those the hardware reports."""

    DOWN = 0
    TRAINING = 1
    UP = 2
    ERROR = 3


@attrs.frozen(eq=False, repr=False)
class Link(Value):
    """What `local_sail` sends to `remote_sail` goes over this link."""

    local_sail: int
    remote_sail: int
    state: LinkState


@attrs.frozen(eq=False, repr=False)
class Topology(Value):
    """The cards of a fleet by number, and their directed links.

    Raises PlanError where a link names a card that is not there, joins a card to itself, or
    appears twice.
    """

    cards: tuple[int, ...]
    links: tuple[Link, ...] = ()
    _by_ends: Mapping[tuple[int, int], Link] = attrs.field(init=False, eq=False, repr=False)
    _fully_meshed: bool = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        known = set(self.cards)
        if len(known) != len(self.cards):
            raise PlanError(f"topology: a card number appears twice in {self.cards}")
        by_ends: dict[tuple[int, int], Link] = {}
        for link in self.links:
            ends = (link.local_sail, link.remote_sail)
            if link.local_sail == link.remote_sail or not known.issuperset(ends):
                raise PlanError(
                    f"topology: link {ends[0]} -> {ends[1]} must join two different cards, both "
                    "of the fleet"
                )
            if ends in by_ends:
                raise PlanError(f"topology: link {ends[0]} -> {ends[1]} appears twice")
            by_ends[ends] = link
        object.__setattr__(self, "_by_ends", by_ends)
        n, up = len(self.cards), sum(link.state is LinkState.UP for link in self.links)
        object.__setattr__(self, "_fully_meshed", up == n * (n - 1))

    @classmethod
    def with_mock(cls, n: int) -> Topology:
        """`n` cards, fully meshed: n*(n-1) directed links, all up."""
        return cls._mesh(n, LinkState.UP)

    @classmethod
    def ring(cls, n: int) -> Topology:
        """`n` cards in a ring, each linked with its two neighbours in both directions, all up."""
        return cls.of_pairs(n, [(a, (a + 1) % n) for a in range(n)] if n > 1 else [])

    @classmethod
    def line(cls, n: int) -> Topology:
        """`n` cards in a row, each linked with its neighbours in both directions, all up."""
        return cls.of_pairs(n, [(a, a + 1) for a in range(n - 1)])

    @classmethod
    def of_pairs(cls, n: int, pairs: Iterable[tuple[int, int]]) -> Topology:
        """`n` cards and a link in both directions for each pair, all up; pairs may repeat."""
        if not 0 <= n <= MAX_CARDS:
            raise ConfigError(f"topology: expected 0 to {MAX_CARDS} cards, got {n}")
        ends = {(a, b) for pair in pairs for a, b in (pair, pair[::-1])}
        return cls(tuple(range(n)), tuple(Link(a, b, LinkState.UP) for a, b in sorted(ends)))

    @classmethod
    def enumerate(cls, device_dir: str | os.PathLike[str] = "/dev") -> Topology:
        """The cards `spanker0`, `spanker1`, ... of `device_dir`, up to the first that is missing.

        Links are down until a card reports otherwise, as those of an open fleet do
        (`Fleet.topology`).  Raises ConfigError when there is no card.
        """
        n = 0
        while n < MAX_CARDS and os.path.exists(os.path.join(device_dir, f"spanker{n}")):
            n += 1
        if n == 0:
            control = os.path.join(device_dir, "spankerctl")
            if os.path.exists(control):
                why = "the spanker module is loaded, and has found no card"
            else:
                why = f"the spanker module is not loaded ({control} does not exist); load it"
            raise ConfigError(
                f"no Sails: {os.path.join(device_dir, 'spanker0')} does not exist: {why}, or use "
                f"emulated cards such as soft:3"
            )
        return cls._mesh(n, LinkState.DOWN)

    def among(self, cards: Iterable[int]) -> Topology:
        """These cards alone, by the same numbers, and the links between them."""
        kept = set(cards)
        if kept.issuperset(self.cards):
            return self
        links = [k for k in self.links if k.local_sail in kept and k.remote_sail in kept]
        return Topology(tuple(c for c in self.cards if c in kept), tuple(links))

    @classmethod
    def _mesh(cls, n: int, state: LinkState) -> Topology:
        if not 0 <= n <= MAX_CARDS:
            raise ConfigError(f"topology: expected 0 to {MAX_CARDS} cards, got {n}")
        cards = tuple(range(n))
        return cls(cards, tuple(Link(a, b, state) for a in cards for b in cards if a != b))

    def link(self, local_sail: int, remote_sail: int) -> Link:
        """The link from one card to another; raises PlanError when there is none."""
        try:
            return self._by_ends[local_sail, remote_sail]
        except KeyError:
            raise PlanError(
                f"topology: no link {local_sail} -> {remote_sail} among {len(self.cards)} cards"
            ) from None

    def is_up(self, local_sail: int, remote_sail: int) -> bool:
        """Whether there is a link from one card to another, and it is up."""
        link = self._by_ends.get((local_sail, remote_sail))
        return link is not None and link.state is LinkState.UP

    @property
    def fully_meshed(self) -> bool:
        """Whether every card can send straight to every other."""
        return self._fully_meshed

    def shard_count(self) -> int:
        """Into how many shards a model is cut, tensor or model parallel: one a card."""
        return len(self.cards)
