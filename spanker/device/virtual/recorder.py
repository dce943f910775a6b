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

    def run(
        self, work: Work, first: int, begin_ps: npt.NDArray[np.int64], end_ps: npt.NDArray[np.int64]
    ) -> None:
        """Commands from number `first` on, each with its time."""
        events = np.empty(len(begin_ps), _EVENT)
        commands = np.arange(first, first + len(events))
        events["begin_ns"] = begin_ps // PS_PER_NS
        events["end_ns"] = end_ps // PS_PER_NS
        events["fence"] = work.fence
        events["command"] = commands
        events["op"] = work.program.ops[commands]
        events["format"] = work.program.formats[commands]
        self._keep(events.tobytes())

    def exchange(self, work: Work, exchange: int, stop: int, begin_ps: int, end_ps: int) -> None:
        """An exchange and its transfers, up to command `stop`, which end with it."""
        begin = np.full(stop - exchange, end_ps, np.int64)
        begin[0] = begin_ps
        self.run(work, exchange, begin, np.full(stop - exchange, end_ps, np.int64))

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
