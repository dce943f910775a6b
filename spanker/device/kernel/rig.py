# SPDX-License-Identifier: Apache-2.0
"""The cards of one fleet behind the kernel module."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from spanker.device import uapi
from spanker.device.kernel.card import KernelCard
from spanker.device.kernel.spec import KernelCardSpec
from spanker.device.soft import CARDS_MAX, DDR_BYTES_MAX, SoftCard, SoftCardSpec, link_all
from spanker.errors import ConfigError
from spanker.native import default_isa


class _Twins:
    """The twins of a rig's cards."""

    throttled = False

    def __init__(self, ddr_bytes: Sequence[int]) -> None:
        self.cards: list[SoftCard] = []
        try:
            for number, nbytes in enumerate(ddr_bytes):
                # More than the card has, which alone decides what fits.
                spec = SoftCardSpec(default_isa(), min(2 * nbytes, DDR_BYTES_MAX))
                self.cards.append(SoftCard(self, number, spec))
            link_all(self.cards)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for card in self.cards:
            card.release()


class KernelRig:
    """The cards of one fleet behind the kernel module; nobody else who asks gets them meanwhile.

    Raises DriverError where a device cannot be opened, ConfigError for no or too many cards.
    """

    throttled = False

    def __init__(self, specs: Sequence[KernelCardSpec], system: uapi.System | None = None) -> None:
        if not 1 <= len(specs) <= CARDS_MAX:
            raise ConfigError(f"a fleet of kernel cards has 1 to {CARDS_MAX}, got {len(specs)}")
        self.cards: list[KernelCard] = []
        self._twins: _Twins | None = None
        files: list[uapi.DeviceFile] = []
        try:
            for number, spec in enumerate(specs):
                files.append(uapi.DeviceFile(spec.path, card=number, system=system))
                files[-1].check_version()
                files[-1].lock()
            infos = [self._ready(files, number) for number in range(len(files))]
            self._twins = _Twins([info.ddr_bytes for info in infos])
            for number, (file, info) in enumerate(zip(files, infos, strict=True)):
                twin = self._twins.cards[number]
                self.cards.append(KernelCard(number, file, info, twin, self._closed))
            # One that none of them has been in: what others left in the links is dropped.
            epoch = max(info.epoch for info in infos) + 1
            self._states: dict[tuple[int, int], int] = {}
            for card, info in zip(self.cards, infos, strict=True):
                card.join(self._links(card, info, [other.serial for other in infos]), epoch)
        except BaseException:
            for file in files:
                file.close()
            self.close()
            raise

    def _ready(self, files: list[uapi.DeviceFile], number: int) -> uapi.Info:
        """What a card says of itself, after a reset where it has failed."""
        file = files[number]
        info = file.info()
        if not info.failed:
            return info
        file.reset()
        file.close()
        files[number] = file = uapi.DeviceFile(file.path, card=number, system=file.system)
        file.lock()
        return file.info()

    def _links(self, card: KernelCard, info: uapi.Info, serials: Sequence[int]) -> list[int | None]:
        """The link from a card to each of these, by their serial numbers."""
        found: list[int | None] = [None] * len(serials)
        for number in range(info.links):
            link = card.file.link(number)
            # A card is not linked with itself, though some name themselves on a link that is down.
            if link.peer and link.peer != info.serial and link.peer in serials:
                peer = serials.index(link.peer)
                found[peer] = number
                self._states[card.number, peer] = link.state
        return found

    def links(self) -> dict[tuple[int, int], int]:
        """The state of each directed link between the cards when they were opened (0 down, 1
        training, 2 up, 3 error), by the numbers of its ends."""
        return dict(self._states)

    def _closed(self) -> None:
        """With the last card goes what all of them need."""
        if self._twins is not None and all(card.closed for card in self.cards):
            self._twins.close()

    def close(self) -> None:
        """Idempotent."""
        for card in self.cards:
            card.close()
        if self._twins is not None:
            self._twins.close()

    def __enter__(self) -> KernelRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
