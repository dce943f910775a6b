# SPDX-License-Identifier: Apache-2.0
"""Links that go down and come back, cards that come back: every sequence gets the bits it would
have got.

A failing case is replayed by its name: faults and their moments are drawn from the seed in it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from crowd import (
    FAULTS,
    HANG_TIMEOUT_S,
    ITEMS,
    Answers,
    At,
    Crowd,
    check_nothing_held,
    kinds,
    lost_cards,
)
from silent_cards import SilentCards
from waiting import until

import spanker
from spanker.actors import collective_programs, collectives, link_watch
from spanker.actors.collective_programs import CardWork
from spanker.actors.message import ReadBuffer
from spanker.errors import (
    CardLinkDownError,
    CardLinkError,
    CardLostError,
    ConfigError,
)
from spanker.events import (
    CardLost,
    CardReturned,
    LinkDown,
    LinkRetried,
    LinkUp,
    Replanned,
    Rerouted,
)
from spanker.testing import kill, run_virtual, write_tiny_llama


def cut(fleet: spanker.Fleet, a: int, b: int) -> None:
    fleet.devices[a].cut(b)  # type: ignore[union-attr]


def mend(fleet: spanker.Fleet, a: int, b: int) -> None:
    fleet.devices[a].mend(b)  # type: ignore[union-attr]


# --- links that go down ------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["tp", "pp", "tp2xpp2"])
@pytest.mark.parametrize("seed", range(4))
async def test_a_link_cut_at_any_moment_changes_no_bit(
    seed: int, plan: str, tiny: Path, expected: Answers
) -> None:
    draw = random.Random(f"{seed} {plan}")
    cards = 3 if plan == "pp" else 4
    a, b = draw.sample(range(cards), 2)
    with trio.fail_after(20):
        async with spanker.open_fleet(cards, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan=plan)
            before = model.plan
            moment = At({draw.randrange(1, ITEMS - 20): lambda: cut(fleet, a, b)})
            assert await Crowd(model, moment).run() == expected
            assert await Crowd(model).run() == expected
            assert not lost_cards(fleet)
            # Where nothing goes over that link nobody minds; in a pipeline there may be no way.
            assert kinds(fleet) in ([LinkDown, Rerouted], [LinkDown, Replanned], [])
            assert model.plan == before or plan == "pp"
            if fleet.events.history:
                assert not fleet.topology.is_up(a, b) and not fleet.topology.is_up(b, a)
            await check_nothing_held(model)


@pytest.mark.parametrize("seed", range(4))
async def test_links_are_cut_until_a_card_is_alone(
    seed: int, tiny: Path, expected: Answers
) -> None:
    draw = random.Random(seed)
    alone = draw.randrange(4)
    with trio.fail_after(20):
        async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan="tp")
            peers = [card for card in range(4) if card != alone]
            calls = {20 * i + 5: (lambda p=p: cut(fleet, alone, p)) for i, p in enumerate(peers)}
            assert await Crowd(model, At(calls)).run() == expected
            assert await Crowd(model).run() == expected
            assert not lost_cards(fleet)
            assert model.plan.cards == tuple(peers)
            assert kinds(fleet).count(LinkDown) == 3
            assert kinds(fleet)[-1] is Replanned


async def test_two_cards_without_their_link_are_one(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        assert await Crowd(model, At({30: lambda: cut(fleet, 1, 0)})).run() == expected
        assert kinds(fleet) == [LinkDown, Replanned]
        assert len(model.plan.cards) == 1


async def test_without_recovery_the_host_leads_around_a_cut(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(2, recover=False, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        assert await Crowd(model, At({30: lambda: cut(fleet, 1, 0)})).run() == expected
        assert kinds(fleet) == [LinkDown, Rerouted]


async def test_a_model_is_loaded_around_a_link_that_is_known_to_be_down(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        first = await fleet.load(tiny, plan="tp")
        cut(fleet, 0, 2)
        assert await Crowd(first).run() == expected
        second = await fleet.load(tiny, plan="tp")
        assert second.plan.cards == (0, 1, 2)
        assert await Crowd(second).run() == expected
        assert kinds(fleet) == [LinkDown, Rerouted]


async def test_a_link_is_found_to_be_down_while_a_model_is_loaded(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        cut(fleet, 0, 2)

        def find_out(done: int, total: int) -> None:
            fleet._coordinator.links.lose(0, 2)

        model = await fleet.load(tiny, plan="tp", progress=find_out)
        assert await Crowd(model).run() == expected
        assert kinds(fleet) == [LinkDown, Rerouted]


async def test_collectives_go_around_a_link_too(tiny: Path) -> None:
    async with spanker.open_fleet("soft:3", channel="unix", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        whole = [np.arange(64, dtype=np.int32) * (card + 1) for card in range(3)]
        arrays = [array.copy() for array in whole]
        await spanker.all_gather(fleet, arrays)
        cut(fleet, 0, 1)
        # What is under way is not made again: its arrays may have been written to.
        with pytest.raises(CardLinkDownError, match="the link between them is down"):
            await spanker.all_gather(fleet, arrays)
        gathered = await spanker.all_gather(fleet, [array.copy() for array in whole])
        for array in gathered:
            assert np.array_equal(array, np.concatenate(whole))


@pytest.mark.parametrize("channel", ["memory", "unix"])
@pytest.mark.parametrize("elements", [10, 100_000])
async def test_cards_meet_while_their_links_are_up_and_else_go_around(
    elements: int, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_watch, "LOOK_S", 0.05)
    met: list[bool] = []

    def build(*args: Any, meet: bool) -> list[CardWork]:
        met.append(meet)
        return collective_programs.build(*args, meet=meet)

    monkeypatch.setattr(collectives, "build", build)
    draw = np.random.default_rng(elements)
    data = [draw.normal(size=elements).astype(np.float32) for _ in range(3)]
    folded = (data[0] + data[1] + data[2]).tobytes()

    async def reduced(fleet: spanker.Fleet) -> bool:
        arrays = [array.copy() for array in data]
        await spanker.all_reduce(fleet, arrays)
        return all(array.tobytes() == folded for array in arrays)

    with trio.fail_after(10):
        async with spanker.open_fleet(3, channel=channel, hang_timeout_s=1) as fleet:
            assert await reduced(fleet)
            cut(fleet, 0, 1)
            with pytest.raises(CardLinkDownError):
                await reduced(fleet)
            for _ in range(2):
                assert await reduced(fleet)
            mend(fleet, 0, 1)
            await until(lambda: fleet.topology.is_up(0, 1))
            assert await reduced(fleet)
    assert met == [True, False, True]


# --- links that come back ------------------------------------------------------------------


async def test_a_link_that_is_up_again_is_used_again(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_watch, "LOOK_S", 0.05)
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        cut(fleet, 0, 2)
        assert await Crowd(model).run() == expected
        mend(fleet, 0, 2)
        await until(lambda: fleet.topology.is_up(0, 2))
        assert await Crowd(model).run() == expected
        assert kinds(fleet) == [LinkDown, Rerouted, LinkUp, Rerouted]
        assert str(fleet.events.history[-1]).startswith("tiny llama: steps go straight again")


def test_whoever_looks_after_a_link_finds_out_that_a_card_is_silent(tiny: Path) -> None:
    async def main() -> None:
        around = SilentCards()
        async with spanker.open_fleet("virtual:3", hang_timeout_s=3, _around=around) as fleet:
            model = await fleet.load(tiny, plan="tp")
            cut(fleet, 0, 1)
            right = await tokens(model)
            around.silence(1)
            await trio.sleep(link_watch.LOOK_S + 3.1)
            assert [card for card, _ in fleet.health().lost] == [1]
            assert await tokens(model) == right

    run_virtual(main)


async def test_a_card_that_was_cut_off_has_its_share_again(
    tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_watch, "LOOK_S", 0.05)
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        cut(fleet, 0, 1)
        assert await Crowd(model).run() == expected
        assert len(model.plan.cards) == 1
        mend(fleet, 0, 1)
        await until(lambda: model.plan.cards == (0, 1))
        assert await Crowd(model).run() == expected


# Each second of a flap has this many.
TOKENS = 8


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "shallow.gguf"
    return write_tiny_llama(path, layers=1, hidden=128, kv_heads=4, vocabulary=800)


async def tokens(model: spanker.Model) -> tuple[int, ...]:
    generation = model.generate([5, 6, 7], max_tokens=TOKENS, ignore_eos=True)
    await generation.collect()
    return tuple(generation.token_ids)


@pytest.mark.parametrize("seconds", [12, pytest.param(60, marks=pytest.mark.long)])
def test_a_link_that_flaps_every_second(seconds: int, shallow: Path) -> None:
    async def main() -> None:
        async with spanker.open_fleet("virtual:3", profile="rev-a", hang_timeout_s=2) as fleet:
            model = await fleet.load(shallow, plan="tp")
            right = await tokens(model)
            for second in range(seconds):
                (mend if second % 2 else cut)(fleet, 0, 1)
                assert await tokens(model) == right
                await trio.sleep(1)
            # It never stays up for two looks: out of use from its first failure to the end.
            assert kinds(fleet) == [LinkDown, Rerouted]
            await trio.sleep(5)
            assert await tokens(model) == right
            assert kinds(fleet) == [LinkDown, Rerouted, LinkUp, Rerouted]

    run_virtual(main)


@pytest.mark.parametrize("seed", range(4))
async def test_damaged_messages_change_no_bit(seed: int, tiny: Path, expected: Answers) -> None:
    draw = random.Random(seed)
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan=draw.choice(["tp", "pp"]))
        pairs = [(0, 1), (1, 2)]

        def corrupt() -> None:
            a, b = draw.choice(pairs)
            fleet.devices[a].corrupt(b)  # type: ignore[union-attr]

        calls = dict.fromkeys(draw.sample(range(1, ITEMS - 10), 5), corrupt)
        assert await Crowd(model, At(calls)).run() == expected
        assert set(kinds(fleet)) == {LinkRetried}


async def test_a_link_that_damages_everything_ends_its_sequences(tiny: Path) -> None:
    async with spanker.open_fleet(2, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        fleet.devices[0].corrupt(1, 100_000)  # type: ignore[union-attr]
        with pytest.raises(CardLinkError, match="failed its checks"):
            await model.generate([1], max_tokens=20, ignore_eos=True).collect()


# --- cards that fail in other ways ----------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "fail_memory"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_card_that_resets_or_finds_its_memory_wrong_is_left_out(
    seed: int, fault: str, tiny: Path, expected: Answers
) -> None:
    draw = random.Random(f"{seed} {fault}")
    card = draw.randrange(4)
    async with spanker.open_fleet(4, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        strike = getattr(fleet.devices[card], fault)
        moment = At({draw.randrange(1, ITEMS - 20): lambda: strike(draw.randrange(50))})
        assert await Crowd(model, moment).run() == expected
        assert kinds(fleet) == [CardLost, Replanned]
        assert lost_cards(fleet) == [card]


async def test_a_slow_card_is_no_lost_card(tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=1.0) as fleet:
        model = await fleet.load(tiny, plan="tp")
        slow = At({20: lambda: fleet.devices[1].slow(20.0)})  # type: ignore[union-attr]
        assert await Crowd(model, slow).run() == expected
        assert kinds(fleet) == []


# --- cards that come back --------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*FAULTS, "reset"])
async def test_a_card_that_was_lost_comes_back(fault: str, tiny: Path, expected: Answers) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        before = model.plan
        used = [device.counters().ddr_used_bytes for device in fleet.devices]
        for card in (1, 0, 1):
            getattr(fleet.devices[card], fault)()
            assert await Crowd(model).run() == expected
            assert card not in model.plan.cards
            await fleet.admit(card)
            assert fleet.health().lost == () and fleet.health().cards == (0, 1, 2)
            assert model.plan == before
            assert await Crowd(model).run() == expected
        assert kinds(fleet) == [CardLost, Replanned, CardReturned, Replanned] * 3
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == used


@pytest.mark.parametrize("fault", [*FAULTS, "reset"])
async def test_a_drained_card_that_has_failed_meanwhile_comes_back(
    fault: str, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        before = model.plan
        await fleet.drain(1)
        getattr(fleet.devices[1], fault)()
        await fleet.admit(1)
        assert kinds(fleet) == [Replanned, CardLost, CardReturned, Replanned]
        assert fleet.health().cards == (0, 1, 2) and model.plan == before
        assert await Crowd(model).run() == expected


@pytest.mark.parametrize("seed", range(4))
async def test_a_card_comes_back_while_sequences_run(
    seed: int, tiny: Path, expected: Answers
) -> None:
    draw = random.Random(seed)
    card, lost = draw.randrange(3), draw.randrange(1, 60)
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan=draw.choice(["tp", "pp"]))
        before = model.plan

        async def come_back() -> None:
            await until(lambda: card in dict(fleet.health().lost))
            await trio.sleep(draw.random() * 0.05)
            await fleet.admit(card)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            moment = At({lost: fleet.devices[card].kill})  # type: ignore[union-attr]
            assert await Crowd(model, moment).run() == expected
        assert await Crowd(model).run() == expected
        assert model.plan == before


async def test_an_idle_model_does_not_use_what_a_new_card_has_not(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        idle, busy = await fleet.load(tiny, plan="tp"), await fleet.load(tiny, plan="tp")
        kill(fleet, 2)
        assert await Crowd(busy).run() == expected
        # Below the fleet, which would move the models at once.
        await fleet._coordinator.revive(2)
        assert await Crowd(idle).run() == expected
        assert await Crowd(busy).run() == expected
        assert not lost_cards(fleet)[1:]


async def test_a_card_that_returns_with_its_links_up_again_ends_no_model_that_went_around_one(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        models = [await fleet.load(tiny, plan="tp") for _ in range(2)]
        cut(fleet, 0, 1)
        for model in models:
            assert await Crowd(model).run() == expected
        kill(fleet, 1)
        # The other one does not find out, and is the last one that is moved.
        assert await Crowd(models[0]).run() == expected
        await fleet.admit(1)
        for model in models:
            assert model.plan.cards == (0, 1, 2)
            assert await Crowd(model).run() == expected
        assert lost_cards(fleet) == [1]


async def test_a_model_that_begins_while_a_card_is_taken_in_again(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        first, second = [await fleet.load(tiny, plan="tp") for _ in range(2)]
        kill(fleet, 1)
        assert await Crowd(first).run() == expected
        coordinator = fleet._coordinator
        counters_of, asked, go_on = coordinator.counters_of, trio.Event(), trio.Event()

        async def slowly(cards: object) -> object:
            asked.set()
            await go_on.wait()
            return await counters_of(cards)  # type: ignore[arg-type]

        coordinator.counters_of = slowly  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.admit, 1)
            await asked.wait()
            assert await Crowd(second).run() == expected
            go_on.set()
        assert first.plan.cards == second.plan.cards == (0, 1, 2)
        assert lost_cards(fleet) == [1]


async def test_what_failed_on_a_card_before_it_came_back_is_not_held_against_it(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp")
        coordinator = fleet._coordinator
        abort = coordinator.abort

        async def late_abort(*args: object) -> None:
            # Others are slow to answer; meanwhile the card is found to be lost, and is back.
            coordinator.abort = abort  # type: ignore[method-assign]
            await abort(*args)  # type: ignore[arg-type]
            coordinator.lose(CardLostError("card 1 is lost: pulled out", card=1))
            await coordinator.revive(1)

        coordinator.abort = late_abort  # type: ignore[method-assign]
        assert await Crowd(model, At({20: lambda: kill(fleet, 1)})).run() == expected
        assert lost_cards(fleet) == [1] and fleet.health().lost == ()
        assert model.plan.cards == (0, 1, 2)


async def test_a_card_that_comes_back_while_a_model_is_loaded_begins_the_load_again(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        coordinator = fleet._coordinator
        memory_used, asked = coordinator._memory_used, 0

        async def flapping(plan: object) -> dict[int, int]:
            nonlocal asked
            asked += 1
            if asked == 2:  # all is there, and nobody has looked yet
                kill(fleet, 1)
                coordinator.lose(CardLostError("card 1 is lost: pulled out", card=1))
                await coordinator.revive(1)
            return await memory_used(plan)  # type: ignore[arg-type]

        coordinator._memory_used = flapping  # type: ignore[method-assign]
        model = await fleet.load(tiny, plan="tp")
        assert model.plan.cards == (0, 1, 2)
        assert await Crowd(model).run() == expected
        assert kinds(fleet) == [CardLost, CardReturned]


async def test_arrays_of_a_card_that_was_lost_are_told_to_be_gone() -> None:
    async with spanker.open_fleet("soft:3", channel="unix", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        arrays = await fleet.arrays(64)
        await spanker.all_reduce(fleet, arrays)
        kill(fleet, 1)
        with pytest.raises(CardLostError):
            await spanker.all_reduce(fleet, arrays)
        fleet._coordinator.lose(CardLostError("card 1 is lost: pulled out", card=1))
        await fleet.admit(1)
        with pytest.raises(CardLostError, match="is a new one now"):
            await spanker.all_reduce(fleet, arrays)
        await arrays.aclose()
        fresh = [np.full(8, card, np.float32) for card in range(3)]
        await spanker.all_reduce(fleet, fresh)
        assert all(np.array_equal(array, np.full(8, 3, np.float32)) for array in fresh)
        await fleet._collectives.trim()
        assert [device.counters().ddr_used_bytes for device in fleet.devices] == [0, 0, 0]


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_card_comes_back_while_a_collective_waits_for_the_cards(channel: str) -> None:
    async with spanker.open_fleet(3, channel=channel, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        coordinator = fleet._coordinator
        await spanker.all_reduce(fleet, [np.ones(64, np.int32) for _ in range(3)])
        arrays = [np.full(64, card, np.int32) for card in range(3)]
        async with trio.open_nursery() as nursery:
            await coordinator.take_cards((0,))
            nursery.start_soon(spanker.all_reduce, fleet, arrays)
            await trio.testing.wait_all_tasks_blocked()
            kill(fleet, 1)
            coordinator.lose(CardLostError("card 1 is lost: pulled out", card=1))
            await fleet.admit(1)
            # What it has prepared on the card is gone; the same number is something else now.
            (handle,) = await coordinator.allocate(1, (256,))
            coordinator.give_cards_back((0,))
        assert all(np.array_equal(array, np.full(64, 3, np.int32)) for array in arrays)
        reply = await coordinator.ask(1, ReadBuffer(handle, 0, 256))
        assert not any(bytes(reply.buffers[0]))


async def test_who_cannot_come_back() -> None:
    async with spanker.open_fleet(2) as fleet:
        with pytest.raises(ConfigError, match="card 1 is neither drained nor lost"):
            await fleet.admit(1)


@pytest.mark.parametrize("seconds", [12, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_card_that_flaps_every_second(fault: str, seconds: int, shallow: Path) -> None:
    async def main() -> None:
        async with spanker.open_fleet("virtual:3", profile="rev-a", hang_timeout_s=0.2) as fleet:
            model = await fleet.load(shallow, plan="tp")
            right = await tokens(model)
            for second in range(seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep, 1)
                    generation = model.generate([5, 6, 7], max_tokens=TOKENS, ignore_eos=True)
                    async for token in generation:
                        if token.id is not None and len(generation.token_ids) == second % 6 + 1:
                            FAULTS[fault](fleet, 1)
                    assert tuple(generation.token_ids) == right
                    await fleet.admit(1)
            assert kinds(fleet) == [CardLost, Replanned, CardReturned, Replanned] * seconds

    run_virtual(main)


async def test_a_card_is_admitted_for_the_models_that_it_is_of_use_to(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(3, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        first = await fleet.load(tiny, plan="tp")
        second = await fleet.load(tiny, plan="auto")
        # A card that none of its peers reaches is of no use to the first.
        for peer in (0, 1):
            cut(fleet, 2, peer)
        assert await Crowd(first).run() == expected
        await fleet.drain(2)
        await fleet.admit(2)
        assert fleet.health().cards == (0, 1, 2)
        assert await Crowd(second).run() == expected
        assert await Crowd(first).run() == expected
