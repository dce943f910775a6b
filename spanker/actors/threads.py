# SPDX-License-Identifier: Apache-2.0
"""Threads for work of a few milliseconds that releases the interpreter's lock.

trio's own threads stay for a while after their work; the leak checks of whoever tests with a fleet
would see them.  These end with their owner.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import trio

T = TypeVar("T")


class WorkThreads:
    """At most `count` threads, each started when there is work that no other one is free for."""

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._running = 0
        self._closed = False

    async def run(self, work: Callable[[], T], cut_short: Callable[[], None] = lambda: None) -> T:
        """Run `work` in a thread, behind what was given to all of them before; returns what it
        returns, raises what it raises.  A checkpoint; RuntimeError after `close`.

        Cancellation waits for it: it may be using memory that the caller would free.  `cut_short`
        is called then, in this thread, and may have it end sooner.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: token.run_sync_soon(trio.lowlevel.reschedule, task))
        self._running += 1

        def cancelled(_: object) -> trio.lowlevel.Abort:
            cut_short()
            return trio.lowlevel.Abort.FAILED

        try:
            await trio.lowlevel.wait_task_rescheduled(cancelled)
            await trio.lowlevel.checkpoint_if_cancelled()
            return future.result()
        finally:
            # The traceback of its error refers to this frame: a cycle.
            del future
            self._running -= 1
            if self._closed and not self._running:
                self._pool.shutdown()

    def close(self) -> None:
        """Take no more work.  The threads have ended when this returns, or, where some work is
        still being done, when the `run` of the last of it does.  Idempotent, does not block."""
        self._closed = True
        self._pool.shutdown(wait=not self._running)
