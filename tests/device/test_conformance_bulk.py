# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of CardDevice, last part: elements, bulk transfers, windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from conformance_rigs import MakeRig, collect, finish, make_program, step

from spanker.device.base import CardDevice
from spanker.errors import CardAbortedError, CardCommandError
from spanker.kernels import program as op
from spanker.kernels import reference
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.program import Command, Ref, Transfer

N = 1000


@pytest.fixture(autouse=True)
def _reference_may_overflow() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def elements(element: Element, seed: int, n: int = N) -> np.ndarray:
    """Any bits: NaNs, infinities and subnormals among them."""
    unsigned = np.uint32 if element.nbytes == 4 else np.uint16
    bits = np.random.default_rng(seed).integers(0, 1 << 8 * element.nbytes, n, dtype=np.uint64)
    return bits.astype(unsigned).view(element.dtype)


def run(device: CardDevice, commands: list[Command], handles: dict[str, int], tokens: int) -> None:
    program = device.load_program(make_program(*commands).encode(handles))
    device.submit(program, step(tokens))
    finish(device)
    device.unload_program(program)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("how", Reduction)
@pytest.mark.parametrize("element", Element)
def test_elements_are_folded_copied_and_divided_once(
    card: CardDevice, element: Element, how: Reduction, tokens: int
) -> None:
    """Whatever the tokens of the step; at an offset, and not a byte beyond."""
    x, y = elements(element, 1), elements(element, 2)
    handles = {"x": card.alloc(x.nbytes), "y": card.alloc(y.nbytes), "z": card.alloc(x.nbytes)}
    card.write(handles["x"], 0, x.tobytes())
    card.write(handles["y"], 0, y.tobytes())
    size, count = element.nbytes, N - 7
    commands = [
        op.reduce(element, how, Ref("x", 0, 3 * size), Ref("y", 0, size), count=count),
        op.divide(element, Ref("x", 0, 3 * size), count=5, by=3),
        op.copy(element, Ref("z", 0, 2 * size), Ref("x", 0, 3 * size), count=count),
    ]
    run(card, commands, handles, tokens)
    want = x.copy()
    want[3 : 3 + count] = reference.reduce(element, how, x[3 : 3 + count], y[1 : 1 + count])
    want[3:8] = reference.divide(element, want[3:8], 3)
    assert card.read(handles["x"], 0, x.nbytes) == want.tobytes()
    copied = np.frombuffer(card.read(handles["z"], 0, x.nbytes), np.uint8)
    assert copied[: 2 * size].sum() == 0 and copied[(2 + count) * size :].sum() == 0
    assert copied[2 * size :][: count * size].tobytes() == want[3 : 3 + count].tobytes()


def test_counts_of_nothing_do_nothing(card: CardDevice) -> None:
    handle = card.alloc(64)
    card.write(handle, 0, b"\x11" * 64)
    at = Ref("x", 0, 64)
    run(card, [op.divide(Element.F32, at, count=0, by=2)], {"x": handle}, 0)
    assert card.read(handle, 0, 64) == b"\x11" * 64


def test_counts_beyond_32_bits_are_understood(card: CardDevice) -> None:
    """Not cut off: so many elements do not fit, where their lower half would."""
    handle = card.alloc(64)
    program = make_program(op.divide(Element.F32, Ref("x"), count=(1 << 32) + 1, by=2))
    with pytest.raises(CardCommandError, match=r"17,?179,?869,?188 bytes"):
        card.load_program(program.encode({"x": handle}))
    transfer = Transfer(True, 1, Ref("x"), (1 << 32) + 1, bulk=True)
    program = make_program(*op.exchange([transfer]))
    with pytest.raises(CardCommandError):
        card.load_program(program.encode({"x": handle}))


