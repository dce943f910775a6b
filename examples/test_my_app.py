# SPDX-License-Identifier: Apache-2.0
"""Testing your own code against a fleet whose cards die.

Run it with `pytest examples/test_my_app.py`.

The fixtures `spanker_fleet` (three cards) and `tiny_model` (random weights, loads in milliseconds)
come with the package; pytest-trio runs the tests.
"""

import pytest

import spanker
from spanker.errors import CardError
from spanker.testing import hang, kill

pytestmark = pytest.mark.trio


async def polite_answer(model: spanker.Model, question: str) -> str:
    """Your code: an answer, or an apology."""
    try:
        return await model.generate(question, max_tokens=100, ignore_eos=True).collect()
    except CardError as error:
        return f"Sorry: {error}"


@pytest.mark.parametrize("fail", [kill, hang])
async def test_a_failing_card_changes_no_answer(spanker_fleet, tiny_model, fail):
    model = await spanker_fleet.load(tiny_model)
    expected = await polite_answer(model, "hello")
    generation = model.generate("hello", max_tokens=100, ignore_eos=True)
    await anext(generation)
    fail(spanker_fleet, 2)
    assert await generation.collect() == expected
    assert [card for card, why in spanker_fleet.health().lost] == [2]


async def test_it_apologises_when_no_card_is_left(spanker_fleet, tiny_model):
    model = await spanker_fleet.load(tiny_model)
    for card in range(3):
        kill(spanker_fleet, card)
    assert "no card is left" in await polite_answer(model, "hello")
