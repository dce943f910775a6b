# SPDX-License-Identifier: Apache-2.0
"""A model that goes to other cards takes its weights along: the very bytes of the file."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from spanker.actors import copying
from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.resharding import Move, programs
from spanker.actors.steps import LoadedModel
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import CardLostError, PlanError
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.program import Op
from spanker.sched import resharding
from spanker.sched.bandwidth import NATIVE, REV_A, Profile
from spanker.sched.detours import check_ways
from spanker.sched.layout import card_bytes
from spanker.sched.plan import FleetPlan, Limits, Plan, on_cards, tensor_pipeline
from spanker.sched.resharding import EXCHANGE_MAX, Fill, Round, contents
from spanker.sched.topology import Topology
from spanker.testing.models import tiny_llama

LIMITS = Limits(128, 16, 16, 4, 4, 4, 32)
DDR = 16 << 20
# A link to the host that is paced, but not for long.
PACED = attrs.evolve(REV_A, host_link_bytes_per_s=1e8, host_link_latency_s=0.0)
SETTINGS = {
    "q4_0": {},
    "tied": {"tied": True},
    "q6_k": {"format": "q6_k", "hidden": 256, "heads": 4, "kv_heads": 4, "ffn": 512},
    "bf16": {"format": "bf16"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(layers=4, **SETTINGS[request.param])
    return model.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(layers=4).write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@contextlib.asynccontextmanager
async def opened(
    cards: int, profile: Profile = NATIVE, topology: Topology | None = None
) -> AsyncIterator[tuple[Coordinator, SoftRig]]:
    with SoftRig([SoftCardSpec(ddr_bytes=DDR)] * cards) as rig:
        async with open_coordinator(rig.cards, profile, topology=topology) as coordinator:
            yield coordinator, rig


async def load(coordinator: Coordinator, path: Path, *plans: Plan) -> tuple[LoadedModel, ...]:
    with GGUFFile(path) as gguf:
        return await coordinator.load(
            llama.read_model(gguf), gguf, FleetPlan("some", plans), LIMITS
        )


async def move(
    coordinator: Coordinator,
    path: Path,
    held: LoadedModel,
    plan: Plan,
    beside: Sequence[LoadedModel] = (),
) -> LoadedModel:
    free = []
    for card, counters in enumerate(await coordinator.counters()):
        own = 0
        if coordinator.holds(held, card):
            own = card_bytes(held.model.shape, held.plan, card, LIMITS)
        free.append(counters.ddr_total_bytes - counters.ddr_used_bytes + own)
    with GGUFFile(path) as gguf:
        return (await coordinator.move(held, beside, gguf, plan, LIMITS, free))[0]


def weights_of(rig: SoftRig, loaded: LoadedModel) -> dict[tuple[int, str], bytes]:
    return {
        (card, c.buffer): bytes(rig.cards[card].read(loaded.handles[card][c.buffer], 0, c.nbytes))
        for card in loaded.plan.cards
        for c in contents(loaded.model.shape, loaded.plan, card, LIMITS.context)
    }


async def fresh(path: Path, plan: Plan) -> dict[tuple[int, str], bytes]:
    async with opened(max(plan.cards) + 1) as (coordinator, rig):
        (loaded,) = await load(coordinator, path, plan)
        return weights_of(rig, loaded)


@pytest.mark.parametrize("seed", range(3))
async def test_buffers_are_those_of_a_fresh_load(
    seed: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From plan to plan, on other cards each time, over links that are not all there."""
    draw = random.Random(seed)
    monkeypatch.setattr(resharding, "ROUND_BYTES", draw.choice([1, 50_000, 1 << 20]))
    cards = 5
    topology = draw.choice([Topology.with_mock, Topology.ring, Topology.line])(cards)
    pairs = itertools.permutations(range(cards), 2)
    down = frozenset(pair for pair in pairs if not topology.is_up(*pair))
    with GGUFFile(path) as gguf:
        shape = llama.read_model(gguf).shape

    def some_plan() -> Plan:
        while True:
            tensor, pipeline = draw.choice([(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
            plan = tensor_pipeline(shape, tensor, pipeline)
            plan = on_cards(plan, draw.sample(range(cards), tensor * pipeline))
            with contextlib.suppress(PlanError):
                check_ways(plan, down)
                return plan

    async with opened(cards, topology=topology) as (coordinator, rig):
        (loaded,) = await load(coordinator, path, some_plan())
        for _ in range(3):
            plan = some_plan()
            loaded = await move(coordinator, path, loaded, plan)
            assert loaded.plan == plan and coordinator.whole(loaded)
            assert weights_of(rig, loaded) == await fresh(path, plan)
            for card, device in enumerate(rig.cards):
                used = card_bytes(shape, plan, card, LIMITS)
                assert device.counters().ddr_used_bytes == used
        await coordinator.unload(loaded)
        assert not any(card.counters().ddr_used_bytes for card in rig.cards)


async def test_a_drained_card_brings_what_only_it_has(path: Path) -> None:
    """So that the host sends programs and the embedding, which is laid out anew."""
    with GGUFFile(path) as gguf:
        shape = llama.read_model(gguf).shape
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    async with opened(4, PACED) as (coordinator, rig):
        (loaded,) = await load(coordinator, path, before)
        assert coordinator.host_link is not None
        everything = coordinator.host_link.bytes_to_cards
        loaded = await move(coordinator, path, loaded, after)
        sent = coordinator.host_link.bytes_to_cards - everything
        assert weights_of(rig, loaded) == await fresh(path, after)
    columns = shape.embedding.rows * shape.embedding.row_bytes
    made = [llama.build_program(loaded.model, after, card, LIMITS) for card in after.cards]
    programs_bytes = sum(128 * len(program.commands) for program in made)
    assert sent - columns - programs_bytes < 0.2 * everything


async def test_a_replica_that_lost_a_card_is_filled_from_another_one(path: Path) -> None:
    with GGUFFile(path) as gguf:
        shape = llama.read_model(gguf).shape
    pair = tensor_pipeline(shape, 2, 1)
    first, second = pair, on_cards(pair, (2, 3))
    alone = on_cards(tensor_pipeline(shape, 1, 1), (1,))
    async with opened(4, PACED) as (coordinator, rig):
        one, other = await load(coordinator, path, first, second)
        rig.cards[0].kill()
        coordinator.lose(CardLostError("card 0 is lost", card=0))
        kept = weights_of(rig, other)
        sent = sum(rig.cards[2].counters().link_tx_bytes)
        with GGUFFile(path) as gguf:
            moved, _ = await coordinator.move(one, [other], gguf, alone, LIMITS, [0, DDR, 0, 0])
        # All rows of card 2's half, from there; the embedding, where it is wanted, from the host.
        assert (
            sum(rig.cards[2].counters().link_tx_bytes) - sent
            > 0.4 * sum(map(len, kept.values())) - shape.embedding.rows * shape.embedding.row_bytes
        )
        assert weights_of(rig, moved) == await fresh(path, alone)
        assert weights_of(rig, other) == kept


async def test_where_there_is_little_room_buffers_come_from_the_host(path: Path) -> None:
    with GGUFFile(path) as gguf:
        shape = llama.read_model(gguf).shape
    before, after = tensor_pipeline(shape, 3, 1), on_cards(tensor_pipeline(shape, 2, 1), (0, 2))
    # Beside the weights that are there.
    free = [
        20_000 + sum(c.nbytes for c in contents(shape, before, card, LIMITS.context))
        for card in range(3)
    ]
    async with opened(3) as (coordinator, rig):
        (loaded,) = await load(coordinator, path, before)
        with GGUFFile(path) as gguf:
            moving = Move(coordinator, loaded, [], attrs.evolve(loaded, plan=after), gguf, None)
            assert len(moving.planned([DDR] * 3).rest) == 0 < len(moving.planned(free).rest)
            loaded, _ = await coordinator.move(loaded, [], gguf, after, LIMITS, free)
        assert weights_of(rig, loaded) == await fresh(path, after)


def test_both_sides_of_a_long_exchange_are_in_the_same_order() -> None:
    fills = [Fill(i % 3, f"b{i}", 0, 64, (i + 1) % 3, 0) for i in range(2 * EXCHANGE_MAX + 5)]
    made = programs(Round((), tuple(fills), ()))
    counts = []
    for program in made.values():
        exchanges = [c.args[0] for c in program.commands if c.op is Op.EXCHANGE]
        assert len(exchanges) == 3 and max(exchanges) <= 2 * EXCHANGE_MAX
        counts.append(exchanges)
    # In each one as many sends as receives.
    assert [sum(row) for row in zip(*counts, strict=True)] == [2 * EXCHANGE_MAX] * 2 + [10]


# --- failures -----------------------------------------------------------------------------


@pytest.fixture
def at_run(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], None]]:
    """What to do at the beginning of a round's programs, by its number from 1; rounds are short."""
    todo: dict[int, Callable[[], None]] = {}
    runs, original = itertools.count(1), copying.run

    async def run(*args: Any) -> None:
        todo.pop(next(runs), lambda: None)()
        await original(*args)

    monkeypatch.setattr(resharding, "ROUND_BYTES", 5_000)
    monkeypatch.setattr(copying, "run", run)
    return todo


def plans(path: Path) -> tuple[Plan, Plan]:
    with GGUFFile(path) as gguf:
        shape = llama.read_model(gguf).shape
    return tensor_pipeline(shape, 3, 1), on_cards(tensor_pipeline(shape, 2, 1), (0, 2))


@pytest.mark.parametrize("when", [1, 2, 5])
async def test_a_cancelled_move_leaves_nothing(
    when: int, tiny: Path, at_run: dict[int, Callable[[], None]]
) -> None:
    before, after = plans(tiny)
    async with opened(3) as (coordinator, rig):
        (loaded,) = await load(coordinator, tiny, before)
        with trio.CancelScope() as scope:
            at_run[when] = scope.cancel
            await move(coordinator, tiny, loaded, after)
        assert scope.cancelled_caught and not at_run
        for card in rig.cards:
            assert card.counters().ddr_used_bytes == card.counters().queued == 0
        await load(coordinator, tiny, before)


@pytest.mark.parametrize("dead", [0, 1, 2])
async def test_a_card_that_dies_in_a_move_is_named(
    dead: int, tiny: Path, at_run: dict[int, Callable[[], None]]
) -> None:
    before, after = plans(tiny)
    async with opened(3) as (coordinator, rig):
        (loaded,) = await load(coordinator, tiny, before)
        at_run[2] = rig.cards[dead].kill
        with trio.fail_after(5), pytest.raises(CardLostError) as caught:
            await move(coordinator, tiny, loaded, after)
        assert caught.value.card == dead
        for card in {0, 1, 2} - {dead}:
            counters = rig.cards[card].counters()
            assert counters.ddr_used_bytes == counters.queued == 0
