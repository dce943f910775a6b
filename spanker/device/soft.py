# SPDX-License-Identifier: Apache-2.0
"""The `soft` card: the card model in C, in this process, stepped by native threads.

`SoftRig` makes the cards of one fleet with links between all of them, and min(cards, cores)
workers.  Python only submits and collects.  RISC-V cards among them, or alone, are processes of
their own (spanker/device/riscv).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np

from spanker.device.base import (
    RELAY_BYTES,
    TRACE_EVENT,
    Buffer,
    CardRig,
    Completion,
    DeviceCounters,
    DeviceInfo,
    Fill,
    Lent,
    Part,
    Place,
    Read,
    Together,
)
from spanker.device.core import CoreCard, Rig, counters_of, is_down
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.throttle import Pace, Throttle, pace_of
from spanker.errors import (
    CardCommandError,
    CardLostError,
    ConfigError,
    SpankerError,
)
from spanker.native import check, default_isa, ffi, isa_number, lib
from spanker.sched.bandwidth import Profile
from spanker.sched.topology import Topology
from spanker.values import Value

if TYPE_CHECKING:
    # Most fleets need neither: a first token should not wait for them.
    from spanker.device.remote import RemoteCard
    from spanker.device.riscv.processes import Launcher, ProcessCards

_Card = TypeVar("_Card", bound=CoreCard)

# What the slowest request to a process takes on a busy machine is a thousandth of this.
ANSWER_S = 10.0
# Sockets take no longer times than some weeks.
ANSWER_MAX_S = 1e6
DEFAULT_DDR_BYTES = 16 << 30
# What one process can address on every machine that this runs on.
DDR_BYTES_MAX = 1 << 46
CARDS_MAX = 64
# A ring longer than a core's second-level cache is twice as fast as one that fits (see
# docs/api/wire-protocol.md).  Traffic touches all of it, so that many links get shorter ones: 64
# cards have 4,032 of them.
LINK_RING_BYTES_MIN = 132 << 10
LINK_RING_BYTES_MAX = 512 << 10
LINK_RINGS_BYTES = 256 << 20
FAST_RING_BYTES = 2 << 20
FAST_RINGS_BYTES = 64 << 20
_WHY_BYTES = 256
_EVENTS_AT_ONCE = 4096
_BYTES = ffi.typeof("char[]")
assert ffi.sizeof("struct spk_trace_event") == TRACE_EVENT.size


@attrs.frozen(eq=False, repr=False)
class SoftCardSpec(Value):
    """How to make one soft card.  `isa` None means $SPANKER_ISA or the fastest there is."""

    isa: str | None = None
    ddr_bytes: int = DEFAULT_DDR_BYTES


class SoftCard(CoreCard):
    """One card of a rig, which owns its memory and steps it."""

    kind = "soft"

    def __init__(self, rig: Rig, number: int, spec: SoftCardSpec) -> None:
        isa = spec.isa or default_isa()
        align = int(lib.SPK_DDR_ALIGN)
        if not align <= spec.ddr_bytes <= DDR_BYTES_MAX:
            raise ConfigError(
                f"card {number}: DDR must have at least {align} bytes and at most "
                f"{DDR_BYTES_MAX:,}, got {spec.ddr_bytes:,}"
            )
        ddr_bytes = spec.ddr_bytes // align * align
        status = ffi.new("int *")
        self.number = number
        self._rig = rig
        self._closed = False
        self._starved = 0
        self._slowness = 1.0
        self._card: Any = lib.spk_card_create(ddr_bytes, isa_number(isa), status)
        check(status[0], f"opening card {number}", card=number)
        self._info = DeviceInfo(
            name=f"{self.kind}{number}",
            serial=number,
            isa=isa,
            semantics_version=lib.SPK_SEMANTICS_VERSION,
            ddr_bytes=ddr_bytes,
            programs_max=lib.SPK_PROGRAMS_MAX,
            windows_max=lib.SPK_WINDOWS_MAX,
            meets=int(rig.meets),
            maps=1,
            relays=1,
        )
        self._completion = ffi.new("struct spk_completion *")
        self._fence = ffi.new("uint64_t *")
        # Sizes of what each queued step will bring back, and the memory it was lent, oldest first.
        self._queued: deque[tuple[tuple[int, ...], list[Any] | None]] = deque()
        self._why = ffi.new("char[]", _WHY_BYTES)
        self._peer = ffi.new("uint32_t *")
        self._lent = ffi.new("struct spk_lent[]", lib.SPK_WINDOWS_MAX)
        # The mapping behind each buffer that a file stands for.
        self._mapped: dict[int, Any] = {}
        self._lent_entries = tuple([self._lent[i] for i in range(lib.SPK_WINDOWS_MAX)])

    @property
    def native(self) -> Any:
        """The native card, which is there until the rig is closed."""
        return self._card

    @property
    def handle(self) -> Any:
        """The native card; CardLostError after close."""
        if self._card is None or self._closed:
            raise CardLostError(f"card {self.number} is closed", card=self.number)
        return self._card

    @property
    def closed(self) -> bool:
        """Whether the card was closed, by itself or with its rig."""
        return self._card is None or self._closed

    @property
    def completion_fd(self) -> int | None:
        return int(lib.spk_card_fd(self.handle))

    @property
    def outstanding(self) -> int:
        return len(self._queued)

    def alloc(self, nbytes: int) -> int:
        self._u64(nbytes, "size")
        out = ffi.new("uint32_t *")
        status = lib.spk_card_alloc(self.handle, nbytes, out)
        if status == lib.SPK_E_NOMEM:
            c = self.counters()
            raise self._no_room(nbytes, c.ddr_total_bytes - c.ddr_used_bytes)
        self._check(status, f"allocating {nbytes} bytes")
        handle = int(out[0])
        if self._starved:
            self._starved -= 1
            self.free(handle)
            raise self._no_room(nbytes, 0)
        return handle

    def window(self, nbytes: int) -> int:
        self._u64(nbytes, "size")
        out = ffi.new("uint32_t *")
        self._check(lib.spk_card_window(self.handle, nbytes, out), f"a window of {nbytes} bytes")
        return int(out[0])

    def free(self, handle: int) -> None:
        self._u32(handle, "buffer")
        self._check(lib.spk_card_free(self.handle, handle), f"freeing buffer {handle}")
        self._mapped.pop(handle, None)

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        self._u32(handle, "buffer")
        self._u64(offset, "offset")
        view = ffi.from_buffer("char[]", data)
        status = lib.spk_card_write(self.handle, handle, offset, view, len(view))
        self._check(status, f"writing {len(view)} bytes at {offset} of buffer {handle}")

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        self._u32(handle, "buffer")
        self._u64(offset, "offset")
        self._u64(nbytes, "size")
        at = ffi.new("void **")
        status = lib.spk_card_place(self.handle, handle, offset, nbytes, at)
        self._check(status, f"filling {nbytes} bytes at {offset} of buffer {handle}")
        make(np.frombuffer(ffi.buffer(at[0], nbytes), np.uint8))

    def map_file(self, file: int, places: Sequence[Place]) -> None:
        try:
            view = _mapping(file)
        except (OSError, ValueError) as error:
            raise CardCommandError(
                f"card {self.number}: mapping file descriptor {file}: {error}", card=self.number
            ) from None
        for handle, offset, nbytes in places:
            self._u32(handle, "buffer")
            what = f"mapping {nbytes:,} bytes at {offset:,} of a file for buffer {handle}"
            if not 0 <= offset <= len(view) or not 0 <= nbytes <= len(view) - offset:
                raise CardCommandError(
                    f"card {self.number}: {what}: the file has {len(view):,}", card=self.number
                )
            status = lib.spk_card_lend(self.handle, handle, view + offset, nbytes)
            self._check(status, what)
            self._mapped[handle] = view

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        # The bounds are checked before host memory is taken.
        self.check_range(handle, offset, nbytes, "reading")
        out = bytearray(nbytes)
        status = lib.spk_card_read(
            self.handle, handle, offset, ffi.from_buffer("char[]", out), nbytes
        )
        self._check(status, f"reading {nbytes} bytes at {offset} of buffer {handle}")
        return bytes(out)

    def check_range(self, handle: int, offset: int, nbytes: int, doing: str) -> None:
        """CardCommandError unless these bytes are within a buffer; `doing` says what for."""
        self._u32(handle, "buffer")
        self._u64(offset, "offset")
        self._u64(nbytes, "size")
        self._check(
            lib.spk_card_can_read(self.handle, handle, offset, nbytes),
            f"{doing} {nbytes} bytes at {offset} of buffer {handle}",
        )

    def load_program(self, program: Buffer) -> int:
        handle, bad = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        view = ffi.from_buffer("char[]", program)
        status = lib.spk_card_load_program(self.handle, view, len(view), handle, bad, self._why)
        self._check(status, f"program refused at command {bad[0]}", self._reason())
        return int(handle[0])

    def unload_program(self, program: int) -> None:
        self._u32(program, "program")
        status = lib.spk_card_unload_program(self.handle, program)
        self._check(status, f"unloading program {program}")

    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        self._u32(program, "program")
        wanted = self._wanted(reads) if reads else ffi.NULL
        shown, memory = self._shown(lent) if lent else (ffi.NULL, None)
        view = parameters if type(parameters) is bytes else ffi.from_buffer(_BYTES, parameters)
        status = lib.spk_card_submit_helping(
            self.handle,
            program,
            view,
            len(view),
            wanted,
            len(reads),
            shown,
            len(lent),
            self._fence,
            self._why,
        )
        if status != lib.SPK_OK:
            self._check(status, f"step of program {program} refused", self._reason())
        sizes = tuple([nbytes for _, _, nbytes in reads]) if reads else ()
        self._queued.append((sizes, memory))
        fence: int = self._fence[0]
        return fence

    def together(self, parts: Sequence[Part], parameters: bytes) -> Together | None:
        cards = [part.device for part in parts if isinstance(part.device, SoftCard)]
        if len(cards) < len(parts) or any(card._rig is not self._rig for card in cards):
            return None
        return _SoftTogether(cards, parts, parameters)

    def _wanted(self, reads: Sequence[Read]) -> Any:
        """Reads for the native card."""
        for handle, offset, nbytes in reads:
            self._u32(handle, "buffer")
            self._u64(offset, "offset")
            self._u64(nbytes, "size")
        return ffi.new("struct spk_read[]", [(h, 0, o, n) for h, o, n in reads])

    def _shown(self, lent: Sequence[Lent]) -> tuple[Any, list[Any]]:
        """Lent memory for the native card, and what holds it in its place until the completion is
        taken: the card works on this very memory."""
        shown, entries = self._lent, self._lent_entries
        if len(lent) > len(entries):
            shown = ffi.new("struct spk_lent[]", len(lent))
            entries = tuple([shown[i] for i in range(len(lent))])
        memory = []
        for entry, (handle, buffer) in zip(entries, lent, strict=False):
            self._u32(handle, "window")
            held = ffi.from_buffer(_BYTES, buffer, True)
            entry.window = handle
            entry.memory = held
            entry.nbytes = len(held)
            memory.append(held)
        return shown, memory

    def completions(self) -> Sequence[Completion]:
        out: list[Completion] = []
        c, handle, queued = self._completion, self.handle, self._queued
        # With the last one its descriptor is quiet, so that nobody need ask again.
        while lib.spk_card_completion(handle, c):
            sizes, _ = queued.popleft()
            if c.status != lib.SPK_OK:
                out.append(Completion(c.fence, c.busy_ns, self._failure(c.status, c.command)))
            elif sizes:
                out.append(Completion(c.fence, c.busy_ns, None, _cut(c, sizes)))
            else:
                out.append(Completion(c.fence, c.busy_ns, None))
            if not queued:
                break
        return out

    def relayed(self) -> Sequence[tuple[int, bytes]]:
        card, peer = self.handle, self._peer
        if not lib.spk_card_relays(card):
            return ()
        found, data = [], ffi.new("char[]", RELAY_BYTES)
        while nbytes := lib.spk_card_relay_take(card, peer, data):
            found.append((int(peer[0]), ffi.buffer(data, nbytes)[:]))
        return found

    def relay(self, peer: int, data: Buffer) -> bool:
        self._u32(peer, "card")
        view = ffi.from_buffer("char[]", data)
        status = lib.spk_card_relay_put(self.handle, peer, view, len(view))
        if status != lib.SPK_E_BUSY:
            self._check(status, f"taking {len(view)} bytes from card {peer} over the host")
        return bool(status == lib.SPK_OK)

    def check_step(self, program: int, parameters: Buffer) -> None:
        """CardCommandError where `submit` would refuse a step; it is not done.  For a card that
        nobody steps and that has nothing queued."""
        SoftCard.submit(self, program, parameters)
        lib.spk_card_skip(self.handle)
        SoftCard.completions(self)

    def abort(self, epoch: int) -> None:
        self._u32(epoch, "epoch")
        self._check(lib.spk_card_lost(self.handle), f"entering epoch {epoch}")
        self._check(lib.spk_card_abort(self.handle, epoch), f"entering epoch {epoch}")

    def counters(self) -> DeviceCounters:
        tx, rx = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        links: list[tuple[int, int]] = []
        for peer in range(len(self._rig.cards)):
            lib.spk_card_link_bytes(self.handle, peer, tx, rx)
            links.append((int(tx[0]), int(rx[0])))
        down = [
            peer
            for peer in range(len(links))
            if is_down(lib.spk_card_link_state(self.handle, peer))
        ]
        return self._counters(links, down)

    def _counters(
        self, links: Sequence[tuple[int, int]], links_down: Sequence[int]
    ) -> DeviceCounters:
        c = ffi.new("struct spk_counters *")
        lib.spk_card_counters(self.handle, c)
        return counters_of(c, links, links_down)

    @property
    def pace(self) -> Pace | None:
        """What the card has done by the model's clock; None where it is not throttled."""
        return pace_of(self.handle) if self._rig.throttled else None

    def trace(self, events: int) -> None:
        self._u64(events, "number of events")
        self._check(lib.spk_card_trace(self.handle, events), f"tracing {events} commands")

    def trace_events(self, most: int) -> tuple[bytes, int]:
        self._u64(most, "number of events")
        events, lost = ffi.new("struct spk_trace_event[]", _EVENTS_AT_ONCE), ffi.new("uint64_t *")
        parts: list[bytes] = []
        while True:
            wanted = min(most, _EVENTS_AT_ONCE)
            count = int(lib.spk_card_trace_read(self.handle, events, wanted, lost))
            parts.append(ffi.buffer(events, count * TRACE_EVENT.size)[:])
            most -= count
            if not most or count < wanted:
                return b"".join(parts), int(lost[0])

    # --- fault injection, beyond what every card of this core has --------------------------

    def _plant_fault(self, fault: int, command: int | None) -> None:
        if command is None:
            lib.spk_card_plant(self.handle, fault)
        else:
            lib.spk_card_plant_at(self.handle, fault, command)

    def starve(self, allocations: int = 1) -> None:
        """So many calls of `alloc`, the next ones that would succeed, find no memory."""
        self._u64(allocations, "number of allocations")
        if not self.closed:
            self._starved = allocations

    def slow(self, factor: float) -> None:
        """All that the card does takes `factor` times as long from now on, 1 at least; not what it
        waits for.  1 ends it."""
        if not 1 <= factor <= lib.SPK_SLOWEST:
            raise CardCommandError(
                f"card {self.number}: slower by a factor of {factor}: expected 1 to "
                f"{lib.SPK_SLOWEST:,}",
                card=self.number,
            )
        if not self.closed:
            self._slow(factor)

    def _slow(self, factor: float) -> None:
        self._slowness = factor
        lib.spk_card_slow(self.handle, factor)

    def keep_slow(self) -> None:
        """For the rig: a new throttle knows nothing of how slow the card is."""
        lib.spk_card_slow(self.native, self._slowness)

    def _want_link(self, peer: int, up: bool) -> None:
        lib.spk_card_link_want(self.handle, peer, up)

    def corrupt(self, peer: int, messages: int = 1) -> None:
        """The next so many messages to a peer leave with a flipped bit, which the receiver finds by
        their CRC.  Where cards reach each other's memory, an ALL_REDUCE sends none."""
        self._check_peer(peer)
        self._u32(messages, "number of messages")
        if not self.closed:
            self._corrupt(peer, messages)

    def _corrupt(self, peer: int, messages: int) -> None:
        lib.spk_card_corrupt(self.handle, peer, messages)

    # --- the end, and a new beginning ------------------------------------------------------

    def reopen(self) -> None:
        if self._card is None:
            raise CardLostError(
                f"card {self.number} is closed with all cards of its fleet, and cannot be "
                f"reopened; open the fleet again",
                card=self.number,
            )
        check(lib.spk_card_reopen(self._card), f"reopening card {self.number}", card=self.number)
        self._closed = False
        self._starved = 0
        self._slowness = 1.0
        # Only now: until then its workers may have been at work on memory that is lent.
        self._queued.clear()
        self._mapped.clear()

    def close(self) -> None:
        """The card does nothing any more; with the last card of a rig that nobody holds its threads
        end too."""
        if not self.closed:
            self._closed = True
            lib.spk_card_plant(self._card, lib.SPK_PLANT_DIE)
            if not self._rig.held and all(card.closed for card in self._rig.cards):
                self._rig.close()

    def release(self) -> None:
        """For the rig, once nobody steps the card any more: give its memory back.  Idempotent."""
        card, self._card, self._closed = self._card, None, True
        if card is not None:
            lib.spk_card_destroy(card)
        self._mapped.clear()

    def _reason(self) -> str:
        return bytes(ffi.string(self._why)).decode("ascii", "replace")


