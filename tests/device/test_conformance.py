# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of CardDevice, first part: memory, programs, the parameters of steps.

Every body of a card must pass it; conformance_rigs.py says how a body joins.
"""

from __future__ import annotations

import functools
import random
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import attrs
import numpy as np
import pytest
from conformance_rigs import (
    DDR_BYTES,
    REAL_CARDS,
    MakeRig,
    adder,
    collect,
    finish,
    floats,
    make_program,
    position_data,
    sender,
    step,
    waiter,
)

from spanker.device.base import CardDevice, Fill
from spanker.errors import (
    CardCommandError,
    CardFaultError,
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
    chosen_token,
    encode_step,
)

# --- what a card says -------------------------------------------------------------------


def test_info_names_the_card_and_its_semantics(make_rig: MakeRig) -> None:
    cards = make_rig(2).cards
    assert [c.number for c in cards] == [0, 1]
    infos = [c.info for c in cards]
    assert infos[0].name != infos[1].name and infos[0].serial != infos[1].serial
    for info in infos:
        assert info.ddr_bytes == DDR_BYTES or REAL_CARDS
        assert info.semantics_version == 1
        assert info.programs_max >= 8


# --- memory -----------------------------------------------------------------------------


def test_alloc_until_full_then_the_error_says_what_is_needed_and_free(card: CardDevice) -> None:
    total, unit = card.info.ddr_bytes, card.info.ddr_granule
    piece = total // 16
    handles = [card.alloc(piece) for _ in range(15)]
    card.alloc(piece - unit)
    assert card.counters().ddr_used_bytes == total - unit
    words = rf"card 0: no room for {unit + 1:,} bytes.*{unit:,} of {total:,}"
    with pytest.raises(CardMemoryError, match=words):
        card.alloc(unit + 1)
    assert card.alloc(unit) not in handles
    with pytest.raises(CardMemoryError):
        card.alloc(1)
    assert card.counters().ddr_used_bytes == card.counters().ddr_total_bytes == total


def test_used_bytes_are_whole_multiples_of_what_the_card_says(card: CardDevice) -> None:
    unit = card.info.ddr_granule
    for nbytes, used in ((1, 1), (unit, 2), (unit + 1, 4), (unit - 1, 5)):
        card.alloc(nbytes)
        assert card.counters().ddr_used_bytes == used * unit


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 64], ids=["zero", "negative", "65 bits"])
def test_senseless_sizes_are_refused(card: CardDevice, nbytes: int) -> None:
    with pytest.raises(CardCommandError):
        card.alloc(nbytes)


@pytest.mark.parametrize("beyond", [1, 4096, None], ids=["a byte", "a page", "64 bits"])
def test_more_than_the_card_has_is_refused(card: CardDevice, beyond: int | None) -> None:
    with pytest.raises(CardMemoryError):
        card.alloc((1 << 64) - 1 if beyond is None else card.info.ddr_bytes + beyond)


def test_freed_memory_is_found_again_and_zeroed(card: CardDevice) -> None:
    sizes = (100, 5000, 64, 12345)
    handles = [card.alloc(n) for n in sizes]
    rest = card.alloc(card.info.ddr_bytes - card.counters().ddr_used_bytes)
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
    unit = card.info.ddr_granule
    used = sum(-(-len(data) // unit) * unit for data in held.values())
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


# --- memory that the host makes in place ------------------------------------------------

FillOf = Callable[[int, int, int, Fill], None]


@pytest.fixture(params=["own", "inherited"])
def fill(card: CardDevice, request: pytest.FixtureRequest) -> FillOf:
    """`card.fill`, and what a body has that leaves it to the contract."""
    if request.param == "own":
        return card.fill
    return functools.partial(CardDevice.fill, card)


def counting(out: np.ndarray) -> None:
    """Bytes that depend on their position, with no short period."""
    out[:] = position_data(7, 1, out.size)


def never(out: np.ndarray) -> None:
    raise AssertionError("nothing is made for what is refused")


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 1), (0, 100), (1, 98), (99, 1), (0, 200_000), (63, 200_000 - 63), (70_001, 65_537)],
)
def test_filled_bytes_arrive_and_no_others_change(
    card: CardDevice, fill: FillOf, offset: int, nbytes: int
) -> None:
    size = 200_000
    before, buffer, behind = card.alloc(64), card.alloc(size), card.alloc(64)
    expected = bytearray(b"\xaa" * size)
    card.write(buffer, 0, bytes(expected))
    shapes: list[tuple[object, ...]] = []

    def make(out: np.ndarray) -> None:
        shapes.append((out.shape, out.dtype, out.flags.c_contiguous, out.flags.writeable))
        counting(out)

    fill(buffer, offset, nbytes, make)
    assert shapes == [((nbytes,), np.uint8, True, True)]
    expected[offset : offset + nbytes] = position_data(7, 1, nbytes).tobytes()
    assert card.read(buffer, 0, size) == bytes(expected)
    assert card.read(before, 0, 64) == card.read(behind, 0, 64) == bytes(64)


@pytest.mark.parametrize("offset", [0, 50, 100])
def test_a_fill_of_nothing_makes_nothing_of_it(card: CardDevice, fill: FillOf, offset: int) -> None:
    buffer = card.alloc(100)
    sizes: list[int] = []
    fill(buffer, offset, 0, lambda out: sizes.append(out.size))
    assert sizes == [0] and card.read(buffer, 0, 100) == bytes(100)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 101),
        (100, 1),
        (101, 0),
        (50, 51),
        (0, 1 << 40),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
        (-1, 1),
        (-1, 50),
        (0, (1 << 64) - 1),
        (1, (1 << 64) - 1),
    ],
)
def test_what_is_out_of_bounds_is_not_made(
    card: CardDevice, fill: FillOf, offset: int, nbytes: int
) -> None:
    buffer, neighbour = card.alloc(100), card.alloc(100)
    with pytest.raises(CardCommandError):
        fill(buffer, offset, nbytes, never)
    assert card.read(buffer, 0, 100) == card.read(neighbour, 0, 100) == bytes(100)


@pytest.mark.parametrize("handle", [1, 999, 1 << 32, -1])
def test_nothing_is_made_for_an_unknown_buffer(card: CardDevice, fill: FillOf, handle: int) -> None:
    freed = card.alloc(64)
    card.free(freed)
    for unknown in (handle, freed):
        with pytest.raises(CardCommandError):
            fill(unknown, 0, 1, never)


def test_bytes_that_cannot_be_made_leave_the_card_as_usable_as_before(
    card: CardDevice, fill: FillOf
) -> None:
    buffer, neighbour = card.alloc(100_000), card.alloc(100)
    error = OSError(5, "disk")

    def half(out: np.ndarray) -> None:
        out[: out.size // 2] = 0x55
        raise error

    for _ in range(3):
        with pytest.raises(OSError, match="disk") as caught:
            fill(buffer, 10, 90_000, half)
        assert caught.value is error
    data = card.read(buffer, 0, 100_000)
    assert data[:10] == bytes(10) and data[90_010:] == bytes(9990)
    assert card.read(neighbour, 0, 100) == bytes(100)
    fill(buffer, 0, 100_000, counting)
    assert card.read(buffer, 0, 100_000) == position_data(7, 1, 100_000).tobytes()
    card.free(buffer)
    assert card.read(card.alloc(100_000), 0, 100_000) == bytes(100_000)


@pytest.mark.parametrize("seed", range(3))
def test_threads_write_and_fill_side_by_side_while_steps_run(make_rig: MakeRig, seed: int) -> None:
    """Large and small pieces of the same buffers, each byte by one of the threads."""
    card = make_rig(1, 16 << 20).cards[0]
    rng = random.Random(seed)
    sizes = [rng.choice((1, 63, 70_000, 1 << 20, rng.randrange(1, 3 << 20))) for _ in range(6)]
    handles = [card.alloc(n) for n in sizes]
    program, x, _ = adder(card)
    data = [position_data(i, 1, n) for i, n in enumerate(sizes)]
    pieces = []
    for number, nbytes in enumerate(sizes):
        at = 0
        while at < nbytes:
            count = min(rng.choice((1000, 65_535, 65_536, rng.randrange(1, 1 << 20))), nbytes - at)
            pieces.append((number, at, count))
            at += count
    rng.shuffle(pieces)

    def put(share: int) -> None:
        for number, at, count in pieces[share::3]:
            piece = data[number][at : at + count]
            if at % 2:
                card.write(handles[number], at, piece.tobytes())
            else:
                card.fill(handles[number], at, count, lambda out, p=piece: np.copyto(out, p))

    with ThreadPoolExecutor(3) as pool:
        shares = [pool.submit(put, share) for share in range(3)]
        steps = 0
        while steps < 20 or not all(share.done() for share in shares):
            card.submit(program, step(4))
            finish(card)
            steps += 1
        for share in shares:
            share.result()
    for handle, expected in zip(handles, data, strict=True):
        assert card.read(handle, 0, expected.size) == expected.tobytes()
    assert np.all(floats(card, x, 64) == steps)


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
    "unknown format": (Command(Op.MATMUL, ((0, W), (1, X), (3, X)), (16, 32), 9), "format"),
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
    "the best of none": (op.best(X, X, k=0), "1 to 4096"),
    "the best of too many": (op.best(X, X, k=4097), "1 to 4096"),
    "the best of more than there are": (op.best(X, X, k=17), "operand 0"),
    "the best of tokens": (Command(Op.BEST, ((0, X), (3, X)), (4,)), "row per output"),
    "a choice among none": (op.choose(X, X, lists=0), "1 to 256"),
    "a choice among too many": (op.choose(X, X, lists=257), "1 to 256"),
    "a choice among more than there are": (op.choose(X, X, lists=17), "operand 0"),
    "a choice for tokens": (Command(Op.CHOOSE, ((0, X), (3, X)), (4,)), "row per output"),
    "too few chosen ids": (
        op.embed(Format.F32, X, Ref("small", 4, 52), X, columns=1, vocabulary=3),
        "operand 1 needs 4 rows of 4 bytes at offset 52",
    ),
    "no vocabulary": (op.embed(Format.F32, X, X, X, columns=1, vocabulary=0), "vocabulary"),
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
            op.embed(Format.F32, X, X, X, columns=1, vocabulary=3),
            op.embed(Format.F32, X, X, X, columns=1, vocabulary=4),
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
        exchanges = (Op.EXCHANGE, Op.LINK_SEND, Op.LINK_RECV)
        kind = rng.choice([o for o in Op if o not in exchanges])
        numbers = [rng.choice(small if rng.random() < 0.9 else huge) for _ in range(14)]
        blob = PROGRAM_HEADER.pack(0x474B5053, 1, 1, rng.choice((1, 2, 4)), 1, 16)
        blob += COMMAND.pack(kind, rng.choice((0, 1, 2, 3, 8)), rng.choice((0, 1)), *refs, *numbers)
        try:
            program = card.load_program(blob)
        except CardCommandError:
            continue
        accepted += 1
        token = rng.choice((0, 0, chosen_token(0)))
        params = encode_step([SequenceStep([token], 0, [0], (0,))])
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
    sizes = {"table": 640, "chosen": 8, "x": 4 * 64, "out": 2 * 64, "kv": 3 * 16 * 16 * 2 * 2}
    handles = {name: card.alloc(n) for name, n in sizes.items()}
    x = Ref("x", 64)
    made = Program(
        (
            op.embed(Format.F32, Ref("table", 64), Ref("chosen", 4), x, columns=16, vocabulary=10),
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
        ([SequenceStep([0x7FFFFFFF], 0, [0])], "token id"),
        ([SequenceStep([chosen_token(2)], 0, [0])], "output of token 0 is 2, must be below 2"),
        ([SequenceStep([0xFFFFFFFF], 0, [0])], "output of token 0"),
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
