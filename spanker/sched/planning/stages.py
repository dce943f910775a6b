# SPDX-License-Identifier: Apache-2.0
"""The best row of stages: which cards, how many layers each.

A dynamic programme over (cards used, cards of the last stage) and, within it, layers done: one step
costs a stage's layers and the handover from the stage before.  A stage may have as many layers as
its cards have memory for.  Its price is that of `sched.cost`; only the choice of the next token,
which joins the last stage to the first, is not known on the way, unless it is given what the first
stage is: it is priced once a row is whole, and the bound goes without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.sched.plan import CardShare, Plan, Stage
from spanker.sched.planning.dividing import F64
from spanker.sched.planning.naming import plan_name
from spanker.sched.planning.options import First, Option, Options, Through
from spanker.sched.planning.pools import Kind, Pool, State, after
from spanker.sched.shares import Share
from spanker.values import Value

I64 = npt.NDArray[np.int64]
_NOTHING = Share(0, 0)


@attrs.frozen(eq=False, repr=False)
class Row(Value):
    """A row of stages.  `seconds` is the time of one step through it, `choose_s` of it for the
    choice of the token."""

    plan: Plan
    seconds: float
    choose_s: float


@attrs.frozen(eq=False, repr=False)
class Rows(Value):
    """Rows of stages, first the fastest, and the seconds that no row can beat."""

    rows: tuple[Row, ...]
    bound: float


@attrs.frozen(eq=False)
class _Reached:
    """All ways to have `kind` for the last stage so far, when `used` was used before it.

    By layers done, this stage's included: `seconds` and a `bound`, and where the best comes from:
    `begin`, the layers before, and which of the `options`.  `previous[before[l]]` is the stage
    before where l layers are done before this one.
    """

    used: State
    kind: Kind
    options: tuple[Option, ...]
    seconds: F64
    bound: F64
    begin: I64
    option: I64
    previous: tuple[State, ...]
    before: I64


@attrs.frozen(eq=False)
class _Before:
    """All that stages may follow on that use the same cards: by last stage and layers done, as
    `_Reached`; `sizes` are numbers of the last stages' cards."""

    kinds: tuple[State, ...]
    sizes: I64
    seconds: F64
    bound: F64


@attrs.frozen(eq=False)
class _End:
    """The same as the last stage of all, by `option`: for all layers, without the choice of the
    token, and what that takes if the first stage is given, or nothing, and at least."""

    reached: _Reached
    option: Option
    begin: int
    seconds: float
    bound: float
    choose_s: float
    least_choose_s: float


