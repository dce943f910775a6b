# SPDX-License-Identifier: Apache-2.0
"""The `remote` card: the C core in a process of its own, spoken to over two sockets.

Every call but `completions` is a request whose reply is waited for, as long as the rig says at
most; a card that does not answer in time, or not as docs/api/card-protocol.md has it, is killed
and lost.  The
descriptor to wait for is the socket that completions come over.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from spanker.device import wire
from spanker.device.base import (
    READS_MAX,
    TRACE_EVENT,
    Buffer,
    Completion,
    DeviceCounters,
    DeviceInfo,
    Lent,
    Read,
)
from spanker.device.core import CoreCard, Rig, counters_of, is_down
from spanker.device.firmware import ABI_VERSION
from spanker.device.process import CardProcess
from spanker.errors import (
    CardCommandError,
    CardLostError,
    FirmwareError,
    RemoteProtocolError,
    again,
)
from spanker.native import ffi, lib

_RECEIVE_BYTES = 1 << 20
# Pieces this small are sent together with their header.
_TOGETHER_BYTES = 1 << 16


class RemoteRig(Rig, Protocol):
    """What owns the cards of a fleet some of which are processes."""

    @property
    def answer_s(self) -> float:
        """How many seconds a process may take to answer a request."""


@attrs.frozen
class LinkEnd:
    """An end of a link: the peer's number, the file both ends share, which end it is (1 or 2)."""

    peer: int
    file: int
    end: int
    ring_bytes: int


