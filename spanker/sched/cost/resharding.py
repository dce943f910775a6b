# SPDX-License-Identifier: Apache-2.0
"""Where the weights that a plan wants on a card are already: on the card itself, on its peers, or
with the host alone.

Counted row by row, from two plans and nothing else.  What lies where on a card is not asked: a
matrix that grows may have to be laid out anew, which the memory of a card does far faster than any
link brings it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spanker.sched.layout import embeds_from_output, layer_rows
from spanker.sched.plan import ModelShape, Plan
from spanker.values import Value, lazy_frozen

_Span = tuple[int, int]


@lazy_frozen
class Sources(Value):
    """Bytes of weights: `kept` on the cards that have them, `moved` from card to card by (source,
    target), and those that only the host has, by card."""

    kept: int
    moved: dict[tuple[int, int], float]
    from_host: dict[int, int]

    @property
    def moves(self) -> tuple[tuple[int, int, float], ...]:
        """What is moved as an exchange has it: (source, target, bytes)."""
        return tuple((source, target, n) for (source, target), n in self.moved.items())


def sources(
    shape: ModelShape, before: Sequence[Plan], alive: Sequence[int], after: Plan
) -> Sources:
    """Where the cards of `after` find their weights, when the cards `alive` hold what the plans
    `before`, on cards of their own, gave them.  What several peers hold each brings a part of."""
    held = {
        card: {name: (first, stop) for name, first, stop, _ in _holdings(shape, plan, card)}
        for plan in before
        for card in plan.cards
        if card in alive
    }
    kept, moved, from_host = 0, dict[tuple[int, int], float](), dict[int, int]()
    for card in after.cards:
        for name, first, stop, unit_bytes in _holdings(shape, after, card):
            holders = {c: spans[name] for c, spans in held.items() if name in spans}
            edges = {first, stop, *(e for span in holders.values() for e in span)}
            inside = sorted(e for e in edges if first <= e <= stop)
            for begin, end in itertools.pairwise(inside):
                nbytes = (end - begin) * unit_bytes
                having = [c for c, (a, b) in holders.items() if a <= begin and end <= b]
                if card in having:
                    kept += nbytes
                elif not having:
                    from_host[card] = from_host.get(card, 0) + nbytes
                for peer in having if card not in having else ():
                    ends = peer, card
                    moved[ends] = moved.get(ends, 0.0) + nbytes / len(having)
    return Sources(kept, moved, from_host)


def _holdings(shape: ModelShape, plan: Plan, card: int) -> Iterator[tuple[str, int, int, int]]:
    """(tensor, first, stop, bytes of each) of the rows that a card holds; of the embedding blocks
    of columns."""
    number, share = plan.place(card)
    layers = plan.stages[number].layers
    table, output = shape.embedding, shape.output
    if not share.columns.empty and not embeds_from_output(shape, share):
        unit = table.columns_unit
        first, stop = share.columns.start // unit, -(-share.columns.stop // unit)
        yield f"{table.name}.columns", first, stop, table.rows * table.unit_bytes
    for index in range(layers.start, layers.stop):
        yield f"blk.{index}.norms", 0, 2, shape.hidden * 4
        for matrix, first, rows in layer_rows(shape.layers[index], shape, share):
            yield matrix.name, first, first + rows, matrix.row_bytes
    if not share.vocabulary.empty:
        yield "output_norm", 0, 1, shape.hidden * 4
        yield "output.rows", share.vocabulary.start, share.vocabulary.stop, output.row_bytes
