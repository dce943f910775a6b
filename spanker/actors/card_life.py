# SPDX-License-Identifier: Apache-2.0
"""The actor of one card and its client, from their start to their end, and once more after that.

The card's tasks are children of the coordinator's nursery; a card that was lost ends alone, and may
be opened again, when it begins anew with other ends of a channel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import trio

from spanker.actors.card import CardActor
from spanker.actors.channel import Channel
from spanker.actors.client import CardClient, Failed, Relay
from spanker.device.base import CardDevice
from spanker.errors import CardLostError, again

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


class CardLife:
    """One card's tasks.  `pair` makes both ends of a channel, the host's and the card's, by its
    name; `relay` takes what the card sends its peers over the host; `failed` is told when it has
    failed."""

    def __init__(
        self,
        nursery: trio.Nursery,
        device: CardDevice,
        pair: Callable[[str], tuple[Channel, Channel]],
        relay: Relay,
        failed: Failed,
    ) -> None:
        self._nursery = nursery
        self._device = device
        self._pair = pair
        self._relay = relay
        self._failed = failed
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()

    def begin(self) -> CardClient:
        """Start the card's actor; the client for it.  Only while it has none."""
        number = self._device.number
        host_end, card_end = self._pair(f"channel of card {number}")
        client = CardClient(number, host_end, self._relay, self._failed)
        actor = CardActor(card_end, self._device)
        # Cancellation from outside must not reach a card before its coordinator has asked it to
        # stop; it does so itself, in bounded time.
        self._scope, self._ended = trio.CancelScope(shield=True), trio.Event()
        self._nursery.start_soon(self._serve, actor, client)
        return client

    def end(self) -> None:
        """Have both end, and close the card."""
        self._scope.cancel()

    async def ended(self) -> None:
        """Wait until both have ended."""
        await self._ended.wait()

    async def again(self) -> CardClient:
        """Wait for their end, open the card again, start anew.  Raises as `CardDevice.reopen`."""
        self.end()
        await self._ended.wait()
        self._device.reopen()
        return self.begin()

    async def _serve(self, actor: CardActor, client: CardClient) -> None:
        """Run both ends of the card's channel until told to stop."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_supervise, actor, client)
                    await client.run()
        finally:
            with trio.CancelScope(shield=True):
                await client.aclose()
            self._ended.set()


async def _supervise(actor: CardActor, client: CardClient) -> None:
    """Turn the end of an actor, however it comes, into an error for whoever waits on its card.

    The channel closes after that: it would only tell that it was closed, not why.
    """
    try:
        try:
            await actor.serve()
            error = CardLostError(f"card {client.number} has stopped", card=client.number)
        except Exception as raised:
            crash = raised
            while isinstance(crash, ExceptionGroup):
                crash = crash.exceptions[0]
            if isinstance(crash, CardLostError):
                error = again(crash)
            else:
                error = CardLostError(
                    f"card {client.number} is lost: its actor crashed with "
                    f"{type(crash).__name__}: {crash}; close the fleet and open it again",
                    card=client.number,
                )
            error.__cause__ = crash
        client.fail(error)
    finally:
        await actor.aclose()
