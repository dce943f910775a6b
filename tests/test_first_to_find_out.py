# SPDX-License-Identifier: Apache-2.0
"""Cards that are gone or silent: whoever is the first to find out, nobody waits for ever, and the
fleet knows."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import trio
from crowd import HANG_TIMEOUT_S, kinds, lost_cards
from silent_cards import SilentCards

import spanker
from spanker.actors import coordinator as coordinators
from spanker.errors import CardHungError, CardLostError
from spanker.events import CardLost
from spanker.sched.bandwidth import REV_A
from spanker.testing import kill, nothing_leaked, run_virtual

# --- from the start -----------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_fleet_with_a_card_that_never_answers_is_not_opened(
    channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinators, "STOP_S", HANG_TIMEOUT_S)
    async with nothing_leaked():
        with trio.fail_after(20), pytest.raises(CardHungError) as caught:
            async with spanker.open_fleet(
                3, channel=channel, hang_timeout_s=HANG_TIMEOUT_S, _around=SilentCards(1)
            ):
                raise AssertionError("it was opened")
    assert caught.value.card == 1
    assert str(caught.value) == (
        f"card 1 has not answered Describe for {HANG_TIMEOUT_S} s; "
        f"close the fleet and open it without that card"
    )


@pytest.mark.parametrize(("hang_timeout_s", "limit_s"), [(0.5, 2), (7, 7)])
def test_cards_have_two_seconds_at_least_to_say_what_they_are(
    hang_timeout_s: float, limit_s: float
) -> None:
    async def main() -> None:
        begin = trio.current_time()
        with pytest.raises(CardHungError, match=rf"has not answered Describe for {limit_s} s"):
            async with spanker.open_fleet(
                "virtual:4", hang_timeout_s=hang_timeout_s, _around=SilentCards(0, 2, 3)
            ):
                raise AssertionError("it was opened")
        # The others are told to stop, and do not hear it.
        assert trio.current_time() - begin < limit_s + coordinators.CLOSE_S + 0.1

    run_virtual(main)


# --- later --------------------------------------------------------------------------------

Find = Callable[[spanker.Fleet, spanker.Model, Path], Awaitable[None]]


def ones() -> list[npt.NDArray[np.float32]]:
    return [np.ones(64, np.float32) for _ in range(3)]


async def stats(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    assert [card.number for card in (await fleet.stats()).cards] == [0, 2]


async def unload(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await model.unload()


async def drain(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    await fleet.drain(0)
    assert model.plan.cards == (2,)
    await fleet.admit(0)


async def collective(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    with pytest.raises((CardLostError, CardHungError)) as caught:
        await spanker.all_reduce(fleet, ones())
    assert caught.value.card == 1


async def array(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    with pytest.raises((CardLostError, CardHungError)) as caught:
        await fleet.arrays(64)
    assert caught.value.card == 1


async def trace(fleet: spanker.Fleet, model: spanker.Model, tiny: Path) -> None:
    async with fleet.trace(tiny.with_suffix(".json")):
        pass


def report(device: object) -> None:
    """The card tells whoever wants its counters, or a trace, that it is gone: emulated ones that
    are killed still count."""

    def gone(*_: object) -> None:
        raise CardLostError("card 1 was pulled out", card=1)

    device.counters = device.trace = gone  # type: ignore[attr-defined]


# A load goes on without the card where a fleet recovers: tests/test_recovery.py.
@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize(
    ("find", "how"),
    [(find, "kill") for find in (unload, drain, collective, array)]
    + [(find, "silence") for find in (stats, unload, drain, collective, array, trace)]
    + [(find, "report") for find in (stats, trace)],
)
def test_a_card_that_is_gone_is_lost_whoever_finds_out(
    find: Find, how: str, recover: bool, tiny: Path
) -> None:
    async def main() -> None:
        around = SilentCards()
        async with spanker.open_fleet(
            "virtual:3", hang_timeout_s=1, recover=recover, _around=around
        ) as fleet:
            model = await fleet.load(tiny, plan="tp")
            # What is prepared is there: it is the run that finds out.
            await spanker.all_reduce(fleet, ones())
            assert fleet.health().cards == (0, 1, 2)
            if how == "kill":
                kill(fleet, 1)
            elif how == "report":
                report(fleet.devices[1])
            else:
                around.silence(1)
            with trio.fail_after(10):
                await find(fleet, model, tiny)
            health = fleet.health()
            assert health.cards == (0, 2) and [card for card, _ in health.lost] == [1]
            assert kinds(fleet).count(CardLost) == 1 and lost_cards(fleet) == [1]

    run_virtual(main)


@pytest.mark.parametrize("how", ["kill", "silence"])
def test_a_load_that_does_not_recover_tells_which_card_it_has_lost(how: str, tiny: Path) -> None:
    async def main() -> None:
        around = SilentCards()
        async with spanker.open_fleet(
            "virtual:3", hang_timeout_s=1, recover=False, _around=around
        ) as fleet:
            strike = around.silence if how == "silence" else functools.partial(kill, fleet)
            strike(1)
            with trio.fail_after(10), pytest.raises((CardLostError, CardHungError)) as caught:
                await fleet.load(tiny, plan="tp")
            assert caught.value.card == 1
            health = fleet.health()
            assert health.cards == (0, 2) and [card for card, _ in health.lost] == [1]
            assert kinds(fleet) == [CardLost] and lost_cards(fleet) == [1]
            # The others are as free as they were.
            model = await fleet.load(tiny, plan="tp")
            assert model.plan.cards == (0, 2)

    run_virtual(main)


def test_cards_are_asked_for_their_counters_at_the_same_time() -> None:
    async def main() -> None:
        around = SilentCards()
        async with spanker.open_fleet("virtual:6", hang_timeout_s=3, _around=around) as fleet:
            for card in (0, 2, 3):
                around.silence(card)
            begin = trio.current_time()
            assert [card.number for card in (await fleet.stats()).cards] == [1, 4, 5]
            assert trio.current_time() - begin < 3.1
            assert sorted(lost_cards(fleet)) == [0, 2, 3]

    run_virtual(main)


async def test_closing_a_fleet_loses_no_card() -> None:
    async with spanker.open_fleet(3) as fleet:
        pass
    assert fleet.events.history == () and fleet.health().lost == ()


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_a_card_that_a_collective_has_found_dead_comes_back(channel: str) -> None:
    async with spanker.open_fleet(
        3, channel=channel, recover=False, hang_timeout_s=HANG_TIMEOUT_S
    ) as fleet:
        await spanker.all_reduce(fleet, ones())
        kill(fleet, 2)
        with pytest.raises(CardLostError):
            await spanker.all_reduce(fleet, ones())
        assert fleet.health().cards == (0, 1)
        await fleet.admit(2)
        assert fleet.health().cards == (0, 1, 2)
        summed = ones()
        await spanker.all_reduce(fleet, summed)
        assert all((own == 3).all() for own in summed)


# --- by nobody, who has given up --------------------------------------------------------


async def reduce_first(fleet: spanker.Fleet) -> None:
    await spanker.all_reduce(fleet, ones())


async def allocate(fleet: spanker.Fleet) -> None:
    await fleet.arrays(64)


async def admit(fleet: spanker.Fleet) -> None:
    await fleet.admit(1)


@pytest.mark.parametrize("deed", [reduce_first, allocate, admit])
def test_whoever_gives_up_on_a_silent_card_is_back_at_once_and_it_is_lost(
    deed: Callable[[spanker.Fleet], Awaitable[None]], tiny: Path
) -> None:
    async def main() -> None:
        around = SilentCards()
        async with spanker.open_fleet("virtual:3", hang_timeout_s=10, _around=around) as fleet:
            model = await fleet.load(tiny, plan="tp")
            await fleet.drain(1)
            around.silence(1)
            begin = trio.current_time()
            with trio.move_on_after(0.2) as scope:
                await deed(fleet)
            assert scope.cancelled_caught
            assert trio.current_time() - begin < 0.3
            await model.generate([1, 2], max_tokens=4, ignore_eos=True).collect()
            await trio.sleep(25)
            assert lost_cards(fleet) == [1]

    run_virtual(main)


# --- not at all ---------------------------------------------------------------------------


SLOW_LINK = attrs.evolve(REV_A, host_link_bytes_per_s=5_000_000)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_card_that_gets_large_arrays_over_the_host_link_is_not_silent(cancelled: bool) -> None:
    async def main() -> None:
        async with spanker.open_fleet("virtual:3", profile=SLOW_LINK, hang_timeout_s=0.5) as fleet:
            if cancelled:
                with trio.move_on_after(0.1):
                    await spanker.all_reduce(fleet, large())
            arrays = large()
            await spanker.all_reduce(fleet, arrays)
            assert all((array == 6).all() for array in arrays)
            assert trio.current_time() > 10 and not lost_cards(fleet)

    def large() -> list[npt.NDArray[np.int32]]:
        return [np.full(2 << 20, card + 1, np.int32) for card in range(3)]

    run_virtual(main)
