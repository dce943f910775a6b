# SPDX-License-Identifier: Apache-2.0
"""Epochs of cards: an abort is for the cards of a step, and who works together is in one epoch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from fake_device import FakeDevice
from waiting import until

from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.steps import LoadedModel
from spanker.errors import CardCommandError, CardFaultError, CardHungError, CardLostError
from spanker.ggml.architectures.llama import LlamaModel, read_model
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.program import SequenceStep
from spanker.sched.bandwidth import NATIVE
from spanker.sched.plan import Limits, on_cards, tensor_pipeline
from spanker.testing.models import tiny_llama

LIMITS = Limits(128, 64, 64, 8, 4, 4, 32)
# Without outputs: nothing is brought back.
STEP = [SequenceStep([1], 0, [0], ())]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    path = tiny_llama().write(tmp_path_factory.mktemp("models") / "tiny.gguf")
    with GGUFFile(Path(path)) as gguf:
        return read_model(gguf)


@attrs.define
class Fakes:
    coordinator: Coordinator
    devices: list[FakeDevice]
    model: LlamaModel

    def on(self, *cards: int) -> LoadedModel:
        """A model that a test says is on these cards."""
        plan = on_cards(tensor_pipeline(self.model.shape, len(cards), 1), cards)
        return LoadedModel(self.model, plan, LIMITS, {}, dict.fromkeys(cards, 1))

    @property
    def aborts(self) -> list[list[str]]:
        return [[c for c in d.calls if c.startswith("abort")] for d in self.devices]

    async def step(self, loaded: LoadedModel) -> None:
        """One step that succeeds."""
        async with self.coordinator.steps(loaded) as pipe:
            await pipe.submit(STEP)
            await self.queued(loaded.plan.cards)
            for card in loaded.plan.cards:
                self.devices[card].finish()
            await pipe.result()

    async def queued(self, cards: Sequence[int]) -> None:
        await until(lambda: all(self.devices[card].queued for card in cards))

    async def fail(self, loaded: LoadedModel) -> None:
        """One step with a fault on its first card."""
        with pytest.raises(CardFaultError):
            async with self.coordinator.steps(loaded) as pipe:
                await pipe.submit(STEP)
                await self.queued(loaded.plan.cards)
                card = loaded.plan.cards[0]
                self.devices[card].finish(CardFaultError("a NaN", card=card))
                await pipe.result()


@contextlib.asynccontextmanager
async def fakes(model: LlamaModel, hang_timeout_s: float = 5.0) -> AsyncIterator[Fakes]:
    devices = [FakeDevice(i) for i in range(4)]
    with trio.fail_after(10):
        async with open_coordinator(devices, NATIVE, hang_timeout_s=hang_timeout_s) as coordinator:
            yield Fakes(coordinator, devices, model)


async def test_steps_on_different_cards_are_queued_at_the_same_time(model: LlamaModel) -> None:
    async with fakes(model) as fleet:
        a, b = fleet.on(0, 1), fleet.on(2, 3)
        async with fleet.coordinator.steps(a) as first, fleet.coordinator.steps(b) as second:
            await first.submit(STEP)
            await second.submit(STEP)
            await fleet.queued(range(4))
            assert not fleet.coordinator.wanted(range(4))
            for device in fleet.devices:
                device.finish()
            assert (await second.result()).number == 2
            assert (await first.result()).number == 1


async def test_an_abort_is_for_the_cards_of_the_step_alone(model: LlamaModel) -> None:
    async with fakes(model) as fleet:
        a, b = fleet.on(0, 1), fleet.on(2, 3)
        async with fleet.coordinator.steps(b) as other:
            await other.submit(STEP)
            await fleet.queued([2, 3])
            await fleet.fail(a)
            with trio.CancelScope() as scope:
                async with fleet.coordinator.steps(a) as pipe:
                    await pipe.submit(STEP)
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert fleet.aborts == [["abort 2", "abort 3"]] * 2 + [[], []]
            assert [len(d.queued) for d in fleet.devices] == [0, 0, 1, 1]
            for device in fleet.devices[2:]:
                device.finish()
            await other.result()
        # Each goes on in the epoch that it is in.
        await fleet.step(a)
        await fleet.step(b)
        assert fleet.aborts == [["abort 2", "abort 3"]] * 2 + [[], []]


async def test_cards_agree_on_an_epoch_before_they_work_together(model: LlamaModel) -> None:
    async with fakes(model) as fleet:
        await fleet.fail(fleet.on(0))
        await fleet.fail(fleet.on(1))
        await fleet.step(fleet.on(1, 2))
        # A new one for all of them, before anything is queued.
        assert fleet.aborts == [["abort 2"], ["abort 3", "abort 4"], ["abort 4"], []]
        assert fleet.devices[2].calls[-2:] == ["abort 4", "submit"]
        # Once.
        await fleet.step(fleet.on(1, 2))
        assert fleet.aborts[1:3] == [["abort 3", "abort 4"], ["abort 4"]]
        with trio.fail_after(1):
            await fleet.coordinator.take_cards()
        assert [found[-1] for found in fleet.aborts] == ["abort 5"] * 4
        fleet.coordinator.give_cards_back()
        with trio.testing.assert_no_checkpoints():
            await fleet.coordinator.take_cards()
        fleet.coordinator.give_cards_back()


async def test_cards_whose_epoch_is_not_known_agree_again(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fakes(model) as fleet:
        await fleet.fail(fleet.on(0))

        def refuse(epoch: int) -> None:
            raise CardCommandError("not now", card=1)

        with monkeypatch.context() as patch:
            patch.setattr(fleet.devices[1], "abort", refuse)
            with pytest.raises(CardCommandError, match="not now"):
                await fleet.step(fleet.on(0, 1))
            with pytest.raises(CardCommandError, match="not now"):
                await fleet.coordinator.take_cards()
        assert not any(d.queued for d in fleet.devices)
        await fleet.step(fleet.on(1))
        await fleet.step(fleet.on(3, 1, 0))
        assert len({found[-1] for found in (fleet.aborts[c] for c in (0, 1, 3))}) == 1


async def test_a_cancelled_agreement_is_made_again(model: LlamaModel) -> None:
    async with fakes(model) as fleet:
        await fleet.fail(fleet.on(0))
        with trio.CancelScope() as scope:
            scope.cancel()
            await fleet.coordinator.take_cards()
        assert scope.cancelled_caught
        await fleet.step(fleet.on(0, 1, 2, 3))
        assert len({found[-1] for found in fleet.aborts}) == 1


async def test_a_card_that_is_lost_or_silent_is_told_when_cards_must_agree(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fakes(model, hang_timeout_s=0.1) as fleet:
        await fleet.fail(fleet.on(0))

        async def never(*_: object) -> None:
            await trio.sleep_forever()

        with monkeypatch.context() as patch:
            patch.setattr(fleet.coordinator.clients[2], "request", never)
            with pytest.raises(CardHungError, match="card 2 has not answered"):
                await fleet.step(fleet.on(0, 2))
        fleet.coordinator.clients[1].fail(CardLostError("pulled out", card=1))
        with pytest.raises(CardLostError, match="pulled out"):
            await fleet.step(fleet.on(0, 1))
        assert sorted(fleet.coordinator.lost) == [1, 2]
        # Nobody has kept a card.
        await fleet.step(fleet.on(0, 3))