class Stages:
    """The rows of stages of one pool of cards, for one size of step; those that begin with the
    cards `kind` as `first`, or all."""

    def __init__(
        self, pool: Pool, options: Options, kind: Kind | None = None, first: First | None = None
    ) -> None:
        self._pool, self._options = pool, options
        self._first_kind, self._first = kind, first
        self._layers = options.layers
        # By how many cards of the next stage a card serves.
        self._served: F64 | None = None
        self._before: tuple[State, _Before] | None = None
        # By what is used in all, then by the last stage's counts.
        self._reached: dict[State, dict[State, _Reached]] = {}
        self._ends: dict[State, list[_End]] = {}

    def rows(self, most: int) -> Rows:
        """The best row for every number of cards of each class that can be used; of these the
        fastest, at most so many.  Where the first stage is not given they are the best but for the
        choice of the token, and nothing bounds that."""
        for used, kind in self._pool.pairs():
            if used in self._reached or (
                used == self._pool.empty and self._first_kind in (None, kind)
            ):
                self._extend(used, kind)
        ends = [end for ends in self._ends.values() for end in ends]
        bound = min((end.bound + end.least_choose_s for end in ends), default=math.inf)
        best = [
            min(ends, key=lambda end: end.seconds + end.choose_s) for ends in self._ends.values()
        ]
        best = sorted(
            (e for e in best if e.seconds < math.inf), key=lambda e: e.seconds + e.choose_s
        )
        rows = sorted((self._row(end) for end in best[:most]), key=lambda row: row.seconds)
        return Rows(tuple(rows), bound)

    # --- the dynamic programme --------------------------------------------------------------

    def _extend(self, used: State, kind: Kind) -> None:
        """Let a stage follow on all rows that use so many cards."""
        count = self._layers
        first = used == self._pool.empty
        previous: tuple[State, ...] = ()
        if first:
            entering = np.full(count + 1, np.inf)
            entering[0] = 0.0
            lower, before = entering, np.zeros(count + 1, np.int64)
        else:
            reached_so_far = self._all_before(used)
            previous = reached_so_far.kinds
            hand = self._handovers(reached_so_far, kind)[:, None]
            times = reached_so_far.seconds + hand
            before = times.argmin(axis=0)
            entering = times[before, np.arange(count + 1)]
            lower = (reached_so_far.bound + hand).min(axis=0)
        lasts = options = self._options.of(kind.cards)
        if self._first is not None and first:
            options, lasts = (self._first.option,), self._first.only
        elif self._first is not None:
            lasts = self._options.lasts(kind.cards)
        through, option = _best_of([o.through(entering, lower, first) for o in options])
        reached = _Reached(
            used=used,
            kind=kind,
            options=options,
            seconds=through.seconds,
            bound=through.bound,
            begin=through.begin,
            option=option,
            previous=previous,
            before=before,
        )
        total = after(used, kind)
        if np.isfinite(reached.seconds).any() or np.isfinite(reached.bound).any():
            self._reached.setdefault(total, {})[kind.counts] = reached
        for last in lasts:
            done = last.to_the_end(entering, lower, first)
            if np.isfinite(done.seconds) or np.isfinite(done.bound):
                end = _End(
                    reached,
                    last,
                    done.begin,
                    done.seconds,
                    done.bound,
                    *self._choice(last, reached),
                )
                self._ends.setdefault(total, []).append(end)

    def _choice(self, last: Option, reached: _Reached) -> tuple[float, float]:
        """What the choice of the token takes, and what it takes at least."""
        if self._first is None or self._first_kind is None:
            return 0.0, 0.0
        cards = self._pool.cards_of(reached.used, reached.kind)
        first = self._first.option
        embedders = [share.card for share in first.shares if not share.columns.empty]
        voters = [
            card for card, s in zip(cards, last.shares, strict=True) if not s.vocabulary.empty
        ]
        seconds = self._options.choose(embedders, voters, cards)
        if first.ends_settled and last.ends_settled:
            return seconds, seconds
        return seconds, self._options.least_choose(self._first_kind.cards, cards)

    def _all_before(self, used: State) -> _Before:
        """What a stage may follow on; asked for once for each stage that may come next."""
        if self._before is None or self._before[0] != used:
            entries = self._reached[used]
            self._before = (
                used,
                _Before(
                    kinds=tuple(entries),
                    sizes=np.array([sum(kind) for kind in entries]),
                    seconds=np.stack([entry.seconds for entry in entries.values()]),
                    bound=np.stack([entry.bound for entry in entries.values()]),
                ),
            )
        return self._before[1]

    def _handovers(self, before: _Before, target: Kind) -> F64:
        """From each stage before to the next one.  Where all links are alike, only the numbers of
        cards count: how many each card of the one has to serve, over links that are their own."""
        options = self._options
        if options.machine.contended or not options.uniform:
            # Of a class of which both have some, the one has those behind the other's.
            sources = map(self._pool.kind, before.kinds)
            return np.array(
                [
                    options.handover(kind.cards, self._pool.cards_of(kind.counts, target))
                    for kind in sources
                ]
            )
        if self._served is None:
            cards = options.cards
            served = [options.handover(cards[:1], cards[1:n]) for n in range(1, len(cards) + 1)]
            self._served = np.array(served)
        taken: F64 = self._served[-(-len(target.cards) // before.sizes)]
        return taken

    # --- what has been found ------------------------------------------------------------------

    def _row(self, end: _End) -> Row:
        """The plan of an end, and its whole price."""
        found: list[tuple[_Reached, Option, Share]] = []
        reached, option, begin, stop = end.reached, end.option, end.begin, self._layers
        while True:
            found.append((reached, option, Share(begin, stop)))
            if not reached.previous:
                break
            stop = begin
            reached = self._reached[reached.used][reached.previous[reached.before[stop]]]
            begin, option = int(reached.begin[stop]), reached.options[reached.option[stop]]
        found.reverse()
        stages = []
        for number, (part, option, layers) in enumerate(found):
            cards = self._pool.cards_of(part.used, part.kind)
            first, last = number == 0, number == len(found) - 1
            own = zip(cards, option.shares, strict=True)
            stages.append(Stage(layers, tuple(_placed(*x, first, last) for x in own)))
        plan = Plan(plan_name([len(stage.shares) for stage in stages]), tuple(stages))
        choose_s = self._options.choose(plan.embedders, plan.voters, stages[-1].cards)
        return Row(plan, end.seconds + choose_s, choose_s)


def _best_of(ways: Sequence[Through]) -> tuple[Through, I64]:
    """The best way through a stage by layers done, and its number; mostly there is one."""
    if len(ways) == 1:
        return ways[0], np.zeros(len(ways[0].seconds), np.int64)
    seconds = np.stack([way.seconds for way in ways])
    best = seconds.argmin(axis=0)
    at = np.arange(seconds.shape[1])
    begin = np.stack([way.begin for way in ways])[best, at]
    bound = np.stack([way.bound for way in ways]).min(axis=0)
    return Through(seconds[best, at], bound, begin), best


def _placed(card: int, share: CardShare, first: bool, last: bool) -> CardShare:
    """A share for a card, without what only the ends of a plan have where it is at none."""
    return attrs.evolve(
        share,
        card=card,
        columns=share.columns if first else _NOTHING,
        vocabulary=share.vocabulary if last else _NOTHING,
    )
