# SPDX-License-Identifier: Apache-2.0
"""Failures on demand, of soft and virtual cards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spanker.aio import Fleet as AioFleet
    from spanker.fleet import Fleet


def kill(fleet: Fleet | AioFleet, card: int) -> None:
    """Card number `card` vanishes, with all that it holds; never blocks.

    The fleet notices with the next step or load, and goes on without it where it can
    (`fleet.events` tells); where it cannot, callers get CardLostError, or CardMemoryError where the
    other cards are too small.  `fleet.admit` takes the card into use again, as a new one.
    """
    _fault(fleet, card, "kill")()


def hang(fleet: Fleet | AioFleet, card: int) -> None:
    """Card number `card` still answers and accepts work, but never does it; never blocks.

    The fleet takes it for lost when a step makes no progress for its `hang_timeout_s`; then as
    `kill`, with CardHungError.
    """
    _fault(fleet, card, "hang")()


def _fault(fleet: Fleet | AioFleet, card: int, name: str) -> Callable[[], None]:
    devices = fleet.devices
    if not 0 <= card < len(devices):
        raise ValueError(f"no card {card}: the fleet has cards 0 to {len(devices) - 1}")
    fault: Callable[[], None] | None = getattr(devices[card], name, None)
    if fault is None:
        raise ValueError(f"{devices[card].info.name} cannot {name}: only soft and virtual cards do")
    return fault
