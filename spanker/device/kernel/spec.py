# SPDX-License-Identifier: Apache-2.0
"""Which cards of the kernel module; apart from them, since most fleets have none."""

from __future__ import annotations

import os

import attrs

CARDS_MAX = 256
DEVICE_DIR = "/dev"
CONTROL = "spankerctl"


def card_path(number: int, device_dir: str = DEVICE_DIR) -> str:
    """/dev/spankerN."""
    return os.path.join(device_dir, f"spanker{number}")


@attrs.frozen
class KernelCardSpec:
    """Card `number` of the kernel module."""

    number: int
    device_dir: str = DEVICE_DIR

    @property
    def path(self) -> str:
        return card_path(self.number, self.device_dir)

    @property
    def ddr_bytes(self) -> int:
        """Asks the card; DriverError where it cannot be opened."""
        from spanker.device.uapi import DeviceFile

        with DeviceFile(self.path) as file:
            file.check_version()
            return file.info().ddr_bytes


def first_cards(
    count: int | None = None, device_dir: str = DEVICE_DIR
) -> tuple[KernelCardSpec, ...]:
    """The first `count` cards; without a number those there are, up to the first that is missing,
    and one at least, which opening then says to be missing."""
    if count is None:
        count = 0
        while count < CARDS_MAX and os.path.exists(card_path(count, device_dir)):
            count += 1
    return tuple([KernelCardSpec(number, device_dir) for number in range(max(count, 1))])
