# SPDX-License-Identifier: Apache-2.0
"""Steps of one model queued behind each other: whose results come when, and how all of it ends."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from fake_device import FakeDevice
from reference_model import forward
from waiting import until

from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.message import AllocBuffers
from spanker.actors.steps import LoadedModel, StepPipe
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardFaultError,
    CardHungError,
    CardLostError,
)
from spanker.ggml.architectures.llama import read_model
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.program import SequenceStep, chosen_token
from spanker.sched.bandwidth import NATIVE
from spanker.sched.layout import chunks
from spanker.sched.plan import Limits
from spanker.sched.planner import make_plan
from spanker.testing.models import tiny_llama

TINY = tiny_llama()
LIMITS = Limits(
    context=128,
    prompt_chunk=64,
    tokens_max=64,
    outputs_max=8,
    candidates=4,
    kv_pages=4,
    page_positions=32,
)
STEP = [SequenceStep([1], 0, [0], (0,))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


class Fleet:
    """Cards that do what a test says, and a model on them of which they know nothing."""

    def __init__(self, coordinator: Coordinator, devices: list[FakeDevice], loaded: LoadedModel):
        self.coordinator = coordinator
        self.devices = devices
        self.loaded = loaded

    def steps(self) -> contextlib.AbstractAsyncContextManager[StepPipe]:
        return self.coordinator.steps(self.loaded)

    async def queued(self, *counts: int) -> None:
        await until(lambda: [len(d.queued) for d in self.devices] == list(counts))

    def finish(self, card: int, best: int = 0, error: Exception | None = None) -> None:
        """Complete a card's oldest step; its best candidate of output 0 is `best`."""
        device = self.devices[card]
        if "top" in self.loaded.handles[card]:
            ids = struct.pack("<I", best).ljust(4 * LIMITS.candidates, b"\0")
            device.write(self.loaded.handles[card]["top"], 0, ids + ids)
        device.finish(error)

    @property
    def aborts(self) -> list[list[str]]:
        return [[c for c in d.calls if c.startswith("abort")] for d in self.devices]


@contextlib.asynccontextmanager
async def fakes(count: int, tiny: Path, *, hang_timeout_s: float = 5.0) -> AsyncIterator[Fleet]:
    devices = [FakeDevice(i) for i in range(count)]
    with trio.fail_after(10):
        async with open_coordinator(devices, NATIVE, hang_timeout_s=hang_timeout_s) as coordinator:
            with GGUFFile(tiny) as gguf:
                model = read_model(gguf)
            (plan,) = make_plan("tp", model.shape, count).replicas
            loaded = LoadedModel(
                model, plan, LIMITS, {c: {} for c in range(count)}, dict.fromkeys(range(count), 1)
            )
            for share in loaded.output_shares:
                rows, client = share.vocabulary.size, coordinator.clients[share.card]
                for name, row_bytes in (
                    ("stats", chunks(rows) * 8),
                    ("top", LIMITS.candidates * 8),
                    ("logits", rows * 4),
                ):
                    sizes = (LIMITS.outputs_max * row_bytes,)
                    (handle,) = (await client.request(AllocBuffers(sizes))).handles
                    loaded.handles[share.card][name] = handle
            yield Fleet(coordinator, devices, loaded)


