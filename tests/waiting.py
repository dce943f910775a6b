# SPDX-License-Identifier: Apache-2.0
"""Waiting for what sets no event: counters, flags of fakes."""

from __future__ import annotations

from collections.abc import Callable

import trio


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Look again and again, at every turn of the scheduler and then every millisecond."""
    with trio.fail_after(timeout_s):
        for _ in range(100):
            if condition():
                return
            await trio.lowlevel.checkpoint()
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)
