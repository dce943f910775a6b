# SPDX-License-Identifier: Apache-2.0
"""The contract of a card: one synchronous interface that every body of a card implements.

Nothing here awaits.  Work is submitted and completes later: `completion_fd` polls readable while
`completions()` has something, and once in a while when it has nothing; a body without an fd (None)
has finished whatever was submitted before `submit` returned.  The suite that each body must pass is
tests/device/test_conformance*.py.
"""

from __future__ import annotations

import abc
import struct
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from spanker.errors import CardCommandError
from spanker.native import lib
from spanker.values import Value, lazy_frozen

Buffer = bytes | bytearray | memoryview
Read = tuple[int, int, int]
# Writes all of the contiguous array that it is given, once, in any thread, and does not keep it.
Fill = Callable[[npt.NDArray[np.uint8]], None]
READS_MAX = 8
# A window's handle and memory for it.
Lent = tuple[int, Buffer]
# A buffer's handle, where in a file its bytes are, and how many they are.
Place = tuple[int, int, int]
MAP_ALIGN = int(lib.SPK_LENT_ALIGN)
# Of what goes over the host in one piece.
RELAY_BYTES = int(lib.SPK_RELAY_BYTES)

_Rig = TypeVar("_Rig", bound="CardRig")

# How a card tells of one executed command: the fields of TraceEvent in their order.
TRACE_EVENT = struct.Struct("<QQQIHH")


@lazy_frozen
class TraceEvent(Value):
    """One executed command: when (CLOCK_MONOTONIC), of which submission, and what it was.

    An exchange ends when its last message has come; its transfers follow it and take no time.
    """

    begin_ns: int
    end_ns: int
    fence: int
    command: int
    op: int
    format: int


def unpack_events(data: Buffer) -> tuple[TraceEvent, ...]:
    """What `CardDevice.trace_events` has packed."""
    return tuple(TraceEvent(*fields) for fields in TRACE_EVENT.iter_unpack(data))


@attrs.frozen(eq=False, repr=False)
class DeviceInfo(Value):
    """What a card says of itself.  `name` is for people, `serial` is stable across boots;
    `windows_max` windows onto the host's memory fit into a program, 0 where there are none;
    `meets` is 1 where cards reach each other's memory, as ALL_REDUCE does; `maps` is 1 where a
    file can stand for a buffer's memory; `relays` is 1 where transfers of a program may go over the
    host; DDR is taken in multiples of `ddr_granule` bytes."""

    name: str
    serial: int
    isa: str
    semantics_version: int
    ddr_bytes: int
    programs_max: int
    windows_max: int = 0
    meets: int = 0
    maps: int = 0
    relays: int = 0
    ddr_granule: int = 64


class Completion(NamedTuple):
    """A finished submission.  `error` is None, or why it failed; `data` is what its reads brought
    back, one item each, nothing after a failure."""

    fence: int
    busy_ns: int
    error: Exception | None
    data: tuple[bytes, ...] = ()


@attrs.frozen(eq=False, repr=False)
class Part(Value):
    """What one card does when several run together: a program, and the sizes in bytes of its
    windows by their handles."""

    device: CardDevice
    program: int
    windows: tuple[tuple[int, int], ...]


class Together(Protocol):
    """One run on each of several cards, for one call after the other: `CardDevice.together`."""

    def run(self, memory: Sequence[Any]) -> bool:
        """As `submit` on every card, from the first on until one refuses or has something queued or
        yet to be taken; then, for milliseconds at most, do or await what is done sooner than
        anybody is woken.

        `memory` has a contiguous writable buffer for each window, part by part.  Whether all cards
        have succeeded, when nothing is left to be taken; else `outcomes` tells, before anything
        else is asked of these cards.
        """

    def outcomes(self) -> list[Completion | int]:
        """Of the last `run`, for each card that it was submitted to, in order: what has come of it,
        which `completions` does not tell again, or its fence while the card is at it."""


