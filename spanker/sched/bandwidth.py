# SPDX-License-Identifier: Apache-2.0
"""Profiles: the speeds of a machine's cards, links and host, each with its source.

Only figures live here; who paces, plans or simulates by them lives elsewhere, and what each of them
means for the time of a step is stated in docs/api/timing-model.md.  The three tiers always satisfy
host link < inter-card < local DDR and local DDR >= 4 x inter-card, so a plan that stays low in the
hierarchy is a good plan whatever the exact numbers.
"""

from __future__ import annotations

import math

import attrs

from spanker.errors import ConfigError
from spanker.values import Value

# Middle of the 1.5-2.4 GB/s seen on ECP5 boards with the open toolchain.  Never the paper value
# of DDR3-1600 (12.8 GB/s), which no such board reaches.
LOCAL_DDR_BW_BYTES_PER_SEC = 2_000_000_000

# Each direction: 4 lanes x 1.25 Gbit/s x 8b/10b.  About 600 MB/s with 64b/66b.
INTERCARD_BW_BYTES_PER_SEC = 500_000_000

# Gigabit Ethernet after headers (800-940 Mbit/s measured), so always within 80-125 MB/s.
# 10 GbE would give 1 GB/s, PCIe Gen2 x1 500 MB/s.
HOST_LINK_BW_BYTES_PER_SEC = 100_000_000

# One way, one frame, through a switch and two kernel network stacks: an assumption, not measured.
HOST_LINK_LATENCY_S = 100e-6


@attrs.frozen(eq=False, repr=False)
class CardSpeed(Value):
    """How one card differs from its profile: factors of its memory and arithmetic speed, 1 for a
    card as it should be and 0.5 for a straggler of half the speed."""

    card: int
    memory: float = 1.0
    compute: float = 1.0


@attrs.frozen(eq=False, repr=False)
class LinkSpeed(Value):
    """How one directed link differs from its profile."""

    source: int
    target: int
    bytes_per_s: float
    latency_s: float


@attrs.frozen(eq=False, repr=False)
class Profile(Value):
    """The speeds that planning assumes, that virtual cards take, and that a paced host link keeps.

    Bandwidths are bytes per second, rates multiply-adds or elements per second, times seconds.

    `local_ddr_bytes_per_s`: one card's memory.  `intercard_bytes_per_s`, `intercard_latency_s`: one
    directed link.  `port_bytes_per_s`: what one card sends, or receives, over all of its links
    together; None where the links are the only limit.  `host_link_bytes_per_s`: the host's link in
    each direction, shared by all cards; None where it is not throttled.  `int8_madds_per_s`,
    `float_madds_per_s`: matrix products with quantised and with float weights (and attention).
    `elements_per_s`: everything that is done element by element.  `command_s`: taking up a command
    of a program, `step_s`: a whole step.  `host_step_s`: the host's own work for a step, before it
    can submit the next one that depends on it.

    Emulated cards share a machine: `cores` of them can work at a time (None: all), and together
    they read `shared_bytes_per_s` of memory at most (None: no limit).

    `cards` and `links` list those that differ.
    """

    name: str
    local_ddr_bytes_per_s: float
    intercard_bytes_per_s: float
    host_link_bytes_per_s: float | None
    host_link_latency_s: float
    intercard_latency_s: float = 0.0
    port_bytes_per_s: float | None = None
    int8_madds_per_s: float = math.inf
    float_madds_per_s: float = math.inf
    elements_per_s: float = math.inf
    command_s: float = 0.0
    step_s: float = 0.0
    host_step_s: float = 0.0
    cores: int | None = None
    shared_bytes_per_s: float | None = None
    cards: tuple[CardSpeed, ...] = ()
    links: tuple[LinkSpeed, ...] = ()
    _cards: dict[int, CardSpeed] = attrs.field(init=False, eq=False, repr=False)
    _links: dict[tuple[int, int], LinkSpeed] = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"profile {self.name}: {name} must be above 0, got {value}")
        for name in _TIMES:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"profile {self.name}: {name} must be 0 or more, got {value}")
        for card in self.cards:
            if not (card.memory > 0 and card.compute > 0):
                raise ConfigError(
                    f"profile {self.name}, card {card.card}: factors must be above 0, got "
                    f"memory {card.memory} and compute {card.compute}"
                )
        for link in self.links:
            if not (link.bytes_per_s > 0 and 0 <= link.latency_s < math.inf):
                raise ConfigError(
                    f"profile {self.name}, link {link.source} -> {link.target}: expected a "
                    f"bandwidth above 0 and a latency of 0 or more, got {link.bytes_per_s} bytes/s "
                    f"and {link.latency_s} s"
                )
        by_card = {c.card: c for c in self.cards}
        by_ends = {(link.source, link.target): link for link in self.links}
        if len(by_card) != len(self.cards) or len(by_ends) != len(self.links):
            raise ConfigError(f"profile {self.name}: a card or a link is listed twice")
        object.__setattr__(self, "_cards", by_card)
        object.__setattr__(self, "_links", by_ends)

    def card(self, number: int) -> CardSpeed:
        """How card `number` differs; factors of 1 where it is not listed."""
        return self._cards.get(number) or CardSpeed(number)

    def link(self, source: int, target: int) -> LinkSpeed:
        """The speed of a directed link, whether there is one or not."""
        return self._links.get((source, target)) or LinkSpeed(
            source, target, self.intercard_bytes_per_s, self.intercard_latency_s
        )


