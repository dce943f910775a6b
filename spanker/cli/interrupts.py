# SPDX-License-Identifier: Apache-2.0
"""Running a command under trio so that a signal ends it in order, by cancellation.

trio's own KeyboardInterrupt may come up in any task and only in Python code; here a signal cancels
the command's scope instead, everything is closed as after any cancellation, and then `Interrupted`
is raised.  The handlers stand before trio starts and until it has ended, so there is no moment in
which a signal is lost or comes as an exception.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import TypeVar, cast

import trio

from spanker.cli.errors import Interrupted, raise_interrupted
from spanker.errors import SpankerError

T = TypeVar("T")
Handler = Callable[[int, "FrameType | None"], object]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# So many signals end the process on the spot: the way out should an orderly end ever hang.
FORCED_AFTER = 3


def run_async(
    job: Callable[[Interrupts], Awaitable[T]], runner: Callable[..., object] = trio.run
) -> T:
    """`trio.run` a job, or run it by another `runner` that takes an async function and what to call
    it with.  Raises `Interrupted` if a signal came, once the job has been cancelled."""
    interrupts = Interrupts()
    try:
        with _handling(interrupts.arrived):
            result = runner(interrupts.run, job)
    except SpankerError:
        # What fails while it is being cancelled is of no interest.
        if interrupts.number is None:
            raise
    if interrupts.number is not None:
        raise Interrupted(interrupts.number)
    return cast(T, result)


class Interrupts:
    """What signals do to the job that `run_async` runs."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._count = 0
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._inner: trio.CancelScope | None = None

    async def run(self, job: Callable[[Interrupts], Awaitable[T]]) -> T | None:
        """The job under the scope that signals cancel; None if one did."""
        self._token = trio.lowlevel.current_trio_token()
        if self.number is not None:
            self._scope.cancel()
        with self._scope:
            return await job(self)
        return None

    def arrived(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self._count += 1
        if self._count >= FORCED_AFTER:
            os._exit(128 + number)
        if self._token is None:
            self.number = number
        else:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.stop, number)

    def stop(self, number: int) -> None:
        """Cancel what the signal is for: a `stoppable` block, or else everything."""
        if number == signal.SIGINT and self._inner is not None:
            self._inner.cancel()
            self._count = 0
        else:
            self.number = number
            self._scope.cancel()

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[trio.CancelScope]:
        """Ctrl-C cancels no more than this block."""
        with trio.CancelScope() as self._inner:
            try:
                yield self._inner
            finally:
                self._inner = None


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """In synchronous code that may block for long, signals raise `Interrupted`."""
    with _handling(raise_interrupted):
        yield


@contextlib.contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    # Who starts us with a signal ignored (nohup) wants it ignored.
    before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
