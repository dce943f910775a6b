# SPDX-License-Identifier: Apache-2.0
"""What plans are called: tp4xpp2, pp2(3+2), dp2xtp4.

`tpA`: a stage of A cards; `ppB`: B stages; `dpD`: D replicas.  Stages of unlike size are listed in
brackets, and so are replicas of unlike form.
"""

from __future__ import annotations

from collections.abc import Sequence

from spanker.sched.plan import Plan


def plan_name(sizes: Sequence[int]) -> str:
    """The name of a row of stages of so many cards each."""
    if len(sizes) == 1:
        return f"tp{sizes[0]}"
    if set(sizes) == {1}:
        return f"pp{len(sizes)}"
    if len(set(sizes)) == 1:
        return f"tp{sizes[0]}xpp{len(sizes)}"
    return f"pp{len(sizes)}({'+'.join(map(str, sizes))})"


def fleet_name(replicas: Sequence[Plan]) -> str:
    """The name of plans side by side."""
    names = [plan.name for plan in replicas]
    if len(names) == 1:
        return names[0]
    if len(set(names)) > 1:
        return f"dp{len(names)}({','.join(names)})"
    return f"dp{len(names)}" if names[0] == "tp1" else f"dp{len(names)}x{names[0]}"
