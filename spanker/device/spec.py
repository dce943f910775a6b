# SPDX-License-Identifier: Apache-2.0
"""Fleet specifications: the text that says which cards to open.

SPEC  = GROUP {"," GROUP}             3    soft:3    soft:2@avx2,soft:1@scalar    soft:4:64MiB
GROUP = ["soft:"] N ["@" ISA] [":" BYTES]
"""

from __future__ import annotations

import re

from spanker.device.soft import CARDS_MAX, DEFAULT_DDR_BYTES, SoftCardSpec
from spanker.errors import ConfigError
from spanker.native import isa_number

_GROUP = re.compile(r"(?:([A-Za-z]\w*):)?(\d{1,9})(?:@(\w+))?(?::([\w.]+))?")
_BYTES = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """`64MiB`, `64MB`, `1.5G`, `1000` as bytes; K, M, G, T with or without i are powers of 1024
    and of 1000 as usual (a bare letter is a power of 1024)."""
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"no size {text!r}: expected a number and KiB, MiB or GiB, e.g. 64MiB")
    number, letter, binary = float(match[1]), match[2], match[3]
    if not letter:
        return int(number)
    decimal = not binary and text.strip()[-1] in "bB"
    return int(number * (1000 if decimal else 1024) ** _POWERS[letter.lower()])


def parse_fleet(spec: str | int) -> tuple[SoftCardSpec, ...]:
    """The cards of a fleet specification; ConfigError says what is wrong with it."""
    cards: list[SoftCardSpec] = []
    for group in str(spec).split(","):
        match = _GROUP.fullmatch(group.strip())
        if not match:
            raise ConfigError(
                f"no cards {group!r}: expected a number or soft:N[@ISA][:BYTES], e.g. soft:3"
            )
        kind, count, isa, ddr = match[1] or "soft", int(match[2]), match[3], match[4]
        if kind != "soft":
            raise ConfigError(f"no kind of card {kind!r}: expected soft, as in soft:{count}")
        if count + len(cards) > CARDS_MAX:
            raise ConfigError(
                f"{count + len(cards)} cards are too many: a soft fleet has 1 to {CARDS_MAX}"
            )
        if isa is not None:
            isa_number(isa)
        ddr_bytes = parse_bytes(ddr) if ddr else DEFAULT_DDR_BYTES
        cards.extend([SoftCardSpec(isa, ddr_bytes)] * count)
    if not cards:
        raise ConfigError(f"a fleet needs at least one card, got {spec!r}: use e.g. --cards 1")
    return tuple(cards)
