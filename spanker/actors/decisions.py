# SPDX-License-Identifier: Apache-2.0
"""What a session does when one of its steps has failed: a function of what is known, no more.

The table in docs/architecture.md, "When something fails", is this function; a test holds the two
together.
"""

from __future__ import annotations

import enum

from spanker.errors import (
    CardFaultError,
    CardHungError,
    CardLinkDownError,
    CardLinkError,
    CardLostError,
    SpankerError,
)
from spanker.values import Value, lazy_frozen

# How often a step is made again, without another one in between, that a link has failed.
LINK_RETRIES_MAX = 2


class Failure(enum.Enum):
    """What has become of a step."""

    LINK = "a message between cards failed its checks"
    LINK_DOWN = "a card waits for a link that is down"
    FAULT = "the arithmetic of a step failed"
    CARD = "a card is gone or hangs"
    OTHER = "anything else"

    @classmethod
    def of(cls, error: SpankerError) -> Failure:
        """The kind of failure that an error tells of."""
        for kind, failure in (
            (CardLinkError, cls.LINK),
            (CardLinkDownError, cls.LINK_DOWN),
            (CardFaultError, cls.FAULT),
            (CardLostError, cls.CARD),
            (CardHungError, cls.CARD),
        ):
            if isinstance(error, kind):
                return failure
        return cls.OTHER


class Action(enum.Enum):
    """What is done about it."""

    RETRY = "make the step again"
    REROUTE = "go around the link, then make the step again"
    REPLAN = "put the model on the cards that are left, then go on"
    END_SEQUENCES = "end the sequences of the step, go on with the others"
    GIVE_UP = "end the session"


@lazy_frozen
class Situation(Value):
    """What is known when a step has failed.

    `retries`: how often in a row it has been made again because of links.  `ended`: one of its
    sequences has ended since it was planned, which may have been the cause.  `recovers`: the model
    may be put on other cards.  `blamed`: the failure names a card.
    """

    failure: Failure
    retries: int = 0
    ended: bool = False
    recovers: bool = True
    blamed: bool = True


def decide(situation: Situation) -> Action:
    """What to do.  Every chain of failures is bounded: links are tried LINK_RETRIES_MAX times in a
    row, a re-plan takes a card away, and a fault ends sequences."""
    failure = situation.failure
    if failure in (Failure.LINK, Failure.LINK_DOWN):
        if situation.retries >= LINK_RETRIES_MAX:
            return Action.END_SEQUENCES
        return Action.RETRY if failure is Failure.LINK else Action.REROUTE
    if failure is Failure.FAULT:
        # The same arithmetic would fail again, unless it was theirs that have ended.
        return Action.RETRY if situation.ended else Action.END_SEQUENCES
    if failure is Failure.CARD and situation.recovers and situation.blamed:
        return Action.REPLAN
    return Action.GIVE_UP
