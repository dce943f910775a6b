# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of CardDevice: what every body of a card must do.

A body joins with one line in BODIES: how to make `count` linked cards with `ddr_bytes` each, as an
object with `.cards` and `.close()`.
"""

from __future__ import annotations

import itertools
import os
import random
import select
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import attrs
import numpy as np
import pytest

from spanker.device.base import CardDevice, Completion
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardFaultError,
    CardLostError,
    CardMemoryError,
)
from spanker.kernels import program as op
from spanker.kernels.formats import Format
from spanker.kernels.program import (
    COMMAND,
    PROGRAM_HEADER,
    STEP_HEADER,
    Command,
    Op,
    Program,
    Ref,
    SequenceStep,
    Transfer,
    encode_step,
)

DDR_BYTES = 1 << 20
WAIT_S = 20.0


class Rig(Protocol):
    @property
    def cards(self) -> Sequence[CardDevice]: ...
    def close(self) -> None: ...


MakeRig = Callable[..., Rig]

BODIES: dict[str, Callable[[int, int], Rig]] = {
    "soft": lambda count, ddr_bytes: SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)] * count),
}


@pytest.fixture(params=BODIES)
def make_rig(request: pytest.FixtureRequest) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(count: int = 1, ddr_bytes: int = DDR_BYTES) -> Rig:
        rigs.append(BODIES[request.param](count, ddr_bytes))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def card(make_rig: MakeRig) -> CardDevice:
    return make_rig(1).cards[0]


@pytest.fixture
def pair(make_rig: MakeRig) -> tuple[CardDevice, CardDevice]:
    a, b = make_rig(2).cards
    return a, b


# --- helpers ----------------------------------------------------------------------------


def readable(device: CardDevice, timeout_s: float) -> bool:
    assert device.completion_fd is not None
    poll = select.poll()
    poll.register(device.completion_fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def collect(device: CardDevice, count: int, timeout_s: float = WAIT_S) -> list[Completion]:
    """Exactly `count` completions, waiting for them as an actor would."""
    done: list[Completion] = []
    end = time.monotonic() + timeout_s
    while len(done) < count:
        done += device.completions()
        if len(done) < count and device.completion_fd is not None:
            left = end - time.monotonic()
            assert left > 0, f"{len(done)} of {count} completions after {timeout_s} s"
            readable(device, left)
    assert len(done) == count
    return done


def finish(device: CardDevice, count: int = 1) -> None:
    """Wait for `count` completions and raise the first error among them."""
    for completion in collect(device, count):
        if completion.error is not None:
            raise completion.error


def make_program(*commands: Command, tokens: int = 4, outputs: int = 4) -> Program:
    return Program(commands, tokens, min(outputs, tokens), positions_max=64)


def step(tokens: int = 1, outputs: int = 0) -> bytes:
    """Parameters of a step of so many tokens of one sequence, the first ones as outputs."""
    if not tokens:
        return encode_step([])
    return encode_step([SequenceStep([0] * tokens, 0, [], tuple(range(outputs)))])


def floats(device: CardDevice, handle: int, count: int) -> np.ndarray:
    return np.frombuffer(device.read(handle, 0, 4 * count), np.float32)


def adder(device: CardDevice, n: int = 16, tokens: int = 4) -> tuple[int, int, int]:
    """A program x += 1 over n floats per token; returns (program, buffer x, buffer of ones)."""
    x, ones = device.alloc(4 * n * tokens), device.alloc(4 * n * tokens)
    device.write(ones, 0, np.ones(n * tokens, np.float32).tobytes())
    made = make_program(op.add(Ref("x", 4 * n), Ref("y", 4 * n), n=n), tokens=tokens)
    return device.load_program(made.encode({"x": x, "y": ones})), x, ones


def waiter(device: CardDevice, peer: int, nbytes: int = 64) -> tuple[int, int]:
    """A program that waits for `nbytes` from a peer; returns (program, buffer)."""
    buffer = device.alloc(nbytes)
    commands = op.exchange([Transfer(False, peer, Ref("in"), nbytes)])
    return device.load_program(make_program(*commands, tokens=1).encode({"in": buffer})), buffer


def sender(device: CardDevice, peer: int, nbytes: int = 64) -> tuple[int, int]:
    buffer = device.alloc(nbytes)
    commands = op.exchange([Transfer(True, peer, Ref("out"), nbytes)])
    return device.load_program(make_program(*commands, tokens=1).encode({"out": buffer})), buffer


def position_data(card: int, rows: int, row_bytes: int) -> np.ndarray:
    """Bytes that differ by card, row and position, with no short period."""
    i = np.arange(rows * row_bytes, dtype=np.uint64) + np.uint64(card << 32)
    return ((i * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


# --- what a card says -------------------------------------------------------------------


def test_info_names_the_card_and_its_semantics(make_rig: MakeRig) -> None:
    cards = make_rig(2).cards
    assert [c.number for c in cards] == [0, 1]
    infos = [c.info for c in cards]
    assert infos[0].name != infos[1].name and infos[0].serial != infos[1].serial
    for info in infos:
        assert info.ddr_bytes == DDR_BYTES
        assert info.semantics_version == 1
        assert info.programs_max >= 8


# --- memory -----------------------------------------------------------------------------


def test_alloc_until_full_then_the_error_says_what_is_needed_and_free(card: CardDevice) -> None:
    piece = DDR_BYTES // 16
    handles = [card.alloc(piece) for _ in range(15)]
    card.alloc(piece - 64)
    assert card.counters().ddr_used_bytes == DDR_BYTES - 64
    with pytest.raises(CardMemoryError, match=r"card 0: no room for 65 bytes.*64 of 1,048,576"):
        card.alloc(65)
    assert card.alloc(64) not in handles
    with pytest.raises(CardMemoryError):
        card.alloc(1)
    assert card.counters().ddr_used_bytes == card.counters().ddr_total_bytes == DDR_BYTES


def test_used_bytes_are_whole_multiples_of_64(card: CardDevice) -> None:
    for nbytes, used in ((1, 64), (64, 128), (65, 256), (63, 320)):
        card.alloc(nbytes)
        assert card.counters().ddr_used_bytes == used


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 64], ids=["zero", "negative", "65 bits"])
def test_senseless_sizes_are_refused(card: CardDevice, nbytes: int) -> None:
    with pytest.raises(CardCommandError):
        card.alloc(nbytes)


@pytest.mark.parametrize("nbytes", [DDR_BYTES + 1, (1 << 64) - 1])
def test_more_than_the_card_has_is_refused(card: CardDevice, nbytes: int) -> None:
    with pytest.raises(CardMemoryError):
        card.alloc(nbytes)


def test_freed_memory_is_found_again_and_zeroed(card: CardDevice) -> None:
    sizes = (100, 5000, 64, 12345)
    handles = [card.alloc(n) for n in sizes]
    rest = card.alloc(DDR_BYTES - card.counters().ddr_used_bytes)
    for handle, n in zip(handles, sizes, strict=True):
        assert card.read(handle, 0, n) == bytes(n)
        card.write(handle, 0, b"\xff" * n)
    card.write(rest, 0, b"\xee" * 1000)
    for handle, n in zip(handles, sizes, strict=True):
        card.free(handle)
        again = card.alloc(n)
        assert card.read(again, 0, n) == bytes(n)
    assert card.read(rest, 0, 1000) == b"\xee" * 1000


@pytest.mark.parametrize("seed", range(5))
def test_buffers_never_touch_each_other(card: CardDevice, seed: int) -> None:
    rng = random.Random(seed)
    held: dict[int, bytes] = {}
    for _ in range(300):
        if held and rng.random() < 0.45:
            handle = rng.choice(list(held))
            assert card.read(handle, 0, len(held[handle])) == held.pop(handle)
            card.free(handle)
            continue
        nbytes = rng.choice((1, 63, 64, 65, 4096, rng.randrange(1, 40_000)))
        try:
            handle = card.alloc(nbytes)
        except CardMemoryError:
            continue
        assert handle not in held
        assert card.read(handle, 0, nbytes) == bytes(nbytes)
        held[handle] = rng.randbytes(nbytes)
        card.write(handle, 0, held[handle])
    for handle, data in held.items():
        assert card.read(handle, 0, len(data)) == data
    used = sum(-(-len(data) // 64) * 64 for data in held.values())
    assert card.counters().ddr_used_bytes == used


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 101),
        (100, 1),
        (101, 0),
        (50, 51),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
        (-1, 1),
    ],
)
def test_reads_and_writes_stay_within_their_buffer(
    card: CardDevice, offset: int, nbytes: int
) -> None:
    buffer, neighbour = card.alloc(100), card.alloc(100)
    card.write(buffer, 0, bytes(range(100)))
    with pytest.raises(CardCommandError):
        card.read(buffer, offset, nbytes)
    with pytest.raises(CardCommandError):
        card.write(buffer, offset, b"x" * nbytes)
    assert card.read(buffer, 0, 100) == bytes(range(100))
    assert card.read(neighbour, 0, 100) == bytes(100)


def test_a_read_far_beyond_the_buffer_takes_no_host_memory(make_rig: MakeRig) -> None:
    card = make_rig(1, 1 << 40).cards[0]
    buffer = card.alloc(64)
    begin = time.monotonic()
    with pytest.raises(CardCommandError):
        card.read(buffer, 0, 1 << 40)
    assert time.monotonic() - begin < 1


def test_edges_of_a_buffer_can_be_read_and_written(card: CardDevice) -> None:
    buffer = card.alloc(100)
    card.write(buffer, 99, b"z")
    card.write(buffer, 100, b"")
    assert card.read(buffer, 98, 2) == b"\0z"
    assert card.read(buffer, 100, 0) == b""
    card.write(buffer, 0, memoryview(bytearray(b"abc")))
    assert card.read(buffer, 0, 3) == b"abc"


@pytest.mark.parametrize("handle", [1, 999, 1 << 32, -1])
def test_unknown_buffers_are_refused(card: CardDevice, handle: int) -> None:
    card.alloc(64)
    for call in (
        lambda: card.free(handle),
        lambda: card.read(handle, 0, 1),
        lambda: card.write(handle, 0, b"x"),
    ):
        with pytest.raises(CardCommandError):
            call()


def test_a_buffer_cannot_be_used_or_freed_twice(card: CardDevice) -> None:
    buffer = card.alloc(64)
    card.free(buffer)
    for call in (lambda: card.free(buffer), lambda: card.read(buffer, 0, 1)):
        with pytest.raises(CardCommandError):
            call()


# --- programs ---------------------------------------------------------------------------


def test_a_program_runs_and_its_result_can_be_read(card: CardDevice) -> None:
    program, x, _ = adder(card)
    for _ in range(3):
        card.submit(program, step(tokens=2))
        finish(card)
    expected = np.repeat(np.float32([3, 3, 0, 0]), 16)
    assert np.array_equal(floats(card, x, 64), expected)


def test_a_name_without_a_buffer_is_refused_before_it_reaches_the_card() -> None:
    made = make_program(op.quantize(Ref("x", 128), Ref("nowhere", 34), k=32))
    with pytest.raises(CardCommandError, match=r"command 0 \(quantize\).*'nowhere'"):
        made.encode({"x": 0})


def buffers_for_refusals(card: CardDevice) -> dict[str, int]:
    sizes = {"x": 4 * 128, "w": 16 * 18 * 4, "small": 64, "kv": 2 * 2 * 16 * 16 * 2}
    return {name: card.alloc(n) for name, n in sizes.items()}


X, W, SMALL, KV = Ref("x", 128), Ref("w", 128), Ref("small", 16), Ref("kv")
TRANSFER = Command(Op.LINK_SEND, ((0, SMALL),), (1, 16))

REFUSED = {
    "unknown handle": (op.add(Ref("missing", 128), X, n=32), "names buffer 77"),
    "row beyond the end": (op.add(X, Ref("x", 128, 4), n=32), "needs 4 rows of 128 bytes"),
    "offset beyond the end": (op.add(X, Ref("x", 128, 1 << 40), n=32), "offset"),
    "offset that wraps": (op.add(X, Ref("x", 128, (1 << 64) - 64), n=32), "offset"),
    "stride beyond the end": (op.add(X, Ref("x", 132), n=32), "needs 4 rows"),
    "overlapping rows": (op.add(X, Ref("x", 124), n=32), "stride"),
    "misaligned offset": (op.add(X, Ref("x", 124, 2), n=16), "aligned to 4"),
    "misaligned stride": (op.add(X, Ref("x", 66), n=16), "aligned to 4"),
    "misaligned weights": (op.matmul(Format.F32, Ref("w", 0, 4), X, X, rows=1, k=1), "to 32"),
    "misaligned float activations": (
        op.matmul(Format.F32, W, Ref("x", 66), Ref("x", 64), rows=16, k=16),
        "aligned to 4",
    ),
    "weights too small": (op.matmul(Format.Q4_0, W, X, X, rows=65, k=32), "operand 0"),
    "weights that wrap": (
        op.matmul(Format.F32, W, SMALL, SMALL, rows=1 << 31, k=1 << 31),
        "beyond any card",
    ),
    "weight rows that wrap": (
        op.matmul(Format.F32, W, SMALL, SMALL, rows=(1 << 32) - 1, k=(1 << 32) - 1),
        "beyond any card",
    ),
    "k that cuts a block": (op.matmul(Format.Q4_0, W, X, X, rows=16, k=33), "cuts a block"),
    "unknown format": (Command(Op.MATMUL, ((0, W), (1, X), (3, X)), (16, 32), 7), "format"),
    "quantise part of a block": (op.quantize(X, X, k=31), "whole blocks"),
    "unknown operation": (Command(99), "unknown operation 99"),
    "operation zero": (Command(0), "unknown operation 0"),
    "rotation beyond the head": (op.rope(X, W, heads=1, head_dim=16, rope_dim=18), "rotated"),
    "odd rotation": (op.rope(X, W, heads=1, head_dim=16, rope_dim=3), "rotated"),
    "rotation table too small": (op.rope(X, W, heads=1, head_dim=16, rope_dim=16), "operand 1"),
    "heads that wrap": (
        op.rope(SMALL, W, heads=1 << 31, head_dim=1 << 31, rope_dim=2),
        "beyond any card",
    ),
    "KV pool too small": (
        op.kv_append(X, X, KV, kv_heads=1, head_dim=16, page_positions=16, pages=3),
        "operand 3",
    ),
    "page of 8 positions": (
        op.kv_append(X, X, KV, kv_heads=1, head_dim=16, page_positions=8, pages=1),
        "16n positions",
    ),
    "query heads without their KV head": (
        op.attention(
            X,
            KV,
            X,
            kv_heads=1,
            head_dim=16,
            page_positions=16,
            pages=1,
            heads=2,
            first_head=1,
            group=2,
            scale=1.0,
        ),
        "KV head",
    ),
    "no candidates": (op.top_k(X, X, n=16, k=0, first_id=0), "1 to 4096"),
    "too many candidates": (op.top_k(X, X, n=16, k=4097, first_id=0), "1 to 4096"),
    "candidates do not fit": (op.top_k(X, X, n=16, k=17, first_id=0), "operand 3"),
    "no vocabulary": (op.embed(Format.F32, X, X, columns=1, vocabulary=0), "vocabulary"),
    "transfer outside of an exchange": (TRANSFER, "outside an exchange"),
    "more transfers than follow": (Command(Op.EXCHANGE, args=(1,)), "more transfers"),
    "more transfers than fit into 32 bits": (Command(Op.EXCHANGE, args=(0xFFFFFFFF,)), "more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_programs_are_refused(make_rig: MakeRig, case: str) -> None:
    card = make_rig(2).cards[0]
    command, words = REFUSED[case]
    handles = {**buffers_for_refusals(card), "missing": 77}
    good = op.add(X, X, n=32)
    used = card.counters().ddr_used_bytes
    with pytest.raises(CardCommandError, match=words) as caught:
        card.load_program(make_program(good, command).encode(handles))
    # A refusal names the command and keeps nothing.
    assert "command 1" in str(caught.value)
    for name in buffers_for_refusals(card):
        card.free(handles[name])
    assert card.counters().ddr_used_bytes == used


@pytest.mark.parametrize("peer", [0, 2, 255, 256, 0xFFFFFFFF], ids="peer{}".format)
def test_a_transfer_to_a_card_without_a_link_is_refused(make_rig: MakeRig, peer: int) -> None:
    card = make_rig(2).cards[0]
    handles = {"x": card.alloc(64)}
    commands = op.exchange([Transfer(True, peer, Ref("x"), 16)])
    with pytest.raises(CardCommandError, match="peer without a link"):
        card.load_program(make_program(*commands, tokens=1).encode(handles))


def test_an_exchange_followed_by_something_else_is_refused(make_rig: MakeRig) -> None:
    card = make_rig(2).cards[0]
    handles = buffers_for_refusals(card)
    commands = (Command(Op.EXCHANGE, args=(2,)), TRANSFER, op.add(X, X, n=32))
    with pytest.raises(CardCommandError, match="no transfer"):
        card.load_program(make_program(*commands).encode(handles))
    # One transfer more than announced stands outside.
    commands = (Command(Op.EXCHANGE, args=(1,)), TRANSFER, TRANSFER)
    with pytest.raises(CardCommandError, match=r"command 2.*outside an exchange"):
        card.load_program(make_program(*commands).encode(handles))


def test_commands_that_disagree_about_the_step_are_refused(card: CardDevice) -> None:
    handles = buffers_for_refusals(card)
    kv = {"kv_heads": 1, "head_dim": 16, "page_positions": 16}
    for commands in (
        (op.kv_append(X, X, KV, pages=1, **kv), op.kv_append(X, X, KV, pages=2, **kv)),
        (
            op.embed(Format.F32, X, X, columns=1, vocabulary=3),
            op.embed(Format.F32, X, X, columns=1, vocabulary=4),
        ),
    ):
        with pytest.raises(CardCommandError, match=r"command 1.*disagrees"):
            card.load_program(make_program(*commands).encode(handles))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 0),
        (1, 2),
        (2, 0),
        (2, 2),
        (2, 0xFFFFFFFF),
        (3, 0),
        (3, 65537),
        (4, 5),
        (5, 0),
        (5, (1 << 24) + 1),
        (6, 1),
        (7, 1),
    ],
)
def test_program_headers_are_checked(card: CardDevice, field: int, value: int) -> None:
    handles = {"x": card.alloc(512)}
    good = make_program(op.add(X, X, n=32)).encode(handles)
    card.load_program(good)
    bad = bytearray(good)
    struct.pack_into("<I", bad, 4 * field, value)
    with pytest.raises(CardCommandError):
        card.load_program(bad)


def test_every_prefix_of_a_program_is_refused(card: CardDevice) -> None:
    handles = {"x": card.alloc(512)}
    good = make_program(op.add(X, X, n=32)).encode(handles)
    assert len(good) == PROGRAM_HEADER.size + COMMAND.size
    for length in range(len(good)):
        with pytest.raises(CardCommandError):
            card.load_program(good[:length])
    with pytest.raises(CardCommandError):
        card.load_program(good + b"\0")
    card.load_program(good)


def test_unknown_flags_are_refused(card: CardDevice) -> None:
    handles = {"x": card.alloc(512)}
    bad = bytearray(make_program(op.add(X, X, n=32)).encode(handles))
    struct.pack_into("<I", bad, PROGRAM_HEADER.size + 4, 2)
    with pytest.raises(CardCommandError, match="flags"):
        card.load_program(bad)


def test_random_programs_never_do_harm(card: CardDevice) -> None:
    """Every field at random: the card refuses the program, or runs it within its buffers."""
    rng = random.Random(7)
    handles = [card.alloc(n) for n in (64, 4096, 65536)]
    guard = card.alloc(4096)
    card.write(guard, 0, b"\x5a" * 4096)
    small = (0, 1, 2, 4, 16, 17, 31, 32, 64, 255, 256)
    huge = (65536, 1 << 31, (1 << 32) - 1, (1 << 32) - 16)
    accepted = 0
    for _ in range(4000):
        refs: list[int] = []
        for _ in range(4):
            stride = rng.choice((0, 4, 34, 64, 68, 128, 256, 1024, 65536))
            offset = rng.choice((0, 0, 0, 4, 32, 64, 4096, 1 << 20, (1 << 64) - 4))
            refs += [rng.choice(handles), stride, offset]
        # Exchanges need the far end: they have tests of their own.
        kind = rng.choice([o for o in Op if o < Op.EXCHANGE])
        numbers = [rng.choice(small if rng.random() < 0.9 else huge) for _ in range(14)]
        blob = PROGRAM_HEADER.pack(0x474B5053, 1, 1, rng.choice((1, 2, 4)), 1, 16)
        blob += COMMAND.pack(kind, rng.choice((0, 1, 2, 3, 8)), rng.choice((0, 1)), *refs, *numbers)
        try:
            program = card.load_program(blob)
        except CardCommandError:
            continue
        accepted += 1
        params = encode_step([SequenceStep([0], 0, [0], (0,))])
        try:
            card.submit(program, params)
        except CardCommandError:
            pass
        else:
            assert isinstance(collect(card, 1)[0].error, CardFaultError | None)
        card.unload_program(program)
    assert card.read(guard, 0, 4096) == b"\x5a" * 4096
    assert accepted > 100


def test_programs_beyond_the_cards_slots_are_refused(card: CardDevice) -> None:
    handles = {"x": card.alloc(512)}
    blob = make_program(op.add(X, X, n=32)).encode(handles)
    loaded = [card.load_program(blob) for _ in range(card.info.programs_max)]
    assert len(set(loaded)) == len(loaded)
    with pytest.raises(CardMemoryError, match="slots"):
        card.load_program(blob)
    card.unload_program(loaded[3])
    assert card.load_program(blob) == loaded[3]


def test_a_buffer_in_use_by_a_program_cannot_be_freed(card: CardDevice) -> None:
    program, x, ones = adder(card)
    for handle in (x, ones):
        with pytest.raises(CardCommandError):
            card.free(handle)
    card.submit(program, step())
    finish(card)
    card.unload_program(program)
    card.free(x)
    card.free(ones)
    assert card.counters().ddr_used_bytes == 0


@pytest.mark.parametrize("program", [1, 63, 64, 1 << 32, -1])
def test_unknown_programs_are_refused(card: CardDevice, program: int) -> None:
    adder(card)
    with pytest.raises(CardCommandError):
        card.unload_program(program)
    with pytest.raises(CardCommandError):
        card.submit(program, step())


def test_a_queued_program_cannot_be_unloaded(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    program, _ = waiter(a, 1)
    a.submit(program, step())
    with pytest.raises(CardCommandError):
        a.unload_program(program)
    send, _ = sender(b, 0)
    b.submit(send, step())
    finish(b)
    finish(a)
    a.unload_program(program)


# --- steps ------------------------------------------------------------------------------


@attrs.frozen
class Stepper:
    """A program that embeds (vocabulary 10), appends KV (3 pages of 16) and takes outputs."""

    card: CardDevice
    program: int

    def refuse(self, params: bytes, words: str) -> None:
        fences = self.card.counters().queued
        with pytest.raises(CardCommandError, match=words):
            self.card.submit(self.program, params)
        assert self.card.counters().queued == fences

    def run(self, params: bytes) -> None:
        self.card.submit(self.program, params)
        finish(self.card)


@pytest.fixture
def stepper(card: CardDevice) -> Stepper:
    sizes = {"table": 640, "x": 4 * 64, "out": 2 * 64, "kv": 3 * 16 * 16 * 2 * 2}
    handles = {name: card.alloc(n) for name, n in sizes.items()}
    x = Ref("x", 64)
    made = Program(
        (
            op.embed(Format.F32, Ref("table", 64), x, columns=16, vocabulary=10),
            op.kv_append(x, x, Ref("kv"), kv_heads=1, head_dim=16, page_positions=16, pages=3),
            op.select(x, Ref("out", 64), n=16),
        ),
        tokens_max=4,
        outputs_max=2,
        positions_max=40,
    )
    return Stepper(card, card.load_program(made.encode(handles)))


def test_steps_at_the_limits_are_taken(stepper: Stepper) -> None:
    stepper.run(encode_step([SequenceStep([9, 0, 1, 2], 36, [2, 0, 1], (3, 3))]))
    stepper.run(encode_step([SequenceStep([1], 0, [2]), SequenceStep([2], 31, [0, 1], (0,))]))
    stepper.run(encode_step([]))


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([SequenceStep([10], 0, [0])], "token id 0 is 10, must be below 10"),
        ([SequenceStep([0xFFFFFFFF], 0, [0])], "token id"),
        ([SequenceStep([1, 1], 39, [0, 1, 2])], "position of token 1 is 40, must be below 40"),
        ([SequenceStep([1], 16, [0])], "position of token 0 is 16, must be below 16"),
        ([SequenceStep([1], 0, [])], "position of token 0 is 0, must be below 0"),
        ([SequenceStep([1], 0, [3])], "page 0 is 3, must be below 3"),
        ([SequenceStep([1], 0, [0, 0xFFFFFFFF])], "page 1"),
        ([SequenceStep([1], 0, [0], (1,))], "output token 0 is 1, must be below 1"),
        ([SequenceStep([1] * 5, 0, [0])], "5 tokens"),
        ([SequenceStep([1] * 3, 0, [0], (0, 1, 2))], "3 outputs"),
        ([SequenceStep([], 0, [0])], "1 sequences"),
    ],
)
def test_steps_that_do_not_fit_are_refused(
    stepper: Stepper, sequences: list[SequenceStep], words: str
) -> None:
    stepper.refuse(encode_step(sequences), words)


def test_every_prefix_of_a_step_is_refused(stepper: Stepper) -> None:
    good = encode_step([SequenceStep([1, 2], 3, [0], (1,)), SequenceStep([3], 0, [1, 2])])
    for length in range(len(good)):
        stepper.refuse(good[:length], "parameter block")
    stepper.refuse(good + bytes(4), "parameter block")
    stepper.run(good)


def test_step_headers_and_indices_are_checked(stepper: Stepper) -> None:
    good = encode_step([SequenceStep([1, 2], 3, [0], (1,)), SequenceStep([3], 0, [1, 2])])
    words = STEP_HEADER.size // 4
    # Words behind the header: 3 ids, 3 positions, 3 sequences, 1 output, 1 temperature, then the
    # page index 0 1 3, then the pages 0 1 2.
    for index, value in (
        *((i, v) for i in (0, 1, 6, 7) for v in (7,)),
        *((i, v) for i in (2, 3, 4, 5) for v in (0, 7, 0xFFFFFFFF)),
        (words + 6, 2),
        (words + 11, 1),
        (words + 12, 4),
        (words + 13, 2),
        (words + 13, 4),
    ):
        bad = bytearray(good)
        struct.pack_into("<I", bad, 4 * index, value)
        stepper.refuse(bytes(bad), ".")
    stepper.run(good)


def test_a_step_beyond_the_cards_limit_is_refused(stepper: Stepper) -> None:
    stepper.refuse(bytes(4 << 20) + b"\0", "bytes of parameters")


def test_a_fault_completes_the_step_and_the_card_goes_on(card: CardDevice) -> None:
    x, out = card.alloc(128), card.alloc(34)
    made = make_program(op.quantize(Ref("x"), Ref("q"), k=32), tokens=1, outputs=0)
    program = card.load_program(made.encode({"x": x, "q": out}))
    for bad in (np.inf, -np.inf, np.nan):
        card.write(x, 0, np.full(32, bad, np.float32).tobytes())
        card.submit(program, step())
        with pytest.raises(CardFaultError, match="card 0, command 0: a NaN or an infinity"):
            finish(card)
    card.write(x, 0, np.ones(32, np.float32).tobytes())
    card.submit(program, step())
    finish(card)


# --- queue and completions --------------------------------------------------------------


def test_the_queue_is_bounded_and_usable_again(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    receive, _ = waiter(a, 1)
    send, _ = sender(b, 0)
    fences = []
    with pytest.raises(CardCommandError, match="queued"):
        for _ in range(100):
            fences.append(a.submit(receive, step()))
    assert 4 <= len(fences) < 100
    assert a.counters().queued == len(fences)
    for _ in fences:
        b.submit(send, step())
        finish(b)
    assert [c.fence for c in collect(a, len(fences))] == fences
    assert a.counters().queued == 0
    a.submit(receive, step())
    b.submit(send, step())
    finish(a)


def test_fences_grow_and_complete_in_order(card: CardDevice) -> None:
    long_one, _, _ = adder(card, n=8192, tokens=4)
    short_one, _, _ = adder(card, n=1, tokens=4)
    rng = random.Random(3)
    submitted: list[int] = []
    completed: list[int] = []
    for _ in range(200):
        while len(submitted) - len(completed) < 4:
            program = long_one if rng.random() < 0.3 else short_one
            submitted.append(card.submit(program, step(tokens=4)))
        readable(card, WAIT_S)
        completed += [c.fence for c in card.completions()]
    completed += [c.fence for c in collect(card, len(submitted) - len(completed))]
    assert completed == submitted == sorted(set(submitted))


def test_the_completion_fd_is_readable_exactly_when_completions_wait(card: CardDevice) -> None:
    if card.completion_fd is None:
        pytest.skip("this body finishes before submit returns")
    program, _, _ = adder(card)
    assert not readable(card, 0)
    for _ in range(300):
        card.submit(program, step())
        assert readable(card, WAIT_S)
        assert readable(card, 0), "stays readable until collected"
        finish(card)
        assert not readable(card, 0)
        assert card.completions() == []
    card.submit(program, step())
    card.submit(program, step())
    collect(card, 2)
    time.sleep(0.002)
    assert not readable(card, 0)


def test_busy_time_is_that_of_the_step(card: CardDevice) -> None:
    program, _, _ = adder(card, n=8192)
    begin = time.monotonic_ns()
    card.submit(program, step(tokens=4))
    (completion,) = collect(card, 1)
    assert 0 < completion.busy_ns <= time.monotonic_ns() - begin
    assert card.counters().busy_ns == completion.busy_ns


# --- counters ---------------------------------------------------------------------------


def test_commands_steps_and_ddr_bytes_are_counted(card: CardDevice) -> None:
    n = 256
    program, _, _ = adder(card, n=n)
    before = card.counters()
    assert before.commands == before.steps == before.ddr_read_bytes == 0
    for tokens in (3, 0, 4):
        card.submit(program, step(tokens=tokens))
        finish(card)
    after = card.counters()
    assert after.commands == 3
    assert after.steps == 3
    assert after.ddr_read_bytes == 7 * n * 8
    assert after.ddr_written_bytes == 7 * n * 4
    assert after.progress > before.progress
    assert after.waiting_for is None


def test_a_matmul_reads_its_weights_once_for_all_tokens(card: CardDevice) -> None:
    rows, k, tokens = 64, 64, 4
    weights = rows * k // 32 * 18
    handles = {
        "w": card.alloc(weights),
        "x": card.alloc(tokens * 68),
        "y": card.alloc(tokens * rows * 4),
    }
    made = make_program(
        op.matmul(Format.Q4_0, Ref("w"), Ref("x", 68), Ref("y", 4 * rows), rows=rows, k=k)
    )
    card.submit(card.load_program(made.encode(handles)), step(tokens=tokens))
    finish(card)
    counters = card.counters()
    assert counters.ddr_read_bytes == weights + tokens * 68
    assert counters.ddr_written_bytes == tokens * rows * 4


def test_waiting_for_names_the_peer(make_rig: MakeRig) -> None:
    cards = make_rig(3).cards
    program, _ = waiter(cards[1], 2)
    cards[1].submit(program, step())
    end = time.monotonic() + WAIT_S
    while cards[1].counters().waiting_for != 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    send, _ = sender(cards[2], 1)
    cards[2].submit(send, step())
    finish(cards[1])
    assert cards[1].counters().waiting_for is None


# --- links ------------------------------------------------------------------------------


def gather_programs(
    cards: Sequence[CardDevice], shares: Sequence[int], tokens: int, seed: int
) -> tuple[list[int], list[int]]:
    """Every card sends its share of each row to all others; (programs, buffers).

    The order of transfers is shuffled differently on every card: no order may deadlock.
    """
    rng = random.Random(seed)
    starts = [0, *itertools.accumulate(shares)]
    row = starts[-1]
    programs, buffers = [], []
    for me, card in enumerate(cards):
        transfers = []
        for peer in range(len(cards)):
            if peer != me:
                transfers.append(Transfer(True, peer, Ref("row", row, starts[me]), shares[me]))
                transfers.append(Transfer(False, peer, Ref("row", row, starts[peer]), shares[peer]))
        rng.shuffle(transfers)
        buffers.append(card.alloc(max(row, 1) * max(tokens, 1)))
        made = make_program(*op.exchange(transfers), tokens=max(tokens, 1), outputs=1)
        programs.append(card.load_program(made.encode({"row": buffers[-1]})))
    return programs, buffers


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("nbytes", [0, 1, 3, 64, 65535, 65536, 65537, 700_001])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_exchanges_of_every_size_arrive_whole(
    make_rig: MakeRig, count: int, nbytes: int, tokens: int
) -> None:
    # Uneven shares; 700,001 bytes exceed the ring of a link, let alone a message.
    shares = [max(nbytes - i, 0) if i % 2 else nbytes for i in range(count)]
    starts = [0, *itertools.accumulate(shares)]
    row = starts[-1]
    cards = make_rig(count, 16 << 20).cards
    programs, buffers = gather_programs(cards, shares, tokens, seed=nbytes)
    whole = position_data(0, tokens, row).reshape(tokens, row)
    for me, card in enumerate(cards):
        mine = np.zeros_like(whole)
        mine[:, starts[me] : starts[me + 1]] = whole[:, starts[me] : starts[me + 1]]
        card.write(buffers[me], 0, mine.tobytes())
    for card, program in zip(cards, programs, strict=True):
        card.submit(program, step(tokens=tokens))
    for card in cards:
        finish(card)
    for me, card in enumerate(cards):
        assert card.read(buffers[me], 0, whole.nbytes) == whole.tobytes()
        counters = card.counters()
        others = [p != me for p in range(count)]
        assert list(counters.link_tx_bytes) == [shares[me] * tokens * o for o in others]
        assert list(counters.link_rx_bytes) == [
            shares[p] * tokens * o for p, o in enumerate(others)
        ]


def test_many_exchanges_in_a_row_stay_in_step(make_rig: MakeRig) -> None:
    cards = make_rig(3, 16 << 20).cards
    sets = [gather_programs(cards, shares, 2, seed=1) for shares in ((5, 70_000, 1), (64, 64, 32))]
    for turn in range(40):
        programs, buffers = sets[turn % 2]
        shares = ((5, 70_000, 1), (64, 64, 32))[turn % 2]
        starts = [0, *itertools.accumulate(shares)]
        whole = position_data(turn, 2, starts[-1]).reshape(2, -1)
        for me, card in enumerate(cards):
            mine = np.zeros_like(whole)
            mine[:, starts[me] : starts[me + 1]] = whole[:, starts[me] : starts[me + 1]]
            card.write(buffers[me], 0, mine.tobytes())
            card.submit(programs[me], step(tokens=2))
        for me, card in enumerate(cards):
            finish(card)
            assert card.read(buffers[me], 0, whole.nbytes) == whole.tobytes()


def test_several_transfers_with_one_peer_keep_their_order(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    """A large message that fills the ring must not be overtaken by a small one behind it."""
    a, b = pair
    sizes = (300_000, 1, 250_000, 17)
    starts = [0, *itertools.accumulate(sizes)]
    refs = [Ref("x", 0, start) for start in starts[:-1]]
    handles = []
    programs = []
    for card, sending in ((a, True), (b, False)):
        handles.append(card.alloc(starts[-1]))
        transfers = [
            Transfer(sending, 1 - card.number, ref, size)
            for ref, size in zip(refs, sizes, strict=True)
        ]
        made = make_program(*op.exchange(transfers), tokens=1)
        programs.append(card.load_program(made.encode({"x": handles[-1]})))
    for turn in range(30):
        data = position_data(turn, 1, starts[-1]).tobytes()
        a.write(handles[0], 0, data)
        b.write(handles[1], 0, bytes(len(data)))
        b.submit(programs[1], step())
        a.submit(programs[0], step())
        finish(a)
        finish(b)
        assert b.read(handles[1], 0, len(data)) == data


def test_transfers_can_move_the_outputs_of_a_step(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    buffers = [card.alloc(4 * 10) for card in pair]
    data = position_data(1, 4, 10).tobytes()
    a.write(buffers[0], 0, data)
    for card, sending in ((a, True), (b, False)):
        transfer = Transfer(sending, 1 - card.number, Ref("x", 10), 10)
        made = make_program(*op.exchange([transfer], outputs=True))
        program = card.load_program(made.encode({"x": buffers[card.number]}))
        card.submit(program, step(tokens=4, outputs=2))
    finish(a)
    finish(b)
    assert b.read(buffers[1], 0, 40) == data[:20] + bytes(20)
    assert a.counters().link_tx_bytes == (0, 20)


# --- abort ------------------------------------------------------------------------------


def test_abort_completes_everything_queued_within_10_ms(make_rig: MakeRig) -> None:
    cards = make_rig(3).cards
    programs = [waiter(card, (card.number + 1) % 3)[0] for card in cards]
    took: list[float] = []
    for epoch in range(2, 22):
        fences = [[card.submit(programs[card.number], step()) for _ in range(3)] for card in cards]
        time.sleep(0.002)
        begin = time.monotonic()
        for card in cards:
            card.abort(epoch)
        for card, expected in zip(cards, fences, strict=True):
            done = collect(card, 3)
            assert [c.fence for c in done] == expected
            assert all(isinstance(c.error, CardAbortedError) for c in done)
        took.append(time.monotonic() - begin)
    # The middle one: this machine may have other things to do now and then.
    assert statistics.median(took) < 0.010, took


def test_abort_stops_a_long_computation(card: CardDevice) -> None:
    n, repeats = 8192, 4000
    x = card.alloc(4 * n * 4)
    command = op.swiglu(Ref("x", 4 * n), Ref("x", 4 * n), Ref("x", 4 * n), n=n)
    program = card.load_program(make_program(*[command] * repeats).encode({"x": x}))
    took = []
    for epoch in range(2, 7):
        card.submit(program, step(tokens=4))
        time.sleep(0.003)
        begin = time.monotonic()
        card.abort(epoch)
        (done,) = collect(card, 1)
        took.append(time.monotonic() - begin)
        assert isinstance(done.error, CardAbortedError)
    assert statistics.median(took) < 0.010, took


@pytest.mark.parametrize("epoch", [0, 1, 2, 1 << 32, -1])
def test_epochs_must_grow(card: CardDevice, epoch: int) -> None:
    card.abort(2)
    with pytest.raises(CardCommandError):
        card.abort(epoch)
    card.abort(3)


def test_what_is_submitted_after_an_abort_is_not_aborted(card: CardDevice) -> None:
    program, x, _ = adder(card, n=1)
    for epoch in range(2, 502):
        card.abort(epoch)
        card.submit(program, step())
        finish(card)
    assert floats(card, x, 1)[0] == 500


def test_an_exchange_right_after_an_abort_runs_in_the_new_epoch(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    """No card may send under the old epoch what it was given after the abort: its peer would drop
    it and wait for ever."""
    programs, buffers = gather_programs(pair, (100, 200), 1, seed=0)
    for epoch in range(2, 302):
        whole = position_data(epoch, 1, 300).tobytes()
        parts = (whole[:100] + bytes(200), bytes(100) + whole[100:])
        for card in pair if epoch % 2 else pair[::-1]:
            card.abort(epoch)
            card.write(buffers[card.number], 0, parts[card.number])
            card.submit(programs[card.number], step())
        for card in pair:
            finish(card)
            assert card.read(buffers[card.number], 0, 300) == whole


def test_messages_of_an_earlier_epoch_are_dropped(pair: tuple[CardDevice, CardDevice]) -> None:
    a, b = pair
    send, out = sender(a, 1, 100_000)
    receive, into = waiter(b, 0, 100_000)
    for epoch in range(2, 12):
        a.write(out, 0, b"old" * 33_333)
        a.submit(send, step())
        finish(a)
        for card in pair:
            card.abort(epoch)
        new = position_data(epoch, 1, 100_000).tobytes()
        a.write(out, 0, new)
        a.submit(send, step())
        b.submit(receive, step())
        finish(a)
        finish(b)
        assert b.read(into, 0, 100_000) == new


def test_an_abort_in_the_middle_of_an_exchange_leaves_nothing_behind(make_rig: MakeRig) -> None:
    cards = make_rig(3, 16 << 20).cards
    shares = (300_000, 299_999, 300_001)
    starts = [0, *itertools.accumulate(shares)]
    programs, buffers = gather_programs(cards, shares, 1, seed=9)
    rng = random.Random(5)
    for epoch in range(2, 22):
        for card in cards[: rng.randrange(1, 4)]:
            card.submit(programs[card.number], step())
        time.sleep(rng.random() * 0.002)
        for card in cards:
            card.abort(epoch)
        whole = position_data(epoch, 1, starts[-1]).tobytes()
        for me, card in enumerate(cards):
            queued = card.counters().queued
            # Aborted or finished before the abort: either way it comes back.
            while queued:
                queued = card.counters().queued
            card.completions()
            part = whole[starts[me] : starts[me + 1]]
            card.write(buffers[me], 0, bytes(len(whole)))
            card.write(buffers[me], starts[me], part)
        for card in cards:
            card.submit(programs[card.number], step())
        for me, card in enumerate(cards):
            finish(card)
            assert card.read(buffers[me], 0, len(whole)) == whole


def test_a_message_from_a_later_epoch_waits_until_the_receiver_is_there(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    send, out = sender(a, 1)
    receive, into = waiter(b, 0)
    b.submit(receive, step())
    a.abort(2)
    a.write(out, 0, b"n" * 64)
    a.submit(send, step())
    finish(a)
    time.sleep(0.005)
    assert b.completions() == []
    b.abort(2)
    with pytest.raises(CardAbortedError):
        finish(b)
    b.submit(receive, step())
    finish(b)
    assert b.read(into, 0, 64) == b"n" * 64


# --- failing cards ----------------------------------------------------------------------


def plant(device: CardDevice, fault: str) -> None:
    if not hasattr(device, fault):
        pytest.skip(f"this body has no {fault}()")
    getattr(device, fault)()


def test_a_killed_card_loses_its_work_and_refuses_everything(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    receive, buffer = waiter(a, 1)
    other, x, _ = adder(b)
    fences = [a.submit(receive, step()) for _ in range(2)]
    plant(a, "kill")
    done = collect(a, 2)
    assert [c.fence for c in done] == fences
    assert all(isinstance(c.error, CardLostError) for c in done)
    for call in (
        lambda: a.alloc(64),
        lambda: a.free(buffer),
        lambda: a.write(buffer, 0, b"x"),
        lambda: a.read(buffer, 0, 1),
        lambda: a.load_program(b""),
        lambda: a.unload_program(receive),
        lambda: a.submit(receive, step()),
    ):
        with pytest.raises(CardLostError, match="card 0"):
            call()
    b.submit(other, step())
    finish(b)
    assert floats(b, x, 1)[0] == 1


def test_a_hung_card_keeps_its_work_until_it_is_aborted(
    pair: tuple[CardDevice, CardDevice],
) -> None:
    a, b = pair
    program, x, _ = adder(a)
    other, _, _ = adder(b)
    plant(a, "hang")
    a.submit(program, step())
    b.submit(other, step())
    finish(b)
    time.sleep(0.02)
    assert a.completions() == []
    counters = a.counters()
    assert counters.queued == 1 and counters.waiting_for is None and counters.commands == 0
    a.abort(2)
    with pytest.raises(CardAbortedError):
        finish(a)
    assert floats(a, x, 1)[0] == 0


# --- the end ----------------------------------------------------------------------------


def test_closing_one_card_leaves_its_neighbours_at_work(make_rig: MakeRig) -> None:
    a, b, _ = make_rig(3).cards
    program, _, _ = adder(b)
    receive, _ = waiter(a, 1)
    a.submit(receive, step())
    fd = b.completion_fd
    a.close()
    a.close()
    with pytest.raises(CardLostError, match="card 0 is closed"):
        a.alloc(64)
    assert b.completion_fd == fd
    b.submit(program, step())
    finish(b)


def test_closing_all_cards_leaves_no_thread_and_no_descriptor(make_rig: MakeRig) -> None:
    def held() -> tuple[list[str], int]:
        return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    make_rig(1).close()
    before = held()
    for how in ("rig", "cards"):
        for _ in range(5):
            rig = make_rig(3)
            program, _ = waiter(rig.cards[0], 1)
            rig.cards[0].submit(program, step())
            assert held() != before
            if how == "rig":
                rig.close()
            else:
                for card in rig.cards:
                    card.close()
            rig.close()
    assert held() == before
