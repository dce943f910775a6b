# SPDX-License-Identifier: Apache-2.0
"""The traffic of the AXI4 boundary: bursts by the rules of the bus, and what a recorder lists."""

from __future__ import annotations

import json
from collections.abc import Iterator

import attrs
import pytest
from conformance_rigs import DDR_BYTES, adder, collect, finish, make_program, soft_rig, step
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spanker.device import axi
from spanker.device.axi import AxiRecorder, Burst, Compute, Read, Write, bursts
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardError,
    CardLostError,
    CardMemoryError,
)
from spanker.kernels import program as op
from spanker.kernels.formats import Format
from spanker.kernels.program import Ref

FULL = 0xFFFFFFFF

# --- bursts -----------------------------------------------------------------------------


def bytes_of(burst: Burst) -> list[int]:
    """Addresses that a burst carries, lane by lane, as the bus does it."""
    first_beat = burst.address // 32 * 32
    found = []
    for beat in range(burst.beats):
        strobe = FULL
        if beat == 0:
            strobe &= burst.first_strobe
        if beat == burst.beats - 1:
            strobe &= burst.last_strobe
        found += [first_beat + 32 * beat + lane for lane in range(32) if strobe >> lane & 1]
    return found


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    address=st.one_of(st.integers(0, 20_000), st.integers(0, (1 << 48) - 50_000)),
    nbytes=st.integers(0, 40_000),
)
@example(address=0, nbytes=4096)
@example(address=4095, nbytes=2)
@example(address=(1 << 48) - 4097, nbytes=4097)
def test_bursts_carry_exactly_the_bytes_within_the_rules(address: int, nbytes: int) -> None:
    made = bursts(address, nbytes)
    assert [b for burst in made for b in bytes_of(burst)] == list(range(address, address + nbytes))
    for burst in made:
        assert 1 <= burst.beats <= 256
        last = burst.address // 32 * 32 + 32 * burst.beats - 1
        assert burst.address // 4096 == last // 4096
        # Strobes are one run of lanes each, of an aligned start and end all.
        assert burst.address % 32 == (burst.first_strobe & -burst.first_strobe).bit_length() - 1
    # One less would have to cross a boundary.
    pages = (address + nbytes - 1) // 4096 - address // 4096 + 1 if nbytes else 0
    assert len(made) == pages


@pytest.mark.parametrize(
    ("address", "nbytes", "expected"),
    [
        (0, 0, ()),
        (4096, 0, ()),
        (0, 1, (Burst(0, 1, 1, 1),)),
        (0, 32, (Burst(0, 1, FULL, FULL),)),
        (31, 1, (Burst(31, 1, 1 << 31, 1 << 31),)),
        (31, 2, (Burst(31, 2, 1 << 31, 1),)),
        (5, 3, (Burst(5, 1, 0b11100000, 0b11100000),)),
        (0, 4096, (Burst(0, 128, FULL, FULL),)),
        (0, 4097, (Burst(0, 128, FULL, FULL), Burst(4096, 1, 1, 1))),
        (4095, 2, (Burst(4095, 1, 1 << 31, 1 << 31), Burst(4096, 1, 1, 1))),
        (16, 4096, (Burst(16, 128, 0xFFFF0000, FULL), Burst(4096, 1, 0xFFFF, 0xFFFF))),
        ((1 << 48) - 1, 1, (Burst((1 << 48) - 1, 1, 1 << 31, 1 << 31),)),
    ],
)
def test_bursts_by_hand(address: int, nbytes: int, expected: tuple[Burst, ...]) -> None:
    assert bursts(address, nbytes) == expected


@pytest.mark.parametrize(
    ("address", "nbytes"), [(-1, 1), (0, -1), (1 << 48, 1), ((1 << 48) - 1, 2), (0, (1 << 48) + 1)]
)
def test_nothing_is_outside_of_48_bits(address: int, nbytes: int) -> None:
    with pytest.raises(CardCommandError, match="48 bits"):
        bursts(address, nbytes)


# --- entries ----------------------------------------------------------------------------


def test_entries_as_text() -> None:
    for entry, text in (
        (
            Write("A", 0, 18_432),
            "write A  0x000000000000  18,432 bytes  5 bursts (4×128 + 64 beats)",
        ),
        (Read("OUT", 0x1000, 4096), "read OUT  0x000000001000  4,096 bytes  1 burst (128 beats)"),
        (
            Write("x", 0xFFFFFFFFFFF1, 1),
            "write x  0xfffffffffff1  1 byte  1 burst (1 beat)  strobes 00020000 to 00020000",
        ),
        (
            Read("x", 16, 4100),
            "read x  0x000000000010  4,100 bytes  2 bursts (128 + 1 beats)  "
            "strobes ffff0000 to 000fffff",
        ),
        (
            Compute("matmul_q4_k", ("embed", "quantize", "matmul"), 5, 512, 3),
            "compute matmul_q4_k  m=5 k=512 n=3  (embed, quantize, matmul)",
        ),
        (
            Compute("program", ("add", "matmul", "add", "matmul"), None, None, 7),
            "compute program  n=7  (2×add, 2×matmul)",
        ),
        (Compute("program", (), None, None, 0), "compute program  n=0  (no commands)"),
    ):
        assert str(entry) == text


