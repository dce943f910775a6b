# SPDX-License-Identifier: Apache-2.0
"""Ends a run that does not end: one that waits too long by its own clock, one in which tasks run
for ever while time stands still, and one that computes for ever by the clock on the wall."""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterator
from types import FrameType

import trio

# The scheduler comes round some hundred times for a step; nothing comes near this at one time.
STANDSTILL_TURNS_MAX = 20_000
TURNS_MAX = 2_000_000
WALL_S_MAX = 30.0


class StuckError(BaseException):
    """The wall clock says that a run does not end.  Not an Exception: nobody handles it."""


class Turns(trio.abc.Instrument):
    """Counts how often trio's scheduler comes round, and cancels `scope` where it does so without
    time passing, or far too often."""

    def __init__(self) -> None:
        self.scope: trio.CancelScope | None = None
        self.turns = 0
        self.stuck = False
        self._now = -1.0
        self._standing = 0

    def before_io_wait(self, timeout: float) -> None:
        self.turns += 1
        self._standing += 1
        if self._standing & 0xFF == 0:
            now = trio.current_time()
            if now != self._now:
                self._now, self._standing = now, 0
            elif self._standing > STANDSTILL_TURNS_MAX:
                self._stop()
        if self.turns > TURNS_MAX:
            self._stop()

    def _stop(self) -> None:
        self.stuck = True
        self._standing = 0
        if self.scope is not None:
            self.scope.cancel()


@contextlib.contextmanager
def wall_clock(limit_s: float = WALL_S_MAX) -> Iterator[None]:
    """StuckError, wherever this thread is, once the block takes longer.  Does nothing outside of
    the main thread, where no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        where = traceback.format_stack(frame, limit=3)
        raise StuckError(f"still computing after {limit_s:g} s:\n{''.join(where)}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
