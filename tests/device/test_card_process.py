# SPDX-License-Identifier: Apache-2.0
"""A card that is a process: good requests, bad ones, and hosts that believe nothing it says.

The process is this machine's own, with address and undefined-behaviour sanitizers: a test also
fails where one of them has something to say, or anything leaks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import trio
import trio.testing
from conformance_rigs import adder, collect, finish, floats, make_program, sender, step, waiter
from crowd import Answers, Crowd, lost_cards
from waiting import until

import spanker
from spanker.actors import coordinator as coordinators
from spanker.actors.card import LARGE_WRITE_BYTES
from spanker.actors.message import FreeBuffer, WriteBuffers
from spanker.device import wire
from spanker.device.process import CardProcess, Launch
from spanker.device.remote import LinkEnd, RemoteCard
from spanker.device.riscv.emulator import Emulator
from spanker.device.riscv.processes import Launcher
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.soft import SoftCard, SoftCardSpec, SoftRig
from spanker.errors import (
    CardCommandError,
    CardHungError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    FirmwareError,
    RemoteProtocolError,
)
from spanker.kernels import program as op
from spanker.kernels.program import Ref, Transfer
from spanker.native import ffi, lib
from spanker.sched.bandwidth import REV_A
from spanker.sched.topology import Topology
from spanker.testing import faulty_fleet, nothing_leaked
from spanker.testing.assertions import open_descriptors

DDR_BYTES = 1 << 20
HEADER = struct.Struct("<IHHII")
COMPLETION = struct.Struct("<QQQII")
MAGIC = 0x574B5053
HELLO = HEADER.pack(MAGIC, 1, 0, 0, 4) + struct.pack("<I", wire.VERSION)


@attrs.frozen
class Here:
    """Starts the program as it is."""

    path: Path

    def launch(self, spec: RiscvCardSpec) -> Launch:
        return Launch((str(self.path),))

    def close(self) -> None: ...


class Sleeping:
    """Starts what never answers."""

    def __init__(self) -> None:
        self.started = False

    def launch(self, spec: RiscvCardSpec) -> Launch:
        self.started = True
        return Launch(("sh", "-c", "exec sleep 60", "--"))

    def close(self) -> None: ...


class Answer(NamedTuple):
    kind: int
    status: int
    body: bytes


class Raw:
    """A process, and frames as a test packs them."""

    def __init__(
        self, program: Path, *, isa: str | None = None, ddr_bytes: int = DDR_BYTES
    ) -> None:
        self.process = CardProcess(0, Launch((str(program),)), ddr_bytes, isa)

    def ask(self, kind: int, body: bytes = b"") -> Answer:
        self.process.control.sendall(HEADER.pack(MAGIC, kind, 0, 0, len(body)) + body)
        return self.answer()

    def answer(self) -> Answer:
        self.process.control.settimeout(20)
        head = self._exactly(HEADER.size)
        magic, kind, status, _, nbytes = HEADER.unpack(head)
        assert magic == MAGIC and kind & 0x8000
        return Answer(kind & 0x7FFF, status, self._exactly(nbytes))

    def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            got = self.process.control.recv(nbytes - len(data))
            assert got, self.process.end()
            data += got
        return data

    def descriptors(self) -> int:
        """How many it has open, once it answers."""
        self.process.control.sendall(HELLO)
        self.answer()
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self) -> str:
        """How it ends once its host has gone."""
        said = self.process.end()
        self.process.close()
        return said


@pytest.fixture
def raw(card_process: Path) -> Iterator[Raw]:
    made = Raw(card_process)
    yield made
    if made.process.events.fileno() >= 0:
        assert made.end() == "its process has ended with status 0"


@pytest.fixture
def rig(card_process: Path) -> Iterator[SoftRig]:
    with SoftRig([RiscvCardSpec(ddr_bytes=DDR_BYTES)] * 2, launcher=Here(card_process)) as made:
        yield made


@pytest.fixture
def card(rig: SoftRig) -> RemoteCard:
    card = rig.cards[0]
    assert isinstance(card, RemoteCard)
    return card


# --- requests ---------------------------------------------------------------------------

REQUESTS = {
    "hello": (1, struct.pack("<I", wire.VERSION), 64),
    "alloc": (2, struct.pack("<Q", 64), 4),
    "free": (3, struct.pack("<I", 0), 0),
    "write": (4, struct.pack("<IIQQ", 1, 0, 0, 4) + b"abcd", 0),
    "read": (5, struct.pack("<IIQQ", 1, 0, 0, 4), 4),
    "abort": (9, struct.pack("<I", 2), 0),
    "counters": (10, struct.pack("<I", 3), 80 + 3 * 24),
    "trace": (11, struct.pack("<Q", 10), 0),
    "events": (12, struct.pack("<I", 10), 8),
    "plant": (13, struct.pack("<III", 0, 0, 0), 0),
    "link": (14, struct.pack("<II", 1, 1), 0),
}


def test_the_structures_have_the_documented_sizes() -> None:
    sizes = {"header": 16, "hello": 64, "range": 24, "submit": 8, "link": 24, "plant": 12}
    sizes |= {"want": 8, "attach": 16, "completion": 32}
    for name, nbytes in sizes.items():
        assert ffi.sizeof(f"struct spk_wire_{name}") == nbytes
    assert ffi.sizeof("struct spk_counters") == 80 and ffi.sizeof("struct spk_read") == 24


def test_every_request_is_answered_with_the_documented_bytes(raw: Raw) -> None:
    raw.ask(2, struct.pack("<Q", 64)), raw.ask(2, struct.pack("<Q", 64))
    for name, (kind, body, nbytes) in REQUESTS.items():
        answer = raw.ask(kind, body)
        assert (name, answer.kind, answer.status, len(answer.body)) == (name, kind, 0, nbytes)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_body_of_another_length_is_refused_and_nothing_else(raw: Raw, name: str) -> None:
    kind, body, _ = REQUESTS[name]
    for wrong in (b"", body[:-1], body + b"\0", body[:1]):
        answer = raw.ask(kind, wrong)
        assert answer.status == lib.SPK_E_ARG and answer.body.startswith(b"a malformed request: ")
    assert raw.ask(1, struct.pack("<I", wire.VERSION)).status == 0


@pytest.mark.parametrize("kind", [0, 17, 64, 0x7FFF, 0x8001, 0xFFFF])
def test_an_unknown_request_is_refused(raw: Raw, kind: int) -> None:
    answer = raw.ask(kind, b"what?")
    assert (answer.status, answer.body) == (1, b"a malformed request: no such kind")


def test_another_version_of_the_protocol_is_refused(raw: Raw) -> None:
    answer = raw.ask(1, struct.pack("<I", 1))
    assert answer.status == 1
    assert answer.body == b"the host speaks version 1 of the protocol, the card 2"


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<IIQQ", 0, 0, 0, 1 << 40),
        struct.pack("<IIQQ", 0, 0, (1 << 64) - 1, 8) + bytes(8),
        struct.pack("<IIQQ", 7, 0, 0, 8) + bytes(8),
        struct.pack("<IIQQ", 0, 1, 0, 8) + bytes(8),
        struct.pack("<IIQQ", 0, 0, 0, 9) + bytes(8),
        struct.pack("<IIQQ", 0, 0, 60, 8) + bytes(8),
        struct.pack("<IIQQ", 0, 0, 0, (1 << 20) + 1) + bytes((1 << 20) + 1),
    ],
)
def test_a_write_that_reaches_out_is_refused(raw: Raw, body: bytes) -> None:
    raw.ask(2, struct.pack("<Q", 64))
    assert raw.ask(4, body).status != 0
    assert raw.ask(5, struct.pack("<IIQQ", 0, 0, 0, 64)).body == bytes(64)


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<II", 0, 9) + bytes(9 * 24),
        struct.pack("<II", 0, 2) + bytes(24),
        struct.pack("<II", 0, 0xFFFFFFFF),
        struct.pack("<II", 99, 0),
        struct.pack("<I", 0),
    ],
    ids=["nine reads", "a read is missing", "reads that wrap", "no such program", "short"],
)
def test_a_submission_that_makes_no_sense_is_refused(raw: Raw, body: bytes) -> None:
    assert raw.ask(8, body).status != 0


def test_a_seeded_host_without_sense_does_no_harm(card_process: Path) -> None:
    for seed in range(5):
        rng, raw = random.Random(seed), Raw(card_process)
        raw.ask(2, struct.pack("<Q", 4096))
        for _ in range(400):
            kind, nbytes = rng.randrange(20), rng.choice((0, 1, 4, 8, 12, 24, 32, 100, 5000))
            body = bytes(rng.choice((0, 0, 0, 1, 2, 255)) for _ in range(nbytes))
            if kind != 13:  # faults are for those who want them
                assert raw.ask(kind, body).kind == kind
        assert raw.end() == "its process has ended with status 0", f"seed {seed}"


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"GET / HTTP/1.1\r\n", "no frame: magic 20544547"),
        (HEADER.pack(MAGIC, 4, 0, 0, 8392705), "no frame: magic 574b5053, kind 4, 8392705 bytes"),
        (HEADER.pack(MAGIC, 4, 0, 0, 0xFFFFFFFF), "4294967295 bytes"),
    ],
)
def test_what_is_no_frame_ends_the_card_with_a_word(raw: Raw, frame: bytes, words: str) -> None:
    raw.process.control.sendall(frame)
    raw.process.control.settimeout(20)
    assert raw.process.control.recv(1) == b""
    said = raw.end()
    assert "status 1" in said and words in said


def test_a_host_that_goes_in_the_middle_of_a_frame_ends_the_card(card_process: Path) -> None:
    frame = HEADER.pack(MAGIC, 4, 0, 0, 28) + struct.pack("<IIQQ", 0, 0, 0, 4) + b"abcd"
    for length in (1, HEADER.size - 1, HEADER.size, len(frame) - 1):
        raw = Raw(card_process)
        raw.process.control.sendall(frame[:length])
        assert "the host is gone" in raw.end()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--isa=mmx",), "this card has no kernels for mmx"),
        (("--ddr=none",), "--ddr takes 64 to"),
        (("more",), "nothing but options"),
        (("--what",), "unrecognized option"),
    ],
)
def test_options_that_make_no_sense_are_named(
    card_process: Path, options: tuple[str, ...], words: str
) -> None:
    process = CardProcess(0, Launch((str(card_process), *options)), DDR_BYTES, None)
    process.control.settimeout(20)
    assert process.control.recv(1) == b""
    said = process.end()
    process.close()
    assert "status 1" in said and words in said


# --- completions ------------------------------------------------------------------------


def told(fence: int, result: bytes = b"", status: int = 0, **wrong: int) -> bytes:
    fields = {"magic": MAGIC, "kind": 64, "nbytes": 32 + len(result), "bytes": len(result)} | wrong
    head = HEADER.pack(fields["magic"], fields["kind"], 0, 0, fields["nbytes"])
    return head + COMPLETION.pack(fence, 7, fields["bytes"], status, 3) + result


def test_completions_come_out_whole_however_they_come_in() -> None:
    stream = told(1, b"abc") + told(2) + told(3, status=9) + told(4, bytes(5000))
    for piece in (1, 7, 47, 48, 4096, len(stream)):
        decoder = wire.Completions()
        for fence, nbytes in ((1, 3), (2, 0), (3, 100), (4, 5000)):
            decoder.expect(fence, nbytes)
        found = [
            t for at in range(0, len(stream), piece) for t in decoder.feed(stream[at:][:piece])
        ]
        assert [t.fence for t in found] == [1, 2, 3, 4] and decoder.expected == ()
        assert [t.result for t in found] == [b"abc", b"", b"", bytes(5000)]
        assert found[2].status == 9 and found[0].busy_ns == 7


@pytest.mark.parametrize(
    "stream",
    [
        told(2, b"abc"),
        told(1, b"abcd"),
        told(1, b""),
        told(1, b"a", status=9),
        told(1, b"abc", nbytes=36),
        told(1, b"abc", bytes=1 << 62),
        told(1, b"abc", kind=65),
        told(1, b"abc", magic=1),
        told(1, b"abc") + told(1, b"abc"),
    ],
    ids=["fence", "long", "short", "failed", "frame", "size", "kind", "magic", "twice"],
)
def test_completions_of_what_was_not_submitted_are_refused(stream: bytes) -> None:
    decoder = wire.Completions()
    decoder.expect(1, 3)
    with pytest.raises(RemoteProtocolError):
        decoder.feed(stream)


# --- cards that lie, stop, or die -------------------------------------------------------


class Liar:
    """Speaks for a card: `says` is what it answers to whatever comes first, then no more."""

    def __init__(self, says: bytes) -> None:
        self.control, self._control = socket.socketpair()
        self.events, self._events = socket.socketpair()
        self._control.sendall(says)
        self.ends = 0

    def end(self, at_once: bool = False) -> str:
        self.ends += 1
        return "it was killed"

    def close(self) -> None:
        for end in (self.control, self._control, self.events, self._events):
            end.close()


def hello(**wrong: int) -> bytes:
    fields = {"version": wire.VERSION, "major": 1, "minor": 0} | wrong
    body = struct.pack("<IHHIIQQ32s", *fields.values(), 1, 64, 5, DDR_BYTES, b"scalar")
    return HEADER.pack(MAGIC, 0x8001, 0, 0, len(body)) + body


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "has answered with no frame"),
        (HEADER.pack(MAGIC, 0x8002, 0, 0, 64), "kind 0x8002 where request 1"),
        (HEADER.pack(MAGIC, 1, 0, 0, 64), "kind 0x1 where"),
        (HEADER.pack(MAGIC, 0x8001, 0, 0, 65), "65 bytes answer request 1, expected 64 to 64"),
        (HEADER.pack(MAGIC, 0x8001, 1, 0, 256), "256 bytes answer request 1, expected 0 to 255"),
        (HEADER.pack(MAGIC, 0x8001, 0, 0, 0xFFFFFFFF), "4,294,967,295 bytes"),
        (hello()[:-1], "has not answered for"),
        (b"", "has not answered for"),
    ],
)
def test_a_card_that_answers_senselessly_or_not_is_lost(
    rig: SoftRig, says: bytes, words: str
) -> None:
    rig.answer_s = 0.2
    with contextlib.closing(Liar(says)) as liar:
        with pytest.raises(CardLostError, match=words):
            RemoteCard(rig, 0, "lying", lambda: liar, tuple).greet()  # type: ignore[arg-type,return-value]
        assert liar.ends


@pytest.mark.parametrize("wrong", [{"version": 1}, {"major": 2}, {"minor": 9}])
def test_firmware_of_another_interface_is_refused(rig: SoftRig, wrong: dict[str, int]) -> None:
    with contextlib.closing(Liar(hello(**wrong))) as liar:
        card = RemoteCard(rig, 0, "old", lambda: liar, tuple)  # type: ignore[arg-type,return-value]
        with pytest.raises(FirmwareError, match=r"this Spanker knows 1\.0 and 2"):
            card.greet()
        assert liar.ends
        with pytest.raises(CardLostError, match=r"card 0: greeting it: its firmware has version"):
            card.counters()


def test_a_stopped_process_is_lost_in_bounded_time(rig: SoftRig, card: RemoteCard) -> None:
    rig.answer_s = 0.3
    program, _, _ = adder(card)
    os.kill(card.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(CardLostError, match=r"has not answered for 0.3 s: it was killed"):
        card.submit(program, step())
    assert time.monotonic() - begin < 5
    with pytest.raises(CardLostError, match="has not answered"):
        card.counters()
    with pytest.raises(CardLostError, match="has not answered"):
        card.completions()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV"])
def test_what_a_dead_process_had_queued_is_lost_with_it(rig: SoftRig, how: str) -> None:
    card, other = rig.cards
    assert isinstance(card, RemoteCard)
    receive, _ = waiter(card, 1)
    fences = [card.submit(receive, step()) for _ in range(3)]
    os.kill(card.process.pid, signal.Signals[how])
    done = collect(card, 3)
    assert [c.fence for c in done] == fences
    for completion in done:
        assert isinstance(completion.error, CardLostError)
        # A sanitizer catches the second one, and says so.
        assert how in str(completion.error) or "AddressSanitizer" in str(completion.error)
    with pytest.raises(CardLostError, match="card 0"):
        card.alloc(64)
    program, x, _ = adder(other)
    other.submit(program, step())
    finish(other)
    assert floats(other, x, 1)[0] == 1


@pytest.mark.parametrize("at_work", [False, True])
def test_a_card_whose_process_died_can_be_opened_again(card_process: Path, at_work: bool) -> None:
    specs = [RiscvCardSpec(ddr_bytes=DDR_BYTES), SoftCardSpec(ddr_bytes=DDR_BYTES)]
    with SoftRig(specs, launcher=Here(card_process)) as rig:
        card = rig.cards[0]
        assert isinstance(card, RemoteCard)
        for epoch in (2, 3):
            if at_work:  # its last messages are left in the ring
                send, _ = sender(card, 1, 100_000)
                card.submit(send, step())
                finish(card)
            os.kill(card.process.pid, signal.SIGKILL)
            with pytest.raises(CardLostError):
                while True:
                    card.counters()
            card.reopen()
            assert card.counters().ddr_used_bytes == 0 and card.completions() == []
            for each in rig.cards:
                each.abort(epoch)
            everybody_exchanges(rig, epoch)


def everybody_exchanges(rig: SoftRig, mark: int) -> None:
    """Each card sends bytes to each other one."""
    for a, b in itertools.permutations(rig.cards, 2):
        send, out = sender(a, b.number)
        receive, into = waiter(b, a.number)
        a.write(out, 0, bytes([mark]) * 64)
        b.submit(receive, step())
        a.submit(send, step())
        finish(a)
        finish(b)
        assert b.read(into, 0, 64) == bytes([mark]) * 64


# --- links, and cards that join -----------------------------------------------------------

RING_BYTES = 1 << 18


@pytest.fixture
def link() -> Iterator[int]:
    file = lib.spk_link_create(RING_BYTES)
    yield file
    os.close(file)


def attach(raw: Raw, files: list[int], *fields: int) -> int:
    """The status of the answer."""
    body = struct.pack("<IIQ", *fields)
    socket.send_fds(raw.process.control, [HEADER.pack(MAGIC, 15, 0, 0, 16) + body], files)
    return raw.answer().status


def links_of(pid: int) -> int:
    """How many files of links a process maps."""
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:spanker-link")


def test_a_link_is_attached_once_and_detached(raw: Raw, link: int) -> None:
    pid, descriptors = raw.process.pid, raw.descriptors()
    for _ in range(2):
        assert attach(raw, [link], 3, 1, RING_BYTES) == lib.SPK_OK
        assert links_of(pid) == 1
        assert attach(raw, [link], 3, 2, RING_BYTES) == lib.SPK_E_ARG
        assert raw.ask(16, struct.pack("<I", 3)).status == lib.SPK_OK
        assert links_of(pid) == 0
        assert raw.ask(16, struct.pack("<I", 3)).status == lib.SPK_E_ARG
    assert raw.descriptors() == descriptors


@pytest.mark.parametrize(
    ("files", "fields"),
    [
        (0, (1, 1, RING_BYTES)),
        (1, (1 << 31, 1, RING_BYTES)),
        (1, (1, 0, RING_BYTES)),
        (1, (1, 3, RING_BYTES)),
        (1, (1, 1, RING_BYTES - 4096)),
        (1, (1, 1, 1 << 62)),
        (3, (1, 1, 0)),
    ],
)
def test_a_link_that_makes_no_sense_is_refused(
    raw: Raw, link: int, files: int, fields: tuple[int, ...]
) -> None:
    descriptors = raw.descriptors()
    assert attach(raw, [link] * files, *fields) == lib.SPK_E_ARG
    # Nor does a file stay that comes with what takes none.
    socket.send_fds(raw.process.control, [HELLO], [link])
    assert raw.answer().status == lib.SPK_OK
    assert raw.descriptors() == descriptors
    assert links_of(raw.process.pid) == 0


def test_a_card_at_work_takes_no_link(rig: SoftRig, link: int) -> None:
    card = rig.cards[0]
    assert isinstance(card, RemoteCard)
    receive, _ = waiter(card, 1)
    card.submit(receive, step())
    with pytest.raises(CardCommandError, match=r"linking it with card 3: busy"):
        card.attach(LinkEnd(3, link, 1, RING_BYTES))
    with pytest.raises(CardCommandError, match=r"ending its link with card 1: busy"):
        card.detach(1)


FAR, NEAR = RiscvCardSpec(ddr_bytes=DDR_BYTES), SoftCardSpec(ddr_bytes=DDR_BYTES)


def created(rig: SoftRig, spec: RiscvCardSpec | SoftCardSpec) -> SoftCard | RemoteCard:
    card = rig.create(spec)
    if isinstance(card, RemoteCard):
        card.greet()
    return card


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("first", [[FAR], [NEAR], [FAR, NEAR], [NEAR, FAR]])
@pytest.mark.parametrize("then", [[FAR, NEAR], [NEAR, FAR, FAR]])
def test_cards_of_both_kinds_join_each_other(
    first: list[RiscvCardSpec | SoftCardSpec],
    then: list[RiscvCardSpec | SoftCardSpec],
    card_process: Path,
) -> None:
    with SoftRig(first, launcher=Here(card_process)) as rig:
        for spec in then:
            card = created(rig, spec)
            rig.join(card)
            assert rig.cards[-1] is card and card.number == len(rig.cards) - 1
            for each in rig.cards:
                each.abort(len(rig.cards))
            everybody_exchanges(rig, len(rig.cards))
        # Whoever is opened again has all of its links, those that came later, too.
        for number, card in enumerate(rig.cards):
            card.close()
            card.reopen()
            for each in rig.cards:
                each.abort(10 + number)
            everybody_exchanges(rig, 10 + number)


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("spec", [FAR, NEAR])
def test_a_card_that_cannot_be_linked_leaves_nothing(
    spec: RiscvCardSpec | SoftCardSpec, card_process: Path, link: int
) -> None:
    with SoftRig([FAR, NEAR, FAR], launcher=Here(card_process)) as rig:
        far = [card for card in rig.cards if isinstance(card, RemoteCard)]
        before = open_descriptors()
        # Where the last one's link is to be there is one.
        far[1].attach(LinkEnd(3, link, 1, RING_BYTES))
        card = created(rig, spec)
        with pytest.raises(CardCommandError, match="card 2: linking it with card 3"):
            rig.join(card)
        rig.discard(card)
        assert len(rig.cards) == 3 and open_descriptors() == before
        assert [links_of(each.process.pid) for each in far] == [2, 2]
        again = created(rig, spec)
        rig.join(again)
        for each in rig.cards:
            each.abort(2)
        everybody_exchanges(rig, 2)


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_card_that_is_gone_is_linked_when_it_is_opened_again(card_process: Path) -> None:
    with SoftRig([FAR, FAR], launcher=Here(card_process)) as rig:
        gone = rig.cards[0]
        assert isinstance(gone, RemoteCard)
        os.kill(gone.process.pid, signal.SIGKILL)
        rig.join(rig.create(NEAR))
        gone.reopen()
        for each in rig.cards:
            each.abort(2)
        everybody_exchanges(rig, 2)


def test_a_soft_card_does_not_miss_what_comes_after_whoever_submitted_has_looked(
    card_process: Path,
) -> None:
    """Programs of a few bytes are begun by the thread that submits them, and no worker is woken."""
    with SoftRig([FAR, NEAR], launcher=Here(card_process)) as rig:
        far, near = rig.cards
        programs = []
        for card, peer in ((near, 0), (far, 1)):
            buffer = card.alloc(64)
            move = Transfer(card is far, peer, Ref("x"), 64, bulk=True)
            program = make_program(*op.exchange([move]), tokens=1).encode({"x": buffer})
            programs.append(card.load_program(program))
        for _ in range(10):
            near.submit(programs[0], step())
            far.submit(programs[1], step())
            finish(far)
            finish(near)


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_fleet_of_soft_cards_keeps_nothing_of_a_process_that_did_not_join(
    card_process: Path,
) -> None:
    closed = []

    class Watched(Sleeping):
        def close(self) -> None:
            closed.append(self)

    with SoftRig([NEAR], launcher=Watched(), answer_s=0.3) as rig:
        before = open_descriptors()
        card = rig.create(FAR)
        assert isinstance(card, RemoteCard)
        with pytest.raises(CardLostError, match=r"card 1: greeting it: the card"):
            card.greet()
        rig.discard(card)
        assert open_descriptors() == before and len(closed) == 1 and len(rig.cards) == 1
        rig.join(rig.create(NEAR))
        for each in rig.cards:
            each.abort(2)
        everybody_exchanges(rig, 2)


async def joining(fleet: spanker.Fleet, launcher: Launcher) -> None:
    """Add a card whose process `launcher` starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emulator, "find", lambda: launcher)
        await fleet.add(RiscvCardSpec(ddr_bytes=8 << 20))


