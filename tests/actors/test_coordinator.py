# SPDX-License-Identifier: Apache-2.0
"""The coordinator: which cards it takes, loading and unloading, steps that fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import trio
import trio.lowlevel
from fake_device import FakeDevice
from reference_model import forward
from waiting import until

import spanker.actors.card
from spanker.actors import coordinator as coordinators
from spanker.actors import steps
from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.message import PROTOCOL_VERSION
from spanker.actors.steps import LoadedModel
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import (
    CardAbortedError,
    CardError,
    CardFaultError,
    CardHungError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    SpankerError,
)
from spanker.ggml.architectures.llama import read_model
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.program import SequenceStep
from spanker.sched.bandwidth import NATIVE
from spanker.sched.layout import card_bytes
from spanker.sched.plan import Limits
from spanker.sched.planner import make_plan
from spanker.testing.models import TinyModel, tensor, tiny_llama

TINY = tiny_llama()
LIMITS = Limits(
    context=128,
    prompt_chunk=64,
    tokens_max=64,
    outputs_max=8,
    candidates=16,
    kv_pages=4,
    page_positions=32,
)


def only_error(group: BaseException) -> BaseException:
    while hasattr(group, "exceptions"):
        (group,) = group.exceptions
    return group


@contextlib.asynccontextmanager
async def opened(
    cards: int, *, ddr_bytes: int = 16 << 20, hang_timeout_s: float = 5.0, channel: str = "memory"
) -> AsyncIterator[tuple[Coordinator, SoftRig]]:
    with SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)] * cards) as rig:
        async with open_coordinator(
            rig.cards, NATIVE, channel=channel, hang_timeout_s=hang_timeout_s
        ) as coordinator:
            yield coordinator, rig


async def load(
    coordinator: Coordinator, model: TinyModel, path: Path, plan: str = "tp", **options: object
) -> LoadedModel:
    with GGUFFile(model.write(path / "model.gguf")) as gguf:
        parsed = read_model(gguf)
        made = make_plan(plan, parsed.shape, len(coordinator.cards))
        (loaded,) = await coordinator.load(parsed, gguf, made, LIMITS, **options)  # type: ignore[arg-type]
        return loaded


def whole(ids: Sequence[int], pages: Sequence[int] = (0, 1, 2, 3)) -> SequenceStep:
    """A step of a whole sequence; the logits of its last token are wanted."""
    return SequenceStep(ids, 0, pages, (len(ids) - 1,))


async def check_step(coordinator: Coordinator, loaded: LoadedModel, model: TinyModel) -> None:
    ids = [3, 1, 4, 1, 5]
    result = await coordinator.step(loaded, [whole(ids)], logits=True)
    assert result.logits is not None
    expected = forward(model, ids)[-1:]
    assert np.array_equal(result.logits.view(np.uint32), expected.view(np.uint32))


# --- which cards are taken -----------------------------------------------------------------


async def test_every_card_is_asked_what_it_is() -> None:
    devices = [FakeDevice(i) for i in range(3)]
    async with open_coordinator(devices, NATIVE) as coordinator:
        assert [info.name for info in coordinator.cards] == ["fake0", "fake1", "fake2"]
        assert coordinator.topology.shard_count() == 3
    assert [d.closed for d in devices] == [1, 1, 1]


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_card_with_other_semantics_is_refused_and_all_are_closed(channel: str) -> None:
    devices = [FakeDevice(i) for i in range(3)]
    devices[1].pretend(semantics_version=2)
    with pytest.raises(BaseException) as caught:
        async with open_coordinator(devices, NATIVE, channel=channel):
            raise AssertionError("not reached")
    error = only_error(caught.value)
    assert isinstance(error, CardError) and error.card == 1
    assert "card 1 computes by semantics 2, expected 1: its answers could differ" in str(error)
    assert [d.closed for d in devices] == [1, 1, 1]


async def test_a_card_that_speaks_another_protocol_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spanker.actors.card, "PROTOCOL_VERSION", 99)
    with pytest.raises(BaseException) as caught:
        async with open_coordinator([FakeDevice()], NATIVE):
            raise AssertionError("not reached")
    error = only_error(caught.value)
    assert f"card 0 speaks protocol 99, expected {PROTOCOL_VERSION}" in str(error)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_senseless_timeouts_are_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="hang timeout"):
        async with open_coordinator([], NATIVE, hang_timeout_s=timeout_s):
            pass


async def test_unknown_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="no channel 'pigeon'"):
        async with open_coordinator([], NATIVE, channel="pigeon"):
            pass


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["tp", "pp2", "tp2xpp2"])
@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_each_card_holds_what_its_plan_says(tmp_path: Path, plan: str, channel: str) -> None:
    cards = {"tp": 5, "pp2": 2, "tp2xpp2": 4}[plan]
    seen: list[tuple[int, int]] = []
    async with opened(cards, channel=channel) as (coordinator, rig):
        loaded = await load(
            coordinator, TINY, tmp_path, plan, progress=lambda *now: seen.append(now)
        )
        used = [card.counters().ddr_used_bytes for card in rig.cards]
        shape = loaded.model.shape
        assert used == [card_bytes(shape, loaded.plan, c, LIMITS) for c in range(cards)]
        # Progress grows from nothing to everything.
        totals = {total for _, total in seen}
        done = [done for done, _ in seen]
        assert len(totals) == 1 and done[0] == 0 and done[-1] == totals.pop()
        assert done == sorted(done)
        await check_step(coordinator, loaded, TINY)
        await coordinator.unload(loaded)
        assert [card.counters().ddr_used_bytes for card in rig.cards] == [0] * cards
        # And again, in memory that was used before.
        await check_step(coordinator, await load(coordinator, TINY, tmp_path, plan), TINY)


async def test_unloading_one_model_leaves_the_other(tmp_path: Path) -> None:
    other = tiny_llama(format="f16", seed=3)
    async with opened(2) as (coordinator, rig):
        first = await load(coordinator, TINY, tmp_path)
        used = [card.counters().ddr_used_bytes for card in rig.cards]
        second = await load(coordinator, other, tmp_path)
        await check_step(coordinator, first, TINY)
        await check_step(coordinator, second, other)
        await coordinator.unload(second)
        assert [card.counters().ddr_used_bytes for card in rig.cards] == used
        await check_step(coordinator, first, TINY)


async def test_a_card_that_is_silent_while_a_model_is_unloaded_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(3, hang_timeout_s=0.2) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(coordinator.clients[1], "request", _never)
            await coordinator.unload(loaded)
        assert set(coordinator.lost) == {1}
        assert "has not answered" in str(coordinator.lost[1])
        used = [rig.cards[card].counters().ddr_used_bytes for card in (0, 2)]
        assert used == [0, 0]


async def test_models_can_be_loaded_at_the_same_time(tmp_path: Path) -> None:
    async with opened(2) as (coordinator, _):
        models = [tiny_llama(seed=i) for i in range(3)]
        loaded: dict[int, LoadedModel] = {}

        async def one(number: int) -> None:
            path = tmp_path / str(number)
            path.mkdir()
            loaded[number] = await load(coordinator, models[number], path)
            await check_step(coordinator, loaded[number], models[number])

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(one, number)
        for number in range(3):
            await check_step(coordinator, loaded[number], models[number])


async def test_a_model_too_large_for_its_cards_is_refused_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with opened(2, ddr_bytes=64 << 10) as (coordinator, rig):
        with pytest.raises(CardMemoryError, match="no room for") as caught:
            await load(coordinator, TINY, tmp_path)
        assert caught.value.card in (0, 1)
        assert [card.counters().ddr_used_bytes for card in rig.cards] == [0, 0]


async def test_a_card_that_counts_other_bytes_than_the_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(2) as (coordinator, rig):
        alloc = rig.cards[1].alloc
        monkeypatch.setattr(rig.cards[1], "alloc", lambda nbytes: alloc(nbytes + 64))
        with pytest.raises(CardError, match=r"card 1 has taken .* plan tp2 says") as caught:
            await load(coordinator, TINY, tmp_path)
        assert caught.value.card == 1
        assert [card.counters().ddr_used_bytes for card in rig.cards] == [0, 0]


# --- steps ------------------------------------------------------------------------------------


async def test_the_outputs_of_a_step_come_in_order(tmp_path: Path) -> None:
    """Candidates of all cards, statistics and logits of each output of each sequence."""
    async with opened(3) as (coordinator, _):
        loaded = await load(coordinator, TINY, tmp_path)
        a, b = [7, 8, 9], [10, 11]
        result = await coordinator.step(
            loaded,
            [SequenceStep(a, 0, [2], (0, 2)), SequenceStep(b, 0, [0], (1,))],
            logits=True,
        )
        rows = np.stack([*forward(TINY, a)[[0, 2]], forward(TINY, b)[1]])
        assert result.logits is not None
        assert np.array_equal(result.logits.view(np.uint32), rows.view(np.uint32))
        # 320 words are 256 + 64: two cards with 16 candidates each, the third has none.
        assert result.ids.shape == result.values.shape == (3, 32)
        assert result.stats.shape == (3, 2, 2)
        for i in range(3):
            for part, ids in (
                (rows[i, :256], result.ids[i, :16]),
                (rows[i, 256:], result.ids[i, 16:]),
            ):
                start = 0 if part.size == 256 else 256
                best = np.lexsort((np.arange(part.size), -part))[:16] + start
                assert ids.tolist() == best.tolist()
            assert np.array_equal(result.values[i], rows[i][result.ids[i]])
            assert result.stats[i, 0, 0] == rows[i, :256].max()
            assert np.array_equal(await coordinator.read_logits(loaded, i), rows[i])
        assert len(result.busy_ns) == 3 and all(ns > 0 for ns in result.busy_ns)


async def test_a_step_without_outputs_brings_nothing_back(tmp_path: Path) -> None:
    async with opened(2) as (coordinator, _):
        loaded = await load(coordinator, TINY, tmp_path)
        result = await coordinator.step(loaded, [SequenceStep([1, 2], 0, [0])])
        assert result.ids.size == result.values.size == result.stats.size == 0
        assert result.logits is None
        # Its keys and values are there for the next one.
        result = await coordinator.step(loaded, [SequenceStep([3], 2, [0], (0,))], logits=True)
        assert result.logits is not None
        assert np.array_equal(result.logits[0], forward(TINY, [1, 2, 3])[2])


async def test_a_refused_step_leaves_the_fleet_usable(tmp_path: Path) -> None:
    async with opened(2) as (coordinator, _):
        loaded = await load(coordinator, TINY, tmp_path)
        for bad in (
            SequenceStep([320], 0, [0]),
            SequenceStep([1], 0, [4]),
            SequenceStep([1], 0, []),
        ):
            with pytest.raises(CardError, match="refused"):
                await coordinator.step(loaded, [bad])
            await check_step(coordinator, loaded, TINY)


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_cancelled_step_begins_a_new_epoch_and_the_next_one_works(
    tmp_path: Path, channel: str
) -> None:
    async with opened(3, channel=channel) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        for turn in range(20):
            epoch = coordinator._epoch
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(coordinator.step, loaded, [whole(list(range(60)))])
                    # Before it has begun, and at later and later moments of it.
                    if turn:
                        await until(lambda: coordinator._locks.taken(0))
                    for _ in range(turn // 2):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            assert coordinator._epoch in (epoch, epoch + 1)
            # Nothing is queued any more, and no card waits for another.
            assert [card.counters().queued for card in rig.cards] == [0, 0, 0]
            await check_step(coordinator, loaded, TINY)
        assert coordinator._epoch > 5


async def test_a_cancelled_step_is_over_at_once(tmp_path: Path) -> None:
    async with opened(2) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        rig.cards[1].hang()
        begin = trio.current_time()
        with trio.move_on_after(0.02):
            await coordinator.step(loaded, [whole([1, 2])])
        assert trio.current_time() - begin < 0.5


async def test_steps_queue_up_behind_each_other(tmp_path: Path) -> None:
    async with opened(2) as (coordinator, _):
        loaded = await load(coordinator, TINY, tmp_path)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(check_step, coordinator, loaded, TINY)


def sick_on_one_card() -> TinyModel:
    """The last query head is infinite: with tensor parallel only the last card meets it."""
    made = tiny_llama(format="f32")
    t = made.tensors["blk.1.attn_q.weight"]
    values = np.frombuffer(t.data, np.float32).reshape(t.shape).copy()
    values[-1] = np.inf
    made.tensors[t.name] = tensor(t.name, values, "f32")
    return made


@pytest.mark.parametrize("cards", [2, 3, 4])
async def test_a_fault_on_one_card_aborts_the_step_on_all(tmp_path: Path, cards: int) -> None:
    async with opened(cards) as (coordinator, rig):
        sick = await load(coordinator, sick_on_one_card(), tmp_path)
        well = await load(coordinator, TINY, tmp_path)
        for _ in range(10):
            epoch = coordinator._epoch
            begin = trio.current_time()
            with pytest.raises(CardFaultError, match="a NaN or an infinity") as caught:
                await coordinator.step(sick, [whole([1, 2, 3])])
            # The cause is told, not the aborts that follow from it.
            assert caught.value.card == cards - 1
            assert f"card {cards - 1}, command" in str(caught.value)
            assert trio.current_time() - begin < 1
            assert coordinator._epoch == epoch + 1
            assert [card.counters().queued for card in rig.cards] == [0] * cards
            await check_step(coordinator, well, TINY)


# --- cards that fail ---------------------------------------------------------------------------


async def test_a_killed_card_is_named_and_nobody_waits(tmp_path: Path) -> None:
    async with opened(3) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        rig.cards[2].kill()
        for _ in range(2):
            with trio.fail_after(2), pytest.raises(CardLostError, match="card 2") as caught:
                await coordinator.step(loaded, [whole([1, 2])])
            assert caught.value.card == 2


async def test_a_hung_card_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    async with opened(3, hang_timeout_s=0.2) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        rig.cards[1].hang()
        with trio.fail_after(5), pytest.raises(CardHungError, match="card 1 hangs") as caught:
            await coordinator.step(loaded, [whole([1, 2])])
        assert caught.value.card == 1


async def test_a_slow_step_is_not_taken_for_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress counts, not time: every look finds that something has moved."""
    async with opened(2, hang_timeout_s=0.05) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        counters = rig.cards[0].counters
        rig.cards[1].hang()
        looks = 0

        def moving() -> object:
            nonlocal looks
            looks += 1
            return attrs.evolve(counters(), progress=looks)

        monkeypatch.setattr(rig.cards[0], "counters", moving)
        with trio.move_on_after(0.4) as scope:
            await coordinator.step(loaded, [whole([1, 2])])
        assert scope.cancelled_caught
        assert looks > 4


