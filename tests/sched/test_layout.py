# SPDX-License-Identifier: Apache-2.0
"""A card's memory under a plan: every byte accounted for, and how much KV cache fits."""

from __future__ import annotations

import attrs
import pytest
from model_shapes import SHAPES, make_shape

from spanker.errors import CardMemoryError
from spanker.sched.layout import (
    BufferSpec,
    card_buffers,
    card_bytes,
    embeds_from_output,
    fit_kv_pages,
    kv_page_bytes,
    layer_rows,
    rounding_bytes,
)
from spanker.sched.plan import Limits, ModelShape, Plan, tensor_pipeline

LIMITS = Limits(
    prompt_chunk=8,
    context=100,
    tokens_max=8,
    outputs_max=4,
    candidates=10,
    kv_pages=3,
    page_positions=32,
)
PLANS = [(1, 1), (2, 1), (3, 1), (7, 1), (16, 1), (1, 2), (2, 2), (5, 2)]


def sizes(shape: ModelShape, plan: Plan, card: int) -> dict[str, int]:
    buffers = card_buffers(shape, plan, card, LIMITS)
    assert len({b.name for b in buffers}) == len(buffers)
    return {b.name: b.nbytes for b in buffers}


def test_every_buffer_of_one_card_with_everything() -> None:
    shape = make_shape(layers=1, tied=False)
    q8 = 64 // 32 * 34
    assert sizes(shape, tensor_pipeline(shape, 1, 1), 0) == {
        "token_embd.weight.columns": 320 * 2 * 18,
        "blk.0.attn_norm.weight": 256,
        "blk.0.ffn_norm.weight": 256,
        "blk.0.attn_q.weight": 64 * 36,
        "blk.0.attn_k.weight": 32 * 36,
        "blk.0.attn_v.weight": 32 * 36,
        "blk.0.attn_output.weight": 64 * 36,
        "blk.0.ffn_gate.weight": 128 * 36,
        "blk.0.ffn_up.weight": 128 * 36,
        "blk.0.ffn_down.weight": 64 * 72,
        "output_norm.weight": 256,
        "output.rows": 320 * 128,
        "kv.0": 3 * 2 * 32 * 16 * 2 * 2,
        "rope": 100 * 16 * 4,
        "x": 8 * 256,
        "xn": 8 * 256,
        "xq": 8 * q8,
        "q": 8 * 256,
        "k": 8 * 128,
        "v": 8 * 128,
        "att": 8 * 256,
        "attq": 8 * q8,
        "y": 8 * 256,
        "gate": 8 * 512,
        "up": 8 * 512,
        "act": 8 * 512,
        "actq": 8 * 2 * q8,
        "xo": 4 * 256,
        "xon": 4 * 256,
        "xoq": 4 * q8,
        "logits": 4 * 320 * 4,
        "stats": 4 * 2 * 8,
        "top": 4 * 10 * 8,
        "best": 4 * 8,
        "chosen": 4 * 4,
    }


def tied(shape: ModelShape) -> bool:
    return shape.output.name == shape.embedding.name


