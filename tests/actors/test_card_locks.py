# SPDX-License-Identifier: Apache-2.0
"""Who may queue steps on which cards: nobody waits in a circle, and nothing stays taken."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from spanker.actors.card_locks import CardLocks


async def test_free_cards_are_taken_without_a_checkpoint() -> None:
    locks = CardLocks(4)
    with trio.testing.assert_no_checkpoints():
        await locks.take([2, 0])
        await locks.take([1, 3])
    locks.give_back([2, 0])
    locks.give_back([1, 3])


async def test_disjoint_cards_do_not_wait_for_each_other_and_others_do() -> None:
    locks, order = CardLocks(4), list[str]()

    async def hold(name: str, *cards: int) -> None:
        async with locks.holding(cards):
            order.append(name)

    async with trio.open_nursery() as nursery:
        async with locks.holding([0, 1]):
            nursery.start_soon(hold, "apart", 2, 3)
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["apart"]
            assert not locks.wanted([0, 1]) and not locks.wanted([2, 3])
            nursery.start_soon(hold, "all", 3, 2, 1, 0)
            await trio.testing.wait_all_tasks_blocked()
            # It waits for the first card that it cannot have, and has not got to the others.
            assert locks.wanted([0]) and locks.wanted([1, 0]) and not locks.wanted([1, 2, 3])
            nursery.start_soon(hold, "behind", 0)
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["apart"]
        await trio.testing.wait_all_tasks_blocked()
    assert order == ["apart", "all", "behind"]
    assert not locks.wanted(range(4))


async def test_who_is_cancelled_while_waiting_leaves_nothing_taken() -> None:
    locks = CardLocks(3)

    async def try_all() -> None:
        with trio.move_on_after(0) as scope:
            await locks.take([0, 1, 2])
        assert scope.cancelled_caught

    async with locks.holding([1]):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_all)
        assert not locks.wanted(range(3))
        with trio.testing.assert_no_checkpoints():
            await locks.take([0, 2])
        locks.give_back([0, 2])
    with trio.testing.assert_no_checkpoints():
        await locks.take(range(3))
    locks.give_back(range(3))


@pytest.mark.parametrize("seed", range(10))
async def test_any_sets_of_cards_at_any_time_come_through(seed: int) -> None:
    rng = random.Random(seed)
    cards = 5
    locks, holders, turns = CardLocks(cards), [0] * cards, 0

    async def worker() -> None:
        nonlocal turns
        for _ in range(30):
            mine = rng.sample(range(cards), rng.randint(1, cards))
            with trio.CancelScope() as scope:
                if rng.random() < 0.2:
                    scope.deadline = trio.current_time() + 0.0001
                async with locks.holding(mine):
                    for card in mine:
                        holders[card] += 1
                        assert holders[card] == 1
                    turns += 1
                    try:
                        for _ in range(rng.randint(0, 3)):
                            await trio.lowlevel.checkpoint()
                    finally:
                        for card in mine:
                            holders[card] -= 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(worker)
    assert turns > 100 and not locks.wanted(range(cards))
