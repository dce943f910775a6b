# SPDX-License-Identifier: Apache-2.0
"""Spanker: N accelerator cards run one language model as one machine.

The public API is what is named here (and, for asyncio, in `spanker.aio`, for tests in
`spanker.testing`); everything else may change.
"""

from spanker._version import __version__
from spanker.actors.message import CardInfo
from spanker.actors.session import SessionStats
from spanker.device.soft import SoftCardSpec
from spanker.errors import SpankerError
from spanker.fleet import (
    CardStats,
    Fleet,
    FleetStats,
    Generation,
    Model,
    Token,
    open_fleet,
)
from spanker.ggml.sampling import SamplingParams
from spanker.sched.plan import Plan
from spanker.sched.topology import Topology

__all__ = [
    "CardInfo",
    "CardStats",
    "Fleet",
    "FleetStats",
    "Generation",
    "Model",
    "Plan",
    "SamplingParams",
    "SessionStats",
    "SoftCardSpec",
    "SpankerError",
    "Token",
    "Topology",
    "__version__",
    "open_fleet",
]
