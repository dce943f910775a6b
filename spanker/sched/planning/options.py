# SPDX-License-Identifier: Apache-2.0
"""What sets of cards would do as a stage: the best shares, what they take, and what fits.

A stage's price is that of `sched.cost`, `|` being an exchange:

    first: embed |   then for each layer   [add] attention | project | add, ffn | project |   add
    last: then the output

The first `add` belongs to the layer before; the first layer of a stage has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.sched.cost.machine import Machine
from spanker.sched.cost.pieces import Pieces, layer_kinds
from spanker.sched.cost.rows import StepRows
from spanker.sched.layout import end_buffers, kv_page_bytes, layer_buffers, stage_work_buffers
from spanker.sched.plan import DDR_ALIGN, CardShare, Limits, ModelShape, Plan
from spanker.sched.planning.dimensions import Dimensions, Price, Shares
from spanker.sched.planning.dividing import F64, Gather
from spanker.sched.shares import Share

Fits = npt.NDArray[np.bool_]


@attrs.frozen(eq=False)
class Through:
    """What comes out of a stage, by layers done; see `stages._Reached`."""

    seconds: F64
    bound: F64
    begin: npt.NDArray[np.int64]


@attrs.frozen
class ToTheEnd:
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
    what no shares can beat, and what fits: `fits[first, last][stop, begin]`."""

    shares: tuple[CardShare, ...]
    times: Times
    bounds: Times
    fits: dict[tuple[bool, bool], Fits]

    def through(self, entering: F64, lower: F64, first: bool) -> Through:
        """Behind this stage, where `entering[l]` is the time before it with l layers done."""
        times = self._times(self.times, entering, first) + self.times.middle
        times[~self.fits[first, False]] = np.inf
        begin = times.argmin(axis=1)
        bounds = self._times(self.bounds, lower, first) + self.bounds.middle
        bounds[~self.fits[first, False]] = np.inf
        return Through(times.min(axis=1), bounds.min(axis=1), begin)

    def to_the_end(self, entering: F64, lower: F64, first: bool) -> ToTheEnd:
        fits = self.fits[first, True][-1]
        times = self._last(self.times, entering, first)
        times[~fits] = np.inf
        bounds = self._last(self.bounds, lower, first)
        bounds[~fits] = np.inf
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
        kinds, self.samples = layer_kinds(shape)
        self.kinds = np.array(kinds)
        self.usual = self.samples[int(np.bincount(self.kinds).argmax())]
        profile = machine.profile
        self._shared = profile.cores is not None or profile.shared_bytes_per_s is not None
        self._alone = Pieces(shape, machine, rows)
        self._tables: dict[tuple[int, ...], dict[object, F64]] = {}
        self._found: dict[tuple[int, ...], tuple[Option, ...]] = {}

    def of(self, cards: tuple[int, ...]) -> tuple[Option, ...]:
        """The options of a set of cards: the fastest shares, and shares by memory where those
        might not fit."""
        found = self._found.get(cards)
        if found is None:
            found = self._found[cards] = tuple(_Stage(self, cards).options())
        return found

    def pieces(self, cards: tuple[int, ...]) -> Pieces:
        """Prices where these cards compute at the same time."""
        if not self._shared:
            return self._alone
        return Pieces(self.shape, self.machine, self._rows, cards)

    def tables(self, cards: tuple[int, ...]) -> dict[object, F64]:
        """Where prices of single cards are kept: for all sets of cards, if they do not matter."""
        return self._tables.setdefault(cards if self._shared else (), {})

    def layer_bytes(self, share: CardShare) -> list[int]:
        """Memory of a card for each layer: weights and KV pages."""
        kv = self.limits.kv_pages * kv_page_bytes(self.shape, share, self.limits)
        kinds = self.kinds.tolist()
        weights = [
            sum(b.ddr_bytes for b in layer_buffers(self.shape, kinds.index(kind), share))
            for kind in range(len(self.samples))
        ]
        return [weights[kind] + -(-kv // DDR_ALIGN) * DDR_ALIGN for kind in kinds]

    def end_bytes(self, share: CardShare, first: bool, last: bool) -> int:
        """Memory of a card for all else.  How many cards vote is not known yet: as many as can."""
        share = attrs.evolve(
            share,
            columns=share.columns if first else Share(0, 0),
            vocabulary=share.vocabulary if last else Share(0, 0),
        )
        lists = len(self.cards) if first or last else 0
        work = stage_work_buffers(self.shape, share, self.limits, last=last, lists=lists)
        embedding, output = end_buffers(self.shape, share)
        return sum(b.ddr_bytes for b in (*work, *embedding, *output))

    def handover(self, sources: Sequence[int], targets: Sequence[int]) -> float:
        return self._alone.handover(sources, targets)

    def choose(self, plan: Plan) -> float:
        """What joins the last stage to the first."""
        return self._alone.choose(plan.voters, plan.embedders)


class _Stage:
    """The options of one set of cards."""

    def __init__(self, of: Options, cards: tuple[int, ...]) -> None:
        self._of, self._cards = of, cards
        self._pieces = of.pieces(cards)
        self._dimensions = Dimensions(
            self._pieces,
            of.limits.candidates,
            Gather(of.machine, cards),
            cards,
            [of.like[card] for card in cards],
            of.tables(cards),
        )

    def options(self) -> Iterator[Option]:
        fast = self._option(self._dimensions.best(self._of.usual))
        yield fast
        free = [self._of.free_bytes[card] for card in self._cards]
        if len(set(free)) > 1 and not fast.fits[True, True][-1, 0]:
            yield self._option(self._dimensions.by_weight(free))

    def _option(self, shares: Shares) -> Option:
        of, dimensions = self._of, self._dimensions
        exchange_s = self._pieces.exchange_s(len(self._cards))
        layers = [dimensions.layer(shares, sample) for sample in of.samples]
        embed, output = dimensions.embed(shares), dimensions.output(shares)
        add = max(map(self._pieces.add, self._cards))

        def times(which: Callable[[Price], float]) -> Times:
            with_add = np.array([which(layer.whole) for layer in layers])[of.kinds]
            saved = np.array([which(x.whole) - which(x.without_add) for x in layers])[of.kinds]
            return Times(
                layers=np.concatenate(([0.0], np.cumsum(with_add + 4 * exchange_s))),
                saved=np.append(saved, 0.0),
                embed=which(embed) + exchange_s,
                middle=add,
                output=which(output),
            )

        return Option(
            shares=shares.of_cards(self._cards),
            times=times(lambda price: price.seconds),
            bounds=times(lambda price: price.bound),
            fits=self._fits(shares.of_cards(self._cards)),
        )

    def _fits(self, shares: tuple[CardShare, ...]) -> dict[tuple[bool, bool], Fits]:
        """[first, last][stop, begin]: whether layers begin to stop fit into every card."""
        of, count = self._of, self._of.layers
        order = np.arange(count + 1)
        forward = order[:, None] > order[None, :]
        found = {(a, b): forward.copy() for a in (False, True) for b in (False, True)}
        seen = set()
        for share in shares:
            room = of.free_bytes[share.card]
            sizes = (
                of.like[share.card],
                *(s.size for s in attrs.astuple(share, recurse=False)[1:]),
            )
            if sizes in seen:
                continue
            seen.add(sizes)
            layers = _before(of.layer_bytes(share))
            spans = layers[:, None] - layers[None, :]
            for first, last in found:
                found[first, last] &= spans + of.end_bytes(share, first, last) <= room
        return found


def _before(values: Sequence[float]) -> F64:
    return np.concatenate(([0.0], np.cumsum(np.array(values, np.float64))))
