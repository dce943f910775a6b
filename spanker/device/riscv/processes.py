# SPDX-License-Identifier: Apache-2.0
"""Those cards of a rig that are processes of their own: the firmware of RISC-V cards.

Links of a process are files of memory that both ends map.  A soft card and a process watch over
theirs by looking at it often, since neither can wake the other.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Protocol

from spanker.device.process import CardProcess, Launch
from spanker.device.remote import LinkEnd, RemoteCard, RemoteRig
from spanker.device.riscv.emulator import Emulator
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.soft import SoftCard
from spanker.errors import CardError, CardLostError
from spanker.native import check, lib


class Launcher(Protocol):
    """What says how card processes are started."""

    def launch(self, spec: RiscvCardSpec) -> Launch: ...

    def close(self) -> None: ...


class ProcessCards:
    """What a rig needs for them.

    `launcher` is what runs the firmware, which is looked for without one; it is closed with this.
    Raises ConfigError and FirmwareError where something is missing or wrong.
    """

    def __init__(self, rig: RemoteRig, launcher: Launcher | None = None) -> None:
        self._rig = rig
        self._launcher = launcher or Emulator.find()
        # The file of each link and the bytes of its rings, by its ends' numbers, end 1 first.
        self._links: dict[tuple[int, int], tuple[int, int]] = {}

    def start(self, number: int, spec: RiscvCardSpec) -> RemoteCard:
        """One card, which nobody has greeted; CardLostError where it cannot be started."""
        launch = self._launcher.launch(spec)
        start = functools.partial(CardProcess, number, launch, spec.ddr_bytes, spec.isa)
        return RemoteCard(self._rig, number, "riscv", start, functools.partial(self._ends, number))

    def _ends(self, number: int) -> list[LinkEnd]:
        """Those of a card that is greeted."""
        return [
            LinkEnd(a + b - number, file, 1 if number == a else 2, ring_bytes)
            for (a, b), (file, ring_bytes) in self._links.items()
            if number in (a, b)
        ]

    def link(self, a: SoftCard | RemoteCard, b: SoftCard | RemoteCard, ring_bytes: int) -> None:
        """Link two cards, `a` being that of the lower number, while nothing is queued on them and
        nobody steps those of this process.  A process that is gone, or has not been greeted,
        has its end when it is."""
        file = int(lib.spk_link_create(ring_bytes))
        if file < 0:
            raise CardError(f"no memory or descriptor for the link of {a.number} and {b.number}")
        self._links[a.number, b.number] = file, ring_bytes
        for card, peer, number in ((a, b, 1), (b, a, 2)):
            end = LinkEnd(peer.number, file, number, ring_bytes)
            if isinstance(card, RemoteCard):
                if card.greeted:
                    with contextlib.suppress(CardLostError):
                        card.attach(end)
            else:
                check(
                    lib.spk_link_attach(card.native, end.peer, file, end.end, ring_bytes),
                    f"linking cards {card.number} and {end.peer}",
                )

    def unlink(self, a: SoftCard | RemoteCard, b: SoftCard | RemoteCard) -> None:
        """The same undone, where it was done, as far as it was."""
        if (a.number, b.number) not in self._links:
            return
        for card, peer in ((a, b.number), (b, a.number)):
            if isinstance(card, RemoteCard):
                with contextlib.suppress(CardError):
                    card.detach(peer)
            else:
                lib.spk_link_detach(card.native, peer)
        file, _ = self._links.pop((a.number, b.number))
        os.close(file)

    def close(self) -> None:
        """Once no card is to be started any more.  Idempotent."""
        while self._links:
            file, _ = self._links.popitem()[1]
            os.close(file)
        self._launcher.close()
