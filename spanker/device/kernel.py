# SPDX-License-Identifier: Apache-2.0
"""The `kernel` card: a card behind the kernel module, /dev/spankerN.

`KernelRig` opens the first cards, or those named; each `KernelCard` is one open file.  The module
moves and guards; what is policy is here: a card belongs to one fleet at a time, a card that has
failed is reset when a fleet opens it, and every fleet begins in an epoch of its own.

What the contract wants to be told at once (a step's parameters that do not fit, say) only the card
itself finds out, later.  So each card has a *twin*: the native card of the soft body, without
threads, links or a byte of memory that is ever touched.  It gives out the numbers of buffers and
programs, and refuses in the same words what a soft card refuses.
"""

from __future__ import annotations

import errno
import functools
import mmap
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from spanker.device import uapi
from spanker.device.base import (
    READS_MAX,
    Buffer,
    CardDevice,
    Completion,
    DeviceCounters,
    DeviceInfo,
    Fill,
    Lent,
    Read,
)
from spanker.device.soft import CARDS_MAX, DDR_BYTES_MAX, SoftCard, SoftCardSpec, link_all
from spanker.errors import (
    CardCommandError,
    CardError,
    CardFaultError,
    CardLostError,
    CardMemoryError,
    ConfigError,
)
from spanker.kernels.program import COMMAND, OPERANDS, PROGRAM_HEADER, Op
from spanker.native import default_isa, ffi, lib, status_error

# The bytes of one command (spk_card.h).
PACKED_COMMAND = np.dtype(
    [
        ("op", "<u2"),
        ("format", "<u2"),
        ("flags", "<u4"),
        ("ref", [("buffer", "<u4"), ("stride", "<u4"), ("offset", "<u8")], 4),
        ("arg", "<u4", 14),
    ]
)
assert PACKED_COMMAND.itemsize == COMMAND.size
# By operation and slot; an operation that is none has no operands.
_HAS_OPERAND = np.zeros((1 << 16, 4), bool)
for _op, _slots in OPERANDS.items():
    _HAS_OPERAND[_op] = [bool(_slots >> slot & 1) for slot in range(4)]

# What a step can fail with, as SPK_E_* of the same meaning.
_STATUS_OF_ERROR = {
    errno.EDOM: lib.SPK_E_NONFINITE,
    errno.ERANGE: lib.SPK_E_F16_RANGE,
    errno.EBADMSG: lib.SPK_E_LINK,
    errno.ECANCELED: lib.SPK_E_ABORTED,
}


@attrs.frozen
class KernelCardSpec:
    """Card `number` of the kernel module."""

    number: int
    device_dir: str = uapi.DEVICE_DIR

    @property
    def path(self) -> str:
        return uapi.card_path(self.number, self.device_dir)

    @property
    def ddr_bytes(self) -> int:
        """Asks the card; DriverError where it cannot be opened."""
        with uapi.DeviceFile(self.path) as file:
            file.check_version()
            return file.info().ddr_bytes


def first_cards(
    count: int | None = None, device_dir: str = uapi.DEVICE_DIR
) -> list[KernelCardSpec]:
    """The first `count` cards, or all there are: one at least, which need not exist."""
    if count is None:
        count = max(len(uapi.card_numbers(device_dir=device_dir)), 1)
    return tuple([KernelCardSpec(number, device_dir) for number in range(count)])


@attrs.define
class _Memory:
    """A buffer; `at` is where it is mapped, None until the host touches it."""

    handle: int
    nbytes: int
    mmap_offset: int
    at: Any = None


@attrs.define
class _Loaded:
    """A program on the card.  `variants` are the same program with more handles in its table, for
    steps that bring back what no command names."""

    data: bytes
    buffers: tuple[int, ...]
    program_id: int
    variants: dict[tuple[int, ...], int] = attrs.Factory(dict)


@attrs.frozen
class _Pending:
    fence: int
    sizes: tuple[int, ...]
    nbytes: int


class _Twins:
    """The twins of a rig's cards."""

    throttled = False

    def __init__(self, ddr_bytes: Sequence[int]) -> None:
        self.cards: list[SoftCard] = []
        try:
            for number, nbytes in enumerate(ddr_bytes):
                # More than the card has, which alone decides what fits.
                spec = SoftCardSpec(default_isa(), min(2 * nbytes, DDR_BYTES_MAX))
                self.cards.append(SoftCard(self, number, spec))
            link_all(self.cards)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for card in self.cards:
            card.release()


