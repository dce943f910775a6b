# SPDX-License-Identifier: Apache-2.0
"""Recording a trace of a fleet: switched on at every card, fetched while steps run, and written."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import IO

import trio

from spanker.actors.client import CardClient
from spanker.actors.coordinator import STOP_S, Coordinator
from spanker.actors.loading import run_all
from spanker.actors.message import ReadTrace, StartTrace
from spanker.actors.trace import EVENTS_MAX, Trace
from spanker.device.base import TRACE_EVENT
from spanker.errors import CardError, CardHungError, CardLostError, ConfigError

# What a card holds until it is fetched, and how often that is: room for a million commands per
# second and card, where a fleet makes tens of thousands.
CARD_EVENTS_MAX = 1 << 17
FETCH_S = 0.1
FETCH_EVENTS_MAX = 1 << 15


class Tracer:
    """A trace under way: `start`, which makes `trace`, then `run` in a task of its own, then
    `stop`, which writes it.

    ConfigError, at once, where `path` cannot be written.
    """

    def __init__(self, coordinator: Coordinator, path: str | os.PathLike[str]) -> None:
        self._coordinator = coordinator
        self._path = os.fspath(path)
        self._over = trio.Event()
        # One at a time: pieces of a card's events must stay in order.
        self._fetching = trio.Lock()
        self._file: IO[str] | None = None
        with self._named_errors():
            self._file = open(self._path, "w", encoding="ascii")

    async def start(self) -> None:
        """Begin, between two steps.  CardCommandError where a card cannot trace."""
        try:
            async with self._coordinator.between_steps():
                self._begin()
                await self._switch_on()
        except BaseException:
            self._close()
            raise

    async def run(self) -> None:
        """Fetch events again and again, until stopped or cancelled."""
        while True:
            with trio.move_on_after(self._fetch_s):
                await self._over.wait()
            if self._over.is_set():
                return
            await self._fetch()

    async def stop(self) -> None:
        """End the trace between two steps, or at once when none ends in time, and write it.

        Takes as long as writing takes; ConfigError when the file cannot be written.  Idempotent.
        """
        if self._file is None:
            return
        self._over.set()
        try:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(STOP_S):
                    async with self._coordinator.between_steps():
                        await self._fetch()
                        await self._switch_off()
                if self._coordinator.trace is self.trace:
                    await self._fetch()
                    await self._switch_off()
                await self._write()
        finally:
            self._close()

    def _begin(self) -> None:
        """The trace of the cards there are: none joins until it has ended."""
        coordinator = self._coordinator
        if coordinator.trace is not None:
            raise ConfigError("a trace of this fleet is being recorded already: end that first")
        clock, self._events_max, self._fetch_s = "CLOCK_MONOTONIC", CARD_EVENTS_MAX, FETCH_S
        if coordinator.modelled:
            # Cards with room for all that is kept are asked once, in the end.
            clock, self._events_max = "virtual", EVENTS_MAX // len(coordinator.cards)
            self._fetch_s = math.inf
        self.trace = Trace(
            coordinator.cards, coordinator.now_ns(), coordinator.now_ns, clock, self._events_max
        )
        # Cards that are lost by now are switched on when they come back.
        coordinator.trace = self.trace

    async def _switch_on(self) -> None:
        there = [
            c for c in range(len(self._coordinator.clients)) if c not in self._coordinator.lost
        ]
        try:
            await run_all([functools.partial(self._switch_on_at, card) for card in there])
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._switch_off()
            raise

    async def _switch_on_at(self, card: int) -> None:
        # The others go on without a card that is lost by that, traced.
        with contextlib.suppress(CardLostError, CardHungError):
            await self._coordinator.ask(card, StartTrace(self._events_max))

    async def _switch_off(self) -> None:
        if self._coordinator.trace is not self.trace:
            return
        self._coordinator.trace = None
        with trio.move_on_after(STOP_S):
            await self._at_every_card(lambda client: client.request(StartTrace(0)))

    async def _fetch(self) -> None:
        # Shielded: of a request that is cancelled the reply, with its events, would be dropped.
        with trio.move_on_after(STOP_S, shield=True):
            async with self._fetching:
                await self._at_every_card(self._fetch_from)

    async def _at_every_card(self, job: Callable[[CardClient], Awaitable[object]]) -> None:
        """At the same time: one that does not answer keeps nobody from the others."""

        async def do(client: CardClient) -> None:
            # A card that is lost records nothing any more; what it has told so far stays.
            with contextlib.suppress(CardError):
                await job(client)

        await run_all([functools.partial(do, client) for client in self._coordinator.clients])

    async def _fetch_from(self, client: CardClient) -> None:
        # A card makes events while they are fetched: not for ever.
        for _ in range(self._events_max // FETCH_EVENTS_MAX + 1):
            reply = await client.request(ReadTrace(FETCH_EVENTS_MAX))
            data = bytes(reply.buffers[0])
            self.trace.add(client.number, data, reply.lost)
            if len(data) < FETCH_EVENTS_MAX * TRACE_EVENT.size:
                return

    async def _write(self) -> None:
        assert self._file is not None
        for chunk in self.trace.chunks():
            with self._named_errors():
                self._file.write(chunk)
            # Everyone else's turn: a long trace takes seconds.
            await trio.lowlevel.checkpoint()
        with self._named_errors():
            self._file.flush()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # What had to be written was flushed, or has failed already.
            with contextlib.suppress(OSError):
                file.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"cannot write the trace {self._path}: {error.strerror}: choose another file"
            ) from error