async def test_results_come_in_order_each_with_its_own_data(tiny: Path) -> None:
    async with fakes(2, tiny) as fleet, fleet.steps() as pipe:
        assert pipe.in_flight == 0
        await pipe.submit(STEP)
        await pipe.submit(STEP)
        assert pipe.in_flight == 2
        await fleet.queued(2, 2)
        # One card is a whole step ahead of the other.
        fleet.finish(0, best=11)
        fleet.finish(0, best=22)
        async with trio.open_nursery() as nursery:
            got: list[int] = []

            async def collect() -> None:
                got.append((await pipe.result()).ids[0, 0])

            nursery.start_soon(collect)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert got == []
            fleet.finish(1)
        assert got == [11] and pipe.in_flight == 1
        await pipe.submit(STEP)
        fleet.finish(1)
        assert (await pipe.result()).ids[0, 0] == 22
        await fleet.queued(1, 1)
        fleet.finish(1)
        fleet.finish(0, best=33)
        assert (await pipe.result()).ids[0, 0] == 33
        assert pipe.in_flight == 0
    assert fleet.aborts == [[], []]


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
async def test_leaving_the_block_aborts_what_was_not_collected(tiny: Path, finished: int) -> None:
    async with fakes(2, tiny) as fleet:
        async with fleet.steps() as pipe:
            await pipe.submit(STEP)
            await pipe.submit(STEP)
            await fleet.queued(2, 2)
            for i in range(finished):
                fleet.finish(i % 2)
        # One epoch for all of it, on all cards, and nothing queued.
        assert fleet.aborts == [["abort 2"], ["abort 2"]]
        await fleet.queued(0, 0)
        async with fleet.steps() as pipe:
            await pipe.submit(STEP)
            await fleet.queued(1, 1)
            fleet.finish(0, best=5)
            fleet.finish(1)
            assert (await pipe.result()).ids[0, 0] == 5
        assert fleet.aborts == [["abort 2"], ["abort 2"]]


@pytest.mark.parametrize("waiting", [True, False])
async def test_cancelling_the_block_aborts_both_steps(tiny: Path, waiting: bool) -> None:
    async with fakes(2, tiny) as fleet:
        with trio.CancelScope() as scope:
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await pipe.submit(STEP)
                await fleet.queued(2, 2)
                fleet.finish(0)
                if waiting:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(pipe.result)
                        await trio.testing.wait_all_tasks_blocked(0.01)
                        scope.cancel()
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        await fleet.queued(0, 0)
        assert fleet.aborts == [["abort 2"], ["abort 2"]]