async def test_an_actor_that_crashes_is_named_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(2) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)

        def boom(*args: object) -> object:
            raise KeyError("a bug")

        monkeypatch.setattr(rig.cards[0], "completions", boom)
        with trio.fail_after(5), pytest.raises(CardLostError, match=r"card 0 .*KeyError") as caught:
            await coordinator.step(loaded, [whole([1, 2])])
        assert caught.value.card == 0 and isinstance(caught.value.__cause__, KeyError)
        assert coordinator.clients[1].failure is None


async def test_counters_come_from_every_card(tmp_path: Path) -> None:
    async with opened(3) as (coordinator, rig):
        loaded = await load(coordinator, TINY, tmp_path)
        await coordinator.step(loaded, [whole([1, 2])])
        counters = await coordinator.counters()
        assert [c.steps for c in counters] == [1, 1, 1]
        sent = np.array([c.link_tx_bytes for c in counters])
        received = np.array([c.link_rx_bytes for c in counters])
        assert np.array_equal(sent, received.T) and sent.sum() > 0
        assert [c.ddr_used_bytes for c in counters] == [
            card.counters().ddr_used_bytes for card in rig.cards
        ]


async def test_leaving_stops_the_actors_and_closes_the_cards() -> None:
    devices = [FakeDevice(i) for i in range(4)]
    before = len(os.listdir("/proc/self/fd"))
    async with open_coordinator(devices, NATIVE, channel="unix"):
        assert len(os.listdir("/proc/self/fd")) > before
    assert [d.closed for d in devices] == [1] * 4
    assert len(os.listdir("/proc/self/fd")) == before - 8  # the devices' pipes


async def test_a_card_that_does_not_answer_cannot_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinators, "CLOSE_S", 0.1)
    device = FakeDevice()

    async with open_coordinator([device], NATIVE) as coordinator:
        # The card is behind with its queue full: it will not read the request to stop.
        monkeypatch.setattr(coordinator.clients[0], "post", _never)
        begin = trio.current_time()
    assert trio.current_time() - begin < 1
    assert device.closed == 1


async def _never(*args: object) -> None:
    await trio.sleep_forever()


def test_the_cause_of_a_failed_step_is_what_is_not_an_abort() -> None:
    replies = steps.Flight(1, 0, 3)
    errors: list[SpankerError] = [
        CardAbortedError("aborted", card=0),
        CardFaultError("a NaN", card=1),
        CardAbortedError("aborted", card=2),
    ]
    for card, error in enumerate(errors):
        replies.callback(card)(error)
    assert replies.cause() is errors[1]
