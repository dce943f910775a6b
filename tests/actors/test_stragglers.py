# SPDX-License-Identifier: Apache-2.0
"""Which card has become slower: one that has, and no other."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from spanker.actors.stragglers import SLOWER, WINDOW, Paces


def steps(
    paces: Paces,
    count: int,
    speeds: Sequence[float],
    slow: dict[int, float],
    draw: random.Random,
) -> list[dict[int, float]]:
    """So many steps of all sizes on cards of these speeds, each noisy by a fifth: what is found."""
    found = []
    for _ in range(count):
        size = draw.choice([1e6, 1e6, 1e6, 8e6])
        busy = [round(size / speed * draw.uniform(0.9, 1.1)) for speed in speeds]
        changes = paces.note(busy, slow)
        if changes:
            found.append(changes)
    return found


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cards", [2, 3, 8])
def test_steady_cards_are_left_alone(cards: int, seed: int) -> None:
    draw = random.Random(seed)
    speeds = [draw.uniform(0.5, 2) for _ in range(cards)]
    paces = Paces(range(cards))
    assert steps(paces, 20 * WINDOW, speeds, {}, draw) == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cards", [2, 3, 8])
def test_a_card_that_becomes_slower_is_found_and_how_much(cards: int, seed: int) -> None:
    draw = random.Random(seed)
    speeds = [draw.uniform(0.5, 2) for _ in range(cards)]
    numbers = draw.sample(range(20), cards)
    paces, card, factor = Paces(numbers), draw.randrange(cards), draw.uniform(3, 20)
    assert steps(paces, 3 * WINDOW, speeds, {}, draw) == []
    speeds[card] /= factor
    first = steps(paces, 3 * WINDOW, speeds, {}, draw)[0]
    assert first.keys() == {numbers[card]}
    assert first[numbers[card]] == pytest.approx(factor, rel=0.2)


@pytest.mark.parametrize("cards", [2, 3])
def test_a_straggler_that_is_itself_again_is_found(cards: int) -> None:
    draw = random.Random(1)
    speeds, slow = [1.0] * cards, {1: 8.0}
    speeds[1] = 1 / 8
    paces = Paces(range(cards))
    assert steps(paces, 3 * WINDOW, speeds, slow, draw) == []
    speeds[1] = 1.0
    first = steps(paces, 3 * WINDOW, speeds, slow, draw)[0]
    assert first.keys() == {1} and first[1] == pytest.approx(1.0, rel=0.2)


def test_a_straggler_that_becomes_slower_still_is_told_by_how_much_in_all() -> None:
    draw = random.Random(2)
    paces, slow = Paces(range(3)), {2: 4.0}
    assert steps(paces, 3 * WINDOW, [1, 1, 0.25], slow, draw) == []
    first = steps(paces, 3 * WINDOW, [1, 1, 0.05], slow, draw)[0]
    assert first.keys() == {2} and first[2] == pytest.approx(20, rel=0.2)


def test_less_than_a_factor_is_noise_and_so_are_a_few_steps() -> None:
    draw = random.Random(3)
    paces = Paces(range(3))
    steps(paces, WINDOW, [1, 1, 1], {}, draw)
    assert steps(paces, 5 * WINDOW, [1, 1 / (SLOWER - 0.4), 1], {}, draw) == []
    assert steps(paces, WINDOW, [1, 1 / 9, 1], {}, draw) == []
    assert steps(paces, 3 * WINDOW, [1, 1, 1], {}, draw) == []
    for _ in range(10):
        assert steps(paces, WINDOW // 4, [0.05, 1, 1], {}, draw) == []
        assert steps(paces, WINDOW - WINDOW // 4, [1, 1, 1], {}, draw) == []


def test_one_card_and_idle_cards_have_no_pace() -> None:
    assert steps(Paces([0]), 4 * WINDOW, [1.0], {}, random.Random(0)) == []
    paces = Paces([0, 1])
    assert not any(paces.note([1000, 0], {}) for _ in range(4 * WINDOW))
