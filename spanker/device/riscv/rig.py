# SPDX-License-Identifier: Apache-2.0
"""The cards of a fleet with RISC-V cards in it: each of these a process, the others soft cards.

Links are files of memory that two processes map.  A soft card and a process watch over theirs by
looking at it often, since neither can wake the other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

from spanker.device.base import CardRig
from spanker.device.core import CoreCard
from spanker.device.process import CardProcess, Launch, LinkEnd
from spanker.device.remote import RemoteCard
from spanker.device.riscv.emulator import Emulator
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.soft import (
    CARDS_MAX,
    SoftCard,
    SoftCardSpec,
    link_all,
    ring_bytes_of,
    start_workers,
)
from spanker.errors import CardError, ConfigError
from spanker.native import check, lib


class Launcher(Protocol):
    """What says how card processes are started."""

    def launch(self, spec: RiscvCardSpec) -> Launch: ...

    def close(self) -> None: ...


class RiscvRig(CardRig):
    """RISC-V cards and soft cards, fully linked, and the threads that step the soft ones.

    `launcher` is what runs the firmware, which is looked for without one; it is closed with the
    rig.  Raises ConfigError and FirmwareError where something is missing or wrong, CardLostError
    where a card does not start.
    """

    throttled = False
    meets = False

    def __init__(
        self,
        specs: Sequence[SoftCardSpec | RiscvCardSpec],
        workers: int | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        if not 1 <= len(specs) <= CARDS_MAX:
            raise ConfigError(f"a fleet of RISC-V cards has 1 to {CARDS_MAX}, got {len(specs)}")
        self.cards: list[CoreCard] = []
        self._pool: Any = None
        # Of each link of a process: the file, by its ends' numbers, the lower one first.
        self._links: dict[tuple[int, int], int] = {}
        self._ring_bytes = ring_bytes_of(len(specs))
        self._launcher = launcher
        try:
            self._launcher = launcher or Emulator.find()
            far = [n for n, spec in enumerate(specs) if isinstance(spec, RiscvCardSpec)]
            for a in range(len(specs)):
                for b in range(a + 1, len(specs)):
                    if a in far or b in far:
                        self._links[a, b] = self._new_link(a, b)
            for number, spec in enumerate(specs):
                self.cards.append(self._card(number, spec))
            self._join([card for card in self.cards if isinstance(card, SoftCard)], far, workers)
        except BaseException:
            self.close()
            raise

    def _new_link(self, a: int, b: int) -> int:
        file = int(lib.spk_link_create(self._ring_bytes))
        if file < 0:
            raise CardError(f"no memory or descriptor for the link of cards {a} and {b}")
        return file

    def _card(self, number: int, spec: SoftCardSpec | RiscvCardSpec) -> CoreCard:
        if isinstance(spec, SoftCardSpec):
            return SoftCard(self, number, spec)
        assert self._launcher is not None
        launch = self._launcher.launch(spec)
        ends = [
            LinkEnd(a + b - number, file, 1 if number == a else 2, self._ring_bytes)
            for (a, b), file in self._links.items()
            if number in (a, b)
        ]
        start = functools.partial(CardProcess, number, launch, spec.ddr_bytes, spec.isa, ends)
        return RemoteCard(self, number, "riscv", start)

    def _join(self, soft: Sequence[SoftCard], far: Sequence[int], workers: int | None) -> None:
        """Link the soft cards with all others, and have them stepped."""
        if not soft:
            return
        link_all(soft, fleet=len(self.cards))
        for card in soft:
            for peer in far:
                file = self._links[min(card.number, peer), max(card.number, peer)]
                end = 1 if card.number < peer else 2
                check(
                    lib.spk_link_attach(card.handle, peer, file, end, self._ring_bytes),
                    f"linking cards {card.number} and {peer}",
                )
        self._pool = start_workers(soft, workers)

    def close(self) -> None:
        """Stop the workers, end the processes, release the cards.  Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            lib.spk_pool_destroy(pool)
        cards, files = list(self.cards), list(self._links.values())
        self._links.clear()
        for card in cards:
            if isinstance(card, SoftCard):
                card.release()
            else:
                card.close()
        for file in files:
            os.close(file)
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close()
