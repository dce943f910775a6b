# SPDX-License-Identifier: Apache-2.0
"""What may stand between a fleet and its parts: nothing, or whoever makes them fail for a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from spanker.actors.channel import Channel
    from spanker.device.base import CardDevice


class Around(Protocol):
    """Is shown each part of a fleet, before it is used, and says what stands in its place."""

    def device(self, device: CardDevice) -> CardDevice:
        """What a card's actor takes for its device, and closes."""

    def channel(self, card: int, host_end: Channel) -> Channel:
        """What the coordinator takes for its end of a card's channel, and closes; a new one each
        time the card is opened again."""
