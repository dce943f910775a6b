# SPDX-License-Identifier: Apache-2.0
"""What a card does between two exchanges of a step, and how long that takes.

One layer on the cards of a stage, `|` being an exchange, and what stands before each one a piece:

    [add] attention | project | add, ffn | project |

Where copies of KV are kept, one more exchange and their KV append come before the first project.
The `add` is that of the layer before, so the first layer of a stage has none, and one comes before
the output or the handover.  On a stage of one card there are no exchanges, and
where links are missing one may be several.  A piece of an empty share takes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from spanker.sched.cost import commands
from spanker.sched.cost.commands import Command
from spanker.sched.cost.machine import Exchanges, Machine, Moves, Pace
from spanker.sched.cost.rows import StepRows
from spanker.sched.detours import handover_phases
from spanker.sched.layout import q8_bytes
from spanker.sched.plan import Q8_BLOCK, LayerShape, ModelShape, WeightShape
from spanker.sched.shares import Share

BEST_BYTES = 8

Commands = tuple[Command, ...]


def gathers_q8(matrix: WeightShape, shares: Iterable[Share], unit: int = 1) -> bool:
    """Whether the cards of a stage gather the input of a matrix as Q8 blocks: it wants them, and
    each share, of things of `unit` elements, consists of whole ones."""
    return matrix.quantized and all(
        s.start * unit % Q8_BLOCK == 0 and s.size * unit % Q8_BLOCK == 0 for s in shares
    )


class Pieces:
    """Prices of the pieces of one step of a model, in seconds.

    `together` are the cards that compute at the same time; it matters only where the profile has
    `cores` or `shared_bytes_per_s`.  Prices are then those of cards that are in each other's way
    to the end, and `phases.phase_s` is for a phase in which some have less to do.
    """

    def __init__(
        self,
        shape: ModelShape,
        machine: Machine,
        rows: StepRows,
        together: Sequence[int] = (),
        kv_copies: int = 0,
    ) -> None:
        self.shape = shape
        self.kv_copies = kv_copies
        self.machine = machine
        self.rows = rows
        self.together = tuple(together)
        self._paces = {card: machine.pace(card, together) for card in machine.cards}
        t, hidden = rows.tokens, shape.hidden
        self._norm = commands.rmsnorm(t, hidden)
        self._quantize = commands.quantize(t, hidden)
        self._add = commands.add(t, hidden)

    # --- seconds ------------------------------------------------------------------------

    def seconds(self, card: int, what: Commands, pace: Pace | None = None) -> float:
        """What commands take on a card, one after the other, or at another pace than its."""
        pace = pace or self._paces[card]
        s_per_byte, s_per_work = pace.s_per_byte, pace.s_per_work
        total = len(what) * pace.command_s
        for nbytes, work, rate in what:
            memory_s, work_s = nbytes * s_per_byte, work * s_per_work[rate]
            total += memory_s if memory_s > work_s else work_s
        return total

    def pace(self, card: int) -> Pace:
        """The pace at which a card's commands are priced."""
        return self._paces[card]

    def embed(self, card: int, columns: Share) -> float:
        """Looking up the card's columns of the embedding, which takes as long where they are packed
        in the output matrix."""
        return self.seconds(card, self.embed_commands(columns))

    def attention(self, card: int, layer: LayerShape, heads: Share, q8: bool) -> float:
        """From the norm to the attention of the card's heads, and with `q8` their quantising; the
        add before and the EXCHANGE behind it not included."""
        return self.seconds(card, self.attention_commands(layer, heads, q8))

    def project(self, card: int, matrix: WeightShape, rows: int, requantise: bool) -> float:
        """`rows` rows of the attention output or of ffn_down; `requantise` where a quantised matrix
        gets gathered floats, which every card quantises, even one without rows."""
        return self.seconds(card, self.project_commands(matrix, rows, requantise))

    def ffn(self, card: int, layer: LayerShape, ffn: Share, q8: bool) -> float:
        """From the norm to the card's rows of the FFN, and with `q8` their quantising; the add
        before and the EXCHANGE behind it not included."""
        return self.seconds(card, self.ffn_commands(layer, ffn, q8))

    def add(self, card: int) -> float:
        """x += y, whole rows."""
        return self.seconds(card, self.add_commands())

    def output(self, card: int, vocabulary: Share, candidates: int) -> float:
        """From the choice of the output rows to the card's best token."""
        return self.seconds(card, self.output_commands(vocabulary, candidates))

    # --- exchanges ----------------------------------------------------------------------

    def exchange_s(self, cards: int) -> float:
        """Taking up an EXCHANGE in a stage of so many cards."""
        if cards < 2:
            return 0.0
        return next(iter(self._paces.values())).command_s

    def handover(self, sources: Sequence[int], targets: Sequence[int]) -> Exchanges:
        """Whole rows from the cards of a stage to those of the next, who wait for it.  The senders
        take part in the first exchange only."""
        phases = self.handover_moves(sources, targets)
        return self.machine.in_phases(phases, self.exchange_s(2))

    def handover_moves(self, sources: Sequence[int], targets: Sequence[int]) -> list[Moves]:
        """The moves of each exchange of a handover: a row to each target, the sources taking
        turns."""
        row = self.rows.tokens * self.shape.hidden * 4
        return [
            [(move.source, move.target, row) for move in moves]
            for moves in handover_phases(sources, targets, row, self.machine.down)
        ]

    def choose(self, voters: Sequence[int], embedders: Sequence[int]) -> float:
        """Each voter's best tokens to each embedder, and their choice; from when the last voter has
        its best."""
        votes_s = self.votes(voters, embedders).seconds
        chosen = self.choose_commands(len(voters))
        return votes_s + max((self.seconds(card, chosen) for card in embedders), default=0.0)

    def votes(self, voters: Sequence[int], embedders: Sequence[int]) -> Exchanges:
        """The exchanges of that."""
        nbytes = BEST_BYTES * self.rows.outputs
        return self.machine.choice(voters, embedders, nbytes, self.exchange_s(2))

    def choose_most(self, cards: Sequence[int]) -> float:
        """What no choice takes longer than, whoever of these cards votes and embeds."""
        if not self.machine.down:
            return self.choose(cards, cards)
        # No more exchanges than cards, and in none all votes over all links and the host.
        nbytes = BEST_BYTES * self.rows.outputs * len(cards)
        moves = [(a, b, nbytes) for a, b in itertools.permutations(cards, 2)]
        exchange_s = self.exchange_s(2) + self.machine.moves_s(moves)
        return len(cards) * exchange_s + self.choose(cards[:1], cards[:1])

    # --- bytes that a card sends to each other card of its stage --------------------------

    def embed_gather(self, columns: Share) -> float:
        return self.rows.tokens * 4 * columns.size

    def attention_gather(self, heads: Share, q8: bool) -> float:
        return self._row_bytes(heads.size * self.shape.head_dim, q8)

    def project_gather(self, rows: int) -> float:
        return self.rows.tokens * 4 * rows

    def ffn_gather(self, ffn: Share, q8: bool) -> float:
        return self._row_bytes(ffn.size, q8)

    def _row_bytes(self, elements: int, q8: bool) -> float:
        return self.rows.tokens * (q8_bytes(elements) if q8 else 4 * elements)

    # --- commands -----------------------------------------------------------------------

    def embed_commands(self, columns: Share) -> Commands:
        if columns.empty:
            return ()
        return (commands.embed(self.rows.tokens, self.shape.embedding, columns.size),)

    def attention_commands(self, layer: LayerShape, heads: Share, q8: bool) -> Commands:
        if heads.empty:
            return ()
        t, dim, group = self.rows.tokens, self.shape.head_dim, self.shape.group
        # A KV head belongs to whoever has one of its query heads.
        kv = (heads.stop - 1) // group + 1 - heads.start // group
        own, kv_own = heads.size * dim, kv * dim
        q, k, v = layer.attn_q, layer.attn_k, layer.attn_v
        out = [self._norm]
        if q.quantized or k.quantized or v.quantized:
            out.append(self._quantize)
        out += (
            commands.matmul(t, q, own),
            commands.matmul(t, k, kv_own),
            commands.matmul(t, v, kv_own),
            commands.rope(t, heads.size, dim),
            commands.rope(t, kv, dim),
            commands.kv_append(t, kv, dim),
            commands.attention(self.rows, heads.size, kv, dim),
        )
        if q8:
            out.append(commands.quantize(t, own))
        return tuple(out)

    def copy_commands(self, kv_heads: int) -> Commands:
        """Keeping the new keys and values of another card's KV heads."""
        if not kv_heads:
            return ()
        return (commands.kv_append(self.rows.tokens, kv_heads, self.shape.head_dim),)

    def copy_bytes(self, kv_heads: int) -> float:
        """What a card sends of so many KV heads to who keeps a copy."""
        return 2 * self.rows.tokens * kv_heads * self.shape.head_dim * 4

    def project_commands(self, matrix: WeightShape, rows: int, requantise: bool) -> Commands:
        t = self.rows.tokens
        out = [commands.quantize(t, matrix.k)] if requantise else []
        if rows:
            out.append(commands.matmul(t, matrix, rows))
        return tuple(out)

    def ffn_commands(self, layer: LayerShape, ffn: Share, q8: bool) -> Commands:
        if ffn.empty:
            return ()
        t, n, gate, up = self.rows.tokens, ffn.size, layer.ffn_gate, layer.ffn_up
        out = [self._norm]
        if gate.quantized or up.quantized:
            out.append(self._quantize)
        out += (
            commands.matmul(t, gate, n),
            commands.matmul(t, up, n),
            commands.swiglu(t, n),
        )
        if q8:
            out.append(commands.quantize(t, n))
        return tuple(out)

    def add_commands(self) -> Commands:
        return (self._add,)

    def output_commands(self, vocabulary: Share, candidates: int) -> Commands:
        if vocabulary.empty:
            return ()
        shape, o, n = self.shape, self.rows.outputs, vocabulary.size
        out = [commands.select(o, shape.hidden), commands.rmsnorm(o, shape.hidden)]
        if shape.output.quantized:
            out.append(commands.quantize(o, shape.hidden))
        out += (
            commands.matmul(o, shape.output, n),
            commands.logit_stats(o, n),
            commands.top_k(o, n, candidates),
            commands.best(o),
        )
        return tuple(out)

    def choose_commands(self, lists: int) -> Commands:
        return (commands.choose(self.rows.outputs, lists),)