@pytest.mark.parametrize(
    ("shape", "plan", "embedding_of_its_own"),
    [
        # One card holds the whole output matrix, which serves as the embedding too.
        (make_shape(), (1, 1), {0: False}),
        (make_shape(fmt="q6_k", hidden=256, ffn=256, head_dim=64), (1, 1), {0: False}),
        (make_shape(tied=False), (1, 1), {0: True}),
        # Columns and rows are with the first and the last stage.
        (make_shape(), (1, 2), {0: True, 1: False}),
        (make_shape(), (2, 2), {0: True, 1: True, 2: False, 3: False}),
        # Each card has some of the rows, or of the columns.
        (make_shape(), (2, 1), {0: True, 1: True}),
        (make_shape(vocabulary=256), (2, 1), {0: True, 1: True}),
        # All columns are one block: card 0 has them and, of 256 words, all rows too.
        (make_shape(hidden=32, vocabulary=256), (2, 1), {0: False, 1: False}),
        (make_shape(hidden=32, vocabulary=257), (2, 1), {0: True, 1: False}),
        (SHAPES["few words"], (3, 1), {0: False, 1: False, 2: False}),
        (SHAPES["k-quants"], (5, 1), {0: True, 1: True, 2: True, 3: False, 4: False}),
    ],
)
def test_a_card_with_the_whole_tied_output_needs_no_embedding(
    shape: ModelShape, plan: tuple[int, int], embedding_of_its_own: dict[int, bool]
) -> None:
    made = tensor_pipeline(shape, *plan)
    found = {c: "token_embd.weight.columns" in sizes(shape, made, c) for c in made.cards}
    assert found == embedding_of_its_own
    for card in made.cards:
        _, share = made.place(card)
        embeds = not share.columns.empty
        assert embeds_from_output(shape, share) == (embeds and not found[card])
        # Whoever embeds must be told the chosen token; without columns nobody asks.
        assert ("chosen" in sizes(shape, made, card)) == embeds


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tensor", "pipeline"), PLANS)
def test_who_votes_and_who_embeds_have_the_best_tokens(
    name: str, tensor: int, pipeline: int
) -> None:
    shape = SHAPES[name]
    plan = tensor_pipeline(shape, tensor, pipeline)
    voters = [c for c in plan.cards if "output.rows" in sizes(shape, plan, c)]
    embedders = [c for c in plan.cards if "chosen" in sizes(shape, plan, c)]
    assert (list(plan.voters), list(plan.embedders)) == (voters, embedders)
    assert voters and embedders
    for card in plan.cards:
        held = sizes(shape, plan, card)
        assert plan.chooses(card) == (card in voters or card in embedders)
        assert held.get("best") == (4 * len(voters) * 8 if plan.chooses(card) else None)
        assert held.get("chosen") == (4 * 4 if card in embedders else None)


def test_rows_are_padded_to_tiles_of_16() -> None:
    # 3 heads of 24 over 3 cards: 24 rows each, 32 as packed; 300 words: 256 + 44, the latter 48.
    shape = make_shape(heads=3, kv_heads=3, head_dim=24, hidden=96, vocabulary=300)
    plan = tensor_pipeline(shape, 3, 1)
    for card in range(3):
        assert sizes(shape, plan, card)["blk.0.attn_k.weight"] == 32 * 3 * 18
    assert sizes(shape, plan, 1)["output.rows"] == 48 * 3 * 18
    assert sizes(shape, plan, 1)["logits"] == 4 * 44 * 4
    assert not {"output.rows", "logits", "stats", "top"} & set(sizes(shape, plan, 2))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tensor", "pipeline"), PLANS)
def test_cards_of_a_stage_hold_each_row_once(name: str, tensor: int, pipeline: int) -> None:
    shape = SHAPES[name]
    plan = tensor_pipeline(shape, tensor, pipeline)
    for stage in plan.stages:
        layer = shape.layers[stage.layers.start]
        held: dict[str, list[int]] = {m.name: [] for m in layer.matrices}
        for share in stage.shares:
            for matrix, first, rows in layer_rows(layer, shape, share):
                assert rows > 0
                held[matrix.name].extend(range(first, first + rows))
        for matrix in layer.matrices:
            rows = held[matrix.name]
            if matrix in (layer.attn_k, layer.attn_v):
                # A KV head may be on two cards, whose query heads share it.
                assert set(rows) == set(range(matrix.rows))
            else:
                assert sorted(rows) == list(range(matrix.rows))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tensor", "pipeline"), PLANS)
def test_a_stage_holds_its_layers_and_no_others(name: str, tensor: int, pipeline: int) -> None:
    shape = SHAPES[name]
    plan = tensor_pipeline(shape, tensor, pipeline)
    for number, stage in enumerate(plan.stages):
        for share in stage.shares:
            names = sizes(shape, plan, share.card)
            layers = {int(n.split(".")[1]) for n in names if n.startswith("blk.")}
            assert layers == set(range(stage.layers.start, stage.layers.stop))
            kv = {int(n.split(".")[1]) for n in names if n.startswith("kv.")}
            assert kv == (set() if share.heads.empty else layers)
            assert ("output.rows" in names) == (not share.vocabulary.empty)
            assert ("xo" in names) == (number == len(plan.stages) - 1)
            embeds = not share.columns.empty
            everything = (share.columns.size, share.vocabulary.size)
            packed = tied(shape) and everything == (shape.hidden, shape.vocabulary)
            assert ("token_embd.weight.columns" in names) == (embeds and not packed)


