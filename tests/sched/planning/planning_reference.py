# SPDX-License-Identifier: Apache-2.0
"""The best plan by trying all of them, for the tests of the planner: nothing of `sched.planning`.

Plans are priced by `sched.cost` alone.  A stage's price is a sum over what its cards divide (the
tests of additivity hold that against `decode`), so each dimension is gone through by itself; heads
and hidden rows by whether the heads fill Q8 blocks, voters and embedders together with the choice
of the token.  All rows of stages on all ordered sets of cards, and all layer cuts, are written out.
Memory is not looked at, but by `every_plan`, which goes through whole plans one by one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.sched.bandwidth import Profile
from spanker.sched.cost import Machine, Pieces, StepRows, decode_fleet
from spanker.sched.cost.phases import price_stage
from spanker.sched.layout import card_bytes
from spanker.sched.plan import (
    CardShare,
    FleetPlan,
    LayerShape,
    Limits,
    ModelShape,
    Plan,
    Stage,
    WeightShape,
    dimensions,
)
from spanker.sched.planning import Request
from spanker.sched.shapes import BLOCKS
from spanker.sched.shares import Share, split
from spanker.sched.topology import Topology

F64 = npt.NDArray[np.float64]
Parts = tuple[Share, ...]
Cards = tuple[int, ...]
FIELDS = ("heads", "hidden", "ffn", "vocabulary", "columns")
NOTHING = Share(0, 0)
PLENTY = 1 << 40


# --- models, requests, topologies --------------------------------------------------------


def weight(name: str, rows: int, k: int, fmt: str) -> WeightShape:
    unit, nbytes = BLOCKS[fmt]
    assert k % unit == 0, (name, k, fmt)
    return WeightShape(name, rows, k, k // unit * nbytes, unit > 1, unit, nbytes)


def tiny(
    *,
    layers: int = 2,
    heads: int = 4,
    group: int = 1,
    head_dim: int = 32,
    hidden: int = 64,
    ffn: int = 128,
    vocabulary: int = 1024,
    fmt: str = "q4_0",
    embedding: str = "q4_0",
    tied: bool = False,
) -> ModelShape:
    """A llama of a few units in every dimension."""
    rows, kv = heads * head_dim, heads // group * head_dim
    table = weight("token_embd.weight", vocabulary, hidden, embedding)
    return ModelShape(
        hidden=hidden,
        heads=heads,
        kv_heads=heads // group,
        head_dim=head_dim,
        rope_dim=head_dim,
        ffn=ffn,
        vocabulary=vocabulary,
        context=256,
        layers=tuple(
            LayerShape(
                attn_q=weight(f"blk.{i}.attn_q.weight", rows, hidden, fmt),
                attn_k=weight(f"blk.{i}.attn_k.weight", kv, hidden, fmt),
                attn_v=weight(f"blk.{i}.attn_v.weight", kv, hidden, fmt),
                attn_output=weight(f"blk.{i}.attn_output.weight", hidden, rows, fmt),
                ffn_gate=weight(f"blk.{i}.ffn_gate.weight", ffn, hidden, fmt),
                ffn_up=weight(f"blk.{i}.ffn_up.weight", ffn, hidden, fmt),
                ffn_down=weight(f"blk.{i}.ffn_down.weight", hidden, ffn, fmt),
            )
            for i in range(layers)
        ),
        embedding=table,
        output=table if tied else weight("output.weight", vocabulary, hidden, fmt),
    )


def mixed_layers(shape: ModelShape, fmt: str = "q8_0", every: int = 2) -> ModelShape:
    """Some layers with a wider ffn_down and attn_v, as in files of several formats."""
    return attrs.evolve(
        shape,
        layers=tuple(
            attrs.evolve(
                layer,
                attn_v=weight(layer.attn_v.name, layer.attn_v.rows, layer.attn_v.k, fmt),
                ffn_down=weight(layer.ffn_down.name, layer.ffn_down.rows, layer.ffn_down.k, fmt),
            )
            if i % every == 0
            else layer
            for i, layer in enumerate(shape.layers)
        ),
    )


LIMITS = Limits(
    context=256,
    prompt_chunk=8,
    tokens_max=8,
    outputs_max=4,
    candidates=16,
    kv_pages=4,
    page_positions=64,
)

# Slow memory, so that models of a few kilobytes are worth dividing; no modelled host link.
SLOW = Profile(
    name="slow",
    local_ddr_bytes_per_s=2e7,
    intercard_bytes_per_s=1e7,
    host_link_bytes_per_s=None,
    host_link_latency_s=3e-5,
    intercard_latency_s=2e-6,
    port_bytes_per_s=1e7,
    int8_madds_per_s=6e7,
    float_madds_per_s=2e7,
    elements_per_s=2e7,
    command_s=1e-6,
    step_s=1e-5,
)
# No ports, little latency, fast links: for dividing as finely as it goes.
QUICK_LINKS = attrs.evolve(
    SLOW,
    name="quick links",
    intercard_bytes_per_s=1e9,
    intercard_latency_s=1e-7,
    port_bytes_per_s=None,
)


def request_for(
    shape: ModelShape,
    profile: Profile,
    topology: Topology,
    *,
    batch: int = 1,
    free: Sequence[int] | None = None,
    position: int = 100,
    limits: Limits = LIMITS,
) -> Request:
    room = tuple(free) if free else (PLENTY,) * len(topology.cards)
    return Request(shape, profile, topology, room, limits, batch=batch, position=position)


Pairs = tuple[tuple[int, int], ...]


@functools.cache
def connected_graphs(n: int) -> tuple[Pairs, ...]:
    """Every connected graph of n nodes, one of each that differ in the nodes' numbers only."""
    edges = list(itertools.combinations(range(n), 2))
    orders = list(itertools.permutations(range(n)))
    seen: set[Pairs] = set()
    out = []
    for bits in range(1 << len(edges)):
        graph = tuple(e for i, e in enumerate(edges) if bits >> i & 1)
        if graph in seen or not _connected(n, graph):
            continue
        out.append(graph)
        for order in orders:
            seen.add(
                tuple(sorted((min(order[a], order[b]), max(order[a], order[b])) for a, b in graph))
            )
    return tuple(out)


