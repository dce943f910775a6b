# SPDX-License-Identifier: Apache-2.0
"""Prices of single pieces, against the table of docs/api/timing-model.md by hand."""

from __future__ import annotations

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.cost import Machine, Pieces, StepRows, gathers_q8
from spanker.sched.plan import ModelShape
from spanker.sched.shapes import Dimensions, shape_of
from spanker.sched.shares import Share
from spanker.sched.topology import Topology

# 8 query heads of 32 on 2 KV heads; a row of q4_0 is 256 / 32 * 18 = 144 bytes.
DIMENSIONS = Dimensions(
    layers=3, hidden=256, heads=8, kv_heads=2, ffn=512, vocabulary=1000, context=64
)
# A byte takes a second, and nothing else takes anything.
BYTES = Profile("bytes", 1.0, 1.0, None, 0.0)
WHOLE = Share(0, 8)


def pieces(
    profile: Profile = BYTES,
    rows: StepRows | None = None,
    shape: ModelShape | None = None,
    cards: int = 2,
) -> Pieces:
    return Pieces(
        shape or shape_of(DIMENSIONS),
        Machine(profile, Topology.with_mock(cards)),
        rows or StepRows.decode(1, 10),
    )


def priced(**costs: float) -> Profile:
    """A machine where only what is named takes time."""
    return attrs.evolve(BYTES, local_ddr_bytes_per_s=1e30, **costs)


# --- rows ------------------------------------------------------------------------------


def test_rows_of_decoding() -> None:
    assert StepRows.decode(3, 10) == StepRows(3, 3, 30, 30)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17])
def test_rows_of_a_prompt_are_counted_one_by_one(first: int, tokens: int) -> None:
    seen = [first + i + 1 for i in range(tokens)]
    groups = [seen[i : i + 8][-1] for i in range(0, tokens, 8)]
    assert StepRows.prefill(first, tokens, 1) == StepRows(tokens, 1, sum(groups), sum(seen))


def test_rows_add_up() -> None:
    both = StepRows.decode(2, 5) + StepRows.prefill(0, 3, 0)
    assert both == StepRows(5, 2, 10 + 3, 10 + 6)


def test_rows_that_cannot_be() -> None:
    for batch, context in ((0, 1), (1, 0)):
        with pytest.raises(PlanError, match="at least 1"):
            StepRows.decode(batch, context)
    for first, tokens, outputs in ((-1, 1, 0), (0, 0, 0), (0, 2, 3)):
        with pytest.raises(PlanError, match="prefill step needs"):
            StepRows.prefill(first, tokens, outputs)


# --- a layer ---------------------------------------------------------------------------


def test_bytes_of_attention_with_half_the_heads() -> None:
    layer = shape_of(DIMENSIONS).layers[0]
    expected = (
        (256 * 8 + 4 * 256)  # norm
        + (4 * 256 + 272)  # quantise
        + (128 * 144 + 272 + 4 * 128)  # q: 4 heads of 32
        + 2 * (32 * 144 + 272 + 4 * 32)  # k and v: one KV head
        + (4 * 32 * 8 + 1 * 32 * 8)  # rope of q and k
        + 1 * 32 * 12  # KV append
        + (10 * 1 * 32 * 4 + 4 * 32 * 8)  # attention over 10 positions
    )
    assert pieces().attention(0, layer, Share(4, 8), q8=False) == expected
    quantised = 4 * 128 + 136
    assert pieces().attention(0, layer, Share(4, 8), q8=True) == expected + quantised


def test_a_head_more_may_bring_a_kv_head_more() -> None:
    """Heads 3 and 4 have different KV heads, 2 and 3 the same."""
    layer = shape_of(DIMENSIONS).layers[0]
    one, two = (pieces().attention(0, layer, Share(a, a + 2), False) for a in (2, 3))
    kv_head = 2 * (32 * 144 + 4 * 32) + 32 * 8 + 32 * 12 + 10 * 32 * 4
    assert two - one == kv_head


def test_multiply_adds_of_attention() -> None:
    layer = shape_of(DIMENSIONS).layers[0]
    int8 = pieces(priced(int8_madds_per_s=1.0)).attention(0, layer, WHOLE, True)
    assert int8 == pytest.approx((256 + 64 + 64) * 256)
    floats = pieces(priced(float_madds_per_s=1.0)).attention(0, layer, WHOLE, True)
    assert floats == pytest.approx(2 * 32 * 8 * 10)
    elements = pieces(priced(elements_per_s=1.0)).attention(0, layer, WHOLE, True)
    assert elements == pytest.approx(256 + 256 + (8 + 2) * 32 + 2 * 2 * 32 + 256)


def test_commands_of_every_piece() -> None:
    price, layer = pieces(priced(command_s=1.0)), shape_of(DIMENSIONS).layers[0]
    whole = Share(0, 512)
    assert round(price.embed(0, Share(0, 256))) == 1
    assert round(price.attention(0, layer, WHOLE, True)) == 10
    assert round(price.project(0, layer.attn_output, 256, requantise=False)) == 1
    assert round(price.project(0, layer.attn_output, 0, requantise=True)) == 1
    assert round(price.ffn(0, layer, whole, True)) == 6
    assert round(price.add(0)) == 1
    assert round(price.output(0, Share(0, 1000), 64)) == 7
    assert price.exchange_s(1) == 0 and price.exchange_s(2) == 1


