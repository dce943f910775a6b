# SPDX-License-Identifier: Apache-2.0
"""A card in a few lines of Python for tests of actors: buffers, and steps that do what a test says.

Unlike tests/device's bodies it computes nothing, and traces what a test puts into `traced`.  Steps
complete when `finish` is called, or at once where `automatic`; the descriptor is a pipe.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

import attrs

from spanker.device.base import (
    TRACE_EVENT,
    Buffer,
    CardDevice,
    Completion,
    DeviceCounters,
    DeviceInfo,
    Read,
    TraceEvent,
)
from spanker.errors import CardAbortedError, CardCommandError, CardMemoryError


class FakeDevice(CardDevice):
    """`info` can be replaced; `calls` lists what was asked, in order."""

    def __init__(self, number: int = 0, *, automatic: bool = False, with_fd: bool = True) -> None:
        self.number = number
        self._info = DeviceInfo(f"fake{number}", number, "none", 1, 1 << 20, 4)
        self.automatic = automatic
        self.buffers: dict[int, bytearray] = {}
        self.queued: deque[int] = deque()
        self.reads: dict[int, tuple[Read, ...]] = {}
        self.done: list[Completion] = []
        self.calls: list[str] = []
        self.closed = 0
        self.tracing = 0
        self.traced: deque[TraceEvent] = deque()
        self.lost = 0
        self._handles = self._fences = 0
        self._pipe = os.pipe() if with_fd else None

    @property
    def info(self) -> DeviceInfo:
        return self._info

    def pretend(self, **changes: object) -> None:
        self._info = attrs.evolve(self._info, **changes)

    @property
    def completion_fd(self) -> int | None:
        return self._pipe[0] if self._pipe else None

    @property
    def outstanding(self) -> int:
        return len(self.queued) + len(self.done)

    def alloc(self, nbytes: int) -> int:
        self.calls.append("alloc")
        if sum(map(len, self.buffers.values())) + nbytes > self._info.ddr_bytes:
            raise CardMemoryError(f"card {self.number}: full", card=self.number)
        self._handles += 1
        self.buffers[self._handles] = bytearray(nbytes)
        return self._handles

    def _buffer(self, handle: int) -> bytearray:
        if handle not in self.buffers:
            raise CardCommandError(f"card {self.number}: no buffer {handle}", card=self.number)
        return self.buffers[handle]

    def free(self, handle: int) -> None:
        self.calls.append("free")
        self._buffer(handle)
        del self.buffers[handle]

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        self.calls.append("write")
        self._buffer(handle)[offset : offset + len(data)] = data

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        self.calls.append("read")
        return bytes(self._buffer(handle)[offset : offset + nbytes])

    def load_program(self, program: Buffer) -> int:
        self.calls.append("load_program")
        return len(program)

    def unload_program(self, program: int) -> None:
        self.calls.append("unload_program")

    def submit(self, program: int, parameters: Buffer, reads: Sequence[Read] = ()) -> int:
        self.calls.append("submit")
        if program == 666:
            raise CardCommandError(f"card {self.number}: no program {program}", card=self.number)
        self._fences += 1
        self.queued.append(self._fences)
        self.reads[self._fences] = tuple(reads)
        if self.automatic:
            self.finish()
        return self._fences

    def finish(self, error: Exception | None = None) -> None:
        """Complete the oldest submission."""
        fence = self.queued.popleft()
        reads = self.reads.pop(fence)
        data: tuple[bytes, ...] = ()
        if error is None:
            data = tuple(bytes(self._buffer(h)[o : o + n]) for h, o, n in reads)
        self.done.append(Completion(fence, 1000, error, data))
        if self._pipe:
            os.write(self._pipe[1], b"x")

    def completions(self) -> Sequence[Completion]:
        done, self.done = self.done, []
        if self._pipe and done:
            os.read(self._pipe[0], len(done))
        return done

    def abort(self, epoch: int) -> None:
        self.calls.append(f"abort {epoch}")
        while self.queued:
            self.finish(CardAbortedError("the step was aborted", card=self.number))

    def counters(self) -> DeviceCounters:
        used = sum(map(len, self.buffers.values()))
        return DeviceCounters(
            commands=1,
            steps=2,
            ddr_read_bytes=3,
            ddr_written_bytes=4,
            busy_ns=5,
            progress=6,
            ddr_used_bytes=used,
            ddr_total_bytes=self._info.ddr_bytes,
            queued=len(self.queued),
            waiting_for=None,
            link_tx_bytes=(7, 8),
            link_rx_bytes=(9, 10),
        )

    def trace(self, events: int) -> None:
        self.calls.append(f"trace {events}")
        if self.queued:
            raise CardCommandError(f"card {self.number}: busy", card=self.number)
        self.tracing = events
        self.traced.clear()

    def trace_events(self, most: int) -> tuple[bytes, int]:
        self.calls.append("trace_events")
        taken = [self.traced.popleft() for _ in range(min(most, len(self.traced)))]
        return b"".join(TRACE_EVENT.pack(*attrs.astuple(e)) for e in taken), self.lost

    def close(self) -> None:
        self.closed += 1
        if self._pipe:
            for fd in self._pipe:
                os.close(fd)
            self._pipe = None
