# SPDX-License-Identifier: Apache-2.0
"""Testing your own code against a fleet whose card dies.

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
    """Your code: an answer, or an apology that tells the operator which card it was."""
    try:
        return await model.generate(question, max_tokens=200, ignore_eos=True).collect()
    except CardError as error:
        return f"Sorry, card {error.card} has failed. Please try again later."


async def test_it_answers(spanker_fleet, tiny_model):
    model = await spanker_fleet.load(tiny_model)
    assert "Sorry" not in await polite_answer(model, "hello")


@pytest.mark.parametrize("fail", [kill, hang])
async def test_it_apologises_when_a_card_fails(spanker_fleet, tiny_model, fail):
    model = await spanker_fleet.load(tiny_model)
    fail(spanker_fleet, 2)
    assert await polite_answer(model, "hello") == (
        "Sorry, card 2 has failed. Please try again later."
    )