class KernelCard(CardDevice):
    """One card of a `KernelRig`."""

    # Of what only other bodies have: speeds that are kept.
    pace = None

    def __init__(
        self, rig: KernelRig, number: int, file: uapi.DeviceFile, info: uapi.Info, twin: SoftCard
    ) -> None:
        self.number = number
        self._rig = rig
        self._file = file
        self._twin = twin
        self._serial = info.serial
        self._queue_max = info.queue_max
        self._info = DeviceInfo(
            name=f"spanker{info.number}",
            serial=info.serial,
            isa=info.isa,
            semantics_version=info.semantics,
            ddr_bytes=info.ddr_bytes,
            programs_max=info.programs,
            ddr_granule=mmap.PAGESIZE,
            read_bytes_max=uapi.READ_BYTES_MAX,
        )
        self._buffers: dict[int, _Memory] = {}
        self._mapping = threading.Lock()
        self._programs: dict[int, _Loaded] = {}
        self._pending: deque[_Pending] = deque()
        # Of the fleet; the card counts on from `_epoch_0`.
        self._epoch, self._epoch_0 = 1, 0
        # The link to each card of the fleet, by its number, None where there is none.
        self._links: tuple[int | None, ...] = ()
        self._begin: DeviceCounters | None = None

    def join(self, links: Sequence[int | None], epoch: int) -> None:
        """For the rig: the links to the fleet's cards, and the epoch that all of them begin in."""
        self._links = tuple(links)
        self._file.abort(epoch)
        self._epoch_0 = epoch - self._epoch
        self._begin = self._counters()

    @property
    def file(self) -> uapi.DeviceFile:
        """The open device, for what goes beyond the contract."""
        return self._file

    @property
    def info(self) -> DeviceInfo:
        return self._info

    @property
    def completion_fd(self) -> int | None:
        self._check_open()
        return self._file.fd

    # --- is it there? -------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._file.closed:
            raise CardLostError(f"card {self.number} is closed", card=self.number)

    def _check_alive(self) -> None:
        """Memory that is mapped would not tell."""
        self._check_open()
        if self._file.poll() & (uapi.POLL_ERR | uapi.POLL_HUP):
            raise self._lost()

    def _lost(self) -> CardLostError:
        """Why the card is of no use any more."""
        try:
            flags = self._file.info().flags
        except CardLostError as error:
            return error
        if flags & uapi.FLAG_FAILED:
            return CardLostError(
                f"card {self.number}: {self._file.path} has failed; close the fleet and open it "
                f"again, which resets the card",
                card=self.number,
            )
        return self._file.lost()

    # --- memory -------------------------------------------------------------------------

    def alloc(self, nbytes: int) -> int:
        self._check_alive()
        if self._info.ddr_bytes < nbytes < 1 << 64:
            raise self._no_room(nbytes)
        handle = self._twin.alloc(nbytes)
        try:
            made = self._file.buffer_create(nbytes)
        except uapi.IoctlError as error:
            self._twin.free(handle)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise self._no_room(nbytes) from None
            raise
        except BaseException:
            self._twin.free(handle)
            raise
        self._buffers[handle] = _Memory(made.handle, nbytes, made.mmap_offset)
        if not made.mmap_offset:
            self.free(handle)
            raise CardMemoryError(
                f"card {self.number}: no room for {nbytes:,} bytes in that part of the DDR which "
                f"the host can reach ({self._file.info().mappable:,} bytes); free buffers",
                card=self.number,
            )
        return handle

    def _no_room(self, nbytes: int) -> CardMemoryError:
        return CardMemoryError(
            f"card {self.number}: no room for {nbytes:,} bytes in one piece: "
            f"{self._file.info().ddr_free:,} of {self._info.ddr_bytes:,} are free; free buffers, "
            f"or use more cards",
            card=self.number,
        )

    def free(self, handle: int) -> None:
        self._check_alive()
        memory = self._buffers.get(handle)
        if memory is not None:
            for loaded in self._programs.values():
                self._unload_variants(loaded, handle)
        # Refuses what is no buffer, and what a program names.
        self._twin.free(handle)
        assert memory is not None
        del self._buffers[handle]
        self._unmap(memory)
        self._file.buffer_destroy(memory.handle)

    def _unmap(self, memory: _Memory) -> None:
        at, memory.at = memory.at, None
        if at is not None:
            self._file.unmap(at, memory.nbytes)

    def _place(self, handle: int, offset: int, nbytes: int, doing: str) -> Any:
        """A pointer to bytes of a buffer; what is out of bounds is refused, `doing` that."""
        self._check_alive()
        self._twin.check_range(handle, offset, nbytes, doing)
        memory = self._buffers[handle]
        # Several threads may be the first.
        with self._mapping:
            if memory.at is None:
                memory.at = self._file.map(memory.mmap_offset, memory.nbytes)
        return ffi.cast("char *", memory.at) + offset

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        at = self._place(handle, offset, len(view), "writing")
        np.copyto(_bytes_at(at, len(view)), np.frombuffer(view, np.uint8))

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        make(_bytes_at(self._place(handle, offset, nbytes, "filling"), nbytes))

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        return _bytes_at(self._place(handle, offset, nbytes, "reading"), nbytes).tobytes()

    # --- programs -----------------------------------------------------------------------

    def load_program(self, program: Buffer) -> int:
        self._check_alive()
        number = self._twin.load_program(program)
        try:
            data, buffers = self._translated(program)
            self._programs[number] = _Loaded(data, buffers, self._load(data, buffers))
        except BaseException:
            self._twin.unload_program(number)
            raise
        return number

    def _translated(self, program: Buffer) -> tuple[bytes, tuple[int, ...]]:
        """A program as the module takes it, and the buffers of its table: operands name these by
        their place in it, and transfers name the card's links instead of the fleet's cards."""
        out = bytearray(program)
        commands = np.frombuffer(out, PACKED_COMMAND, offset=PROGRAM_HEADER.size)
        used = _HAS_OPERAND[commands["op"]]
        refs = commands["ref"]
        buffers, places = np.unique(refs["buffer"][used], return_inverse=True)
        # What an operation does not take the module wants to be zero.
        refs[~used] = 0
        refs["buffer"][used] = places
        transfers = np.isin(commands["op"], (Op.LINK_SEND, Op.LINK_RECV))
        peers = commands["arg"][:, 0]
        for at in np.flatnonzero(transfers):
            link = self._links[peers[at]]
            if link is None:
                raise CardCommandError(
                    f"card {self.number}: program refused at command {at}: no link leads to card "
                    f"{peers[at]}",
                    card=self.number,
                )
            peers[at] = link
        return bytes(out), tuple(buffers.tolist())

    def _load(self, data: bytes, buffers: Sequence[int]) -> int:
        handles = [self._buffers[buffer].handle for buffer in buffers]
        number, program_id, command, why = self._file.program_load(data, handles)
        if number in (errno.ENOSPC, errno.ENOMEM):
            raise CardMemoryError(
                f"card {self.number}: out of program slots or of memory for programs, of "
                f"{self._info.programs_max} slots; unload programs",
                card=self.number,
            )
        if number:
            raise CardCommandError(
                f"card {self.number}: program refused at command {command}: "
                f"{why or uapi.error_text(number)}",
                card=self.number,
            )
        return program_id

    def unload_program(self, program: int) -> None:
        self._check_alive()
        loaded = self._programs.get(program)
        if loaded is not None:
            self._unload_variants(loaded)
            self._not_busy(
                functools.partial(self._file.program_unload, loaded.program_id),
                f"unloading program {program}: it is queued",
            )
            del self._programs[program]
        # Refuses what is no program.
        self._twin.unload_program(program)

    def _unload_variants(self, loaded: _Loaded, handle: int | None = None) -> None:
        """All of a program, or those that bring back a buffer."""
        for extra, program_id in list(loaded.variants.items()):
            if handle is None or handle in extra:
                self._not_busy(
                    functools.partial(self._file.program_unload, program_id),
                    "a step is queued that brings back what is to be let go",
                )
                del loaded.variants[extra]

    def _not_busy(self, call: functools.partial[None], what: str) -> None:
        """CardCommandError where the module says EBUSY."""
        try:
            call()
        except uapi.IoctlError as error:
            if error.errno != errno.EBUSY:
                raise
            raise CardCommandError(f"card {self.number}: {what}", card=self.number) from None

    # --- steps --------------------------------------------------------------------------

    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        self._check_open()
        what = f"card {self.number}: step of program {program} refused"
        try:
            if lent:
                raise CardCommandError(f"{what}: it has no windows", card=self.number)
            self._twin.check_step(program, parameters)
            nbytes = self._check_reads(reads, what) if reads else 0
            loaded = self._programs[program]
            program_id = self._variant(loaded, reads) if reads else loaded.program_id
            wanted = [(self._buffers[h].handle, offset, n) for h, offset, n in reads]
            fence = self._file.submit(program_id, parameters, wanted)
        except uapi.IoctlError as error:
            if error.errno != errno.EBUSY:
                raise
            raise CardCommandError(
                f"{what}: {len(self._pending)} steps are queued or wait to be collected, of "
                f"{self._queue_max} at most",
                card=self.number,
            ) from None
        except CardCommandError:
            self._check_alive()
            raise
        self._pending.append(_Pending(fence, tuple([n for _, _, n in reads]), nbytes))
        return fence

    def _check_reads(self, reads: Sequence[Read], what: str) -> int:
        """The bytes of all reads together."""
        if len(reads) > READS_MAX:
            raise CardCommandError(
                f"{what}: {len(reads)} reads, expected at most {READS_MAX}", card=self.number
            )
        for handle, offset, nbytes in reads:
            self._twin.check_range(handle, offset, nbytes, "bringing back")
        total = sum(nbytes for _, _, nbytes in reads)
        if total > uapi.READ_BYTES_MAX:
            raise CardCommandError(
                f"{what}: its reads have {total:,} bytes, expected at most "
                f"{uapi.READ_BYTES_MAX:,}; read them from the card instead",
                card=self.number,
            )
        return total

    def _variant(self, loaded: _Loaded, reads: Sequence[Read]) -> int:
        """The program whose table has what the reads name, which a command need not do."""
        extra = tuple(sorted({h for h, _, _ in reads}.difference(loaded.buffers)))
        if not extra:
            return loaded.program_id
        if extra not in loaded.variants:
            loaded.variants[extra] = self._load(loaded.data, (*loaded.buffers, *extra))
        return loaded.variants[extra]

    def completions(self) -> Sequence[Completion]:
        self._check_open()
        out: list[Completion] = []
        while self._pending:
            first = self._pending[0]
            got = self._file.collect(first.nbytes)
            if got == errno.EAGAIN:
                return out
            if isinstance(got, int):
                # Nothing more will come of a card that is gone, or was reset by somebody.
                error = self._file.lost(errno.ESTALE if got == errno.ESTALE else errno.ENODEV)
                out += [Completion(p.fence, 0, error) for p in self._pending]
                self._pending.clear()
                return out
            self._pending.popleft()
            out.append(self._completion(first, got))
        if not out:
            self._check_alive()
        return out

    def _completion(self, step: _Pending, got: uapi.Collected) -> Completion:
        if got.fence != step.fence:
            raise CardError(
                f"card {self.number}: fence {got.fence} completed, {step.fence} was next",
                card=self.number,
            )
        if got.error:
            return Completion(got.fence, got.busy_ns, self._failure(got))
        data: list[bytes] = []
        at = 0
        for nbytes in step.sizes:
            data.append(got.data[at : at + nbytes])
            at += nbytes
        return Completion(got.fence, got.busy_ns, None, tuple(data))

    def _failure(self, got: uapi.Collected) -> CardError:
        number, what = -got.error, f"card {self.number}, command {got.command}"
        if number == errno.ENODEV:
            return self._file.lost()
        if number == errno.EINVAL:
            # All else about a step is checked before it is queued.
            return CardFaultError(
                f"{what}: what an earlier step has chosen is no token of the vocabulary",
                card=self.number,
            )
        if number in _STATUS_OF_ERROR:
            return status_error(_STATUS_OF_ERROR[number], what, card=self.number)
        return CardFaultError(
            f"{what}: the card could not go on: {uapi.error_text(number)}", card=self.number
        )

    def abort(self, epoch: int) -> None:
        self._check_alive()
        last = (1 << 32) - 1 - self._epoch_0
        if not self._epoch < epoch <= last:
            raise CardCommandError(
                f"card {self.number}: no epoch {epoch}: expected {self._epoch + 1} to {last}",
                card=self.number,
            )
        self._not_busy(
            functools.partial(self._file.abort, self._epoch_0 + epoch),
            f"entering epoch {epoch}: another process has steps queued, which would go, too",
        )
        self._epoch = epoch

    # --- what is told -------------------------------------------------------------------

    def counters(self) -> DeviceCounters:
        self._check_open()
        now, begin = self._counters(), self._begin
        assert begin is not None
        counted = ("commands", "steps", "ddr_read_bytes", "ddr_written_bytes", "busy_ns")
        return attrs.evolve(
            now,
            **{name: getattr(now, name) - getattr(begin, name) for name in counted},
            link_tx_bytes=_less(now.link_tx_bytes, begin.link_tx_bytes),
            link_rx_bytes=_less(now.link_rx_bytes, begin.link_rx_bytes),
        )

    def _counters(self) -> DeviceCounters:
        """Since the card was reset."""
        t = self._file.telemetry()
        waiting_for = None
        if t.waiting_for is not None and t.waiting_for in self._links:
            waiting_for = self._links.index(t.waiting_for)
        links = [None if link is None else self._file.link(link) for link in self._links]
        return DeviceCounters(
            commands=t.commands,
            steps=t.steps,
            ddr_read_bytes=t.ddr_read_bytes,
            ddr_written_bytes=t.ddr_written_bytes,
            busy_ns=t.busy_ns,
            progress=t.progress,
            ddr_used_bytes=t.ddr_used,
            ddr_total_bytes=self._info.ddr_bytes,
            queued=t.queued,
            waiting_for=waiting_for,
            link_tx_bytes=tuple([link.tx_bytes if link else 0 for link in links]),
            link_rx_bytes=tuple([link.rx_bytes if link else 0 for link in links]),
        )

    def load_image(self, image: Buffer) -> None:
        self._check_alive()
        self._file.image(bytes(image))

    # --- the end ------------------------------------------------------------------------

    def close(self) -> None:
        """Let the card go: the module drops what is queued and frees what this file holds."""
        if self._file.closed:
            return
        for memory in self._buffers.values():
            self._unmap(memory)
        self._file.close()
        self._buffers.clear()
        self._programs.clear()
        self._pending.clear()
        if all(card.closed for card in self._rig.cards):
            self._rig.close()

    @property
    def closed(self) -> bool:
        return self._file.closed


