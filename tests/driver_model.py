# SPDX-License-Identifier: Apache-2.0
"""The kernel module, as far as user space sees it, as a few hundred lines in this process.

`DriverModel` stands where `uapi.Linux` does: it opens, maps and polls, and answers every ioctl over
soft cards by the rules of driver/include/uapi/spanker_ioctl.h.  So what user space makes of the
module is tested without a kernel; that the module keeps these rules is tested in a virtual machine,
by the same suite.

Knobs: `loaded`, `version`, `denied` (paths), `calls` (names of ioctls, in order), `kill`, `fail`
and `put_in` of a card, and what its `_Card` has: `failed`, `takes_image`, and the soft card with
its faults.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np

from spanker.device import uapi
from spanker.device.base import Completion
from spanker.device.kernel.programs import PACKED_COMMAND, TRANSFERS
from spanker.device.kernel.spec import CONTROL
from spanker.device.soft import SoftCard, SoftCardSpec, SoftRig
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardError,
    CardLostError,
    CardMemoryError,
)
from spanker.kernels.program import PROGRAM_HEADER
from spanker.native import ffi, lib

_NEED_THE_CARD = ("BUFFER_CREATE", "PROGRAM_LOAD", "SUBMIT", "ABORT", "IMAGE")
PAGE = mmap.PAGESIZE
SERIAL_0 = 0x5A11_0000_0000_0010
QUEUE_MAX = 8


class _Errno(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


@attrs.define
class _Buffer:
    soft: int
    nbytes: int
    offset: int
    users: int = 0


@attrs.define
class _Program:
    soft: int
    handles: list[int]


@attrs.define
class _Step:
    soft_fence: int
    fence: int
    result: Completion | None = None


@attrs.define(eq=False)
class _File:
    card: _Card | None
    generation: int = 0
    buffers: dict[int, _Buffer] = attrs.Factory(dict)
    programs: dict[int, _Program] = attrs.Factory(dict)
    steps: deque[_Step] = attrs.Factory(deque)
    handles: int = 0
    program_ids: int = 0
    fences: int = 0

    def forget(self) -> None:
        self.programs.clear()
        self.buffers.clear()
        self.steps.clear()


@attrs.define(eq=False)
class _Card:
    """One that others have used before, by its epoch; the soft card's is the same, but 1 where this
    one's is 0."""

    number: int
    soft: SoftCard
    serial: int
    epoch: int = 41
    generation: int = 0
    gone: bool = False
    failed: bool = False
    takes_image: bool = True
    image: bytes = b""
    locked_by: int | None = None
    files: list[_File] = attrs.Factory(list)

    def link_of(self, peer: int) -> int:
        """The links of a card lead to all others, in order; none to itself."""
        return peer - (peer > self.soft.number)

    def peer_of(self, link: int) -> int:
        return link + (link >= self.soft.number)