@pytest.mark.usefixtures("nothing_left_behind")
async def test_generations_go_on_while_a_process_starts_and_it_can_be_cancelled(
    tiny: Path, expected: Answers
) -> None:
    with trio.fail_after(20):
        async with spanker.open_fleet("soft:2", hang_timeout_s=1000) as fleet:
            model = await fleet.load(tiny, plan="tp")
            sleeping, held = Sleeping(), open_descriptors()
            async with nothing_leaked(fleet), trio.open_nursery() as nursery:
                nursery.start_soon(joining, fleet, sleeping)
                await until(lambda: sleeping.started)
                assert await Crowd(model).run() == expected
                # Nor does a load wait for it.
                await (await fleet.load(tiny, plan="tp")).unload()
                assert len(open_descriptors()) > len(held)
                nursery.cancel_scope.cancel()
            assert len(fleet.cards) == len(fleet.devices) == 2 and fleet.events.history == ()
            assert await fleet.add("soft:1") == 2
            assert await Crowd(model).run() == expected


@pytest.mark.usefixtures("nothing_left_behind")
async def test_a_fleet_is_closed_while_a_process_starts() -> None:
    sleeping = Sleeping()
    async with nothing_leaked():
        with trio.fail_after(20), trio.CancelScope() as scope:
            async with (
                spanker.open_fleet("soft:2", hang_timeout_s=1000) as fleet,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(joining, fleet, sleeping)
                await until(lambda: sleeping.started)
                scope.cancel()
        assert scope.cancelled_caught


@pytest.mark.usefixtures("nothing_left_behind")
async def test_a_process_that_never_answers_does_not_join_and_another_one_does(
    tiny: Path, expected: Answers, card_process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(60):
        async with spanker.open_fleet("soft:2") as fleet:
            model = await fleet.load(tiny, plan="tp")
            with monkeypatch.context() as patch:
                patch.setattr(fleet._rig, "answer_s", 0.3)
                async with nothing_leaked(fleet):
                    with pytest.raises(CardLostError, match="card 2: greeting it"):
                        await joining(fleet, Sleeping())
            assert len(fleet.cards) == 2
            await joining(fleet, Here(card_process))
            assert len(fleet.cards) == 3 and model.plan.cards == (0, 1, 2)
            assert await Crowd(model).run() == expected
            # It is found out by whoever asks first.
            device = fleet.devices[2]
            assert isinstance(device, RemoteCard)
            os.kill(device.process.pid, signal.SIGKILL)
            assert [card.number for card in (await fleet.stats()).cards] == [0, 1]
            assert fleet.health().cards == (0, 1) and lost_cards(fleet) == [2]


# --- processes that stand still -----------------------------------------------------------

NEVER_S = 1000.0
Ask = Callable[[spanker.Fleet, spanker.Model, Path], Awaitable[None]]


@contextlib.asynccontextmanager
async def fleet_of_both(
    launcher: Launcher, hang_timeout_s: float = NEVER_S
) -> AsyncIterator[spanker.Fleet]:
    """A soft card, and a process that `launcher` starts."""
    specs = [attrs.evolve(NEAR, ddr_bytes=8 << 20), attrs.evolve(FAR, ddr_bytes=8 << 20)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emulator, "find", lambda: launcher)
        async with spanker.open_fleet(specs, hang_timeout_s=hang_timeout_s) as fleet:
            yield fleet


def process_of(fleet: spanker.Fleet) -> RemoteCard:
    card = fleet.devices[1]
    assert isinstance(card, RemoteCard)
    return card


def send(fleet: spanker.Fleet, what: signal.Signals) -> None:
    os.kill(process_of(fleet).process.pid, what)


async def decode(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await model.generate([1, 2, 3], max_tokens=3, ignore_eos=True).collect()


async def count(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await fleet.stats()


async def load(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await (await fleet.load(tiny, plan="tp")).unload()


async def large_write(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    coordinator, data = fleet._coordinator, bytes(2 * LARGE_WRITE_BYTES)
    [buffer] = await coordinator.allocate(1, [len(data)])
    await coordinator.ask(1, WriteBuffers(((buffer, 0, len(data)),), buffers=(data,)))
    await coordinator.ask(1, FreeBuffer(buffer))


async def join(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await fleet.add("soft:1")


ASKING = [decode, count, load, large_write, join]


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("ask", ASKING)
async def test_who_asks_a_process_that_stands_still_is_the_only_one_to_wait(
    ask: Ask,
    tiny: Path,
    expected: Answers,
    card_process: Path,
) -> None:
    with trio.fail_after(60):
        async with spanker.open_fleet(2) as other, fleet_of_both(Here(card_process)) as fleet:
            model, elsewhere = await fleet.load(tiny, plan="tp"), await other.load(tiny)
            send(fleet, signal.SIGSTOP)
            asked = trio.Event()

            async def wait() -> None:
                await ask(fleet, model, tiny)
                asked.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                assert await Crowd(elsewhere).run() == expected
                assert not asked.is_set()
                send(fleet, signal.SIGCONT)
            assert asked.is_set() and fleet.health().lost == ()
            assert await Crowd(model).run() == expected


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("ask", ASKING)
async def test_a_process_that_stands_still_is_lost_and_its_fleet_goes_on(
    ask: Ask,
    tiny: Path,
    expected: Answers,
    card_process: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinators, "STOP_S", 1.0)
    with trio.fail_after(60):
        async with fleet_of_both(Here(card_process), hang_timeout_s=1) as fleet:
            model = await fleet.load(tiny, plan="tp")
            send(fleet, signal.SIGSTOP)
            with contextlib.suppress(CardHungError, CardLostError):
                await ask(fleet, model, tiny)
            assert lost_cards(fleet) == [1]
            assert await Crowd(model).run() == expected
            await until(lambda: process_of(fleet).closed)
            await fleet.admit(1)
            assert await Crowd(model).run() == expected


@pytest.mark.usefixtures("nothing_left_behind")
async def test_a_process_that_dies_with_nothing_to_do_is_found_out_at_once(
    tiny: Path, expected: Answers, card_process: Path
) -> None:
    with trio.fail_after(60):
        async with fleet_of_both(Here(card_process)) as fleet:
            model = await fleet.load(tiny, plan="tp")
            send(fleet, signal.SIGKILL)
            await until(lambda: lost_cards(fleet) == [1])
            assert "SIGKILL" in str(fleet.events.history[0])
            assert await Crowd(model).run() == expected


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("ask", [None, decode, count])
async def test_a_fleet_ends_whose_process_stands_still(
    ask: Ask | None,
    tiny: Path,
    card_process: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinators, "STOP_S", 0.5)
    launcher = Here(card_process)
    with trio.fail_after(20), trio.CancelScope() as scope:
        async with fleet_of_both(launcher, 0.5) as fleet, trio.open_nursery() as nursery:
            model, process = await fleet.load(tiny, plan="tp"), process_of(fleet).process
            send(fleet, signal.SIGSTOP)
            if ask is not None:
                nursery.start_soon(ask, fleet, model, tiny)
                await trio.testing.wait_all_tasks_blocked(0.01)
            scope.cancel()
    assert scope.cancelled_caught and _state(process.pid) == ""


def never_answering() -> CardProcess:
    return CardProcess(1, Sleeping().launch(FAR), 8 << 20, None)


@pytest.mark.usefixtures("nothing_left_behind")
async def test_a_card_that_is_taken_back_keeps_nobody_waiting(
    tiny: Path, expected: Answers, card_process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(60):
        async with fleet_of_both(Here(card_process)) as fleet:
            model, card = await fleet.load(tiny, plan="tp"), process_of(fleet)
            send(fleet, signal.SIGKILL)
            assert await Crowd(model).run() == expected
            await until(lambda: card.closed)
            with monkeypatch.context() as patch:
                patch.setattr(card, "_start", never_answering)
                async with nothing_leaked(fleet), trio.open_nursery() as nursery:
                    nursery.start_soon(fleet.admit, 1)
                    await until(lambda: not card.closed)
                    assert await Crowd(model).run() == expected
                    nursery.cancel_scope.cancel()
                await until(lambda: card.closed)
            assert fleet.health().cards == (0,)
            await fleet.admit(1)
            assert await Crowd(model).run() == expected and model.plan.cards == (0, 1)


@pytest.mark.usefixtures("nothing_left_behind")
async def test_a_fleet_whose_process_never_starts_can_be_cancelled() -> None:
    sleeping, opened = Sleeping(), False
    async with nothing_leaked():
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def open_it() -> None:
                    nonlocal opened
                    async with fleet_of_both(sleeping):
                        opened = True

                nursery.start_soon(open_it)
                await until(lambda: sleeping.started)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
    assert not opened


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("faults", ["kill 1@step:3", "hang 1@step:3", "kill 1@command:3:5"])
async def test_a_process_fails_by_a_plan(
    faults: str, tiny: Path, expected: Answers, card_process: Path
) -> None:
    with trio.fail_after(60), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emulator, "find", lambda: Here(card_process))
        specs = [attrs.evolve(spec, ddr_bytes=8 << 20) for spec in (NEAR, FAR)]
        async with faulty_fleet(specs, faults, hang_timeout_s=1) as (fleet, injection):
            model = await fleet.load(tiny, plan="tp")
            assert await Crowd(model).run() == expected
            assert lost_cards(fleet) == [1] and injection.pending == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"throttle": REV_A}, "join no throttled fleet"),
        ({"topology": Topology.of_pairs(3, [(0, 1)])}, "join no fleet with a topology"),
    ],
)
def test_where_no_process_can_join(options: dict[str, Any], words: str) -> None:
    with SoftRig([NEAR] * 3, **options) as rig, pytest.raises(ConfigError, match=words):
        rig.create(FAR)


def test_more_memory_than_there_is_names_what_is_free(card: RemoteCard) -> None:
    card.alloc(DDR_BYTES - 4096)
    with pytest.raises(CardMemoryError, match=r"no room for 8,192 bytes .*: 4,096 of 1,048,576"):
        card.alloc(8192)


def test_large_pieces_go_over_in_several_requests(card_process: Path) -> None:
    with SoftRig([RiscvCardSpec(ddr_bytes=8 << 20)], launcher=Here(card_process)) as rig:
        card = rig.cards[0]
        data = np.random.default_rng(1).bytes(3 * wire.DATA_MAX + 5)
        buffer = card.alloc(len(data))
        card.write(buffer, 0, data)
        assert card.read(buffer, 0, len(data)) == data
        with pytest.raises(CardCommandError):
            card.write(buffer, 1, bytes(len(data)))
        assert card.read(buffer, 0, len(data)) == data, "nothing of it is written"
        with pytest.raises(CardCommandError, match="are too many for a card"):
            card.load_program(bytes(wire.REQUEST_MAX + 1))


async def test_a_process_ends_with_its_host(card_process: Path) -> None:
    raw = Raw(card_process)
    pid = raw.process.pid
    raw.process.control.close()
    await until(lambda: _state(pid) in ("Z", ""))
    raw.process.close()
    assert _state(pid) == ""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