class _SoftTogether:
    """One native call for all cards.  A Together."""

    def __init__(self, cards: Sequence[SoftCard], parts: Sequence[Part], parameters: bytes) -> None:
        self._cards, self._parameters = cards, parameters
        self._sizes = [nbytes for part in parts for _, nbytes in part.windows]
        self._submitted = False
        self._parts = ffi.new("struct spk_part[]", len(parts))
        for native, card, part in zip(self._parts, cards, parts, strict=True):
            native.card, native.program = card.handle, part.program
            native.lent_count = len(part.windows)
            for entry, (window, nbytes) in zip(native.lent, part.windows, strict=False):
                entry.window, entry.nbytes = window, nbytes

    def run(self, memory: Sequence[Any]) -> bool:
        self._submitted = False
        try:
            held = [ffi.from_buffer(_BYTES, buffer, True) for buffer in memory]
        except (BufferError, TypeError, ValueError):
            return False
        # Native cards are there until all of them are released.
        if self._cards[0].closed or list(map(len, held)) != self._sizes:
            return False
        self._submitted = True
        parts, count, parameters = self._parts, len(self._cards), self._parameters
        if lib.spk_parts_run(parts, count, held, parameters, len(parameters)) == count:
            return True
        at = 0
        for part, card in zip(parts, self._cards, strict=True):
            lent = held[at : at + part.lent_count]
            at += part.lent_count
            if part.fence and not part.done:
                card._queued.append(((), lent))
        return False

    def outcomes(self) -> list[Completion | int]:
        found: list[Completion | int] = []
        for part, card in zip(self._parts, self._cards, strict=True):
            if not self._submitted or not part.fence:
                break
            if not part.done:
                found.append(int(part.fence))
                continue
            c = part.completion
            error = None if c.status == lib.SPK_OK else card._failure(c.status, c.command)
            found.append(Completion(c.fence, c.busy_ns, error))
        return found


