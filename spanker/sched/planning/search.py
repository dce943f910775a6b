# SPDX-License-Identifier: Apache-2.0
"""The search: what is asked, what is considered, what comes out.

One replica of all cards, or several, each with its part of the batch; for each replica the best row
of stages for every number of cards; beside them the plans with names.  What is chosen decodes most
tokens per second by the cost model.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import attrs

from spanker.errors import CardMemoryError
from spanker.sched.bandwidth import CardSpeed
from spanker.sched.cost import Machine, Pieces, StepRows, decode_fleet
from spanker.sched.cost.commands import INT8
from spanker.sched.cost.phases import phases
from spanker.sched.layout import card_bytes, fit_kv_pages
from spanker.sched.plan import FleetPlan, on_cards, tensor_pipeline
from spanker.sched.planning.naming import fleet_name
from spanker.sched.planning.options import Options
from spanker.sched.planning.partitions import Groups, deals, every_deal
from spanker.sched.planning.pools import Pool, classes
from spanker.sched.planning.request import Candidate, Outcome, Request
from spanker.sched.planning.stages import Row, Rows, Stages
from spanker.sched.planning.words import reason
from spanker.sched.shares import split
from spanker.sched.topology import Link, LinkState, Topology

# Sets of cards that can be the first stage, up to which each is tried for itself.
_FIRSTS_MAX = 40
# Cards up to which every way of dealing them to replicas is tried.
_DEALT_MAX = 5
# Of a bound: what is rounding.
_ROUNDING = 1e-9


def search(request: Request) -> Outcome:
    """Find the best plan.

    Does not block and does no I/O; a second for 64 cards and 80 layers.  Raises CardMemoryError
    where the model fits into no set of the cards.
    """
    begin = time.perf_counter()
    found = _Search(request)
    candidates = found.candidates()
    if not candidates:
        raise _does_not_fit(request)
    chosen = candidates[0]
    gap = max(found.rate_bound / chosen.tokens_per_second - 1, 0.0)
    gap = 0.0 if gap < _ROUNDING else gap
    why = reason(request.profile, len(request.topology.cards), candidates, gap)
    plan = attrs.evolve(chosen.plan, reason=why)
    if len(plan.replicas) == 1:
        plan = attrs.evolve(plan, replicas=(attrs.evolve(plan.replicas[0], reason=why),))
    chosen = attrs.evolve(chosen, plan=plan)
    return Outcome(
        request,
        chosen,
        (chosen, *candidates[1:]),
        gap,
        why,
        time.perf_counter() - begin,
    )


class _Search:
    def __init__(self, request: Request) -> None:
        self._request = request
        self._machine = Machine(request.profile, request.topology)
        self._groups: Groups = classes(self._machine, request.free_bytes)
        self._like = {card: i for i, group in enumerate(self._groups) for card in group}
        self._options: dict[int, Options] = {}
        self._rows: dict[tuple[tuple[tuple[int, int], ...], int, int], Rows] = {}
        self._works: dict[int, tuple[float, float]] = {}
        self._ideal: _Search | None = None
        # Tokens per second that no plan can beat.
        self.rate_bound = math.inf
        self._whole_bound = 0.0

    def candidates(self) -> list[Candidate]:
        """The best of all that was considered, the fastest first; of equal ones that with fewest
        cards."""
        found = [self._priced(row) for row in self._whole()]
        found += self._replicated()
        found += (self._priced(plan) for plan in self._named() if self._fits(plan))
        found.sort(key=lambda c: (-c.tokens_per_second, len(c.plan.cards), c.plan.name))
        # Of plans that differ in nothing that shows, one.
        first: dict[tuple[str, int, str], Candidate] = {}
        for c in found:
            first.setdefault((c.plan.name, len(c.plan.cards), f"{c.tokens_per_second:.9g}"), c)
        return list(first.values())

    def _priced(self, plan: FleetPlan | Row) -> Candidate:
        request = self._request
        plan = FleetPlan.of(plan.plan) if isinstance(plan, Row) else plan
        cost = decode_fleet(
            request.shape,
            plan,
            request.profile,
            request.topology,
            batch=request.batch,
            context=request.position,
            candidates=request.limits.candidates,
        )
        return Candidate(plan, cost)

    # --- one replica ------------------------------------------------------------------------

    def _whole(self) -> Sequence[Row]:
        """The best rows of stages for the whole batch, and what bounds the speed of any plan."""
        found = self._rows_of(self._groups, self._request.batch, self._request.keep)
        self._whole_bound = self._rate(self._request.batch, found)
        self.rate_bound = max(self._whole_bound, self._replicas_bound())
        return found.rows

    def _rate(self, sequences: int, found: Rows) -> float:
        """Tokens per second that no row of stages can beat."""
        if found.bound == math.inf:
            return 0.0
        by_rows = sequences / max(found.bound + self._request.profile.step_s, 1e-300)
        return min(by_rows, self._work_bound(sequences, 1))

    def _replicas_bound(self) -> float:
        """The same for replicas: what all cards together read and multiply, however they are
        grouped."""
        batch = self._request.batch
        most = min(batch, len(self._machine.cards))
        return max((self._work_bound(-(-batch // n), n) for n in range(2, most + 1)), default=0.0)

    def _work_bound(self, part: int, replicas: int) -> float:
        """Tokens per second of replicas that have at most so many sequences each."""
        profile = self._request.profile
        speeds = [profile.card(card) for card in self._machine.cards]
        memory = profile.local_ddr_bytes_per_s * sum(speed.memory for speed in speeds)
        if profile.shared_bytes_per_s is not None:
            memory = min(memory, replicas * profile.shared_bytes_per_s)
        multiply = profile.int8_madds_per_s * sum(speed.compute for speed in speeds)
        if part not in self._works:
            self._works[part] = self._work(part)
        nbytes, madds = self._works[part]
        return part * min(memory / nbytes, multiply / max(madds, 1.0))

    def _work(self, sequences: int) -> tuple[float, float]:
        """Bytes and quantised multiply-adds of a step, at least, however it is spread."""
        request = self._request
        whole = tensor_pipeline(request.shape, 1, 1)
        rows = StepRows.decode(sequences, request.position)
        pieces = Pieces(request.shape, self._machine, rows)
        nbytes = madds = 0.0
        for phase in phases(pieces, whole, 0, self._options_for(sequences).candidates):
            for command_bytes, work, rate in phase.runs[0]:
                nbytes += phase.count * command_bytes
                madds += phase.count * work if rate == INT8 else 0.0
        return nbytes, madds

    def _rows_of(self, groups: Groups, sequences: int, most: int = 1) -> Rows:
        """The best rows, each of other numbers of cards of each class; all are of `groups`."""
        signature = tuple((self._like[group[0]], len(group)) for group in groups)
        known = self._rows.get((signature, sequences, most))
        representatives = tuple(self._groups[like][:count] for like, count in signature)
        if known is None:
            known = self._find_rows(representatives, sequences, most)
            self._rows[signature, sequences, most] = known
        if groups == representatives:
            return known
        names = {
            old: new
            for mine, theirs in zip(representatives, groups, strict=True)
            for old, new in zip(mine, theirs, strict=True)
        }
        cards = [names.get(card, card) for card in range(max(self._machine.cards) + 1)]
        rows = tuple(attrs.evolve(row, plan=on_cards(row.plan, cards)) for row in known.rows)
        return Rows(rows, known.bound)

    def _find_rows(self, groups: Groups, sequences: int, most: int) -> Rows:
        pool, options = Pool(groups), self._options_for(sequences)
        found = Stages(pool, options).rows(most)
        if not pool.complete:
            # Other rows than were looked at may be faster.
            return Rows(found.rows, self._ideal_bound(pool.size, sequences))
        firsts = [kind for used, kind in pool.pairs() if used == pool.empty]
        if not _only_choice(found) or len(firsts) > _FIRSTS_MAX:
            return found
        # What the choice of the token takes depends on the first stage: try each that may be best.
        best = {tuple(sorted(row.plan.cards)): row for row in found.rows}
        least, bound = found.rows[0].seconds, math.inf
        for kind in firsts:
            begun = Stages(pool, options, kind).rows(1)
            usual = options.of(kind.cards)[0]
            for first in options.firsts(kind.cards):
                more_s = first.option.bounds.embed - usual.bounds.embed
                if begun.bound + max(more_s, 0.0) >= least:
                    continue
                mine = Stages(pool, options, kind, first).rows(most)
                bound = min(bound, mine.bound)
                for row in mine.rows:
                    used = tuple(sorted(row.plan.cards))
                    best[used] = min(best.get(used, row), row, key=lambda r: r.seconds)
                    least = min(least, row.seconds)
        rows = sorted(best.values(), key=lambda row: row.seconds)
        return Rows(tuple(rows[:most]), min(bound, least))

    def _ideal_bound(self, cards: int, sequences: int) -> float:
        """What no row of so many cards can beat: if all cards and links were as the best."""
        if self._ideal is None:
            self._ideal = _Search(_idealised(self._request))
        ideal = self._ideal
        return ideal._rows_of((ideal._groups[0][:cards],), sequences).bound

    def _options_for(self, sequences: int) -> Options:
        if sequences not in self._options:
            request = self._request
            self._options[sequences] = Options(
                request.shape,
                self._machine,
                StepRows.decode(sequences, request.position),
                request.limits_for(sequences),
                request.free_bytes,
                self._like,
            )
        return self._options[sequences]

    # --- several ----------------------------------------------------------------------------

    def _replicated(self) -> Iterator[Candidate]:
        """Replicas, each of which has a part of the batch."""
        request, cards = self._request, len(self._machine.cards)
        most = min(request.batch, cards)
        if most < 2:
            return
        every = cards <= _DEALT_MAX
        dealt = (
            every_deal(self._groups, most)
            if every
            else (deals(self._groups, count) for count in _counts(most, cards))
        )
        bound = 0.0
        for groups in dealt:
            for found in self._side_by_side(groups, every):
                if every:
                    sizes = [part.size for part in split(request.batch, len(found))]
                    bound = max(bound, sum(map(self._rate, sizes, found)))
                if all(replica.rows for replica in found):
                    plans = tuple(replica.rows[0].plan for replica in found)
                    yield self._priced(FleetPlan(fleet_name(plans), plans))
        if every:
            self.rate_bound = min(self.rate_bound, max(self._whole_bound, bound))

    def _side_by_side(self, replicas: Sequence[Groups], every: bool) -> Iterator[list[Rows]]:
        """The best rows of stages on each replica's cards, in order of the parts of the batch.
        Where it does not go evenly the fastest get one more, or, if `every` way is to be tried,
        any."""
        batch, count = self._request.batch, len(replicas)
        size, rest = divmod(batch, count)
        usual = [self._rows_of(groups, size) for groups in replicas]
        if not all(found.bound < math.inf for found in usual):
            return

        def seconds(i: int) -> float:
            return usual[i].rows[0].seconds if usual[i].rows else math.inf

        by_speed = sorted(range(count), key=seconds)
        lucky = itertools.combinations(by_speed, rest) if every else [tuple(by_speed[:rest])]
        for more in lucky:
            # Those with one more come first, as the batch is dealt in order.
            larger = [self._rows_of(replicas[i], size + 1) for i in more]
            yield [*larger, *(usual[i] for i in by_speed if i not in more)]

    # --- by name ----------------------------------------------------------------------------

    def _named(self) -> Iterator[FleetPlan]:
        """tpAxppB of all cards, with equal shares."""
        shape, cards = self._request.shape, self._machine.cards
        for tensor in range(1, len(cards) + 1):
            stages, rest = divmod(len(cards), tensor)
            if rest or stages > len(shape.layers):
                continue
            plan = tensor_pipeline(shape, tensor, stages)
            yield FleetPlan.of(on_cards(plan, cards))

    def _fits(self, plan: FleetPlan) -> bool:
        request, limits = self._request, self._request.limits_for(self._request.batch)
        seen: set[tuple[object, ...]] = set()
        for replica in plan.replicas:
            for number, stage in enumerate(replica.stages):
                for share in stage.shares:
                    room = request.free_bytes[share.card]
                    own = share.heads, share.hidden, share.ffn, share.vocabulary, share.columns
                    alike = (
                        number,
                        room,
                        *(part.size for part in own),
                        share.heads.start % request.shape.group,
                    )
                    if alike in seen:
                        continue
                    seen.add(alike)
                    if card_bytes(request.shape, replica, share.card, limits) > room:
                        return False
        return True


def _idealised(request: Request) -> Request:
    """The same with all cards alike, and all linked: nothing takes longer there."""
    profile, cards = request.profile, request.topology.cards
    speeds = [profile.card(card) for card in cards]
    memory, compute = max(s.memory for s in speeds), max(s.compute for s in speeds)
    links = [profile.link(a, b) for a in cards for b in cards if a != b]
    rates, latencies = [x.bytes_per_s for x in links], [x.latency_s for x in links]
    port = profile.port_bytes_per_s
    if not request.topology.fully_meshed:
        # What is relayed goes over the host link, and through no port; and where cards hand on, one
        # port does not have to send to all.
        rates.append(profile.host_link_bytes_per_s or math.inf)
        latencies.append(2 * profile.host_link_latency_s)
        port = None
    return attrs.evolve(
        request,
        profile=attrs.evolve(
            profile,
            cards=tuple(CardSpeed(card, memory, compute) for card in cards),
            links=(),
            intercard_bytes_per_s=max(rates),
            intercard_latency_s=min(latencies),
            port_bytes_per_s=port,
        ),
        topology=Topology(
            cards, tuple(Link(a, b, LinkState.UP) for a in cards for b in cards if a != b)
        ),
        free_bytes=(max(request.free_bytes),) * len(request.free_bytes),
    )


def _only_choice(found: Rows) -> bool:
    """Whether only the choice of the token stands between the best row and the bound: but for it
    some row, if not the best, is as fast as that."""
    if not found.rows:
        return False
    most = found.bound * (1 + _ROUNDING)
    least = min(row.seconds - row.choose_s for row in found.rows)
    return least <= most < found.rows[0].seconds


def _counts(most: int, cards: int) -> list[int]:
    """Numbers of replicas worth trying: those that use all cards evenly, and all small ones."""
    return [
        n for n in range(2, most + 1) if n <= 8 or cards % n == 0 or cards // n != cards // (n + 1)
    ]


def _does_not_fit(request: Request) -> CardMemoryError:
    """Says by how much, for the plan that cuts the model most evenly."""
    cards = request.topology.cards
    plan = tensor_pipeline(request.shape, len(cards), 1)
    plan = on_cards(plan, cards)
    limits = request.limits_for(request.batch)
    try:
        fit_kv_pages(request.shape, plan, limits, request.free_bytes, limits.kv_pages)
    except CardMemoryError as error:
        return error
    return CardMemoryError(
        f"no plan fits into {len(cards)} cards with KV memory for {request.batch} contexts of "
        f"{limits.context:,}: use more cards, a shorter --ctx or --prompt-chunk, or fewer sequences"
    )
