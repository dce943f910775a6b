# SPDX-License-Identifier: Apache-2.0
"""A model that goes to other cards takes the KV of its sequences along: the same bits, and nothing
is computed again.

A failing case is replayed by its name: moments are drawn from the seed in it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from crowd import (
    FAULTS,
    HANG_TIMEOUT_S,
    ITEMS,
    Answers,
    At,
    Crowd,
    FailingMove,
    Fault,
    Schedule,
    check_as_alone,
    check_nothing_held,
    lost_cards,
)
from waiting import until

import spanker
from spanker.actors import copying
from spanker.actors.audit import Auditor
from spanker.actors.coordinator import Coordinator
from spanker.actors.session import Session
from spanker.actors.steps import LoadedModel, StepResult
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.errors import CardAuditError, ConfigError, PlanError
from spanker.events import Replanned, Rerouted
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.sched import cost, resharding
from spanker.sched.bandwidth import REV_A
from spanker.sched.limits import step_limits
from spanker.sched.plan import Plan, tensor_pipeline
from spanker.sched.shapes import Dimensions, shape_of
from spanker.sched.topology import Topology
from spanker.testing import kill, nothing_leaked, run_virtual

# How long any of them may take.
TIMEOUT_S = 30

# Positions that a crowd computes to which nothing happens, of 3, 80 and 1 tokens and 40 more each,
# but for the last one, and of 150 that are scored.
POSITIONS = 3 + 80 + 1 + 3 * 39 + 150


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions steps have computed that came to their end, step by step."""
    counts: list[int] = []
    original = Session._collect

    async def collect(self: Session, result: StepResult) -> None:
        counts.append(sum(len(step.tokens) for _, step in self._flights[0]))
        await original(self, result)

    monkeypatch.setattr(Session, "_collect", collect)
    return counts


def moves(fleet: spanker.Fleet) -> list[Replanned]:
    return [event for event in fleet.events.history if isinstance(event, Replanned)]


# --- moves that somebody wants ------------------------------------------------------------


