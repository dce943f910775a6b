# SPDX-License-Identifier: Apache-2.0
"""What the cards of a stage divide among them, and what each way of dividing takes.

heads        attention and its gather; how the gather goes (Q8 blocks or floats) also decides
             whether the attention's output projection quantises once more
hidden       rows of both projections back into the hidden row
ffn          rows of gate and up
vocabulary   rows of the output matrix (last stage)
columns      columns of the embedding (first stage)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import attrs
import numpy as np

from spanker.sched.cost.pieces import Pieces
from spanker.sched.plan import (
    LOGIT_CHUNK,
    Q8_BLOCK,
    TILE_ROWS,
    CardShare,
    LayerShape,
    WeightShape,
)
from spanker.sched.planning.dividing import F64, Division, Gather, Phase, Solution, Table
from spanker.sched.shares import Share, split
from spanker.values import Value

Parts = tuple[Share, ...]


@attrs.frozen(eq=False, repr=False)
class Shares(Value):
    """The shares of a stage's cards, as if it were first and last; `aligned`: those of the heads
    are whole Q8 blocks."""

    heads: Parts
    hidden: Parts
    ffn: Parts
    vocabulary: Parts
    columns: Parts
    aligned: bool

    def of_cards(self, cards: Sequence[int]) -> tuple[CardShare, ...]:
        """The same card by card."""
        parts = (self.heads, self.hidden, self.ffn, self.vocabulary, self.columns)
        return tuple(CardShare(card, *own) for card, *own in zip(cards, *parts, strict=True))


@attrs.frozen(eq=False, repr=False)
class Price(Value):
    """Seconds, and what no shares can beat."""

    seconds: float
    bound: float

    def __add__(self, other: Price) -> Price:
        return Price(self.seconds + other.seconds, self.bound + other.bound)


@attrs.frozen(eq=False, repr=False)
class LayerPrice(Value):
    """A layer, and the same where it is the first of its stage: without the add before it."""

    whole: Price
    without_add: Price


@attrs.frozen(eq=False, repr=False)
class Ending(Value):
    """Shares of columns or of the vocabulary, and what they take; the bound is for all in which
    no other cards have any."""

    parts: Parts
    price: Price


class Dimensions:
    """The divisions of one set of cards.  `like` says which cards are alike; `tables` keeps what
    single cards take, and may be shared with other sets of cards."""

    def __init__(
        self,
        pieces: Pieces,
        candidates: int,
        gather: Gather,
        cards: Sequence[int],
        like: Sequence[int],
        tables: dict[object, F64],
    ) -> None:
        self._shape, self.pieces = pieces.shape, pieces
        self._candidates = candidates
        self._gather = gather
        self._cards, self._like = tuple(cards), tuple(like)
        self._tables = tables
        self._divisions: dict[object, Division] = {}
        # Heads that fill whole Q8 blocks.
        self._whole = math.lcm(Q8_BLOCK, self._shape.head_dim) // self._shape.head_dim
        self._columns_unit = max(self._shape.embedding.columns_unit, TILE_ROWS)

    # --- choosing -------------------------------------------------------------------------

    def best(self, layer: LayerShape) -> Shares:
        """The best shares for layers of this kind."""
        shape = self._shape
        found = []
        for aligned in self._alignments(layer):
            heads, hidden = (
                self._heads(layer, aligned).solve(),
                self._hidden(layer, aligned).solve(),
            )
            unit = self._whole if aligned else 1
            parts = parts_of(heads.units, unit, shape.heads), hidden.units
            found.append((heads.seconds + hidden.seconds, *parts))
        _, heads_parts, hidden_units = min(found, key=lambda way: way[0])
        return self.shares(
            heads_parts,
            parts_of(hidden_units, TILE_ROWS, shape.hidden),
            parts_of(self._ffn(layer).solve().units, Q8_BLOCK, shape.ffn),
            parts_of(self._vocabulary().solve().units, LOGIT_CHUNK, shape.vocabulary),
            parts_of(self._columns().solve().units, self._columns_unit, shape.hidden),
        )

    def ends(self) -> tuple[list[Ending], list[Ending]] | None:
        """Shares of the columns and of the vocabulary that can be best once it counts which cards
        have any, as it does where the next token is chosen; the fastest first.  None where those
        are not known."""
        columns, vocabulary = self._columns().by_users, self._vocabulary().by_users
        if columns is None or vocabulary is None:
            return None

        def endings(ways: Sequence[Solution], unit: int, total: int) -> list[Ending]:
            return [
                Ending(parts_of(way.units, unit, total), Price(way.seconds, way.bound))
                for way in ways
            ]

        return (
            endings(columns, self._columns_unit, self._shape.hidden),
            endings(vocabulary, LOGIT_CHUNK, self._shape.vocabulary),
        )

    def by_weight(self, weights: Sequence[float]) -> Shares:
        """Shares in proportion to the weights of the cards."""
        shape, n = self._shape, len(self._cards)

        def parts(total: int, unit: int) -> Parts:
            return split(total, n, unit=unit, weights=weights)

        return self.shares(
            parts(shape.heads, 1),
            parts(shape.hidden, TILE_ROWS),
            parts(shape.ffn, Q8_BLOCK),
            parts(shape.vocabulary, LOGIT_CHUNK),
            parts(shape.hidden, self._columns_unit),
        )

    def shares(
        self, heads: Parts, hidden: Parts, ffn: Parts, vocabulary: Parts, columns: Parts
    ) -> Shares:
        """Any shares."""
        return Shares(heads, hidden, ffn, vocabulary, columns, self._is_aligned(heads))

    def _is_aligned(self, heads: Parts) -> bool:
        return all(h.start % self._whole == h.size % self._whole == 0 for h in heads)

    # --- prices -----------------------------------------------------------------------------

    def layer(self, shares: Shares, layer: LayerShape) -> LayerPrice:
        """A layer without what its EXCHANGEs take up."""
        unit = self._whole if shares.aligned else 1
        hidden = _price(self._hidden(layer, shares.aligned), shares.hidden, TILE_ROWS)
        ffn = _price(self._ffn(layer), shares.ffn, Q8_BLOCK)

        def price(add: bool) -> Price:
            # Heads and hidden go together: their bound is that of the better alignment.
            heads = _price(self._heads(layer, shares.aligned, add=add), shares.heads, unit)
            both = heads + hidden
            for aligned in self._alignments(layer):
                least = self._heads(layer, aligned, add=add).solve().bound
                least += self._hidden(layer, aligned).solve().bound
                both = Price(both.seconds, min(both.bound, least))
            return both + ffn

        return LayerPrice(price(True), price(False))

    def embed(self, shares: Shares) -> Price:
        """The embedding and its gather, without what the EXCHANGE takes up."""
        return _price(self._columns(), shares.columns, self._columns_unit)

    def output(self, shares: Shares) -> Price:
        """The last add and the output."""
        return _price(self._vocabulary(), shares.vocabulary, LOGIT_CHUNK)

    # --- divisions --------------------------------------------------------------------------

    def _alignments(self, layer: LayerShape) -> tuple[bool, ...]:
        """Whether heads can be shared in whole Q8 blocks, and whether in another way too."""
        if not layer.attn_output.quantized or self._shape.heads % self._whole:
            return (False,)
        return (True,) if self._whole == 1 or len(self._cards) == 1 else (True, False)

    def _heads(self, layer: LayerShape, aligned: bool, *, add: bool = True) -> Division:
        shape, pieces = self._shape, self.pieces
        unit = self._whole if aligned else 1
        q8 = aligned and layer.attn_output.quantized
        units = shape.heads // unit
        # KV heads go by where a share starts among those that share one.
        group = min(math.lcm(shape.group, unit) // unit, units)

        def seconds(card: int, start: int, count: int) -> float:
            first, stop = start * unit, min((start + count) * unit, shape.heads)
            before = pieces.add(card) if add else 0.0
            return before + pieces.attention(card, layer, Share(first, max(first, stop)), q8)

        key = ("heads", aligned, add, *_like(layer.attn_q, layer.attn_k, layer.attn_v), q8)
        nbytes = pieces.attention_gather(Share(0, unit), q8)
        # Heads that do fill blocks would be gathered as such.
        quantized = layer.attn_output.quantized and not aligned
        avoid = self._whole if quantized and shape.heads % self._whole == 0 else 0
        return self._division(units, [_Phase(key, seconds, nbytes, group)], avoid=avoid)

    def _hidden(self, layer: LayerShape, aligned: bool) -> Division:
        requantise = layer.attn_output.quantized and not aligned
        phases = [
            self._projection(layer.attn_output, requantise),
            self._projection(layer.ffn_down, False),
        ]
        return self._division(-(-self._shape.hidden // TILE_ROWS), phases)

    def _projection(self, matrix: WeightShape, requantise: bool) -> _Phase:
        pieces = self.pieces

        def seconds(card: int, rows: int) -> float:
            return pieces.project(card, matrix, rows, requantise)

        key = ("hidden", requantise, *_like(matrix))
        return _sized(key, seconds, pieces.project_gather, TILE_ROWS, self._shape.hidden)

    def _ffn(self, layer: LayerShape) -> Division:
        pieces, total = self.pieces, self._shape.ffn
        q8 = layer.ffn_down.quantized

        def seconds(card: int, rows: int) -> float:
            return pieces.add(card) + pieces.ffn(card, layer, Share(0, rows), q8)

        def nbytes(rows: int) -> float:
            return pieces.ffn_gather(Share(0, rows), q8)

        key = ("ffn", *_like(layer.ffn_gate, layer.ffn_up), q8)
        return self._division(
            -(-total // Q8_BLOCK), [_sized(key, seconds, nbytes, Q8_BLOCK, total)]
        )

    def _vocabulary(self) -> Division:
        pieces, total = self.pieces, self._shape.vocabulary

        def seconds(card: int, rows: int) -> float:
            return pieces.add(card) + pieces.output(card, Share(0, rows), self._candidates)

        def nbytes(rows: int) -> float:
            return 0.0

        phase = _sized(("vocabulary",), seconds, nbytes, LOGIT_CHUNK, total)
        return self._division(-(-total // LOGIT_CHUNK), [phase])

    def _columns(self) -> Division:
        pieces, total, unit = self.pieces, self._shape.hidden, self._columns_unit

        def seconds(card: int, columns: int) -> float:
            return pieces.embed(card, Share(0, columns))

        def nbytes(columns: int) -> float:
            return pieces.embed_gather(Share(0, columns))

        return self._division(
            -(-total // unit), [_sized(("columns",), seconds, nbytes, unit, total)]
        )

    def _division(self, units: int, phases: Sequence[_Phase], avoid: int = 0) -> Division:
        key = (avoid, *(phase.key for phase in phases))
        found = self._divisions.get(key)
        if found is None:
            found = self._divisions[key] = Division(
                units,
                tuple(self._phase(phase, units) for phase in phases),
                self._gather,
                len(set(self._like)) == 1,
                avoid,
            )
        return found

    def _phase(self, of: _Phase, units: int) -> Phase:
        ending = None
        if of.ending is not None:
            ending = self._table((*of.key, "ending"), units, of.group, of.ending)
        return Phase(
            self._table(of.key, units, of.group, of.seconds),
            of.unit_bytes,
            ending,
            of.less_bytes,
        )

    def _table(self, key: _Key, units: int, group: int, seconds: Table) -> F64:
        """(cards, group, units + 1): what each card takes for so many units from a start on."""
        rows = []
        for card, like in zip(self._cards, self._like, strict=True):
            row = self._tables.get((key, like))
            if row is None:
                row = self._tables[key, like] = np.array(
                    [[seconds(card, s, count) for count in range(units + 1)] for s in range(group)]
                )
            rows.append(row)
        return np.stack(rows)


_Key = tuple[object, ...]


@attrs.frozen(eq=False, repr=False)
class _Phase(Value):
    """How a `Phase` is made; those with the same key are the same."""

    key: _Key
    seconds: Table
    unit_bytes: float
    group: int = 1
    ending: Table | None = None
    less_bytes: float = 0.0


def _sized(
    key: _Key,
    seconds: Callable[[int, int], float],
    nbytes: Callable[[int], float],
    unit: int,
    total: int,
) -> _Phase:
    """Of a phase that takes as long wherever a share begins: by (card, size) and by size."""
    missing = -total % unit

    def whole(card: int, start: int, count: int) -> float:
        return seconds(card, count * unit)

    def ending(card: int, start: int, count: int) -> float:
        return seconds(card, max(count * unit - missing, 0))

    return _Phase(
        key,
        whole,
        nbytes(unit),
        ending=ending if missing else None,
        less_bytes=nbytes(unit) - nbytes(unit - missing),
    )


def parts_of(units: Sequence[int], unit: int, total: int) -> Parts:
    """Shares of so many units each; the last of all units may be partial."""
    edges = [min(unit * sum(units[:i]), total) for i in range(len(units) + 1)]
    return tuple(Share(a, b) for a, b in itertools.pairwise(edges))


def _price(division: Division, parts: Parts, unit: int) -> Price:
    way = np.array([[-(-part.size // unit) for part in parts]])
    seconds = float(division.price(way)[0])
    return Price(seconds, min(division.solve().bound, seconds))


def _like(*matrices: WeightShape) -> tuple[WeightShape, ...]:
    """Matrices without their names: those that cost the same are equal."""
    return tuple(attrs.evolve(matrix, name="") for matrix in matrices)
