# SPDX-License-Identifier: Apache-2.0
"""KV pages that go along to another plan: every one of a live sequence once, from a card that holds
it, or none at all.

A failing case is replayed by its name: plans, tables and losses are drawn from the seed in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched import resharding
from spanker.sched.copies import check_copies, keeper, keeps_all, ward, ward_heads
from spanker.sched.layout import (
    card_buffers,
    card_bytes,
    fit_kv_pages,
    kv_buffers,
    kv_page_bytes,
)
from spanker.sched.pages import PageMove, Run, Seats, Table, pools, runs, seated
from spanker.sched.plan import FleetPlan, Limits, ModelShape, Plan, Stage, on_cards, tensor_pipeline
from spanker.sched.resharding import Fill, Holdings, Reshard, check_reshard, contents, reshard
from spanker.sched.shapes import Dimensions, shape_of
from spanker.sched.shares import Share
from spanker.sched.topology import Topology

LIMITS = Limits(64, 16, 16, 4, 4, 12, 32)
PLENTY = dict.fromkeys(range(16), 1 << 40)
SHAPES = {
    "heads alone": shape_of(Dimensions(4, 512, 8, 8, 1536, 4096, 512)),
    # Shares of nine heads in groups of three are uneven, and neighbours hold a KV head both.
    "uneven": shape_of(Dimensions(3, 576, 9, 3, 1536, 4096, 512, tied=True)),
    "shared": shape_of(Dimensions(5, 256, 8, 2, 352, 1000, 512), "q8_0"),
    "one KV head": shape_of(Dimensions(4, 256, 4, 1, 512, 1024, 512)),
}


# --- tables -------------------------------------------------------------------------------


def test_tables_keep_their_pages_where_all_are_there() -> None:
    tables = [Table((0, 3, 5), 2), Table((1, 2), 0), Table((7,), 1)]
    assert seated(tables, 8) == ((0, 3, 5), (1, 2), (7,))
    # Only what is used moves, by its new numbers, and neighbours together.
    assert runs(tables, seated(tables, 8)) == (Run(0, 0, 1), Run(3, 3, 1), Run(7, 7, 1))


def test_tables_move_together_where_there_are_fewer_pages() -> None:
    tables = [Table((0, 3, 5), 3), Table((1, 2, 6, 8), 1), Table((7,), 1)]
    seats = seated(tables, 7)
    assert seats == ((0, 1, 2), (3, 4, 5, 6), ())
    assert runs(tables, seats) == (Run(0, 0, 1), Run(3, 1, 1), Run(5, 2, 1), Run(1, 3, 1))
    # What finds no room lets a shorter one behind it have it.
    assert seated(tables, 4) == ((0, 1, 2), (), (3,))
    assert runs([Table((4, 5, 6), 3)], ((1, 2, 3),)) == (Run(4, 1, 3),)


def test_nothing_is_moved_of_who_has_computed_nothing() -> None:
    tables = [Table((0, 1), 0)]
    assert PageMove.of(tables, seated(tables, 4), LIMITS, LIMITS) is None
    assert PageMove.of([], (), LIMITS, LIMITS) is None


@pytest.mark.parametrize("name", SHAPES)
def test_pools_are_the_buffers_of_a_card(name: str) -> None:
    shape = SHAPES[name]
    for plan in (tensor_pipeline(shape, 4, 1), tensor_pipeline(shape, 1, 3)):
        for card in plan.cards:
            own = pools(shape, plan, card, LIMITS)
            assert [(p.buffer, p.nbytes) for p in own] == [
                (b.name, b.nbytes) for b in kv_buffers(shape, plan, card, LIMITS)
            ]
            for pool in own:
                assert pool.buffer == f"kv.{pool.layer}"
                both = 2 * pool.page_bytes * pool.heads.size
                assert both == kv_page_bytes(shape, plan.place(card)[1], LIMITS)
                # Head by head, keys then values, page by page.
                places = [
                    (head, plane, page)
                    for head in range(pool.heads.start, pool.heads.stop)
                    for plane in range(2)
                    for page in range(pool.pages)
                ]
                offsets = [pool.offset(*place) for place in places]
                assert offsets == [i * pool.page_bytes for i in range(len(places))]
                assert [pool.at(offset) for offset in offsets] == places


# --- page by page -------------------------------------------------------------------------

# (layer, KV head, keys or values, page before).
Label = tuple[int, int, int, int]


def pages_of(shape: ModelShape, plan: Plan, card: int, limits: Limits) -> dict[str, list[Label]]:
    """What lies in a card's pools, page after page, said without `Pool`."""
    number, share = plan.place(card)
    stage = plan.stages[number]
    own = {"kv": share.kv_heads(shape.group)}
    if limits.kv_copies and len(stage.cards) > 1:
        # Whoever stands before it in its stage, the last before the first.
        own["kv_copy"] = stage.shares[stage.cards.index(card) - 1].kv_heads(shape.group)
    return {
        f"{name}.{layer}": [
            (layer, head, plane, page)
            for head in range(heads.start, heads.stop)
            for plane in range(2)
            for page in range(limits.kv_pages)
        ]
        for name, heads in own.items()
        for layer in range(stage.layers.start, stage.layers.stop)
        if not heads.empty
    }


