# SPDX-License-Identifier: Apache-2.0
"""The cards of one fleet behind the kernel module."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import attrs

from spanker.device import uapi
from spanker.device.base import CardRig
from spanker.device.kernel import spec as names
from spanker.device.kernel.card import KernelCard
from spanker.device.kernel.spec import KernelCardSpec
from spanker.device.soft import (
    CARDS_MAX,
    DDR_BYTES_MAX,
    SoftCard,
    SoftCardSpec,
    link_all,
    link_one,
)
from spanker.errors import (
    CardError,
    CardLostError,
    ConfigError,
    DriverError,
    IoctlError,
    SpankerError,
)
from spanker.native import default_isa
from spanker.sched.topology import Link, LinkState

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
            for nbytes in ddr_bytes:
                self.cards.append(self.create(nbytes))
            link_all(self.cards)
        except BaseException:
            self.close()
            raise

    def create(self, ddr_bytes: int) -> SoftCard:
        """That of a card which has so much memory; it is in no rig yet."""
        # More than the card has, which alone decides what fits.
        spec = SoftCardSpec(default_isa(), min(2 * ddr_bytes, DDR_BYTES_MAX))
        return SoftCard(self, len(self.cards), spec)

    def join(self, card: SoftCard) -> None:
        link_one(card, self.cards)
        self.cards.append(card)

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
        self._specs = list(specs)
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
                card.begin(epoch)
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

    def create(self, spec: KernelCardSpec | None) -> KernelCard:
        """One more card, of the next number, as after a reset: that of `spec`, or the first that no
        fleet has.  It is in use with `join`, and without that it goes with its `release`.

        ConfigError where there is none or it is in the fleet, DriverError and CardError where it
        cannot be had.  Blocks until its links have come up, half a second at most.
        """
        number = len(self.cards)
        if number == CARDS_MAX:
            raise ConfigError(f"a fleet of kernel cards has at most {CARDS_MAX}")
        file = self._open_other(spec.path) if spec is not None else self._first_free()
        file, info = self._as_new(file)
        try:
            assert self._twins is not None
            twin = self._twins.create(info.ddr_bytes)
        except BaseException:
            file.close()
            raise
        return KernelCard(number, file, info, twin, self)

    def _open_other(self, path: str) -> uapi.DeviceFile:
        """The file of a card that is in no fleet, taken for this one."""
        file = uapi.DeviceFile(path, card=len(self.cards), system=self._system)
        try:
            file.check_version()
            # A card that was lost is in the fleet, too, wherever it is now.
            if file.info().serial in {card.info.serial for card in self.cards}:
                raise ConfigError(f"{path} is in the fleet: if it was lost, admit it")
            file.lock()
        except BaseException:
            file.close()
            raise
        return file

    def _first_free(self) -> uapi.DeviceFile:
        device_dir, system = self._specs[0].device_dir, self._system or uapi.LINUX
        paths = [names.card_path(number, device_dir) for number in range(names.CARDS_MAX)]
        problems: list[str] = []
        for path in filter(system.exists, paths):
            try:
                return self._open_other(path)
            except SpankerError as error:
                problems.append(str(error))
        raise ConfigError(
            f"no card of {device_dir} can join: {'; '.join(problems) or 'there is none'}"
        )

    def join(self, card: KernelCard) -> list[Link]:
        """Use a new card; the links between it and the others, as they are.  Nothing is queued on
        any card.  After an error all is as before."""
        assert self._twins is not None
        others = [other for other in self.cards if not other.closed]
        # Whose links are looked for.
        self.cards.append(card)
        try:
            card.begin_beside(self.cards[0])
            links = list(self._links_between(card, others))
            met = [other.with_one_more() for other in others]
            self._twins.join(card.twin)
        except BaseException:
            self.cards.pop()
            raise
        for other, what in zip(others, met, strict=True):
            other.meet(*what)
        self._specs.append(attrs.evolve(self._specs[0], number=card.file.info().number))
        return links

    def _links_between(self, card: KernelCard, others: Sequence[KernelCard]) -> Iterator[Link]:
        for peer, link in self._links(card):
            yield Link(card.number, peer, LinkState(link.state))
        for other in others:
            for peer, link in self._links(other):
                if peer == card.number:
                    yield Link(other.number, peer, LinkState(link.state))

    def open_again(self, card: KernelCard) -> tuple[uapi.DeviceFile, uapi.Info]:
        """The file of a card that is closed, as after a reset, wherever the card is by now.

        CardLostError where it is not there, or does not come back; CardError where another fleet
        has it.  Blocks until its links have come up, half a second at most.
        """
        return self._as_new(self._find(card))

    def _as_new(self, file: uapi.DeviceFile) -> tuple[uapi.DeviceFile, uapi.Info]:
        """The file that takes the place of this one, which is closed, once its card is reset."""
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
                f"card {file.card}: {file.path} does not come back from its reset: {error}",
                card=file.card,
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
        if self._twins is not None and not self.held and all(card.closed for card in self.cards):
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