def _cut(c: Any, sizes: tuple[int, ...]) -> tuple[bytes, ...]:
    """What a completion has brought back, read by read."""
    data: list[bytes] = []
    result, at = ffi.buffer(c.result, c.result_bytes), 0
    for nbytes in sizes:
        data.append(result[at : at + nbytes])
        at += nbytes
    return tuple(data)


# Each mapping of a file that a buffer needs, by the file: cards that share a model share its pages.
_mappings: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()


def _mapping(file: int) -> Any:
    """All of a file, as memory to be read; OSError and ValueError as mmap."""
    status = os.fstat(file)
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    view = _mappings.get(key)
    if view is None:
        mapping = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
        view = _mappings[key] = ffi.from_buffer("char[]", mapping)
    return view


def ring_bytes_of(cards: int) -> int:
    """The bytes of each ring in a fleet of so many cards."""
    rings = max(cards * (cards - 1), 1)
    nbytes = min(LINK_RINGS_BYTES // rings, LINK_RING_BYTES_MAX)
    nbytes = max(nbytes, min(FAST_RINGS_BYTES // rings, FAST_RING_BYTES), LINK_RING_BYTES_MIN)
    return nbytes // 4096 * 4096


def check_topology(topology: Topology | None, cards: int) -> None:
    """ConfigError unless emulated cards, so many, can be linked like this."""
    if topology is None:
        return
    if topology.cards != tuple(range(cards)):
        raise ConfigError(
            f"the topology must be that of cards 0 to {cards - 1}, got one of {topology.cards}"
        )
    for link in topology.links:
        back = link.remote_sail, link.local_sail
        if topology.is_up(*back[::-1]) and not topology.is_up(*back):
            raise ConfigError(
                f"links of emulated cards go both ways: the topology has {back[1]} -> {back[0]} "
                f"and not {back[0]} -> {back[1]}"
            )


def _pairs(
    cards: Sequence[_Card], topology: Topology | None = None
) -> Iterator[tuple[_Card, _Card]]:
    """Those to be linked: each with each, or as in a topology."""
    for at, a in enumerate(cards):
        for b in cards[at + 1 :]:
            if topology is None or topology.is_up(a.number, b.number):
                yield a, b


def link_all(cards: Sequence[SoftCard]) -> None:
    """Link every card with every other, before anyone steps them."""
    ring_bytes = ring_bytes_of(len(cards))
    for a, b in _pairs(cards):
        _link(a, b, ring_bytes)


def link_one(card: SoftCard, others: Sequence[SoftCard]) -> None:
    """Link a card with all others, while nobody steps them: with all, or, after an error, with
    none."""
    ring_bytes = ring_bytes_of(len(others) + 1)
    try:
        for other in others:
            _link(other, card, ring_bytes)
    except BaseException:
        for other in others:
            lib.spk_link_disconnect(other.native, other.number, card.native, card.number)
        raise


def _link(a: SoftCard, b: SoftCard, ring_bytes: int) -> None:
    check(
        lib.spk_link_connect(a.native, a.number, b.native, b.number, ring_bytes),
        f"linking cards {a.number} and {b.number}",
    )


def start_workers(cards: Sequence[SoftCard], workers: int | None) -> Any:
    """Threads that step the cards, at most one for each and no more than there are cores unless
    `workers` says otherwise: a pool, to be given to `spk_pool_destroy`."""
    status = ffi.new("int *")
    count = min(len(cards), workers or len(os.sched_getaffinity(0)))
    pool = lib.spk_pool_create([c.handle for c in cards], len(cards), count, status)
    check(status[0], f"starting {count} workers")
    return pool


class SoftRig(CardRig):
    """The cards of one fleet that this machine emulates, linked all with all or as in `topology`,
    and the threads that step those of this process.

    `throttle` is a profile whose speeds the cards keep in real time, as far as the machine can.
    `launcher` is what runs the firmware of RISC-V cards, which is looked for without one; it is
    closed with the rig.  They have `answer_s` seconds to answer a request.  Their processes start
    side by side and are waited for, unless they are to be `greeted` later, by whoever asks them
    first.  Raises ConfigError and FirmwareError where something is missing or wrong, CardLostError
    where a card does not start.
    """

    def __init__(
        self,
        specs: Sequence[SoftCardSpec | RiscvCardSpec],
        workers: int | None = None,
        throttle: Profile | None = None,
        topology: Topology | None = None,
        launcher: Launcher | None = None,
        answer_s: float = ANSWER_S,
        greeted: bool = True,
    ) -> None:
        if not 1 <= len(specs) <= CARDS_MAX:
            raise ConfigError(f"a soft fleet has 1 to {CARDS_MAX} cards, got {len(specs)}")
        check_topology(topology, len(specs))
        self._meshed = topology is None or topology.fully_meshed
        self.throttled = throttle is not None
        apart = any(isinstance(spec, RiscvCardSpec) for spec in specs)
        self.meets = self._meshed and not self.throttled and not apart
        self.cards: list[SoftCard | RemoteCard] = []
        self._profile = throttle
        self._workers_max = workers or len(os.sched_getaffinity(0))
        self._pool: Any = None
        # Cards that the pool may have: they are released once it has ended, and not before.
        self._stepped: list[SoftCard] = []
        self._throttle: Throttle | None = None
        self._launcher = launcher
        self.answer_s = min(answer_s, ANSWER_MAX_S)
        # What RISC-V cards need, while there are any.
        self._processes: ProcessCards | None = None
        try:
            for spec in specs:
                self.cards.append(self._new(spec))
            for card in self.cards:
                if greeted and not isinstance(card, SoftCard):
                    card.greet()
            ring_bytes = ring_bytes_of(len(specs))
            for a, b in _pairs(self.cards, topology):
                self._link(a, b, ring_bytes)
            soft = self._soft
            if throttle is not None:
                self._throttle = Throttle([c.handle for c in soft], throttle)
            if soft:
                self._stepped += soft
                self._pool = start_workers(soft, self._workers_max)
        except BaseException:
            self.close()
            raise

    @property
    def _soft(self) -> list[SoftCard]:
        """Those of this process."""
        return [card for card in self.cards if isinstance(card, SoftCard)]

    def _new(self, spec: SoftCardSpec | RiscvCardSpec) -> SoftCard | RemoteCard:
        """A card of the next number, to be greeted where it is a process."""
        number = len(self.cards)
        if isinstance(spec, SoftCardSpec):
            return SoftCard(self, number, spec)
        if self._processes is None:
            from spanker.device.riscv.processes import ProcessCards

            self._processes = ProcessCards(self, self._launcher)
        return self._processes.start(number, spec)

    def _link(self, a: SoftCard | RemoteCard, b: SoftCard | RemoteCard, ring_bytes: int) -> None:
        if isinstance(a, SoftCard) and isinstance(b, SoftCard):
            _link(a, b, ring_bytes)
        else:
            assert self._processes is not None
            self._processes.link(a, b, ring_bytes)

    def _unlink(self, a: SoftCard | RemoteCard, b: SoftCard | RemoteCard) -> None:
        if isinstance(a, SoftCard) and isinstance(b, SoftCard):
            lib.spk_link_disconnect(a.native, a.number, b.native, b.number)
        elif self._processes is not None:
            self._processes.unlink(a, b)

    def create(self, spec: SoftCardSpec | RiscvCardSpec) -> SoftCard | RemoteCard:
        """One more card, of the next number; nobody works with it before `join`, and without that
        it goes with `discard`.  A process has yet to be greeted.  ConfigError where there can be no
        such card, and as the rig itself."""
        if len(self.cards) == CARDS_MAX:
            raise ConfigError(f"a soft fleet has at most {CARDS_MAX} cards")
        if isinstance(spec, RiscvCardSpec):
            if self.throttled:
                raise ConfigError("RISC-V cards have their own speed: they join no throttled fleet")
            if not self._meshed:
                raise ConfigError(
                    "RISC-V cards are linked all with all: they join no fleet with a topology"
                )
        try:
            return self._new(spec)
        except BaseException:
            self._drop_processes()
            raise

    def join(self, card: SoftCard | RemoteCard) -> None:
        """Link a new card with all others and have it stepped.  Nothing is queued on any card.
        Blocks for some milliseconds.

        Of throttled cards the pace is counted anew from now on.  After an error all is as before.
        """
        pool, ring_bytes = self._pool, ring_bytes_of(len(self.cards) + 1)
        if pool is not None:
            lib.spk_pool_pause(pool)
        try:
            try:
                for other in self.cards:
                    self._link(other, card, ring_bytes)
                if isinstance(card, SoftCard):
                    self._keep_pace([*self._soft, card])
                    self._have_stepped(card)
            except BaseException:
                for other in self.cards:
                    self._unlink(other, card)
                self._keep_pace(self._soft)
                raise
            self.cards.append(card)
        finally:
            if pool is not None:
                lib.spk_pool_resume(pool)

    def _have_stepped(self, card: SoftCard) -> None:
        self._stepped.append(card)
        try:
            if self._pool is None:
                self._pool = start_workers([card], self._workers_max)
            else:
                status = lib.spk_pool_add(self._pool, card.handle, self._workers_max)
                check(status, f"starting card {card.number}")
        except SpankerError:
            self._stepped.remove(card)  # which it was refused
            raise

    def discard(self, card: SoftCard | RemoteCard) -> None:
        """Let a card go that has not joined; one that workers have is only closed, as they look at
        it until the rig is closed."""
        if card in self._stepped:
            card.close()
        else:
            card.release()
        self._drop_processes()

    def _drop_processes(self) -> None:
        """Where no card of the rig is one, nothing is kept for them."""
        if len(self._soft) == len(self.cards):
            self._close_processes()

    def _close_processes(self) -> None:
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.close()

    def _keep_pace(self, cards: Sequence[SoftCard]) -> None:
        """Have these cards keep the profile's speeds, if any do."""
        if self._throttle is None or self._profile is None:
            return
        self._throttle.close()
        self._throttle = Throttle([card.native for card in cards], self._profile)
        for card in cards:
            card.keep_slow()

    def close(self) -> None:
        """Stop the workers, then release the cards.  Idempotent; takes a few milliseconds."""
        pool, self._pool = self._pool, None
        if pool is not None:
            lib.spk_pool_destroy(pool)
        throttle, self._throttle = self._throttle, None
        if throttle is not None:
            throttle.close()
        for card in (*self.cards, *self._stepped):
            card.release()
        self._close_processes()
