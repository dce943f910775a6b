# SPDX-License-Identifier: Apache-2.0
"""Collectives on live fleets: results are those of numpy folds in card order, in every bit."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from waiting import until

import spanker
from spanker import aio
from spanker.actors import collectives
from spanker.actors import coordinator as coordinators
from spanker.actors.channel import MemoryChannel
from spanker.actors.collectives import Collectives
from spanker.device.base import Completion, Part
from spanker.device.soft import SoftCard
from spanker.errors import (
    CardHungError,
    CardLostError,
    CardMemoryError,
    CollectiveError,
    ShapeMismatchError,
    SpankerError,
    TopologyMismatchError,
)
from spanker.testing import faulty_fleet, hang, kill

Array = np.ndarray
CARDS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 16)
SIZES = (0, 1, 7, 4096)
LARGE = 1_000_003
DTYPES = ("float32", "float16", "bfloat16", "int32")
OPS = ("sum", "avg", "max", "min")
# Memory is shared, or it is not; the last one goes through a modelled link too.
CHANNELS = pytest.mark.parametrize(
    "options", [{}, {"channel": "unix"}, {"profile": "rev-a"}], ids=str
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture(autouse=True)
def _folds_may_overflow() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


# --- data and what must come of them -----------------------------------------------------


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def position_data(card: int, n: int, dtype: str = "float32") -> Array:
    """Differs by card and position; folded in another order it gives other bits."""
    i = np.arange(n, dtype=np.uint64) + np.uint64((card + 1) << 40)
    mixed = i * np.uint64(0x9E3779B97F4A7C15)
    if dtype == "int32":
        return (mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)
    mantissa = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    x = mantissa * np.exp2((mixed >> np.uint64(8) & np.uint64(7)).astype(np.float32))
    # Now and then what careless arithmetic gets wrong.
    odd = mixed >> np.uint64(20) & np.uint64(63)
    for value, pick in ((np.nan, 1), (np.inf, 2), (-np.inf, 3), (-0.0, 4), (0.0, 5), (1e-41, 6)):
        x = np.where(odd == pick, np.float32(value), x).astype(np.float32)
    return as_dtype(x, dtype)


def as_dtype(x: Array, dtype: str) -> Array:
    """Rounded to nearest even, NaNs canonical."""
    x = np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32)).astype(np.uint32)
    if dtype == "bfloat16":
        return ((x.astype(np.uint64) + 0x7FFF + (x >> 16 & 1)) >> 16).astype(np.uint16)
    return x.view(np.float32).astype(np.float16 if dtype == "float16" else np.float32)


def as_floats(x: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def fold(arrays: list[Array], op: str, dtype: str = "float32") -> Array:
    """Left to right, written without looking at the package: one rounding after each step."""
    result = arrays[0]
    for array in arrays[1:]:
        if dtype == "int32":
            if op in ("sum", "avg"):
                result = (result.astype(np.int64) + array).astype(np.int32)
            else:
                result = (np.maximum if op == "max" else np.minimum)(result, array)
            continue
        a, b = as_floats(result, dtype), as_floats(array, dtype)
        if op in ("sum", "avg"):
            c = a + b
        else:
            negative = (
                np.signbit(a) | np.signbit(b) if op == "min" else np.signbit(a) & np.signbit(b)
            )
            zero = np.where(negative, np.float32(-0.0), np.float32(0.0))
            c = (np.maximum if op == "max" else np.minimum)(a, b)
            c = np.where((a == 0) & (b == 0), zero, c).astype(np.float32)
        result = as_dtype(c, dtype)
    if op != "avg":
        return result
    if dtype == "int32":
        return np.trunc(result / len(arrays)).astype(np.int32)
    return as_dtype(as_floats(result, dtype) / np.float32(len(arrays)), dtype)


def said(dtype: str) -> str | None:
    return dtype if dtype == "bfloat16" else None


# --- results ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", CARDS)
async def test_every_collective_on_every_number_of_cards(n: int) -> None:
    async with spanker.open_fleet(n) as fleet:
        for size in SIZES:
            given = [position_data(card, size) for card in range(n)]
            kept = [x.copy() for x in given]
            for op in ("sum", "min"):
                mine, want = [x.copy() for x in given], fold(given, op)
                await spanker.all_reduce(fleet, mine, op)
                assert all(same(x, want) for x in mine), (n, size, op)
                parts = await spanker.reduce_scatter(fleet, given, op)
                for x, share in zip(parts, np.array_split(want, n), strict=True):
                    assert same(x, share), (n, size, op)
            wholes = await spanker.all_gather(fleet, given)
            assert all(same(x, np.concatenate(given)) for x in wholes), (n, size)
            for root in {0, n - 1}:
                mine = [x.copy() for x in given]
                await spanker.broadcast(fleet, mine, root)
                assert all(same(x, given[root]) for x in mine), (n, size)
            padded = [np.resize(x, -(-size // n) * n) for x in given]
            swapped = await spanker.all_to_all(fleet, padded)
            for i, x in enumerate(swapped):
                assert same(x, np.concatenate([np.split(y, n)[i] for y in padded])), (n, size)
            await spanker.barrier(fleet)
            assert all(same(x, y) for x, y in zip(given, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_dtype_and_op(dtype: str) -> None:
    async with spanker.open_fleet(3) as fleet:
        for size in (5, 4099):
            given = [position_data(card, size, dtype) for card in range(3)]
            for op in OPS:
                mine, want = [x.copy() for x in given], fold(given, op, dtype)
                await spanker.all_reduce(fleet, mine, op, dtype=said(dtype))
                assert all(same(x, want) for x in mine), op
                parts = await spanker.reduce_scatter(fleet, given, op, dtype=said(dtype))
                assert same(np.concatenate(parts), want), op
            wholes = await spanker.all_gather(fleet, given, dtype=said(dtype))
            assert all(same(x, np.concatenate(given)) for x in wholes)


@pytest.mark.parametrize(("n", "size"), [(2, LARGE), (5, LARGE), (3, 3 * 131_072)])
async def test_large_arrays_in_tiles(n: int, size: int) -> None:
    async with spanker.open_fleet(n) as fleet:
        given = [position_data(card, size) for card in range(n)]
        mine = [x.copy() for x in given]
        await spanker.all_reduce(fleet, mine)
        want = fold(given, "sum")
        assert all(same(x, want) for x in mine)
        parts = await spanker.reduce_scatter(fleet, given, "avg")
        assert same(np.concatenate(parts), fold(given, "avg"))


@CHANNELS
@pytest.mark.parametrize("size", [7, 100_003])
async def test_whatever_way_arrays_get_to_the_cards(options: dict[str, str], size: int) -> None:
    async with spanker.open_fleet(3, **options) as fleet:
        given = [position_data(card, size) for card in range(3)]
        mine = [x.copy() for x in given]
        await spanker.all_reduce(fleet, mine)
        assert all(same(x, fold(given, "sum")) for x in mine)
        assert same((await spanker.all_gather(fleet, given))[2], np.concatenate(given))
        parts = await spanker.reduce_scatter(fleet, given, "max")
        assert same(np.concatenate(parts), fold(given, "max"))
        await spanker.barrier(fleet)


@CHANNELS
async def test_arrays_of_the_cards(options: dict[str, str]) -> None:
    async with spanker.open_fleet(3, **options) as fleet:
        given = [position_data(card, 600).reshape(30, 20) for card in range(3)]
        async with (
            await fleet.arrays((30, 20)) as arrays,
            await fleet.arrays((30, 20), np.float32) as out,
        ):
            assert arrays.shared == (options == {}) and len(arrays) == 3
            assert not (await arrays.read(1)).any()
            for card, x in enumerate(given):
                await arrays.write(card, x)
            for _ in range(2):
                await spanker.all_to_all(fleet, arrays, out=out)
            parts = [np.split(x.reshape(-1), 3)[1] for x in given]
            assert same((await out.read(1)).reshape(-1), np.concatenate(parts))
            await spanker.all_reduce(fleet, arrays, "avg")
            want = fold(given, "avg")
            assert same(await arrays.read(2), want)
            if arrays.shared:
                assert same(arrays[0], want)
                arrays[0][...] = 7
            else:
                with pytest.raises(CollectiveError, match=r"await arrays\.read"):
                    arrays[0]
                await arrays.write(0, 7)
            await spanker.broadcast(fleet, arrays)
            assert (await arrays.read(2) == 7).all()
            with pytest.raises(CollectiveError, match="shape"):
                await arrays.write(0, np.zeros(3))
        with pytest.raises(CollectiveError, match="closed"):
            await spanker.all_reduce(fleet, arrays)
        await fleet._collectives.trim()
        assert all(card.ddr_used_bytes == 0 for card in (await fleet.stats()).cards)


async def test_arrays_belong_to_one_fleet() -> None:
    async with spanker.open_fleet(2) as fleet, spanker.open_fleet(2) as other:
        arrays = await other.arrays(8)
        with pytest.raises(CollectiveError, match="another fleet"):
            await spanker.all_reduce(fleet, arrays)


@pytest.mark.parametrize("size", [0, 5])
async def test_every_call_is_a_checkpoint(size: int) -> None:
    """On one card too, which has nothing to do, and on nothing."""
    async with spanker.open_fleet(1) as fleet:
        await spanker.all_reduce(fleet, [np.zeros(size, np.float32)])
        with trio.move_on_after(0) as scope:
            await spanker.all_reduce(fleet, [np.zeros(size, np.float32)])
        assert scope.cancelled_caught


async def test_what_is_written_where() -> None:
    """In place, into `out`, or new: as the documentation says."""
    async with spanker.open_fleet(4) as fleet:
        given = [position_data(card, 4 * 10).reshape(4, 10) for card in range(4)]
        out = [np.zeros((16, 10), np.float32) for _ in range(4)]
        got = await spanker.all_gather(fleet, given, out=out)
        assert all(x is y and same(x, np.concatenate(given)) for x, y in zip(got, out, strict=True))

        wholes = [np.zeros(10, np.float32) for _ in range(4)]
        shares = np.array_split(np.arange(10), 4)
        for card, share in enumerate(shares):
            wholes[card][share] = given[card].reshape(-1)[share]
        got = await spanker.all_gather(fleet, wholes, in_place=True)
        want = np.concatenate([x.reshape(-1)[s] for x, s in zip(given, shares, strict=True)])
        assert all(x is y and same(x, want) for x, y in zip(got, wholes, strict=True))

        mine = [x.copy() for x in given]
        parts = await spanker.reduce_scatter(fleet, mine, in_place=True)
        assert all(np.shares_memory(x, y) for x, y in zip(parts, mine, strict=True))
        assert same(np.concatenate(parts), fold(given, "sum").reshape(-1))

        swapped = await spanker.all_to_all(fleet, given)
        assert all(x.shape == (4, 10) for x in swapped)
        one = [np.full((), card, np.float32) for card in range(4)]
        await spanker.all_reduce(fleet, one)
        assert all(x == 6 for x in one)
        assert same((await spanker.all_gather(fleet, one))[0], np.full(4, 6, np.float32))

        frozen = [x.copy() for x in given]
        for x in frozen:
            x.flags.writeable = False
        assert same((await spanker.all_gather(fleet, frozen))[1], np.concatenate(given))


def test_asyncio_programs_call_the_same() -> None:
    async def program() -> None:
        async with aio.open_fleet(3) as fleet:
            given = [position_data(card, 300) for card in range(3)]
            mine = [x.copy() for x in given]
            await aio.all_reduce(fleet, mine, "avg")
            assert all(same(x, fold(given, "avg")) for x in mine)
            assert same((await aio.all_gather(fleet, given))[0], np.concatenate(given))
            parts = await aio.reduce_scatter(fleet, given)
            assert same(np.concatenate(parts), fold(given, "sum"))
            swapped = await aio.all_to_all(fleet, given)
            assert same(swapped[0], np.concatenate([x[:100] for x in given]))
            await aio.broadcast(fleet, mine, 1)
            await aio.barrier(fleet)
            async with (
                await fleet.arrays(9, np.int32) as arrays,
                await fleet.arrays(9, "i32") as out,
            ):
                assert arrays.shared and arrays.shape == (9,) and len(arrays) == 3
                await arrays.write(2, np.arange(9))
                await aio.all_reduce(fleet, arrays)
                await aio.all_to_all(fleet, arrays, out=out)
                assert (await arrays.read(0) == np.arange(9)).all() and out[1][0] == 3
            with pytest.raises(TopologyMismatchError):
                await aio.all_reduce(fleet, mine[:2])

    asyncio.run(program())


# --- what is refused ----------------------------------------------------------------------


def refusals() -> list[tuple[str, Callable[[Any], Any], type[SpankerError], str]]:
    f32 = np.float32

    def three(n: int = 6, dtype: Any = f32) -> list[Array]:
        return [np.zeros(n, dtype) for _ in range(3)]

    def other(sail: int, array: Array) -> list[Array]:
        arrays = three()
        arrays[sail] = array
        return arrays

    one = np.zeros(60, f32)
    reduce = spanker.all_reduce
    frozen = np.zeros(6, f32)
    frozen.flags.writeable = False
    shifted = np.frombuffer(bytearray(25), np.uint8)[1:].view(f32)
    return [
        ("two", lambda f: reduce(f, three()[:2]), TopologyMismatchError, "3 cards, got 2"),
        ("none", lambda f: reduce(f, []), TopologyMismatchError, "got 0"),
        ("length", lambda f: reduce(f, other(1, np.zeros(7, f32))), ShapeMismatchError, "card 1"),
        (
            "dtype",
            lambda f: reduce(f, other(2, np.zeros(6, np.int32))),
            ShapeMismatchError,
            "int32",
        ),
        (
            "list",
            lambda f: reduce(f, other(2, [0.0] * 6)),
            CollectiveError,
            "numpy array, got list",
        ),
        ("float64", lambda f: reduce(f, three(6, float)), CollectiveError, "array of float64"),
        ("uint16", lambda f: reduce(f, three(6, np.uint16)), CollectiveError, "dtype='bfloat16'"),
        ("bf16", lambda f: reduce(f, three(), dtype="bfloat16"), CollectiveError, "2 bytes"),
        ("unknown", lambda f: reduce(f, three(), dtype="int4"), CollectiveError, "'int4'"),
        ("op", lambda f: reduce(f, three(), "product"), CollectiveError, "sum, avg, max, min"),
        ("strides", lambda f: reduce(f, other(0, one[::10])), CollectiveError, "contiguous"),
        ("read-only", lambda f: reduce(f, other(1, frozen)), CollectiveError, "read-only"),
        ("unaligned", lambda f: reduce(f, other(1, shifted)), CollectiveError, "aligned to 4"),
        ("same", lambda f: reduce(f, [one[:6]] * 3), CollectiveError, "cards 0 and 1 share"),
        (
            "overlap",
            lambda f: reduce(f, [one[20:26], one[0:6], one[5:11]]),
            CollectiveError,
            "cards 1 and 2 share",
        ),
        ("root", lambda f: spanker.broadcast(f, three(), 3), CollectiveError, "cards 0 to 2"),
        ("odd", lambda f: spanker.all_to_all(f, three(7)), ShapeMismatchError, "multiple of 3"),
        (
            "out",
            lambda f: spanker.all_gather(f, three(), out=three(17)),
            ShapeMismatchError,
            r"expected shape \(18,\)",
        ),
        (
            "outs",
            lambda f: spanker.all_gather(f, three(), out=three(18)[:1]),
            TopologyMismatchError,
            "out: expected",
        ),
        (
            "out in place",
            lambda f: spanker.all_gather(f, three(), out=three(18), in_place=True),
            CollectiveError,
            "in place",
        ),
    ]


REFUSALS = refusals()


async def test_arrays_that_do_not_fit_are_refused_and_left_alone() -> None:
    async with spanker.open_fleet(3) as fleet:
        for name, call, kind, text in REFUSALS:
            with pytest.raises(kind, match=text):
                await call(fleet)
                pytest.fail(name)
        with pytest.raises(TopologyMismatchError) as topology:
            await spanker.all_reduce(fleet, [np.zeros(1, np.float32)] * 4)
        assert (topology.value.expected, topology.value.actual) == (3, 4)
        with pytest.raises(ShapeMismatchError) as shape:
            await spanker.all_reduce(fleet, [np.zeros(n, np.float32) for n in (5, 5, 6)])
        assert (shape.value.sail, shape.value.expected, shape.value.actual) == (2, 5, 6)
        # Nothing of all this has reached a card.
        assert all(card.steps == 0 for card in (await fleet.stats()).cards)


# --- beside models, and when something fails ------------------------------------------------


async def test_a_model_goes_on_beside_them(tiny_model: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny_model)
        alone = model.generate("Hello", max_tokens=60, ignore_eos=True)
        await alone.collect()
        given = [position_data(card, 5000) for card in range(2)]
        want = fold(given, "sum")
        generation = model.generate("Hello", max_tokens=60, ignore_eos=True)
        done = 0

        async def collect() -> None:
            async for _ in generation:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            for _ in range(25):
                mine = [x.copy() for x in given]
                await spanker.all_reduce(fleet, mine)
                assert all(same(x, want) for x in mine)
                done += 1
        assert generation.token_ids == alone.token_ids and done == 25


async def test_many_callers_take_turns() -> None:
    async with spanker.open_fleet(3) as fleet:

        async def call(seed: int) -> None:
            given = [position_data(card + seed, 100 + seed) for card in range(3)]
            mine = [x.copy() for x in given]
            await spanker.all_reduce(fleet, mine)
            assert all(same(x, fold(given, "sum")) for x in mine)

        async with trio.open_nursery() as nursery:
            for seed in range(40):
                nursery.start_soon(call, seed)


async def test_what_is_prepared_is_given_up_for_a_model(tiny_model: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        before = [c.ddr_used_bytes for c in (await fleet.stats()).cards]
        await spanker.reduce_scatter(fleet, [np.zeros(LARGE, np.float32) for _ in range(2)])
        assert [c.ddr_used_bytes for c in (await fleet.stats()).cards] > before
        model = await fleet.load(tiny_model)
        assert not fleet._collectives._prepared
        await spanker.all_reduce(fleet, [np.zeros(10, np.float32) for _ in range(2)])
        assert len(await model.generate("x", max_tokens=3).collect()) > 0


async def test_only_so_much_stays_prepared() -> None:
    """Programs have 64 places on a card, and its memory belongs to models."""
    async with spanker.open_fleet(2) as fleet:
        for size in range(1, 100):
            await spanker.all_reduce(fleet, [np.zeros(size, np.float32) for _ in range(2)])
        assert len(fleet._collectives._prepared) == 32
        for size in range(4):
            arrays = [np.zeros(8_000_000 + size, np.float32) for _ in range(2)]
            await spanker.reduce_scatter(fleet, arrays)
        used = max(c.ddr_used_bytes for c in (await fleet.stats()).cards)
        assert used <= 64 << 20


async def test_a_card_without_room_says_so_and_keeps_nothing() -> None:
    async with spanker.open_fleet("soft:2:1MiB") as fleet:
        small = [np.ones(1000, np.float32) for _ in range(2)]
        await spanker.reduce_scatter(fleet, small)
        with pytest.raises(CardMemoryError, match="card 0: no room for"):
            await spanker.reduce_scatter(fleet, [np.ones(900_000, np.float32) for _ in range(2)])
        assert all(c.ddr_used_bytes == 0 for c in (await fleet.stats()).cards)
        assert same((await spanker.reduce_scatter(fleet, small))[0], np.full(500, 2, np.float32))


async def test_arrays_beyond_what_a_message_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are staged, in pieces; both sides of the limits."""
    monkeypatch.setattr(collectives, "LENT_BYTES_MAX", 40_000)
    monkeypatch.setattr(collectives, "READ_BACK_BYTES_MAX", 60_000)
    monkeypatch.setattr(collectives, "PIECE_BYTES", 7_000)
    async with spanker.open_fleet(2) as fleet:
        for size in (10_000, 10_001, 15_000, 15_001, 30_000):
            given = [position_data(card, size) for card in range(2)]
            mine = [x.copy() for x in given]
            await spanker.all_reduce(fleet, mine)
            assert all(same(x, fold(given, "sum")) for x in mine), size


