# SPDX-License-Identifier: Apache-2.0
"""A fleet that loses cards goes on: every sequence comes out as if nothing had happened.

A failing case is replayed by its name: faults and their moments are drawn from the seed in it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import pytest
import trio
from crowd import (
    FAULTS,
    HANG_TIMEOUT_S,
    ITEMS,
    Answers,
    Crowd,
    FailingMove,
    Fault,
    Schedule,
    check_as_alone,
    check_nothing_held,
    kinds,
    lost_cards,
)
from waiting import until

import spanker
from spanker.actors import coordinator as coordinators
from spanker.actors import copying
from spanker.actors import session as sessions
from spanker.actors.message import Ok, Request, WriteBuffers
from spanker.errors import (
    CardLinkError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    ModelError,
    PlanError,
)
from spanker.events import CardLost, Event, LinkDown, LinkRetried, Replanned, ReplicaLost
from spanker.sched import resharding
from spanker.sched.bandwidth import REV_A
from spanker.sched.plan import tensor_pipeline
from spanker.testing import hang, kill, run_virtual, write_tiny_llama

# A host link that is paced, but not for long.
FAST_REV_A = attrs.evolve(REV_A, host_link_bytes_per_s=1e8, host_link_latency_s=0.0)

# --- any moment ---------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(5))
async def test_a_fault_at_any_moment_changes_no_bit(
    seed: int, fault: str, tiny: Path, expected: Answers
) -> None:
    draw = random.Random(f"{seed} {fault}")
    cards, plan = draw.choice([(2, "tp"), (3, "tp"), (4, "tp"), (3, "pp"), (4, "tp2xpp2")])
    card, moment = draw.randrange(cards), draw.randrange(1, ITEMS)
    with trio.fail_after(20):
        async with spanker.open_fleet(cards, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan=plan, prompt_chunk=draw.choice([16, 64]))
            schedule = Schedule(fleet, [(moment, FAULTS[fault], card)])
            assert await Crowd(model, schedule).run() == expected
            assert lost_cards(fleet) == [card]
            assert kinds(fleet) == [CardLost, Replanned]
            assert card not in model.plan.cards
            assert fleet.health().serving
            assert fleet.health().cards == tuple(c for c in range(cards) if c != card)
            await check_nothing_held(model)


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_down_to_the_last_card(channel: str, tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S, channel=channel) as fleet:
        model = await fleet.load(tiny, plan="tp")
        faults = [(10, kill, 2), (50, hang, 0), (90, kill, 3)]
        assert await Crowd(model, Schedule(fleet, faults)).run() == expected
        assert (model.plan.name, model.plan.cards) == ("tp1", (1,))
        assert await Crowd(model).run() == expected
        # The stages in between, each with what it resumed.
        moves = [e for e in fleet.events.history if isinstance(e, Replanned)]
        assert [(e.before, e.after) for e in moves] == [
            ("tp4", "tp3"),
            ("tp3", "tp2"),
            ("tp2", "tp1"),
        ]
        assert all(0 < e.sequences <= 4 and e.seconds > 0 for e in moves)


async def test_two_at_once(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        faults = [(20, kill, 0), (20, kill, 3)]
        assert await Crowd(model, Schedule(fleet, faults)).run() == expected
        assert lost_cards(fleet) == [0, 3]
        assert model.plan.cards == (1, 2)


@pytest.mark.parametrize("fault", FAULTS)
async def test_another_one_during_a_recovery(fault: str, tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")

        def strike_again(event: Event) -> None:
            if isinstance(event, CardLost) and event.card == 1:
                FAULTS[fault](fleet, 2)

        fleet.events.listen(strike_again)
        assert await Crowd(model, Schedule(fleet, [(20, kill, 1)])).run() == expected
        assert lost_cards(fleet) == [1, 2]


@pytest.mark.parametrize("fault", ["cut", *FAULTS])
@pytest.mark.parametrize("run", [1, 2])
async def test_what_fails_while_cards_bring_weights_changes_no_bit(
    run: int, fault: str, tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharding, "ROUND_BYTES", 100_000)
    async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        failing = FailingMove(fleet, run, fault)
        monkeypatch.setattr(copying, "run", failing)
        assert await Crowd(model, Schedule(fleet, [(20, kill, 2)])).run() == expected
        assert failing.runs >= run
        assert lost_cards(fleet) == ([2] if fault == "cut" else [2, 3])
        assert (LinkDown in kinds(fleet)) == (fault == "cut")
        await check_nothing_held(model)


async def test_a_drained_card_leaves_its_weights_to_the_others(tiny: Path) -> None:
    async with spanker.open_fleet(3, profile=FAST_REV_A) as fleet:
        model = await fleet.load(tiny, plan="pp")
        link = fleet._coordinator.host_link
        assert link is not None
        loaded = link.bytes_to_cards
        await fleet.drain(1)
        assert model.plan.cards == (0, 2)
        # Programs alone; no layer is cut in a pipeline, nor is the embedding.
        assert link.bytes_to_cards - loaded < 0.35 * loaded


async def test_an_idle_fleet_finds_out_with_the_next_request(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        assert await Crowd(model).run() == expected
        kill(fleet, 1)
        assert await Crowd(model).run() == expected
        assert lost_cards(fleet) == [1]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_load_goes_on_without_a_card_that_dies_meanwhile(
    fault: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:

        def progress(done: int, total: int) -> None:
            if done:
                FAULTS[fault](fleet, 1)

        model = await fleet.load(tiny, plan="tp", progress=progress)
        assert await Crowd(model).run() == expected
        assert lost_cards(fleet) == [1]
        assert model.plan.cards == (0, 2)


async def test_a_card_that_takes_no_message_any_more_is_left_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Greedy alone, so that a second step is sent while the first one is under way.
    async def ids_of(model: spanker.Model, moment: int = -1) -> list[int]:
        generation = model.generate([5, 6, 7], max_tokens=60, ignore_eos=True)
        async for _ in generation:
            if len(generation.token_ids) == moment:
                monkeypatch.setattr(channel, "try_send", lambda *message: False)
                monkeypatch.setattr(channel, "send", stalled)
        return list(generation.token_ids)

    async def stalled(*message: object) -> None:
        await trio.sleep_forever()

    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        channel = fleet._coordinator.clients[1]._channel
        right = await ids_of(model)
        with trio.fail_after(20):
            assert await ids_of(model, 20) == right
        assert lost_cards(fleet) == [1]


async def test_a_load_goes_on_without_a_card_that_says_nothing_any_more(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinators, "STOP_S", HANG_TIMEOUT_S)
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        client = fleet._coordinator.clients[1]
        request = client.request

        async def silent(message: Request[Ok]) -> Ok:
            if isinstance(message, WriteBuffers):
                await trio.sleep_forever()
            return await request(message)

        monkeypatch.setattr(client, "request", silent)
        model = await fleet.load(tiny, plan="tp")
        assert await Crowd(model).run() == expected
        assert model.plan.cards == (0, 2)
        assert "has not answered WriteBuffers for 0.5 s" in str(fleet.events.history[0])


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_load_goes_on_where_another_model_finds_the_loss_first(
    fault: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        first = await fleet.load(tiny, plan="tp")
        struck = False

        def progress(done: int, total: int) -> None:
            nonlocal struck
            if not struck:
                struck = True
                FAULTS[fault](fleet, 1)

        async with trio.open_nursery() as nursery:
            generation = first.generate([1], max_tokens=200, ignore_eos=True)
            await anext(generation)
            nursery.start_soon(generation.collect)
            second = await fleet.load(tiny, plan="tp", progress=progress)
        assert await Crowd(second).run() == await Crowd(first).run() == expected
        assert lost_cards(fleet) == [1]
        assert first.plan.cards == second.plan.cards == (0, 2)


async def test_a_plan_for_certain_cards_fails_with_one_of_them(tiny: Path) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        kill(fleet, 1)
        with pytest.raises(CardLostError, match="card 1"):
            await fleet.load(tiny, plan="tp3")


async def test_without_recovery_the_first_loss_is_the_end(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(3, recover=False) as fleet:
        model = await fleet.load(tiny, plan="tp")
        kill(fleet, 1)
        with pytest.raises(CardLostError, match="card 1"):
            await model.generate([1]).collect()
        assert fleet.health().cards == (0, 2) and lost_cards(fleet) == [1]
        assert not fleet.health().serving
        assert [card.ddr_used_bytes for card in (await fleet.stats()).cards] == [0, 0]
        await fleet.admit(1)
        again = await fleet.load(tiny, plan="tp3")
        assert await Crowd(again).run() == expected


# --- too little is left --------------------------------------------------------------------


async def test_no_card_left_is_an_error_for_everybody(tiny: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        made = [model.generate([n], max_tokens=200, ignore_eos=True) for n in range(3)]
        await anext(made[0])
        kill(fleet, 0)
        kill(fleet, 1)
        with trio.fail_after(2):
            for generation in made:
                with pytest.raises(CardLostError, match="no card is left"):
                    await generation.collect()
            with pytest.raises(CardLostError):
                model.generate([1])
        health = fleet.health()
        assert not health.serving and health.cards == ()
        assert [card for card, _ in health.lost] == [0, 1]
        (ended,) = health.models
        assert (ended.plan, ended.replicas_alive, ended.replicas) == ("", 0, 1)
        assert kinds(fleet)[-1] is ReplicaLost
        await fleet.admit(0)
        (stats,) = (await fleet.stats()).cards
        assert (stats.share, stats.replica, stats.ddr_used_bytes) == ("-", None, 0)


async def test_too_little_memory_names_what_is_needed(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "wide.gguf", hidden=256, ffn=512, vocabulary=2000)
    async with spanker.open_fleet("soft:2:1900KiB") as fleet:
        model = await fleet.load(path, plan="tp", ctx=64)
        generation = model.generate([1], max_tokens=50, ignore_eos=True)
        await anext(generation)
        kill(fleet, 1)
        with trio.fail_after(2), pytest.raises(CardMemoryError, match=r"[\d,]{5,} bytes"):
            await generation.collect()
        with pytest.raises(CardMemoryError, match="on card 0"):
            model.generate([1])
        assert fleet.devices[0].counters().ddr_used_bytes == 0


async def test_fewer_pages_make_sequences_wait_and_end_what_they_cannot_hold(
    tiny: Path,
) -> None:
    """One card has room for a quarter of the KV that two have."""
    async with spanker.open_fleet("soft:1:2500KiB,soft:1:64MiB") as fleet:
        model = await fleet.load(tiny, plan="tp", ctx=256)
        pages = model.stats.kv_pages_total
        made = [model.generate([n], max_tokens=250, ignore_eos=True) for n in range(3)]
        for generation in made:
            await anext(generation)
        kill(fleet, 1)
        for generation in made:
            await generation.collect()
        assert model.stats.kv_pages_total < pages
        assert len({tuple(g.token_ids) for g in made}) == 3
        await check_as_alone(tiny, made)


@pytest.mark.parametrize(
    ("cards", "plan", "count"),
    [("soft:1:2500KiB,soft:1:64MiB", "tp", 3), ("soft:2:2500KiB", "dp2", 2)],
)
async def test_sequences_that_are_taken_from_in_turn_do_not_wait_for_each_other(
    cards: str, plan: str, count: int, tiny: Path
) -> None:
    """What is left has pages for fewer sequences than there are, and all must go on."""
    async with spanker.open_fleet(cards) as fleet:
        model = await fleet.load(tiny, plan=plan, ctx=256)
        made = [model.generate([n], max_tokens=250, ignore_eos=True) for n in range(count)]
        for generation in made:
            await anext(generation)
        kill(fleet, 1)
        with trio.fail_after(20):
            for _ in range(249):
                for generation in made:
                    await anext(generation)
        assert (model.stats.prompt_tokens, model.stats.generated_tokens) == (
            count,
            250 * count,
        )
        for number, generation in enumerate(made):
            again = model.generate([number], max_tokens=250, ignore_eos=True)
            await again.collect()
            assert again.token_ids == generation.token_ids
        await check_nothing_held(model)


async def test_a_model_whose_file_has_changed_cannot_be_loaded_again(
    tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(tiny, path)
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(path, plan="tp")
        generation = model.generate([1], max_tokens=200, ignore_eos=True)
        await anext(generation)
        write_tiny_llama(tmp_path / "other.gguf", seed=1).replace(path)
        kill(fleet, 0)
        with pytest.raises(ModelError, match="not the file any more"):
            await generation.collect()


async def test_a_relative_path_is_found_again_from_elsewhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Answers
) -> None:
    async with spanker.open_fleet(2) as fleet:
        monkeypatch.chdir(tiny.parent)
        model = await fleet.load(tiny.name, plan="tp")
        monkeypatch.chdir(tmp_path)
        kill(fleet, 1)
        assert await Crowd(model).run() == expected


# --- replicas -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("card", [0, 3])
async def test_a_replica_goes_on_with_the_cards_it_has(
    card: int, fault: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="dp2xtp2")
        schedule = Schedule(fleet, [(30, FAULTS[fault], card)])
        assert await Crowd(model, schedule).run() == expected
        # Nobody has waited for that.
        left = [c for c in range(4) if c != card]
        await until(lambda: sorted(model.plan.cards) == left)
        (lost, replanned) = fleet.events.history
        assert isinstance(lost, CardLost) and isinstance(replanned, Replanned)
        assert replanned.moved + replanned.sequences > 0
        assert fleet.health().models[0].replicas_alive == 2
        assert await Crowd(model).run() == expected


async def test_the_sequences_of_a_replica_without_cards_move(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="dp2")
        assert await Crowd(model, Schedule(fleet, [(10, kill, 0)])).run() == expected
        assert kinds(fleet) == [CardLost, ReplicaLost]
        (gone,) = [e for e in fleet.events.history if isinstance(e, ReplicaLost)]
        assert (gone.replica, gone.ended) == (0, 0) and gone.moved in (1, 2)
        health = fleet.health().models[0]
        assert (health.replicas_alive, health.replicas) == (1, 2)
        assert await Crowd(model).run() == expected
        await check_nothing_held(model)


async def test_a_sequence_that_is_dropped_while_it_moves_leaves_no_pages(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="dp2")
        session = model._replicas.sessions[0]
        made = [model.generate([n], max_tokens=200, ignore_eos=True) for n in range(4)]
        take = model._replicas.take

        def drop_and_take(sequences: Sequence[sessions.Sequence], session: sessions.Session) -> int:
            made.clear()
            return take(sequences, session)

        monkeypatch.setattr(model._replicas, "take", drop_and_take)
        await anext(made[0])
        kill(fleet, 0)
        await until(lambda: session.failure is not None)
        await check_nothing_held(model)
        # Nor has one session got pages of the other.
        assert [s.stats.kv_pages_used for s in model._replicas.sessions] == [0, 0]


async def test_an_idle_card_takes_the_place_of_a_lost_one(tiny: Path, expected: Answers) -> None:
    from spanker.ggml.architectures.llama import read_model
    from spanker.ggml.gguf import GGUFFile

    with GGUFFile(tiny) as gguf:
        plan = tensor_pipeline(read_model(gguf).shape, 1, 1)
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan=attrs.evolve(plan, reason="by hand"))
        assert model.plan.cards == (0,)
        assert await Crowd(model, Schedule(fleet, [(10, kill, 0)])).run() == expected
        assert model.plan.cards == (1,)


async def test_other_models_of_the_fleet_recover_by_themselves(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        models = [await fleet.load(tiny, plan="tp") for _ in range(2)]
        found: list[Answers] = []

        async def one(model: spanker.Model, faults: list[tuple[int, Fault, int]]) -> None:
            found.append(await Crowd(model, Schedule(fleet, faults)).run())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, models[0], [(40, kill, 1)])
            nursery.start_soon(one, models[1], [])
        assert found == [expected, expected]
        assert lost_cards(fleet) == [1]
        assert [model.plan.cards for model in models] == [(0, 2), (0, 2)]


# --- cards that leave and come back ------------------------------------------------------------


async def while_running(model: spanker.Model, moments: dict[int, Callable[[], object]]) -> Answers:
    """A crowd's answers; at certain numbers of items something is begun beside it."""
    async with trio.open_nursery() as nursery:

        def moment(items: int) -> None:
            for at in [at for at in moments if at <= items]:
                nursery.start_soon(moments.pop(at))  # type: ignore[arg-type]

        return await Crowd(model, moment).run()


