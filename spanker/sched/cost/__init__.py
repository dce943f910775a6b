# SPDX-License-Identifier: Apache-2.0
"""What a plan costs by docs/api/timing-model.md, in closed form: one expression per step of it.

`Pieces` prices what one card does between two exchanges, `Machine` an exchange.  What a plan takes
is the sum of those pieces and of nothing else, so who makes the pieces smaller makes the plan
faster.  No I/O, no clock, no events: `spanker.simulation` has those, and shares no expression with
this package (bench/cost_vs_simulator.py lays them side by side).  Which card hands what on to whom
where links are missing both have from `sched.detours`.  Seconds and bytes throughout.

What a sum of pieces does not see, it prices too high rather than too low: the cards of a stage are
taken to wait for each other in every exchange, so that the latency of one counts even where the
slowest card has had the others' bytes long before; a card that is slow in one phase and quick in
the next gains nothing.  Where emulated cards share cores or memory, exchanges of one card beside
the computing of another are seen only on the average.  Messages of the host that take longer than
half a millisecond of its link may be held up by those of the next step: they are not here.
"""

from __future__ import annotations

from spanker.sched.cost.decoding import FleetCost, StepCost, decode, decode_fleet
from spanker.sched.cost.loading import LoadCost, load, memory
from spanker.sched.cost.machine import Machine
from spanker.sched.cost.phases import Bound
from spanker.sched.cost.pieces import Pieces, gathers_q8
from spanker.sched.cost.prefilling import PrefillCost, prefill, prefill_unlike
from spanker.sched.cost.recovery import RecoveryCost, Weights, recovery
from spanker.sched.cost.resharding import ReshardCost, resharding
from spanker.sched.cost.rows import StepRows

__all__ = [
    "Bound",
    "FleetCost",
    "LoadCost",
    "Machine",
    "Pieces",
    "PrefillCost",
    "RecoveryCost",
    "ReshardCost",
    "StepCost",
    "StepRows",
    "Weights",
    "decode",
    "decode_fleet",
    "gathers_q8",
    "load",
    "memory",
    "prefill",
    "prefill_unlike",
    "recovery",
    "resharding",
]