def test_entries_as_json() -> None:
    entries = (Write("A", 30, 4), Compute("matmul_q4_0", ("matmul",), 16, 32, 1), Read("B", 0, 32))
    assert json.loads(json.dumps([attrs.asdict(e) for e in entries])) == [
        {
            "kind": "write",
            "name": "A",
            "address": 30,
            "nbytes": 4,
            "bursts": [
                {"address": 30, "beats": 2, "first_strobe": 0xC0000000, "last_strobe": 3},
            ],
        },
        {
            "kind": "compute",
            "name": "matmul_q4_0",
            "commands": ["matmul"],
            "m": 16,
            "k": 32,
            "n": 1,
        },
        {
            "kind": "read",
            "name": "B",
            "address": 0,
            "nbytes": 32,
            "bursts": [
                {"address": 0, "beats": 1, "first_strobe": FULL, "last_strobe": FULL},
            ],
        },
    ]


# --- the recorder -----------------------------------------------------------------------


@pytest.fixture
def recorder() -> Iterator[AxiRecorder]:
    rig = soft_rig(1, DDR_BYTES)
    yield AxiRecorder(rig.cards[0])
    rig.close()


def test_reads_and_writes_are_listed_in_order_with_their_addresses(recorder: AxiRecorder) -> None:
    a, b = recorder.alloc(100), recorder.alloc(5000)
    recorder.label(b, "weights")
    recorder.write(b, 0, bytes(5000))
    recorder.write(a, 7, bytearray(3))
    recorder.read(b, 4000, 200)
    recorder.write(a, 0, memoryview(bytes(64)).cast("I"))
    recorder.fill(b, 64, 4936, lambda out: out.fill(1))
    # 100 bytes take 128 of the map.
    assert recorder.entries == (
        Write("weights", 128, 5000),
        Write(f"buffer {a}", 7, 3),
        Read("weights", 128 + 4000, 200),
        Write(f"buffer {a}", 0, 64),
        Write("weights", 128 + 64, 4936),
    )
    assert recorder.lines() == [str(entry) for entry in recorder.entries]
    assert recorder.lines()[1].startswith(f"write buffer {a}  0x000000000007  3 bytes  1 burst")


def test_what_needs_no_bus_or_is_refused_is_not_listed(recorder: AxiRecorder) -> None:
    a = recorder.alloc(100)
    recorder.write(a, 100, b"")
    recorder.fill(a, 100, 0, lambda out: None)
    assert recorder.read(a, 0, 0) == b""
    with pytest.raises(ZeroDivisionError):
        recorder.fill(a, 0, 100, lambda out: 1 / 0)
    for call in (
        lambda: recorder.write(a, 99, b"xx"),
        lambda: recorder.fill(a, 99, 2, lambda out: None),
        lambda: recorder.read(a, 99, 2),
        lambda: recorder.write(a + 1, 0, b"x"),
        lambda: recorder.load_program(b"nonsense"),
        lambda: recorder.submit(3, step()),
        lambda: recorder.alloc(0),
    ):
        with pytest.raises(CardError):
            call()
    recorder.read(a, 0, 1)
    assert recorder.entries == (Read(f"buffer {a}", 0, 1),)


def test_buffers_lie_first_fit_from_0(recorder: AxiRecorder) -> None:
    a, b, c = (recorder.alloc(n) for n in (64, 65, 1000))
    assert [recorder.address(h) for h in (a, b, c)] == [0, 64, 192]
    recorder.free(b)
    large, small, tail = recorder.alloc(129), recorder.alloc(128), recorder.alloc(1)
    assert [recorder.address(h) for h in (large, small, tail)] == [1216, 64, 1408]
    recorder.free(a)
    assert recorder.address(recorder.alloc(1)) == 0


def test_a_new_buffer_does_not_inherit_a_name(recorder: AxiRecorder) -> None:
    a = recorder.alloc(64)
    recorder.label(a, "old")
    recorder.free(a)
    again = recorder.alloc(64)
    recorder.write(again, 0, b"x")
    assert recorder.entries == (Write(f"buffer {again}", 0, 1),)


def test_unknown_buffers_have_no_name_and_no_address(recorder: AxiRecorder) -> None:
    for call in (lambda: recorder.label(5, "x"), lambda: recorder.address(5)):
        with pytest.raises(CardCommandError, match="card 0: no buffer 5"):
            call()


