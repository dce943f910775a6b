# SPDX-License-Identifier: Apache-2.0
"""Cards that fall silent: nothing reaches them any more, and nothing comes from them."""

from __future__ import annotations

import math

from spanker.actors.channel import Channel
from spanker.device.base import CardDevice
from spanker.testing.faulty_channel import FaultyChannel


class SilentCards:
    """An Around; `from_the_start` are the cards whose channels are silent when they are made."""

    def __init__(self, *cards: int) -> None:
        self.from_the_start = set(cards)
        self._channels: dict[int, FaultyChannel] = {}

    def device(self, card: CardDevice) -> CardDevice:
        return card

    def channel(self, card: int, end: Channel) -> Channel:
        self._channels[card] = FaultyChannel(end, f"channel of card {card}")
        if card in self.from_the_start:
            self.silence(card)
        return self._channels[card]

    def silence(self, card: int) -> None:
        """From now on, for good."""
        self._channels[card].stall(math.inf)
