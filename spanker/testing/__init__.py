# SPDX-License-Identifier: Apache-2.0
"""For tests of your own code against a fleet: small models, and cards that fail on demand.

The pytest plugin (`spanker.testing.plugin`) gives the fixtures; here are the functions:

    kill(fleet, 1)             card 1 of an open fleet vanishes
    hang(fleet, 1)             card 1 goes on answering, but does no work
    write_tiny_llama(path)     a model of some 60 KB; more in spanker.testing.models
    run_virtual(main)          trio.run in virtual time, for fleets such as virtual:3

Importing this module loads nothing else, so that the plugin costs a test run nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spanker.testing.faults import hang, kill

if TYPE_CHECKING:
    from spanker.actors.virtual_time import run_virtual
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

    def __getattr__(name: str) -> object:
        if name == "run_virtual":
            return importlib.import_module("spanker.actors.virtual_time").run_virtual
        if name in __all__:
            return getattr(importlib.import_module("spanker.testing.models"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GGUFTensor",
    "TinyModel",
    "hang",
    "kill",
    "run_virtual",
    "tensor",
    "tiny_llama",
    "tiny_spm_vocabulary",
    "tiny_vocabulary",
    "write_gguf",
    "write_tiny_llama",
]
