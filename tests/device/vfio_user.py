# SPDX-License-Identifier: Apache-2.0
"""A host for the card server without QEMU: the client's end of vfio-user, and of the rings.

`Client` speaks the protocol, `HostCard` sets a card up as a driver would and runs commands on it.
Numbers come from the header that the driver is compiled with.
"""

from __future__ import annotations

import array
import itertools
import json
import mmap
import os
import re
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
WAIT_S = 20.0


def _constants(path: Path) -> dict[str, int]:
    """Every name of the header that stands for a number: of #define and of enum."""
    text = path.read_text()
    found: dict[str, int] = {}
    for name, value in re.findall(r"^#define (SAIL_\w+) ([^/\n]+)", text, re.M):
        value = value.strip()
        if re.fullmatch(r"[\w()<|+ ]+", value):
            found[name] = int(eval(value, {}, dict(found)))
    for name, value in re.findall(r"^\t(SAIL_\w+) = (\d+),", text, re.M):
        found[name] = int(value)
    return found


CONSTANTS = _constants(ROOT / "driver/include/spanker_card.h")


def sail(name: str) -> int:
    return CONSTANTS["SAIL_" + name]


HEADER = struct.Struct("<HHIII")
ACCESS = struct.Struct("<QII")
COMMAND = struct.Struct("<IIQQQQIIQQ")
COMPLETION = struct.Struct("<QQIIII")
BUFFER = struct.Struct("<QQ")
READ = struct.Struct("<IIQQ")

VERSION, DMA_MAP, DMA_UNMAP, DEVICE_INFO, REGION_INFO, IRQ_INFO = 1, 2, 3, 4, 5, 7
SET_IRQS, REGION_READ, REGION_WRITE, DEVICE_RESET = 8, 9, 10, 13
CONFIG = 7
MSIX = 2
EVENTFDS = 0x24  # the data are eventfds, the action is to trigger


class Refused(Exception):
    """An answer that is an error; `args[0]` is its errno."""