@attrs.frozen(eq=False, repr=False)
class DeviceCounters(Value):
    """Totals since the card was opened, and where it stands now.

    `progress` grows whenever anything gets done; `waiting_for` is the peer whose link the current
    command waits on, or None; `link_tx_bytes` and `link_rx_bytes` are by card number; `links_down`
    are the peers whose link with this card is not up, whichever end it is that keeps it down.
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
    links_down: tuple[int, ...] = ()


class CardRig(abc.ABC):
    """What owns the cards of one fleet: as a context it closes them in the end.

    `held`: whether it stays when its last card is closed, until it is closed itself.
    """

    held = False

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the cards, and of whatever makes them work.  Idempotent."""

    def __enter__(self: _Rig) -> _Rig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class CardDevice(abc.ABC):
    """One card, owned by one task or thread.

    Every method may raise CardLostError once the card is gone.  After `close` nothing but `close`
    and `reopen` may be called.

    `modelled`: what the card takes for its work is modelled, so nothing that concerns it may wait
    for a thread, whose time is real.  `hollow`: it keeps no bytes; what is written to it need not
    even be made.  `waits`: its calls wait for another process to answer, so who has other things to
    do makes them in a thread, one after the other; all but `completions`, `completion_fd`,
    `outstanding`, `relayed`, `relay`, `cut_short`, and `reopen` once it is closed.
    """

    number: int
    modelled: bool = False
    hollow: bool = False
    waits: bool = False

    @property
    @abc.abstractmethod
    def info(self) -> DeviceInfo:
        """What the card is."""

    @property
    @abc.abstractmethod
    def completion_fd(self) -> int | None:
        """A descriptor that polls readable while completions wait, or None."""

    @property
    @abc.abstractmethod
    def outstanding(self) -> int:
        """Submissions whose completion has not been taken yet, be they finished or not."""

    @abc.abstractmethod
    def alloc(self, nbytes: int) -> int:
        """A new zeroed buffer's handle; CardMemoryError says how much is needed and free."""

    def window(self, nbytes: int) -> int:
        """The handle of a new window: a buffer without memory, lent some by each `submit` of a
        program that names it.  CardCommandError by a body that has none."""
        raise CardCommandError(f"card {self.number} has no windows", card=self.number)

    @abc.abstractmethod
    def free(self, handle: int) -> None:
        """Give a buffer back; CardCommandError while a program refers to it."""

    @abc.abstractmethod
    def write(self, handle: int, offset: int, data: Buffer) -> None:
        """Copy bytes into a buffer; CardCommandError outside of its bounds.

        Other threads may call this and `fill` beside everything but `free`, `close` and `reopen`.
        """

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        """Let `make` write bytes into a buffer; outside of its bounds CardCommandError, and `make`
        is not called.

        A body whose memory the host can reach lets it write there, and not into a copy.  When
        `make` raises, so does this, and what the bytes are then is open.
        """
        # Writes of nothing at both ends are refused where what lies between them would be.
        self.write(handle, offset, b"")
        self.write(handle, offset + nbytes, b"")
        data = np.empty(nbytes, np.uint8)
        make(data)
        self.write(handle, offset, data.data)

    def map_file(self, file: int, places: Sequence[Place]) -> None:
        """Let bytes of a file be what buffers hold, each a whole one, without copying them.

        They begin at multiples of MAP_ALIGN.  `file` is a descriptor, which may be closed
        afterwards; the file must neither change nor shrink as long as the buffers are there, and
        what is written to them does not reach it.  Only while nothing is queued and no program
        refers to them.  CardCommandError for what does not fit, when those before it are mapped,
        and by a body that cannot.
        """
        raise CardCommandError(f"card {self.number} maps no files", card=self.number)

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
    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        """Queue one run behind those before it; returns its fence.

        `parameters` are the bytes of `encode_step`, checked before anything runs.  `reads`, at most
        READS_MAX of (buffer, offset, nbytes), are copied when the run completes, before the next
        one starts, and come with its completion.  `lent` is memory for the program's windows, one
        item each, contiguous, writable and of the window's size; the card holds it until the
        completion has been taken, and nobody else may touch it meanwhile.
        CardCommandError when anything does not fit, or when the queue is full.
        """

    def together(self, parts: Sequence[Part], parameters: bytes) -> Together | None:
        """Runs of these parts, this card's first; None where its body must be told card by card."""
        return None

    @abc.abstractmethod
    def completions(self) -> Sequence[Completion]:
        """All submissions that finished since the last call, in order.  Never blocks."""

    def relayed(self) -> Sequence[tuple[int, bytes]]:
        """What programs have sent over the host since the last call: peers, and what to give to
        their `relay`, of at most RELAY_BYTES, in order.  `completion_fd` polls readable when there
        is more.  Never blocks."""
        return ()

    def relay(self, peer: int, data: Buffer) -> bool:
        """Take what a peer has sent over the host.  False where there is no room for it: again,
        before anything later of that peer, once `completion_fd` has polled readable.
        CardCommandError where no program takes any from that peer, and by a body that cannot."""
        raise CardCommandError(f"card {self.number} takes nothing over the host", card=self.number)

    @abc.abstractmethod
    def abort(self, epoch: int) -> None:
        """Complete everything queued with CardAbortedError, as soon as the slice of work under way
        is over (milliseconds; more for steps of thousands of tokens), and enter `epoch`,
        which must be higher than before; messages of earlier epochs are dropped by the links."""

    @abc.abstractmethod
    def counters(self) -> DeviceCounters:
        """Counters and state.  Never blocks for long."""

    def trace(self, events: int) -> None:
        """Record executed commands from now on, at most so many that nobody has taken; 0 stops.

        What was recorded before is forgotten.  CardCommandError while a step is queued, and by a
        body that cannot trace.
        """
        raise CardCommandError(f"card {self.number} cannot trace its commands", card=self.number)

    def trace_events(self, most: int) -> tuple[bytes, int]:
        """Take up to `most` events, oldest first, packed as TRACE_EVENT; the other number says how
        many were lost so far because nobody took them in time.  Never blocks; while steps run, too.
        """
        raise CardCommandError(f"card {self.number} cannot trace its commands", card=self.number)

    def load_image(self, image: Buffer) -> None:
        """Give the card a firmware image (docs/api/program-container.md), checked already, which it
        keeps until it is reset.  CardCommandError by a body that takes none."""
        raise CardCommandError(f"card {self.number} takes no firmware image", card=self.number)

    def cut_short(self) -> None:  # noqa: B027, most bodies have nothing to do
        """For who waits no longer for calls in other threads: those of a body that `waits` end at
        once, by CardLostError, and the card is lost.  Does not block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything.  Idempotent."""

    def reopen(self) -> None:
        """Make the card what it was when it was opened, be it closed, failed or at work: without
        buffers, programs, submissions and trace, its counters zero.

        What was under way to it or from it is lost.  Its peers may be at work; it works with them
        again once all of them have entered an epoch, by `abort`, that none has been in.
        CardLostError once its fleet's last card has been closed, CardCommandError by a body that
        cannot.
        """
        raise CardCommandError(f"card {self.number} cannot be reopened", card=self.number)
