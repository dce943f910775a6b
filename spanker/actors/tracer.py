# SPDX-License-Identifier: Apache-2.0
"""Recording a trace of a fleet: switched on at every card, fetched while steps run, and written."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import IO

import trio

from spanker.actors.client import CardClient
from spanker.actors.coordinator import CLOSE_S, STOP_S, Coordinator
from spanker.actors.loading import run_all
from spanker.actors.message import ReadTrace, StartTrace, TraceData
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
        self._running = trio.CancelScope()
        # The cards at which the trace has ended, and whether it is complete for good.
        self._ended = set[CardClient]()
        self._complete = False
        self._file: IO[str] | None = None
        with self._named_errors():
            self._file = open(self._path, "w", encoding="ascii")

    async def start(self) -> None:
        """Begin, between two steps.  CardCommandError where a card cannot trace."""
        begun = False
        try:
            async with self._coordinator.between_steps():
                self._begin()
                begun = True
                await self._switch_on()
        except BaseException:
            if begun:
                await self._end_soon()
            self._close()
            raise

    async def run(self) -> None:
        """Fetch events again and again, until stopped or cancelled."""
        with self._running:
            # One that is slow to answer keeps nobody from the others.
            cards = range(len(self._coordinator.clients))
            await run_all([functools.partial(self._follow, card) for card in cards])

    async def stop(self) -> None:
        """End the trace between two steps, or at once when none ends in time, and write it.  Of
        cards that are there nothing is left out; one that is silent is lost.

        Takes as long as the cards and writing take; cancelled, as `cut_short`.  ConfigError when
        the file cannot be written.  Idempotent.
        """
        if self._file is None:
            return
        try:
            await self._end()
        except BaseException:
            await self.cut_short()
            raise
        await self._finish()

    async def cut_short(self) -> None:
        """The same after an exception: in bounded time, however cards are, and whatever is
        cancelled.  What a card has not told by then is lost."""
        if self._file is None:
            return
        try:
            await self._end_soon()
        except BaseException:
            self._close()
            raise
        await self._finish()

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
        await run_all([functools.partial(self._switch_on_at, card) for card in there])

    async def _switch_on_at(self, card: int) -> None:
        # The others go on without a card that is lost by that, traced.
        with contextlib.suppress(CardLostError, CardHungError):
            await self._coordinator.ask(card, StartTrace(self._events_max))

    async def _follow(self, card: int) -> None:
        while True:
            await trio.sleep(self._fetch_s)
            # A card that is lost records nothing any more; what it has told so far stays.
            with contextlib.suppress(CardError):
                await self._fetch_from(self._coordinator.clients[card])

    async def _end(self) -> None:
        """Fetch what is left and switch the trace off, at all cards."""
        self._running.cancel()
        async with contextlib.AsyncExitStack() as held:
            with trio.move_on_after(STOP_S):
                await held.enter_async_context(self._coordinator.between_steps())
            # Cards may come back meanwhile.
            while left := self._left():
                await run_all([functools.partial(self._end_at, client) for client in left])
            self._coordinator.trace = None

    async def _end_soon(self) -> None:
        """The same as `Coordinator.cut_short`."""
        self._running.cancel()

        async def end_at(client: CardClient) -> None:
            async with contextlib.AsyncExitStack() as held:
                with trio.move_on_after(CLOSE_S / 4):
                    await held.enter_async_context(
                        self._coordinator.between_steps((client.number,))
                    )
                await self._end_at(client)

        try:
            await self._coordinator.cut_short(
                {client: functools.partial(end_at, client) for client in self._left()}
            )
        finally:
            self._coordinator.trace = None

    def _left(self) -> list[CardClient]:
        return [client for client in self._coordinator.clients if client not in self._ended]

    async def _end_at(self, client: CardClient) -> None:
        with contextlib.suppress(CardError):
            await self._fetch_from(client)
        if not self._superseded:
            with contextlib.suppress(CardError):
                await self._coordinator.ask_client(client, StartTrace(0))
        self._ended.add(client)

    @property
    def _superseded(self) -> bool:
        """Another trace is being recorded: a card that has been silent until now is in that."""
        return self._coordinator.trace not in (None, self.trace)

    async def _fetch_from(self, client: CardClient) -> None:
        """Take a card's events; cancelled, those it was asked for come all the same."""
        told = functools.partial(self._told, client.number)
        # A card makes events while they are fetched: not for ever.
        for _ in range(self._events_max // FETCH_EVENTS_MAX + 1):
            request = ReadTrace(FETCH_EVENTS_MAX)
            reply = await self._coordinator.ask_client(client, request, told)
            whole = len(reply.buffers[0]) < FETCH_EVENTS_MAX * TRACE_EVENT.size
            if whole or self._superseded:
                return

    def _told(self, card: int, reply: TraceData) -> None:
        take = self.trace.missed if self._complete else self.trace.add
        take(card, bytes(reply.buffers[0]), reply.lost)

    async def _finish(self) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._write()
        finally:
            self._close()

    async def _write(self) -> None:
        assert self._file is not None
        self._complete = True
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
