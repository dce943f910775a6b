# SPDX-License-Identifier: Apache-2.0
"""The contract of a card: one synchronous interface that every body of a card implements.

Nothing here awaits.  Work is submitted and completes later: `completion_fd` polls readable when
`completions()` has something; a body without an fd (None) has finished whatever was submitted
before `submit` returned.  The suite that each body must pass is tests/device/test_conformance*.py.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import attrs

Buffer = bytes | bytearray | memoryview


@attrs.frozen
class DeviceInfo:
    """What a card says of itself.  `name` is for people, `serial` is stable across boots."""

    name: str
    serial: int
    isa: str
    semantics_version: int
    ddr_bytes: int
    programs_max: int


@attrs.frozen
class Completion:
    """A finished submission.  `error` is None, or why it failed."""

    fence: int
    busy_ns: int
    error: Exception | None


@attrs.frozen
class DeviceCounters:
    """Totals since the card was opened, and where it stands now.

    `progress` grows whenever anything gets done; `waiting_for` is the peer whose link the current
    command waits on, or None; `link_tx_bytes` and `link_rx_bytes` are by card number.
    """

    commands: int
    steps: int
    ddr_read_bytes: int
    ddr_written_bytes: int
    busy_ns: int
    progress: int
    ddr_used_bytes: int
    ddr_total_bytes: int
    queued: int
    waiting_for: int | None
    link_tx_bytes: tuple[int, ...]
    link_rx_bytes: tuple[int, ...]


class CardDevice(abc.ABC):
    """One card, owned by one task or thread.

    Every method may raise CardLostError once the card is gone.  After `close` nothing but `close`
    may be called.
    """

    number: int

    @property
    @abc.abstractmethod
    def info(self) -> DeviceInfo:
        """What the card is."""

    @property
    @abc.abstractmethod
    def completion_fd(self) -> int | None:
        """A descriptor that polls readable while completions wait, or None."""

    @abc.abstractmethod
    def alloc(self, nbytes: int) -> int:
        """A new zeroed buffer's handle; CardMemoryError says how much is needed and free."""

    @abc.abstractmethod
    def free(self, handle: int) -> None:
        """Give a buffer back; CardCommandError while a program refers to it."""

    @abc.abstractmethod
    def write(self, handle: int, offset: int, data: Buffer) -> None:
        """Copy bytes into a buffer; CardCommandError outside of its bounds."""

    @abc.abstractmethod
    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        """Copy bytes out of a buffer; CardCommandError outside of its bounds."""

    @abc.abstractmethod
    def load_program(self, program: Buffer) -> int:
        """Check the bytes of `Program.encode` against the card's buffers and keep them.

        CardCommandError names the command at fault; nothing runs then.
        """

    @abc.abstractmethod
    def unload_program(self, program: int) -> None:
        """Forget a program; CardCommandError while it is queued."""

    @abc.abstractmethod
    def submit(self, program: int, parameters: Buffer) -> int:
        """Queue one run behind those before it; returns its fence.

        `parameters` are the bytes of `encode_step`, checked before anything runs.
        CardCommandError when they do not fit, or when the queue is full.
        """

    @abc.abstractmethod
    def completions(self) -> Sequence[Completion]:
        """All submissions that finished since the last call, in order.  Never blocks."""

    @abc.abstractmethod
    def abort(self, epoch: int) -> None:
        """Complete everything queued with CardAbortedError, as soon as the slice of work under way
        is over (milliseconds; more for steps of thousands of tokens), and enter `epoch`,
        which must be higher than before; messages of earlier epochs are dropped by the links."""

    @abc.abstractmethod
    def counters(self) -> DeviceCounters:
        """Counters and state.  Never blocks for long."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything.  Idempotent."""
