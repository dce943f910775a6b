# SPDX-License-Identifier: Apache-2.0
"""The best row of stages: which cards, how many layers each.

A dynamic programme over (cards used, cards of the last stage) and, within it, layers done: one step
costs a stage's layers and the handover from the stage before.  A stage may have as many layers as
its cards have memory for.  Its price is that of `sched.cost`; only the choice of the next token,
which joins the last stage to the first, is not known on the way, unless it is given what the first
stage is: it is priced once a row is whole, and the bound goes without.
"""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt

from spanker.sched.plan import CardShare, Plan, Stage
from spanker.sched.planning.dividing import F64
from spanker.sched.planning.naming import plan_name
from spanker.sched.planning.options import Options
from spanker.sched.planning.pools import Kind, Pool, State, after
from spanker.sched.shares import Share

I64 = npt.NDArray[np.int64]
_NOTHING = Share(0, 0)


@attrs.frozen
class Row:
    """A row of stages.  `seconds` is the time of one step through it, `choose_s` of it for the
    choice of the token; `bound` is what no row that uses as many cards of each class can beat."""

    plan: Plan
    seconds: float
    bound: float
    choose_s: float


@attrs.frozen(eq=False)
class _Reached:
    """All ways to have `kind` for the last stage so far, when `used` was used before it.

    By layers done, this stage's included: `seconds` and a `bound`, and where the best comes from:
    `begin`, the layers before, and `option`.  `previous[before[l]]` is the stage before where l
    layers are done before this one.
    """

    used: State
    kind: Kind
    seconds: F64
    bound: F64
    begin: I64
    option: I64
    previous: tuple[State, ...]
    before: I64


@attrs.frozen(eq=False)
class _End:
    """The same as the last stage of all: for all layers."""

    reached: _Reached
    seconds: float
    bound: float
    begin: int
    option: int


class Stages:
    """The rows of stages of one pool of cards, for one size of step; those with a certain `first`
    stage, or all."""

    def __init__(self, pool: Pool, options: Options, first: Kind | None = None) -> None:
        self._pool, self._options, self._first = pool, options, first
        self._layers = options.layers
        self._handovers: dict[tuple[int, ...], float] = {}
        # By what is used in all, then by the last stage's counts.
        self._reached: dict[State, dict[State, _Reached]] = {}
        self._ends: dict[State, list[_End]] = {}

    def rows(self, most: int) -> list[Row]:
        """The best row for every number of cards of each class that can be used; of these the
        fastest, at most so many, first the fastest of all."""
        for used, kind in self._pool.pairs():
            if used in self._reached or (
                used == self._pool.empty and (self._first is None or kind == self._first)
            ):
                self._extend(used, kind)
        found = sorted(self._ends.values(), key=lambda ends: min(end.seconds for end in ends))
        rows = [self._best_row(ends) for ends in found[:most]]
        return sorted(rows, key=lambda row: row.seconds)

    def _best_row(self, ends: list[_End]) -> Row:
        """Of rows that use the same cards; the choice counts where the first stage is given."""
        if self._first is None:
            row = self._row(min(ends, key=lambda end: end.seconds))
            bound = min(end.bound for end in ends)
        else:
            rows = [self._row(end) for end in ends]
            row = min(rows, key=lambda row: row.seconds)
            bound = min(row.bound for row in rows)
        return attrs.evolve(row, bound=min(bound, row.seconds))

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
            entries = self._reached[used]
            previous = tuple(entries)
            hand = np.array([[self._handover(self._pool.kind(k), kind)] for k in previous])
            times = np.stack([entries[k].seconds for k in previous]) + hand
            before, entering = times.argmin(axis=0), times.min(axis=0)
            lower = (np.stack([entries[k].bound for k in previous]) + hand).min(axis=0)
        options = self._options.of(kind.cards)
        middles = [option.through(entering, lower, first) for option in options]
        seconds = np.stack([m.seconds for m in middles])
        option = seconds.argmin(axis=0)
        at = np.arange(count + 1)
        reached = _Reached(
            used=used,
            kind=kind,
            seconds=seconds[option, at],
            bound=np.stack([m.bound for m in middles]).min(axis=0),
            begin=np.stack([m.begin for m in middles])[option, at],
            option=option,
            previous=previous,
            before=before,
        )
        total = after(used, kind)
        if np.isfinite(reached.seconds).any():
            self._reached.setdefault(total, {})[kind.counts] = reached
        lasts = [option.to_the_end(entering, lower, first) for option in options]
        best = min(range(len(lasts)), key=lambda i: lasts[i].seconds)
        if np.isfinite(lasts[best].seconds):
            bound = min(last.bound for last in lasts)
            end = _End(reached, lasts[best].seconds, bound, lasts[best].begin, best)
            self._ends.setdefault(total, []).append(end)

    def _handover(self, source: Kind, target: Kind) -> float:
        """From a stage to the next.  Where all links are alike, only the numbers of cards count:
        how many each card of the one has to serve, and how many links that are their own."""
        a, b = source.cards, target.cards
        if not self._options.uniform:
            # Whoever stands for its class may be in both; then it is not itself.
            return self._options.handover(a, b)
        key = (-(-len(b) // len(a)),)
        if key not in self._handovers:
            cards = self._options.cards
            self._handovers[key] = self._options.handover(cards[:1], cards[1 : 1 + key[0]])
        return self._handovers[key]

    # --- what has been found ------------------------------------------------------------------

    def _row(self, end: _End) -> Row:
        """The plan of an end, and its whole price."""
        found: list[tuple[_Reached, int, int, int]] = []
        reached, begin, option, stop = end.reached, end.begin, end.option, self._layers
        while True:
            found.append((reached, begin, stop, option))
            if not reached.previous:
                break
            stop = begin
            reached = self._reached[reached.used][reached.previous[reached.before[stop]]]
            begin, option = int(reached.begin[stop]), int(reached.option[stop])
        found.reverse()
        stages = []
        for number, (part, begin, stop, which) in enumerate(found):
            cards = self._pool.cards_of(part.used, part.kind)
            shares = self._options.of(part.kind.cards)[which].shares
            first, last = number == 0, number == len(found) - 1
            stages.append(
                Stage(
                    Share(begin, stop),
                    tuple(_placed(*x, first, last) for x in zip(cards, shares, strict=True)),
                )
            )
        plan = Plan(plan_name([len(stage.shares) for stage in stages]), tuple(stages))
        choose_s = self._options.choose(plan)
        return Row(plan, end.seconds + choose_s, end.bound + choose_s, choose_s)


def _placed(card: int, share: CardShare, first: bool, last: bool) -> CardShare:
    """A share for a card, without what only the ends of a plan have where it is at none."""
    return attrs.evolve(
        share,
        card=card,
        columns=share.columns if first else _NOTHING,
        vocabulary=share.vocabulary if last else _NOTHING,
    )
