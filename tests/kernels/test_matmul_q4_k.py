# SPDX-License-Identifier: Apache-2.0
"""spanker.matmul_q4_k: what it computes, what it refuses, what crosses the card's boundary."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import select
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import gguf
import numpy as np
import pytest
from gguf import quants
from kernel_cases import assert_same_bits, finite_f16, seed_of

from spanker import matmul_q4_k
from spanker.device import q4_k
from spanker.device.axi import AxiRecorder, Compute, Read, Write
from spanker.device.base import Completion, DeviceCounters
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import (
    BadDimsError,
    CardCommandError,
    CardError,
    CardFaultError,
    CardHungError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    MatmulError,
    OutputTooSmallError,
    SpankerError,
)
from spanker.kernels import program as op
from spanker.kernels import reference
from spanker.kernels.native import NativeKernels
from spanker.kernels.program import Program, Ref, SequenceStep, encode_step

Q4_K = gguf.GGMLQuantizationType.Q4_K
SIZES = [
    (1, 256, 1),
    (16, 256, 5),
    (17, 512, 3),
    (33, 768, 16),
    (5, 256, 70),
    (160, 1024, 9),
]


def q4_k_rows(seed: int, rows: int, k: int, *, any_scale: bool = False) -> np.ndarray:
    """Random Q4_K rows (rows, k/256*144): scales around 0.01, or any finite ones."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, k // 256, 144), dtype=np.uint8)
    scales = finite_f16(rng, (rows, k // 256, 2))
    if not any_scale:
        scales = (rng.standard_normal((rows, k // 256, 2)) * 0.01).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    return blocks.reshape(rows, k // 256 * 144)


def operands(m: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    seed = seed_of("matmul_q4_k", m, k, n)
    return q4_k_rows(seed, m, k, any_scale=True), q4_k_rows(seed + 1, n, k)


def by_kernels(kernels: NativeKernels, a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    x = kernels.quantize_q8(kernels.dequantize_row("q4_k", b, k))
    return np.ascontiguousarray(kernels.matmul("q4_k", a, x).T)


def product(a: Any, b: Any, m: int, k: int, n: int, **how: Any) -> np.ndarray:
    out = np.full((m, n), 77, np.float32)
    assert matmul_q4_k(a, b, out, m, k, n, **how) is None
    return out


@pytest.fixture
def card() -> Iterator[AxiRecorder]:
    with SoftRig([SoftCardSpec(ddr_bytes=1 << 26)]) as rig:
        yield AxiRecorder(rig.cards[0])


# --- what it computes -------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_a_card_gives_what_its_kernels_give(kernels: NativeKernels, m: int, k: int, n: int) -> None:
    a, b = operands(m, k, n)
    got = product(a, b, m, k, n, isa=kernels.isa)
    assert_same_bits(got, by_kernels(kernels, a, b, k), m, k, n)
    assert_same_bits(got, by_kernels(NativeKernels("scalar"), a, b, k), m, k, n)


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_a_card_gives_what_the_reference_gives(m: int, k: int, n: int) -> None:
    a, b = operands(m, k, n)
    got = product(a, b, m, k, n)
    x = reference.quantize_q8(reference.dequantize_row("q4_k", b))
    expected = reference.matmul("q4_k", a, x)
    assert_same_bits(got, np.ascontiguousarray(expected.T), m, k, n)


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_the_values_are_those_of_gguf(m: int, k: int, n: int) -> None:
    """The product in float64 of what the bytes mean to the `gguf` package, b rounded to Q8."""
    a, b = q4_k_rows(1, m, k), q4_k_rows(2, n, k)
    q8 = reference.quantize_q8(quants.dequantize(b, Q4_K))
    x = quants.dequantize(q8, gguf.GGMLQuantizationType.Q8_0).astype(np.float64)
    w = quants.dequantize(a, Q4_K).astype(np.float64)
    got = product(a, b, m, k, n)
    # Terms of the sums: what a result may lose to rounding is relative to these.
    scale = np.abs(w) @ np.abs(x).T
    assert (np.abs(got - w @ x.T) < 1e-6 * scale).all()


def test_element_i_j_is_row_i_of_a_times_column_j_of_b() -> None:
    """One weight of 1 in row i, at i; column j holds 1 at j and 0 elsewhere: the unit matrix."""

    def unit(rows: int) -> np.ndarray:
        out = np.zeros((rows, 144), np.uint8)
        out[:, :2] = np.array([1.0], np.float16).view(np.uint8)
        out[:, 4:8] = out[:, 12:16] = 1  # scale 1 of all eight sub-blocks, minima 0
        for i in range(rows):
            # Weights 64c + l and 64c + 32 + l share byte 32c + l.
            chunk, at = divmod(i, 64)
            out[i, 16 + 32 * chunk + at % 32] = 1 if at < 32 else 16
        return out

    got = product(unit(200), unit(70), 200, 256, 70)
    assert_same_bits(np.round(got, 3), np.eye(200, 70, dtype=np.float32))


def test_more_columns_than_a_step_takes_are_split(
    card: AxiRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, k, n = 5, 512, 20
    a, b = operands(m, k, n)
    whole = product(a, b, m, k, n)
    monkeypatch.setattr(q4_k, "COLUMNS_MAX", 7)
    assert_same_bits(product(a, b, m, k, n, card=card), whole)
    assert [(e.kind, e.name) for e in card.entries] == [
        ("write", "A"),
        *[("write", "B"), ("compute", "matmul_q4_k"), ("read", "OUT")] * 3,
    ]
    assert [e.n for e in card.entries if isinstance(e, Compute)] == [7, 7, 6]
    assert card.counters().ddr_used_bytes == 0


def test_one_column_more_than_a_step_takes() -> None:
    n = q4_k.COLUMNS_MAX + 1
    assert n == 65537
    a, b = operands(1, 256, 9)
    few = product(a, b, 1, 256, 9)
    many = np.resize(b, (n, 144))
    assert_same_bits(product(a, many, 1, 256, n), np.resize(few, (1, n)))


# --- sizes ------------------------------------------------------------------------------

ROW = 144
BAD_DIMS = {
    "k zero": (2, 0, 3, 0, 0, "k must be a positive multiple of 256"),
    "k cuts a block": (2, 255, 3, 2 * ROW, 3 * ROW, "k must be a positive multiple of 256"),
    "k one too many": (2, 257, 3, 2 * ROW, 3 * ROW, "k must be a positive multiple of 256"),
    "k half a block": (2, 128, 3, ROW, 216, "k must be a positive multiple of 256"),
    "k negative": (2, -256, 3, 2 * ROW, 3 * ROW, "k must be a positive multiple of 256"),
    "k zero, m zero": (0, 0, 3, 0, 0, "k must be a positive multiple of 256"),
    "k cuts a block, n zero": (2, 100, 0, 0, 0, "k must be a positive multiple of 256"),
    "m negative": (-1, 256, 3, 0, 3 * ROW, "no negative size"),
    "n negative": (2, 256, -3, 2 * ROW, 0, "no negative size"),
    "a too short": (2, 256, 3, 287, 432, "a needs 2 rows of 144 bytes, 288 in all, got 287"),
    "a too long": (2, 256, 3, 289, 432, "a needs 2 rows of 144 bytes, 288 in all, got 289"),
    "a empty": (2, 256, 3, 0, 432, "a needs 2 rows"),
    "b too short": (2, 256, 3, 288, 431, "b needs 3 rows of 144 bytes, 432 in all, got 431"),
    "b too long": (2, 256, 3, 288, 433, "b needs 3 rows of 144 bytes, 432 in all, got 433"),
    "a for another k": (2, 512, 3, 288, 864, "a needs 2 rows of 288 bytes, 576 in all, got 288"),
    "a with m zero": (0, 256, 3, 144, 432, "a needs 0 rows"),
    "b wrong with m zero": (0, 256, 3, 0, 144, "b needs 3 rows"),
    "b with n zero": (2, 256, 0, 288, 144, "b needs 0 rows"),
}


@pytest.mark.parametrize("case", BAD_DIMS)
def test_bad_dims(card: AxiRecorder, case: str) -> None:
    m, k, n, a_bytes, b_bytes, words = BAD_DIMS[case]
    # Of two mistakes this one is reported: the output is too small as well.
    with pytest.raises(BadDimsError, match=words) as caught:
        matmul_q4_k(bytes(a_bytes), bytes(b_bytes), bytearray(3), m, k, n, card=card)
    error = caught.value
    assert (error.m, error.k, error.n, error.block) == (m, k, n, 256)
    assert str(error).startswith(f"matmul_q4_k of {m} x {k} times {k} x {n}: ")
    assert "\n" not in str(error)
    assert isinstance(error, MatmulError) and isinstance(error, SpankerError)
    assert card.entries == ()


@pytest.mark.parametrize("have", [0, 1, 4, 20, 23])
def test_output_too_small(card: AxiRecorder, have: int) -> None:
    out = bytearray(b"\x5a" * have)
    with pytest.raises(OutputTooSmallError, match=f"out has {have} bytes, 24 are needed") as caught:
        matmul_q4_k(bytes(2 * ROW), bytes(3 * ROW), out, 2, 256, 3, card=card)
    assert (caught.value.have, caught.value.need) == (have, 24)
    assert isinstance(caught.value, MatmulError)
    assert out == b"\x5a" * have
    assert card.entries == ()


@pytest.mark.parametrize(("m", "n"), [(0, 3), (2, 0), (0, 0)])
def test_no_rows_or_no_columns_are_no_traffic(card: AxiRecorder, m: int, n: int) -> None:
    out = bytearray(b"\x5a" * 24)
    matmul_q4_k(bytes(m * ROW), bytes(n * ROW), out, m, 256, n, card=card)
    matmul_q4_k(bytes(m * ROW), bytes(n * ROW), b"", m, 256, n, card=card)
    assert out == b"\x5a" * 24
    assert card.entries == ()
    assert card.counters().progress == 0
    # Not even a card that is gone is asked.
    card.close()
    matmul_q4_k(bytes(m * ROW), bytes(n * ROW), b"", m, 256, n, card=card)


def test_rows_beyond_a_commands_stride_are_refused(card: AxiRecorder) -> None:
    k = 1 << 30
    row = np.zeros(k // 256 * ROW, np.uint8)  # never touched: costs no memory
    with pytest.raises(CardCommandError, match="stride is at most 4,294,967,295"):
        matmul_q4_k(row, row, bytearray(4), 1, k, 1, card=card)


# --- buffers ----------------------------------------------------------------------------


@attrs.frozen
class Case:
    """A small product, whose result is known."""

    a: np.ndarray
    b: np.ndarray
    expected: np.ndarray
    sizes: tuple[int, int, int] = (3, 256, 4)


@pytest.fixture(scope="module")
def case() -> Case:
    a, b = operands(3, 256, 4)
    return Case(a, b, product(a, b, 3, 256, 4))


def mapped(data: bytes) -> mmap.mmap:
    made = mmap.mmap(-1, len(data))
    made.write(data)
    return made


@pytest.mark.parametrize(
    "of",
    [
        bytes,
        bytearray,
        memoryview,
        mapped,
        lambda data: array.array("B", data),
        lambda data: (ctypes.c_char * len(data)).from_buffer_copy(data),
        lambda data: np.frombuffer(data, np.uint8),
        lambda data: np.frombuffer(data, np.uint8).reshape(-1, 144),
        lambda data: np.frombuffer(data, [("d", "<f2", 2), ("rest", "u1", 140)]),
        lambda data: memoryview(b"?" + data)[1:],
    ],
    ids="bytes bytearray memoryview mmap array ctypes flat rows records unaligned".split(),
)
def test_operands_may_be_any_buffer(case: Case, of: Any) -> None:
    a, b = of(case.a.tobytes()), of(case.b.tobytes())
    assert_same_bits(product(a, b, *case.sizes), case.expected)


@pytest.mark.parametrize(
    "out",
    [
        bytearray(48),
        memoryview(bytearray(48)),
        memoryview(bytearray(49))[1:],
        mapped(bytes(48)),
        array.array("f", [1.0] * 12),
        (ctypes.c_float * 12)(),
        np.zeros(48, np.uint8),
        np.zeros(12, np.float32),
        np.zeros((3, 4), np.float32),
    ],
    ids="bytearray memoryview unaligned mmap array ctypes bytes flat matrix".split(),
)
def test_the_output_may_be_any_writable_buffer(case: Case, out: Any) -> None:
    matmul_q4_k(case.a, case.b, out, *case.sizes)
    assert bytes(memoryview(out)) == case.expected.tobytes()


def test_what_is_behind_the_product_stays(case: Case) -> None:
    out = bytearray(b"\x5a" * 100)
    matmul_q4_k(case.a, case.b, out, *case.sizes)
    assert out == case.expected.tobytes() + b"\x5a" * 52


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (bytes(48), "out is read-only"),
        (memoryview(bytes(48)), "out is read-only"),
        (np.zeros((3, 4)), "format 'd'"),
        (np.zeros(12, np.int32), "format 'i'"),
        (np.zeros((3, 4), ">f4"), "format '>f'"),
        (np.zeros((3, 8), np.float32)[:, ::2], "out is not contiguous"),
        (np.zeros((4, 3), np.float32).T, "out is not contiguous"),
    ],
    ids="bytes view double int swapped strided transposed".split(),
)
def test_outputs_that_cannot_take_the_product(case: Case, out: Any, words: str) -> None:
    with pytest.raises(MatmulError, match=words):
        matmul_q4_k(case.a, case.b, out, *case.sizes)


def test_operands_are_contiguous(case: Case) -> None:
    wide = np.zeros((3, 288), np.uint8)
    with pytest.raises(MatmulError, match="a is not contiguous"):
        matmul_q4_k(wide[:, :144], case.b, bytearray(48), *case.sizes)
    with pytest.raises(MatmulError, match="b is not contiguous"):
        matmul_q4_k(case.a, wide[:, ::2], bytearray(48), *case.sizes)


def test_numpy_integers_are_sizes_and_floats_are_not(case: Case) -> None:
    sizes = [np.int64(s) for s in case.sizes]
    assert_same_bits(product(case.a, case.b, *sizes), case.expected)
    with pytest.raises(TypeError):
        matmul_q4_k(case.a, case.b, bytearray(48), 3.0, 256, 4)


# --- what crosses the boundary ----------------------------------------------------------

THREE = ("embed", "quantize", "matmul")


def test_the_four_entries_of_256_cubed(card: AxiRecorder) -> None:
    a, b = operands(256, 256, 256)
    product(a, b, 256, 256, 256, card=card)
    assert card.entries == (
        Write("A", 0, 36_864),
        Write("B", 36_864, 36_864),
        Compute("matmul_q4_k", THREE, 256, 256, 256),
        Read("OUT", 73_728, 262_144),
    )
    beats = [[b.beats for b in e.bursts] for e in card.entries if not isinstance(e, Compute)]
    assert beats == [[128] * 9, [128] * 9, [128] * 64]
    assert card.lines() == [
        "write A  0x000000000000  36,864 bytes  9 bursts (9×128 beats)",
        "write B  0x000000009000  36,864 bytes  9 bursts (9×128 beats)",
        "compute matmul_q4_k  m=256 k=256 n=256  (embed, quantize, matmul)",
        "read OUT  0x000000012000  262,144 bytes  64 bursts (64×128 beats)",
    ]


def test_the_four_entries_of_an_odd_product(card: AxiRecorder) -> None:
    """17 rows are written as 32; 3 columns of 288 bytes and 51 floats end within a beat."""
    product(*operands(17, 512, 3), 17, 512, 3, card=card)
    b_at, out_at = 32 * 288, 32 * 288 + 896
    assert card.entries == (
        Write("A", 0, 32 * 288),
        Write("B", b_at, 3 * 288),
        Compute("matmul_q4_k", THREE, 17, 512, 3),
        Read("OUT", out_at, 4 * 51),
    )
    write_a, write_b, _, read = card.entries
    assert [b.beats for b in write_a.bursts] == [128, 128, 32]
    assert [b.beats for b in write_b.bursts] == [27]
    assert [b.beats for b in read.bursts] == [7]
    assert read.bursts[0].last_strobe == 0xFFF  # 204 = 6 * 32 + 12


def test_every_call_has_the_same_traffic(card: AxiRecorder) -> None:
    for _ in range(3):
        product(*operands(5, 256, 2), 5, 256, 2, card=card)
    assert card.entries[:4] == card.entries[4:8] == card.entries[8:]


# --- the card ---------------------------------------------------------------------------


def test_nothing_stays_on_the_card(card: AxiRecorder) -> None:
    kept = card.alloc(1000)
    card.write(kept, 0, b"k" * 1000)
    before = card.counters().ddr_used_bytes
    # More calls than a card has program slots.
    for _ in range(card.info.programs_max + 1):
        product(*operands(2, 256, 2), 2, 256, 2, card=card)
    assert card.counters().ddr_used_bytes == before
    assert card.read(kept, 0, 1000) == b"k" * 1000
    card.free(kept)


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_card_of_the_calls_own_leaves_nothing(case: Case) -> None:
    for _ in range(3):
        assert_same_bits(product(case.a, case.b, *case.sizes), case.expected)
    bad = case.b.copy()
    bad[0, :2] = 0xFF
    with pytest.raises(CardFaultError):
        product(case.a, bad, *case.sizes)


def scaled(rows: np.ndarray, at: int, value: float) -> np.ndarray:
    """The same rows, one scale (0: d, 1: dmin of the first super-block) of row 1 replaced."""
    out = rows.copy()
    out[1, 2 * at : 2 * at + 2] = np.array([value], np.float16).view(np.uint8)
    return out


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 1])
def test_scales_that_are_not_finite_are_faults_and_the_card_goes_on(
    card: AxiRecorder, case: Case, at: int, value: float
) -> None:
    for a, b in ((scaled(case.a, at, value), case.b), (case.a, scaled(case.b, at, value))):
        with pytest.raises(CardFaultError, match=r"card 0.*a NaN or an infinity"):
            product(a, b, *case.sizes, card=card)
        assert card.counters().ddr_used_bytes == 0
    assert_same_bits(product(case.a, case.b, *case.sizes, card=card), case.expected)


def test_columns_beyond_the_range_of_q8_are_a_fault(card: AxiRecorder, case: Case) -> None:
    b = np.full((4, 144), 0xFF, np.uint8)
    b[:, :4] = np.array([65504.0, 0.0], np.float16).view(np.uint8)
    with pytest.raises(CardFaultError, match="does not fit into f16"):
        product(case.a, b, *case.sizes, card=card)
    assert card.counters().ddr_used_bytes == 0


def test_a_card_without_room_gets_back_what_was_allocated() -> None:
    m, k, n = 16, 256, 40
    a, b = operands(m, k, n)
    for ddr_bytes in (64, 4096, 16384, 61440):
        with SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)]) as rig:
            with pytest.raises(CardMemoryError, match="card 0: no room"):
                product(a, b, m, k, n, card=rig.cards[0])
            assert rig.cards[0].counters().ddr_used_bytes == 0


def test_a_lost_card_is_reported(card: AxiRecorder, case: Case) -> None:
    card.kill()
    with pytest.raises(CardLostError, match="card 0"):
        product(case.a, case.b, *case.sizes, card=card)


def test_a_hung_card_is_reported_in_time(card: AxiRecorder, case: Case) -> None:
    card.hang()
    begin = time.monotonic()
    with pytest.raises(CardHungError, match=r"card 0: no progress.*0\.05 s; abort"):
        product(case.a, case.b, *case.sizes, card=card, hang_timeout_s=0.05)
    assert 0.05 <= time.monotonic() - begin < 2
    # Its owner aborts it, and it is usable, but for what it holds.
    card.abort(2)
    poll = select.poll()
    poll.register(card.completion_fd, select.POLLIN)
    assert poll.poll(2000)
    assert len(card.completions()) == 1


def test_a_card_with_other_work_is_refused_and_keeps_it(card: AxiRecorder, case: Case) -> None:
    x = card.alloc(64)
    made = Program((op.add(Ref("x"), Ref("x"), n=16),), 1, 0, 1)
    program = card.load_program(made.encode({"x": x}))
    fence = card.submit(program, encode_step([SequenceStep([0], 0, [])]))
    for _ in range(2):
        with pytest.raises(CardCommandError, match="card 0: work of others"):
            product(case.a, case.b, *case.sizes, card=card)
        while card.counters().queued:  # the second time it is finished, but not collected
            time.sleep(0.001)
    assert [c.fence for c in card.completions()] == [fence]
    assert_same_bits(product(case.a, case.b, *case.sizes, card=card), case.expected)


def test_a_descriptor_that_is_readable_for_nothing_is_no_work(
    card: AxiRecorder, case: Case
) -> None:
    fd = card.completion_fd
    assert fd is not None
    # As the signal of a completion that somebody had taken sooner.
    os.eventfd_write(fd, 1)
    assert_same_bits(product(case.a, case.b, *case.sizes, card=card), case.expected)


class SlowCard(AxiRecorder):
    """Finishes long after its descriptor should have said so, and gets something done all along."""

    def __init__(self, card: AxiRecorder, turns: int) -> None:
        super().__init__(card)
        self.turns = turns
        self._silent = os.pipe()

    @property
    def completion_fd(self) -> int:
        return self._silent[0]

    def counters(self) -> DeviceCounters:
        counters = super().counters()
        return attrs.evolve(counters, progress=1000 - self.turns)

    def completions(self) -> Sequence[Completion]:
        if self.turns:
            self.turns -= 1
            return ()
        return super().completions()

    def close_pipe(self) -> None:
        for fd in self._silent:
            os.close(fd)


def test_a_slow_card_has_the_time_it_needs_while_it_gets_anything_done(
    card: AxiRecorder, case: Case
) -> None:
    slow = SlowCard(card, turns=5)
    begin = time.monotonic()
    try:
        got = product(case.a, case.b, *case.sizes, card=slow, hang_timeout_s=0.03)
    finally:
        slow.close_pipe()
    assert_same_bits(got, case.expected)
    assert time.monotonic() - begin >= 0.1


class PromptCard(AxiRecorder):
    """Has no descriptor: `submit` returns when the step is done, or `lazy` a while before."""

    lazy = False

    @property
    def completion_fd(self) -> None:
        return None

    def submit(self, program: int, parameters: Any, reads: Any = ()) -> int:
        fence = super().submit(program, parameters, reads)
        while not self.lazy and self.counters().queued:
            time.sleep(0.001)
        return fence


def test_a_card_without_a_descriptor(card: AxiRecorder, case: Case) -> None:
    prompt = PromptCard(card)
    assert_same_bits(product(case.a, case.b, *case.sizes, card=prompt), case.expected)
    prompt.lazy = True
    card.hang()
    with pytest.raises(CardError, match="no descriptor to wait for"):
        product(case.a, case.b, *case.sizes, card=prompt)


# --- options ----------------------------------------------------------------------------


def test_the_instruction_set_is_a_matter_of_the_calls_own_card(
    card: AxiRecorder, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'scalar' was asked for, but card 0 has"):
        product(case.a, case.b, *case.sizes, card=card, isa="scalar")
    with pytest.raises(ConfigError, match="instruction set 'avx9000'"):
        product(case.a, case.b, *case.sizes, isa="avx9000")
    monkeypatch.setenv("SPANKER_ISA", "avx9001")
    with pytest.raises(ConfigError, match="instruction set 'avx9001'"):
        product(case.a, case.b, *case.sizes)
    assert_same_bits(product(case.a, case.b, *case.sizes, isa="scalar"), case.expected)


@pytest.mark.parametrize("hang_timeout_s", [0, -1.0, float("nan")])
def test_a_hang_timeout_is_a_positive_time(case: Case, hang_timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="hang timeout"):
        product(case.a, case.b, *case.sizes, hang_timeout_s=hang_timeout_s)
