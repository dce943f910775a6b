# SPDX-License-Identifier: Apache-2.0
"""Collective operations as plans: pure functions from cards and links to who sends what to whom.

`plan` says what a plan is; `catalog` makes them by name, by algorithms of one file each; `cost`
says how long one takes and `plan_json` stores it.  spanker.sched.verify proves one,
spanker.sched.search finds better ones, spanker.sched.draw shows them.
"""

from spanker.sched.collectives.catalog import algorithms, make
from spanker.sched.collectives.cost import seconds
from spanker.sched.collectives.plan import (
    Buffer,
    CollectivePlan,
    Copy,
    Divide,
    Fold,
    Kind,
    Local,
    Phase,
    ReduceOp,
    Region,
    Send,
)
from spanker.sched.collectives.plan_json import from_json, to_json

__all__ = [
    "Kind",
    "ReduceOp",
    "CollectivePlan",
    "Phase",
    "Send",
    "Local",
    "Fold",
    "Copy",
    "Divide",
    "Buffer",
    "Region",
    "algorithms",
    "make",
    "seconds",
    "to_json",
    "from_json",
]