def _bytes_at(at: Any, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(ffi.buffer(at, nbytes), np.uint8)


def _less(now: tuple[int, ...], begin: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([a - b for a, b in zip(now, begin, strict=True)])


class KernelRig:
    """The cards of one fleet behind the kernel module; nobody else who asks gets them meanwhile.

    Raises DriverError where a device cannot be opened, ConfigError for no or too many cards.
    """

    throttled = False

    def __init__(self, specs: Sequence[KernelCardSpec], system: uapi.System = uapi.LINUX) -> None:
        if not 1 <= len(specs) <= CARDS_MAX:
            raise ConfigError(f"a fleet of kernel cards has 1 to {CARDS_MAX}, got {len(specs)}")
        self.cards: list[KernelCard] = []
        self._twins: _Twins | None = None
        files: list[uapi.DeviceFile] = []
        try:
            for number, spec in enumerate(specs):
                files.append(uapi.DeviceFile(spec.path, card=number, system=system))
                files[-1].check_version()
                files[-1].lock()
            infos = [self._ready(files, number) for number in range(len(files))]
            self._twins = _Twins([info.ddr_bytes for info in infos])
            for number, (file, info) in enumerate(zip(files, infos, strict=True)):
                twin = self._twins.cards[number]
                self.cards.append(KernelCard(self, number, file, info, twin))
            # One that none of them has been in: what others left in the links is dropped.
            epoch = max(info.epoch for info in infos) + 1
            self._states: dict[tuple[int, int], int] = {}
            for card, info in zip(self.cards, infos, strict=True):
                card.join(self._links(card, info, [other.serial for other in infos]), epoch)
        except BaseException:
            for file in files:
                file.close()
            self.close()
            raise

    def _ready(self, files: list[uapi.DeviceFile], number: int) -> uapi.Info:
        """What a card says of itself, after a reset where it has failed."""
        file = files[number]
        info = file.info()
        if not info.flags & uapi.FLAG_FAILED:
            return info
        file.reset()
        file.close()
        files[number] = file = uapi.DeviceFile(file.path, card=number, system=file.system)
        file.lock()
        return file.info()

    def _links(self, card: KernelCard, info: uapi.Info, serials: Sequence[int]) -> list[int | None]:
        """The link from a card to each of these, by their serial numbers."""
        found: list[int | None] = [None] * len(serials)
        for number in range(info.links):
            link = card.file.link(number)
            # A card is not linked with itself, though some name themselves on a link that is down.
            if link.peer and link.peer != info.serial and link.peer in serials:
                peer = serials.index(link.peer)
                found[peer] = number
                self._states[card.number, peer] = link.state
        return found

    def links(self) -> dict[tuple[int, int], int]:
        """The state of each directed link between the cards when they were opened (0 down, 1
        training, 2 up, 3 error), by the numbers of its ends."""
        return dict(self._states)

    def close(self) -> None:
        """Idempotent."""
        for card in self.cards:
            card.close()
        if self._twins is not None:
            self._twins.close()

    def __enter__(self) -> KernelRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
