# SPDX-License-Identifier: Apache-2.0
"""Audits: does a card compute what its model's file says?

CRCs guard what travels; against a card whose memory or arithmetic lies there is only computing
again.  Between two steps one card multiplies one tile of 16 rows, drawn among all that it holds,
with the activations that its last step has left there; the host does the same from the file, by the
reference in numpy, and compares bit for bit.

Of a card with a part p of its tiles damaged, n audits find nothing with a probability of (1 - p)^n;
an arithmetic unit that is wrong in a part p of all products the same.  What the card has answered
before is not made good: the event says since when it has not been found right.

In a fleet with audits all weights that a card does not hold yet come from the host, never from
another card: damage stays where it is, and an audit blames the card that has done it.

An audit moves k bytes (the row), 16 rows of weights and 64 bytes; it takes a fraction of a
millisecond on the card and the host, and the next step is not queued behind the last one.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import attrs
import numpy as np

from spanker.actors.message import LoadProgram, RunStep
from spanker.actors.steps import LoadedModel
from spanker.errors import CardAuditError, CardLostError
from spanker.ggml.architectures import llama
from spanker.ggml.architectures.llama import HeldRows
from spanker.ggml.gguf import GGUFFile
from spanker.kernels import reference
from spanker.kernels.program import Program, Ref, SequenceStep, encode_step, matmul
from spanker.sched.layout import q8_bytes
from spanker.sched.plan import TILE_ROWS
from spanker.values import Value

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator
    from spanker.actors.placement import ModelFile

# A step of one token, whose page no command looks at.
_STEP = encode_step([SequenceStep((0,), 0, (0,))])


@attrs.frozen(eq=False, repr=False)
class Tile(Value):
    """Up to 16 rows of a matrix, from row `first` of the file on, which lie at byte `offset` of a
    card's buffer."""

    card: int
    held: HeldRows
    first: int
    rows: int
    offset: int

    def __str__(self) -> str:
        return f"rows {self.first} to {self.first + self.rows - 1} of {self.held.weight.shape.name}"


class Auditor:
    """The audits of one replica: one after every `every` steps, drawn from a seed."""

    def __init__(self, coordinator: Coordinator, file: ModelFile, every: int, seed: int) -> None:
        self.every = every
        self._coordinator = coordinator
        self._file = file
        self._draw = random.Random(seed)
        # Of the file, once it has been opened.
        self._open = contextlib.ExitStack()
        self._gguf: GGUFFile | None = None
        # Steps when the last audit was made, and how many there have been.
        self._last = 0
        self.made = 0

    def due(self, steps: int) -> bool:
        """Whether it is time for one after so many steps."""
        return steps - self._last >= self.every

    async def look(self, loaded: LoadedModel, steps: int) -> None:
        """Audit one tile, between two steps.  Raises CardAuditError for a card that computes
        something else, and what the card reports."""
        since, self._last = self._last, steps
        tile = self._drawn(loaded)
        row, out = await self._computed(loaded, tile)
        if self._gguf is None:
            self._gguf, _ = self._open.enter_context(self._file.open(modelled=True))
        weight = tile.held.weight
        rows = self._gguf.tensor_data(weight.shape.name)[tile.first : tile.first + tile.rows]
        x = np.frombuffer(row, np.uint8 if weight.shape.quantized else np.float32)
        expected = reference.matmul(weight.format.name.lower(), rows, x[None])[0]
        self.made += 1
        if expected.tobytes() != out:
            raise CardAuditError(
                f"card {tile.card} computes something else than its file says for {tile}: its "
                f"answers since step {since} may be wrong; have its memory tested",
                card=tile.card,
            )

    def close(self) -> None:
        """Let go of the file."""
        self._gguf = None
        self._open.close()

    def _drawn(self, loaded: LoadedModel) -> Tile:
        """Any of the tiles that the model's cards hold, each as likely as the others."""
        held = [
            (card, rows)
            for card in loaded.plan.cards
            for rows in llama.held_rows(loaded.model, loaded.plan, card)
        ]
        weights = [-(-rows.count // TILE_ROWS) for _, rows in held]
        ((card, rows),) = self._draw.choices(held, weights)
        place = self._draw.randrange(-(-rows.count // TILE_ROWS))
        first = place * TILE_ROWS
        return Tile(
            card,
            rows,
            rows.first + first,
            min(TILE_ROWS, rows.count - first),
            first * rows.weight.shape.row_bytes,
        )

    async def _computed(self, loaded: LoadedModel, tile: Tile) -> tuple[bytes, bytes]:
        """The row of activations on the card, and what it makes of it."""
        coordinator, shape = self._coordinator, tile.held.weight.shape
        handles = loaded.handles[tile.card]
        nbytes = q8_bytes(shape.k) if shape.quantized else shape.k * 4
        command = matmul(
            tile.held.weight.format,
            Ref(tile.held.buffer, 0, tile.offset),
            Ref(tile.held.activations, nbytes),
            Ref("y", TILE_ROWS * 4),
            rows=tile.rows,
            k=shape.k,
        )
        encoded = Program((command,), 1, 1, loaded.limits.page_positions).encode(handles)
        reads = (handles[tile.held.activations], 0, nbytes), (handles["y"], 0, tile.rows * 4)
        # All of it while nobody else has the card, and on that very card: on one that has come back
        # meanwhile the same numbers may be somebody else's buffers.
        await coordinator.take_cards((tile.card,))
        try:
            client = coordinator.clients[tile.card]
            if not coordinator.holds(loaded, tile.card):
                raise CardLostError(f"card {tile.card} is a new one now", card=tile.card)
            request = LoadProgram(buffers=(encoded,))
            program = (await coordinator.owning(client, request)).program
            try:
                done = await coordinator.ask(tile.card, RunStep(program, reads, buffers=(_STEP,)))
            finally:
                await coordinator.give_programs_back({tile.card: program}, coordinator.births)
        finally:
            coordinator.give_cards_back((tile.card,))
        row, out = done.buffers
        return bytes(row), bytes(out)
