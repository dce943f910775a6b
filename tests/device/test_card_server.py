# SPDX-License-Identifier: Apache-2.0
"""The card server as a host sees it through its sockets, good messages and bad ones.

The server is built with the address and undefined-behaviour sanitizers: a test also fails where one
of them has something to say, or anything leaks.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import vfio_user as vu
from conformance_rigs import DDR_BYTES, collect, make_program, soft_rig, step
from vfio_user import Client, HostCard, Refused, sail

from spanker.kernels import program as op
from spanker.kernels.formats import Format
from spanker.kernels.program import Ref, Transfer
from spanker.native import lib

PROGRAM = vu.ROOT / "build/spanker-card-server-sanitized"


@pytest.fixture(scope="session")
def server_program() -> Path:
    if not shutil.which(os.environ.get("CC", "cc").split()[0]):
        pytest.skip("needs a C compiler")
    command = [sys.executable, "tools/build_card_server.py", "--sanitize", str(PROGRAM)]
    built = subprocess.run(command, cwd=vu.ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return PROGRAM


class Server:
    def __init__(self, program: Path, directory: Path, cards: int, *options: str) -> None:
        self.directory = directory
        command = [program, "--dir", directory, "--cards", str(cards), "--ddr", str(DDR_BYTES)]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"ready: {cards} cards in {directory}\n", line + self.end()

    def socket(self, card: int = 0) -> Path:
        return self.directory / f"card{card}.sock"

    def host(self, card: int = 0, **options: int) -> HostCard:
        return HostCard(self.socket(card), **options)

    def client(self, greet: bool = True) -> Client:
        return Client(self.socket(), greet)

    def end(self) -> str:
        """Stops it; what it had to say."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=20)
        return str(said)

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def make_server(server_program: Path, tmp_path: Path) -> Iterator[object]:
    servers: list[Server] = []

    def make(cards: int = 1, *options: str) -> Server:
        directory = tmp_path / f"server{len(servers)}"
        directory.mkdir()
        servers.append(Server(server_program, directory, cards, *options))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.returncode is None:
            said = server.end()
            assert (server.process.returncode, said) == (0, "")
        assert not list(server.directory.iterdir()), "sockets are left"


@pytest.fixture
def server(make_server) -> Server:  # type: ignore[no-untyped-def]
    made: Server = make_server(1, "--faults")
    return made


def until(condition, timeout_s: float = vu.WAIT_S) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- a host at work ---------------------------------------------------------------------


def test_a_card_says_who_it_is(make_server) -> None:  # type: ignore[no-untyped-def]
    server = make_server(2)
    with server.host(0) as a, server.host(1) as b:
        assert a.get("REG_MAGIC") == sail("MAGIC")
        assert a.get("REG_CAPABILITIES") & sail("CAP_EMULATED")
        assert not a.get("REG_CAPABILITIES") & sail("CAP_FAULTS")
        assert a.get64("REG_DDR_LO") == a.get64("REG_APERTURE_LO") == a.ddr_bytes == DDR_BYTES
        assert a.client.read(0, sail("REG_ISA"), 4) == b"scal"
        assert a.get("REG_SEMANTICS") == lib.SPK_SEMANTICS_VERSION
        assert b.get64("REG_SERIAL_LO") == a.get64("REG_SERIAL_LO") + 1
        assert a.link(1, "STATE") == sail("LINK_UP")
        assert a.link(1, "PEER_LO") == b.get("REG_SERIAL_LO")
    with server.host(0) as again:
        assert again.get64("REG_SERIAL_LO") + 1 == again.link(1, "PEER_LO")


K, ROWS, TOKENS = 64, 32, 3


