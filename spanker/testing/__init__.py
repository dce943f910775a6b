# SPDX-License-Identifier: Apache-2.0
"""For tests of your own code against a fleet: small models, and cards that fail on demand.

The pytest plugin (`spanker.testing.plugin`) gives the fixtures; here are the functions:

    kill(fleet, 1)             card 1 of an open fleet vanishes
    hang(fleet, 1)             card 1 goes on answering, but does no work
    faulty_fleet(cards, faults)   a fleet that a fault plan, such as "kill 1@token:20", happens to
    FaultPlan                  such a plan as a value: written, drawn from a seed, saved
    nothing_leaked(fleet)      a block that must leave nothing behind
    assert_same_answer(...)    the same bits with a fault plan and without
    write_tiny_llama(path)     a model of some 60 KB; more in spanker.testing.models
    run_virtual(main)          trio.run in virtual time, for fleets such as virtual:3

docs/testing.md shows all of it at work.

Importing this module loads nothing else, so that the plugin costs a test run nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spanker.testing.faults import hang, kill

if TYPE_CHECKING:
    from spanker.actors.virtual_time import run_virtual
    from spanker.testing.assertions import (
        assert_nothing_leaked,
        assert_same_answer,
        held,
        nothing_leaked,
    )
    from spanker.testing.fault_plan import (
        AtByte,
        AtCommand,
        AtStep,
        AtTime,
        AtToken,
        Card,
        Cards,
        Channel,
        Client,
        Fault,
        FaultPlan,
        HostLink,
        Link,
        What,
    )
    from spanker.testing.injection import Injection, faulty_fleet
    from spanker.testing.models import (
        GGUFTensor,
        TinyModel,
        tensor,
        tiny_llama,
        tiny_spm_vocabulary,
        tiny_vocabulary,
        write_gguf,
        write_tiny_llama,
    )
else:
    _HOMES = {
        "spanker.actors.virtual_time": ("run_virtual",),
        "spanker.testing.assertions": (
            "assert_nothing_leaked",
            "assert_same_answer",
            "held",
            "nothing_leaked",
        ),
        "spanker.testing.fault_plan": (
            "AtByte",
            "AtCommand",
            "AtStep",
            "AtTime",
            "AtToken",
            "Card",
            "Cards",
            "Channel",
            "Client",
            "Fault",
            "FaultPlan",
            "HostLink",
            "Link",
            "What",
        ),
        "spanker.testing.injection": ("Injection", "faulty_fleet"),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME.get(name, "spanker.testing.models")), name)


__all__ = [
    "FaultPlan",
    "Fault",
    "What",
    "Card",
    "Cards",
    "Channel",
    "Client",
    "HostLink",
    "Link",
    "AtByte",
    "AtCommand",
    "AtStep",
    "AtTime",
    "AtToken",
    "Injection",
    "faulty_fleet",
    "hang",
    "kill",
    "assert_nothing_leaked",
    "assert_same_answer",
    "held",
    "nothing_leaked",
    "run_virtual",
    "GGUFTensor",
    "TinyModel",
    "tensor",
    "tiny_llama",
    "tiny_spm_vocabulary",
    "tiny_vocabulary",
    "write_gguf",
    "write_tiny_llama",
]