@pytest.mark.parametrize(("cards", "plan"), [(4, "tp"), (3, "pp"), (4, "tp2xpp2")])
@pytest.mark.parametrize("seed", range(3))
async def test_drained_and_admitted_cards_cost_no_position(
    seed: int, cards: int, plan: str, tiny: Path, expected: Answers, computed: list[int]
) -> None:
    draw = random.Random(f"{seed} {plan}")
    card, first = draw.randrange(cards), draw.randrange(1, ITEMS // 2)
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(cards) as fleet, trio.open_nursery() as nursery:
            model = await fleet.load(tiny, plan=plan, prompt_chunk=draw.choice([16, 64]))
            wish = At(
                {
                    first: lambda: nursery.start_soon(fleet.drain, card),
                    first + 30: lambda: nursery.start_soon(_admitted, fleet, card),
                }
            )
            assert await Crowd(model, wish).run() == expected
            await until(lambda: len(moves(fleet)) == 2)
            await check_nothing_held(model)
            assert all(event.kept == event.sequences for event in moves(fleet))
            assert moves(fleet)[0].kept > 0
            await model.unload()
            assert not any(c.counters().ddr_used_bytes for c in fleet.devices)
    assert sum(computed) == POSITIONS


async def _admitted(fleet: spanker.Fleet, card: int) -> None:
    await until(lambda: card in fleet.health().drained)
    await fleet.admit(card)


@pytest.mark.parametrize("plan", ["tp", "pp"])
async def test_a_card_that_joins_costs_no_position(
    plan: str, tiny: Path, expected: Answers, computed: list[int]
) -> None:
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(2) as fleet, trio.open_nursery() as nursery:
            model = await fleet.load(tiny, plan=plan)
            joining = At({50: lambda: nursery.start_soon(fleet.add, "soft:1")})
            assert await Crowd(model, joining).run() == expected
            await until(lambda: bool(moves(fleet)))
            assert len(model.plan.cards) == 3
    assert sum(computed) == POSITIONS


async def test_cards_without_a_link_get_pages_over_the_host(
    tiny: Path, expected: Answers, computed: list[int]
) -> None:
    topology = Topology.of_pairs(3, [(0, 1)])
    with trio.fail_after(TIMEOUT_S):
        async with (
            spanker.open_fleet(3, topology=topology) as fleet,
            trio.open_nursery() as nursery,
        ):
            model = await fleet.load(tiny, plan="pp3")
            wish = At({40: lambda: nursery.start_soon(fleet.drain, 0)})
            assert await Crowd(model, wish).run() == expected
            # Card 0 had a link there, card 2 had none.
            assert model.plan.cards == (1,)
            (moved,) = moves(fleet)
            assert moved.kept == moved.sequences > 0
    assert sum(computed) == POSITIONS


@pytest.mark.parametrize("cut", [False, True])
def test_pages_that_are_on_their_way_over_the_host_for_long_arrive(cut: bool) -> None:
    """For many looks and hang timeouts nothing moves but messages, and nobody waits for the link
    that is down."""
    shape = shape_of(Dimensions(1, 512, 4, 4, 512, 512, 1024))
    profile = attrs.evolve(REV_A, host_link_bytes_per_s=1_000_000)
    topology = None if cut else Topology.of_pairs(2, [])

    async def main() -> None:
        async with spanker.open_fleet(
            "hollow:2", profile=profile, topology=topology, hang_timeout_s=0.1
        ) as fleet:
            if cut:
                fleet.devices[0].cut(1)  # type: ignore[union-attr]
            model = await fleet.load_shape(shape, plan="tp", ctx=1024)
            generation = model.generate([5] * 1000, max_tokens=20, ignore_eos=True)
            await anext(generation)
            assert len(model.plan.cards) == 1
            await fleet.drain(model.plan.cards[0])
            *_, moved = moves(fleet)
            assert moved.kept == moved.sequences == 1 and moved.seconds > 3
            assert not lost_cards(fleet)
            generation.close()

    run_virtual(main)


async def test_who_leaves_while_its_pages_move_leaves_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = copying.run

    async def leaving(*args: Any) -> None:
        generations[1].close()
        await original(*args)

    async with spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generations = [model.generate([n, 5, 6], max_tokens=60, ignore_eos=True) for n in range(3)]
        for generation in generations:
            await anext(generation)
        monkeypatch.setattr(copying, "run", leaving)
        await fleet.drain(2)
        (moved,) = moves(fleet)
        assert moved.kept == 2
        for generation in (generations[0], generations[2]):
            await generation.collect()
            again = model.generate(
                [generations.index(generation), 5, 6], max_tokens=60, ignore_eos=True
            )
            await again.collect()
            assert again.token_ids == generation.token_ids
        await check_nothing_held(model)


@pytest.mark.parametrize(("memory", "kept"), [("2800KiB", 3), ("3400KiB", 0)])
async def test_who_finds_no_pages_any_more_is_computed_again(
    memory: str, kept: int, tiny: Path, computed: list[int]
) -> None:
    """Where one card has room for the KV of three of five sequences; or for more, but then not in
    one piece beside all that moves."""
    async with spanker.open_fleet(f"soft:1:{memory},soft:1:64MiB") as fleet:
        model = await fleet.load(tiny, plan="tp", ctx=256)
        made = [model.generate([n], max_tokens=250, ignore_eos=True) for n in range(5)]
        for _ in range(30):
            for generation in made:
                await anext(generation)
        pages, before = model.stats.kv_pages_total, sum(computed)
        await fleet.drain(1)
        (moved,) = moves(fleet)
        assert model.stats.kv_pages_total < pages
        assert (moved.kept, moved.sequences) == (kept, 5)
        for generation in made:
            await generation.collect()
        assert sum(computed) - 5 * 250 >= (5 - kept) * 30
        if kept:
            assert sum(computed) - 5 * 250 < before
        await check_nothing_held(model)
    await check_as_alone(tiny, made)


# --- cards that are lost ------------------------------------------------------------------


async def check_kept(
    fleet: spanker.Fleet,
    model: spanker.Model,
    loss: tuple[int, Fault, int],
    expected: Answers,
) -> None:
    """A crowd gets its answers though a card is lost; all that had begun go on with their KV."""
    assert await Crowd(model, Schedule(fleet, [loss])).run() == expected
    assert lost_cards(fleet) == [loss[2]]
    (moved,) = moves(fleet)
    assert moved.kept == moved.sequences > 0
    await check_nothing_held(model)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(3))
