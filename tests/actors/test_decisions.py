# SPDX-License-Identifier: Apache-2.0
"""What is done about a failed step: every situation there is, and the table that people read."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from spanker.actors.decisions import LINK_RETRIES_MAX, Action, Failure, Situation, decide
from spanker.errors import (
    CardAbortedError,
    CardFaultError,
    CardHungError,
    CardLinkDownError,
    CardLinkError,
    CardLostError,
    ModelError,
)

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


def table() -> list[list[str]]:
    """The rows of the decision table: failure, known, action."""
    text = ARCHITECTURE.read_text().partition("<!-- decisions -->")[2].partition("\n\n")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


SITUATIONS = [
    Situation(failure, retries, ended, recovers, blamed)
    for failure, retries, ended, recovers, blamed in itertools.product(
        Failure, range(LINK_RETRIES_MAX + 2), (False, True), (False, True), (False, True)
    )
]

# What a row of the table says of a situation, by its words.
KNOWN = {
    "": lambda s: True,
    "fewer than 2 retries in a row": lambda s: s.retries < LINK_RETRIES_MAX,
    "2 retries in a row": lambda s: s.retries >= LINK_RETRIES_MAX,
    "a sequence of the step has ended since": lambda s: s.ended,
    "none has": lambda s: not s.ended,
    "the model may move, and a card is named": lambda s: s.recovers and s.blamed,
    "else": lambda s: not (s.recovers and s.blamed),
}


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_the_table_is_the_function(situation: Situation) -> None:
    rows = [
        row for row in table() if row[0] == situation.failure.value and KNOWN[row[1]](situation)
    ]
    assert [row[2] for row in rows] == [decide(situation).value]


def test_no_situation_is_retried_for_ever() -> None:
    for situation in SITUATIONS:
        action = decide(situation)
        if action in (Action.RETRY, Action.REROUTE) and situation.failure is not Failure.FAULT:
            assert situation.retries < LINK_RETRIES_MAX


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (CardLinkError("x"), Failure.LINK),
        (CardLinkDownError("x"), Failure.LINK_DOWN),
        (CardFaultError("x"), Failure.FAULT),
        (CardLostError("x"), Failure.CARD),
        (CardHungError("x"), Failure.CARD),
        (CardAbortedError("x"), Failure.OTHER),
        (ModelError("x"), Failure.OTHER),
    ],
)
def test_errors_tell_of_their_kind_of_failure(error: Exception, failure: Failure) -> None:
    assert Failure.of(error) is failure  # type: ignore[arg-type]
