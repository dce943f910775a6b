# SPDX-License-Identifier: Apache-2.0
"""What bodies have in common whose card is the one in C: in this process, or in one of its own.

How they refuse numbers that do not fit, tell of a status, and are made to fail.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from spanker.device.base import CardDevice, DeviceCounters, DeviceInfo
from spanker.errors import CardCommandError, CardError, CardFaultError, CardMemoryError
from spanker.native import check, lib, status_error


class Rig(Protocol):
    """What owns the cards of a fleet, and whatever makes them work."""

    @property
    def cards(self) -> Sequence[CoreCard]: ...

    @property
    def throttled(self) -> bool:
        """Whether they keep a profile's speeds in real time."""

    @property
    def meets(self) -> bool:
        """Whether they reach each other's memory, as ALL_REDUCE does."""

    @property
    def held(self) -> bool:
        """Whether it stays when its last card is closed, until it is closed itself."""

    def close(self) -> None: ...


class CoreCard(CardDevice):
    """A card that answers with statuses of the C core; its body sets `number`, `_rig`, `_info`."""

    _rig: Rig
    _info: DeviceInfo

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """Whether the card was closed, by itself or with its rig."""

    @property
    def info(self) -> DeviceInfo:
        return self._info

    # --- what is told -------------------------------------------------------------------

    def _u32(self, value: int, what: str) -> None:
        if value >> 32:
            self._refuse(value, what, 32)

    def _u64(self, value: int, what: str) -> None:
        if value >> 64:
            self._refuse(value, what, 64)

    def _refuse(self, value: int, what: str, bits: int) -> NoReturn:
        """Numbers come from the other end of a channel; the native card takes fixed widths."""
        raise CardCommandError(
            f"card {self.number}: no {what} {value}: expected 0 to 2**{bits} - 1",
            card=self.number,
        )

    def _check(self, status: int, what: str, detail: str = "") -> None:
        if status != lib.SPK_OK:
            check(status, f"card {self.number}: {what}", card=self.number, detail=detail)

    def _failure(self, status: int, command: int) -> CardError:
        """Why a step has failed."""
        what = f"card {self.number}, command {command}"
        if status == lib.SPK_E_PARAMS:
            # All else about a step is checked before it runs.
            return CardFaultError(
                f"{what}: what an earlier step has chosen is no token of the vocabulary",
                card=self.number,
            )
        return status_error(status, what, card=self.number)

    def _no_room(self, nbytes: int, free: int) -> CardMemoryError:
        return CardMemoryError(
            f"card {self.number}: no room for {nbytes:,} bytes in one piece: {free:,} of "
            f"{self._info.ddr_bytes:,} are free; free buffers or open the card with more DDR",
            card=self.number,
        )

    # --- fault injection ----------------------------------------------------------------
    # All of it ends when the card is reopened, and none of it does anything to a closed card.  A
    # fault with a `command` happens when the step under way or the next one gets there, or to its
    # end where it has fewer; there is one at a time, and a later one takes its place.

    def kill(self, command: int | None = None) -> None:
        """The card vanishes: all it holds and all later calls fail with CardLostError."""
        self._plant(lib.SPK_PLANT_DIE, command)

    def hang(self, command: int | None = None) -> None:
        """The card accepts work and never does it."""
        self._plant(lib.SPK_PLANT_HANG, command)

    def reset(self, command: int | None = None) -> None:
        """Somebody resets the card: all it holds and all later calls fail with CardLostError."""
        self._plant(lib.SPK_PLANT_RESET, command)

    def fail_memory(self, command: int | None = None) -> None:
        """An uncorrected memory error, found by the command under way or the next one: all that the
        card holds and all later calls fail with CardLostError."""
        self._plant(lib.SPK_PLANT_MEMORY, lib.SPK_COMMAND_ANY if command is None else command)

    def _plant(self, fault: int, command: int | None) -> None:
        self._u32(command or 0, "command")
        if not self.closed:
            self._plant_fault(fault, command)

    @abc.abstractmethod
    def _plant_fault(self, fault: int, command: int | None) -> None: ...

    def cut(self, peer: int) -> None:
        """This end wants the link with a peer down: what is under way waits in it."""
        self._want(peer, False)

    def mend(self, peer: int) -> None:
        """This end wants the link up, which it is while both ends do: what waited goes on."""
        self._want(peer, True)

    def _want(self, peer: int, up: bool) -> None:
        self._check_peer(peer)
        if not self.closed:
            self._want_link(peer, up)

    @abc.abstractmethod
    def _want_link(self, peer: int, up: bool) -> None: ...

    def _check_peer(self, peer: int) -> None:
        count = len(self._rig.cards)
        if not 0 <= peer < count or peer == self.number:
            raise CardCommandError(
                f"card {self.number} has no link with card {peer}: expected another card of "
                f"0 to {count - 1}",
                card=self.number,
            )


def counters_of(
    c: Any, links: Sequence[tuple[int, int]], links_down: Sequence[int]
) -> DeviceCounters:
    """Of a `struct spk_counters`, and the bytes sent and received over each link."""
    return DeviceCounters(
        commands=c.commands,
        steps=c.steps,
        ddr_read_bytes=c.ddr_read_bytes,
        ddr_written_bytes=c.ddr_written_bytes,
        busy_ns=c.busy_ns,
        progress=c.progress,
        ddr_used_bytes=c.ddr_used_bytes,
        ddr_total_bytes=c.ddr_total_bytes,
        queued=c.queued,
        waiting_for=c.waiting_for if c.waiting_for >= 0 else None,
        link_tx_bytes=tuple(t for t, _ in links),
        link_rx_bytes=tuple(r for _, r in links),
        links_down=tuple(links_down),
    )


def is_down(state: int) -> bool:
    """Whether a link in this state (SPK_LINK_*) leads to a peer, and is not up."""
    return state in (lib.SPK_LINK_DOWN, lib.SPK_LINK_WAITS)
