# SPDX-License-Identifier: Apache-2.0
"""What a fleet tells of its own failures: typed values, one readable line each.

A value's text is its line.  They also go to the logger `spanker.fleet`, with the value as the
record's `event`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable

from spanker.values import Value, lazy_frozen

HISTORY_MAX = 256

LOGGER = "spanker.fleet"


@lazy_frozen
class Event(Value):
    """Something that happened at `time_s` of trio's clock."""

    time_s: float


@lazy_frozen
class CardLost(Event):
    """A card is used no more, and why."""

    card: int
    reason: str

    def __str__(self) -> str:
        return f"card {self.card} lost: {self.reason}"


@lazy_frozen
class CardSlow(Event):
    """A card takes `factor` times as long for its work as it should; 1: it is itself again."""

    card: int
    factor: float

    def __str__(self) -> str:
        if self.factor <= 1:
            return f"card {self.card} is as fast as it was"
        return f"card {self.card} takes {self.factor:.1f} times as long as it did"


@lazy_frozen
class CardReturned(Event):
    """A card that was lost is in use again, as new: nothing of before is on it."""

    card: int

    def __str__(self) -> str:
        return f"card {self.card} is back"


@lazy_frozen
class CardJoined(Event):
    """The fleet has one card more, linked with all others."""

    card: int
    name: str

    def __str__(self) -> str:
        return f"card {self.card} ({self.name}) has joined"


@lazy_frozen
class LinkDown(Event):
    """What goes from a card to its peer, and back, goes another way from now on."""

    card: int
    peer: int

    def __str__(self) -> str:
        return f"link {self.card}-{self.peer} is down"


@lazy_frozen
class LinkUp(Event):
    """A link that was down is up again, and has been for a while."""

    card: int
    peer: int

    def __str__(self) -> str:
        return f"link {self.card}-{self.peer} is up again"


@lazy_frozen
class Rerouted(Event):
    """The steps of a model go around the links that are down by now, which may be none: weights and
    KV are where they were.  What no other card leads on goes over the host, between those cards
    that are `hosted`."""

    model: str
    down: tuple[tuple[int, int], ...]
    seconds: float
    hosted: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        ways = f"around {_both_ways(self.down)}" if self.down else "straight again"
        if self.hosted:
            ways += f", over the host for {_both_ways(self.hosted)}"
        return f"{self.model}: steps go {ways}, after {self.seconds:.2f} s"


@lazy_frozen
class Replanned(Event):
    """A model goes on with another plan, because its cards `lost` were lost, or, where there are
    none, some were drained or admitted: the plan it had, the one it has now, and how many sequences
    resume, so long after the failure was noticed or the move begun, `kept` of them with their KV;
    `moved` others had gone on at once, on other replicas."""

    model: str
    lost: tuple[int, ...]
    before: str
    after: str
    cards: tuple[int, ...]
    sequences: int
    seconds: float
    moved: int = 0
    kept: int = 0

    def __str__(self) -> str:
        cards = ", ".join(map(str, self.cards))
        kept = f" ({self.kept} with {'its' if self.kept == 1 else 'their'} KV)" if self.kept else ""
        elsewhere = f"{self.moved} went on elsewhere, " if self.moved else ""
        return (
            f"{self.model}: re-planned {self.before} -> {self.after} on card"
            f"{'' if len(self.cards) == 1 else 's'} {cards}; {elsewhere}resumed {self.sequences} "
            f"sequence{'' if self.sequences == 1 else 's'}{kept} after {self.seconds:.2f} s"
        )


@lazy_frozen
class AuditsEnded(Event):
    """A model goes on without audits, since one could not be made."""

    model: str
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: no more audits: {self.reason}"


@lazy_frozen
class LinkRetried(Event):
    """A step was made again, as messages between cards had failed their checks."""

    model: str
    card: int | None
    attempt: int
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: step made again (attempt {self.attempt + 1}): {self.reason}"


@lazy_frozen
class ReplicaLost(Event):
    """A replica of a model could not be brought back; `moved` of its sequences go on elsewhere,
    `ended` have failed."""

    model: str
    replica: int
    moved: int
    ended: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.model}: replica {self.replica} is given up, {self.moved} sequences moved, "
            f"{self.ended} ended: {self.reason}"
        )


def _both_ways(pairs: tuple[tuple[int, int], ...]) -> str:
    """Links between two cards, named once for both directions."""
    return ", ".join(f"{a}-{b}" for a, b in pairs if a < b or (b, a) not in pairs)


class EventLog:
    """The events of one fleet: the last of them, and who wants to hear of new ones."""

    def __init__(self) -> None:
        self._history: deque[Event] = deque(maxlen=HISTORY_MAX)
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._next = 0

    @property
    def history(self) -> tuple[Event, ...]:
        """The last HISTORY_MAX of them, oldest first."""
        return tuple(self._history)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with every event from now on, in the fleet's task: it must not block.
        What it raises is not the fleet's matter: it goes, with its traceback, to the logger
        `spanker.fleet`.  What comes back ends that."""
        number = self._next
        self._next += 1
        self._listeners[number] = listener
        return lambda: self._listeners.pop(number, None) and None

    def tell(self, event: Event) -> None:
        """For the fleet: it happened.  No exception of a listener or of a handler of the logger
        comes out of here: whoever tells may be half way through a change of the fleet."""
        import logging  # a fleet that nothing happens to starts without it

        self._history.append(event)
        logger = logging.getLogger(LOGGER)
        if not logger.handlers:
            # Whoever has configured no logging wants no lines on standard error.
            logger.addHandler(logging.NullHandler())
        _log(functools.partial(logger.warning, "%s", event, extra={"event": event}))
        for listener in tuple(self._listeners.values()):
            try:
                listener(event)
            except Exception:
                said = "a listener raised when it was told: %s"
                _log(functools.partial(logger.exception, said, event))


def _log(write: Callable[[], None]) -> None:
    """Write to a logger.  What a handler raises goes to standard error, where there is one: as
    `logging.Handler.handleError` does, unless `logging.raiseExceptions` is off."""
    import logging
    import traceback

    try:
        write()
    except Exception:
        if logging.raiseExceptions and sys.stderr:
            with contextlib.suppress(OSError, ValueError):  # it may be closed
                traceback.print_exc()
