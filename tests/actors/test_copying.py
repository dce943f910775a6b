# SPDX-License-Identifier: Apache-2.0
"""Replicas that get their weights from each other: who from whom, and that all of it arrives."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
import trio

from spanker.actors import copying
from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.steps import LoadedModel
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import CardLostError
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.sched.bandwidth import NATIVE, REV_A, Profile
from spanker.sched.layout import BufferSpec, card_buffers
from spanker.sched.plan import FleetPlan, Limits, ModelShape, on_cards, tensor_pipeline
from spanker.sched.planner import make_plan
from spanker.testing.models import tiny_llama

LIMITS = Limits(128, 16, 16, 4, 4, 4, 32)
# A link to the host that is paced, but not for long.
PACED = attrs.evolve(REV_A, host_link_bytes_per_s=1e8, host_link_latency_s=0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(layers=4).write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def shape(tiny: Path) -> ModelShape:
    with GGUFFile(tiny) as gguf:
        return llama.read_model(gguf).shape


# --- who gets what from whom ----------------------------------------------------------------


def test_counterparts_are_a_chain_where_the_host_link_is_slow(shape: ModelShape) -> None:
    plan = make_plan("dp3xtp2", shape, 6)
    assert copying.chains(plan, REV_A) == (
        ((0, 0), (1, 2), (2, 4)),
        ((0, 1), (1, 3), (2, 5)),
    )
    single = tuple(((card // 2, card),) for card in range(6))
    assert copying.chains(plan, NATIVE) == single
    fast = attrs.evolve(REV_A, host_link_bytes_per_s=REV_A.intercard_bytes_per_s)
    assert copying.chains(plan, fast) == single


def test_only_replicas_that_are_alike_are_copied(shape: ModelShape) -> None:
    pair, row = tensor_pipeline(shape, 2, 1), tensor_pipeline(shape, 1, 2)
    plan = FleetPlan(
        "mixed",
        (
            on_cards(pair, [6, 0]),
            on_cards(row, [1, 5]),
            on_cards(pair, [2, 3]),
            on_cards(tensor_pipeline(shape, 1, 1), [4]),
            on_cards(row, [8, 7]),
        ),
    )
    assert copying.chains(plan, REV_A) == (
        ((0, 6), (2, 2)),
        ((0, 0), (2, 3)),
        ((1, 1), (4, 8)),
        ((1, 5), (4, 7)),
        ((3, 4),),
    )


@pytest.mark.parametrize("cards", [2, 3, 7])
async def test_a_chain_hands_on_every_byte(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(cards)
    sizes = [1, 64, 4096, 70_000, 3, 500_001, 200, 31]
    buffers = [BufferSpec(f"b{i}", n) for i, n in enumerate(sizes)]
    # Several runs, one of a single buffer.
    monkeypatch.setattr(copying, "RUN_BYTES", 70_000)
    order = rng.sample(range(cards), cards)
    with SoftRig([SoftCardSpec(ddr_bytes=16 << 20)] * cards) as rig:
        async with open_coordinator(rig.cards, NATIVE) as coordinator:
            handles = {
                card: dict(
                    zip(
                        (b.name for b in buffers),
                        await coordinator.allocate(card, sizes),
                        strict=True,
                    )
                )
                for card in order
            }
            data = [rng.randbytes(n) for n in sizes]
            for buffer, content in zip(buffers, data, strict=True):
                rig.cards[order[0]].write(handles[order[0]][buffer.name], 0, content)
            await copying.copy(coordinator, handles, buffers)
            for card in order:
                for buffer, content in zip(buffers, data, strict=True):
                    got = rig.cards[card].read(handles[card][buffer.name], 0, buffer.nbytes)
                    assert got == content
            # No program is left: the slots are all free.
            for card in order:
                for handle in handles[card].values():
                    rig.cards[card].free(handle)


# --- loading --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(cards: int, profile: Profile) -> AsyncIterator[tuple[Coordinator, SoftRig]]:
    with SoftRig([SoftCardSpec(ddr_bytes=16 << 20)] * cards) as rig:
        async with open_coordinator(rig.cards, profile) as coordinator:
            yield coordinator, rig


async def load(coordinator: Coordinator, path: Path, plan: str) -> tuple[LoadedModel, ...]:
    with GGUFFile(path) as gguf:
        model = llama.read_model(gguf)
        made = make_plan(plan, model.shape, len(coordinator.cards))
        return await coordinator.load(model, gguf, made, LIMITS)


@pytest.mark.parametrize("plan", ["dp4", "dp2xtp2", "dp2xpp2"])
async def test_copied_replicas_hold_what_the_first_one_does(plan: str, tiny: Path) -> None:
    async with opened(4, PACED) as (coordinator, rig):
        replicas = await load(coordinator, tiny, plan)
        sent = coordinator.host_link.bytes_to_cards  # type: ignore[union-attr]
        first = replicas[0]
        for replica in replicas[1:]:
            for one, other in zip(first.plan.cards, replica.plan.cards, strict=True):
                for spec in card_buffers(first.model.shape, first.plan, one, LIMITS):
                    a = rig.cards[one].read(first.handles[one][spec.name], 0, spec.nbytes)
                    b = rig.cards[other].read(replica.handles[other][spec.name], 0, spec.nbytes)
                    assert a == b, spec.name
                    assert np.frombuffer(a, np.uint8).any() or not spec.name.startswith("blk")
    async with opened(4, attrs.evolve(PACED, intercard_bytes_per_s=1e7)) as (coordinator, _):
        # Links that are slower than the host's: everything comes from there.
        await load(coordinator, tiny, plan)
        everything = coordinator.host_link.bytes_to_cards  # type: ignore[union-attr]
    assert 0.7 * everything / len(replicas) < sent < 0.9 * everything


@pytest.fixture
def at_run(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], None]]:
    """What to do at the beginning of a run of a copy, by its number from 1; runs are short."""
    todo: dict[int, Callable[[], None]] = {}
    runs, original = itertools.count(1), copying.run

    async def run(coordinator: Coordinator, programs: dict[int, int]) -> None:
        todo.pop(next(runs), lambda: None)()
        await original(coordinator, programs)

    monkeypatch.setattr(copying, "RUN_BYTES", 1000)
    monkeypatch.setattr(copying, "run", run)
    return todo


@pytest.mark.parametrize("when", [1, 2, 5])
async def test_a_cancelled_copy_leaves_nothing(
    when: int, tiny: Path, at_run: dict[int, Callable[[], None]]
) -> None:
    async with opened(3, PACED) as (coordinator, rig):
        with trio.CancelScope() as scope:
            at_run[when] = scope.cancel
            await load(coordinator, tiny, "dp3")
        assert scope.cancelled_caught
        for card in rig.cards:
            assert card.counters().ddr_used_bytes == card.counters().queued == 0
        await load(coordinator, tiny, "dp3")


@pytest.mark.parametrize("dead", [0, 1, 2])
async def test_a_card_that_dies_in_a_copy_is_named(
    dead: int, tiny: Path, at_run: dict[int, Callable[[], None]]
) -> None:
    async with opened(3, PACED) as (coordinator, rig):
        at_run[2] = rig.cards[dead].kill
        with trio.fail_after(5), pytest.raises(CardLostError) as caught:
            await load(coordinator, tiny, "dp3")
        assert caught.value.card == dead
        for card in {0, 1, 2} - {dead}:
            counters = rig.cards[card].counters()
            assert counters.ddr_used_bytes == counters.queued == 0
