# SPDX-License-Identifier: Apache-2.0
"""The machines of scenarios: two whose exchanges take no time, which are quick to simulate, and
those of real boards; and how their cards are linked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from spanker.sched.bandwidth import NATIVE, REV_A, CardSpeed, Profile
from spanker.sched.topology import Topology

# A step takes a millisecond, and all of it happens at its end.
INSTANT = Profile(
    name="instant",
    local_ddr_bytes_per_s=1e15,
    intercard_bytes_per_s=1e14,
    host_link_bytes_per_s=None,
    host_link_latency_s=0.0,
    step_s=1e-3,
)
# Messages take a tenth of that, and share a link: cards learn of things at different times.
DISTANT = attrs.evolve(
    INSTANT, name="distant", host_link_bytes_per_s=1e8, host_link_latency_s=100e-6
)
STRAGGLER = attrs.evolve(REV_A, name="straggler", cards=(CardSpeed(0, 0.25, 0.25),))

# Which cards have a link; those that have none exchange over the host.
TOPOLOGIES: Mapping[str, Callable[[int], Topology]] = {
    "mesh": Topology.with_mock,
    "line": Topology.line,
    "ring": Topology.ring,
    "none": lambda cards: Topology.of_pairs(cards, []),
}

PROFILES: Mapping[str, Profile] = {
    profile.name: profile for profile in (INSTANT, DISTANT, STRAGGLER, NATIVE, REV_A)
}
