# SPDX-License-Identifier: Apache-2.0
"""Executed commands of one modelled card, as `CardDevice.trace_events` hands them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spanker.device.base import TRACE_EVENT
from spanker.device.virtual.units import PS_PER_NS

if TYPE_CHECKING:
    from spanker.device.virtual.engine import Work

I64 = npt.NDArray[np.int64]

_EVENT = np.dtype(
    [
        ("begin_ns", "<u8"),
        ("end_ns", "<u8"),
        ("fence", "<u8"),
        ("command", "<u4"),
        ("op", "<u2"),
        ("format", "<u2"),
    ]
)
assert _EVENT.itemsize == TRACE_EVENT.size


class Recorder:
    """Keeps up to `capacity` events that nobody has taken; what comes then is counted as lost."""

    def __init__(self, capacity: int) -> None:
        self.lost = 0
        self._capacity = capacity
        self._data = bytearray()

    def run(self, work: Work, commands: I64, begin_ps: I64, end_ps: I64) -> None:
        """Commands of a step, by their numbers in its program, each with its time."""
        events = np.empty(len(commands), _EVENT)
        events["begin_ns"] = begin_ps // PS_PER_NS
        events["end_ns"] = end_ps // PS_PER_NS
        events["fence"] = work.fence
        events["command"] = commands
        events["op"] = work.program.ops[commands]
        events["format"] = work.program.formats[commands]
        self._keep(events.tobytes())

    def exchange(self, work: Work, command: int, behind: int, begin_ps: int, end_ps: int) -> None:
        """An exchange and the transfers behind it, which end with it."""
        begin = np.full(1 + behind, end_ps)
        begin[0] = begin_ps
        commands = np.arange(command, command + 1 + behind)
        self.run(work, commands, begin, np.full(1 + behind, end_ps))

    def _keep(self, data: bytes) -> None:
        room = (self._capacity - len(self._data) // TRACE_EVENT.size) * TRACE_EVENT.size
        self._data += data[:room]
        self.lost += max(len(data) - room, 0) // TRACE_EVENT.size

    def take(self, most: int) -> bytes:
        """Up to so many events, oldest first."""
        nbytes = most * TRACE_EVENT.size
        data = bytes(self._data[:nbytes])
        del self._data[:nbytes]
        return data
