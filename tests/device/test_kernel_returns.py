# SPDX-License-Identifier: Apache-2.0
"""Kernel cards that leave, come back and join, and their links: every generation gets the tokens it
would have got.

Over a model of the module, and over the module itself where SPANKER_TEST_KERNEL_CARDS says how many
cards there are: then they are emulated ones, which are pulled out through sysfs and hang as debugfs
tells them to.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio
from conformance_rigs import REAL_CARDS
from crowd import kinds
from driver_model import DriverModel
from waiting import until

import spanker
from spanker.actors import link_watch
from spanker.device import uapi
from spanker.device.kernel.rig import KernelRig
from spanker.device.kernel.spec import KernelCardSpec, card_path, first_cards
from spanker.errors import CardLostError, ConfigError, DriverError
from spanker.events import CardJoined, CardLost, CardReturned, LinkDown, LinkUp, Replanned
from spanker.sched.topology import Topology
from spanker.testing import write_tiny_llama

# A real module's cards are in an emulated machine, all of which may stand still for a while.
HANG_TIMEOUT_S = 15.0 if REAL_CARDS else 0.3
WITHIN_S = 300.0 if REAL_CARDS else 20.0
TOKENS = 16


class ModelledModule:
    """What happens to cards, by the model of the module."""

    def __init__(self, model: DriverModel) -> None:
        self._model = model

    def take_out(self, card: int) -> None:
        self._model.kill(card)

    def put_in(self, card: int) -> None:
        self._model.put_in(card)

    def hang(self, card: int) -> None:
        self._model.cards[card].soft.hang()

    def fail(self, card: int) -> None:
        self._model.fail(card)


class RealModule:
    """The same through sysfs and debugfs."""

    def take_out(self, card: int) -> None:
        Path(f"/sys/class/spanker/spanker{card}/device/remove").write_text("1")

    def put_in(self, card: int) -> None:
        Path("/sys/bus/pci/rescan").write_text("1")
        end = time.monotonic() + WITHIN_S
        while not Path(card_path(card)).exists():
            assert time.monotonic() < end, f"{card_path(card)} does not come back"
            time.sleep(0.01)

    def hang(self, card: int) -> None:
        self._plant(card, "HANG")

    def fail(self, card: int) -> None:
        self._plant(card, "UNCORRECTED")

    def _plant(self, card: int, fault: str) -> None:
        header = Path(__file__).parents[2] / "driver/include/spanker_card.h"
        number = re.search(rf"SAIL_FAULT_{fault} = (\d+)", header.read_text())
        assert number
        Path(f"/sys/kernel/debug/spanker/spanker{card}/fault").write_text(f"{number[1]} 1")


Module = ModelledModule | RealModule


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    if REAL_CARDS:
        yield RealModule()
        return
    model = DriverModel(2, 32 << 20)
    monkeypatch.setattr(uapi, "LINUX", model)
    yield ModelledModule(model)
    assert model.open_files == 0 and model.mapped == 0
    model.shut_down()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_tiny_llama(path, layers=2, hidden=128, kv_heads=4, vocabulary=800)


def strike(module: Module, how: str, card: int) -> None:
    if how == "taken out":
        module.take_out(card)
    elif how == "hung":
        module.hang(card)
    elif how == "failed":
        module.fail(card)
    else:
        with uapi.DeviceFile(card_path(card)) as other:
            other.reset()


def generation_of(model: spanker.Model) -> spanker.Generation:
    return model.generate([5, 6, 7], max_tokens=TOKENS, temperature=0.8, seed=3, ignore_eos=True)


async def tokens(model: spanker.Model) -> list[int]:
    generation = generation_of(model)
    await generation.collect()
    return generation.token_ids


@pytest.mark.parametrize("how", ["taken out", "reset", "hung", "failed"])
async def test_a_generation_survives_a_card_and_goes_on_after_its_return(
    how: str, module: Module, tiny: Path
) -> None:
    with trio.fail_after(WITHIN_S):
        async with spanker.open_fleet("kernel:2", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            before, used = model.plan, [d.counters().ddr_used_bytes for d in fleet.devices]
            right = await tokens(model)
            for card in (1, 0):
                generation = generation_of(model)
                async for _ in generation:
                    if len(generation.token_ids) == 4:
                        strike(module, how, card)
                    if len(generation.token_ids) == 10:
                        assert model.plan.cards == (1 - card,)
                        if how == "taken out":
                            module.put_in(card)
                        await fleet.admit(card)
                        assert model.plan == before
                assert generation.token_ids == right
                assert await tokens(model) == right
            assert kinds(fleet) == [CardLost, Replanned, CardReturned, Replanned] * 2
            assert [d.counters().ddr_used_bytes for d in fleet.devices] == used


async def test_a_card_that_is_not_there_yet_stays_lost(module: Module, tiny: Path) -> None:
    with trio.fail_after(WITHIN_S):
        async with spanker.open_fleet("kernel:2", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            right = await tokens(model)
            module.take_out(1)
            assert await tokens(model) == right
            for _ in range(2):
                with pytest.raises(CardLostError, match=r"card 1 is not there: .* number 0x"):
                    await fleet.admit(1)
            assert await tokens(model) == right
            module.put_in(1)
            await fleet.admit(1)
            assert await tokens(model) == right
            assert fleet.health().lost == () and model.plan.cards == (0, 1)


async def test_a_link_that_is_cut_is_found_and_used_again_when_it_is_mended(
    module: Module, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_watch, "LOOK_S", 0.05)
    with trio.fail_after(WITHIN_S):
        async with spanker.open_fleet("kernel:2", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            right = await tokens(model)
            generation = generation_of(model)
            async for _ in generation:
                if len(generation.token_ids) == 4:
                    fleet.devices[0].cut(1)
                    assert [d.counters().links_down for d in fleet.devices] == [(1,), (0,)]
            assert generation.token_ids == right
            assert kinds(fleet) == [LinkDown, Replanned] and len(model.plan.cards) == 1
            fleet.devices[0].mend(1)
            await until(lambda: model.plan.cards == (0, 1))
            assert [d.counters().links_down for d in fleet.devices] == [(), ()]
            assert await tokens(model) == right
            assert kinds(fleet) == [LinkDown, Replanned, LinkUp, Replanned]


async def test_a_card_joins_in_the_middle_of_a_generation(module: Module, tiny: Path) -> None:
    with trio.fail_after(WITHIN_S):
        async with spanker.open_fleet("kernel:1", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            right = await tokens(model)
            generation = generation_of(model)
            async for _ in generation:
                if len(generation.token_ids) == 4:
                    assert await fleet.add("kernel:1") == 1
                    assert model.plan.cards == (0, 1)
            assert generation.token_ids == right
            assert [card.name for card in fleet.cards] == ["spanker0", "spanker1"]
            assert fleet.topology == Topology.with_mock(2)
            arrays = [np.full(64, card + 1, np.float32) for card in range(2)]
            await spanker.all_reduce(fleet, arrays)
            assert all(np.array_equal(array, np.full(64, 3, np.float32)) for array in arrays)
            for card in (1, 0):  # either comes back to a fleet of both
                strike(module, "failed", card)
                assert await tokens(model) == right
                assert model.plan.cards == (1 - card,)
                await fleet.admit(card)
                assert model.plan.cards == (0, 1)
                assert await tokens(model) == right
            assert kinds(fleet) == [
                *(CardJoined, Replanned),
                *(CardLost, Replanned, CardReturned, Replanned) * 2,
            ]


async def test_a_card_that_is_put_in_joins(module: Module, tiny: Path) -> None:
    module.take_out(1)
    with trio.fail_after(WITHIN_S):
        async with spanker.open_fleet("kernel:1", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            right = await tokens(model)
            with pytest.raises(DriverError, match="there is no such card"):
                await fleet.add(KernelCardSpec(1))
            assert await tokens(model) == right
            module.put_in(1)
            assert await fleet.add(KernelCardSpec(1)) == 1
            assert model.plan.cards == (0, 1)
            assert await tokens(model) == right
            with pytest.raises(ConfigError, match="spanker1 is in the fleet"):
                await fleet.add(KernelCardSpec(1))


async def test_a_card_joins_whose_link_is_down(
    module: Module, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_watch, "LOOK_S", 0.05)
    with trio.fail_after(WITHIN_S):
        async with spanker.open_fleet("kernel:1", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            right = await tokens(model)
            (cut,) = links_between(0, 1)
            fleet.devices[0].file.link_control(cut, up=False)
            assert await fleet.add("kernel:1") == 1
            assert not fleet.topology.is_up(0, 1) and not fleet.topology.is_up(1, 0)
            assert len(model.plan.cards) == 1 and await tokens(model) == right
            fleet.devices[0].mend(1)
            await until(lambda: kinds(fleet) == [CardJoined, LinkUp])
            # The next time that it is planned anew.
            await fleet.drain(1)
            await fleet.admit(1)
            assert model.plan.cards == (0, 1) and await tokens(model) == right


def links_between(card: int, peer: int) -> list[int]:
    """The numbers of the links of one card that lead to another."""
    with uapi.DeviceFile(card_path(card)) as one, uapi.DeviceFile(card_path(peer)) as other:
        serial = other.info().serial
        return [n for n in range(one.info().links) if one.link(n).peer == serial]


def test_a_card_that_goes_while_its_memory_is_written_is_lost_and_nothing_else(
    module: Module,
) -> None:
    with KernelRig(first_cards(2)) as rig:
        a, b = rig.cards
        buffer = a.alloc(1 << 20)

        def write(out: np.ndarray) -> None:
            out[: len(out) // 2] = 1
            module.take_out(0)
            out[:] = 2

        with pytest.raises(CardLostError, match="is gone"):
            a.fill(buffer, 0, 1 << 20, write)
        with pytest.raises(CardLostError, match="is gone"):
            a.read(buffer, 0, 1 << 20)
        module.put_in(0)
        a.reopen()
        assert not any(a.read(a.alloc(1 << 20), 0, 1 << 20))
        assert b.counters().links_down == ()
