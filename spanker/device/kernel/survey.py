# SPDX-License-Identifier: Apache-2.0
"""What there is behind the kernel module, for people: looked at, and left as it is."""

from __future__ import annotations

import itertools

import attrs

from spanker.device import uapi
from spanker.device.kernel.spec import CARDS_MAX, CONTROL, DEVICE_DIR, card_path
from spanker.errors import SpankerError


@attrs.frozen
class SeenCard:
    """A card that was opened for a moment: `peers` of its links lead to another card, `links_up` of
    these are up."""

    info: uapi.Info
    peers: int
    links_up: int
    temperature_mc: int


@attrs.frozen
class Survey:
    """`version` is None where the module is not loaded, or cannot be asked; `problems` says what
    did not work, one line each."""

    version: uapi.Version | None
    cards: tuple[SeenCard, ...] = ()
    problems: tuple[str, ...] = ()
    loaded: bool = True


def survey(device_dir: str = DEVICE_DIR) -> Survey:
    """Ask the module and every card, whoever uses them; raises nothing."""
    if not uapi.LINUX.exists(f"{device_dir}/{CONTROL}"):
        return Survey(None, loaded=False)
    try:
        version = uapi.module_version(device_dir)
    except SpankerError as error:
        return Survey(None, problems=(str(error),))
    cards: list[SeenCard] = []
    problems: list[str] = []
    for number in itertools.takewhile(
        lambda n: uapi.LINUX.exists(card_path(n, device_dir)), range(CARDS_MAX)
    ):
        try:
            with uapi.DeviceFile(card_path(number, device_dir)) as file:
                file.check_version()
                info = file.info()
                links = [file.link(i) for i in range(info.links)] if not info.failed else []
                temperature_mc = file.telemetry().temperature_mc
        except SpankerError as error:
            problems.append(str(error))
        else:
            # A card that has a block for each slot names itself on one.
            leading = [link for link in links if link.peer not in (0, info.serial)]
            up = sum(link.state == uapi.LINK_UP for link in leading)
            cards.append(SeenCard(info, len(leading), up, temperature_mc))
    return Survey(version, tuple(cards), tuple(problems))
