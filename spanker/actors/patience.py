# SPDX-License-Identifier: Apache-2.0
"""Time limits for others that hold only while this process itself gets on.

A machine that stands still for a while, suspended or swapping, finds every deadline passed at
once, though the answers are there to be read.  So a limit is counted in pieces: each ends after
what has arrived meanwhile has been taken in, and a standstill costs one piece of it, however long.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

PIECES = 4


class Patience:
    """A limit on how long nothing may come: `came` begins it anew."""

    def __init__(self, timeout_s: float) -> None:
        self._piece_s = timeout_s / PIECES
        self._left = PIECES

    def came(self) -> None:
        """Something has come: from now on the whole time again."""
        self._left = PIECES

    async def with_(self, job: Callable[[], Awaitable[object]]) -> bool:
        """Run `job` until it ends or the time is over, when it is cancelled; whether it has ended.
        What it raises comes out of here alone, not in a group.  Cancelled in the moment in which
        the job ends, it has ended: what it was given, or has sent, is not forgotten."""
        error: list[Exception] = []
        ended = False
        # Only the job is cancelled from outside; whether it is or has ended, it knows.
        waiting = trio.CancelScope(shield=True)

        async def run() -> None:
            nonlocal ended
            try:
                await job()
                ended = True
            except Exception as caught:
                error.append(caught)
            finally:
                waiting.cancel()

        self._left = PIECES
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            with waiting:
                while self._left:
                    self._left -= 1
                    await trio.sleep(self._piece_s)
                nursery.cancel_scope.cancel()
        try:
            if error:
                raise error[0]
        finally:
            error.clear()  # its traceback refers to this frame
        return ended


async def in_time(timeout_s: float, job: Callable[[], Awaitable[object]]) -> bool:
    """Run `job` for at most so long; whether it has come to its end.  Raises what it raises."""
    return await Patience(timeout_s).with_(job)
