# SPDX-License-Identifier: Apache-2.0
"""Bytes of the messages between host and cards, by docs/api/wire-protocol.md.

A message is a frame: a header, a body in msgpack, a table of the raw buffers, and these.  Integers
in a body take 1 to 9 bytes; they are counted as what those of a model in use mostly take.
"""

from __future__ import annotations

from spanker.sched.cost.rows import StepRows
from spanker.sched.layout import chunks
from spanker.sched.limits import PAGE_POSITIONS

HEADER_BYTES = 32
RAW_BUFFER_BYTES = 8
INTEGER_BYTES = 3
TIME_BYTES = 5
STEP_HEADER_BYTES = 32
PROGRAM_HEADER_BYTES = 32
COMMAND_BYTES = 128

# What goes from card to card over the host does so in messages of so much; and what each of them, a
# Relayed with one message of a link in it, has besides.
RELAYED_BYTES = 16384
RELAYED_HEADER_BYTES = HEADER_BYTES + RAW_BUFFER_BYTES + 3 + 24

# One that carries next to nothing, such as Ok, ReadCounters or Describe.
SMALL_BYTES = HEADER_BYTES + 1 + INTEGER_BYTES


def step_bytes(rows: StepRows, sequences: int, context: int, reads: int) -> int:
    """RunStep, for sequences of up to `context` positions, that asks for so many `reads`."""
    pages = sequences * -(-context // PAGE_POSITIONS)
    words = 3 * rows.tokens + 2 * rows.outputs + (sequences + 1) + pages
    body = 2 + 2 * INTEGER_BYTES + reads * (2 + 2 * INTEGER_BYTES)
    return HEADER_BYTES + RAW_BUFFER_BYTES + body + STEP_HEADER_BYTES + 4 * words


def answer_bytes(outputs: int, vocabulary: int, candidates: int) -> int:
    """StepDone of a card with so many rows of the vocabulary: its parts of the log-sum-exp and its
    candidates for each output."""
    small = HEADER_BYTES + 1 + 2 * INTEGER_BYTES + TIME_BYTES
    if not vocabulary or not outputs:
        return small
    return small + 2 * RAW_BUFFER_BYTES + outputs * 8 * (chunks(vocabulary) + candidates)


def counters_bytes(cards: int) -> int:
    """The answer to ReadCounters in a fleet of so many cards."""
    return HEADER_BYTES + 12 * TIME_BYTES + 2 * cards


def allocation_bytes(buffers: int) -> int:
    """AllocBuffers of so many sizes, or the handles that answer it."""
    return HEADER_BYTES + 4 + INTEGER_BYTES + buffers * TIME_BYTES


def write_bytes(pieces: int, nbytes: int) -> int:
    """WriteBuffers of so many pieces, `nbytes` in all."""
    body = 4 + INTEGER_BYTES + pieces * (1 + 3 * INTEGER_BYTES)
    return HEADER_BYTES + body + pieces * RAW_BUFFER_BYTES + nbytes


def program_bytes(commands: int) -> int:
    """LoadProgram of so many commands."""
    small = HEADER_BYTES + 1 + INTEGER_BYTES + RAW_BUFFER_BYTES
    return small + PROGRAM_HEADER_BYTES + commands * COMMAND_BYTES