def test_what_a_step_brings_back_is_listed_when_it_completes(recorder: AxiRecorder) -> None:
    program, x, ones = adder(recorder)
    recorder.label(ones, "ones")
    recorder.clear()
    fences = [
        recorder.submit(program, step(), [(ones, 64, 5), (x, 0, 0), (x, 0, 64)]),
        recorder.submit(program, step()),
        recorder.submit(program, step(), [(x, 4, 4)]),
    ]
    assert [e.kind for e in recorder.entries] == ["compute"] * 3
    assert [c.fence for c in collect(recorder, 3)] == fences
    at = recorder.address(ones)
    assert recorder.entries[3:] == (
        Read("ones", at + 64, 5),
        Read(f"buffer {x}", 0, 64),
        Read(f"buffer {x}", 4, 4),
    )


def test_a_step_that_failed_or_was_refused_brings_nothing_back(recorder: AxiRecorder) -> None:
    program, x, _ = adder(recorder)
    recorder.clear()
    with pytest.raises(CardCommandError):
        recorder.submit(program, step(), [(x, 1 << 20, 1)])
    assert recorder.entries == ()
    recorder.hang()
    recorder.submit(program, step(), [(x, 0, 64)])
    recorder.abort(2)
    assert isinstance(collect(recorder, 1)[0].error, CardAbortedError)
    assert [e.kind for e in recorder.entries] == ["compute"]


def test_clear_forgets_entries_only(recorder: AxiRecorder) -> None:
    recorder.alloc(64)
    b = recorder.alloc(64)
    recorder.label(b, "b")
    recorder.write(b, 0, b"x")
    recorder.clear()
    assert recorder.entries == () and recorder.lines() == []
    recorder.write(b, 1, b"y")
    assert recorder.entries == (Write("b", 65, 1),)


def test_a_step_of_any_program_is_one_entry(recorder: AxiRecorder) -> None:
    program, _, _ = adder(recorder)
    recorder.clear()
    for tokens in (3, 0):
        recorder.submit(program, step(tokens=tokens))
        finish(recorder)
    assert recorder.entries == tuple(Compute("program", ("add",), None, None, n) for n in (3, 0))


@pytest.mark.parametrize("outputs", [False, True])
def test_a_program_with_one_product_is_named_after_it(recorder: AxiRecorder, outputs: bool) -> None:
    handles = {name: recorder.alloc(n) for name, n in (("w", 4096), ("x", 4 * 68), ("y", 4096))}
    product = op.matmul(
        Format.Q8_0, Ref("w"), Ref("x", 68), Ref("y", 136), rows=33, k=64, outputs=outputs
    )
    addition = op.add(Ref("y", 136), Ref("y", 136), n=34)
    one = recorder.load_program(make_program(product, addition).encode(handles))
    two = recorder.load_program(make_program(product, product).encode(handles))
    n = 2 if outputs else 3
    for program in (one, two, one):
        recorder.submit(program, step(tokens=3, outputs=2))
        finish(recorder)
    named = Compute("matmul_q8_0", ("matmul", "add"), 33, 64, n)
    assert recorder.entries == (
        named,
        Compute("program", ("matmul", "matmul"), None, None, 3),
        named,
    )


def test_a_slot_of_programs_used_again_names_the_new_program(recorder: AxiRecorder) -> None:
    first, x, _ = adder(recorder)
    recorder.unload_program(first)
    made = make_program(op.select(Ref("x", 64), Ref("x", 64), n=16))
    assert recorder.load_program(made.encode({"x": x})) == first
    recorder.clear()
    recorder.submit(first, step())
    finish(recorder)
    assert [entry.commands for entry in recorder.entries] == [("select",)]


def test_an_address_space_that_is_full_gives_the_buffer_back(
    recorder: AxiRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(axi, "ADDRESS_BITS", 12)
    recorder.alloc(4000)
    used = recorder.counters().ddr_used_bytes
    with pytest.raises(CardMemoryError, match="card 0: no room for 65 bytes in an address space"):
        recorder.alloc(65)
    assert recorder.counters().ddr_used_bytes == used
    recorder.alloc(64)


def test_a_card_that_holds_buffers_already_is_refused(recorder: AxiRecorder) -> None:
    recorder.alloc(1)
    with pytest.raises(CardCommandError, match="card 0: 64 bytes are allocated"):
        AxiRecorder(recorder)


def test_recorders_nest(recorder: AxiRecorder) -> None:
    outer = AxiRecorder(recorder)
    a = outer.alloc(64)
    outer.write(a, 0, b"abc")
    assert outer.entries == recorder.entries == (Write(f"buffer {a}", 0, 3),)


def test_what_only_this_body_has_is_forwarded(recorder: AxiRecorder) -> None:
    with pytest.raises(AttributeError, match="no attribute '_rig'"):
        _ = recorder._rig
    with pytest.raises(AttributeError, match="sink"):
        recorder.sink()
    recorder.kill()
    with pytest.raises(CardLostError):
        recorder.alloc(1)
