# SPDX-License-Identifier: Apache-2.0
"""What sets of cards would do as a stage: the best shares, what they take, and what fits.

A stage's price is that of `sched.cost`, `|` being an exchange:

    first: embed |   then for each layer   [add] attention | project | add, ffn | project |   add
    last: then the output

The first `add` belongs to the layer before; the first layer of a stage has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.sched.cost.machine import Machine
from spanker.sched.cost.pieces import Pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.layout import end_buffers, kv_page_bytes, layer_buffers, stage_work_buffers
from spanker.sched.plan import DDR_ALIGN, CardShare, Limits, ModelShape, dimensions
from spanker.sched.planning.dimensions import Dimensions, Ending, Price, Shares, parts_of
from spanker.sched.planning.dividing import F64, Gather
from spanker.sched.shares import Share
from spanker.values import Value

# Cards of a stage for which shares are looked for that fit, where all have as much memory.
_FILLED_CARDS_MAX = 8

Cards = tuple[int, ...]
Fits = npt.NDArray[np.bool_]
Which = Callable[[Price], float]
FitsAt = dict[tuple[bool, bool], Fits]
"""[first, last][stop, begin]"""


@attrs.frozen(eq=False)
class Through:
    """What comes out of a stage, by layers done; see `stages._Reached`."""

    seconds: F64
    bound: F64
    begin: npt.NDArray[np.int64]


@attrs.frozen(eq=False, repr=False)
class ToTheEnd(Value):
    """The same for the last stage and all layers."""

    seconds: float
    bound: float
    begin: int


@attrs.frozen(eq=False)
class Times:
    """Of a stage: `layers[i]` all layers before layer i, `saved[i]` what is saved where layer i is
    its first, `embed`, and what comes behind its last layer, the output or not."""

    layers: F64
    saved: F64
    embed: float
    middle: float
    output: float


@attrs.frozen(eq=False)
class Option:
    """One way for a set of cards to be a stage: `shares` as if it were first and last, its times,
    what no shares can beat, what fits, and what might fit with other shares.

    `bounding`: the bounds are for all shares, or, where `ends_settled`, for all in which the same
    cards have columns and vocabulary.
    """

    shares: tuple[CardShare, ...]
    times: Times
    bounds: Times
    fits: FitsAt
    might_fit: FitsAt
    bounding: bool
    ends_settled: bool

    def through(self, entering: F64, lower: F64, first: bool) -> Through:
        """Behind this stage, where `entering[l]` is the time before it with l layers done."""
        times = self._times(self.times, entering, first) + self.times.middle
        times[~self.fits[first, False]] = np.inf
        begin = times.argmin(axis=1)
        bounds = self._times(self.bounds, lower, first) + self.bounds.middle
        bounds[~self.might_fit[first, False] | (not self.bounding)] = np.inf
        return Through(times.min(axis=1), bounds.min(axis=1), begin)

    def to_the_end(self, entering: F64, lower: F64, first: bool) -> ToTheEnd:
        fits = self.fits[first, True][-1]
        times = self._last(self.times, entering, first)
        times[~fits] = np.inf
        bounds = self._last(self.bounds, lower, first)
        bounds[~self.might_fit[first, True][-1] | (not self.bounding)] = np.inf
        begin = int(times.argmin())
        return ToTheEnd(float(times[begin]), float(bounds.min()), begin)

    def _times(self, of: Times, entering: F64, first: bool) -> F64:
        """(stop, begin)"""
        before = entering - of.layers - of.saved + (of.embed if first else 0.0)
        times: F64 = of.layers[:, None] + before[None, :]
        return times

    def _last(self, of: Times, entering: F64, first: bool) -> F64:
        before = entering - of.layers - of.saved + (of.embed if first else 0.0)
        times: F64 = before + (of.layers[-1] + of.output)
        return times


@attrs.frozen(eq=False, repr=False)
class First(Value):
    """A set of cards as the first stage: `option` where more stages follow, `only` where none does;
    the same cards have columns of the embedding in all of them."""

    option: Option
    only: tuple[Option, ...]


class Options:
    """Options of sets of cards, for one model and one size of step."""

    def __init__(
        self,
        shape: ModelShape,
        machine: Machine,
        rows: StepRows,
        limits: Limits,
        free_bytes: Sequence[int],
        like: dict[int, int],
    ) -> None:
        self.shape = shape
        self.uniform = machine.uniform
        self.cards = machine.cards
        self.layers = len(shape.layers)
        self.machine, self._rows, self.limits = machine, rows, limits
        self.free_bytes = free_bytes
        # Cards with the same number there are alike.
        self.like = like
        kinds, self.samples = shape.kinds
        self.kinds = np.array(kinds)
        self.usual = self.samples[int(np.bincount(self.kinds).argmax())]
        self.candidates = min(limits.candidates, shape.vocabulary)
        self.alone = Pieces(shape, machine, rows)
        self._tables: dict[tuple[int, ...], dict[object, F64]] = {}
        self._layer_bytes: dict[tuple[int, ...], list[int]] = {}
        self._end_bytes: dict[tuple[int, ...], int] = {}
        self._stages: dict[tuple[int, ...], _Stage] = {}
        self._handovers: dict[tuple[Cards, Cards], float] = {}
        # What no choice of a token takes longer than.
        self.choose_most_s = self.alone.choose_most(machine.cards)

    def of(self, cards: tuple[int, ...]) -> tuple[Option, ...]:
        """The options of a set of cards: the fastest shares, and shares by memory where those
        might not fit."""
        return self._stage(cards).options

    def firsts(self, cards: tuple[int, ...]) -> tuple[First, ...]:
        """The options of a first stage, by which cards have columns of the embedding."""
        return self._stage(cards).firsts

    def lasts(self, cards: tuple[int, ...]) -> tuple[Option, ...]:
        """The options of a last stage, by which cards have rows of the vocabulary."""
        return self._stage(cards).lasts

    def _stage(self, cards: tuple[int, ...]) -> _Stage:
        found = self._stages.get(cards)
        if found is None:
            found = self._stages[cards] = _Stage(self, cards)
        return found

    def pieces(self, cards: tuple[int, ...]) -> Pieces:
        """Prices where these cards compute at the same time."""
        if not self.machine.contended:
            return self.alone
        return Pieces(self.shape, self.machine, self._rows, cards)

    def tables(self, cards: tuple[int, ...]) -> dict[object, F64]:
        """Where prices of single cards are kept: for all sets of cards, if they do not matter."""
        return self._tables.setdefault(cards if self.machine.contended else (), {})

    def layer_bytes(self, share: CardShare) -> list[int]:
        """Memory of a card for each layer: weights and KV pages."""
        kv_heads = share.kv_heads(self.shape.group).size
        key = share.heads.size, kv_heads, share.hidden.size, share.ffn.size
        found = self._layer_bytes.get(key)
        if found is None:
            found = self._layer_bytes[key] = self._find_layer_bytes(share)
        return found

    def _find_layer_bytes(self, share: CardShare) -> list[int]:
        kv = self.limits.kv_pages * kv_page_bytes(self.shape, share, self.limits)
        # Whose copy it keeps is not known yet: about as much again.
        kv *= 1 + self.limits.kv_copies
        kinds = self.kinds.tolist()
        weights = [
            sum(b.ddr_bytes for b in layer_buffers(self.shape, kinds.index(kind), share))
            for kind in range(len(self.samples))
        ]
        return [weights[kind] + -(-kv // DDR_ALIGN) * DDR_ALIGN for kind in kinds]

    def end_bytes(self, share: CardShare, first: bool, last: bool, voters: int) -> int:
        """Memory of a card for all else, where so many cards vote."""
        columns = share.columns.size if first else 0
        vocabulary = share.vocabulary.size if last else 0
        kv_heads = share.kv_heads(self.shape.group).size
        key = share.heads.size, kv_heads, share.ffn.size, columns, vocabulary, last, voters
        found = self._end_bytes.get(key)
        if found is None:
            ends = attrs.evolve(share, columns=Share(0, columns), vocabulary=Share(0, vocabulary))
            found = self._end_bytes[key] = self._find_end_bytes(ends, last, voters)
        return found

    def _find_end_bytes(self, share: CardShare, last: bool, voters: int) -> int:
        lists = 0 if share.columns.empty and share.vocabulary.empty else voters
        copied = share.kv_heads(self.shape.group).size * self.limits.kv_copies
        work = stage_work_buffers(
            self.shape, share, self.limits, last=last, lists=lists, copied=copied
        )
        embedding, output = end_buffers(self.shape, share)
        return sum(b.ddr_bytes for b in (*work, *embedding, *output))

    def handover(self, sources: Cards, targets: Cards) -> float:
        # The same two stages meet after all rows of stages that the first one can end.
        found = self._handovers.get((sources, targets))
        if found is None:
            found = self.pieces(sources).handover(sources, targets).seconds
            self._handovers[sources, targets] = found
        return found

    def choose(self, embedders: Sequence[int], voters: Sequence[int], last: Cards) -> float:
        """What joins the `last` stage to the first."""
        return self.pieces(last).choose(voters, embedders)

    def least_choose(self, first: Cards, last: Cards) -> float:
        """The least that can take, whoever votes and embeds."""
        return min(self.alone.choose((voter,), (card,)) for voter in last for card in first)


class _Stage:
    """The options of one set of cards."""

    def __init__(self, of: Options, cards: tuple[int, ...]) -> None:
        self._of, self._cards = of, cards
        self._pieces = of.pieces(cards)
        self._might_fit = self._fits_at_all()
        self._dimensions = self._dimensions_of(self._pieces, of.tables(cards))
        # Cards in each other's way are no faster than each would be alone.
        self._bounding = self._dimensions
        if of.machine.contended:
            self._bounding = self._dimensions_of(of.alone, of.tables(()))

    def _dimensions_of(self, pieces: Pieces, tables: dict[object, F64]) -> Dimensions:
        of, cards = self._of, self._cards
        like = [of.like[card] for card in cards]
        gather = Gather(of.machine, cards, pieces.exchange_s(len(cards)))
        return Dimensions(pieces, of.candidates, gather, cards, like, tables)

    @functools.cached_property
    def options(self) -> tuple[Option, ...]:
        fast = self._option(self._fast)
        return (fast, *self._by_memory(fast))

    @functools.cached_property
    def firsts(self) -> tuple[First, ...]:
        fast = self.options[0]
        columns, vocabulary = self._ends
        found = [tuple(self._with_ends(fast, c, v) for v in vocabulary) for c in columns]
        if not found:
            return tuple(First(option, (option,)) for option in self.options)
        others = [(option,) for option in self.options[1:]]
        return tuple(First(only[0], only) for only in (*found, *others))

    @functools.cached_property
    def lasts(self) -> tuple[Option, ...]:
        firsts = self.firsts
        return (*firsts[0].only, *(first.option for first in firsts if not first.option.bounding))

    @functools.cached_property
    def _fast(self) -> Shares:
        return self._dimensions.best(self._of.usual)

    @functools.cached_property
    def _ends(self) -> tuple[list[Ending], list[Ending]]:
        """The shares of columns and vocabulary that can be best; none where those are not known."""
        found = None if self._of.machine.contended else self._dimensions.ends()
        if found is None:
            return [], []
        return self._worth(found[0]), self._worth(found[1])

    def _worth(self, ends: list[Ending]) -> list[Ending]:
        """Without those that take more than the choice of the token can save."""
        most_s = ends[0].price.seconds + self._of.choose_most_s
        return [end for end in ends if end.price.bound <= most_s]

    def _by_memory(self, fast: Option) -> Iterator[Option]:
        free = [self._of.free_bytes[card] for card in self._cards]
        short = any((self._might_fit[at] & ~fast.fits[at]).any() for at in fast.fits)
        if short and (len(set(free)) > 1 or len(free) <= _FILLED_CARDS_MAX):
            yield self._option(self._dimensions.by_weight(free), bounding=False)
            yield self._option(self._filling(free), bounding=False)

    def _filling(self, free: Sequence[int]) -> Shares:
        """Shares that leave the cards room as alike as can be, with as many layers as might fit:
        each unit, the largest first, goes where there is most."""
        of, shape, n = self._of, self._of.shape, len(self._cards)
        order = np.arange(of.layers + 1)
        spans = np.where(self._might_fit[True, True], order[:, None] - order[None, :], 0)
        layers = max(int(spans.max()), 1)
        names = [name for name, _, _ in dimensions(shape, True, True)]

        def nbytes(field: str, size: int) -> float:
            own = {name: Share(0, size if name == field else 0) for name in names}
            share = CardShare(self._cards[0], **own)
            return sum(of.layer_bytes(share)[:layers]) + of.end_bytes(share, True, True, n)

        rooms = np.array(free) - nbytes("heads", 0)
        units = []
        for field, unit, total in dimensions(shape, True, True):
            # Cards that share a KV head both have all of it.
            unit = shape.group if field == "heads" and shape.kv_heads >= n else unit
            units.append((nbytes(field, unit) - nbytes(field, 0), field, unit, total))
        parts = {}
        for size, field, unit, total in sorted(units, reverse=True):
            counts = [0] * n
            for _ in range(-(-total // unit)):
                most = int(rooms.argmax())
                counts[most] += 1
                rooms[most] -= size
            parts[field] = parts_of(counts, unit, total)
        return self._dimensions.shares(**parts)

    def _option(self, shares: Shares, *, bounding: bool = True) -> Option:
        own = shares.of_cards(self._cards)
        return Option(
            shares=own,
            times=self._times(self._dimensions, shares, lambda price: price.seconds),
            bounds=self._times(self._bounding, shares, lambda price: price.bound),
            fits=self._fits(own),
            might_fit=self._might_fit,
            bounding=bounding,
            ends_settled=False,
        )

    def _with_ends(self, fast: Option, columns: Ending, vocabulary: Ending) -> Option:
        """The fastest shares but for these; none with the same users of them are faster."""
        shares = attrs.evolve(self._fast, columns=columns.parts, vocabulary=vocabulary.parts)
        own = shares.of_cards(self._cards)
        embed, output = columns.price, vocabulary.price
        exchange_s = self._pieces.exchange_s(len(self._cards))
        return attrs.evolve(
            fast,
            shares=own,
            times=attrs.evolve(fast.times, embed=embed.seconds + exchange_s, output=output.seconds),
            bounds=attrs.evolve(fast.bounds, embed=embed.bound + exchange_s, output=output.bound),
            fits=self._fits(own),
            ends_settled=True,
        )

    def _times(self, dimensions: Dimensions, shares: Shares, which: Which) -> Times:
        of, pieces = self._of, dimensions.pieces
        exchange_s = pieces.exchange_s(len(self._cards))
        layers = [dimensions.layer(shares, sample) for sample in of.samples]
        with_add = np.array([which(layer.whole) for layer in layers])[of.kinds]
        saved = np.array([which(x.whole) - which(x.without_add) for x in layers])[of.kinds]
        return Times(
            layers=np.concatenate(([0.0], np.cumsum(with_add + 4 * exchange_s))),
            saved=np.append(saved, 0.0),
            embed=which(dimensions.embed(shares)) + exchange_s,
            middle=max(map(pieces.add, self._cards)),
            output=which(dimensions.output(shares)),
        )

    def _fits(self, shares: tuple[CardShare, ...]) -> FitsAt:
        """Whether layers begin to stop fit into every card."""
        of = self._of
        found = _all_spans(of.layers)
        # How many cards vote is not known where the last stage is another one: as many as can.
        voters = sum(not share.vocabulary.empty for share in shares)
        seen = set()
        for share in shares:
            room = of.free_bytes[share.card]
            sizes = tuple(s.size for s in attrs.astuple(share, recurse=False)[1:])
            key = of.like[share.card], share.kv_heads(of.shape.group).size, sizes
            if key in seen:
                continue
            seen.add(key)
            layers = _before(of.layer_bytes(share))
            spans = layers[:, None] - layers[None, :]
            for first, last in found:
                lists = voters if last else len(of.cards)
                found[first, last] &= spans + of.end_bytes(share, first, last, lists) <= room
        return found

    def _fits_at_all(self) -> FitsAt:
        """Whether some shares of layers begin to stop might fit: what every card has, and together
        what is cut."""
        of, cards = self._of, self._cards
        found = _all_spans(of.layers)
        shape = of.shape
        none = _nothing(cards[0])
        sizes = shape.heads, shape.hidden, shape.ffn, shape.vocabulary, shape.hidden
        whole = CardShare(cards[0], *(Share(0, size) for size in sizes))
        fixed, divided = _before(of.layer_bytes(none)), _before(of.layer_bytes(whole))
        every = fixed[:, None] - fixed[None, :]
        cut = divided[:, None] - divided[None, :] - every
        for first, last in found:
            needs = every + of.end_bytes(none, first, last, 0)
            ends = of.end_bytes(whole, first, last, 1) - of.end_bytes(none, first, last, 0)
            free = [of.free_bytes[card] for card in cards]
            found[first, last] &= needs <= min(free)
            found[first, last] &= len(cards) * needs + cut + ends <= sum(free)
        return found


def _nothing(card: int) -> CardShare:
    return CardShare(card, *(Share(0, 0),) * 5)


def _all_spans(layers: int) -> FitsAt:
    order = np.arange(layers + 1)
    forward = order[:, None] > order[None, :]
    return {(a, b): forward.copy() for a in (False, True) for b in (False, True)}


def _before(values: Sequence[float]) -> F64:
    return np.concatenate(([0.0], np.cumsum(np.array(values, np.float64))))
