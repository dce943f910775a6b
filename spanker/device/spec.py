# SPDX-License-Identifier: Apache-2.0
"""Fleet specifications: the text that says which cards to open.

SPEC   = GROUP {"," GROUP} | KERNEL      3    soft:3    soft:2@avx2,soft:1@scalar    soft:4:64MiB
GROUP  = [KIND ":"] N ["@" ISA] [":" BYTES]
KIND   = "soft" | "riscv" | "virtual" | "hollow"
KERNEL = "kernel" [":" N]                kernel    kernel:2

Soft cards work in real time, virtual ones in modelled time; hollow ones are virtual cards that do
no arithmetic and keep no bytes.  Kernel cards are those behind the kernel module, /dev/spanker0 and
so on: the first N, or all.  RISC-V cards run firmware in an emulator; their ISA is scalar, rvv or
xpop, vlen128 to vlen1024, or both, as in riscv:2@rvv_vlen256.  A fleet is of one kind, but soft
and RISC-V cards go together: soft:1,riscv:1.
"""

from __future__ import annotations

import re

from spanker.device.kernel.spec import KernelCardSpec, first_cards
from spanker.device.riscv.spec import RiscvCardSpec, card_spec
from spanker.device.soft import CARDS_MAX, DEFAULT_DDR_BYTES, SoftCardSpec
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.errors import ConfigError
from spanker.native import isa_number

_GROUP = r"(?:([A-Za-z]\w*):)?(\d{1,9})(?:@(\w+))?(?::([\w.]+))?"
_BYTES = r"(\d{1,12}(?:\.\d{1,6})?)\s*(?:([kmgt])(i?)b?|b)?"
_KINDS = ("soft", "riscv", "virtual", "hollow", "kernel")
_TOGETHER = {"soft", "riscv"}
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """`64MiB`, `64MB`, `1.5G`, `1000` as bytes; K, M, G, T with or without i are powers of 1024
    and of 1000 as usual (a bare letter is a power of 1024)."""
    match = re.fullmatch(_BYTES, text.strip(), re.IGNORECASE)
    if not match:
        raise ConfigError(f"no size {text!r}: expected a number and KiB, MiB or GiB, e.g. 64MiB")
    number, letter, binary = float(match[1]), match[2], match[3]
    if not letter:
        return int(number)
    decimal = not binary and text.strip()[-1] in "bB"
    return int(number * (1000 if decimal else 1024) ** _POWERS[letter.lower()])


CardSpec = SoftCardSpec | VirtualCardSpec | KernelCardSpec | RiscvCardSpec


def parse_fleet(spec: str | int) -> tuple[CardSpec, ...]:
    """The cards of a fleet specification, which go together; ConfigError says what is wrong.

    `kernel` looks which devices there are; nothing is opened.
    """
    if str(spec).strip() == "kernel":
        return first_cards()[:CARDS_MAX]
    cards: list[CardSpec] = []
    kinds: dict[str, None] = {}
    for group in str(spec).split(","):
        match = re.fullmatch(_GROUP, group.strip())
        if not match:
            raise ConfigError(
                f"no cards {group!r}: expected a number, soft:N[@ISA][:BYTES] or kernel:N, e.g. "
                f"soft:3"
            )
        kind, count, isa, ddr = match[1] or "soft", int(match[2]), match[3], match[4]
        if kind not in _KINDS:
            raise ConfigError(
                f"no kind of card {kind!r}: expected {', '.join(_KINDS)}, as in soft:{count}"
            )
        if kind == "kernel" and (isa or ddr):
            raise ConfigError(
                f"no cards {group!r}: kernel cards are what they are: write kernel:{count}"
            )
        kinds[kind] = None
        if len(kinds) > 1 and not kinds.keys() <= _TOGETHER:
            raise ConfigError(
                f"{' and '.join(kinds)} cards do not go together, in {spec!r}: choose one kind"
            )
        if count + len(cards) > CARDS_MAX:
            raise ConfigError(
                f"{count + len(cards)} cards are too many: a {kind} fleet has 1 to {CARDS_MAX}"
            )
        if kind == "kernel":
            first = len(cards)
            cards.extend([KernelCardSpec(number) for number in range(first, first + count)])
            continue
        if kind == "riscv":
            cards.extend([card_spec(isa, parse_bytes(ddr) if ddr else None)] * count)
            continue
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
