# SPDX-License-Identifier: Apache-2.0
"""Fleet specifications: the text that says which cards to open.

SPEC  = GROUP {"," GROUP}             3    soft:3    soft:2@avx2,soft:1@scalar    soft:4:64MiB
GROUP = [KIND ":"] N ["@" ISA] [":" BYTES]
KIND  = "soft" | "virtual" | "hollow"

Soft cards work in real time, virtual ones in modelled time; hollow ones are virtual cards that do
no arithmetic and keep no bytes.  A fleet is of one kind.
"""

from __future__ import annotations

import re

from spanker.device.soft import CARDS_MAX, DEFAULT_DDR_BYTES, SoftCardSpec
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.errors import ConfigError
from spanker.native import isa_number

_GROUP = re.compile(r"(?:([A-Za-z]\w*):)?(\d{1,9})(?:@(\w+))?(?::([\w.]+))?")
_BYTES = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_KINDS = ("soft", "virtual", "hollow")
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


CardSpec = SoftCardSpec | VirtualCardSpec


def parse_fleet(spec: str | int) -> tuple[CardSpec, ...]:
    """The cards of a fleet specification, all of one kind; ConfigError says what is wrong."""
    cards: list[CardSpec] = []
    kinds: dict[str, None] = {}
    for group in str(spec).split(","):
        match = _GROUP.fullmatch(group.strip())
        if not match:
            raise ConfigError(
                f"no cards {group!r}: expected a number or soft:N[@ISA][:BYTES], e.g. soft:3"
            )
        kind, count, isa, ddr = match[1] or "soft", int(match[2]), match[3], match[4]
        if kind not in _KINDS:
            raise ConfigError(
                f"no kind of card {kind!r}: expected {', '.join(_KINDS)}, as in soft:{count}"
            )
        kinds[kind] = None
        if len(kinds) > 1:
            raise ConfigError(
                f"{' and '.join(kinds)} cards do not go together, in {spec!r}: choose one kind"
            )
        if count + len(cards) > CARDS_MAX:
            raise ConfigError(
                f"{count + len(cards)} cards are too many: a {kind} fleet has 1 to {CARDS_MAX}"
            )
        if isa is not None:
            isa_number(isa)
        ddr_bytes = parse_bytes(ddr) if ddr else DEFAULT_DDR_BYTES
        made: CardSpec = SoftCardSpec(isa, ddr_bytes)
        if kind != "soft":
            made = VirtualCardSpec(isa, ddr_bytes, hollow=kind == "hollow")
        cards.extend([made] * count)
    if not cards:
        raise ConfigError(f"a fleet needs at least one card, got {spec!r}: use e.g. --cards 1")
    return tuple(cards)
