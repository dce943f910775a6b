# SPDX-License-Identifier: Apache-2.0
"""A scenario under way: its fleet, what has come and been told so far, and who waits for what.

Clients and deeds (clients.py, deeds.py) act in it; checks.py looks at it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from spanker.errors import SpankerError, again
from spanker.events import CardLost, CardReturned, Event, LinkDown, Replanned
from spanker.fleet import Fleet, Model
from spanker.testing.injection import Injection
from spanker.testing.misfortune.outcome import Got
from spanker.testing.misfortune.scenario import Client, Moment, Scenario, What


class World:
    """What clients and deeds share."""

    def __init__(self, scenario: Scenario, fleet: Fleet, injection: Injection | None) -> None:
        self.scenario = scenario
        self.injection = injection
        self.fleet = fleet
        self.models: list[Model | None] = [None, None]
        self.got = [Got() for _ in scenario.clients]
        self.story: list[tuple[float, str]] = []
        self.violations: list[str] = []
        # When a card was made to fail, or asked back, and which have been drained, however briefly.
        self.struck: dict[int, float] = {}
        self.admitted: dict[int, float] = {}
        # Those that have been made to fail at all, and what has been done.
        self.ever_struck: set[int] = set()
        self.done: set[What] = set()
        self.drained: set[int] = set()
        self.lost: dict[int, float] = {}
        self._items = self._events = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._loaded = [trio.Event(), trio.Event()]
        self._why_not: list[SpankerError | None] = [None, None]
        self._active = sum(_at_once(client.start) for client in scenario.clients)
        self.look: Callable[[], None] = lambda: None
        fleet.events.listen(self._hear)

    # --- what happens -----------------------------------------------------------------------

    def tell(self, line: str) -> None:
        """For the story."""
        self.story.append((trio.current_time(), line))

    def violate(self, what: str) -> None:
        """Something that must not be; the same is told once."""
        if what in self.violations:
            return
        self.violations.append(what)
        self.tell(f"VIOLATION: {what}")

    def strike(self, card: int) -> None:
        """Something happens to a card that it may be taken for lost for."""
        self.struck[card] = trio.current_time()
        self.ever_struck.add(card)

    def item(self) -> None:
        """Another item has come to a client."""
        self._items += 1
        self.look()
        self._changed.unpark_all()

    def _hear(self, event: Event) -> None:
        self.tell(str(event))
        if isinstance(event, CardLost):
            if event.card in self.lost:
                self.violate(f"card {event.card} was lost twice")
            if event.card not in self.struck and not self._was_stalled(event.card):
                self.violate(f"card {event.card} was taken for lost: nothing had happened to it")
            self.lost[event.card] = event.time_s
        elif isinstance(event, CardReturned):
            self.lost.pop(event.card, None)
            # What has happened since it was asked back may have happened to the new one.
            if self.struck.get(event.card, 0.0) < self.admitted.get(event.card, 0.0):
                self.struck.pop(event.card, None)
        elif isinstance(event, Replanned):
            lost = [c for c in event.cards if self.lost.get(c, event.time_s) < event.time_s]
            if lost:
                self.violate(f"planned onto lost cards {lost}")
        elif isinstance(event, LinkDown) and What.CUT not in self.done:
            self.violate("nobody has cut a link")
        self._events += 1
        self._changed.unpark_all()

    def _was_stalled(self, card: int) -> bool:
        """Whether a card's messages were held up: one that joins is not among the fleet's cards yet
        when the host link stalls."""
        return self.injection is not None and self.injection.was_stalled(card)

    # --- waiting ----------------------------------------------------------------------------

    def _has_come(self, moment: Moment) -> bool:
        return self._items >= moment.items and self._events >= moment.events

    async def reached(self, moment: Moment) -> None:
        """Wait for a moment, which may never come."""
        while not self._has_come(moment):
            await self._changed.park()
        if moment.then_s:
            await trio.sleep(moment.then_s)

    async def begins(self, client: Client) -> None:
        """Wait until a client is to begin: at its moment, or when nobody else is there who could
        bring that about."""
        if not _at_once(client.start):
            while self._active and not self._has_come(client.start):
                await self._changed.park()
            self._active += 1
        if client.start.then_s:
            await trio.sleep(client.start.then_s)

    def ends(self) -> None:
        """A client that had begun has ended."""
        self._active -= 1
        if not self._active:
            self._changed.unpark_all()

    # --- models -----------------------------------------------------------------------------

    def loaded(self, number: int, model: Model | None, error: SpankerError | None = None) -> None:
        """A model is there, or it is known why not."""
        self.models[number], self._why_not[number] = model, error
        self._loaded[number].set()

    async def model(self, number: int) -> Model:
        """A model, once it is loaded; raises what stood in the way."""
        await self._loaded[number].wait()
        model = self.models[number]
        if model is None:
            error = self._why_not[number]
            assert error is not None
            raise again(error)
        return model


def _at_once(moment: Moment) -> bool:
    return not (moment.items or moment.events)
