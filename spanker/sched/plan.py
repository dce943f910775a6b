# SPDX-License-Identifier: Apache-2.0
"""Whole-model plans as values: which card computes what, and how many bytes that takes.

A plan is a row of stages (pipeline parallel); the cards of a stage share each of its layers by
rows (tensor parallel).  A fleet runs one plan, or several side by side on cards of their own (data
parallel): a `FleetPlan`.  Nothing here knows how a card works; ggml/architectures turns a plan into
programs, and spanker/sched/planner.py chooses one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import attrs

from spanker.errors import PlanError
from spanker.sched.shares import Share, split
from spanker.values import Value

TILE_ROWS = 16
Q8_BLOCK = 32
Q8_BLOCK_BYTES = 34
LOGIT_CHUNK = 256
DDR_ALIGN = 64


@attrs.frozen(eq=False, repr=False)
class WeightShape(Value):
    """A weight matrix: `rows` output features, `row_bytes` bytes for k input features.

    `quantized` says that its activations are Q8 blocks; `columns_unit` is how finely its rows can
    be cut by column (one quantisation block), `unit_bytes` the bytes of that many columns.
    """

    name: str
    rows: int
    k: int
    row_bytes: int
    quantized: bool
    columns_unit: int
    unit_bytes: int

    def packed_bytes(self, rows: int) -> int:
        """Bytes of `rows` rows on a card: whole tiles of 16."""
        return -(-rows // TILE_ROWS) * TILE_ROWS * self.row_bytes


@attrs.frozen(eq=False, repr=False)
class LayerShape(Value):
    """The seven matrices of one llama layer."""

    attn_q: WeightShape
    attn_k: WeightShape
    attn_v: WeightShape
    attn_output: WeightShape
    ffn_gate: WeightShape
    ffn_up: WeightShape
    ffn_down: WeightShape

    @property
    def matrices(self) -> tuple[WeightShape, ...]:
        return (
            self.attn_q,
            self.attn_k,
            self.attn_v,
            self.attn_output,
            self.ffn_gate,
            self.ffn_up,
            self.ffn_down,
        )

    @property
    def weight_bytes(self) -> int:
        return sum(m.rows * m.row_bytes for m in self.matrices)


@attrs.frozen(eq=False, repr=False)
class ModelShape(Value):
    """What planning needs to know of a model; sizes are elements unless they say bytes."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    ffn: int
    vocabulary: int
    context: int
    layers: tuple[LayerShape, ...]
    embedding: WeightShape
    output: WeightShape

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @functools.cached_property
    def kinds(self) -> tuple[tuple[int, ...], tuple[LayerShape, ...]]:
        """The kind of each layer, and one layer of each kind: layers of a kind differ in names
        only, and cost the same."""
        kinds: dict[tuple[tuple[int, ...], ...], int] = {}
        layers: list[LayerShape] = []
        numbers: list[int] = []
        for layer in self.layers:
            key = tuple(
                [
                    (m.rows, m.k, m.row_bytes, m.quantized, m.columns_unit, m.unit_bytes)
                    for m in layer.matrices
                ]
            )
            if key not in kinds:
                kinds[key] = len(layers)
                layers.append(layer)
            numbers.append(kinds[key])
        return tuple(numbers), tuple(layers)


@attrs.frozen(eq=False, repr=False)
class Limits(Value):
    """The largest step and the KV memory that a plan is made for.

    Of the `tokens_max` tokens of a step at most `prompt_chunk` belong to prompts; `outputs_max`
    rows of logits can come out of it, and every card keeps the best `candidates` of each.
    `kv_pages` pages of `page_positions` positions are shared by all sequences.  Of each card's
    pages another one has `kv_copies` (0 or 1).
    """

    context: int
    prompt_chunk: int
    tokens_max: int
    outputs_max: int
    candidates: int
    kv_pages: int
    page_positions: int
    kv_copies: int = 0