_POSITIVE = (
    "local_ddr_bytes_per_s",
    "intercard_bytes_per_s",
    "host_link_bytes_per_s",
    "port_bytes_per_s",
    "int8_madds_per_s",
    "float_madds_per_s",
    "elements_per_s",
    "cores",
    "shared_bytes_per_s",
)
_TIMES = ("host_link_latency_s", "intercard_latency_s", "command_s", "step_s", "host_step_s")

REV_A = Profile(
    name="rev-a",
    local_ddr_bytes_per_s=LOCAL_DDR_BW_BYTES_PER_SEC,
    intercard_bytes_per_s=INTERCARD_BW_BYTES_PER_SEC,
    host_link_bytes_per_s=HOST_LINK_BW_BYTES_PER_SEC,
    host_link_latency_s=HOST_LINK_LATENCY_S,
    # A hop through the line coding and two queues at 100 MHz: an assumption.
    intercard_latency_s=2e-6,
    # One connector of four lanes, however many neighbours it serves.
    port_bytes_per_s=INTERCARD_BW_BYTES_PER_SEC,
    # Of the firmware at 100 MHz, by counted instructions (docs/performance.md, "On the first
    # board"): Q4_0 with Xpop, four tokens at a time; attention and elements with four vector lanes.
    int8_madds_per_s=7.8e9,
    float_madds_per_s=70e6,
    elements_per_s=10e6,
    # Counted, too: some 500 cycles to take up a command.  Assumed: 2,000 a step.
    command_s=5e-6,
    step_s=20e-6,
    # Two messages a card, sampling, detokenising: measured with soft cards.
    host_step_s=0.5e-3,
)
"""The first board, InnerJib7EA rev-A, on Gigabit Ethernet."""

REV_B = attrs.evolve(
    REV_A,
    name="rev-b",
    # The upper end of what ECP5 boards reach: assumed of a second layout.
    local_ddr_bytes_per_s=2_400_000_000,
    # 64b/66b in place of 8b/10b.
    intercard_bytes_per_s=600_000_000,
    port_bytes_per_s=600_000_000,
    # PCIe Gen2 x1; 10 GbE gives twice that.
    host_link_bytes_per_s=500_000_000,
    # Assumed: no switch and one network stack less.
    host_link_latency_s=20e-6,
)
"""The second board: PCIe to the host, a denser line code; arithmetic as rev-A."""

NATIVE = Profile(
    name="native",
    local_ddr_bytes_per_s=15_000_000_000,
    intercard_bytes_per_s=3_000_000_000,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
    intercard_latency_s=1e-6,
    int8_madds_per_s=100e9,
    float_madds_per_s=10e9,
    elements_per_s=1e9,
    command_s=0.5e-6,
    step_s=10e-6,
    host_step_s=0.5e-3,
)
"""Soft cards as fast as the machine goes: nothing is throttled.

For planning it assumes 15 GB/s from memory to one core, and 3 GB/s through a link ring, where a
message is copied in, checksummed and copied out.  All figures are assumptions about an ordinary
desktop or server, and that each card has a core of its own: `spanker calibrate` measures this one.
Plans change with them, results never do.
"""

PROFILES: tuple[Profile, ...] = (NATIVE, REV_A, REV_B)


def profile(name: str) -> Profile:
    """The profile called `name`; raises ConfigError, listing the names, when there is none."""
    for candidate in PROFILES:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in PROFILES)
    raise ConfigError(f"no profile {name!r}: expected one of {known}")