class Client:
    """One connection to a card's socket."""

    def __init__(self, path: Path, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(path))
        self._ids = itertools.count(1)
        if greet:
            version = self.call(VERSION, struct.pack("<HH", 0, 1) + b"{}\0")
            assert version[:4] == struct.pack("<HH", 0, 1)
            self.capabilities = json.loads(version[4:-1])["capabilities"]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [data], list(fds))

    def _receive(self, n: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < n:
            more, got, _, _ = socket.recv_fds(self.socket, n - len(data), 8)
            if not more:
                raise ConnectionError("the server has closed the connection")
            data += more
            fds += got
        return data

    def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        answer, got = self.call_fds(command, payload, fds)
        for fd in got:
            os.close(fd)
        return answer

    def call_fds(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> tuple[bytes, list[int]]:
        number = next(self._ids) & 0xFFFF
        self.send(HEADER.pack(number, command, HEADER.size + len(payload), 0, 0) + payload, fds)
        got: list[int] = []
        back, replied, size, flags, error = HEADER.unpack(self._receive(HEADER.size, got))
        assert (back, replied, flags & 0xF) == (number, command, 1)
        answer = self._receive(size - HEADER.size, got)
        assert bool(flags & 0x20) == bool(error)
        if error:
            raise Refused(error)
        return answer, got

    def read(self, region: int, offset: int, count: int) -> bytes:
        answer = self.call(REGION_READ, ACCESS.pack(offset, region, count))
        assert answer[: ACCESS.size] == ACCESS.pack(offset, region, count)
        return answer[ACCESS.size :]

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.call(REGION_WRITE, ACCESS.pack(offset, region, len(data)) + data)

    def map(
        self, address: int, nbytes: int, fd: int | None, offset: int = 0, flags: int = 3
    ) -> None:
        payload = struct.pack("<IIQQQ", 32, flags, offset, address, nbytes)
        self.call(DMA_MAP, payload, [] if fd is None else [fd])

    def unmap(self, address: int, nbytes: int, flags: int = 0) -> None:
        self.call(DMA_UNMAP, struct.pack("<IIQQ", 24, flags, address, nbytes))

    def set_eventfds(self, start: int, count: int, fds: Sequence[int]) -> None:
        self.call(SET_IRQS, struct.pack("<IIIII", 20, EVENTFDS, MSIX, start, count), fds)


@attrs.frozen
class Completed:
    fence: int
    busy_ns: int
    status: int
    detail: int
    index: int


class HostCard:
    """A card set up by a host with some memory of its own at `HOST` bytes up."""

    HOST = 0x1_0000_0000
    HOST_BYTES = 8 << 20
    COMMANDS, COMPLETIONS, HEAP = 0, 0x10000, 0x20000  # offsets in it

    def __init__(self, path: Path, entries: int = 16, reset: bool = True) -> None:
        self.client = Client(path)
        self.entries = entries
        self.memory_fd = os.memfd_create("host")
        os.ftruncate(self.memory_fd, self.HOST_BYTES)
        self.memory = mmap.mmap(self.memory_fd, self.HOST_BYTES)
        self.client.map(self.HOST, self.HOST_BYTES, self.memory_fd)
        info, fds = self.client.call_fds(REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 2, 0, 0, 0))
        self.ddr_bytes = struct.unpack("<IIIIQQ", info)[4]
        self.ddr = mmap.mmap(fds[0], self.ddr_bytes)
        os.close(fds[0])
        self.irqs = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.client.set_eventfds(0, 2, self.irqs)
        self.client.write(CONFIG, 4, struct.pack("<H", 6))  # memory, master
        self.tail = self.taken = self.fence = 0
        if reset:
            self.reset()
        self.enable()

    def close(self) -> None:
        self.client.close()
        self.memory.close()
        self.ddr.close()
        for fd in (self.memory_fd, *self.irqs):
            os.close(fd)

    def __enter__(self) -> HostCard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- registers ---

    def get(self, name: str, offset: int = 0) -> int:
        return int.from_bytes(self.client.read(0, sail(name) + offset, 4), "little")

    def set(self, name: str, value: int, offset: int = 0) -> None:
        self.client.write(0, sail(name) + offset, struct.pack("<I", value & 0xFFFFFFFF))

    def get64(self, name: str) -> int:
        low = self.get(name)
        return low | self.get(name, 4) << 32

    def link(self, i: int, field: str) -> int:
        at = 0x1000 + 0x40 * i + sail("LINK_" + field)
        return int.from_bytes(self.client.read(0, at, 4), "little")

    def set_link(self, i: int, field: str, value: int) -> None:
        at = 0x1000 + 0x40 * i + sail("LINK_" + field)
        self.client.write(0, at, struct.pack("<I", value))

    def until(self, name: str, mask: int, value: int) -> None:
        end = time.monotonic() + WAIT_S
        while self.get(name) & mask != value:
            assert time.monotonic() < end, f"{name} is {self.get(name):#x}"
            time.sleep(0.0005)

    def fault(self, name: str, argument: int = 0) -> None:
        self.set("REG_FAULT_ARG", argument)
        self.set("REG_FAULT", sail("FAULT_" + name))

    # --- rings ---

    def reset(self) -> None:
        self.set("REG_CONTROL", sail("CONTROL_RESET"))
        self.until("REG_STATUS", sail("STATUS_READY"), sail("STATUS_READY"))

    def set_ring(self, name: str, base: int, entries: int) -> None:
        self.set(f"REG_{name}_BASE_LO", base)
        self.set(f"REG_{name}_BASE_HI", base >> 32)
        self.set(f"REG_{name}_ENTRIES", entries)

    def enable(self) -> None:
        self.memory[self.COMPLETIONS : self.COMPLETIONS + 32 * self.entries] = bytes(
            32 * self.entries
        )
        self.tail = self.taken = 0
        self.set_ring("COMMAND", self.HOST + self.COMMANDS, self.entries)
        self.set_ring("COMPLETION", self.HOST + self.COMPLETIONS, self.entries)
        self.set("REG_CONTROL", sail("CONTROL_ENABLE"))

    def put(self, op: str | int, *, ring: bool = True, **fields: int) -> int:
        """One command into the ring; returns its fence."""
        self.fence = fields.get("fence", self.fence + 1)
        number = sail("OP_" + op) if isinstance(op, str) else op
        entry = COMMAND.pack(
            number,
            fields.get("program", 0),
            self.fence,
            fields.get("data", 0),
            fields.get("data_bytes", 0),
            fields.get("table", 0),
            fields.get("table_count", 0),
            fields.get("stream", 0),
            fields.get("result", 0),
            fields.get("result_bytes", 0),
        )
        at = self.COMMANDS + self.tail % self.entries * COMMAND.size
        self.memory[at : at + COMMAND.size] = entry
        self.tail += 1
        if ring:
            self.doorbell()
        return self.fence

    def doorbell(self) -> None:
        self.set("REG_COMMAND_TAIL", self.tail)

    def peek(self) -> Completed | None:
        at = self.COMPLETIONS + self.taken % self.entries * COMPLETION.size
        fields = COMPLETION.unpack(self.memory[at : at + COMPLETION.size])
        return Completed(*fields[:5]) if fields[4] == self.taken + 1 else None

    def take(self, timeout_s: float = WAIT_S) -> Completed:
        """The next completion, waiting for its interrupt."""
        end = time.monotonic() + timeout_s
        while (done := self.peek()) is None:
            left = end - time.monotonic()
            assert left > 0, "no completion"
            if select.select([self.irqs[0]], [], [], left)[0]:
                os.eventfd_read(self.irqs[0])
        self.taken += 1
        self.set("REG_COMPLETION_HEAD", self.taken)
        return done

    def run(self, op: str | int, **fields: int) -> Completed:
        fence = self.put(op, **fields)
        done = self.take()
        assert done.fence == fence
        return done

    # --- memory ---

    def place(self, data: bytes, at: int = 0) -> int:
        """Bytes in the host's memory; their address."""
        begin = self.HEAP + at
        self.memory[begin : begin + len(data)] = data
        return self.HOST + begin

    def placed(self, nbytes: int, at: int = 0) -> bytes:
        return self.memory[self.HEAP + at : self.HEAP + at + nbytes]

    def load(
        self, slot: int, program: bytes, table: Sequence[tuple[int, int]]
    ) -> tuple[Completed, str]:
        entries = array.array("B", b"".join(BUFFER.pack(*entry) for entry in table)).tobytes()
        done = self.run(
            "OP_LOAD"[3:],
            program=slot,
            data=self.place(program, 0x10000),
            data_bytes=len(program),
            table=self.place(entries, 0),
            table_count=len(table),
            result=self.place(bytes(256), 0x8000),
            result_bytes=256,
        )
        return done, self.placed(256, 0x8000).rstrip(b"\0").decode()

    def start(
        self,
        slot: int,
        parameters: bytes,
        reads: Sequence[tuple[int, int, int]] = (),
        result_bytes: int | None = None,
        at: int = 0x100000,
        **fields: int,
    ) -> int:
        """A RUN with its data `at` a place of the heap; what it reads comes 64 KiB behind."""
        table = b"".join(READ.pack(buffer, 0, offset, n) for buffer, offset, n in reads)
        total = sum(n for _, _, n in reads)
        return self.put(
            "RUN",
            program=slot,
            data=self.place(parameters, at),
            data_bytes=len(parameters),
            table=self.place(table, at + 0x8000),
            table_count=len(reads),
            result=self.HOST + self.HEAP + at + 0x10000,
            result_bytes=total if result_bytes is None else result_bytes,
            **fields,
        )

    def result(self, nbytes: int, at: int = 0x100000) -> bytes:
        return self.placed(nbytes, at + 0x10000)