def tables_of(draw: random.Random, pages: int) -> list[Table]:
    """Some sequences on some of so many pages."""
    numbers = list(range(pages))
    if draw.random() < 0.5:
        draw.shuffle(numbers)
    tables = []
    while numbers and draw.random() < 0.8:
        count = min(draw.randint(1, 4), len(numbers))
        own = tuple(numbers[:count])
        del numbers[:count]
        tables.append(Table(own, draw.randint(0, count)))
    return tables


def plan_of(draw: random.Random, shape: ModelShape, cards: Sequence[int]) -> Plan:
    """Some plan on some of these cards, in any order, perhaps with heads shared out unevenly."""
    tensor = draw.randint(1, min(len(cards), 4))
    pipeline = draw.randint(1, min(len(cards) // tensor, len(shape.layers)))
    plan = tensor_pipeline(shape, tensor, pipeline)
    if draw.random() < 0.5:
        stages = []
        for stage in plan.stages:
            cuts = sorted(draw.choices(range(shape.heads + 1), k=tensor - 1))
            edges = [0, *cuts, shape.heads]
            shares = tuple(
                attrs.evolve(share, heads=Share(edges[i], edges[i + 1]))
                for i, share in enumerate(stage.shares)
            )
            stages.append(Stage(stage.layers, shares))
        plan = attrs.evolve(plan, stages=tuple(stages))
    return on_cards(plan, draw.sample(cards, tensor * pipeline))


def carried_out(
    shape: ModelShape, before: Plan, after: Plan, held: Holdings, made: Reshard
) -> dict[tuple[int, str], dict[int, Label]]:
    """Where each page comes to lie, by card and buffer and its place there."""
    assert made.pages is not None
    old = {c: pages_of(shape, before, c, made.pages.before) for c in held.own}
    new = {c: pages_of(shape, after, c, made.pages.after) for c in after.cards}
    size = made.pages.before.page_positions * shape.head_dim * 2
    found: dict[tuple[int, str], dict[int, Label]] = {}
    for card, buffer in made.kept:
        if buffer in new[card]:
            found[card, buffer] = dict(enumerate(old[card][buffer]))
    for round_ in made.rounds:
        for pair in round_.made:
            if pair[1] in new[pair[0]]:
                found[pair] = {}
        for fill in round_.fills:
            if fill.buffer not in new[fill.card]:
                continue
            assert fill.source is not None
            for i in range(fill.nbytes // size):
                at = fill.offset // size + i
                assert at not in found[fill.card, fill.buffer], "filled twice"
                there = old[fill.source][fill.source_buffer]
                found[fill.card, fill.buffer][at] = there[fill.source_offset // size + i]
        for card, buffer in round_.freed:
            old[card].pop(buffer, None)
    # Nothing is left that is not kept.
    kept = {(c, b) for c, b in made.kept}
    assert all((c, b) in kept for c in old for b in old[c])
    return found


def check_all_there(
    shape: ModelShape,
    after: Plan,
    tables: Sequence[Table],
    seats: Seats,
    limits: Limits,
    found: dict[tuple[int, str], dict[int, Label]],
) -> None:
    wanted = {
        new: old
        for table, seat in zip(tables, seats, strict=True)
        for old, new in zip(table.pages[: table.used], seat, strict=False)
    }
    for card in after.cards:
        for buffer, places in pages_of(shape, after, card, limits).items():
            has = found.pop((card, buffer))
            for at, (layer, head, plane, page) in enumerate(places):
                if page in wanted:
                    assert has[at] == (layer, head, plane, wanted[page])
    assert not found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(60))
def test_every_page_is_there_in_the_end_where_each_is_left(
    seed: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, shape = random.Random(f"{seed} {name}"), SHAPES[name]
    monkeypatch.setattr(resharding, "ROUND_BYTES", draw.choice([1, 100_000, 64 << 20]))
    cards = list(range(draw.randint(2, 9)))
    before = plan_of(draw, shape, cards)
    lost = draw.sample(cards, draw.choice([0, 0, 1, 2]) if len(cards) > 3 else 0)
    alive = [card for card in cards if card not in lost]
    after = before if not lost and draw.random() < 0.2 else plan_of(draw, shape, alive)
    before_limits = attrs.evolve(LIMITS, kv_copies=draw.randrange(2))
    fewer = attrs.evolve(before_limits, kv_pages=draw.choice([12, 12, 7, 3]))
    tables = tables_of(draw, LIMITS.kv_pages)
    seats = seated(tables, fewer.kv_pages)
    relayed = draw.random() < 0.5
    topology = draw.choice([Topology.with_mock, Topology.ring, Topology.line])(10)
    pages = PageMove.of(tables, seats, before_limits, fewer, relayed=relayed)
    held = Holdings.of(before, (), alive)
    room = PLENTY if draw.random() < 0.8 else dict.fromkeys(cards, 200_000)
    mapped = draw.random() < 0.3
    made = reshard(shape, held, after, topology, context=64, room=room, pages=pages, mapped=mapped)
    check_reshard(shape, held, after, made, context=64)
    if mapped:
        assert len(made.rest) == sum(len(contents(shape, after, c, 64)) for c in after.cards)
    if pages is None:
        assert made.pages is None
        return

    def reached(layer: int, head: int, card: int) -> bool:
        """Whether someone is left who holds that head of that layer, and leads there."""
        holders = [
            c
            for c in held.own
            if any(
                (layer, head) == label[:2]
                for labels in pages_of(shape, before, c, before_limits).values()
                for label in labels
            )
        ]
        ways = [c for c in holders if c == card or relayed or topology.is_up(c, card)]
        return bool(ways)

    can = all(
        reached(*place, card)
        for card in after.cards
        for labels in pages_of(shape, after, card, fewer).values()
        for place in {label[:2] for label in labels}
    )
    if room is PLENTY:
        assert (made.pages == pages) == can
    if made.pages is not None:
        found = carried_out(shape, before, after, held, made)
        check_all_there(shape, after, tables, seats, fewer, found)
        # Over the host goes only what no link brings.
        for round_ in made.rounds:
            for fill in round_.moves:
                assert fill.hosted == (not topology.is_up(fill.source or 0, fill.card))


def test_a_kv_head_that_two_cards_hold_survives_either() -> None:
    shape = SHAPES["shared"]
    before = tensor_pipeline(shape, 4, 1)
    tables = [Table((0, 1), 2)]
    pages = PageMove.of(tables, seated(tables, 12), LIMITS, LIMITS)
    for lost in range(4):
        left = [card for card in range(4) if card != lost]
        after = on_cards(tensor_pipeline(shape, 3, 1), left)
        made = reshard(
            shape,
            Holdings.of(before, (), left),
            after,
            Topology.with_mock(4),
            context=64,
            room=PLENTY,
            pages=pages,
        )
        assert made.pages == pages
    # Not both.
    after = on_cards(tensor_pipeline(shape, 2, 1), (0, 1))
    held = Holdings.of(before, (), (0, 1))
    made = reshard(shape, held, after, Topology.with_mock(4), context=64, room=PLENTY, pages=pages)
    assert made.pages is None
    assert not any(b.startswith("kv.") for r in made.rounds for _, b in (*r.made, *r.freed))


@pytest.mark.parametrize("name", SHAPES)
def test_with_copies_any_card_may_be_lost_and_two_that_are_not_neighbours(name: str) -> None:
    shape = SHAPES[name]
    limits = attrs.evolve(LIMITS, kv_copies=1)
    tables = [Table((0, 1), 2)]
    pages = PageMove.of(tables, seated(tables, 12), limits, limits)
    before = tensor_pipeline(shape, 4, 1)
    for lost in [(0,), (1,), (2,), (3,), (0, 2), (1, 3)]:
        left = [card for card in range(4) if card not in lost]
        after = on_cards(tensor_pipeline(shape, len(left), 1), left)
        held = Holdings.of(before, (), left)
        made = reshard(
            shape, held, after, Topology.with_mock(4), context=64, room=PLENTY, pages=pages
        )
        check_reshard(shape, held, after, made, context=64)
        assert made.pages == pages
        # The copies are made anew.
        new = {b for r in made.rounds for _, b in r.made if b.startswith("kv_copy.")}
        kept = {b for _, b in made.kept if b.startswith("kv_copy.")}
        assert new | kept == {f"kv_copy.{i}" for i in range(len(shape.layers))}


def test_who_keeps_a_copy_is_the_next_card_of_the_stage() -> None:
    shape = SHAPES["heads alone"]
    plan = on_cards(tensor_pipeline(shape, 3, 2), (5, 0, 3, 1, 2, 4))
    assert [keeper(plan, card) for card in plan.cards] == [0, 3, 5, 2, 4, 1]
    for card in plan.cards:
        kept = ward(plan, card)
        assert kept is not None and keeper(plan, kept.card) == card != kept.card
        assert ward_heads(shape, plan, card) == kept.kv_heads(shape.group)
    # A card without heads keeps others', and has none to be kept.
    first, *others = plan.stages[0].shares
    uneven = (
        attrs.evolve(first, heads=Share(0, 8)),
        *(attrs.evolve(other, heads=Share(8, 8)) for other in others),
    )
    plan = attrs.evolve(plan, stages=(Stage(plan.stages[0].layers, uneven), plan.stages[1]))
    assert [keeper(plan, card) for card in (5, 0, 3)] == [0, None, None]
    assert ward(plan, 3) is ward(plan, 5) is None
    alone = tensor_pipeline(shape, 1, 2)
    assert keeper(alone, 0) is keeper(alone, 1) is ward(alone, 0) is None
    assert keeps_all(plan) and not keeps_all(alone)
    with pytest.raises(PlanError, match="card 1 alone has the keys and values of stage 1"):
        check_copies(FleetPlan.of(attrs.evolve(alone, stages=(plan.stages[0], alone.stages[1]))))


@pytest.mark.parametrize("name", SHAPES)
def test_copies_are_counted_as_memory(name: str) -> None:
    shape = SHAPES[name]
    limits = attrs.evolve(LIMITS, kv_copies=1)
    for plan in (tensor_pipeline(shape, 3, 1), tensor_pipeline(shape, 2, 2)):
        for card in plan.cards:
            names = {b.name for b in card_buffers(shape, plan, card, limits)}
            assert len([n for n in names if n.startswith("kv_copy.")]) == len(
                [n for n in names if n.startswith("kv.")]
            )
            more = card_bytes(shape, plan, card, limits) - card_bytes(shape, plan, card, LIMITS)
            extra = [b for b in card_buffers(shape, plan, card, limits) if "copy" in b.name]
            assert more == sum(b.ddr_bytes for b in extra) > 0
        # As many pages as fit, no more.
        ddr = tuple(card_bytes(shape, plan, card, limits) for card in plan.cards)
        assert fit_kv_pages(shape, plan, limits, ddr, 99) == LIMITS.kv_pages
        assert fit_kv_pages(shape, plan, LIMITS, ddr, 99) > LIMITS.kv_pages


def test_a_pool_of_the_same_heads_and_pages_stays_where_it_is() -> None:
    shape = SHAPES["heads alone"]
    before, after = tensor_pipeline(shape, 1, 2), on_cards(tensor_pipeline(shape, 1, 2), (0, 2))
    tables = [Table((0, 1), 2)]
    pages = PageMove.of(tables, seated(tables, 12), LIMITS, LIMITS)
    made = reshard(
        shape,
        Holdings.of(before, (), (0, 1)),
        after,
        Topology.with_mock(3),
        context=64,
        room=PLENTY,
        pages=pages,
    )
    assert [pair for pair in made.kept if pair[1].startswith("kv.")] == [(0, "kv.0"), (0, "kv.1")]
    moved = [f for r in made.rounds for f in r.fills if f.buffer.startswith("kv.")]
    assert {(f.source, f.card, f.buffer) for f in moved} == {(1, 2, "kv.2"), (1, 2, "kv.3")}
    # Only the two pages in use.
    assert sum(f.nbytes for f in moved) == 2 * 2 * 8 * 2 * 32 * 64 * 2


def test_pages_do_not_go_along_where_there_is_no_room_for_a_pool() -> None:
    shape = SHAPES["heads alone"]
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    tables = [Table((0, 1), 2)]
    pages = PageMove.of(tables, seated(tables, 12), LIMITS, LIMITS)
    first, *_ = pools(shape, before, 0, LIMITS)
    # At the end the last of the old ones lies beside all new ones.
    need = sum(p.nbytes for p in pools(shape, after, 0, LIMITS)) + first.nbytes
    for room, fits in ((need, True), (need - 1, False)):
        made = reshard(
            shape,
            Holdings.of(before, (), (0, 1, 2, 3)),
            after,
            Topology.with_mock(4),
            context=64,
            room={**PLENTY, 0: room},
            pages=pages,
        )
        assert (made.pages is not None) == fits


def test_more_ranges_than_rounds_can_move_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = SHAPES["heads alone"]
    before, after = tensor_pipeline(shape, 2, 1), tensor_pipeline(shape, 1, 1)
    tables = [Table((0, 2, 4), 3)]
    pages = PageMove.of(tables, seated(tables, 12), LIMITS, LIMITS)
    held = Holdings.of(before, (), (0, 1))
    for most, fits in ((48, True), (47, False)):
        monkeypatch.setattr(resharding, "RANGES_MAX", most)
        made = reshard(
            shape, held, after, Topology.with_mock(2), context=64, room=PLENTY, pages=pages
        )
        # Eight heads, keys and values, of three pages apart, a layer.
        assert (made.pages is not None) == fits
        if fits:
            per_round = [len([f for f in r.fills if "kv" in f.buffer]) for r in made.rounds]
            assert max(per_round) == 48


# --- what is not right --------------------------------------------------------------------


def spoilt(made: Reshard, draw: random.Random) -> Reshard:
    """With one mistake about pages."""
    rounds = list(made.rounds)
    number = draw.choice([i for i, r in enumerate(rounds) if any("kv" in b for _, b in r.made)])
    round_ = rounds[number]
    at = draw.choice([i for i, f in enumerate(round_.fills) if "kv" in f.buffer])
    fills, fill = list(round_.fills), round_.fills[at]
    size = LIMITS.page_positions * 64 * 2
    kind = draw.choice(["gone", "twice", "shorter", "other page", "other head", "nobody", "other"])
    if kind == "gone":
        del fills[at]
    elif kind == "twice":
        fills.append(fill)
    else:
        changed: Fill = {
            "shorter": attrs.evolve(fill, nbytes=fill.nbytes - 64),
            "other page": attrs.evolve(fill, source_offset=fill.source_offset + size),
            "other head": attrs.evolve(fill, offset=fill.offset + 24 * size),
            "nobody": attrs.evolve(fill, source=None),
            "other": attrs.evolve(fill, other="kv.1" if fill.buffer == "kv.0" else "kv.0"),
        }[kind]
        fills[at] = changed
    rounds[number] = attrs.evolve(round_, fills=tuple(fills))
    return attrs.evolve(made, rounds=tuple(rounds))


@pytest.mark.parametrize("seed", range(40))
def test_a_mistake_is_told(seed: int) -> None:
    draw, shape = random.Random(seed), SHAPES["heads alone"]
    before, after = tensor_pipeline(shape, 4, 1), on_cards(tensor_pipeline(shape, 3, 1), (0, 1, 3))
    tables = [Table((0, 1, 4), 3), Table((2, 3), 1)]
    fewer = attrs.evolve(LIMITS, kv_pages=draw.choice([12, 5]))
    pages = PageMove.of(tables, seated(tables, fewer.kv_pages), LIMITS, fewer)
    held = Holdings.of(before, (), (0, 1, 2, 3))
    made = reshard(shape, held, after, Topology.with_mock(4), context=64, room=PLENTY, pages=pages)
    check_reshard(shape, held, after, made, context=64)
    with pytest.raises(PlanError, match="card "):
        check_reshard(shape, held, after, spoilt(made, draw), context=64)