class RemoteCard(CoreCard):
    """One card of a rig; `start` makes its process, now and whenever it is opened again, when
    `links` are the ends that it has by then.  Whoever asks it first greets it, which waits until it
    has started."""

    _rig: RemoteRig
    waits = True
    # Of what only other bodies have: speeds that are kept.
    pace = None

    def __init__(
        self,
        rig: RemoteRig,
        number: int,
        kind: str,
        start: Callable[[], CardProcess],
        links: Callable[[], Sequence[LinkEnd]],
    ) -> None:
        self.number = number
        self._rig = rig
        self._kind = kind
        self._start = start
        self._links = links
        self._released = False
        self._process: CardProcess | None = None
        # One request at a time; whoever finds the card lost keeps it so.
        self._turn = threading.RLock()
        self._begin()

    def _begin(self) -> None:
        """Start the process, which must be done by the thread that the card is to end with."""
        self._lost: CardLostError | None = None
        self._greeted = False
        self._told = wire.Completions()
        # The sizes of what each queued step brings back, oldest first.
        self._sizes: deque[tuple[int, ...]] = deque()
        self._process = self._start()

    @property
    def greeted(self) -> bool:
        """Whether it has been, or is being, greeted: from then on it is told of new links."""
        return self._greeted

    def greet(self) -> None:
        """Unless that has been done, wait until the process says what it is, in an emulator a tenth
        of a second, and tell it of its links.  In any thread.  Raises CardLostError and
        FirmwareError, and has ended it then."""
        with self._turn:
            if self._greeted:
                return
            self._greeted = True
            try:
                self._info = self._hello()
                for end in self._links():
                    self.attach(end)
            except BaseException as error:
                why = str(error).removeprefix(f"card {self.number}: ")
                self._lose(f"greeting it: {why}", at_once=True)
                raise

    def _hello(self) -> DeviceInfo:
        size = ffi.sizeof("struct spk_wire_hello")
        body = self._ask(
            "greeting it", lib.SPK_WIRE_HELLO, wire.packed("uint32_t", wire.VERSION), size
        )
        h = wire.structure("spk_wire_hello", body)
        abi = (h.abi_major, h.abi_minor)
        if (h.version, abi[0]) != (wire.VERSION, ABI_VERSION[0]) or abi > ABI_VERSION:
            raise FirmwareError(
                f"card {self.number}: its firmware has version {abi[0]}.{abi[1]} of the card's "
                f"interface and {h.version} of the protocol, this Spanker knows "
                f"{ABI_VERSION[0]}.{ABI_VERSION[1]} and {wire.VERSION}",
                card=self.number,
            )
        return DeviceInfo(
            name=f"{self._kind}{self.number}",
            serial=h.serial,
            isa=ffi.string(h.isa).decode("ascii", "replace"),
            semantics_version=h.semantics,
            ddr_bytes=h.ddr_bytes,
            programs_max=h.programs_max,
        )

    @property
    def info(self) -> DeviceInfo:
        self.greet()
        if self._lost is not None:
            raise again(self._lost)
        return self._info

    @property
    def closed(self) -> bool:
        return self._process is None

    @property
    def process(self) -> CardProcess:
        """The running process; CardLostError after close."""
        if self._process is None:
            raise CardLostError(f"card {self.number} is closed", card=self.number)
        return self._process

    @property
    def completion_fd(self) -> int | None:
        return self.process.events.fileno()

    # --- requests -----------------------------------------------------------------------

    def _ask(
        self,
        doing: str,
        kind: int,
        body: Buffer,
        expected: int = 0,
        data: Buffer = b"",
        at_least: int | None = None,
        files: Sequence[int] = (),
    ) -> bytearray:
        """The body of the reply, of `expected` bytes, to a request whose body ends with `data`."""
        status, command, answer = self._exchange(doing, kind, body, expected, data, at_least, files)
        if status != lib.SPK_OK:
            if kind == lib.SPK_WIRE_LOAD:
                doing = f"program refused at command {command}"
            self._check(status, doing, answer.decode("ascii", "replace"))
        return answer

    def _exchange(
        self,
        doing: str,
        kind: int,
        body: Buffer,
        expected: int,
        data: Buffer = b"",
        at_least: int | None = None,
        files: Sequence[int] = (),
    ) -> tuple[int, int, bytearray]:
        """Status, command and body of the reply."""
        nbytes = len(body) + len(data)
        if nbytes > wire.REQUEST_MAX:
            raise CardCommandError(
                f"card {self.number}: {doing}: {nbytes:,} bytes are too many for a card, which "
                f"takes {wire.REQUEST_MAX:,} at once",
                card=self.number,
            )
        with self._turn:
            self.greet()
            if self._lost is not None:
                raise again(self._lost)
            control, answer_s = self.process.control, self._rig.answer_s
            end = time.monotonic() + answer_s
            try:
                control.settimeout(answer_s)
                if files:
                    # Too few bytes to go in pieces.
                    socket.send_fds(control, [wire.request(kind, nbytes) + body], files)
                elif len(data) <= _TOGETHER_BYTES:
                    control.sendall(b"".join((wire.request(kind, nbytes), body, data)))
                else:
                    control.sendall(wire.request(kind, nbytes) + body)
                    control.sendall(data)
                head = self._receive(control, wire.HEADER_BYTES, end)
                reply = wire.reply(head, kind, expected, at_least)
                return reply.status, reply.command, self._receive(control, reply.nbytes, end)
            except TimeoutError:
                why = f"has not answered for {answer_s:.3g} s"
            except OSError:
                why = ""
            except RemoteProtocolError as error:
                why = f"has answered with {error}"
            raise again(self._lose(f"{doing}: the card {why or 'is gone'}", at_once=bool(why)))

    def _receive(self, control: socket.socket, nbytes: int, end: float) -> bytearray:
        data = bytearray(nbytes)
        left = memoryview(data)
        while left:
            control.settimeout(max(end - time.monotonic(), 1e-3))
            got = control.recv_into(left)
            if not got:
                raise ConnectionResetError
            left = left[got:]
        return data

    def _lose(self, what: str, at_once: bool = False) -> CardLostError:
        """With `_turn`, or when nobody else can be asking: the card is gone for good."""
        if self._lost is None:
            how = self.process.end(at_once)
            self._lost = CardLostError(
                f"card {self.number}: {what}: {how}; open it again, or go on without it",
                card=self.number,
            )
        return self._lost

    # --- memory -------------------------------------------------------------------------

    def alloc(self, nbytes: int) -> int:
        self._u64(nbytes, "size")
        doing = f"allocating {nbytes} bytes"
        body = wire.packed("uint64_t", nbytes)
        status, _, answer = self._exchange(doing, lib.SPK_WIRE_ALLOC, body, 4)
        if status == lib.SPK_E_NOMEM:
            c = self.counters()
            raise self._no_room(nbytes, c.ddr_total_bytes - c.ddr_used_bytes)
        self._check(status, doing)
        return int.from_bytes(answer, "little")

    def free(self, handle: int) -> None:
        self._u32(handle, "buffer")
        doing = f"freeing buffer {handle}"
        self._ask(doing, lib.SPK_WIRE_FREE, wire.packed("uint32_t", handle))

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        doing = f"writing {len(view)} bytes at {offset} of buffer {handle}"
        if len(view) > wire.DATA_MAX:
            # Before any of it is written.
            self._write(doing, handle, offset + len(view), view[:0])
        for at in range(0, max(len(view), 1), wire.DATA_MAX):
            self._write(doing, handle, offset + at, view[at : at + wire.DATA_MAX])

    def _write(self, doing: str, handle: int, offset: int, data: memoryview) -> None:
        body = self._range(handle, offset, len(data))
        self._ask(doing, lib.SPK_WIRE_WRITE, body, data=data)

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        self._u64(nbytes, "size")
        doing = f"reading {nbytes} bytes at {offset} of buffer {handle}"
        if nbytes <= wire.DATA_MAX:
            return bytes(self._read(doing, handle, offset, nbytes))
        # The bounds are checked before host memory is taken.
        self._read(doing, handle, offset + nbytes, 0)
        out = bytearray(nbytes)
        for at in range(0, nbytes, wire.DATA_MAX):
            piece = min(nbytes - at, wire.DATA_MAX)
            out[at : at + piece] = self._read(doing, handle, offset + at, piece)
        return bytes(out)

    def _read(self, doing: str, handle: int, offset: int, nbytes: int) -> bytearray:
        return self._ask(doing, lib.SPK_WIRE_READ, self._range(handle, offset, nbytes), nbytes)

    def _range(self, handle: int, offset: int, nbytes: int) -> bytes:
        self._u32(handle, "buffer")
        self._u64(offset, "offset")
        return wire.packed("struct spk_wire_range", handle, 0, offset, nbytes)

    # --- programs and steps -------------------------------------------------------------

    def load_program(self, program: Buffer) -> int:
        answer = self._ask("loading a program", lib.SPK_WIRE_LOAD, b"", 4, data=program)
        return int.from_bytes(answer, "little")

    def unload_program(self, program: int) -> None:
        self._u32(program, "program")
        doing = f"unloading program {program}"
        self._ask(doing, lib.SPK_WIRE_UNLOAD, wire.packed("uint32_t", program))

    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        self._u32(program, "program")
        doing = f"step of program {program} refused"
        why = "it has no windows" if lent else ""
        if len(reads) > READS_MAX:
            why = f"{len(reads)} reads, expected at most {READS_MAX}"
        if why:
            raise CardCommandError(f"card {self.number}: {doing}: {why}", card=self.number)
        body = [wire.packed("struct spk_wire_submit", program, len(reads))]
        for handle, offset, nbytes in reads:
            self._u64(nbytes, "size")
            body.append(self._range(handle, offset, nbytes))
        answer = self._ask(doing, lib.SPK_WIRE_SUBMIT, b"".join(body), 8, data=parameters)
        fence = int.from_bytes(answer, "little")
        sizes = tuple([nbytes for _, _, nbytes in reads])
        self._sizes.append(sizes)
        self._told.expect(fence, sum(sizes))
        return fence

    @property
    def outstanding(self) -> int:
        return len(self._sizes)

    def completions(self) -> Sequence[Completion]:
        events = self.process.events
        out: list[Completion] = []
        try:
            while True:
                data = events.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
                if not data:
                    raise ConnectionResetError
                out += [self._completion(told) for told in self._told.feed(data)]
        except BlockingIOError:
            return out
        except OSError:
            what, at_once = "the card is gone", False
        except RemoteProtocolError as error:
            what, at_once = f"it tells of completions with {error}", True
        # Nobody waits for whoever waits for its answer.  Where it has ended, this changes nothing.
        self.cut_short()
        with self._turn:
            lost = self._lose(what, at_once)
        out += [Completion(fence, 0, again(lost)) for fence in self._told.expected]
        self._told = wire.Completions()
        self._sizes.clear()
        if not out:
            # Its descriptor stays readable: nobody is to look at it for ever.
            raise again(lost)
        return out

    def _completion(self, told: wire.Told) -> Completion:
        sizes = self._sizes.popleft()
        if told.status != lib.SPK_OK:
            error = self._failure(told.status, told.command)
            return Completion(told.fence, told.busy_ns, error)
        data, at = [], 0
        for nbytes in sizes:
            data.append(told.result[at : at + nbytes])
            at += nbytes
        return Completion(told.fence, told.busy_ns, None, tuple(data))

    def abort(self, epoch: int) -> None:
        self._u32(epoch, "epoch")
        doing = f"entering epoch {epoch}"
        self._ask(doing, lib.SPK_WIRE_ABORT, wire.packed("uint32_t", epoch))

    # --- what is told -------------------------------------------------------------------

    def counters(self) -> DeviceCounters:
        cards = len(self._rig.cards)
        first, each = ffi.sizeof("struct spk_counters"), ffi.sizeof("struct spk_wire_link")
        body = wire.packed("uint32_t", cards)
        answer = self._ask("counters", lib.SPK_WIRE_COUNTERS, body, first + cards * each)
        links = [wire.structure("spk_wire_link", answer, first + i * each) for i in range(cards)]
        return counters_of(
            wire.structure("spk_counters", answer),
            [(int(link.tx_bytes), int(link.rx_bytes)) for link in links],
            [peer for peer, link in enumerate(links) if is_down(link.state)],
        )

    def trace(self, events: int) -> None:
        self._u64(events, "number of events")
        doing = f"tracing {events} commands"
        self._ask(doing, lib.SPK_WIRE_TRACE, wire.packed("uint64_t", events))

    def trace_events(self, most: int) -> tuple[bytes, int]:
        self._u64(most, "number of events")
        parts: list[bytes] = []
        while True:
            wanted = min(most, wire.EVENTS_MAX)
            answer = self._ask(
                "taking trace events",
                lib.SPK_WIRE_EVENTS,
                wire.packed("uint32_t", wanted),
                8 + wanted * TRACE_EVENT.size,
                at_least=8,
            )
            parts.append(bytes(answer[8:]))
            count = len(parts[-1]) // TRACE_EVENT.size
            most -= count
            if not most or count < wanted:
                return b"".join(parts), int.from_bytes(answer[:8], "little")

    # --- links --------------------------------------------------------------------------

    def attach(self, end: LinkEnd) -> None:
        """For the rig: give it this end of a link, while nothing is queued."""
        self._ask(
            f"linking it with card {end.peer}",
            lib.SPK_WIRE_ATTACH,
            wire.packed("struct spk_wire_attach", end.peer, end.end, end.ring_bytes),
            files=(end.file,),
        )

    def detach(self, peer: int) -> None:
        """The same undone."""
        body = wire.packed("uint32_t", peer)
        self._ask(f"ending its link with card {peer}", lib.SPK_WIRE_DETACH, body)

    # --- fault injection, the end, and a new beginning -------------------------------------

    def _plant_fault(self, fault: int, command: int | None) -> None:
        at = (0, 0) if command is None else (1, command)
        self._ask(
            "planting a fault", lib.SPK_WIRE_PLANT, wire.packed("struct spk_wire_plant", fault, *at)
        )

    def _want_link(self, peer: int, up: bool) -> None:
        body = wire.packed("struct spk_wire_want", peer, int(up))
        self._ask(f"its link with card {peer}", lib.SPK_WIRE_LINK, body)

    def reopen(self) -> None:
        """A new process; a card of a fleet that is closed cannot be opened again."""
        if self._released:
            raise CardLostError(
                f"card {self.number} is closed with all cards of its fleet, and cannot be "
                f"reopened; open the fleet again",
                card=self.number,
            )
        self._end()
        self._begin()

    def cut_short(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def close(self) -> None:
        """The process ends; with the last card of a rig that nobody holds goes what all of them
        need."""
        if self._process is not None:
            self._end()
            if not self._rig.held and all(card.closed for card in self._rig.cards):
                self._rig.close()

    def release(self) -> None:
        """For the rig: it is not opened again.  Idempotent."""
        self._released = True
        self._end()