def test_an_empty_share_takes_nothing() -> None:
    price, layer, none = pieces(priced(command_s=1.0)), shape_of(DIMENSIONS).layers[0], Share(0, 0)
    assert price.embed(0, none) == 0
    assert price.attention(0, layer, none, True) == 0
    assert price.project(0, layer.attn_output, 0, False) == 0
    assert price.ffn(0, layer, none, True) == 0
    assert price.output(0, none, 64) == 0


def test_weights_are_whole_tiles_of_16_rows() -> None:
    layer = shape_of(DIMENSIONS).layers[0]
    assert pieces().project(0, layer.attn_output, 17, False) == 32 * 144 + 272 + 4 * 17
    work = pieces(priced(int8_madds_per_s=1.0)).project(0, layer.attn_output, 17, False)
    assert work == pytest.approx(32 * 256)


def test_float_weights_take_floats_and_are_not_quantised_for() -> None:
    shape = shape_of(DIMENSIONS, "f16")
    layer = shape.layers[0]
    assert pieces(shape=shape).project(0, layer.attn_output, 16, False) == (
        16 * 512 + 4 * 256 + 4 * 16
    )
    assert pieces(shape=shape).ffn(0, layer, Share(0, 32), False) == (
        (256 * 8 + 4 * 256) + 2 * (32 * 512 + 4 * 256 + 4 * 32) + 32 * 12
    )


def test_bytes_of_the_ffn_and_of_the_output() -> None:
    layer, rows = shape_of(DIMENSIONS).layers[0], StepRows(5, 2, 50, 50)
    norm = 5 * 256 * 8 + 4 * 256
    expected = norm + 5 * (4 * 256 + 272) + 2 * (64 * 144 + 5 * (272 + 4 * 64)) + 5 * 64 * 12
    assert pieces(rows=rows).ffn(0, layer, Share(64, 128), False) == expected
    n = 1000 - 768
    expected = (
        2 * 256 * 8  # select
        + (2 * 256 * 8 + 4 * 256)
        + 2 * (4 * 256 + 272)
        + (240 * 144 + 2 * (272 + 4 * n))
        + (2 * n * 4 + 2 * 1 * 8)
        + (2 * n * 4 + 2 * 64 * 8)
        + 2 * 16
    )
    assert pieces(rows=rows).output(1, Share(768, 1000), 64) == expected


def test_a_step_without_outputs_takes_up_commands_only() -> None:
    rows = StepRows.prefill(0, 4, 0)
    assert pieces(rows=rows).output(0, Share(0, 1000), 64) == 0
    price = pieces(priced(command_s=1.0), rows)
    assert price.output(0, Share(0, 1000), 64) == pytest.approx(7)
    assert price.choose((0, 1), (0, 1)) == pytest.approx(2)


# --- exchanges ---------------------------------------------------------------------------


def test_bytes_that_are_gathered() -> None:
    price = pieces(rows=StepRows(3, 1, 9, 9))
    assert price.embed_gather(Share(0, 32)) == 3 * 32 * 4
    assert price.attention_gather(Share(1, 3), q8=False) == 3 * 64 * 4
    assert price.attention_gather(Share(1, 3), q8=True) == 3 * 2 * 34
    assert price.project_gather(16) == 3 * 16 * 4
    assert price.ffn_gather(Share(0, 96), q8=True) == 3 * 3 * 34


def test_blocks_are_gathered_where_no_share_cuts_one() -> None:
    layer = shape_of(DIMENSIONS).layers[0]
    assert gathers_q8(layer.attn_output, (Share(0, 3), Share(3, 8)), unit=32)
    assert not gathers_q8(layer.attn_output, (Share(0, 3), Share(3, 8)), unit=16)
    floats = shape_of(DIMENSIONS, "f16").layers[0]
    assert not gathers_q8(floats.attn_output, (Share(0, 8),), unit=32)


def test_a_handover_sends_a_row_to_each_card_of_the_next_stage() -> None:
    links = attrs.evolve(BYTES, local_ddr_bytes_per_s=1e30, intercard_latency_s=0.5, command_s=2.0)
    assert pieces(links, cards=4).handover((0, 1), (2, 3)).seconds == 2 + 256 * 4 + 0.5
    ports = attrs.evolve(links, port_bytes_per_s=1.0)
    assert pieces(ports, cards=4).handover((0,), (1, 2, 3)).seconds == 2 + 3 * 256 * 4 + 0.5


def test_choosing_among_cards_and_alone() -> None:
    links = attrs.evolve(BYTES, local_ddr_bytes_per_s=1e30, intercard_latency_s=0.5, command_s=2.0)
    # An exchange of 8 bytes, and CHOOSE.
    assert pieces(links).choose((0, 1), (0, 1)) == 2 + 8 + 0.5 + 2
    assert pieces(links).choose((0,), (0,)) == 2


def test_layers_that_differ_by_name_are_of_one_kind() -> None:
    shape = shape_of(DIMENSIONS)
    other = shape_of(DIMENSIONS, "q8_0").layers[1]
    mixed = attrs.evolve(shape, layers=(*shape.layers, other))
    assert mixed.kinds == ((0, 0, 0, 1), (shape.layers[0], other))