async def test_a_lost_card_whose_heads_another_one_has_costs_no_position(
    seed: int, fault: str, tiny: Path, expected: Answers, computed: list[int]
) -> None:
    """Eight query heads on seven or eight cards, two to a KV head."""
    draw = random.Random(f"{seed} {fault}")
    card, moment = draw.randrange(8), draw.randrange(1, ITEMS - 20)
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(8, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            await check_kept(fleet, model, (moment, FAULTS[fault], card), expected)
    # What is chosen from whole logits is computed again where these were lost.
    assert POSITIONS <= sum(computed) <= POSITIONS + 1


# --- copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("cards", "plan"), [(2, "tp"), (4, "tp"), (4, "tp2xpp2"), (4, "auto")])
@pytest.mark.parametrize("seed", range(2))
async def test_with_copies_a_lost_card_costs_no_position(
    seed: int,
    cards: int,
    plan: str,
    fault: str,
    tiny: Path,
    expected: Answers,
    computed: list[int],
) -> None:
    draw = random.Random(f"{seed} {cards} {plan} {fault}")
    card, moment = draw.randrange(cards), draw.randrange(1, ITEMS - 20)
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(cards, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(
                tiny, plan=plan, prompt_chunk=draw.choice([16, 64]), kv_copies=1
            )
            await check_kept(fleet, model, (moment, FAULTS[fault], card), expected)
            await model.unload()
            left = [c for c in fleet.devices if c.number != card]
            assert not any(c.counters().ddr_used_bytes for c in left)
    assert POSITIONS <= sum(computed) <= POSITIONS + 1


@pytest.mark.parametrize(
    ("plan", "lost", "again"),
    [
        # The copies are made anew each time.
        pytest.param("tp", [(10, 2), (50, 0), (90, 3)], False, id="down to the last"),
        pytest.param("tp", [(50, 1), (50, 3)], False, id="two at once"),
        pytest.param("tp", [(50, 1), (50, 2)], True, id="a card and its keeper"),
        pytest.param("dp2xtp2", [(50, 1)], False, id="of two replicas"),
    ],
)
async def test_only_who_loses_its_keeper_at_the_same_time_is_computed_again(
    plan: str,
    lost: list[tuple[int, int]],
    again: bool,
    tiny: Path,
    expected: Answers,
    computed: list[int],
) -> None:
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(4) as fleet:
            model = await fleet.load(tiny, plan=plan, kv_copies=1)
            faults = Schedule(fleet, [(moment, kill, card) for moment, card in lost])
            assert await Crowd(model, faults).run() == expected
            assert lost_cards(fleet) == sorted(card for _, card in lost)
            last = moves(fleet)[-1]
            assert last.kept == (0 if again else last.sequences) < 5 and last.moved == 0
    assert (sum(computed) > POSITIONS + len(lost)) == again


async def test_copies_go_over_the_host_where_a_link_is_down(
    tiny: Path, expected: Answers, computed: list[int]
) -> None:
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(3, hang_timeout_s=1) as fleet:
            model = await fleet.load(tiny, plan="tp", kv_copies=1)

            def cut() -> None:
                fleet.devices[0].cut(1)  # type: ignore[union-attr]

            wish = At({20: cut, 60: lambda: kill(fleet, 2)})
            assert await Crowd(model, wish).run() == expected
            assert lost_cards(fleet) == [2]
            assert moves(fleet)[0].kept > 0
            rerouted = next(e for e in fleet.events.history if isinstance(e, Rerouted))
            # Everything else goes over card 2, and card 1's copies are not on card 0.
            assert rerouted.hosted == ((0, 1),)


async def test_copies_need_a_link_where_the_host_does_not_relay(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind the kernel module: rows may go over another card, copies do not."""
    monkeypatch.setattr(Coordinator, "relays", False)
    with trio.fail_after(TIMEOUT_S):
        async with spanker.open_fleet(3, hang_timeout_s=1) as fleet:
            model = await fleet.load(tiny, plan="tp", kv_copies=1)

            def cut() -> None:
                fleet.devices[0].cut(1)  # type: ignore[union-attr]

            assert await Crowd(model, At({20: cut})).run() == expected
            assert not {0, 1} <= set(model.plan.cards)
            assert moves(fleet)[0].lost == ()
            # Without copies nothing had to move.
            other = await fleet.load(tiny, plan="tp")
            assert other.plan.cards == (0, 1, 2)


async def test_copies_that_cannot_be_are_refused(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        with pytest.raises(PlanError, match="card 0 alone has the keys and values"):
            await fleet.load(tiny, kv_copies=1)
    async with spanker.open_fleet(2) as fleet:
        with pytest.raises(PlanError, match=r"plan pp2: .* use a plan with two cards or more"):
            await fleet.load(tiny, plan="pp", kv_copies=1)
        with pytest.raises(ConfigError, match="kv_copies must be 0 or 1, got 2"):
            await fleet.load(tiny, kv_copies=2)
        assert not any(card.counters().ddr_used_bytes for card in fleet.devices)


def test_without_copies_programs_know_nothing_of_them(tiny: Path) -> None:
    with GGUFFile(tiny) as gguf:
        model = llama.read_model(gguf)
    plan = tensor_pipeline(model.shape, 4, 1)
    limits = attrs.evolve(step_limits(model.shape), kv_pages=8)
    copying_ = attrs.evolve(limits, kv_copies=1)
    for card in plan.cards:
        plain = llama.build_program(model, plan, card, limits).commands
        assert not any("copy" in ref.buffer for c in plain for _, ref in c.refs)
        more = llama.build_program(model, plan, card, copying_).commands
        # An exchange of keys and values both ways, and their append, a layer.
        assert len(more) == len(plain) + 3 * (1 + 4 + 1)
        # But for these nothing is another command.
        kept = iter(more)
        assert all(command in kept for command in plain)


@pytest.mark.parametrize(("cards", "plan"), [(4, "tp"), (3, "tp"), (4, "tp2xpp2")])
def test_copies_take_on_virtual_cards_what_they_cost(cards: int, plan: str) -> None:
    shape = shape_of(Dimensions(4, 512, 8, 4, 1536, 4096, 512))

    async def main() -> tuple[float, float, Plan]:
        specs = [VirtualCardSpec(ddr_bytes=4 << 30, hollow=True)] * cards
        async with spanker.open_fleet(specs, profile=REV_A) as fleet:
            model = await fleet.load_shape(shape, plan=plan, ctx=128, prompt_chunk=16, kv_copies=1)
            begin = trio.current_time()
            generation = model.generate([1] * 40, max_tokens=20, ignore_eos=True)
            times = [trio.current_time() async for token in generation if token.id is not None]
            # These see 42 to 58 positions, 50 in the middle.
            return times[0] - begin, (times[-2] - times[1]) / 17, model.plan.replicas[0]

    first_s, step_s, made = run_virtual(main)
    where = (shape, made, REV_A, Topology.with_mock(cards))
    for copies, right in ((1, True), (0, False)):
        decoded = cost.decode(*where, context=50, kv_copies=copies)
        prompt = cost.prefill(*where, tokens=40, chunk=16, kv_copies=copies)
        assert (step_s == pytest.approx(decoded.seconds, rel=5e-4)) == right
        assert (first_s == pytest.approx(prompt.seconds, rel=5e-4)) == right


# --- what must not go along ---------------------------------------------------------------


async def test_a_card_that_has_lied_leaves_no_keys_to_anybody(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    original = Auditor.look

    async def look(self: Auditor, loaded: LoadedModel, step: int) -> None:
        await original(self, loaded, step)
        if step >= 30 and 3 in loaded.plan.cards:
            raise CardAuditError("card 3 computes something else", card=3)

    monkeypatch.setattr(Auditor, "look", look)
    async with spanker.open_fleet(8, audit_every=5) as fleet:
        model = await fleet.load(tiny, plan="tp")
        assert await Crowd(model).run() == expected
        (moved,) = moves(fleet)
        assert moved.kept == 0 < moved.sequences
    assert sum(computed) > POSITIONS


@pytest.mark.parametrize("fault", ["cut", *FAULTS])
@pytest.mark.parametrize("run", [1, 2])
async def test_what_fails_while_pages_move_is_computed_again(
    run: int,
    fault: str,
    tiny: Path,
    expected: Answers,
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resharding, "ROUND_BYTES", 50_000)
    with trio.fail_after(TIMEOUT_S):
        async with (
            spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet,
            trio.open_nursery() as nursery,
        ):
            model = await fleet.load(tiny, plan="tp")
            failing = FailingMove(fleet, run, fault)
            monkeypatch.setattr(copying, "run", failing)
            wish = At({50: lambda: nursery.start_soon(fleet.drain, 2)})
            assert await Crowd(model, wish).run() == expected
            assert failing.runs >= run
            await check_nothing_held(model)
            # A card that hangs may have done its part of the move before.
            assert moves(fleet)[-1].kept == 0
    assert sum(computed) > POSITIONS


async def test_moved_pages_leave_nothing_behind(tiny: Path) -> None:
    async with nothing_leaked(), spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = model.generate([1, 2, 3], max_tokens=40, ignore_eos=True)
        await anext(generation)
        await fleet.drain(1)
        await anext(generation)
        async with nothing_leaked(fleet):
            await fleet.admit(1)
            await anext(generation)
        kill(fleet, 2)
        await generation.collect()
        await check_nothing_held(model)
