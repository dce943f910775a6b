# SPDX-License-Identifier: Apache-2.0
"""A program as the kernel module takes it.

Operands name buffers by their place in a table that comes with the program, what an operation does
not take is zero, and transfers name links of the card instead of cards of the fleet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spanker.device.base import Buffer
from spanker.errors import CardCommandError
from spanker.kernels.program import COMMAND, OPERANDS, PROGRAM_HEADER, Op

# The bytes of one command (spk_card.h).
PACKED_COMMAND = np.dtype(
    [
        ("op", "<u2"),
        ("format", "<u2"),
        ("flags", "<u4"),
        ("ref", [("buffer", "<u4"), ("stride", "<u4"), ("offset", "<u8")], 4),
        ("arg", "<u4", 14),
    ]
)
assert PACKED_COMMAND.itemsize == COMMAND.size
TRANSFERS = (Op.LINK_SEND, Op.LINK_RECV)
# By operation and slot.
_HAS_OPERAND = np.zeros((max(Op) + 1, 4), bool)
for _op, _slots in OPERANDS.items():
    _HAS_OPERAND[_op] = [bool(_slots >> slot & 1) for slot in range(4)]


def translated(
    program: Buffer, links: Sequence[int | None], card: int
) -> tuple[bytes, tuple[int, ...]]:
    """Of a program that has been checked, the bytes for the module and the buffers of its table.

    `links` are the links of `card` by the fleet's cards; CardCommandError where there is none.
    """
    out = bytearray(program)
    commands = np.frombuffer(out, PACKED_COMMAND, offset=PROGRAM_HEADER.size)
    used = _HAS_OPERAND[commands["op"]]
    refs = commands["ref"]
    buffers, places = np.unique(refs["buffer"][used], return_inverse=True)
    refs[~used] = 0
    refs["buffer"][used] = places
    peers = commands["arg"][:, 0]
    for at in np.flatnonzero(np.isin(commands["op"], TRANSFERS)):
        link = links[peers[at]]
        if link is None:
            raise CardCommandError(
                f"card {card}: program refused at command {at}: no link leads to card {peers[at]}",
                card=card,
            )
        peers[at] = link
    return bytes(out), tuple(buffers.tolist())