@attrs.frozen(eq=False, repr=False)
class CardShare(Value):
    """What one card computes of each layer of its stage.

    `heads`: query heads; `hidden`: rows of the attention output and of ffn_down; `ffn`: rows of
    ffn_gate and ffn_up; `vocabulary`: rows of the output matrix (last stage); `columns`: columns of
    the embedding (first stage).
    """

    card: int
    heads: Share
    hidden: Share
    ffn: Share
    vocabulary: Share
    columns: Share

    def kv_heads(self, group: int) -> Share:
        """The KV heads that this card's query heads read; neighbours may both hold one."""
        if self.heads.empty:
            return Share(0, 0)
        return Share(self.heads.start // group, (self.heads.stop - 1) // group + 1)


@attrs.frozen(eq=False, repr=False)
class Stage(Value):
    """Consecutive layers and the cards that share them."""

    layers: Share
    shares: tuple[CardShare, ...]

    @property
    def cards(self) -> tuple[int, ...]:
        return tuple(s.card for s in self.shares)


@attrs.frozen(eq=False, repr=False)
class Plan(Value):
    """A whole-model plan.  `reason` says in words why it was chosen."""

    name: str
    stages: tuple[Stage, ...]
    reason: str = ""

    @property
    def cards(self) -> tuple[int, ...]:
        return tuple(card for stage in self.stages for card in stage.cards)

    @property
    def voters(self) -> tuple[int, ...]:
        """Cards with rows of the vocabulary, in order of those rows: each has a best token."""
        return tuple(s.card for s in self.stages[-1].shares if not s.vocabulary.empty)

    @property
    def embedders(self) -> tuple[int, ...]:
        """Cards with columns of the embedding: they must know the chosen token."""
        return tuple(s.card for s in self.stages[0].shares if not s.columns.empty)

    def chooses(self, card: int) -> bool:
        """Whether a card takes part in choosing the next token."""
        return card in self.voters or card in self.embedders

    def place(self, card: int) -> tuple[int, CardShare]:
        """The stage number and share of a card; PlanError when the plan does not use it."""
        for number, stage in enumerate(self.stages):
            for share in stage.shares:
                if share.card == card:
                    return number, share
        raise PlanError(f"plan {self.name} gives card {card} nothing; it uses {self.cards}")


@attrs.frozen(eq=False, repr=False)
class FleetPlan(Value):
    """Plans of one model side by side, each on cards of its own: every sequence goes through one
    of them, its replica.  Cards that none of them uses are idle."""

    name: str
    replicas: tuple[Plan, ...]
    reason: str = ""

    @classmethod
    def of(cls, plan: Plan) -> FleetPlan:
        """One plan alone."""
        return cls(plan.name, (plan,), plan.reason)

    @property
    def cards(self) -> tuple[int, ...]:
        return tuple(card for plan in self.replicas for card in plan.cards)

    @property
    def parallel(self) -> bool:
        """Whether there is more than one replica."""
        return len(self.replicas) > 1

    def replica_of(self, card: int) -> int | None:
        """The number of the replica that a card belongs to, or None."""
        return next((i for i, plan in enumerate(self.replicas) if card in plan.cards), None)


# --- checking plans --------------------------------------------------------------------


def check_plan(shape: ModelShape, plan: Plan) -> None:
    """Raise PlanError, saying where, unless a plan computes the whole of a model once.

    Shares of a stage stand in the order of its cards and cover the model's heads, rows and columns
    without gap or overlap; only the first stage has columns of the embedding, only the last one
    rows of the vocabulary.
    """
    if len(set(plan.cards)) != len(plan.cards):
        raise PlanError(f"plan {plan.name}: a card appears twice in {plan.cards}")
    if not plan.stages:
        raise PlanError(f"plan {plan.name} has no stages")
    layers = 0
    for number, stage in enumerate(plan.stages):
        where = f"plan {plan.name}, stage {number}"
        if not stage.shares:
            raise PlanError(f"{where}: no cards")
        if stage.layers.start != layers or stage.layers.empty:
            raise PlanError(
                f"{where}: expected layers from {layers} on, got {stage.layers.start} to "
                f"{stage.layers.stop}"
            )
        layers = stage.layers.stop
        first, last = number == 0, number == len(plan.stages) - 1
        for dimension, unit, total in dimensions(shape, first, last):
            _check_shares(where, stage, dimension, unit, total)
    if layers != len(shape.layers):
        raise PlanError(
            f"plan {plan.name}: its stages have {layers} layers, the model {len(shape.layers)}"
        )


def check_fleet_plan(shape: ModelShape, plan: FleetPlan, cards: int) -> None:
    """Raise PlanError unless each replica is a whole plan, and all are on different cards of the
    `cards` that there are."""
    if not plan.replicas:
        raise PlanError(f"plan {plan.name} has no replicas")
    if len(set(plan.cards)) != len(plan.cards):
        raise PlanError(
            f"plan {plan.name}: its replicas share cards, in {plan.cards}: each needs its own"
        )
    for card in plan.cards:
        if not 0 <= card < cards:
            raise PlanError(
                f"plan {plan.name} uses card {card}, the fleet has cards 0 to {cards - 1}"
            )
    for replica in plan.replicas:
        check_plan(shape, replica)


def dimensions(shape: ModelShape, first: bool, last: bool) -> tuple[tuple[str, int, int], ...]:
    """What the cards of a stage share: field of `CardShare`, unit of its cuts, total."""
    return (
        ("heads", 1, shape.heads),
        ("hidden", TILE_ROWS, shape.hidden),
        ("ffn", Q8_BLOCK, shape.ffn),
        ("vocabulary", LOGIT_CHUNK, shape.vocabulary if last else 0),
        ("columns", max(shape.embedding.columns_unit, TILE_ROWS), shape.hidden if first else 0),
    )


def _check_shares(where: str, stage: Stage, dimension: str, unit: int, total: int) -> None:
    at = 0
    for share in stage.shares:
        part: Share = getattr(share, dimension)
        if part.empty:
            continue
        if part.start != at or (part.stop % unit and part.stop != total):
            raise PlanError(
                f"{where}, card {share.card}, {dimension}: expected a share from {at} on in units "
                f"of {unit}, got {part.start} to {part.stop}"
            )
        at = part.stop
    if at != total:
        raise PlanError(f"{where}: the shares of {dimension} cover {at} of {total}")


# --- making plans ----------------------------------------------------------------------


def tensor_pipeline(shape: ModelShape, tensor: int, pipeline: int) -> Plan:
    """`pipeline` stages of `tensor` cards each; cards are numbered stage by stage.

    Raises PlanError when there are more stages than layers.
    """
    if tensor < 1 or pipeline < 1:
        raise PlanError(
            f"a plan needs at least one card and one stage, got tp{tensor}xpp{pipeline}"
        )
    stages = tuple(
        Stage(layers, _shares(shape, tensor, number, pipeline))
        for number, layers in enumerate(_stage_layers(shape, pipeline))
    )
    if pipeline == 1:
        name = f"tp{tensor}"
    elif tensor == 1:
        name = f"pp{pipeline}"
    else:
        name = f"tp{tensor}xpp{pipeline}"
    return Plan(name, stages)


def on_cards(plan: Plan, cards: Sequence[int]) -> Plan:
    """The same plan on other cards: `cards[i]` does what card i did."""
    stages = tuple(
        attrs.evolve(stage, shares=tuple(attrs.evolve(s, card=cards[s.card]) for s in stage.shares))
        for stage in plan.stages
    )
    return attrs.evolve(plan, stages=stages)


def side_by_side(plan: Plan, replicas: int) -> FleetPlan:
    """So many replicas of a plan, each on as many cards as it uses, one behind the other."""
    if replicas == 1:
        return FleetPlan.of(plan)
    n = len(plan.cards)
    copies = tuple(on_cards(plan, range(i * n, (i + 1) * n)) for i in range(replicas))
    name = f"dp{replicas}" if n == 1 else f"dp{replicas}x{plan.name}"
    return FleetPlan(name, copies, plan.reason)


def _shares(shape: ModelShape, tensor: int, stage: int, stages: int) -> tuple[CardShare, ...]:
    first, last = stage == 0, stage == stages - 1
    nothing = (Share(0, 0),) * tensor
    heads = split(shape.heads, tensor)
    hidden = split(shape.hidden, tensor, unit=TILE_ROWS)
    ffn = split(shape.ffn, tensor, unit=Q8_BLOCK)
    vocabulary = split(shape.vocabulary, tensor, unit=LOGIT_CHUNK) if last else nothing
    unit = max(shape.embedding.columns_unit, TILE_ROWS)
    columns = split(shape.hidden, tensor, unit=unit) if first else nothing
    return tuple(
        CardShare(stage * tensor + i, heads[i], hidden[i], ffn[i], vocabulary[i], columns[i])
        for i in range(tensor)
    )


def _stage_layers(shape: ModelShape, stages: int) -> tuple[Share, ...]:
    """Contiguous layers per stage so that the stage reading most bytes reads the fewest possible.

    Decode is bound by reading weights, and the last stage also reads the output matrix.  A dynamic
    programme over (stages, layers).
    """
    count = len(shape.layers)
    if stages > count:
        raise PlanError(
            f"{stages} pipeline stages need at least {stages} layers, the model has {count}: "
            f"use --plan tp, or tpAxppB with fewer stages"
        )
    before = [0]
    for layer in shape.layers:
        before.append(before[-1] + layer.weight_bytes)
    output_bytes = shape.output.rows * shape.output.row_bytes
    # worst[n]: the most bytes that a stage reads when the stages so far take the first n layers.
    worst: list[float] = list(before)
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        extra = output_bytes if stage == stages - 1 else 0
        options = [_best_cut(worst, before, extra, stage, n) for n in range(count + 1)]
        worst = [cost for cost, _ in options]
        cuts.append([cut for _, cut in options])
    edges = [count]
    for row in reversed(cuts):
        edges.append(row[edges[-1]])
    edges.append(0)
    edges.reverse()
    return tuple(Share(a, b) for a, b in itertools.pairwise(edges))


def _best_cut(
    worst: list[float], before: list[int], extra: int, first: int, stop: int
) -> tuple[float, int]:
    """(cost, cut): the first of the best cuts before layer `stop` with `first` layers or more in
    front of it.  Later cuts make those in front longer and the rest shorter."""
    low, high = first, stop
    while low < high:
        cut = (low + high) // 2
        if worst[cut] >= before[stop] - before[cut] + extra:
            high = cut
        else:
            low = cut + 1
    found = [
        (max(worst[cut], before[stop] - before[cut] + extra), cut)
        for cut in (low - 1, low)
        if first <= cut < stop
    ]
    cost, cut = min(found, default=(math.inf, 0))
    while cut > first and max(worst[cut - 1], before[stop] - before[cut - 1] + extra) == cost:
        cut -= 1
    return cost, cut