def test_a_card_outside_of_the_plan_holds_nothing() -> None:
    shape = make_shape()
    plan = tensor_pipeline(shape, 2, 1)
    assert card_buffers(shape, plan, 2, LIMITS) == ()
    assert card_bytes(shape, plan, 2, LIMITS) == 0


def test_ddr_bytes_are_whole_allocation_units() -> None:
    assert [BufferSpec("b", n).ddr_bytes for n in (1, 63, 64, 65)] == [64, 64, 64, 128]
    shape = make_shape(layers=3)
    shape = attrs.evolve(shape, layers=(*shape.layers, make_shape(fmt="q8_0", layers=4).layers[3]))
    plan = tensor_pipeline(shape, 3, 1)
    for card in range(3):
        buffers = card_buffers(shape, plan, card, LIMITS)
        assert card_bytes(shape, plan, card, LIMITS) == sum(
            -(-b.nbytes // 64) * 64 for b in buffers
        )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tensor", "pipeline"), PLANS)
def test_room_for_rounding_is_enough_for_any_plan(name: str, tensor: int, pipeline: int) -> None:
    shape = SHAPES[name]
    if pipeline > len(shape.layers):
        return
    plan = tensor_pipeline(shape, tensor, pipeline)
    assert rounding_bytes(shape, LIMITS, 64) == 0
    for granule in (128, 4096, 65536):
        room = rounding_bytes(shape, attrs.evolve(LIMITS, kv_pages=0), granule)
        for card in plan.cards:
            taken = card_bytes(shape, plan, card, LIMITS, granule=granule)
            buffers = card_buffers(shape, plan, card, LIMITS)
            assert taken == sum(-(-b.nbytes // granule) * granule for b in buffers)
            assert 0 <= taken - card_bytes(shape, plan, card, LIMITS) <= room


# --- KV pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_pages_fit_to_the_byte(name: str, tensor: int, pipeline: int) -> None:
    shape = SHAPES[name]
    plan = tensor_pipeline(shape, tensor, pipeline)
    plenty = 1 << 40
    for card in plan.cards:
        for pages in (4, 5, 11):
            need = card_bytes(shape, plan, card, attrs.evolve(LIMITS, kv_pages=pages))
            ddr = [plenty] * len(plan.cards)
            ddr[card] = need
            page = kv_page_bytes(shape, plan.place(card)[1], LIMITS)
            best = pages if page else 99
            assert fit_kv_pages(shape, plan, LIMITS, tuple(ddr), 99) == best
            if page and pages > 4:
                ddr[card] = need - 1
                assert fit_kv_pages(shape, plan, LIMITS, tuple(ddr), 99) == pages - 1


def test_the_smallest_room_decides_and_no_more_is_taken_than_wanted() -> None:
    shape = make_shape()
    plan = tensor_pipeline(shape, 2, 1)

    def need(card: int, pages: int) -> int:
        return card_bytes(shape, plan, card, attrs.evolve(LIMITS, kv_pages=pages))

    assert fit_kv_pages(shape, plan, LIMITS, (need(0, 9), need(1, 6)), 99) == 6
    assert fit_kv_pages(shape, plan, LIMITS, (need(0, 9), need(1, 6)), 5) == 5
    # One context of 100 positions needs 4 pages of 32, whatever was wanted.
    assert fit_kv_pages(shape, plan, LIMITS, (need(0, 9), need(1, 6)), 1) == 4


def test_less_than_one_context_is_refused_with_the_bytes_needed() -> None:
    shape = make_shape()
    plan = tensor_pipeline(shape, 2, 1)
    need = [card_bytes(shape, plan, c, attrs.evolve(LIMITS, kv_pages=4)) for c in range(2)]
    assert fit_kv_pages(shape, plan, LIMITS, tuple(need), 99) == 4
    with pytest.raises(CardMemoryError) as caught:
        fit_kv_pages(shape, plan, LIMITS, (need[0], need[1] - 1), 99)
    assert caught.value.card == 1
    text = str(caught.value)
    assert f"{need[1]:,} bytes on card 1" in text and f"{need[1] - 1:,}" in text
    assert "more cards" in text and "\n" not in text