def layer(me: int) -> tuple[bytes, dict[str, bytes]]:
    """A share of a layer on card `me` of two: norm, Q8, int4 product, gather, SwiGLU."""
    rng = np.random.default_rng(me)
    row = 4 * 2 * ROWS
    weights = (rng.integers(0, 0x3C, lib.spk_packed_bytes(Format.Q4_0, ROWS, K))).astype(np.uint8)
    buffers = {
        "x": np.random.default_rng(9).standard_normal(TOKENS * K).astype(np.float32).tobytes(),
        "norm": rng.standard_normal(K).astype(np.float32).tobytes(),
        "hidden": bytes(TOKENS * K * 4),
        "q8": bytes(TOKENS * K // 32 * 34),
        "weights": weights.tobytes(),
        "row": bytes(TOKENS * row),
        "out": bytes(TOKENS * row),
    }
    mine, other = Ref("row", row, 4 * ROWS * me), Ref("row", row, 4 * ROWS * (1 - me))
    made = make_program(
        op.rmsnorm(Ref("x", 4 * K), Ref("norm"), Ref("hidden", 4 * K), n=K, eps=1e-5),
        op.quantize(Ref("hidden", 4 * K), Ref("q8", K // 32 * 34), k=K),
        op.matmul(Format.Q4_0, Ref("weights"), Ref("q8", K // 32 * 34), mine, rows=ROWS, k=K),
        *op.exchange(
            [Transfer(True, 1 - me, mine, 4 * ROWS), Transfer(False, 1 - me, other, 4 * ROWS)]
        ),
        op.swiglu(Ref("row", row), Ref("row", row), Ref("out", row), n=2 * ROWS),
        tokens=TOKENS,
    )
    return made, buffers


def test_two_cards_compute_what_soft_cards_compute(make_server) -> None:  # type: ignore[no-untyped-def]
    soft = soft_rig(2, DDR_BYTES)
    expected = []
    try:
        for me, card in enumerate(soft.cards):
            made, buffers = layer(me)
            handles = {name: card.alloc(len(data)) for name, data in buffers.items()}
            for name, data in buffers.items():
                card.write(handles[name], 0, data)
            loaded = card.load_program(made.encode(handles))
            card.submit(loaded, step(TOKENS), [(handles["out"], 0, len(buffers["out"]))])
        for card in soft.cards:
            (done,) = collect(card, 1)
            assert done.error is None
            expected.append(bytes(done.data[0]))
    finally:
        soft.close()

    server = make_server(2)
    with server.host(0) as a, server.host(1) as b:
        for me, host in enumerate((a, b)):
            made, buffers = layer(me)
            table, at = [], 4096
            for data in buffers.values():
                host.ddr[at : at + len(data)] = data
                table.append((at, len(data)))
                at += len(data) + 4095 & ~4095
            handles = {name: i for i, name in enumerate(buffers)}
            done, why = host.load(5, made.encode(handles), table)
            assert done.status == 0, why
        for host in (a, b):
            out = len(buffers["out"])
            host.start(5, step(TOKENS), [(handles["out"], 0, out)])
        for me, host in enumerate((a, b)):
            assert host.take().status == 0
            assert host.result(out) == expected[me]
            assert any(expected[me])
            place = table[handles["out"]][0]
            assert host.ddr[place : place + out] == expected[me]
            assert host.link(1 - me, "TX_LO") == host.link(1 - me, "RX_LO") == TOKENS * 4 * ROWS


def test_rings_of_every_size_go_round(server: Server) -> None:
    for entries in (2, 16, 1024):
        with server.host(entries=entries) as host:
            for _ in range(2 * entries + 3):
                assert host.run("NOP").status == 0
            assert host.get("REG_COMMAND_HEAD") == 2 * entries + 3


def test_what_cannot_be_reached_is_an_error_and_not_the_end(server: Server) -> None:
    with server.host() as host:
        done = host.run("IMAGE", data=host.HOST + host.HOST_BYTES, data_bytes=64)
        assert done.status == sail("E_DMA")
        # Two pieces that lie side by side are one; a hole ends it.
        other = os.memfd_create("more")
        os.ftruncate(other, 4096)
        host.client.map(host.HOST + host.HOST_BYTES, 4096, other)
        end = host.HOST + host.HOST_BYTES + 4096
        assert host.run("IMAGE", data=end - 8192, data_bytes=8192).status == 0
        assert host.run("IMAGE", data=end - 8192, data_bytes=8193).status == sail("E_DMA")
        # A client that makes its memory shorter gets the same.
        os.ftruncate(other, 100)
        assert host.run("IMAGE", data=end - 4096, data_bytes=4096).status == sail("E_DMA")
        os.close(other)
        host.client.unmap(host.HOST + host.HOST_BYTES, 4096)
        assert host.run("IMAGE", data=end - 4096, data_bytes=1).status == sail("E_DMA")
        # Without its rings it can do nothing, and says so.
        host.set("REG_EVENTS_MASK", sail("EVENT_ALL"))
        host.client.write(vu.CONFIG, 4, struct.pack("<H", 2))  # no master any more
        host.put("NOP")
        until(lambda: host.get("REG_FAILURE") == sail("FAILURE_DMA"))
        assert os.eventfd_read(host.irqs[1])
        host.client.write(vu.CONFIG, 4, struct.pack("<H", 6))
        host.reset()
        host.enable()
        assert host.run("NOP").status == 0


def test_read_only_memory_is_not_written_to(server: Server) -> None:
    with server.host() as host:
        memory = os.memfd_create("constant")
        os.ftruncate(memory, 4096)
        host.client.map(1 << 44, 4096, memory, flags=1)
        host.client.map(1 << 45, 4096, memory, flags=2)
        assert host.run("IMAGE", data=1 << 44, data_bytes=4096).status == 0
        assert host.run("IMAGE", data=1 << 45, data_bytes=4096).status == sail("E_DMA")
        os.close(memory)


# --- resets, removal, reconnection --------------------------------------------------------


def test_the_next_client_finds_the_card_as_after_power_on(make_server) -> None:  # type: ignore[no-untyped-def]
    server = make_server(2, "--faults")
    with server.host(0) as host:
        host.ddr[:4] = b"mine"
        host.set_link(1, "CONTROL", 0)
        host.set("REG_EPOCH", 7)
        host.fault("HANG")
        host.put("NOP")
        fds = server.open_fds()
    for _ in range(20):
        with server.host(0, reset=False) as host:
            assert host.ddr[:4] == bytes(4)
            assert host.get("REG_GENERATION") == host.get("REG_EPOCH") == 0
            assert host.link(1, "STATE") == sail("LINK_UP")
            assert host.run("NOP").status == 0
            host.fault("GONE")
            assert host.get("REG_MAGIC") == host.get("REG_STATUS") == 0xFFFFFFFF
            assert host.client.read(vu.CONFIG, 0, 4) == b"\xff" * 4
            assert server.open_fds() <= fds
    with server.host(1) as other:
        assert other.run("NOP").status == 0


def test_a_second_client_waits_for_the_first(server: Server) -> None:
    with server.host() as first:
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(str(server.socket()))
        waiting.settimeout(0.2)
        waiting.sendall(vu.HEADER.pack(1, vu.VERSION, 23, 0, 0) + b"\0\0\1\0{}\0")
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        assert first.run("NOP").status == 0
    waiting.settimeout(vu.WAIT_S)
    assert waiting.recv(1)
    waiting.close()


@pytest.mark.parametrize("how", ["register", "function", "device"])
def test_every_kind_of_reset(server: Server, how: str) -> None:
    with server.host() as host:
        generation = host.get("REG_GENERATION")
        host.fault("HANG")
        host.put("NOP")
        if how == "register":
            host.set("REG_CONTROL", sail("CONTROL_RESET"))
        elif how == "function":
            control = host.client.read(vu.CONFIG, 0x68, 2)
            host.client.write(vu.CONFIG, 0x68, bytes([control[0], control[1] | 0x80]))
            assert host.client.read(vu.CONFIG, 0x68, 2) == bytes(2)
        else:
            host.client.call(vu.DEVICE_RESET)
        host.until("REG_STATUS", 0xFF, sail("STATUS_READY"))
        assert host.get("REG_GENERATION") == generation + 1
        assert host.get("REG_COMMAND_ENTRIES") == 0
        host.client.write(vu.CONFIG, 4, struct.pack("<H", 6))
        host.fence = 0
        host.enable()
        assert host.run("NOP").status == 0


def test_one_card_hangs_while_another_works(make_server) -> None:  # type: ignore[no-untyped-def]
    server = make_server(2, "--faults")
    with server.host(0) as hung, server.host(1) as well:
        hung.set("REG_EVENTS_MASK", sail("EVENT_ALL"))
        hung.set("REG_WATCHDOG_MS", 20)
        hung.fault("HANG")
        hung.put("NOP")
        until(lambda: hung.get("REG_STATUS") & sail("STATUS_FAILED"))
        assert hung.get("REG_FAILURE") == sail("FAILURE_WATCHDOG")
        assert os.eventfd_read(hung.irqs[1])
        for _ in range(10):
            assert well.run("NOP").status == 0
        hung.reset()
        hung.fence = 0
        hung.enable()
        assert hung.run("NOP").status == 0


def test_a_slow_card_and_a_flapping_link_take_their_time(make_server) -> None:  # type: ignore[no-untyped-def]
    server = make_server(2, "--faults")
    with server.host(0) as a, server.host(1) as b:
        b.set("REG_EVENTS_MASK", sail("EVENT_LINK"))
        a.fault("FLAP", 1)
        assert a.link(1, "STATE") == sail("LINK_DOWN")
        until(lambda: a.link(1, "STATE") == sail("LINK_UP"))
        until(lambda: b.get("REG_EVENTS") & sail("EVENT_LINK"))
        assert os.eventfd_read(b.irqs[1])
        a.fault("SLOW", 30000)
        begin = time.monotonic()
        a.run("NOP")
        assert time.monotonic() - begin >= 0.03


# --- PCI ------------------------------------------------------------------------------------


def test_configuration_space(server: Server) -> None:
    with server.client() as client:

        def bar_size(at: int) -> int:
            client.write(vu.CONFIG, at, b"\xff" * 4)
            mask = int.from_bytes(client.read(vu.CONFIG, at, 4), "little") & ~0xF
            return -mask & 0xFFFFFFFF

        space = client.read(vu.CONFIG, 0, 4096)
        assert space[:4] == struct.pack("<HH", sail("PCI_VENDOR"), sail("PCI_DEVICE"))
        assert int.from_bytes(space[9:12], "little") == sail("PCI_CLASS")
        assert (bar_size(0x10), bar_size(0x18), bar_size(0x20)) == (0x10000, DDR_BYTES, 4096)
        client.write(vu.CONFIG, 0x1C, b"\xff" * 4)
        assert client.read(vu.CONFIG, 0x1C, 4) == b"\xff" * 4
        assert client.read(vu.CONFIG, 0x14, 4) == client.read(vu.CONFIG, 0x24, 4) == bytes(4)
        # The capabilities, one behind the other.
        found, at = [], space[0x34]
        while at:
            found.append(space[at])
            at = space[at + 1]
        assert found == [0x11, 0x10]
        client.write(vu.CONFIG, 0, b"\0" * 4)
        assert client.read(vu.CONFIG, 0, 4) == space[:4]


def test_vectors_that_nobody_listens_to_stay_pending(server: Server) -> None:
    with server.host() as host:
        host.client.set_eventfds(0, 1, [])
        host.put("NOP")
        until(lambda: host.peek() is not None)
        assert host.client.read(4, 0x800, 4) == b"\1\0\0\0"
        listener = os.eventfd(0, os.EFD_NONBLOCK)
        host.client.set_eventfds(0, 1, [listener])
        assert os.eventfd_read(listener) == 1
        assert host.client.read(4, 0x800, 4) == bytes(4)
        os.close(listener)
        # The table is memory of the host's; what is behind it is not.
        host.client.write(4, 0, b"\x5a" * 40)
        assert host.client.read(4, 0, 40) == b"\x5a" * 32 + bytes(8)


def test_vectors_can_be_tried_without_work(server: Server) -> None:
    with server.host() as host:
        for flags, data in ((0x21, b""), (0x22, b"\1\1"), (0x22, b"\0\0")):
            host.client.call(8, struct.pack("<IIIII", 20, flags, vu.MSIX, 0, 2) + data)
            for irq in host.irqs:
                if data == b"\0\0":
                    with pytest.raises(BlockingIOError):
                        os.eventfd_read(irq)
                else:
                    assert os.eventfd_read(irq) == 1
        host.client.call(8, struct.pack("<IIIII", 20, 0x21, vu.MSIX, 0, 0))  # off
        host.put("NOP")
        until(lambda: host.peek() is not None)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(host.irqs[0])


# --- bad messages ------------------------------------------------------------------------


def irq(flags: int, index: int = 2, start: int = 0, count: int = 1) -> bytes:
    return struct.pack("<IIIII", 20, flags, index, start, count)


def dma(address: int, nbytes: int, flags: int = 3, offset: int = 0) -> bytes:
    return struct.pack("<IIQQQ", 32, flags, offset, address, nbytes)


REFUSED: list[tuple[str, int, bytes]] = [
    ("no such command", 99, b""),
    ("no such command", 0, b""),
    ("DMA_READ, which only servers send", 11, bytes(16)),
    ("a map without its fields", vu.DMA_MAP, dma(0, 4096)[:-1]),
    ("a map with too many", vu.DMA_MAP, dma(0, 4096) + b"\0"),
    ("a map of nothing", vu.DMA_MAP, dma(0, 0)),
    ("a map round the end", vu.DMA_MAP, dma(2**64 - 4096, 8192)),
    ("a map with an offset beyond any file", vu.DMA_MAP, dma(0, 4096, offset=2**63 - 1)),
    ("a map over another", vu.DMA_MAP, dma(HostCard.HOST + 4096, 4096)),
    ("a map with unknown flags", vu.DMA_MAP, dma(0, 4096, flags=8)),
    ("an unmap without its fields", vu.DMA_UNMAP, bytes(23)),
    ("an unmap of nothing", vu.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, 0)),
    ("an unmap of a part", vu.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, HostCard.HOST, 4096)),
    ("an unmap of all and a range", vu.DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 4096)),
    ("an unmap with a bitmap", vu.DMA_UNMAP, struct.pack("<IIQQ", 24, 1, 0, 4096)),
    ("no such region", vu.REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 9, 0, 0, 0)),
    ("a region's number cut", vu.REGION_INFO, bytes(11)),
    ("no such interrupt", vu.IRQ_INFO, struct.pack("<IIII", 16, 0, 5, 0)),
    ("an interrupt's number cut", vu.IRQ_INFO, bytes(11)),
    ("interrupts without fields", vu.SET_IRQS, bytes(19)),
    ("interrupts of no such kind", vu.SET_IRQS, irq(0x24, index=5)),
    ("interrupts of a kind that the card has not", vu.SET_IRQS, irq(0x24, index=0)),
    ("a vector too many", vu.SET_IRQS, irq(0x24, start=2)),
    ("vectors round the end", vu.SET_IRQS, irq(0x24, start=1, count=2**32 - 1)),
    ("data of two kinds", vu.SET_IRQS, irq(0x26)),
    ("masking", vu.SET_IRQS, irq(0x09)),
    ("too few bytes for the vectors", vu.SET_IRQS, irq(0x22)),
    ("a read without fields", vu.REGION_READ, bytes(15)),
    ("a read with data", vu.REGION_READ, vu.ACCESS.pack(0, 0, 4) + b"\0"),
    ("a read of no region", vu.REGION_READ, vu.ACCESS.pack(0, 1, 4)),
    ("a read behind the end", vu.REGION_READ, vu.ACCESS.pack(0x10000, 0, 4)),
    ("a read over the end", vu.REGION_READ, vu.ACCESS.pack(DDR_BYTES - 3, 2, 4)),
    ("a read round the end", vu.REGION_READ, vu.ACCESS.pack(2**64 - 4, 7, 8)),
    ("a read of too much", vu.REGION_READ, vu.ACCESS.pack(0, 2, 2**20 + 1)),
    ("a read of far too much", vu.REGION_READ, vu.ACCESS.pack(0, 2, 2**32 - 1)),
    ("a write of less than it says", vu.REGION_WRITE, vu.ACCESS.pack(0, 2, 5) + bytes(4)),
    ("a write of more than it says", vu.REGION_WRITE, vu.ACCESS.pack(0, 2, 3) + bytes(4)),
    ("a write behind the end", vu.REGION_WRITE, vu.ACCESS.pack(4096, 7, 4) + bytes(4)),
]


def test_requests_that_cannot_be_are_refused_and_nothing_changes(server: Server) -> None:
    with server.host() as host:
        before = server.open_fds()
        for what, command, payload in REFUSED:
            extra = os.memfd_create("extra")
            with pytest.raises(Refused):
                host.client.call(command, payload, [extra] if command == vu.DMA_MAP else [])
                pytest.fail(what)
            os.close(extra)
            assert host.run("NOP").status == 0, what
        assert server.open_fds() == before


def test_descriptors_of_the_wrong_kind(server: Server) -> None:
    with server.host() as host:
        before = server.open_fds()
        read_end, write_end = os.pipe()
        regular = os.memfd_create("regular")
        with pytest.raises(Refused):
            host.client.map(0, 4096, read_end)
        for fds in (
            [regular, regular],
            [write_end, write_end],
            [host.irqs[0], write_end],
            [regular],
        ):
            with pytest.raises(Refused):
                host.client.set_eventfds(0, 2, fds)
        assert host.run("NOP").status == 0
        # Memory that is not shared is remembered, and cannot be reached.
        host.client.map(0, 4096, None)
        assert host.run("IMAGE", data=0, data_bytes=64).status == sail("E_DMA")
        host.client.unmap(0, 4096)
        # Descriptors beside a message that has no use for them.
        assert host.client.call(vu.DEVICE_INFO, bytes(16), [regular] * 8)
        assert server.open_fds() == before
        for fd in (read_end, write_end, regular):
            os.close(fd)


def message(
    command: int, payload: bytes = b"", *, size: int | None = None, flags: int = 0
) -> bytes:
    size = vu.HEADER.size + len(payload) if size is None else size
    return vu.HEADER.pack(1, command, size, flags, 0) + payload


@pytest.mark.parametrize(
    "greet, data",
    [
        (False, message(vu.DEVICE_INFO)),
        (False, message(vu.VERSION)),
        (True, message(vu.VERSION, b"\0\0\1\0{}\0")),
        (True, message(vu.DEVICE_INFO, size=15)),
        (True, message(vu.DEVICE_INFO, size=0)),
        (True, message(vu.REGION_WRITE, size=2**20 + 4097)),
        (True, message(vu.REGION_WRITE, size=2**32 - 1)),
        (True, message(vu.DEVICE_INFO, flags=1)),
        (True, message(vu.DEVICE_INFO, flags=7)),
    ],
)
def test_whoever_breaks_the_protocol_is_disconnected(
    server: Server, greet: bool, data: bytes
) -> None:
    with server.client(greet) as client:
        client.send(data)
        with contextlib.suppress(ConnectionResetError):
            assert client.socket.recv(1) == b""
    with server.host() as host:
        assert host.run("NOP").status == 0


def test_too_many_descriptors_disconnect(server: Server) -> None:
    with server.host() as host:
        before = server.open_fds()
    with server.client() as client:
        client.send(message(vu.DEVICE_INFO), [0] * 20)
        with contextlib.suppress(ConnectionResetError):
            assert client.socket.recv(1) == b""
    with server.host() as host:
        assert server.open_fds() == before
        assert host.run("NOP").status == 0


def test_another_major_version_is_refused_and_may_try_again(server: Server) -> None:
    with server.client(False) as client:
        with pytest.raises(Refused):
            client.call(vu.VERSION, b"\1\0\0\0{}\0")
        assert client.call(vu.VERSION, b"\0\0\0\0{}\0")[:4] == bytes(4)


def test_messages_may_come_in_any_pieces(server: Server) -> None:
    with server.client() as client:
        data = message(vu.REGION_READ, vu.ACCESS.pack(0, 0, 4))
        for byte in data:
            client.send(bytes([byte]))
            time.sleep(0.001)
        assert client._receive(16 + 16 + 4, [])[-4:] == b"SAIL"
        client.send(data * 50)
        assert client._receive(50 * 36, [])[-4:] == b"SAIL"
        client.send(message(vu.REGION_WRITE, vu.ACCESS.pack(0, 2, 4) + b"here", flags=0x10))
        assert client.read(2, 0, 4) == b"here"
    for cut in range(1, len(data)):
        with server.client() as client:
            client.send(data[:cut])


def test_a_client_that_is_killed_in_the_middle_of_a_step(make_server) -> None:  # type: ignore[no-untyped-def]
    server = make_server(2)
    program = make_program(*op.exchange([Transfer(False, 1, Ref("in"), 64)]), tokens=1).encode(
        {"in": 0}
    )
    for _ in range(5):
        with server.host(0) as host:
            assert host.load(0, program, [(0, 64)])[0].status == 0
            host.start(0, step())
            until(lambda host=host: host.get("REG_WAITING") == 1)  # type: ignore[misc]


def test_random_messages_do_no_harm(server: Server) -> None:
    seed = 5
    rng = random.Random(seed)
    interesting = [0, 1, 4, 8, 63, 4096, 0xFFFF, 2**20, 2**32 - 1, 2**64 - 1, HostCard.HOST]
    for _ in range(25):
        with server.client() as client, contextlib.suppress(ConnectionError, OSError):
            client.socket.settimeout(2)
            for _ in range(40):
                words = [rng.choice(interesting) for _ in range(rng.randrange(6))]
                payload = struct.pack(f"<{len(words)}Q", *words) + bytes(rng.randrange(8))
                fds = [client.socket.fileno()] * rng.choice([0, 0, 0, 1, 2])
                with contextlib.suppress(Refused):
                    client.call(rng.randrange(2, 16), payload, fds)
            client.send(bytes(rng.randrange(256) for _ in range(rng.randrange(64))))
    with server.host() as host:
        assert host.run("NOP").status == 0, f"seed {seed}"


def test_random_registers_do_no_harm(server: Server) -> None:
    seed = 6
    rng = random.Random(seed)
    for _ in range(10):
        with server.host() as host:
            for _ in range(150):
                offset = rng.choice([rng.randrange(0x240), 0x1004, 0xF000, 0xF004]) & ~3
                value = rng.choice([0, 1, 2, 3, 16, 0xFFFFFFFF, rng.getrandbits(32)])
                host.client.write(0, offset, struct.pack("<I", value))
                host.client.read(0, rng.randrange(0x10000) & ~3, 4)
    with server.host() as host:
        assert host.run("NOP").status == 0, f"seed {seed}"


# --- the program itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "--dir and --cards are needed"),
        (["--dir", "/tmp", "--cards", "0"], "--cards takes 1 to 64, got 0"),
        (["--dir", "/tmp", "--cards", "65"], "--cards takes 1 to 64, got 65"),
        (["--dir", "/tmp", "--cards", "2x"], "got 2x"),
        (["--dir", "/tmp", "--cards", "1", "--ddr", "3000000"], "a power of two"),
        (["--dir", "/tmp", "--cards", "1", "--isa", "sparc"], "no instruction set sparc"),
        (["--dir", "/tmp", "--cards", "1", "more"], "nothing but options"),
        (["--unknown"], "unrecognized option"),
    ],
)
def test_bad_options(server_program: Path, options: list[str], said: str) -> None:
    done = subprocess.run([server_program, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr and "usage:" in done.stderr


def test_sockets_in_the_way(server: Server, server_program: Path, tmp_path: Path) -> None:
    def start(directory: Path) -> subprocess.CompletedProcess[str]:
        command = [server_program, "--dir", directory, "--cards", "1", "--ddr", "1048576"]
        return subprocess.run(command, capture_output=True, text=True)

    done = start(server.directory)
    assert done.returncode == 1 and "another server is there" in done.stderr
    with server.host() as host:
        assert host.run("NOP").status == 0
    (tmp_path / "card0.sock").write_text("")
    done = start(tmp_path)
    assert done.returncode == 1 and "no socket" in done.stderr
    done = start(tmp_path / "nowhere")
    assert done.returncode == 1 and "No such file" in done.stderr
    stale = tmp_path / "stale"
    stale.mkdir()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(stale / "card0.sock"))
    again = Server(server_program, stale, 1)
    assert (again.end(), again.process.returncode) == ("", 0)


def test_many_cards_serve_at_once(make_server) -> None:  # type: ignore[no-untyped-def]
    server = make_server(5, "--serial", "100")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with server.host(number) as host:
                assert host.get64("REG_SERIAL_LO") == 100 + number
                for _ in range(50):
                    assert host.run("NOP").status == 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