@pytest.mark.parametrize("card", [0, 1])
async def test_an_error_of_the_first_step_is_told_and_ends_the_second(
    tiny: Path, card: int
) -> None:
    fault = CardFaultError(f"card {card}, command 3: a NaN", card=card)
    async with fakes(2, tiny) as fleet:
        with pytest.raises(CardFaultError, match=f"card {card}, command 3"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await pipe.submit(STEP)
                await fleet.queued(2, 2)
                # What was queued behind a fault is aborted with it, as a card does.
                fleet.finish(card, error=fault)
                fleet.finish(card, error=CardAbortedError("aborted", card=card))
                await pipe.result()
        await fleet.queued(0, 0)
        assert fleet.aborts == [["abort 2"], ["abort 2"]]


async def test_an_error_of_the_second_step_leaves_the_first_its_result(tiny: Path) -> None:
    fault = CardFaultError("card 1, command 3: a NaN", card=1)
    async with fakes(2, tiny) as fleet:
        with pytest.raises(CardFaultError, match="card 1, command 3"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await pipe.submit(STEP)
                await fleet.queued(2, 2)
                fleet.finish(1)
                fleet.finish(1, error=fault)
                await trio.testing.wait_all_tasks_blocked(0.01)
                fleet.finish(0, best=7)
                assert (await pipe.result()).ids[0, 0] == 7
                await pipe.result()
        await fleet.queued(0, 0)
        assert fleet.aborts == [["abort 2"], ["abort 2"]]


async def test_the_cause_is_told_though_an_abort_comes_first(tiny: Path) -> None:
    async with fakes(3, tiny) as fleet:
        with pytest.raises(CardFaultError, match="the cause"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await fleet.queued(1, 1, 1)
                fleet.finish(0, error=CardAbortedError("aborted", card=0))
                fleet.finish(2, error=CardFaultError("the cause", card=2))
                await trio.testing.wait_all_tasks_blocked(0.01)
                await pipe.result()


async def test_a_refused_second_step_is_an_error_of_its_own(tiny: Path) -> None:
    async with fakes(2, tiny) as fleet:
        with pytest.raises(CardCommandError, match="no program 666"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                fleet.loaded.programs[1] = 666
                await pipe.submit(STEP)
                await fleet.queued(2, 1)
                fleet.finish(0, best=4)
                fleet.finish(1)
                assert (await pipe.result()).ids[0, 0] == 4
                await pipe.result()
        await fleet.queued(0, 0)


async def test_a_lost_card_fails_both_steps(tiny: Path) -> None:
    async with fakes(2, tiny) as fleet:
        with pytest.raises(CardLostError, match="pulled out"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await pipe.submit(STEP)
                await fleet.queued(2, 2)
                fleet.coordinator.clients[1].fail(CardLostError("pulled out", card=1))
                await pipe.result()
        with pytest.raises(CardLostError, match="pulled out"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await pipe.result()


async def test_a_hang_in_the_second_step_is_noticed(tiny: Path) -> None:
    async with fakes(2, tiny, hang_timeout_s=0.2) as fleet:
        with pytest.raises(CardHungError, match="card 1 hangs"):
            async with fleet.steps() as pipe:
                await pipe.submit(STEP)
                await pipe.submit(STEP)
                await fleet.queued(2, 2)
                for card in (0, 0, 1):
                    fleet.finish(card)
                await pipe.result()
                await pipe.result()


async def test_nobody_elses_step_runs_within_the_block(tiny: Path) -> None:
    async with fakes(1, tiny) as fleet, trio.open_nursery() as nursery:
        order: list[str] = []

        async def other() -> None:
            await fleet.coordinator.step(fleet.loaded, STEP)
            order.append("other")

        async with fleet.steps() as pipe:
            assert not fleet.coordinator.wanted([0])
            nursery.start_soon(other)
            await until(lambda: fleet.coordinator.wanted([0]))
            for _ in range(3):
                await pipe.submit(STEP)
                await fleet.queued(1)
                fleet.finish(0)
                await pipe.result()
                order.append("own")
        await fleet.queued(1)
        fleet.finish(0)
        await until(lambda: len(order) == 4)
        assert order == ["own", "own", "own", "other"]


@pytest.mark.parametrize("plan", ["tp1", "tp3", "pp2", "tp2xpp2"])
@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_queued_step_goes_on_with_what_the_cards_have_chosen(
    tiny: Path, plan: str, channel: str
) -> None:
    """Three sequences whose outputs change places from step to step."""
    cards = {"tp1": 1, "tp3": 3, "pp2": 2, "tp2xpp2": 4}[plan]
    with SoftRig([SoftCardSpec(ddr_bytes=16 << 20)] * cards) as rig:
        async with open_coordinator(rig.cards, NATIVE, channel=channel) as coordinator:
            with GGUFFile(tiny) as gguf:
                model = read_model(gguf)
                made = make_plan(plan, model.shape, cards)
                (loaded,) = await coordinator.load(model, gguf, made, LIMITS)
            tokens = [[1, 2, 3], [9], [200, 100]]
            chosen: list[list[int]] = [[], [], []]

            def step_of(order: list[int], ahead: bool, before: list[int]) -> list[SequenceStep]:
                steps = []
                for s in order:
                    known = [chosen_token(before.index(s))] if ahead else tokens[s]
                    at = len(tokens[s]) + len(chosen[s]) if ahead else 0
                    steps.append(SequenceStep(known, at, [s], (len(known) - 1,)))
                return steps

            orders = [[0, 1, 2], [2, 0, 1], [1, 0], [0]]
            async with coordinator.steps(loaded) as pipe:
                await pipe.submit(step_of(orders[0], False, []))
                for before, order in zip(orders, [*orders[1:], None], strict=True):
                    if order is not None:
                        await pipe.submit(step_of(order, True, before))
                    result = await pipe.result()
                    for output, s in enumerate(before):
                        chosen[s].append(result.best(output)[0])
    assert [len(c) for c in chosen] == [4, 3, 2]
    for s in range(3):
        truth = forward(TINY, tokens[s] + chosen[s])[len(tokens[s]) - 1 : -1]
        assert chosen[s] == np.argmax(truth, axis=1).tolist()
