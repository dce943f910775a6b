# SPDX-License-Identifier: Apache-2.0
"""Making many objects that stay, without looking for garbage among them.

Python's cyclic collector begins with every 700 objects made, and goes through all there are again
and again while thousands of modules' functions, commands or tensors come to be, none of which is
garbage: a tenth of what a start takes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No cyclic collection within the block, or, as a decorator, the function: for what is done at
    once, makes many objects, and drops few."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
