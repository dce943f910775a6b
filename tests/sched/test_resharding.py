# SPDX-License-Identifier: Apache-2.0
"""Where another plan's weights come from: every tile once, from the nearest that holds it, within
the memory there is."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched import resharding
from spanker.sched.plan import ModelShape, Plan, on_cards, tensor_pipeline
from spanker.sched.planner import make_plan
from spanker.sched.resharding import (
    Content,
    Fill,
    Holdings,
    Reshard,
    check_reshard,
    contents,
    reshard,
)
from spanker.sched.shapes import Dimensions, named_shape, shape_of
from spanker.sched.topology import Topology

CONTEXT = 64
PLENTY = dict.fromkeys(range(16), 1 << 40)
SHAPES = {
    "even": shape_of(Dimensions(4, 512, 8, 8, 1536, 4096, 512)),
    "tied": shape_of(Dimensions(3, 576, 9, 3, 1536, 4096, 512, tied=True)),
    # Heads of 24 rows, so that shares begin within tiles; vocabulary and FFN end within one.
    "odd": shape_of(Dimensions(5, 96, 4, 2, 352, 1000, 512), "q8_0"),
}


def plan_of(draw: random.Random, shape: ModelShape, cards: Sequence[int]) -> Plan:
    """Some plan on some of these cards, in any order."""
    tensor = draw.randint(1, min(len(cards), 4))
    pipeline = draw.randint(1, min(len(cards) // tensor, len(shape.layers)))
    return on_cards(tensor_pipeline(shape, tensor, pipeline), draw.sample(cards, tensor * pipeline))


def made_for(
    shape: ModelShape,
    held: Holdings,
    after: Plan,
    topology: Topology | None = None,
    room: dict[int, int] | None = None,
) -> Reshard:
    topology = topology or Topology.with_mock(16)
    return reshard(shape, held, after, topology, context=CONTEXT, room=room or PLENTY)


# --- tile by tile -------------------------------------------------------------------------

Label = tuple[int, int]


def tiles(content: Content) -> list[Label]:
    """The rows that each tile of a buffer holds."""
    firsts = range(content.first, content.stop, content.tile)
    return [(first, min(first + content.tile, content.stop)) for first in firsts]


def labels(shape: ModelShape, plan: Plan, card: int) -> dict[str, list[Label]]:
    return {c.buffer: tiles(c) for c in contents(shape, plan, card, CONTEXT)}


class Cards:
    """Carries out a resharding by moving labels about, and says who had what when."""

    def __init__(self, shape: ModelShape, held: Holdings, after: Plan, topology: Topology) -> None:
        self.held = {c: labels(shape, plan, c) for c, plan in held.plans.items()}
        self.own = held.own
        self.sizes = {
            (card, c.buffer): c.nbytes
            for card, plan in held.plans.items()
            for c in contents(shape, plan, card, CONTEXT)
        }
        self.new: dict[int, dict[str, list[Label]]] = {card: {} for card in after.cards}
        self.wanted = {
            card: {c.buffer: c for c in contents(shape, after, card, CONTEXT)}
            for card in after.cards
        }
        self.topology = topology

    def run(self, made: Reshard, room: dict[int, int]) -> None:
        room = dict(room)
        for card, buffer in made.kept:
            self.new[card][buffer] = self.held[card][buffer]
        kept = set(made.kept)
        for round_ in made.rounds:
            for card, buffer in round_.made:
                assert buffer not in self.new[card]
                content = self.wanted[card][buffer]
                self.new[card][buffer] = [(-1, -1)] * len(tiles(content))
                room[card] -= -(-content.nbytes // 64) * 64
            assert all(room[card] >= 0 for card in self.new)
            for fill in round_.fills:
                self.fill(fill)
            for card, buffer in round_.freed:
                assert card in self.own and (card, buffer) not in kept
                del self.held[card][buffer]
                if card in room:
                    room[card] += -(-self.sizes[card, buffer] // 64) * 64
        for card, buffer in made.rest:
            self.new[card][buffer] = tiles(self.wanted[card][buffer])

    def fill(self, fill: Fill) -> None:
        content = self.wanted[fill.card][fill.buffer]
        into, size = self.new[fill.card][fill.buffer], content.tile_bytes
        assert fill.offset % size == fill.nbytes % size == fill.source_offset % size == 0
        for i in range(fill.nbytes // size):
            at = fill.offset // size + i
            assert into[at] == (-1, -1), "filled twice"
            wanted = tiles(content)[at]
            near = self.held.get(fill.card, {}).get(fill.buffer, [])
            peers = [
                card
                for card, buffers in self.held.items()
                if wanted in buffers.get(fill.buffer, ())
                and card != fill.card
                and self.topology.is_up(card, fill.card)
            ]
            if fill.source is None:
                assert wanted not in near and not peers
                into[at] = wanted
                continue
            assert fill.source == fill.card if wanted in near else fill.source in peers
            into[at] = self.held[fill.source][fill.buffer][fill.source_offset // size + i]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(40))
def test_every_tile_is_there_in_the_end_and_from_the_nearest_that_has_it(
    seed: int, name: str
) -> None:
    draw, shape = random.Random(f"{seed} {name}"), SHAPES[name]
    cards = list(range(draw.randint(2, 9)))
    before = plan_of(draw, shape, cards)
    others = []
    spare = [c for c in cards if c not in before.cards]
    if spare and draw.random() < 0.5:
        others.append(plan_of(draw, shape, spare))
    lost = draw.sample(cards, draw.choice([0, 1, 1, 2]) if len(cards) > 3 else 0)
    alive = [c for c in cards if c not in lost]
    after = plan_of(draw, shape, [c for c in alive if not any(c in p.cards for p in others)] or [0])
    topology = draw.choice([Topology.with_mock, Topology.ring, Topology.line])(10)
    held = Holdings.of(before, others, alive)
    room = dict(PLENTY)
    if draw.random() < 0.5:
        room = {card: draw.choice([0, 4096, 100_000, 1_000_000]) for card in cards}
    made = made_for(shape, held, after, topology, room)
    check_reshard(shape, held, after, made, context=CONTEXT)
    run = Cards(shape, held, after, topology)
    run.run(made, room)
    assert run.new == {card: labels(shape, after, card) for card in after.cards}
    # Of the replica's own cards nothing but what is kept; of the others nothing is gone.
    for card, buffers in run.held.items():
        kept = {b for c, b in made.kept if c == card}
        assert set(buffers) == (kept if card in held.own else set(labels(shape, others[0], card)))


def test_the_same_plan_keeps_everything() -> None:
    for shape in SHAPES.values():
        for tensor, pipeline in ((1, 1), (3, 1), (1, 3), (2, 2)):
            plan = tensor_pipeline(shape, tensor, pipeline)
            made = made_for(shape, Holdings.of(plan, (), plan.cards), plan)
            assert made.rounds == made.rest == ()
            assert len(made.kept) == sum(len(labels(shape, plan, c)) for c in plan.cards)


def total(made: Reshard, kind: str) -> int:
    return sum(fill.nbytes for round_ in made.rounds for fill in getattr(round_, kind))


def test_only_what_the_lost_card_alone_had_comes_from_the_host() -> None:
    shape = named_shape("tinyllama")
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    made = made_for(shape, Holdings.of(before, (), (0, 1, 3)), after)
    layers = sum(layer.weight_bytes for layer in shape.layers)
    output = shape.output.rows * shape.output.row_bytes
    # A quarter of the rows, and the embedding, whose columns are laid out anew.
    columns = shape.embedding.rows * shape.embedding.row_bytes
    assert total(made, "from_host") == pytest.approx((layers + output) / 4 + columns, rel=0.02)
    # Two cards hold a KV head twice.
    everything = sum(total(made, kind) for kind in ("from_host", "moves", "copies"))
    assert everything == pytest.approx(layers + output + columns, rel=0.02)
    assert made.rest == ()
    assert {buffer.split(".")[-2] for _, buffer in made.kept if buffer != "rope"} == {
        "attn_norm",
        "ffn_norm",
        "output_norm",
    }


def test_what_several_hold_each_brings_a_part_of() -> None:
    shape = SHAPES["even"]
    plans = make_plan("dp3", shape, 3).replicas
    new = on_cards(plans[0], (3,))
    made = made_for(shape, Holdings.of(plans[0], plans[1:], (0, 1, 2)), new)
    assert total(made, "from_host") == total(made, "copies") == 0
    sent = [
        sum(f.nbytes for r in made.rounds for f in r.moves if f.source == card) for card in range(3)
    ]
    assert sum(sent) == total(made, "moves") and max(sent) < 1.5 * min(sent)


def test_cards_of_a_pipeline_get_theirs_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "ROUND_BYTES", 2 << 20)
    shape = SHAPES["even"]
    before, after = tensor_pipeline(shape, 1, 1), on_cards(tensor_pipeline(shape, 1, 2), (1, 2))
    made = made_for(shape, Holdings.of(before, (), (0,)), after)
    full = [r for r in made.rounds if r.made]
    assert len(full) > 2
    assert all({card for card, _ in r.made} == {1, 2} for r in full[:-1])


def test_extra_memory_is_a_round_or_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resharding, "ROUND_BYTES", 1 << 20)
    shape = named_shape("smollm2-135m")
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    made = made_for(shape, Holdings.of(before, (), (0, 1, 3)), after)
    sizes = {
        (card, c.buffer): c.nbytes for card in after.cards for c in contents(shape, after, card, 64)
    }
    for round_ in made.rounds:
        for card in after.cards:
            own = [sizes[pair] for pair in round_.made if pair[0] == card]
            assert sum(own) <= 1 << 20 or len(own) == 1


def test_a_card_without_room_takes_its_buffer_from_the_host_at_the_end() -> None:
    shape = SHAPES["even"]
    before, after = tensor_pipeline(shape, 2, 1), tensor_pipeline(shape, 3, 1)
    held = Holdings.of(before, (), (0, 1))
    made = made_for(shape, held, after, room={**PLENTY, 1: 0})
    changed = {c.buffer for c in contents(shape, after, 1, CONTEXT)} - {
        b for c, b in made.kept if c == 1
    }
    # The first one makes room for the next.
    assert 0 < len(made.rest) < len(changed) and {card for card, _ in made.rest} == {1}


# --- what is not right --------------------------------------------------------------------


def spoilt(made: Reshard, draw: random.Random) -> Reshard:
    """With one mistake."""
    rounds = list(made.rounds)
    where = [i for i, r in enumerate(rounds) if r.fills]
    number = draw.choice(where)
    round_ = rounds[number]
    fills = list(round_.fills)
    at = draw.randrange(len(fills))
    fill = fills[at]
    kind = draw.choice(
        ["gone", "twice", "short", "shifted", "elsewhere", "freed", "unfreed", "kept"]
    )
    if kind == "gone":
        del fills[at]
    elif kind == "twice":
        fills.append(fill)
    elif kind == "short":
        fills[at] = attrs.evolve(fill, nbytes=fill.nbytes - 4)
    elif kind == "shifted":
        fills[at] = attrs.evolve(fill, source=0, source_offset=fill.source_offset + 64)
    elif kind == "elsewhere":
        fills[at] = attrs.evolve(fill, source=9)
    elif kind == "kept":
        return attrs.evolve(made, kept=(*made.kept, round_.made[0]))
    else:
        i = draw.choice([i for i, r in enumerate(rounds) if r.freed])
        freed = rounds[i].freed
        freed = freed[1:] if kind == "unfreed" else (*freed, freed[0])
        rounds[i] = attrs.evolve(rounds[i], freed=freed)
        return attrs.evolve(made, rounds=tuple(rounds))
    rounds[number] = attrs.evolve(round_, fills=tuple(fills))
    return attrs.evolve(made, rounds=tuple(rounds))


@pytest.mark.parametrize("seed", range(60))
def test_a_mistake_is_told(seed: int) -> None:
    draw, shape = random.Random(seed), SHAPES["even"]
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    held = Holdings.of(before, (), (0, 1, 3))
    made = made_for(shape, held, after)
    check_reshard(shape, held, after, made, context=CONTEXT)
    with pytest.raises(PlanError, match="card "):
        check_reshard(shape, held, after, spoilt(made, draw), context=CONTEXT)


def test_a_source_that_was_freed_before_is_told() -> None:
    shape = SHAPES["even"]
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    held = Holdings.of(before, (), (0, 1, 3))
    made = made_for(shape, held, after)
    first, *others = made.rounds
    early = attrs.evolve(first, made=(), fills=())
    late = attrs.evolve(first, freed=())
    with pytest.raises(PlanError, match="does not hold it"):
        check_reshard(
            shape,
            held,
            after,
            attrs.evolve(made, rounds=(early, late, *others)),
            context=CONTEXT,
        )
