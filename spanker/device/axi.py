# SPDX-License-Identifier: Apache-2.0
"""What a card's AXI4 data boundary carries: bursts, and a recorder around any card.

The boundary of the InnerJib7EA: 256 bits of data (a beat of 32 bytes), 48-bit addresses, byte
strobes, full-width beats only (AxSIZE = 5).  Buffers are moved by INCR bursts; the card takes FIXED
ones too, which no buffer needs.  The rules of a burst are those of the AMBA AXI4 specification (ARM
IHI 0022, A3.4): at most 256 beats, none crosses a 4 KiB boundary, an unaligned start or end is a
matter of strobes.

Here lives what can be said of that traffic without running it: no time, no bandwidth.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
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
)
from spanker.device.base import Read as ReadRange
from spanker.errors import CardCommandError, CardMemoryError
from spanker.kernels.formats import Format
from spanker.kernels.program import COMMAND, PROGRAM_HEADER, STEP_HEADER, Op
from spanker.native import lib

BEAT_BYTES = 32
BURST_BEATS_MAX = 256
BOUNDARY_BYTES = 4096
ADDRESS_BITS = 48
STROBES = (1 << BEAT_BYTES) - 1
# Where the recorder puts buffers: as the cards align their own.
ALIGN_BYTES: int = lib.SPK_DDR_ALIGN


# --- bursts -----------------------------------------------------------------------------


@attrs.frozen
class Burst:
    """One INCR burst: `beats` of 32 bytes from `address`, which need not be aligned.

    Bit i of a strobe says that byte lane i of the first or last beat carries data (a single beat
    has the same strobe twice); all beats between carry 32 bytes.  A read has no strobes on the
    bus: there they say which bytes are kept.
    """

    address: int
    beats: int
    first_strobe: int
    last_strobe: int


def bursts(address: int, nbytes: int) -> tuple[Burst, ...]:
    """The fewest bursts that carry exactly these bytes, in ascending order; none for 0 bytes.

    With beats of 32 bytes a 4 KiB page is 128 beats, so that the boundary always ends a burst
    before the 256 beats of AXI4 do.  CardCommandError outside of the 48-bit address space.
    """
    end = address + nbytes
    if address < 0 or nbytes < 0 or end > 1 << ADDRESS_BITS:
        raise CardCommandError(
            f"no bursts of {nbytes:,} bytes at {address:#x}: a card has addresses of "
            f"{ADDRESS_BITS} bits"
        )
    out: list[Burst] = []
    while address < end:
        beat = address // BEAT_BYTES
        stop = min(
            end,
            (address // BOUNDARY_BYTES + 1) * BOUNDARY_BYTES,
            (beat + BURST_BEATS_MAX) * BEAT_BYTES,
        )
        beats = (stop - 1) // BEAT_BYTES - beat + 1
        first = STROBES << address % BEAT_BYTES & STROBES
        last = STROBES >> (-stop % BEAT_BYTES)
        if beats == 1:
            first = last = first & last
        out.append(Burst(address, beats, first, last))
        address = stop
    return tuple(out)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _beats_text(of: Sequence[Burst]) -> str:
    """`4×128 + 64 beats`: neighbours of one length are counted."""
    runs = [(beats, len(list(run))) for beats, run in itertools.groupby(b.beats for b in of)]
    texts = [f"{count}×{beats}" if count > 1 else f"{beats}" for beats, count in runs]
    return f"{' + '.join(texts)} {'beat' if texts == ['1'] else 'beats'}"


# --- entries of a record ----------------------------------------------------------------


@attrs.frozen
class _Transfer:
    kind: str = attrs.field(init=False)
    name: str
    address: int
    nbytes: int
    bursts: tuple[Burst, ...] = attrs.field(init=False)

    @kind.default
    def _kind(self) -> str:
        return type(self).__name__.lower()

    @bursts.default
    def _bursts(self) -> tuple[Burst, ...]:
        return bursts(self.address, self.nbytes)

    def __str__(self) -> str:
        text = (
            f"{self.kind} {self.name}  {self.address:#014x}  {_count(self.nbytes, 'byte')}  "
            f"{_count(len(self.bursts), 'burst')} ({_beats_text(self.bursts)})"
        )
        strobes = self.bursts[0].first_strobe, self.bursts[-1].last_strobe
        if strobes != (STROBES, STROBES):
            text += f"  strobes {strobes[0]:08x} to {strobes[1]:08x}"
        return text


@attrs.frozen
class Write(_Transfer):
    """The host wrote `nbytes` (1 or more) of buffer `name`, from `address` on."""


@attrs.frozen
class Read(_Transfer):
    """The host read `nbytes` (1 or more) of buffer `name`, from `address` on."""


@attrs.frozen
class Compute:
    """The host submitted a step of a program.

    A program with one matrix product is named after it (`matmul_q4_k`), and `m` x `k` are its
    weights; any other is a `program`, without the two.  `n` is the rows of the step that the
    product runs over, or the step's tokens.  `commands` are the program's, in order.
    """

    kind: str = attrs.field(init=False)
    name: str
    commands: tuple[str, ...]
    m: int | None
    k: int | None
    n: int

    @kind.default
    def _kind(self) -> str:
        return type(self).__name__.lower()

    def __str__(self) -> str:
        sizes = [
            f"{s}={v}" for s, v in (("m", self.m), ("k", self.k), ("n", self.n)) if v is not None
        ]
        counts = Counter(self.commands)
        ops = ", ".join(f"{count}×{op}" if count > 1 else op for op, count in counts.items())
        return f"{self.kind} {self.name}  {' '.join(sizes)}  ({ops or 'no commands'})"


Entry = Write | Read | Compute


# --- what a program says ----------------------------------------------------------------


@attrs.frozen
class _Loaded:
    """What a submission of a program is listed as, but for the size of its step."""

    name: str
    commands: tuple[str, ...]
    m: int | None
    k: int | None
    over_outputs: bool

    @classmethod
    def decode(cls, program: Buffer) -> _Loaded:
        """Of a program that a card has accepted."""
        commands = list(COMMAND.iter_unpack(memoryview(program).cast("B")[PROGRAM_HEADER.size :]))
        ops = tuple(Op(c[0]).name.lower() for c in commands)
        products = [c for c in commands if c[0] == Op.MATMUL]
        if len(products) != 1:
            return cls("program", ops, None, None, False)
        # Op, format, flags, four times buffer, stride and offset, then the arguments.
        _, fmt, flags, *rest = products[0]
        m, k = rest[12:14]
        name = f"matmul_{Format(fmt).name.lower()}"
        return cls(name, ops, m, k, bool(flags & lib.SPK_FLAG_OUTPUTS))

    def step(self, parameters: Buffer) -> Compute:
        _, _, tokens, outputs, *_ = STEP_HEADER.unpack_from(parameters)
        n = outputs if self.over_outputs else tokens
        return Compute(self.name, self.commands, self.m, self.k, n)


# --- the recorder -----------------------------------------------------------------------


@attrs.frozen
class _Region:
    name: str
    address: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.address + -(-self.nbytes // ALIGN_BYTES) * ALIGN_BYTES


class AxiRecorder(CardDevice):
    """A card around another card that lists what crosses its data boundary, in order.

    Everything is forwarded, what only some bodies have (`kill`, say) too, so that it stands
    wherever its card does.  What the card refuses is not listed, nor are reads and writes of 0
    bytes, which need no bus.  Programs and the parameters of their steps travel over the control
    path, the card's queue, not over the data boundary: a submission is one `Compute`.  What a step
    brings back is read when it completes, and is listed when its completion is collected.  Links
    between cards and a card's own accesses to its DDR do not cross the boundary.

    Handles say nothing about addresses, so the recorder keeps a map of its own, the same for the
    same calls: first fit from address 0, each buffer aligned to 64 bytes.  `alloc` raises
    CardMemoryError where the map would leave the 48-bit address space.  So that no buffer is
    unknown, a card that holds some already is refused with CardCommandError.

    Entries are values; `attrs.asdict` makes them plain for JSON.  Until `clear` they take a few
    per cent of the bytes that they tell of.
    """

    def __init__(self, device: CardDevice) -> None:
        used = device.counters().ddr_used_bytes
        if used:
            raise CardCommandError(
                f"card {device.number}: {used:,} bytes are allocated that a recorder would know "
                f"nothing of; put it around the card before the first alloc",
                card=device.number,
            )
        self.number = device.number
        self.waits = device.waits
        self._device = device
        self._entries: list[Entry] = []
        self._regions: dict[int, _Region] = {}
        self._programs: dict[int, _Loaded] = {}
        # What each queued step will bring back, oldest first.
        self._reads: deque[tuple[Read, ...]] = deque()

    def __getattr__(self, name: str) -> Any:
        # Only what is defined nowhere here; private names are ours alone.
        if name.startswith("_"):
            raise AttributeError(f"AxiRecorder has no attribute {name!r}")
        return getattr(self._device, name)

    # --- the record -------------------------------------------------------------------

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What was recorded so far, in order."""
        return tuple(self._entries)

    def lines(self) -> list[str]:
        """The entries as text, one line each."""
        return [str(entry) for entry in self._entries]

    def clear(self) -> None:
        """Forget the entries; buffers keep their addresses and names."""
        self._entries.clear()

    def label(self, handle: int, name: str) -> None:
        """Call a buffer `name` in later entries; CardCommandError for a buffer that is none."""
        if handle not in self._regions:
            raise CardCommandError(
                f"card {self.number}: no buffer {handle} to name {name!r}", card=self.number
            )
        self._regions[handle] = attrs.evolve(self._regions[handle], name=name)

    def address(self, handle: int) -> int:
        """Where the map has a buffer; CardCommandError for a buffer that is none."""
        if handle not in self._regions:
            raise CardCommandError(
                f"card {self.number}: no buffer {handle} has an address", card=self.number
            )
        return self._regions[handle].address

    # --- memory -----------------------------------------------------------------------

    def alloc(self, nbytes: int) -> int:
        handle = self._device.alloc(nbytes)
        need, address = -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES, 0
        for begin, end in sorted((r.address, r.end) for r in self._regions.values()):
            if begin - address >= need:
                break
            address = end
        if address + need > 1 << ADDRESS_BITS:
            self._device.free(handle)
            raise CardMemoryError(
                f"card {self.number}: no room for {nbytes:,} bytes in an address space of "
                f"{ADDRESS_BITS} bits; free buffers",
                card=self.number,
            )
        self._regions[handle] = _Region(f"buffer {handle}", address, nbytes)
        return handle

    def free(self, handle: int) -> None:
        self._device.free(handle)
        del self._regions[handle]

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        self._device.write(handle, offset, data)
        self._written(handle, offset, memoryview(data).nbytes)

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        self._device.fill(handle, offset, nbytes, make)
        self._written(handle, offset, nbytes)

    def _written(self, handle: int, offset: int, nbytes: int) -> None:
        if nbytes:
            region = self._regions[handle]
            self._entries.append(Write(region.name, region.address + offset, nbytes))

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        data = self._device.read(handle, offset, nbytes)
        self._entries += self._read_entries([(handle, offset, nbytes)])
        return data

    def _read_entries(self, ranges: Sequence[ReadRange]) -> tuple[Read, ...]:
        """Of ranges that the card has accepted."""
        regions = self._regions
        return tuple(
            Read(regions[handle].name, regions[handle].address + offset, nbytes)
            for handle, offset, nbytes in ranges
            if nbytes
        )

    # --- programs ---------------------------------------------------------------------

    def load_program(self, program: Buffer) -> int:
        handle = self._device.load_program(program)
        self._programs[handle] = _Loaded.decode(program)
        return handle

    def unload_program(self, program: int) -> None:
        self._device.unload_program(program)
        del self._programs[program]

    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[ReadRange] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        fence = self._device.submit(program, parameters, reads, lent)
        self._entries.append(self._programs[program].step(parameters))
        self._reads.append(self._read_entries(reads))
        return fence

    def completions(self) -> Sequence[Completion]:
        done = self._device.completions()
        for completion in done:
            reads = self._reads.popleft()
            if completion.error is None:
                self._entries += reads
        return done

    # --- the rest is only forwarded ---------------------------------------------------

    @property
    def info(self) -> DeviceInfo:
        # Without windows and files: memory that is lent would cross the boundary unseen.
        return attrs.evolve(self._device.info, windows_max=0, meets=0, maps=0)

    @property
    def completion_fd(self) -> int | None:
        return self._device.completion_fd

    @property
    def outstanding(self) -> int:
        return self._device.outstanding

    def relayed(self) -> Sequence[tuple[int, bytes]]:
        return self._device.relayed()

    def relay(self, peer: int, data: Buffer) -> bool:
        return self._device.relay(peer, data)

    def abort(self, epoch: int) -> None:
        self._device.abort(epoch)

    def counters(self) -> DeviceCounters:
        return self._device.counters()

    def trace(self, events: int) -> None:
        self._device.trace(events)

    def trace_events(self, most: int) -> tuple[bytes, int]:
        return self._device.trace_events(most)

    def cut_short(self) -> None:
        self._device.cut_short()

    def close(self) -> None:
        self._device.close()
