# SPDX-License-Identifier: Apache-2.0
"""The scheduler: bandwidths, topology and the decisions made from them.

Everything here is a value or a pure function.  It imports neither trio nor any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spanker.sched.bandwidth import (
    HOST_LINK_BW_BYTES_PER_SEC,
    INTERCARD_BW_BYTES_PER_SEC,
    LOCAL_DDR_BW_BYTES_PER_SEC,
    NATIVE,
    PROFILES,
    REV_A,
    REV_B,
    CardSpeed,
    LinkSpeed,
    Profile,
    profile,
)
from spanker.sched.shares import Share, split
from spanker.sched.topology import Link, LinkState, Topology

if TYPE_CHECKING:
    from spanker.sched.collectives.host import all_gather_f32, all_reduce_f32
    from spanker.sched.decision import Strategy, TileShape, pick_strategy

__all__ = [
    "HOST_LINK_BW_BYTES_PER_SEC",
    "INTERCARD_BW_BYTES_PER_SEC",
    "LOCAL_DDR_BW_BYTES_PER_SEC",
    "Profile",
    "PROFILES",
    "REV_A",
    "REV_B",
    "CardSpeed",
    "LinkSpeed",
    "NATIVE",
    "profile",
    "Link",
    "LinkState",
    "Topology",
    "TileShape",
    "Strategy",
    "pick_strategy",
    "Share",
    "split",
    "all_gather_f32",
    "all_reduce_f32",
]


def __getattr__(name: str) -> Any:
    # Nothing else here needs numpy, the collectives or decisions, which take a while to import.
    if name in ("all_gather_f32", "all_reduce_f32"):
        from spanker.sched.collectives import host

        return getattr(host, name)
    if name in ("Strategy", "TileShape", "pick_strategy"):
        from spanker.sched import decision

        return getattr(decision, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
