# SPDX-License-Identifier: Apache-2.0
"""The cards of one fleet behind the kernel module."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from spanker.device import uapi
from spanker.device.base import CardRig
from spanker.device.kernel import spec as names
from spanker.device.kernel.card import KernelCard
from spanker.device.kernel.spec import KernelCardSpec
from spanker.device.soft import CARDS_MAX, DDR_BYTES_MAX, SoftCard, SoftCardSpec, link_all
from spanker.errors import CardError, CardLostError, ConfigError, DriverError, IoctlError
from spanker.native import default_isa

# What links may take to come up after a reset.
TRAIN_S = 0.5


class _Twins:
    """The twins of a rig's cards."""

    throttled = False
    meets = False
    held = False

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


class KernelRig(CardRig):
    """The cards of one fleet behind the kernel module; nobody else who asks gets them meanwhile.

    Raises DriverError where a device cannot be opened, ConfigError for no or too many cards.
    """

    throttled = False

    def __init__(self, specs: Sequence[KernelCardSpec], system: uapi.System | None = None) -> None:
        if not 1 <= len(specs) <= CARDS_MAX:
            raise ConfigError(f"a fleet of kernel cards has 1 to {CARDS_MAX}, got {len(specs)}")
        self.cards: list[KernelCard] = []
        self._specs = tuple(specs)
        self._system = system
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
                self.cards.append(KernelCard(number, file, info, twin, self))
            # One that none of them has been in: what others left in the links is dropped.
            epoch = max(info.epoch for info in infos) + 1
            for card in self.cards:
                card.join(epoch)
            self._states = {
                (card.number, peer): link.state
                for card in self.cards
                for peer, link in self._links(card)
            }
        except BaseException:
            for file in files:
                file.close()
            self.close()
            raise

    def _ready(self, files: list[uapi.DeviceFile], number: int) -> uapi.Info:
        """What a card says of itself, after a reset where it has failed."""
        file = files[number]
        info = file.info()
        if info.failed:
            files[number] = file = _reset(file)
            info = file.info()
        return info

    def _links(self, card: KernelCard) -> Iterator[tuple[int, uapi.LinkInfo]]:
        """A card's links with others of the fleet, each behind the number of that one."""
        peers = {other.info.serial: other.number for other in self.cards}
        for number in range(card.file.info().links):
            link = card.file.link(number)
            # A card is not linked with itself, though some name themselves on a link that is down.
            if link.peer in peers and link.peer != card.info.serial:
                yield peers[link.peer], link

    def links_of(self, card: KernelCard) -> tuple[int | None, ...]:
        """The link from a card to each card of the fleet, None where there is none."""
        found: list[int | None] = [None] * len(self.cards)
        for peer, link in self._links(card):
            found[peer] = link.link
        return tuple(found)

    def links(self) -> dict[tuple[int, int], int]:
        """The state of each directed link between the cards when they were opened (0 down, 1
        training, 2 up, 3 error), by the numbers of its ends."""
        return dict(self._states)

    def open_again(self, card: KernelCard) -> tuple[uapi.DeviceFile, uapi.Info]:
        """The file of a card that is closed, as after a reset, wherever the card is by now.

        CardLostError where it is not there, or does not come back; CardError where another fleet
        has it.  Blocks until its links have come up, half a second at most.
        """
        file = self._find(card)
        try:
            file.check_version()
            file.lock()
            file = _reset(file)
            info = file.info()
            end = time.monotonic() + TRAIN_S
            while time.monotonic() < end and any(
                file.link(number).state == uapi.LINK_TRAINING for number in range(info.links)
            ):
                time.sleep(0.002)
        except IoctlError as error:
            file.close()
            raise CardLostError(
                f"card {card.number}: {file.path} does not come back from its reset: {error}",
                card=card.number,
            ) from error
        except BaseException:
            file.close()
            raise
        return file, info

    def _find(self, card: KernelCard) -> uapi.DeviceFile:
        """The open file of a card by its serial number: it need not have the number it had."""
        spec = self._specs[card.number]
        paths = [names.card_path(number, spec.device_dir) for number in range(names.CARDS_MAX)]
        paths.insert(0, spec.path)
        system = self._system or uapi.LINUX
        for path in filter(system.exists, paths):
            try:
                file = uapi.DeviceFile(path, card=card.number, system=system)
            except DriverError:
                continue
            try:
                if file.info().serial == card.info.serial:
                    return file
            except CardError:
                pass  # it goes in this moment
            file.close()
        raise CardLostError(
            f"card {card.number} is not there: no {spec.device_dir}/spankerN that can be opened "
            f"has serial number {card.info.serial:#x}; put it in again, or go on without that card",
            card=card.number,
        )

    def closed(self) -> None:
        """With the last card goes what all of them need."""
        if self._twins is not None and all(card.closed for card in self.cards):
            self._twins.close()

    def close(self) -> None:
        """Idempotent."""
        for card in self.cards:
            card.close()
        if self._twins is not None:
            self._twins.close()


def _reset(file: uapi.DeviceFile) -> uapi.DeviceFile:
    """Reset a card, and lock it again: the file that takes the place of this one."""
    file.reset()
    file.close()
    fresh = uapi.DeviceFile(file.path, card=file.card, system=file.system)
    try:
        fresh.lock()
    except BaseException:
        fresh.close()
        raise
    return fresh
