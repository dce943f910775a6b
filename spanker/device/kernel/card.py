# SPDX-License-Identifier: Apache-2.0
"""One card behind the kernel module: an open file, and what it holds.

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
from typing import Any, Protocol

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
from spanker.device.kernel.programs import translated
from spanker.device.soft import SoftCard
from spanker.errors import (
    CardCommandError,
    CardError,
    CardFaultError,
    CardLostError,
    CardMemoryError,
    IoctlError,
)
from spanker.native import ffi, lib, status_error

# What a step can fail with, as SPK_E_* of the same meaning.
_STATUS_OF_ERROR = {
    errno.EDOM: lib.SPK_E_NONFINITE,
    errno.ERANGE: lib.SPK_E_F16_RANGE,
    errno.EBADMSG: lib.SPK_E_LINK,
    errno.ECANCELED: lib.SPK_E_ABORTED,
}


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


@attrs.define
class _Pending:
    """A step.  One that brings back more than the module carries is *large*: what its `reads` name
    is copied when it is collected, and until then those behind it are held back here, as `held`
    parameters, or with the `error` that has overtaken them."""

    fence: int
    program: _Loaded
    reads: tuple[Read, ...]
    nbytes: int
    queued_as: int = 0
    held: bytes | None = None
    error: CardError | None = None
    aborted: bool = False

    @property
    def large(self) -> bool:
        return self.nbytes > uapi.READ_BYTES_MAX

    @property
    def holds_back(self) -> bool:
        """Whether those behind it must wait until it has been collected."""
        return self.large and self.error is None and not self.aborted


class Rig(Protocol):
    """What owns the cards of a fleet, and knows where they are."""

    def closed(self) -> None:
        """One of the cards was."""

    def open_again(self, card: KernelCard) -> tuple[uapi.DeviceFile, uapi.Info]:
        """The file of a card that has just been reset, wherever it is now; as `reopen` raises."""

    def links_of(self, card: KernelCard) -> tuple[int | None, ...]:
        """The link from a card to each card of the fleet."""


class KernelCard(CardDevice):
    """One card of a rig."""

    # Of what only other bodies have: speeds that are kept.
    pace = None

    def __init__(
        self,
        number: int,
        file: uapi.DeviceFile,
        info: uapi.Info,
        twin: SoftCard,
        rig: Rig,
    ) -> None:
        self.number = number
        self._rig = rig
        self._twin = twin
        self._buffers: dict[int, _Memory] = {}
        self._mapping = threading.Lock()
        self._programs: dict[int, _Loaded] = {}
        self._pending: deque[_Pending] = deque()
        # Of the fleet; the card counts on from `_epoch_0`.
        self._epoch, self._epoch_0 = 1, 0
        # The link to each card of the fleet, by its number, None where there is none.
        self._links: tuple[int | None, ...] = ()
        self._begin: DeviceCounters | None = None
        self._use(file, info)

    def _use(self, file: uapi.DeviceFile, info: uapi.Info) -> None:
        self._file = file
        self._queue_max = info.queue_max
        self._fences = 0
        self._info = DeviceInfo(
            name=f"spanker{info.number}",
            serial=info.serial,
            isa=info.isa,
            semantics_version=info.semantics,
            ddr_bytes=info.ddr_bytes,
            programs_max=info.programs,
            ddr_granule=mmap.PAGESIZE,
        )

    def begin(self, epoch: int) -> None:
        """For the rig, once it has all cards: they begin in this epoch."""
        self._links = self._rig.links_of(self)
        self._not_busy(
            functools.partial(self._file.abort, epoch),
            f"another process has steps queued on {self._file.path}; wait until it is done",
        )
        self._epoch_0 = epoch - self._epoch
        self._begin = self._counters()

    def begin_beside(self, other: KernelCard) -> None:
        """For the rig, of a card that has been reset: it counts epochs as another one does."""
        self._epoch_0 = other._epoch_0
        self._meet()

    def _meet(self) -> None:
        """Once it has been reset, and knows nobody."""
        self._links = self._rig.links_of(self)
        self._begin = self._counters()

    def with_one_more(self) -> tuple[tuple[int | None, ...], DeviceCounters]:
        """For the rig, which has got a card: what `meet` takes."""
        links, begin = self._rig.links_of(self), self._begin
        assert begin is not None
        found = None if links[-1] is None else self._file.link(links[-1])
        tx, rx = (found.tx_bytes, found.rx_bytes) if found else (0, 0)
        return links, attrs.evolve(
            begin,
            link_tx_bytes=(*begin.link_tx_bytes, tx),
            link_rx_bytes=(*begin.link_rx_bytes, rx),
        )

    def meet(self, links: tuple[int | None, ...], begin: DeviceCounters) -> None:
        """For the rig: from now on there is one card more."""
        self._links, self._begin = links, begin

    @property
    def twin(self) -> SoftCard:
        """For the rig."""
        return self._twin

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
        """Memory that is mapped does not tell, so this comes before and after it is used."""
        self._check_open()
        if self._file.poll() & (uapi.POLL_ERR | uapi.POLL_HUP):
            raise self._lost()

    def _lost(self) -> CardLostError:
        """Why the card is of no use any more."""
        try:
            failed = self._file.info().failed
        except CardLostError as error:
            return error
        return self._file.lost(errno.EIO if failed else errno.ENODEV)

    # --- memory -------------------------------------------------------------------------

    def alloc(self, nbytes: int) -> int:
        self._check_alive()
        self._check_idle(f"allocating {nbytes} bytes")
        if self._info.ddr_bytes < nbytes < 1 << 64:
            raise self._no_room(nbytes)
        handle = self._twin.alloc(nbytes)
        try:
            made = self._file.buffer_create(nbytes)
        except IoctlError as error:
            self._twin.free(handle)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise self._no_room(nbytes) from None
            if error.errno == errno.EDQUOT:
                raise CardMemoryError(f"{error}: too many buffers", card=self.number) from None
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

    def _check_idle(self, what: str) -> None:
        """The module makes it wait for the steps that are queued, which may wait for us."""
        if self._pending and self._file.telemetry().queued:
            raise self._busy(f"{what}: steps are queued")

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
            for step in self._pending:
                if step.large or step.held is not None:
                    self._check_not_named(step, handle)
            for loaded in self._programs.values():
                self._unload_variants(loaded, handle)
        # Refuses what is no buffer, and what a program names.
        self._twin.free(handle)
        assert memory is not None
        del self._buffers[handle]
        self._unmap(memory)
        self._file.buffer_destroy(memory.handle)

    def _check_not_named(self, step: _Pending, handle: int) -> None:
        if any(h == handle for h, _, _ in step.reads):
            raise self._busy(f"a step is queued that brings back buffer {handle}")

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
        self._check_alive()

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        make(_bytes_at(self._place(handle, offset, nbytes, "filling"), nbytes))
        self._check_alive()

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        data = _bytes_at(self._place(handle, offset, nbytes, "reading"), nbytes).tobytes()
        self._check_alive()
        return data

    # --- programs -----------------------------------------------------------------------

    def load_program(self, program: Buffer) -> int:
        self._check_alive()
        self._check_idle("loading a program")
        number = self._twin.load_program(program)
        try:
            data, buffers = translated(program, self._links, self.number)
            self._programs[number] = _Loaded(data, buffers, self._load(data, buffers))
        except BaseException:
            self._twin.unload_program(number)
            raise
        return number

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
            if any(step.program is loaded and step.held is not None for step in self._pending):
                raise self._busy(f"unloading program {program}: it is queued")
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
        except IoctlError as error:
            if error.errno != errno.EBUSY:
                raise
            raise self._busy(what) from None

    def _busy(self, what: str) -> CardCommandError:
        return CardCommandError(f"card {self.number}: {what}", card=self.number)

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
            step = _Pending(self._fences + 1, self._programs[program], tuple(reads), nbytes)
            full = len(self._pending) >= self._queue_max
            if any(before.holds_back for before in self._pending):
                step.held = bytes(parameters)
            elif not full:
                full = not self._queue(step, parameters)
            if full:
                raise CardCommandError(
                    f"{what}: {len(self._pending)} steps are queued or wait to be collected, of "
                    f"{self._queue_max} at most",
                    card=self.number,
                )
        except CardCommandError:
            self._check_alive()
            raise
        self._fences = step.fence
        self._pending.append(step)
        return step.fence

    def _check_reads(self, reads: Sequence[Read], what: str) -> int:
        """The bytes of all reads together."""
        if len(reads) > READS_MAX:
            raise CardCommandError(
                f"{what}: {len(reads)} reads, expected at most {READS_MAX}", card=self.number
            )
        for handle, offset, nbytes in reads:
            self._twin.check_range(handle, offset, nbytes, "bringing back")
        total, most = sum(nbytes for _, _, nbytes in reads), int(lib.SPK_RESULT_BYTES_MAX)
        if total > most:
            raise CardCommandError(
                f"{what}: its reads have {total:,} bytes, expected at most {most:,}",
                card=self.number,
            )
        return total

    def _queue(self, step: _Pending, parameters: Buffer) -> bool:
        """Give a step to the module; False where its queue is full."""
        reads = () if step.large else step.reads
        program_id = self._variant(step.program, reads) if reads else step.program.program_id
        wanted = [(self._buffers[h].handle, offset, n) for h, offset, n in reads]
        try:
            step.queued_as = self._file.submit(program_id, parameters, wanted)
        except IoctlError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def _variant(self, loaded: _Loaded, reads: Sequence[Read]) -> int:
        """The program whose table has what the reads name, which a command need not do."""
        extra = tuple(sorted({h for h, _, _ in reads}.difference(loaded.buffers)))
        if not extra:
            return loaded.program_id
        if extra not in loaded.variants:
            self._check_idle("bringing back what the program does not name")
            loaded.variants[extra] = self._load(loaded.data, (*loaded.buffers, *extra))
        return loaded.variants[extra]

    @property
    def outstanding(self) -> int:
        return len(self._pending)

    def completions(self) -> Sequence[Completion]:
        self._check_open()
        out: list[Completion] = []
        while self._pending:
            step = self._pending[0]
            if step.held is not None:
                self._release_held(None)
                if step.held is not None:
                    return out
            if step.error is None:
                got = self._file.collect(0 if step.large else step.nbytes)
                if got == errno.EAGAIN:
                    return out
                if isinstance(got, int):
                    # Nothing more will come of a card that is gone, or was reset by somebody.
                    lost = self._file.lost(got)
                    out += [Completion(p.fence, 0, lost) for p in self._pending]
                    self._pending.clear()
                    return out
                out.append(self._completion(step, got))
            else:
                out.append(Completion(step.fence, 0, step.error))
            self._pending.popleft()
            if step.holds_back:
                self._release_held(out[-1].error)
        if not out:
            self._check_alive()
        return out

    def _release_held(self, failure: Exception | None) -> None:
        """Queue what was held back behind a large step, up to the next one; where that has failed,
        they go with it, as on the card."""
        for step in self._pending:
            if step.held is not None:
                parameters, step.held = step.held, None
                try:
                    if failure is not None:
                        step.error = self._aborted()
                    elif not self._queue(step, parameters):
                        step.held = parameters
                        return
                except CardError as error:
                    step.error = failure = error
            if step.holds_back:
                return

    def _aborted(self) -> CardError:
        what = f"card {self.number}, command 0"
        return status_error(lib.SPK_E_ABORTED, what, card=self.number)

    def _completion(self, step: _Pending, got: uapi.Collected) -> Completion:
        if got.fence != step.queued_as:
            raise CardError(
                f"card {self.number}: fence {got.fence} completed, {step.queued_as} was next",
                card=self.number,
            )
        if got.error:
            return Completion(step.fence, got.busy_ns, self._failure(got))
        if step.aborted:
            # It was done before, but those behind it have been let go on.
            return Completion(step.fence, got.busy_ns, self._aborted())
        if step.large:
            data = [self.read(*read) for read in step.reads]
            return Completion(step.fence, got.busy_ns, None, tuple(data))
        data, at = [], 0
        for _, _, nbytes in step.reads:
            data.append(got.data[at : at + nbytes])
            at += nbytes
        return Completion(step.fence, got.busy_ns, None, tuple(data))

    def _failure(self, got: uapi.Collected) -> CardError:
        number, what = -got.error, f"card {self.number}, command {got.command}"
        broken = self._file.poll() & (uapi.POLL_ERR | uapi.POLL_HUP)
        if number == errno.ENODEV or (number == errno.EIO and broken):
            return self._lost()
        if number == errno.EIO:
            # All else about a step is checked before it is queued.
            return CardFaultError(
                f"{what}: what an earlier step has chosen is no token of the vocabulary, or the "
                f"card could not reach memory",
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
        try:
            self._not_busy(
                functools.partial(self._file.abort, self._epoch_0 + epoch),
                f"entering epoch {epoch}: another process has steps queued, which would go, too",
            )
        except IoctlError as error:
            if error.errno != errno.EINVAL:
                raise
            raise self._busy(
                f"entering epoch {epoch}: another process has aborted the card's work, and has "
                f"entered it; open the fleet again, and let nobody else use its cards"
            ) from None
        self._epoch = epoch
        for step in self._pending:
            step.aborted = step.large
            if step.held is not None:
                step.held, step.error = None, self._aborted()

    # --- what is told -------------------------------------------------------------------

    def counters(self) -> DeviceCounters:
        self._check_open()
        now, begin = self._counters(), self._begin
        assert begin is not None
        counted = ("commands", "steps", "ddr_read_bytes", "ddr_written_bytes", "busy_ns")
        return attrs.evolve(
            now,
            **{name: getattr(now, name) - getattr(begin, name) for name in counted},
            progress=(now.progress - begin.progress) % (1 << 32),
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
            queued=t.queued + sum(step.held is not None for step in self._pending),
            waiting_for=waiting_for,
            link_tx_bytes=tuple([link.tx_bytes if link else 0 for link in links]),
            link_rx_bytes=tuple([link.rx_bytes if link else 0 for link in links]),
            links_down=tuple(
                [p for p, link in enumerate(links) if link and link.state != lib.SPANKER_LINK_UP]
            ),
        )

    def load_image(self, image: Buffer) -> None:
        self._check_alive()
        self._file.image(bytes(image))

    # --- links --------------------------------------------------------------------------

    def cut(self, peer: int) -> None:
        """This end wants the link with a peer down: what is under way waits in it."""
        self._file.link_control(self._link(peer), up=False)

    def mend(self, peer: int) -> None:
        """This end wants the link up, which it is while both ends do: what waited goes on."""
        self._file.link_control(self._link(peer), up=True)

    def _link(self, peer: int) -> int:
        link = self._links[peer] if 0 <= peer < len(self._links) else None
        if link is None:
            raise CardCommandError(
                f"card {self.number} has no link with card {peer}", card=self.number
            )
        return link

    # --- the end, and a new beginning ------------------------------------------------------

    def close(self) -> None:
        """Let the card go: the module drops what is queued and frees what this file holds."""
        if not self._file.closed:
            self._let_go()
            self._rig.closed()

    def _let_go(self) -> None:
        if self._file.closed:
            return
        for memory in self._buffers.values():
            self._unmap(memory)
        self._file.close()
        self._buffers.clear()
        self._programs.clear()
        self._pending.clear()

    def reopen(self) -> None:
        """As the contract says.  The card is reset, and may have been taken out and put in again
        meanwhile; it is known by its serial number."""
        self._let_go()
        # Which there is as long as one card of the fleet is open.
        self._twin.reopen()
        self._use(*self._rig.open_again(self))
        # The reset has ended whatever epoch it was in.
        self._epoch = 1
        self._meet()

    def release(self) -> None:
        """For the rig: it is not opened again.  Idempotent."""
        self._let_go()
        self._twin.release()

    @property
    def closed(self) -> bool:
        return self._file.closed


def _bytes_at(at: Any, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(ffi.buffer(at, nbytes), np.uint8)


def _less(now: tuple[int, ...], begin: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([a - b for a, b in zip(now, begin, strict=True)])
