# SPDX-License-Identifier: Apache-2.0
"""The three-tier bandwidth model: card DDR, inter-card link, host link.

Only figures live here, each with its source; who paces or plans by them lives elsewhere.
The tiers always satisfy host link < inter-card < local DDR and local DDR >= 4 x inter-card, so
a plan that stays low in the hierarchy is a good plan whatever the exact numbers.
"""

from __future__ import annotations

import attrs

from spanker.errors import ConfigError

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


@attrs.frozen
class Profile:
    """The speeds that planning assumes and that a paced host link enforces.

    `host_link_bytes_per_s` is None where the host link is not throttled.  The local and
    inter-card figures never slow a card down: they only feed `pick_strategy` and the cost model.
    """

    name: str
    local_ddr_bytes_per_s: int
    intercard_bytes_per_s: int
    host_link_bytes_per_s: int | None
    host_link_latency_s: float


REV_A = Profile(
    name="rev-a",
    local_ddr_bytes_per_s=LOCAL_DDR_BW_BYTES_PER_SEC,
    intercard_bytes_per_s=INTERCARD_BW_BYTES_PER_SEC,
    host_link_bytes_per_s=HOST_LINK_BW_BYTES_PER_SEC,
    host_link_latency_s=HOST_LINK_LATENCY_S,
)
"""The first board, InnerJib7EA rev-A, on Gigabit Ethernet."""

NATIVE = Profile(
    name="native",
    local_ddr_bytes_per_s=15_000_000_000,
    intercard_bytes_per_s=3_000_000_000,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
)
"""Soft cards as fast as the machine goes: nothing is throttled.

For planning it assumes 15 GB/s from memory to one core, and 3 GB/s through a link ring, where a
message is copied in, checksummed and copied out.  Both are assumptions about an ordinary desktop
or server; plans change with them, results never do.
"""

PROFILES: tuple[Profile, ...] = (NATIVE, REV_A)


def profile(name: str) -> Profile:
    """The profile called `name`; raises ConfigError, listing the names, when there is none."""
    for candidate in PROFILES:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in PROFILES)
    raise ConfigError(f"no profile {name!r}: expected one of {known}")
