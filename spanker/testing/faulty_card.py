# SPDX-License-Identifier: Apache-2.0
"""A card around another card that can be made to fail, whatever its body.

What the body can do to itself (`kill`, `hang`, `slow` and so on, of soft and virtual cards) it
does; of what it cannot, this card does what the contract of a card lets the host see.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from spanker.device.base import (
    Buffer,
    CardDevice,
    Completion,
    DeviceCounters,
    DeviceInfo,
    Fill,
    Lent,
    Place,
    Read,
)
from spanker.errors import (
    CardAbortedError,
    CardError,
    CardLinkError,
    CardLostError,
    CardMemoryError,
    again,
)


@attrs.define
class _Step:
    """A submission that the host has not got back."""

    fence: int
    submitted_s: float
    completion: Completion | None = None
    due_s: float = 0.0
    # The body knows nothing of it.
    kept: bool = False
    # Nothing holds it back any more.
    over: bool = False


class FaultyCard(CardDevice):
    """Forwards everything, also what only some bodies have.

    `clock` tells the time; `later(time_s, call)` calls back at a time; `submitting(n)` is called
    before the n-th submission, from 1.
    """

    def __init__(
        self,
        device: CardDevice,
        clock: Callable[[], float],
        later: Callable[[float, Callable[[], None]], None],
        submitting: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.number = device.number
        self.modelled = device.modelled
        self.hollow = device.hollow
        self.waits = device.waits
        self._device = device
        self._clock = clock
        self._later = later
        self._submitting = submitting
        self._submissions = 0
        self._fence = 0
        self._steps: deque[_Step] = deque()
        # Completions of the body that the host has got in another way.
        self._disowned = 0
        self._lost: CardLostError | None = None
        self._hung = False
        self._factor = 1.0
        self._last_s = 0.0
        self._looks = 0
        self._starved = 0
        self._alterations: deque[Callable[[Completion], Completion]] = deque()
        # Whoever may reopen it only finds out that it cannot.
        self.away = False
        self._open_fds()

    def _open_fds(self) -> None:
        """One descriptor that is readable when the body has something, or this card itself."""
        self._own_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._both = select.epoll()
        self._both.register(self._own_fd, select.EPOLLIN)
        self._body_fd: int | None = None

    def __getattr__(self, name: str) -> Any:
        # Only what is defined nowhere here; private names are ours alone.
        if name.startswith("_"):
            raise AttributeError(f"FaultyCard has no attribute {name!r}")
        found = getattr(self._device, name, None)
        if found is None and name in _EMULATED:
            return getattr(self, f"_{name}")
        return getattr(self._device, name)

    # --- failing ------------------------------------------------------------------------

    def has(self, knob: str) -> bool:
        """Whether it can fail in this way: by its body, or as here."""
        return knob in _EMULATED or self.native(knob)

    def native(self, knob: str) -> bool:
        """Whether its body can fail in this way."""
        return hasattr(self._device, knob)

    def fail_at(self, knob: str, command: int | None = None) -> None:
        """Turn one of kill, hang, reset, fail_memory; where the body can, at a command of the step
        that is submitted next, otherwise at once."""
        if command is not None and self.native(knob):
            getattr(self._device, knob)(command=command)
        else:
            getattr(self, knob)()

    def complete_wrongly(self) -> None:
        """The next completion tells of another submission."""
        self._alterations.append(lambda done: done._replace(fence=done.fence + 1))

    def fail_links(self, count: int, peer: int) -> None:
        """The next completions say that messages of a peer have failed their checks."""
        for _ in range(count):
            self._alterations.append(
                _failing(
                    CardLinkError(
                        f"card {self.number}, command 0: a message from card {peer} failed its "
                        f"checks after all retries",
                        card=self.number,
                    )
                )
            )

    def _kill(self) -> None:
        self._lose(f"card {self.number} is gone; close the fleet and open it without that card")

    def _reset(self) -> None:
        self._lose(f"card {self.number} was reset by somebody, and has lost what it held")

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = CardLostError(why, card=self.number)
            self._end_all(self._lost)

    def _hang(self) -> None:
        self._hung = True

    def _slow(self, factor: float) -> None:
        self._factor = factor

    def _starve(self, allocations: int = 1) -> None:
        self._starved += allocations

    def _fail_memory(self) -> None:
        self._lose(f"card {self.number} has found a memory error that it cannot correct")

    def _end_all(self, error: CardError) -> None:
        """Give the host everything back, as failed."""
        for step in self._steps:
            self._disowned += step.completion is None and not step.kept
            step.completion, step.over = Completion(step.fence, 0, again(error)), True
        self._wake()

    def _wake(self) -> None:
        if not self._both.closed:
            os.eventfd_write(self._own_fd, 1)

    def _live(self) -> CardDevice:
        if self._lost is not None:
            raise again(self._lost)
        return self._device

    # --- steps --------------------------------------------------------------------------

    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        self._submissions += 1
        self._submitting(self._submissions)
        device = self._live()
        if self._hung:
            # It is told nothing, so it cannot refuse anything either.
            self._fence += 1
            self._steps.append(_Step(self._fence, self._clock(), kept=True))
            return self._fence
        if lent:
            self._fence = device.submit(program, parameters, reads, lent)
        else:
            self._fence = device.submit(program, parameters, reads)
        self._steps.append(_Step(self._fence, self._clock()))
        if self._body_fd is None and device.completion_fd is None:
            self._wake()
        return self._fence

    def completions(self) -> Sequence[Completion]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._own_fd)
        if self._lost is None:
            self._take(self._device.completions())
        elif not self._steps:
            raise again(self._lost)
        out: list[Completion] = []
        now = self._clock()
        while self._steps:
            step = self._steps[0]
            if step.completion is None or (self._hung and not step.over):
                break
            if step.due_s > now and not step.over:
                self._later(step.due_s, self._wake)
                break
            self._steps.popleft()
            done = step.completion
            if self._alterations and done.error is None:
                done = self._alterations.popleft()(done)
            out.append(done)
        return out

    def _take(self, done: Sequence[Completion]) -> None:
        """What the body has completed is the oldest that is not complete."""
        now = self._clock()
        waiting = iter([step for step in self._steps if step.completion is None])
        for completion in done:
            if self._disowned:
                self._disowned -= 1
                continue
            step = next(waiting)
            step.completion = completion
            begun_s = max(step.submitted_s, self._last_s)
            step.due_s = begun_s + self._factor * max(now - begun_s, 0.0)
            if self._factor == 1:
                step.due_s = now
            self._last_s = step.due_s

    def relayed(self) -> Sequence[tuple[int, bytes]]:
        return () if self._hung else self._live().relayed()

    def relay(self, peer: int, data: Buffer) -> bool:
        return self._live().relay(peer, data)

    def abort(self, epoch: int) -> None:
        self._live().abort(epoch)
        for step in self._steps:
            step.over = step.over or step.completion is not None
        if self._hung:
            self._end_all(
                CardAbortedError(
                    f"card {self.number}, command 0: the step was aborted", card=self.number
                )
            )
        self._wake()

    # --- memory and the rest --------------------------------------------------------------

    @property
    def info(self) -> DeviceInfo:
        return self._live().info

    @property
    def completion_fd(self) -> int | None:
        with contextlib.suppress(CardLostError):
            fd = self._device.completion_fd
            if fd != self._body_fd and fd is not None:
                self._both.register(fd, select.EPOLLIN)
                self._body_fd = fd
        return self._both.fileno()

    @property
    def outstanding(self) -> int:
        return len(self._steps)

    def alloc(self, nbytes: int) -> int:
        device = self._live()
        if self._starved:
            self._starved -= 1
            raise CardMemoryError(
                f"card {self.number}: no room for {nbytes:,} bytes in one piece; free buffers or "
                f"open the card with more DDR",
                card=self.number,
            )
        return device.alloc(nbytes)

    def window(self, nbytes: int) -> int:
        return self._live().window(nbytes)

    def free(self, handle: int) -> None:
        self._live().free(handle)

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        self._live().write(handle, offset, data)

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        self._live().fill(handle, offset, nbytes, make)

    def map_file(self, file: int, places: Sequence[Place]) -> None:
        self._live().map_file(file, places)

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        return self._live().read(handle, offset, nbytes)

    def load_program(self, program: Buffer) -> int:
        return self._live().load_program(program)

    def unload_program(self, program: int) -> None:
        self._live().unload_program(program)

    def counters(self) -> DeviceCounters:
        counters = self._live().counters()
        if self._hung:
            return attrs.evolve(counters, queued=len(self._steps), waiting_for=None)
        if any(step.completion is not None for step in self._steps):
            # What is slow makes progress all the same.
            self._looks += 1
        if not self._looks:
            return counters
        queued = max(counters.queued, len(self._steps))
        return attrs.evolve(counters, queued=queued, progress=counters.progress + self._looks)

    def trace(self, events: int) -> None:
        self._live().trace(events)

    def trace_events(self, most: int) -> tuple[bytes, int]:
        return self._live().trace_events(most)

    def load_image(self, image: Buffer) -> None:
        self._live().load_image(image)

    def cut_short(self) -> None:
        self._device.cut_short()

    def close(self) -> None:
        self._device.close()
        if not self._both.closed:
            self._both.close()
            os.close(self._own_fd)

    def reopen(self) -> None:
        if self.away:
            raise CardLostError(f"card {self.number} is away", card=self.number)
        body: Any = self._device
        body.reopen()
        self._lost, self._hung, self._factor, self._starved = None, False, 1.0, 0
        self._steps.clear()
        self._alterations.clear()
        self._disowned = 0
        if self._both.closed:
            self._open_fds()
        elif self._body_fd is not None:
            # It may be another one of the same number.
            with contextlib.suppress(OSError):
                self._both.unregister(self._body_fd)
            self._body_fd = None
            _ = self.completion_fd


# Ways to fail that need no help of the body.
_EMULATED = frozenset({"kill", "hang", "reset", "slow", "starve", "fail_memory"})


def _failing(error: CardError) -> Callable[[Completion], Completion]:
    return lambda done: done._replace(error=error, data=())