@pytest.mark.parametrize("when", [0, 0.0005, 0.002, 0.005])
async def test_cancelled_while_it_is_prepared_nothing_is_kept(when: float) -> None:
    async with spanker.open_fleet("soft:3:64MiB", channel="unix") as fleet:
        for size in range(20_000, 20_010):
            with trio.move_on_after(when):
                await spanker.reduce_scatter(
                    fleet, [np.ones(size, np.float32) for _ in range(3)], "max"
                )
        await fleet._collectives.trim()
        assert all(card.ddr_used_bytes == 0 for card in (await fleet.stats()).cards)


async def test_arrays_closed_while_others_have_the_cards_go_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with spanker.open_fleet(2, channel="unix") as fleet:
        arrays = await fleet.arrays(1000)
        monkeypatch.setattr(collectives, "RELEASE_S", 0.05)

        async def close(task_status: trio.TaskStatus[None]) -> None:
            with trio.move_on_after(0.01) as scope:
                task_status.started()
                await arrays.aclose()
            assert scope.cancelled_caught

        async with trio.open_nursery() as nursery, fleet._coordinator.changing_memory():
            await nursery.start(close)
            await trio.sleep(0.1)
        assert any(card.ddr_used_bytes for card in (await fleet.stats()).cards)
        await fleet._collectives.trim()
        assert all(card.ddr_used_bytes == 0 for card in (await fleet.stats()).cards)