@pytest.mark.parametrize("cards", ["soft:3", "soft:4@scalar"])
async def test_a_drained_card_is_left_and_taken_again(
    cards: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(cards, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        before = model.plan
        moments = {
            10: lambda: fleet.drain(1),
            50: lambda: fleet.admit(1),
            90: lambda: fleet.drain(0),
        }
        assert await while_running(model, moments) == expected  # type: ignore[arg-type]
        assert kinds(fleet) == [Replanned] * 3
        assert fleet.health().drained == (0,) and 0 not in model.plan.cards
        assert fleet.devices[0].counters().ddr_used_bytes == 0
        # Nobody minds any more.
        kill(fleet, 0)
        assert await Crowd(model).run() == expected
        assert kinds(fleet) == [Replanned] * 3
        await fleet.drain(1)
        await fleet.admit(1)
        assert model.plan.cards == tuple(c for c in before.cards if c)
        await check_nothing_held(model)


async def test_a_plan_for_certain_cards_comes_back(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(4) as fleet:
        model = await fleet.load(tiny, plan="tp2xpp2")
        before = model.plan
        await fleet.drain(2)
        assert 2 not in model.plan.cards
        assert await Crowd(model).run() == expected
        with pytest.raises(PlanError, match=r"uses card 2, which is drained; `Fleet\.admit` takes"):
            await fleet.load(tiny, plan=before)
        await fleet.admit(2)
        assert model.plan == before
        assert await Crowd(model).run() == expected


async def test_a_drained_card_of_a_replica(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="dp2")
        assert await while_running(model, {10: lambda: fleet.drain(1)}) == expected
        assert model.plan.cards == (0,)
        with pytest.raises(CardLostError, match="no card is left"):
            await fleet.drain(0)
        assert fleet.health().cards == (0,)
        assert await Crowd(model).run() == expected


async def test_what_does_not_fit_elsewhere_stays(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "wide.gguf", hidden=256, ffn=512, vocabulary=2000)
    async with spanker.open_fleet("soft:2:1900KiB") as fleet:
        model = await fleet.load(path, plan="tp", ctx=64)
        generation = model.generate([1], max_tokens=50, ignore_eos=True)
        await anext(generation)
        with pytest.raises(CardMemoryError, match="needs"):
            await fleet.drain(1)
        await generation.collect()
        assert model.plan.cards == (0, 1) and fleet.health().drained == ()
        assert len(generation.token_ids) == 50


async def test_a_card_is_drained_by_two_and_admitted_by_a_third_at_the_same_time(
    tiny: Path,
) -> None:
    async with spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="tp")
        drained = []

        async def drain() -> None:
            await fleet.drain(1)
            # Whoever is told so may pull the card out.
            drained.append(model.plan.cards)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            nursery.start_soon(drain)
            await until(lambda: 1 in fleet.health().drained)
            nursery.start_soon(fleet.admit, 1)
        assert drained == [(0, 2), (0, 2)]
        assert fleet.health().drained == () and model.plan.cards == (0, 1, 2)


async def test_what_cannot_be_drained_or_admitted(tiny: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        for card in (2, -1):
            with pytest.raises(ConfigError, match=f"no card {card}: the fleet has cards 0 to 1"):
                await fleet.drain(card)
        with pytest.raises(ConfigError, match="card 1 is neither drained nor lost"):
            await fleet.admit(1)


# --- callers that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_sequences_that_are_closed_around_a_recovery_leave_nothing(
    seed: int, tiny: Path, expected: Answers, nothing_left_behind: None
) -> None:
    draw = random.Random(f"close {seed}")
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        made = [model.generate([n], max_tokens=200, ignore_eos=True) for n in range(6)]

        def close_some(event: Event) -> None:
            for generation in draw.sample(made, 3):
                generation.close()

        fleet.events.listen(close_some)
        await anext(made[0])
        kill(fleet, draw.randrange(3))
        for generation in made:
            with trio.move_on_after(draw.random() * 0.05):
                await generation.collect()
        await check_nothing_held(model)
        assert await Crowd(model).run() == expected


async def test_a_fleet_that_is_closed_during_a_recovery_leaves_nothing(
    tiny: Path, nothing_left_behind: None
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = model.generate([1], max_tokens=200, ignore_eos=True)
        await anext(generation)
        told = trio.Event()
        fleet.events.listen(lambda event: told.set())
        kill(fleet, 1)
        await told.wait()


# --- what is beside it ------------------------------------------------------------------------


async def test_throttled_cards_that_are_left_tell_how_far_they_are_behind(tiny: Path) -> None:
    async with spanker.open_fleet("soft:3", profile="rev-a", throttle=True) as fleet:
        model = await fleet.load(tiny, plan="tp")
        kill(fleet, 1)
        await model.generate([1], max_tokens=10, ignore_eos=True).collect()
        assert lost_cards(fleet) == [1]
        assert fleet.behind is not None


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_cards_that_are_left_are_traced(
    fault: str, tiny: Path, expected: Answers, tmp_path: Path
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        FAULTS[fault](fleet, 1)
        await model.generate([1], max_tokens=10, ignore_eos=True).collect()
        assert lost_cards(fleet) == [1]
        async with fleet.trace(tmp_path / "trace.json") as trace:
            assert await Crowd(model).run() == expected
        assert trace.steps and trace.commands


# --- links -----------------------------------------------------------------------------------


async def test_a_step_that_a_link_has_failed_is_made_again(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        fail_completions(monkeypatch, fleet, 1, {3, 9, 10})
        assert await Crowd(model).run() == expected
        assert kinds(fleet) == [LinkRetried] * 3
        assert [e.attempt for e in fleet.events.history] == [1, 1, 2]  # type: ignore[attr-defined]


async def test_a_link_that_fails_again_and_again_ends_the_step(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spanker.open_fleet(2) as fleet:
        model = await fleet.load(tiny, plan="tp")
        fail_completions(monkeypatch, fleet, 1, set(range(5, 1000)))
        with pytest.raises(CardLinkError, match="failed its checks"):
            await model.generate([1], max_tokens=50, ignore_eos=True).collect()


def fail_completions(
    monkeypatch: pytest.MonkeyPatch, fleet: spanker.Fleet, card: int, which: set[int]
) -> None:
    """Completions of a card, by their number from now on, report a link's failure."""
    device, count = fleet.devices[card], 0
    completions = device.completions

    def failing() -> Sequence[object]:
        nonlocal count
        out = []
        for done in completions():
            count += 1
            if count in which and done.error is None:
                error = CardLinkError(f"card {card}: a link message failed its checks", card=card)
                done = done._replace(error=error, data=())
            out.append(done)
        return out

    monkeypatch.setattr(device, "completions", failing)


# --- virtual time -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_virtual_fleet_recovers_the_same_way_every_time(
    fault: str, tiny: Path, expected: Answers
) -> None:
    async def main() -> tuple[Answers, list[str], float]:
        async with spanker.open_fleet(
            "virtual:3", profile="rev-a", plan="tp", hang_timeout_s=5
        ) as fleet:
            model = await fleet.load(tiny)
            faults = [(35, FAULTS[fault], 1)]
            answers = await Crowd(model, Schedule(fleet, faults)).run()
            return answers, [str(e) for e in fleet.events.history], trio.current_time()

    first, second = run_virtual(main), run_virtual(main)
    assert first[0] == expected
    assert len(first[1]) == 2
    assert first == second


# --- what is told -----------------------------------------------------------------------------


async def test_events_are_lines_and_log_records(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        generation = model.generate([1], max_tokens=60, ignore_eos=True)
        await anext(generation)
        hang(fleet, 2)
        stop = fleet.events.listen(lambda event: None)
        await generation.collect()
        stop()
        lines = [str(event) for event in fleet.events.history]
    assert lines[0] == (
        "card 2 lost: hangs: it holds a step and no card of the fleet has made progress for 0.5 s"
    )
    assert lines[1].startswith(
        "tiny llama: re-planned tp3 -> tp2 on cards 0, 1; resumed 1 sequence after 0."
    )
    assert [record.getMessage() for record in caplog.records] == lines
    assert [record.name for record in caplog.records] == ["spanker.fleet"] * 2