def _connected(n: int, graph: Pairs) -> bool:
    reached, todo = {0}, [0]
    while todo:
        a = todo.pop()
        for pair in graph:
            if a in pair:
                b = pair[0] + pair[1] - a
                if b not in reached:
                    reached.add(b)
                    todo.append(b)
    return len(reached) == n


# --- the order of cards in a stage ---------------------------------------------------------


def class_order(request: Request) -> dict[int, int]:
    """Where each card stands in a stage: cards that could be exchanged stand together, at the
    lowest of their numbers."""
    cards = request.topology.cards
    lowest = {
        card: min(c for c in cards if c == card or _exchangeable(request, c, card))
        for card in cards
    }
    return {card: i for i, card in enumerate(sorted(cards, key=lambda c: (lowest[c], c)))}


def _exchangeable(request: Request, a: int, b: int) -> bool:
    """Whether the fleet is the same with two cards exchanged."""
    other = {a: b, b: a}
    profile, topology = request.profile, request.topology

    def facts(swap: bool) -> object:
        name = (lambda c: other.get(c, c)) if swap else (lambda c: c)
        cards = {
            name(c): (profile.card(c).memory, profile.card(c).compute, request.free_bytes[c])
            for c in topology.cards
        }
        links = {
            (name(x), name(y)): (profile.link(x, y).bytes_per_s, profile.link(x, y).latency_s)
            for x in topology.cards
            for y in topology.cards
            if x != y and topology.is_up(x, y)
        }
        return cards, links

    return facts(False) == facts(True)


# --- ways to divide ------------------------------------------------------------------------