class DriverModel:
    """A `uapi.System` with `count` cards, fully linked."""

    def __init__(self, count: int, ddr_bytes: int, device_dir: str = "/dev") -> None:
        self.device_dir = device_dir
        self.loaded = True
        self.version = uapi.VERSION
        self.denied: set[str] = set()
        self.calls: list[str] = []
        self.mapped = 0
        self._rig = SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)] * count)
        # By where they are; what they are called is another matter.
        self.cards = [_Card(c.number, c, SERIAL_0 + c.number) for c in self._rig.cards]
        for card in self.cards:
            card.soft.abort(card.epoch)
        self._files: dict[int, _File] = {}
        self._ioctls: dict[int, tuple[str, str, Callable[..., None]]] = {}
        for name, struct in (
            ("PING", ""),
            ("GET_VERSION", "version"),
            ("INFO", "info"),
            ("BUFFER_CREATE", "buffer_create"),
            ("BUFFER_DESTROY", "buffer_destroy"),
            ("PROGRAM_LOAD", "program_load"),
            ("PROGRAM_UNLOAD", "program_unload"),
            ("SUBMIT", "submit"),
            ("COLLECT", "collect"),
            ("ABORT", "abort"),
            ("RESET", ""),
            ("LINK", "link"),
            ("LINK_CONTROL", "link_control"),
            ("TELEMETRY", "telemetry"),
            ("IMAGE", "image"),
        ):
            number = int(getattr(lib, f"SPANKER_IOC_{name}"))
            self._ioctls[number] = (name, struct, getattr(self, f"_{name.lower()}"))

    # --- the system ---------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except _Errno:
            return False
        return True

    def _find(self, path: str) -> _Card | None:
        """The card of a path, None for the control device."""
        name = os.path.relpath(path, self.device_dir)
        if self.loaded and name == CONTROL:
            return None
        match = re.fullmatch(r"spanker(\d+)", name)
        for card in self.cards:
            if self.loaded and match and card.number == int(match[1]) and not card.gone:
                return card
        raise _Errno(errno.ENOENT)

    def open(self, path: str) -> int:
        try:
            card = self._find(path)
        except _Errno as error:
            return -error.number
        if path in self.denied:
            return -errno.EACCES
        fd = os.dup(card.soft.completion_fd) if card else os.open(os.devnull, os.O_RDONLY)
        file = self._files[fd] = _File(card, card.generation if card else 0)
        if card:
            card.files.append(file)
        return fd

    def close(self, fd: int) -> None:
        file = self._files.pop(fd)
        card = file.card
        if card:
            self._drop(card, file)
            card.files.remove(file)
            if card.locked_by == fd:
                card.locked_by = None
        os.close(fd)

    def _drop(self, card: _Card, file: _File) -> None:
        """Nothing of a file is left on its card."""
        if card.soft.closed or card.gone:
            return

        def at_work() -> bool:
            # What a card that has failed tells to be over its soft card may still be at.
            over = not (card.failed and card.soft.counters().queued)
            return not over or any(step.result is None for step in file.steps)

        if at_work():
            card.epoch += 1
            card.soft.abort(card.epoch)
            end = time.monotonic() + 5
            while at_work():
                assert time.monotonic() < end, "the aborted steps of a closed file do not end"
                self._take(card)
        for program in file.programs.values():
            card.soft.unload_program(program.soft)
        for buffer in file.buffers.values():
            card.soft.free(buffer.soft)
        file.forget()

    def map(self, fd: int, offset: int, nbytes: int) -> Any:
        file = self._files[fd]
        assert file.card
        if file.card.gone:
            return -errno.ENODEV
        for buffer in file.buffers.values():
            if buffer.offset == offset and 0 < nbytes <= -(-buffer.nbytes // PAGE) * PAGE:
                at = ffi.new("void **")
                # Of no bytes, since it prepares bytes that are about to be overwritten.
                lib.spk_card_place(file.card.soft.handle, buffer.soft, 0, 0, at)
                self.mapped += 1
                return at[0]
        return -errno.EINVAL

    def unmap(self, at: Any, nbytes: int) -> None:
        assert at != ffi.NULL and nbytes
        self.mapped -= 1

    def poll(self, fd: int) -> int:
        file = self._files[fd]
        card, out = file.card, 0
        if card:
            # Nothing is taken: whoever waits for this file would not be woken any more.
            out |= lib.spk_driver_poll(fd) & uapi.POLL_IN
            out |= uapi.POLL_HUP if card.gone else 0
            stale = file.generation != card.generation
            out |= uapi.POLL_ERR if card.failed or stale else 0
        return out

    def lock(self, fd: int) -> bool:
        card = self._files[fd].card
        assert card
        if card.locked_by not in (None, fd):
            return False
        card.locked_by = fd
        return True

    def ioctl(self, fd: int, request: int, argument: Any) -> int:
        if request not in self._ioctls:
            return -errno.ENOTTY
        name, struct, answer = self._ioctls[request]
        self.calls.append(name)
        file = self._files[fd]
        card = file.card
        try:
            if name in ("PING", "GET_VERSION"):
                pass
            elif card is None:
                raise _Errno(errno.ENOTTY)
            elif card.gone and name not in ("COLLECT", "INFO"):
                raise _Errno(errno.ENODEV)
            elif file.generation != card.generation and name != "COLLECT":
                raise _Errno(errno.ESTALE)
            elif card.failed and name in _NEED_THE_CARD:
                raise _Errno(errno.EIO)
            if struct:
                answer(file, ffi.cast(f"struct spanker_{struct} *", argument))
            else:
                answer(file)
        except _Errno as error:
            return -error.number
        return 0

    # --- ioctls -------------------------------------------------------------------------

    def _ping(self, file: _File) -> None:
        pass

    def _get_version(self, file: _File, v: Any) -> None:
        v.major, v.minor, v.patch = self.version

    def _info(self, file: _File, i: Any) -> None:
        card = file.card
        assert card
        counters, soft = card.soft.counters(), card.soft.info
        i.number, i.serial = card.number, card.serial
        i.flags = lib.SPANKER_INFO_EMULATED | (lib.SPANKER_INFO_FAILED if card.failed else 0)
        i.flags |= lib.SPANKER_INFO_GONE if card.gone else 0
        i.ddr_bytes = i.mappable = counters.ddr_total_bytes
        i.ddr_free = counters.ddr_total_bytes - counters.ddr_used_bytes
        i.card_major, i.semantics = 1, soft.semantics_version
        i.programs, i.links = soft.programs_max, len(self.cards) - 1
        i.generation, i.queue_max, i.epoch = card.generation, QUEUE_MAX, card.epoch
        i.sku, i.name, i.isa = b"POPC_16A", b"InnerJib7EA", soft.isa.encode()

    def _buffer_create(self, file: _File, b: Any) -> None:
        assert file.card
        if not b.bytes or b.kind != lib.SPANKER_BUFFER_DDR or b.flags or b.reserved:
            raise _Errno(errno.EINVAL)
        self._wait_for_the_queue(file.card)
        try:
            soft = file.card.soft.alloc(-(-b.bytes // PAGE) * PAGE)
        except CardMemoryError:
            raise _Errno(errno.ENOSPC) from None
        file.handles += 1
        b.handle, b.mmap_offset = file.handles, file.handles << 40
        file.buffers[b.handle] = _Buffer(soft, b.bytes, b.mmap_offset)

    def _wait_for_the_queue(self, card: _Card) -> None:
        """Its commands come behind steps, which may be waiting for whoever calls."""
        assert card.gone or not card.soft.counters().queued, "would wait, perhaps for ever"

    def _buffer_destroy(self, file: _File, b: Any) -> None:
        assert file.card
        buffer = file.buffers.get(b.handle)
        if buffer is None or b.flags:
            raise _Errno(errno.EINVAL)
        if buffer.users:
            raise _Errno(errno.EBUSY)
        file.card.soft.free(buffer.soft)
        del file.buffers[b.handle]

    def _program_load(self, file: _File, p: Any) -> None:
        card = file.card
        assert card
        program = bytearray(_memory(p.program, p.program_bytes))
        handles = np.frombuffer(_memory(p.handles, 4 * p.handle_count), np.uint32).tolist()
        if p.flags or p.program_bytes > uapi.PROGRAM_BYTES_MAX:
            raise _Errno(errno.EINVAL)
        if any(handle not in file.buffers for handle in handles):
            raise _Errno(errno.EINVAL)
        table = [file.buffers[handle] for handle in handles]
        for number, command in enumerate(
            np.frombuffer(program, PACKED_COMMAND, -1, PROGRAM_HEADER.size)
        ):
            if command["op"] in TRANSFERS:
                command["arg"][0] = card.peer_of(int(command["arg"][0]))
            for ref in command["ref"]:
                if ref["buffer"] >= len(table) and any(ref.tolist()):
                    self._refuse(p, number, "an operand names no buffer of the table")
                if table and ref["offset"] >= -(-table[ref["buffer"]].nbytes // PAGE) * PAGE:
                    self._refuse(p, number, "an operand begins outside of its buffer")
                if table:
                    ref["buffer"] = table[ref["buffer"]].soft
        self._wait_for_the_queue(card)
        try:
            soft = card.soft.load_program(program)
        except CardMemoryError:
            raise _Errno(errno.ENOSPC) from None
        except CardCommandError as error:
            self._refuse(p, 0, str(error))
        for buffer in table:
            buffer.users += 1
        file.program_ids += 1
        p.program_id = file.program_ids
        file.programs[p.program_id] = _Program(soft, handles)

    def _refuse(self, p: Any, command: int, why: str) -> None:
        p.command = command
        _memory(p.why, lib.SPANKER_WHY_BYTES)[: len(why) + 1] = why.encode() + b"\0"
        raise _Errno(errno.ENOEXEC)

    def _program_unload(self, file: _File, p: Any) -> None:
        assert file.card
        program = file.programs.get(p.program_id)
        if program is None or p.flags:
            raise _Errno(errno.EINVAL)
        try:
            file.card.soft.unload_program(program.soft)
        except CardCommandError:
            raise _Errno(errno.EBUSY) from None
        for handle in program.handles:
            file.buffers[handle].users -= 1
        del file.programs[p.program_id]

    def _submit(self, file: _File, s: Any) -> None:
        card = file.card
        assert card
        program = file.programs.get(s.program_id)
        if program is None or s.flags or s.read_count > uapi.READS_MAX:
            raise _Errno(errno.EINVAL)
        if len(file.steps) >= QUEUE_MAX:
            raise _Errno(errno.EBUSY)
        wanted = ffi.cast("struct spanker_read *", s.reads)
        reads = []
        for read in (wanted[i] for i in range(s.read_count)):
            buffer = file.buffers.get(read.handle)
            if read.handle not in program.handles or buffer is None or read.reserved:
                raise _Errno(errno.EINVAL)
            if read.offset > buffer.nbytes or read.bytes > buffer.nbytes - read.offset:
                raise _Errno(errno.EINVAL)
            reads.append((buffer.soft, int(read.offset), int(read.bytes)))
        if sum(nbytes for _, _, nbytes in reads) > uapi.READ_BYTES_MAX:
            raise _Errno(errno.EINVAL)
        parameters = bytes(_memory(s.parameters, s.parameters_bytes))
        soft_fence = card.soft.submit(program.soft, parameters, reads)
        file.fences += 1
        s.fence = file.fences
        file.steps.append(_Step(soft_fence, file.fences))

    def _take(self, card: _Card) -> None:
        """What the card has completed goes to whoever submitted it."""
        if card.soft.closed:
            return
        for completion in card.soft.completions():
            for file in card.files:
                for step in file.steps:
                    if step.soft_fence == completion.fence and step.result is None:
                        step.result = completion

    def _collect(self, file: _File, c: Any) -> None:
        card = file.card
        assert card
        if c.flags or c.reserved:
            raise _Errno(errno.EINVAL)
        self._take(card)
        if not file.steps or file.steps[0].result is None:
            raise _Errno(self._no_more(file) or errno.EAGAIN)
        step = file.steps[0]
        result = step.result
        assert result
        data = b"".join(result.data)
        if len(data) > c.results_bytes:
            raise _Errno(errno.ENOSPC)
        file.steps.popleft()
        if data:
            _memory(c.results, len(data))[:] = data
        c.results_bytes, c.fence, c.busy_ns = len(data), step.fence, result.busy_ns
        if result.error is not None:
            c.error = -_errno_of(result.error)
            match = re.search(r"command (\d+)", str(result.error))
            c.command = int(match[1]) if match else 0

    def _no_more(self, file: _File) -> int:
        """Why a file can have no more completions, or 0."""
        card = file.card
        assert card
        if card.gone:
            return 0 if file.steps else errno.ESHUTDOWN
        if file.generation != card.generation:
            return errno.ESTALE
        return errno.EIO if card.failed and not card.soft.counters().queued else 0

    def _abort(self, file: _File, a: Any) -> None:
        card = file.card
        assert card
        if a.flags or a.epoch <= card.epoch:
            raise _Errno(errno.EINVAL)
        if any(other.steps for other in card.files if other is not file):
            raise _Errno(errno.EBUSY)
        if a.epoch > 1:
            card.soft.abort(a.epoch)
        card.epoch = a.epoch

    def _reset(self, file: _File) -> None:
        card = file.card
        assert card
        for other in card.files:
            other.forget()
        card.soft.reopen()
        card.failed, card.epoch, card.image = False, 0, b""
        card.generation += 1

    def _link(self, file: _File, i: Any) -> None:
        card = file.card
        assert card
        if i.flags or i.link >= len(self.cards) - 1:
            raise _Errno(errno.EINVAL)
        peer, counters = card.peer_of(i.link), card.soft.counters()
        i.state = lib.SPANKER_LINK_DOWN if peer in counters.links_down else lib.SPANKER_LINK_UP
        i.errors, i.peer = 0, self.cards[peer].serial
        i.tx_bytes, i.rx_bytes = counters.link_tx_bytes[peer], counters.link_rx_bytes[peer]

    def _link_control(self, file: _File, c: Any) -> None:
        card = file.card
        assert card
        if c.up > 1 or c.link >= len(self.cards) - 1:
            raise _Errno(errno.EINVAL)
        (card.soft.mend if c.up else card.soft.cut)(card.peer_of(c.link))

    def _telemetry(self, file: _File, t: Any) -> None:
        card = file.card
        assert card
        c = card.soft.counters()
        t.temperature_mc, t.queued, t.ddr_used = 45_000, c.queued, c.ddr_used_bytes
        t.waiting_for = 0xFFFFFFFF if c.waiting_for is None else card.link_of(c.waiting_for)
        t.steps, t.commands, t.busy_ns = c.steps, c.commands, c.busy_ns
        t.ddr_read_bytes, t.ddr_written_bytes = c.ddr_read_bytes, c.ddr_written_bytes
        t.progress = c.progress & 0xFFFFFFFF

    def _image(self, file: _File, i: Any) -> None:
        card = file.card
        assert card
        if not card.takes_image:
            raise _Errno(errno.ENODEV)
        if i.flags or i.reserved:
            raise _Errno(errno.EINVAL)
        card.image = bytes(_memory(i.image, i.image_bytes))

    # --- what happens to cards ----------------------------------------------------------

    def kill(self, number: int) -> None:
        """The card is taken out."""
        self.cards[number].gone = True
        self.cards[number].soft.kill()

    def fail(self, number: int) -> None:
        """The card finds that it is broken: what is queued ends, nothing works until a reset."""
        card = self.cards[number]
        card.failed = True
        for file in card.files:
            for step in file.steps:
                step.result = step.result or Completion(0, 0, CardError("the card has failed"))
        # Whoever waits is woken.
        os.write(card.soft.completion_fd or -1, (1).to_bytes(8, sys.byteorder))

    def put_in(self, number: int) -> None:
        """It is there again, as new, under the lowest name that is free."""
        soft, serial = self.cards[number].soft, self.cards[number].serial
        soft.reopen()
        taken = {card.number for card in self.cards if not card.gone}
        name = min(set(range(len(self.cards))) - taken)
        self.cards[number] = _Card(name, soft, serial, epoch=0)

    @property
    def open_files(self) -> int:
        return len(self._files)

    def shut_down(self) -> None:
        """No card, no thread, no descriptor is left; files that are open are forgotten."""
        for fd in self._files:
            os.close(fd)
        self._files.clear()
        self._rig.close()


def _memory(address: int, nbytes: int) -> Any:
    """Memory of user space."""
    return ffi.buffer(ffi.cast("char *", address), nbytes) if nbytes else b""


def _errno_of(error: Exception) -> int:
    if isinstance(error, CardAbortedError):
        return errno.ECANCELED
    if isinstance(error, CardLostError):
        return errno.ENODEV
    text = str(error)
    for words, number in (
        ("NaN", errno.EDOM),
        ("f16", errno.ERANGE),
        ("no token", errno.EIO),
        ("link message", errno.EBADMSG),
    ):
        if words in text:
            return number
    return errno.EIO