@pytest.mark.parametrize("nbytes", [1, 8, 4097, 300_001])
def test_bulk_transfers_carry_all_bytes_once(make_rig: MakeRig, nbytes: int) -> None:
    """Both directions at once, together with rows of the step's tokens between the same cards."""
    cards = make_rig(2).cards
    data = [np.random.default_rng(c).bytes(nbytes) for c in range(2)]
    rows = [np.random.default_rng(9 + c).bytes(3 * 16) for c in range(2)]
    handles, programs = [], []
    for me, card in enumerate(cards):
        mine = {"out": card.alloc(nbytes), "in": card.alloc(nbytes)}
        mine |= {"rows": card.alloc(64), "others": card.alloc(64)}
        card.write(mine["out"], 0, data[me])
        card.write(mine["rows"], 0, rows[me])
        transfers = [
            Transfer(True, 1 - me, Ref("out"), nbytes, bulk=True),
            Transfer(True, 1 - me, Ref("rows", 16), 16),
            Transfer(False, 1 - me, Ref("in"), nbytes, bulk=True),
            Transfer(False, 1 - me, Ref("others", 16), 16),
        ]
        programs.append(card.load_program(make_program(*op.exchange(transfers)).encode(mine)))
        handles.append(mine)
    for card, program in zip(cards, programs, strict=True):
        card.submit(program, step(3))
    for me, card in enumerate(cards):
        finish(card)
        assert card.read(handles[me]["in"], 0, nbytes) == data[1 - me]
        assert card.read(handles[me]["others"], 0, 48) == rows[1 - me]
        assert card.counters().link_tx_bytes[1 - me] == nbytes + 48


# --- windows ----------------------------------------------------------------------------


@pytest.fixture
def windowed(make_rig: MakeRig) -> tuple[CardDevice, ...]:
    cards = tuple(make_rig(2).cards)
    if not cards[0].info.windows_max:
        with pytest.raises(CardCommandError):
            cards[0].window(64)
        pytest.skip("this body has no windows")
    return cards


def test_a_window_takes_nothing_and_is_lent_memory_for_each_step(
    windowed: tuple[CardDevice, ...],
) -> None:
    card = windowed[0]
    used = card.counters().ddr_used_bytes
    window = card.window(4 * N)
    assert card.counters().ddr_used_bytes == used
    ones = card.alloc(4 * N)
    card.write(ones, 0, np.ones(N, np.float32).tobytes())
    program = card.load_program(
        make_program(op.reduce(Element.F32, Reduction.SUM, Ref("w"), Ref("ones"), count=N)).encode(
            {"w": window, "ones": ones}
        )
    )
    first, second = np.arange(N, dtype=np.float32), np.zeros(N, np.float32)
    # Queued one behind the other: each works on its own.
    for array in (first, second, first):
        card.submit(program, step(0), lent=[(window, memoryview(array).cast("B"))])
    finish(card, 3)
    assert (first == np.arange(N) + 2).all() and (second == 1).all()
    with pytest.raises(CardCommandError):
        card.free(window)
    card.unload_program(program)
    card.free(window)
    with pytest.raises(CardCommandError):
        card.free(window)


@pytest.mark.parametrize("wrong", ["nothing", "too short", "too long", "another window", "twice"])
def test_memory_that_does_not_fit_is_refused(windowed: tuple[CardDevice, ...], wrong: str) -> None:
    card = windowed[0]
    window, other = card.window(64), card.window(64)
    divide = op.divide(Element.F32, Ref("w"), count=16, by=2)
    program = card.load_program(make_program(divide).encode({"w": window}))
    lent = {
        "nothing": [],
        "too short": [(window, bytearray(60))],
        "too long": [(window, bytearray(68))],
        "another window": [(other, bytearray(64))],
        "twice": [(window, bytearray(64)), (window, bytearray(64))],
    }[wrong]
    with pytest.raises(CardCommandError):
        card.submit(program, step(0), lent=[(w, memoryview(m)) for w, m in lent])
    card.submit(program, step(0), lent=[(window, memoryview(bytearray(64)))])
    finish(card)


def test_lent_memory_is_kept_until_its_completion_is_taken(
    windowed: tuple[CardDevice, ...],
) -> None:
    """A card that waits for its peer holds it; aborted, it lets go."""
    card = windowed[0]
    window = card.window(64)
    commands = op.exchange([Transfer(False, 1, Ref("w"), 64, bulk=True)])
    program = card.load_program(make_program(*commands).encode({"w": window}))
    memory = bytearray(64)
    card.submit(program, step(0), lent=[(window, memoryview(memory))])
    with pytest.raises(BufferError):
        memory.clear()
    card.abort(2)
    (completion,) = collect(card, 1)
    assert isinstance(completion.error, CardAbortedError)
    memory.clear()
