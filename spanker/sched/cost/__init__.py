# SPDX-License-Identifier: Apache-2.0
"""What a plan costs by docs/api/timing-model.md, in closed form: one expression per step of it.

`Pieces` prices what one card does between two exchanges, `Machine` an exchange.  What a plan takes
is the sum of those pieces and of nothing else, so who makes the pieces smaller makes the plan
faster.  No I/O, no clock, no events: `spanker.simulation` has those, and shares no expression with
this package.  Seconds and bytes throughout.
"""

from __future__ import annotations

from spanker.sched.cost.decoding import FleetCost, StepCost, decode, decode_fleet
from spanker.sched.cost.loading import LoadCost, load, memory
from spanker.sched.cost.machine import Machine
from spanker.sched.cost.phases import Bound
from spanker.sched.cost.pieces import Pieces, gathers_q8, layer_kinds
from spanker.sched.cost.prefilling import PrefillCost, prefill
from spanker.sched.cost.rows import StepRows

__all__ = [
    "Bound",
    "FleetCost",
    "LoadCost",
    "Machine",
    "Pieces",
    "PrefillCost",
    "StepCost",
    "StepRows",
    "decode",
    "decode_fleet",
    "gathers_q8",
    "layer_kinds",
    "load",
    "memory",
    "prefill",
]
