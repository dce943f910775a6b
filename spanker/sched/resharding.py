# SPDX-License-Identifier: Apache-2.0
"""How a model's weights get to where another plan wants them, and the KV pages of its sequences:
from what cards hold already.

A row that the same card holds is copied within its memory, one that a peer holds comes over a link,
and only what no card holds comes from the host.  Pages likewise, but the host has none of them: all
that are wanted are there, or none is moved.  A `Reshard` says all of it: buffer by buffer, so
that a card needs room for a few buffers more than it ends up with.  Made and checked here, from
plans and page tables alone; actors/resharding.py carries it out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import attrs

from spanker.errors import PlanError
from spanker.sched.layout import embeds_from_output, layer_rows
from spanker.sched.pages import PageMove, Pool, pools
from spanker.sched.plan import DDR_ALIGN, TILE_ROWS, ModelShape, Plan
from spanker.sched.topology import Topology
from spanker.values import Value

# A round makes buffers of so many bytes on a card, or one that is larger.
ROUND_BYTES = 64 << 20
# Transfers that cards make together, in one exchange, at most.
EXCHANGE_MAX = 256
# Ranges of pages that a round moves at most: its programs have a command for each, or two.
RANGES_MAX = 8192


# --- what a card holds -------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Content(Value):
    """What a weight buffer holds: rows [first, stop) of a tensor, in tiles of `tile` rows from its
    start on, the last one filled up.  A tile takes `row_bytes` a row, and two of the same rows are
    the same bytes.

    Norms and rotations are one row.  The rows of an embedding's part are blocks of columns, and all
    of them one tile: token after token they lie side by side, and every width is laid out anew.
    """

    buffer: str
    first: int
    stop: int
    row_bytes: int
    tile: int = TILE_ROWS

    @property
    def tile_bytes(self) -> int:
        return self.tile * self.row_bytes

    @property
    def nbytes(self) -> int:
        return -(-(self.stop - self.first) // self.tile) * self.tile_bytes

    def row(self, offset: int) -> int:
        """The first row of the tile at an offset, or where the last one ends."""
        return min(self.first + offset // self.row_bytes, self.stop)

    def part(self, offset: int, nbytes: int) -> Content:
        """The content of these bytes, whole tiles, in a buffer of their own."""
        return attrs.evolve(self, first=self.row(offset), stop=self.row(offset + nbytes))

    def shared(self, other: Content) -> tuple[int, int]:
        """The bytes [begin, end) of this buffer that another one holds as well, from
        `other.offset(row(begin))` on; begin == end where it holds none of them."""
        if (self.row_bytes, self.tile) != (other.row_bytes, other.tile):
            return 0, 0
        if (self.first - other.first) % self.tile:
            return 0, 0
        first, stop = max(self.first, other.first), min(self.stop, other.stop)
        if self.stop != other.stop:
            # The last tile of one of them is filled up, or goes on.
            stop -= (stop - self.first) % self.tile
        if first >= stop:
            return 0, 0
        begin = self.offset(first)
        return begin, begin + -(-(stop - first) // self.tile) * self.tile_bytes

    def offset(self, row: int) -> int:
        """Where the tile that begins with this row lies."""
        return (row - self.first) * self.row_bytes


def contents(shape: ModelShape, plan: Plan, card: int, context: int) -> tuple[Content, ...]:
    """What a card holds of a model under a plan, buffer by buffer, with the table of rotations for
    `context` positions."""
    return tuple(_contents(shape, plan, card, context))


def _contents(shape: ModelShape, plan: Plan, card: int, context: int) -> Iterator[Content]:
    number, share = plan.place(card)
    layers, norm_bytes = plan.stages[number].layers, shape.hidden * 4
    table, output = shape.embedding, shape.output
    yield Content("rope", 0, 1, context * shape.rope_dim * 4, 1)
    if not share.columns.empty and not embeds_from_output(shape, share):
        first, stop = (
            edge // table.columns_unit for edge in (share.columns.start, share.columns.stop)
        )
        row_bytes = table.rows * table.unit_bytes
        yield Content(f"{table.name}.columns", first, stop, row_bytes, stop - first)
    for index in range(layers.start, layers.stop):
        for norm in ("attn_norm", "ffn_norm"):
            yield Content(f"blk.{index}.{norm}.weight", 0, 1, norm_bytes, 1)
        for matrix, first, rows in layer_rows(shape.layers[index], shape, share):
            yield Content(matrix.name, first, first + rows, matrix.row_bytes)
    if not share.vocabulary.empty:
        yield Content("output_norm.weight", 0, 1, norm_bytes, 1)
        v = share.vocabulary
        yield Content("output.rows", v.start, v.stop, output.row_bytes)


# --- what is done ------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Fill(Value):
    """Bytes [offset, offset + nbytes) of a card's new buffer come from `source_offset` of what card
    `source`, which may be the same, holds in the buffer of that name, or of another one; from the
    host where it is None.  `hosted`: they go over the host, for want of a link."""

    card: int
    buffer: str
    offset: int
    nbytes: int
    source: int | None = None
    source_offset: int = 0
    other: str | None = None
    hosted: bool = False

    @property
    def source_buffer(self) -> str:
        return self.buffer if self.other is None else self.other


Buffers = tuple[tuple[int, str], ...]
"""Buffers as (card, name)."""


@attrs.frozen(eq=False, repr=False)
class Round(Value):
    """Buffers are made new, then filled; then those are freed that nobody reads any more."""

    made: Buffers
    fills: tuple[Fill, ...]
    freed: Buffers

    @property
    def moves(self) -> tuple[Fill, ...]:
        """What goes from card to card."""
        return tuple(f for f in self.fills if f.source is not None and f.source != f.card)

    @property
    def copies(self) -> tuple[Fill, ...]:
        """What is copied within a card."""
        return tuple(f for f in self.fills if f.source == f.card)

    @property
    def from_host(self) -> tuple[Fill, ...]:
        return tuple(f for f in self.fills if f.source is None)


@attrs.frozen(eq=False, repr=False)
class Reshard(Value):
    """Buffers that are `kept` as they are, the rounds that make the others, and those that come
    from the host at the end, when all is freed that is not wanted: for them a card has not room
    beside what it held.  `pages` go along, or none."""

    kept: Buffers
    rounds: tuple[Round, ...]
    rest: Buffers
    pages: PageMove | None = None


@attrs.frozen(eq=False, repr=False)
class Holdings(Value):
    """Where weights are: the plan by which each card holds some, and of which of them it may be
    taken (`own`), when they are wanted no more."""

    plans: dict[int, Plan]
    own: tuple[int, ...]

    @classmethod
    def of(cls, before: Plan, others: Sequence[Plan], cards: Sequence[int]) -> Holdings:
        """Of a replica that had the plan `before`, and others like it, as far as their `cards`
        still hold what they were given."""
        plans = {c: p for p in (before, *others) for c in p.cards if c in cards}
        return cls(plans, tuple(card for card in before.cards if card in cards))


def reshard(
    shape: ModelShape,
    held: Holdings,
    after: Plan,
    topology: Topology,
    *,
    context: int,
    room: Mapping[int, int],
    granule: int = DDR_ALIGN,
    pages: PageMove | None = None,
    mapped: bool = False,
    from_peers: bool = True,
) -> Reshard:
    """How the cards of `after` get what it gives them.  `room`: bytes free on each card beside the
    weights that it holds; `granule`: memory is taken in multiples of that.  `mapped`: weights all
    come from the host, which lets cards map its file; without `from_peers`, all that a card does
    not hold itself.

    A row that several peers hold comes from the one that has sent the least.  `pages` go along
    where a card that is left holds every one of them, and there is room.
    """

    def make(pages: PageMove | None) -> Reshard | None:
        old = _by_buffer(shape, held, context, pages)
        new = _wanted(shape, after, context, pages)
        return _Resharding(
            old, new, held.own, after.cards, topology, room, granule, pages, mapped, from_peers
        ).made()

    made = make(pages) or make(None)
    assert made is not None
    return made


_ByBuffer = dict[str, dict[int, Content | Pool]]


def _by_buffer(
    shape: ModelShape, held: Holdings, context: int, pages: PageMove | None
) -> _ByBuffer:
    """What cards hold; the KV pools of the replica itself where some of their pages are wanted."""
    found: _ByBuffer = {}
    for card, plan in held.plans.items():
        if pages is not None and card in held.own:
            for pool in pools(shape, plan, card, pages.before):
                found.setdefault(pool.buffer, {})[card] = pool
        for content in contents(shape, plan, card, context):
            found.setdefault(content.buffer, {})[card] = content
    return found


def _wanted(shape: ModelShape, after: Plan, context: int, pages: PageMove | None) -> _ByBuffer:
    """Pools first: of them there are seldom more than before, where there are more weights."""
    found: _ByBuffer = {}
    for card in after.cards:
        if pages is not None:
            for pool in pools(shape, after, card, pages.after):
                found.setdefault(pool.buffer, {})[card] = pool
        for content in contents(shape, after, card, context):
            found.setdefault(content.buffer, {})[card] = content
    return found


class _Resharding:
    def __init__(
        self,
        old: _ByBuffer,
        new: _ByBuffer,
        own: Sequence[int],
        cards: Sequence[int],
        topology: Topology,
        room: Mapping[int, int],
        granule: int,
        pages: PageMove | None,
        mapped: bool,
        from_peers: bool,
    ) -> None:
        self._old, self._new, self._own, self._cards = old, new, own, cards
        self._topology, self._granule = topology, granule
        self._pages, self._mapped, self._from_peers = pages, mapped, from_peers
        self._room = dict(room)
        # Who holds pages of a layer.
        self._pools: dict[int, list[tuple[int, Pool]]] = {}
        for by_card in old.values():
            for card, pool in by_card.items():
                if isinstance(pool, Pool):
                    self._pools.setdefault(pool.layer, []).append((card, pool))
                    if card in self._room:
                        self._room[card] -= self._bytes(pool)
        self._sent = {card: 0 for by_card in old.values() for card in by_card}
        self._kept = set[tuple[int, str]]()

    def made(self) -> Reshard | None:
        """None where not all pages can go along."""
        if not self._all_held():
            return None
        for buffer, new in self._new.items():
            old = self._old.get(buffer, {})
            self._kept.update(
                (c, buffer) for c in new if c in self._own and self._stays(old, c, new)
            )
        rounds, rest = list[Round](), list[tuple[int, str]]()
        unwanted = [
            b
            for b in self._old
            if (b not in self._new or self._is_mapped(b)) and self._layer(b) is None
        ]
        if any(self._frees(buffer) for buffer in unwanted):
            rounds.append(self._done(Round((), (), self._frees(*unwanted))))
        todo = list[tuple[str, ...]]()
        for buffers in self._families():
            if self._is_mapped(buffers[0]):
                rest += [(card, buffers[0]) for card in self._new[buffers[0]]]
            elif any(map(self._wants, buffers)) or self._frees(*buffers):
                todo.append(buffers)
        while todo:
            families, late = self._taken(todo)
            del todo[: len(families)]
            taken = [buffer for family in families for buffer in family]
            pairs = [(card, buffer) for buffer in taken for card in self._wants(buffer)]
            if any(self._layer(buffer) is not None for _, buffer in late):
                return None
            made = tuple(pair for pair in pairs if pair not in late)
            fills = tuple(fill for pair in made for fill in self._fills(*pair))
            rounds.append(self._done(Round(made, fills, self._frees(*taken))))
            rest += late
        return Reshard(tuple(sorted(self._kept)), tuple(rounds), tuple(rest), self._pages)

    def _is_mapped(self, buffer: str) -> bool:
        """Whether cards map what a buffer is to hold."""
        return self._mapped and self._layer(buffer) is None

    def _stays(
        self,
        old: Mapping[int, Content | Pool],
        card: int,
        new: Mapping[int, Content | Pool],
    ) -> bool:
        """Whether a card has the very buffer already that it wants."""
        if isinstance(new[card], Pool):
            return self._pages is not None and self._pages.stays and old.get(card) == new[card]
        return not self._mapped and old.get(card) == new[card]

    def _wants(self, buffer: str) -> list[int]:
        """The cards that a new buffer is to be made on."""
        return [card for card in self._new.get(buffer, ()) if (card, buffer) not in self._kept]

    def _frees(self, *buffers: str) -> Buffers:
        """What is there of them and not kept."""
        pairs = ((c, b) for b in buffers for c in self._old.get(b, {}) if c in self._own)
        return tuple(pair for pair in pairs if pair not in self._kept)

    def _order(self) -> list[str]:
        """All new buffers: every card's first one, then every card's second one, so that the cards
        of a pipeline, which have no buffer in common, get theirs at the same time."""
        lists = [
            [buffer for buffer, new in self._new.items() if card in new] for card in self._cards
        ]
        rows = itertools.zip_longest(*lists)
        return list(dict.fromkeys(b for row in rows for b in row if b is not None))

    def _families(self) -> list[tuple[str, ...]]:
        """The same, with the buffers together of which each is filled from what any of them was:
        all pools of a layer."""
        pools = dict[int, list[str]]()
        for buffer in dict.fromkeys((*self._new, *self._old)):
            layer = self._layer(buffer)
            if layer is not None:
                pools.setdefault(layer, []).append(buffer)
        found = dict[tuple[str, ...], None]()
        for buffer in self._order():
            layer = self._layer(buffer)
            found[(buffer,) if layer is None else tuple(pools[layer])] = None
        return list(found)

    def _layer(self, buffer: str) -> int | None:
        """The layer that a buffer has pages of."""
        some = next(iter(self._new.get(buffer, self._old.get(buffer, {})).values()))
        return some.layer if isinstance(some, Pool) else None

    def _bytes(self, content: Content | Pool) -> int:
        return -(-content.nbytes // self._granule) * self._granule

    def _taken(self, todo: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], Buffers]:
        """The buffers that the next round makes, and those of them for which a card has no room."""
        taken: list[tuple[str, ...]] = []
        late: Buffers = ()
        used, ranges = dict.fromkeys(self._cards, 0), 0
        for buffers in todo:
            sizes = Counter[int]()
            for buffer in buffers:
                for card in self._wants(buffer):
                    sizes[card] += self._bytes(self._new[buffer][card])
            full = [c for c, n in sizes.items() if used[c] + n > min(ROUND_BYTES, self._room[c])]
            ranges += self._ranges(*buffers)
            if taken and (full or ranges > RANGES_MAX):
                break
            taken.append(buffers)
            if full:
                # Alone in a round it may be larger than a round, not than the room.
                late = tuple((c, b) for b in buffers for c in full if sizes[c] > self._room[c])
                break
            for card, nbytes in sizes.items():
                used[card] += nbytes
        return taken, late

    def _done(self, made: Round) -> Round:
        """A round, when its cards have less room by it, or more."""
        for card, buffer in made.made:
            self._room[card] -= self._bytes(self._new[buffer][card])
        for card, buffer in made.freed:
            if card in self._room:
                self._room[card] += self._bytes(self._old[buffer][card])
        return made

    def _fills(self, card: int, buffer: str) -> Iterator[Fill]:
        wanted = self._new[buffer][card]
        if isinstance(wanted, Pool):
            return self._page_fills(card, wanted)
        return self._row_fills(card, wanted)

    def _row_fills(self, card: int, content: Content) -> Iterator[Fill]:
        buffer = content.buffer
        old = {c: its for c, its in self._old.get(buffer, {}).items() if isinstance(its, Content)}
        holders: dict[int, tuple[int, int]] = {}
        for holder, its in old.items():
            if holder == card or (self._from_peers and self._topology.is_up(holder, card)):
                begin, end = content.shared(its)
                if begin < end:
                    holders[holder] = begin, end
        edges = {0, content.nbytes, *(edge for ends in holders.values() for edge in ends)}
        fill: Fill | None = None
        for begin, end in itertools.pairwise(sorted(edges)):
            having = [c for c, (a, b) in holders.items() if a <= begin and end <= b]
            source = card if card in having else min(having, key=self._cost, default=None)
            if source is not None and source != card:
                self._sent[source] += end - begin
            if fill is not None and fill.source == source:
                fill = attrs.evolve(fill, nbytes=end - fill.offset)
                continue
            if fill is not None:
                yield fill
            at = 0 if source is None else old[source].offset(content.row(begin))
            fill = Fill(card, buffer, begin, end - begin, source, at)
        if fill is not None:
            yield fill

    def _cost(self, card: int) -> tuple[int, int]:
        return self._sent[card], card

    # --- pages ---

    def _all_held(self) -> bool:
        """Whether every page that is wanted is there, in so many ranges as rounds can move."""
        wanted = [
            (card, pool)
            for buffer in self._new
            for card, pool in self._new[buffer].items()
            if isinstance(pool, Pool)
        ]
        return all(
            self._holder(card, pool.layer, head) is not None
            for card, pool in wanted
            for head in range(pool.heads.start, pool.heads.stop)
        ) and all(self._ranges(*buffers) <= RANGES_MAX for buffers in self._families())

    def _ranges(self, *buffers: str) -> int:
        """The ranges of pages that new buffers are filled with, on all cards."""
        found = 0
        for buffer in buffers:
            for card in self._wants(buffer):
                pool = self._new[buffer][card]
                if isinstance(pool, Pool) and self._pages is not None:
                    found += 2 * pool.heads.size * len(self._pages.runs)
        return found

    def _holder(self, card: int, layer: int, head: int) -> tuple[int, Pool, bool] | None:
        """From whom a card gets a head's pages of a layer, where they lie there, and whether they
        go over the host: itself, else who has sent the least over a link, else over the host."""
        assert self._pages is not None
        holders = {
            c: pool
            for c, pool in reversed(self._pools.get(layer, ()))
            if pool.heads.start <= head < pool.heads.stop
        }
        if card in holders:
            return card, holders[card], False
        linked = [c for c in holders if self._topology.is_up(c, card)]
        if not linked and not self._pages.relayed:
            return None
        source = min(linked or holders, key=self._cost, default=None)
        return None if source is None else (source, holders[source], not linked)

    def _page_fills(self, card: int, pool: Pool) -> Iterator[Fill]:
        assert self._pages is not None
        for head, plane in pool.planes():
            found = self._holder(card, pool.layer, head)
            assert found is not None
            source, its, hosted = found
            other = its.buffer if its.buffer != pool.buffer else None
            for run in self._pages.runs:
                at, from_ = pool.offset(head, plane, run.after), its.offset(head, plane, run.before)
                nbytes = run.count * pool.page_bytes
                if source != card:
                    self._sent[source] += nbytes
                yield Fill(card, pool.buffer, at, nbytes, source, from_, other, hosted)


# --- checking ----------------------------------------------------------------------------


def check_reshard(
    shape: ModelShape, held: Holdings, after: Plan, made: Reshard, *, context: int
) -> None:
    """Raise PlanError, saying where, unless every byte of every buffer that `after` wants, and
    every page that goes along, is filled exactly once, with that very byte and from who holds it by
    then, and nothing else is left."""
    pages = made.pages
    old = _by_buffer(shape, held, context, pages)
    new = _wanted(shape, after, context, pages)
    there = {(card, buffer) for buffer, by_card in old.items() for card in by_card}
    own = {pair for pair in there if pair[0] in held.own}
    done: set[tuple[int, str]] = set()

    def finish(pair: tuple[int, str], how: str) -> None:
        card, buffer = pair
        if pair in done or card not in new.get(buffer, {}):
            raise PlanError(f"card {card}, {buffer}: {how}, but it is wanted once or not at all")
        done.add(pair)

    def free(pair: tuple[int, str]) -> None:
        if pair not in own or pair not in there:
            raise PlanError(f"card {pair[0]}, {pair[1]}: freed, but it is not there to be freed")
        there.remove(pair)

    for card, buffer in made.kept:
        finish((card, buffer), "kept")
        if (card, buffer) not in own or old[buffer][card] != new[buffer][card]:
            raise PlanError(f"card {card}, {buffer}: kept, but it holds something else")
        if isinstance(new[buffer][card], Pool) and not (pages and pages.stays):
            raise PlanError(f"card {card}, {buffer}: kept, but its pages get other numbers")
    for number, round_ in enumerate(made.rounds):
        filled: dict[tuple[int, str], int] = {}
        paged: dict[tuple[int, str], set[tuple[int, int, int]]] = {}
        for pair in round_.made:
            finish(pair, f"made in round {number}")
            if isinstance(new[pair[1]][pair[0]], Pool):
                paged[pair] = set()
            else:
                filled[pair] = 0
        for fill in sorted(round_.fills, key=lambda f: (f.card, f.buffer, f.offset)):
            pair = fill.card, fill.buffer
            if pair in paged and pages is not None:
                _check_pages(fill, new, old, there, pages, paged[pair])
                continue
            if filled.get(pair) != fill.offset:
                raise PlanError(
                    f"card {fill.card}, {fill.buffer}: round {number} fills it from {fill.offset} "
                    f"on, expected from {filled.get(pair)}"
                )
            filled[pair] += fill.nbytes
            content = new[fill.buffer][fill.card]
            assert isinstance(content, Content)
            _check_fill(fill, content, old.get(fill.buffer, {}), there)
        for (card, buffer), nbytes in filled.items():
            if nbytes != new[buffer][card].nbytes:
                raise PlanError(
                    f"card {card}, {buffer}: round {number} fills {nbytes} of "
                    f"{new[buffer][card].nbytes} bytes"
                )
        for (card, buffer), found in paged.items():
            pool = new[buffer][card]
            assert isinstance(pool, Pool) and pages is not None
            count = 2 * pool.heads.size * sum(run.count for run in pages.runs)
            if len(found) != count:
                raise PlanError(
                    f"card {card}, {buffer}: round {number} fills {len(found)} of {count} pages"
                )
        for pair in round_.freed:
            free(pair)
    for pair in made.rest:
        finish(pair, "taken from the host at the end")
        if isinstance(new[pair[1]][pair[0]], Pool):
            raise PlanError(f"card {pair[0]}, {pair[1]}: the host has no keys and values")
    missing = {(card, buffer) for buffer, by_card in new.items() for card in by_card} - done
    left = (own & there) - set(made.kept)
    for pairs, what in ((missing, "wanted, but not made"), (left, "not wanted, but not freed")):
        if pairs:
            card, buffer = min(pairs)
            raise PlanError(f"card {card}, {buffer}: {what}")


def _check_pages(
    fill: Fill,
    new: _ByBuffer,
    old: _ByBuffer,
    there: set[tuple[int, str]],
    pages: PageMove,
    found: set[tuple[int, int, int]],
) -> None:
    """Raise PlanError unless the source holds these very pages, and none of them is in `found`,
    which gets them."""
    where = f"card {fill.card}, {fill.buffer}, {fill.nbytes} bytes at {fill.offset}"
    if fill.source is None or (fill.source, fill.source_buffer) not in there:
        raise PlanError(f"{where}: card {fill.source} does not hold it (any more)")
    pool, its = new[fill.buffer][fill.card], old[fill.source_buffer][fill.source]
    if not (isinstance(pool, Pool) and isinstance(its, Pool) and its.layer == pool.layer):
        raise PlanError(f"{where}: card {fill.source} has no such pages in {fill.source_buffer}")
    size = pool.page_bytes
    if fill.nbytes <= 0 or fill.offset % size or fill.nbytes % size or fill.source_offset % size:
        raise PlanError(f"{where}: not whole pages of {size} bytes")
    numbers = {run.after + i: run.before + i for run in pages.runs for i in range(run.count)}
    for at in range(0, fill.nbytes, size):
        head, plane, page = pool.at(fill.offset + at)
        before = numbers.get(page)
        if not head < pool.heads.stop or (head, plane, before) != its.at(fill.source_offset + at):
            raise PlanError(
                f"{where}: card {fill.source} holds other pages at {fill.source_offset}"
            )
        if (head, plane, page) in found:
            raise PlanError(f"{where}: filled twice")
        found.add((head, plane, page))


def _check_fill(
    fill: Fill,
    content: Content,
    holders: Mapping[int, Content | Pool],
    there: set[tuple[int, str]],
) -> None:
    """Raise PlanError unless the source holds these very tiles."""
    where = f"card {fill.card}, {fill.buffer}, {fill.nbytes} bytes at {fill.offset}"
    if fill.nbytes <= 0 or fill.offset % content.tile_bytes or fill.nbytes % content.tile_bytes:
        raise PlanError(f"{where}: not whole tiles of {content.tile_bytes} bytes")
    if fill.source is None:
        return
    if (fill.source, fill.buffer) not in there:
        raise PlanError(f"{where}: card {fill.source} does not hold it (any more)")
    its = holders[fill.source]
    assert isinstance(its, Content)
    if fill.source_offset % its.tile_bytes or fill.source_offset + fill.nbytes > its.nbytes:
        raise PlanError(f"{where}: card {fill.source} has no such tiles at {fill.source_offset}")
    if content.part(fill.offset, fill.nbytes) != its.part(fill.source_offset, fill.nbytes):
        raise PlanError(f"{where}: card {fill.source} holds other rows at {fill.source_offset}")
