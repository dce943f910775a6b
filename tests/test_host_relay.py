# SPDX-License-Identifier: Apache-2.0
"""Cards that have no link, or none any more: the host leads between them, and no bit changes.

A failing case is replayed by its name: moments are drawn from the seed in it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from crowd import HANG_TIMEOUT_S, ITEMS, Answers, At, Crowd, check_nothing_held, kinds, lost_cards
from waiting import until

import spanker
from spanker.actors import link_watch
from spanker.actors.channel import Channel
from spanker.actors.message import LoadProgram, Message, Relayed
from spanker.device.base import CardDevice
from spanker.errors import CardCommandError, ConfigError
from spanker.events import CardLost, LinkDown, LinkRetried, LinkUp, Replanned, Rerouted
from spanker.kernels.program import Program, Ref, Transfer, exchange
from spanker.sched.topology import Link, LinkState, Topology
from spanker.testing import hang, kill, run_virtual, write_tiny_llama
from spanker.testing.fault_plan import What
from spanker.testing.faulty_channel import FaultyChannel

NONE = {n: Topology.of_pairs(n, []) for n in (2, 3, 4)}
# Two pairs, and nothing between them.
PAIRS = Topology.of_pairs(4, [(0, 1), (2, 3)])


def cut(fleet: spanker.Fleet, a: int, b: int) -> None:
    fleet.devices[a].cut(b)  # type: ignore[union-attr]


def mend(fleet: spanker.Fleet, a: int, b: int) -> None:
    fleet.devices[a].mend(b)  # type: ignore[union-attr]


@pytest.mark.parametrize("channel", ["memory", "unix"])
@pytest.mark.parametrize("seed", range(2))
async def test_two_cards_of_a_plan_go_over_the_host_and_back_to_their_link(
    seed: int, channel: str, tiny: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_watch, "LOOK_S", 0.05)
    draw = random.Random(f"{seed} {channel}")
    plan = draw.choice(["tp2", "tp1xpp2"])
    with trio.fail_after(30):
        async with spanker.open_fleet(2, channel=channel, hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(tiny, plan=plan)
            before = model.plan
            moment = At({draw.randrange(1, ITEMS - 20): lambda: cut(fleet, 0, 1)})
            assert await Crowd(model, moment).run() == expected
            assert await Crowd(model).run() == expected
            assert kinds(fleet) == [LinkDown, Rerouted]
            told = fleet.events.history[-1]
            assert isinstance(told, Rerouted) and "over the host for 0-1" in str(told)
            mend(fleet, 0, 1)
            await until(lambda: fleet.topology.is_up(0, 1))
            assert await Crowd(model).run() == expected
            assert kinds(fleet) == [LinkDown, Rerouted, LinkUp, Rerouted]
            assert model.plan == before
            await check_nothing_held(model)


async def test_a_model_too_large_for_either_side_of_a_cut_goes_on_over_the_host(
    tmp_path: Path,
) -> None:
    path = write_tiny_llama(tmp_path / "large.gguf", layers=4, hidden=256, ffn=4096)

    async def tokens(cut_at: int | None) -> list[int | None]:
        async with spanker.open_fleet("soft:2:8MiB", hang_timeout_s=HANG_TIMEOUT_S) as fleet:
            model = await fleet.load(path, plan="tp", ctx=64, prompt_chunk=64)
            generation = model.generate([1], max_tokens=40, ignore_eos=True)
            async for token in generation:
                if token.position == cut_at:
                    cut(fleet, 1, 0)
            assert kinds(fleet) == ([] if cut_at is None else [LinkDown, Rerouted])
            return [*generation.token_ids]

    with trio.fail_after(30):
        assert await tokens(11) == await tokens(None)


@pytest.mark.parametrize(
    ("topology", "plan"),
    [(NONE[2], "tp2"), (NONE[3], "tp3"), (NONE[3], "tp1xpp3"), (PAIRS, "tp2xpp2"), (PAIRS, "tp4")],
)
async def test_a_fleet_without_links_runs_a_model(
    topology: Topology, plan: str, tiny: Path, expected: Answers
) -> None:
    cards = len(topology.cards)
    with trio.fail_after(30):
        async with spanker.open_fleet(
            cards, topology=topology, hang_timeout_s=HANG_TIMEOUT_S
        ) as fleet:
            assert fleet.topology == topology
            model = await fleet.load(tiny, plan=plan)
            assert await Crowd(model).run() == expected
            assert len(model.plan.cards) == cards
            counters = [device.counters() for device in fleet.devices]
            assert all(sum(c.link_tx_bytes) for c in counters)
            for a, own in enumerate(counters):
                for b, peer in enumerate(counters):
                    assert own.link_tx_bytes[b] == peer.link_rx_bytes[a]


async def test_cards_without_links_are_not_chosen_where_one_can_do(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(2, topology=NONE[2]) as fleet:
        for plan in ("auto", "tp"):
            model = await fleet.load(tiny, plan=plan)
            assert len(model.plan.cards) == 1
        assert await Crowd(model).run() == expected


@pytest.mark.parametrize("throttle", [False, True])
async def test_what_goes_over_the_host_takes_its_time_there(
    throttle: bool, tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(
        2, profile="rev-a", throttle=throttle, topology=NONE[2], hang_timeout_s=2
    ) as fleet:
        model = await fleet.load(tiny, plan="tp2")
        host = fleet._coordinator.host_link
        assert host is not None
        before = host.bytes_to_cards, host.bytes_to_host
        sent = sum(sum(device.counters().link_tx_bytes) for device in fleet.devices)
        generation = model.generate([5, 6, 7], max_tokens=30, ignore_eos=True)
        await generation.collect()
        moved = sum(sum(device.counters().link_tx_bytes) for device in fleet.devices) - sent
        assert host.bytes_to_cards - before[0] > moved
        assert host.bytes_to_host - before[1] > moved
        if not throttle:
            assert await Crowd(model).run() == expected
        assert not lost_cards(fleet)


async def test_damage_over_the_host_is_found_and_the_step_made_again(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(2, topology=NONE[2], hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp2")
        damage = At({30: lambda: fleet.devices[0].corrupt(1, 2)})  # type: ignore[union-attr]
        assert await Crowd(model, damage).run() == expected
        assert set(kinds(fleet)) == {LinkRetried}


class Loses(FaultyChannel):
    """One message on its way from card to card, the `at`-th over this channel, gets lost."""

    at = 0

    def _about_to_go(self, message: Message, request_id: int) -> int:
        if self.at and isinstance(message, Relayed):
            self.at -= 1
            if not self.at:
                self.arm(What.DROP)
        return super()._about_to_go(message, request_id)


class Lossy:
    """An Around whose channels lose what they are told to."""

    def __init__(self) -> None:
        self.channels: dict[int, Loses] = {}

    def device(self, card: CardDevice) -> CardDevice:
        return card

    def channel(self, card: int, end: Channel) -> Channel:
        self.channels[card] = Loses(end, f"channel of card {card}")
        return self.channels[card]


@pytest.mark.parametrize("channel", ["memory", "unix"])
@pytest.mark.parametrize("card", [0, 1])
@pytest.mark.parametrize("plan", ["tp2", "tp1xpp2"])
@pytest.mark.parametrize("seed", range(2))
async def test_a_message_that_gets_lost_on_its_way_costs_no_card(
    seed: int, plan: str, card: int, channel: str, tiny: Path, expected: Answers
) -> None:
    """The one that waits for it in vain is as healthy as the one that has sent it."""
    draw, lossy = random.Random(f"{seed} {plan} {card} {channel}"), Lossy()
    with trio.fail_after(30):
        async with spanker.open_fleet(
            2,
            topology=NONE[2],
            channel=channel,
            hang_timeout_s=HANG_TIMEOUT_S,
            _around=lossy,
        ) as fleet:
            model = await fleet.load(tiny, plan=plan)

            def lose() -> None:
                lossy.channels[card].at = draw.randrange(1, 30)

            assert await Crowd(model, At({20: lose, 60: lose, 100: lose})).run() == expected
            assert set(kinds(fleet)) == {LinkRetried} and fleet.health().lost == ()
            assert model.plan.cards == (0, 1)
            # What is really at fault is still told from it, and at once.
            hang(fleet, card)
            assert await Crowd(model).run() == expected
            assert lost_cards(fleet) == [card]


async def test_a_card_that_dies_with_the_host_between_it_and_its_peer(
    tiny: Path, expected: Answers
) -> None:
    async with spanker.open_fleet(2, topology=NONE[2], hang_timeout_s=HANG_TIMEOUT_S) as fleet:
        model = await fleet.load(tiny, plan="tp2")
        assert await Crowd(model, At({25: lambda: kill(fleet, 1)})).run() == expected
        assert kinds(fleet) == [CardLost, Replanned]
        await fleet.admit(1)
        assert model.plan.name == "tp2"
        assert await Crowd(model).run() == expected


def test_virtual_cards_go_over_the_host_alike(tiny: Path) -> None:
    async def main(cut_at: int | None) -> tuple[list[int], float, int, list[str]]:
        async with spanker.open_fleet("virtual:2", profile="rev-a", hang_timeout_s=0.5) as fleet:
            model = await fleet.load(tiny, plan="tp2")
            begin = trio.current_time()
            generation = model.generate([5, 6, 7], max_tokens=16, ignore_eos=True)
            async for token in generation:
                if token.position == cut_at:
                    cut(fleet, 0, 1)
                if len(generation.token_ids) == 12 and cut_at is not None:
                    mend(fleet, 0, 1)
                    await trio.sleep(2.5)
            log = [str(event) for event in fleet.events.history]
            return generation.token_ids, trio.current_time() - begin, _to_cards(fleet), log

    straight, cut_once = run_virtual(main, None), run_virtual(main, 6)
    assert cut_once[0] == straight[0]
    assert cut_once[1] > straight[1] and cut_once[2] > straight[2]
    assert [line.partition(", after")[0] for line in cut_once[3]] == [
        "link 0-1 is down",
        "tiny llama: steps go around 0-1, over the host for 0-1",
        "link 0-1 is up again",
        "tiny llama: steps go straight again",
    ]
    assert run_virtual(main, 6) == cut_once


def _to_cards(fleet: spanker.Fleet) -> int:
    return fleet.usage().bytes_to_cards


async def test_a_program_over_a_link_that_is_not_there_is_refused() -> None:
    for cards in ("soft:2", "virtual:2"):
        async with spanker.open_fleet(cards, topology=NONE[2]) as fleet:
            coordinator = fleet._coordinator
            (handle,) = await coordinator.allocate(0, (64,))
            for hosted in (False, True):
                move = Transfer(send=True, peer=1, ref=Ref("x"), nbytes=64, hosted=hosted)
                program = Program(exchange([move]), 1, 1, 1).encode({"x": handle})
                request = LoadProgram(buffers=(program,))
                if hosted:
                    await coordinator.ask(0, request)
                    continue
                with pytest.raises(CardCommandError, match="a peer without a link"):
                    await coordinator.ask(0, request)


async def test_topologies_that_emulated_cards_cannot_have() -> None:
    with pytest.raises(ConfigError, match="that of cards 0 to 2"):
        async with spanker.open_fleet(3, topology=NONE[2]):
            pass
    one_way = Topology((0, 1), (Link(0, 1, LinkState.UP),))
    with pytest.raises(ConfigError, match="go both ways"):
        async with spanker.open_fleet(2, topology=one_way):
            pass