@pytest.mark.parametrize("behind", [False, True])
async def test_what_a_card_is_slow_to_give_back_is_given_back_later(
    behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the card has been sent word of it already, or not."""
    monkeypatch.setattr(collectives, "RELEASE_S", 0.05)
    async with faulty_fleet("soft:2", "", channel="unix") as (fleet, injection):
        for size in (1000, 2000):
            await spanker.all_reduce(fleet, [np.ones(size, np.float32) for _ in range(2)])
        client, post = fleet._coordinator.clients[1], fleet._coordinator.clients[1].post

        async def full(*args: Any) -> None:
            await trio.sleep(0.03)
            await post(*args)

        with monkeypatch.context() as patch:
            if behind:
                patch.setattr(client, "post", full)
            injection.strike("stall channel:1@time:0 for 0.3s")
            await fleet._collectives.trim()
            assert fleet.devices[0].counters().ddr_used_bytes == 0
            assert fleet.devices[1].counters().ddr_used_bytes > 0
        await trio.sleep(0.3)
        await fleet._collectives.trim()
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == [0, 0]
        await spanker.all_reduce(fleet, [np.ones(1000, np.float32) for _ in range(2)])


@pytest.mark.parametrize("options", [{}, {"channel": "unix"}], ids=str)
async def test_a_dead_card_is_named_to_every_caller(options: dict[str, str]) -> None:
    async with spanker.open_fleet(3, **options) as fleet:
        arrays = [np.zeros(LARGE, np.float32) for _ in range(3)]
        await spanker.all_reduce(fleet, arrays)
        errors: list[CardLostError] = []

        async def call() -> None:
            mine = [x.copy() for x in arrays]
            try:
                while True:
                    await spanker.all_reduce(fleet, mine)
            except CardLostError as error:
                errors.append(error)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(call)
                await trio.sleep(0.01)
                kill(fleet, 1)
        assert [error.card for error in errors] == [1, 1, 1]
        with trio.fail_after(5), pytest.raises(CardLostError) as caught:
            await spanker.broadcast(fleet, arrays)
        assert caught.value.card == 1


async def test_a_hung_card_is_named() -> None:
    async with spanker.open_fleet(2, hang_timeout_s=0.2) as fleet:
        hang(fleet, 1)
        with trio.fail_after(10), pytest.raises(CardHungError, match="card 1"):
            await spanker.all_reduce(fleet, [np.zeros(100, np.float32) for _ in range(2)])


@pytest.mark.parametrize("what", ["read", "write", "all_reduce"])
async def test_a_card_that_falls_silent_keeps_the_others_from_nothing(
    what: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "READ_BACK_BYTES_MAX", 0)
    monkeypatch.setattr(coordinators, "STOP_S", 0.1)
    read = Collectives._read
    async with faulty_fleet("soft:3", "", hang_timeout_s=0.3, channel="unix") as (fleet, injection):
        model, arrays = await fleet.load(tiny_model, plan="tp"), await fleet.arrays(1000)

        def fall_silent() -> None:
            injection.strike("stall channel:2@time:0 for 1000s")

        async def read_back(*args: Any) -> None:
            fall_silent()
            await read(*args)

        with trio.fail_after(20):
            with pytest.raises(CardHungError, match="card 2 has not answered"):
                if what == "all_reduce":
                    monkeypatch.setattr(Collectives, "_read", read_back)
                    await spanker.all_reduce(fleet, [np.ones(1000, np.float32) for _ in range(3)])
                fall_silent()
                await (arrays.read(2) if what == "read" else arrays.write(2, 1))
            assert len(await model.generate("x", max_tokens=3).collect()) > 0
        assert model.plan.cards == (0, 1)


@pytest.mark.parametrize("options", [{}, {"channel": "unix"}], ids=str)
async def test_cancelled_at_any_moment_the_next_call_is_right(options: dict[str, str]) -> None:
    """Before, while and after the cards work; what they were lent is free again afterwards."""
    rng = np.random.default_rng(3)
    async with spanker.open_fleet(3, **options) as fleet:
        given = [position_data(card, LARGE // 4) for card in range(3)]
        want = fold(given, "sum")
        cancelled = 0
        for attempt in range(30):
            memory = [bytearray(x.tobytes()) for x in given]
            mine = [np.frombuffer(m, np.float32) for m in memory]
            with trio.move_on_after(float(rng.random()) * 0.004 if attempt else 0) as scope:
                await spanker.all_reduce(fleet, mine)
            cancelled += scope.cancelled_caught
            del mine
            # trio keeps the exception, and with it our frames, until this task has waited.
            await trio.lowlevel.checkpoint()
            gc.collect()
            for m in memory:
                m.clear()  # BufferError while a card still has it
            if attempt % 5 == 0:
                mine = [x.copy() for x in given]
                await spanker.all_reduce(fleet, mine)
                assert all(same(x, want) for x in mine)
        assert cancelled


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the messages that go over memory channels."""
    names: list[str] = []
    real = MemoryChannel.try_send

    def noting(self: MemoryChannel, message: object, request_id: int) -> bool:
        names.append(type(message).__name__)
        return real(self, message, request_id)

    monkeypatch.setattr(MemoryChannel, "try_send", noting)
    return names


@pytest.mark.parametrize("busy", [0, 1, 2, 3])
async def test_idle_cards_are_called_and_others_get_one_message_and_send_one_back(
    busy: int, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first card on that takes nothing; once it is prepared."""
    real = SoftCard.together

    class SomeTogether:
        def __init__(self, card: SoftCard, parts: Sequence[Part], parameters: bytes) -> None:
            self._first = real(card, parts[:busy], parameters) if busy else None

        def run(self, memory: Sequence[Any]) -> bool:
            # Ctrl-C before the others are told would leave runs that nobody knows of.
            assert trio.lowlevel.currently_ki_protected()
            done = self._first is not None and self._first.run(memory[:busy])
            return done and busy == 3

        def outcomes(self) -> list[Completion | int]:
            return [] if self._first is None else self._first.outcomes()

    monkeypatch.setattr(SoftCard, "together", lambda *parts: SomeTogether(*parts))
    async with spanker.open_fleet(3) as fleet:
        given = [position_data(card, 100) for card in range(3)]
        await spanker.all_reduce(fleet, [x.copy() for x in given])
        for _ in range(5):
            mine = [x.copy() for x in given]
            await trio.testing.wait_all_tasks_blocked()
            sent.clear()
            await spanker.all_reduce(fleet, mine)
            assert all(same(x, fold(given, "sum")) for x in mine)
            assert sent.count("RunLent") == 3 - busy
            # Of those that were called, all may not have been done at once.
            assert 3 - busy <= sent.count("StepDone") <= 3


async def test_a_call_beside_other_requests_comes_behind_them(sent: list[str]) -> None:
    async with spanker.open_fleet(3) as fleet:
        given = [position_data(card, 100) for card in range(3)]
        mine = [x.copy() for x in given]
        await spanker.all_reduce(fleet, mine)
        mine = [x.copy() for x in given]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet._coordinator.counters)
            nursery.start_soon(spanker.all_reduce, fleet, mine)
        assert all(same(x, fold(given, "sum")) for x in mine)


async def test_what_takes_long_is_answered_by_a_message_later(sent: list[str]) -> None:
    async with spanker.open_fleet(3) as fleet:
        given = [position_data(card, LARGE) for card in range(3)]
        await spanker.all_gather(fleet, given)
        sent.clear()
        wholes = await spanker.all_gather(fleet, given)
        assert all(same(x, np.concatenate(given)) for x in wholes)
        assert "RunLent" not in sent and "StepDone" in sent


async def test_a_small_call_wakes_nobody() -> None:
    """Who calls does it all; sleeping until a thread wakes trio takes longer than that."""

    class Steps(trio.abc.Instrument):
        def __init__(self) -> None:
            self.tasks: list[str] = []

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.tasks.append(task.name)

    async with spanker.open_fleet(3) as fleet:
        given = [position_data(card, 1000) for card in range(3)]
        mine = [x.copy() for x in given]
        await spanker.all_reduce(fleet, mine)
        quiet = 0
        for _ in range(20):
            mine = [x.copy() for x in given]
            await trio.testing.wait_all_tasks_blocked()
            steps = Steps()
            trio.lowlevel.add_instrument(steps)
            await spanker.all_reduce(fleet, mine)
            trio.lowlevel.remove_instrument(steps)
            assert all(same(x, fold(given, "sum")) for x in mine)
            # Where the machine is busy a worker may be quicker, and be waited for.
            quiet += len(steps.tasks) == 1
        assert quiet


async def test_calls_leave_no_memory_behind() -> None:
    async with spanker.open_fleet(2) as fleet:
        arrays = [np.ones(1000, np.float32) for _ in range(2)]

        async def calls(count: int) -> int:
            for _ in range(count):
                await spanker.all_reduce(fleet, arrays, "max")
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            first = await calls(50)
            last = await calls(200)
        finally:
            tracemalloc.stop()
        assert last - first < 40_000
        assert not fleet._coordinator._locks.taken(0)
        await until(lambda: not any(c._waiting for c in fleet._coordinator.clients))


async def test_a_trace_tells_of_them(tmp_path: Path, tiny_model: Path) -> None:
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny_model)
        async with fleet.trace(tmp_path / "trace.json") as trace:
            for size in (10, 100_000):
                await spanker.all_reduce(fleet, [np.ones(size, np.float32) for _ in range(2)])
            await model.generate("x", max_tokens=2).collect()
        assert trace.commands and not trace.lost
        text = (tmp_path / "trace.json").read_text()
        assert '"all_reduce"' in text and '"exchange"' in text
        # Each command is told under the step that it belonged to, on both cards.
        reduces = [e for e in json.loads(text)["traceEvents"] if e["name"] == "all_reduce"]
        assert len({e["args"]["step"] for e in reduces}) == 2, reduces
