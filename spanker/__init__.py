# SPDX-License-Identifier: Apache-2.0
"""Spanker: N accelerator cards run one language model as one machine.

The public API is what is named here (and, for asyncio, in `spanker.aio`, for tests in
`spanker.testing`); everything else may change.  Each name is imported when it is first used, so
that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spanker import collecting
from spanker._version import __version__
from spanker.errors import SpankerError

if TYPE_CHECKING:
    from spanker import aio, testing
    from spanker.actors.message import CardInfo
    from spanker.actors.session import SessionStats
    from spanker.card_arrays import CardArrays
    from spanker.collectives import (
        all_gather,
        all_reduce,
        all_to_all,
        barrier,
        broadcast,
        reduce_scatter,
    )
    from spanker.device.q4_k import matmul_q4_k
    from spanker.device.soft import SoftCardSpec
    from spanker.events import CardLost, Event, LinkRetried, Replanned, ReplicaLost
    from spanker.fleet import (
        CardStats,
        Fleet,
        FleetStats,
        Generation,
        Health,
        Model,
        ModelHealth,
        Token,
        open_fleet,
    )
    from spanker.ggml.sampling import SamplingParams
    from spanker.sched.plan import FleetPlan, Plan
    from spanker.sched.topology import Topology
    from spanker.simulation import Scenario, Simulation, simulate

_MODULES = {
    "CardArrays": "card_arrays",
    "CardInfo": "actors.message",
    "CardLost": "events",
    "CardStats": "fleet",
    "Event": "events",
    "Fleet": "fleet",
    "FleetPlan": "sched.plan",
    "FleetStats": "fleet",
    "Generation": "fleet",
    "Health": "fleet",
    "LinkRetried": "events",
    "Model": "fleet",
    "ModelHealth": "fleet",
    "Plan": "sched.plan",
    "Replanned": "events",
    "ReplicaLost": "events",
    "SamplingParams": "ggml.sampling",
    "Scenario": "simulation",
    "SessionStats": "actors.session",
    "Simulation": "simulation",
    "SoftCardSpec": "device.soft",
    "Token": "fleet",
    "Topology": "sched.topology",
    "all_gather": "collectives",
    "all_reduce": "collectives",
    "all_to_all": "collectives",
    "barrier": "collectives",
    "broadcast": "collectives",
    "matmul_q4_k": "device.q4_k",
    "open_fleet": "fleet",
    "reduce_scatter": "collectives",
    "simulate": "simulation",
}

__all__ = [
    "CardArrays",
    "CardInfo",
    "CardLost",
    "CardStats",
    "Event",
    "Fleet",
    "FleetPlan",
    "FleetStats",
    "Generation",
    "Health",
    "LinkRetried",
    "Model",
    "ModelHealth",
    "Plan",
    "Replanned",
    "ReplicaLost",
    "SamplingParams",
    "Scenario",
    "SessionStats",
    "Simulation",
    "SoftCardSpec",
    "SpankerError",
    "Token",
    "Topology",
    "__version__",
    "aio",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "matmul_q4_k",
    "open_fleet",
    "reduce_scatter",
    "simulate",
    "testing",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in ("aio", "testing"):
            return importlib.import_module(f"spanker.{name}")
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module 'spanker' has no attribute {name!r}")
        with collecting.paused():
            value = getattr(importlib.import_module(f"spanker.{module}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