def ways(total: int, unit: int, n: int) -> Iterator[Parts]:
    """Every way to cut [0, total) into n consecutive shares of whole units."""
    units = -(-total // unit)
    for cuts in itertools.combinations_with_replacement(range(units + 1), n - 1):
        edges = [min(cut * unit, total) for cut in (0, *cuts, units)]
        yield tuple(Share(a, b) for a, b in itertools.pairwise(edges))


@attrs.frozen(eq=False)
class _Set:
    """Prices of one ordered set of cards as a stage, in each dimension, by way.

    `first[kind]` and `more[kind]` are what the first layer of a kind takes and each further one.
    All are above those of the way that stands first, whose price is `base`.
    """

    cards: Cards
    base: tuple[F64, F64]
    own: dict[str, tuple[list[Parts], F64, F64]]
    # Ends: (shares, seconds) of the cheapest way for each set of cards that has any.
    embed: dict[Cards, tuple[Parts, float]]
    output: dict[Cards, tuple[Parts, float]]
    aligned: tuple[bool, ...]


class BruteForce:
    """All plans of a request with as much memory as it takes, for one part of the batch."""

    def __init__(self, request: Request, sequences: int) -> None:
        self.request, self.shape = request, request.shape
        self.machine = Machine(request.profile, request.topology)
        self.rows = StepRows.decode(sequences, request.position)
        self.order = class_order(request)
        self.candidates = min(request.limits.candidates, request.shape.vocabulary)
        self.kinds: list[LayerShape] = []
        self.kind_of: list[int] = []
        for layer in self.shape.layers:
            bare = attrs.evolve(
                layer,
                **{
                    f.name: attrs.evolve(getattr(layer, f.name), name="")
                    for f in attrs.fields(LayerShape)
                },
            )
            if bare not in self.kinds:
                self.kinds.append(bare)
            self.kind_of.append(self.kinds.index(bare))
        self._sets: dict[Cards, _Set] = {}
        self._spans: dict[tuple[Cards, int, int], tuple[float, dict[str, Parts]]] = {}
        self._choices: dict[tuple[Cards, Cards, Cards], float] = {}

    # --- one set of cards ---------------------------------------------------------------

    def _pieces(self, cards: Cards, shape: ModelShape) -> Pieces:
        return Pieces(shape, self.machine, self.rows, cards)

    def _price(
        self, pieces: Pieces, cards: Cards, parts: dict[str, Parts], count: int, where: str
    ) -> float:
        shares = tuple(
            CardShare(card, *(parts[field][i] for field in FIELDS)) for i, card in enumerate(cards)
        )
        stage, other = Stage(Share(0, count), shares), Stage(Share(0, 0), ())
        stages = {"first": (stage, other), "middle": (other, stage, other), "last": (other, stage)}[
            where
        ]
        return price_stage(pieces, Plan("", stages), stages.index(stage), self.candidates).seconds

    def set_of(self, cards: Cards) -> _Set:
        if cards in self._sets:
            return self._sets[cards]
        n, shape = len(cards), self.shape
        every = {
            field: list(ways(total, unit, n))
            for field, unit, total in dimensions(shape, True, True)
        }
        aligned = tuple(
            all(s.start * shape.head_dim % 32 == s.size * shape.head_dim % 32 == 0 for s in parts)
            for parts in every["heads"]
        )
        base = self._base(n)
        if not any(kind.attn_output.quantized for kind in self.kinds):
            aligned = (True,) * len(aligned)
        assert aligned[0]
        pieces = [
            self._pieces(cards, attrs.evolve(shape, layers=(kind, kind))) for kind in self.kinds
        ]

        def layer(parts: dict[str, Parts]) -> tuple[list[float], list[float]]:
            one = [self._price(p, cards, parts, 1, "middle") for p in pieces]
            two = [self._price(p, cards, parts, 2, "middle") for p in pieces]
            return one, [b - a for a, b in zip(one, two, strict=True)]

        first, more = map(np.array, layer(base))
        own = {}
        odd = next((h for h, a in zip(every["heads"], aligned, strict=True) if not a), None)
        for name, field, under in (
            ("heads", "heads", {}),
            ("hidden", "hidden", {}),
            ("hidden, odd", "hidden", {"heads": odd} if odd else None),
            ("ffn", "ffn", {}),
        ):
            if under is None:
                continue
            start = [np.array(x) for x in layer(base | under)]
            found = [layer(base | under | {field: parts}) for parts in every[field]]
            own[name] = (
                every[field],
                np.array([f[0] for f in found]) - start[0],
                np.array([f[1] for f in found]) - start[1],
            )
        middle = float(first[0])

        def end(where: str, field: str) -> dict[Cards, tuple[Parts, float]]:
            best: dict[Cards, tuple[Parts, float]] = {}
            for parts in every[field]:
                seconds = self._price(pieces[0], cards, base | {field: parts}, 1, where) - middle
                users = tuple(c for c, s in zip(cards, parts, strict=True) if not s.empty)
                if users not in best or seconds < best[users][1]:
                    best[users] = parts, seconds
            return best

        found_set = _Set(
            cards, (first, more), own, end("first", "columns"), end("last", "vocabulary"), aligned
        )
        self._sets[cards] = found_set
        return found_set

    def span(self, cards: Cards, begin: int, stop: int) -> tuple[float, dict[str, Parts]]:
        """The least that layers take on a set of cards, and the shares."""
        key = cards, begin, stop
        if key in self._spans:
            return self._spans[key]
        of = self.set_of(cards)
        head, rest = self.kind_of[begin], self.kind_of[begin + 1 : stop]

        def over(first: F64, more: F64) -> F64:
            return first[..., head] + sum(
                (more[..., kind] for kind in rest), np.zeros(first.shape[:-1])
            )

        total = float(over(*of.base))
        parts: dict[str, Parts] = {}
        costs = {name: over(first, more) for name, (_, first, more) in of.own.items()}
        joint = []
        for name, wanted in (("hidden", True), ("hidden, odd", False)):
            mine = [i for i, a in enumerate(of.aligned) if a == wanted]
            if mine:
                heads = min(mine, key=lambda i: costs["heads"][i])
                rows = int(costs[name].argmin())
                joint.append((costs["heads"][heads] + costs[name][rows], heads, rows))
        seconds, heads, rows = min(joint)
        parts["heads"], parts["hidden"] = of.own["heads"][0][heads], of.own["hidden"][0][rows]
        ffn = int(costs["ffn"].argmin())
        parts["ffn"] = of.own["ffn"][0][ffn]
        total += float(seconds + costs["ffn"][ffn])
        self._spans[key] = total, parts
        return self._spans[key]

    def price(self, plan: Plan) -> float:
        """The cards' loop of any plan, from the same sums."""
        total = self.request.profile.step_s
        for stage in plan.stages:
            of = self.set_of(stage.cards)
            head = self.kind_of[stage.layers.start]
            rest = self.kind_of[stage.layers.start + 1 : stage.layers.stop]
            heads = tuple(s.heads for s in stage.shares)
            odd = not of.aligned[of.own["heads"][0].index(heads)]
            chosen = [of.base] + [
                (first[index], more[index])
                for name, field in (
                    ("heads", "heads"),
                    ("hidden, odd" if odd else "hidden", "hidden"),
                    ("ffn", "ffn"),
                )
                for every, first, more in [of.own[name]]
                for index in [every.index(tuple(getattr(s, field) for s in stage.shares))]
            ]
            for first_layer, more in chosen:
                total += float(first_layer[head]) + float(sum(more[k] for k in rest))
        first, last = plan.stages[0], plan.stages[-1]
        total += self._end(first, "first", "columns") + self._end(last, "last", "vocabulary")
        for a, b in itertools.pairwise(plan.stages):
            total += self._pieces(a.cards, self.shape).handover(a.cards, b.cards).seconds
        return total + self.choose(plan.voters, plan.embedders, last.cards)

    def _end(self, stage: Stage, where: str, field: str) -> float:
        """What columns or vocabulary of a stage take, above its layers with the base's shares."""
        base = self._base(len(stage.cards))
        pieces = self._pieces(stage.cards, attrs.evolve(self.shape, layers=(self.kinds[0],) * 2))
        parts = base | {field: tuple(getattr(s, field) for s in stage.shares)}
        whole = self._price(pieces, stage.cards, parts, 1, where)
        return whole - self._price(pieces, stage.cards, base, 1, "middle")

    def _base(self, n: int) -> dict[str, Parts]:
        return {
            field: next(iter(ways(total, unit, n)))
            for field, unit, total in dimensions(self.shape, True, True)
        }

    # --- rows of stages -----------------------------------------------------------------

    def choose(self, voters: Cards, embedders: Cards, last: Cards) -> float:
        key = voters, embedders, last if self.machine.contended else ()
        if key not in self._choices:
            self._choices[key] = self._pieces(last, self.shape).choose(voters, embedders)
        return self._choices[key]

    def ends(self, first: Cards, last: Cards) -> tuple[float, Parts, Parts]:
        """The least that embedding, output and the choice take together."""
        columns, vocabulary = self.set_of(first).embed, self.set_of(last).output
        every = (
            (e + o + self.choose(voters, embedders, last), c, v)
            for embedders, (c, e) in columns.items()
            for voters, (v, o) in vocabulary.items()
        )
        return min(every, key=lambda found: found[0])

    def rows_of(self, cards: Sequence[int]) -> Iterator[tuple[tuple[Cards, ...], tuple[int, ...]]]:
        """(sets in order, layer cuts) of every row of stages on exactly these cards."""
        layers = len(self.shape.layers)
        for sets in ordered_partitions(tuple(sorted(cards, key=self.order.__getitem__)), layers):
            for cuts in itertools.combinations(range(1, layers), len(sets) - 1):
                yield sets, (0, *cuts, layers)

    @functools.cached_property
    def _ends(self) -> dict[tuple[Cards, Cards], tuple[float, Parts, Parts]]:
        return {}

    def best_on(self, cards: Sequence[int]) -> tuple[float, Plan | None]:
        """The fastest plan that uses exactly these cards: the cards' loop of a step."""
        best: tuple[float, object] = (math.inf, None)
        for sets, edges in self.rows_of(cards):
            ends = sets[0], sets[-1]
            if ends not in self._ends:
                self._ends[ends] = self.ends(*ends)
            seconds = self.request.profile.step_s + self._ends[ends][0]
            for a, b in itertools.pairwise(sets):
                seconds += self._pieces(a, self.shape).handover(a, b).seconds
            for own, (begin, stop) in zip(sets, itertools.pairwise(edges), strict=True):
                seconds += self.span(own, begin, stop)[0]
            if seconds < best[0]:
                best = seconds, (sets, edges)
        if best[1] is None:
            return math.inf, None
        return best[0], self._plan(*best[1])  # type: ignore[misc]

    def _plan(self, sets: tuple[Cards, ...], edges: tuple[int, ...]) -> Plan:
        _, columns, vocabulary = self._ends[sets[0], sets[-1]]
        stages = []
        for number, own in enumerate(sets):
            begin, stop = edges[number : number + 2]
            none = (NOTHING,) * len(own)
            parts = self.span(own, begin, stop)[1] | {
                "columns": columns if number == 0 else none,
                "vocabulary": vocabulary if number == len(sets) - 1 else none,
            }
            stages.append(
                Stage(
                    Share(begin, stop),
                    tuple(CardShare(c, *(parts[f][i] for f in FIELDS)) for i, c in enumerate(own)),
                )
            )
        return Plan("by hand", tuple(stages))


def ordered_partitions(items: tuple[int, ...], most: int) -> Iterator[tuple[Cards, ...]]:
    """All items in a row of at most `most` sets, none empty; within a set in the order given."""
    for count in range(1, min(most, len(items)) + 1):
        for where in itertools.product(range(count), repeat=len(items)):
            if len(set(where)) == count:
                yield tuple(
                    tuple(x for x, w in zip(items, where, strict=True) if w == s)
                    for s in range(count)
                )


# --- fleets --------------------------------------------------------------------------------


@attrs.frozen
class Best:
    """The plan with most tokens per second by the cards' loops, what `decode_fleet` says of it,
    and the cards' rate by the sum of its parts."""

    plan: FleetPlan
    tokens_per_second: float
    cards_rate: float


def best_plan(request: Request) -> Best:
    """Go through every plan; memory does not matter."""
    batch, cards = request.batch, request.topology.cards
    known: dict[int, dict[frozenset[int], tuple[float, Plan | None]]] = {}
    best: tuple[float, tuple[Plan, ...]] = (0.0, ())
    for count in range(1, min(batch, len(cards)) + 1):
        parts = [part.size for part in split(batch, count)]
        for size in set(parts) - set(known):
            by_hand = BruteForce(request, size)
            known[size] = {
                frozenset(some): by_hand.best_on(some)
                for n in range(1, len(cards) + 1)
                for some in itertools.combinations(cards, n)
            }
        for where in itertools.product(range(count + 1), repeat=len(cards)):
            hands = [
                frozenset(c for c, w in zip(cards, where, strict=True) if w == i)
                for i in range(count)
            ]
            if not all(hands):
                continue
            rows = [known[part][hand] for part, hand in zip(parts, hands, strict=True)]
            rate = sum(part / seconds for part, (seconds, _) in zip(parts, rows, strict=True))
            if rate > best[0]:
                best = rate, tuple(plan for _, plan in rows if plan)
    plan = FleetPlan("by hand", best[1])
    return Best(plan, priced(request, plan), best[0])


def priced(request: Request, plan: FleetPlan) -> float:
    """Tokens per second by the cost model."""
    return decode_fleet(
        request.shape,
        plan,
        request.profile,
        request.topology,
        batch=request.batch,
        context=request.position,
        candidates=request.limits.candidates,
    ).tokens_per_second


def fits(request: Request, plan: FleetPlan) -> bool:
    """Whether every card has memory for its part of the batch."""
    parts = split(request.batch, len(plan.replicas))
    return all(
        card_bytes(request.shape, replica, card, request.limits_for(part.size))
        <= request.free_bytes[card]
        for replica, part in zip(plan.replicas, parts, strict=True)
        for card in replica.cards
    )


def every_plan(request: Request) -> Iterator[Plan]:
    """Every plan of one replica, whole: for very few units."""
    shape, cards = request.shape, request.topology.cards
    order = class_order(request)
    layers = len(shape.layers)
    for n in range(1, len(cards) + 1):
        for some in itertools.combinations(sorted(cards, key=order.__getitem__), n):
            for sets in ordered_partitions(some, layers):
                for cuts in itertools.combinations(range(1, layers), len(sets) - 1):
                    edges = (0, *cuts, layers)
                    choices = [
                        _stages(shape, own, Share(*edges[i : i + 2]), i == 0, i == len(sets) - 1)
                        for i, own in enumerate(sets)
                    ]
                    for stages in itertools.product(*choices):
                        yield Plan("whole", stages)


def _stages(shape: ModelShape, cards: Cards, layers: Share, first: bool, last: bool) -> list[Stage]:
    fields = [
        list(ways(total, unit, len(cards))) for _, unit, total in dimensions(shape, first, last)
    ]
    return [
        Stage(layers, tuple(CardShare(c, *own) for c, *own in zip(cards, *parts, strict=True)))
        for parts in itertools.product(*fields)
    ]
