# SPDX-License-Identifier: Apache-2.0
"""Spanker: N accelerator cards run one language model as one machine.

The public API is what is named here (and, for asyncio, in `spanker.aio`, for tests in
`spanker.testing`); everything else may change.

Names are imported when they are first used: the pytest plugin and `spanker --help` must not wait
for trio, numpy and the native library.
"""

import importlib
from typing import TYPE_CHECKING

from spanker._version import __version__
from spanker.errors import SpankerError

if TYPE_CHECKING:
    from spanker import aio, testing
    from spanker.actors.message import CardInfo
    from spanker.actors.session import SessionStats
    from spanker.device.soft import SoftCardSpec
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
else:
    _HOMES = {
        "CardInfo": "spanker.actors.message",
        "SessionStats": "spanker.actors.session",
        "SoftCardSpec": "spanker.device.soft",
        "SamplingParams": "spanker.ggml.sampling",
        "Plan": "spanker.sched.plan",
        "Topology": "spanker.sched.topology",
    }

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("aio", "testing"):
            return importlib.import_module(f"spanker.{name}")
        value = getattr(importlib.import_module(_HOMES.get(name, "spanker.fleet")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    "aio",
    "open_fleet",
    "testing",
]
